"""Cross-fitted linear probes.

With few rows a Gaussian model of the classes is mixed in (see gaussian.py). The kind "auto" also lets each probe choose
one covariance per class, which makes it quadratic in the features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from ..dataset.labels import Target
from ..features.matrix import Inputs, JointInputs, Numbers, RowIndex, has_terms, read_terms
from .cross_fit import CrossFit, FitRows
from .design import Design, TermUnits, TorchTarget, Units, read_design, read_text_design
from .gaussian import MAX_FEATURES, MAX_ROWS, Curve, MixedModels, mix_in_gaussian
from .glm import GlmLoss, fit_glm, probe_batches
from .l2_choice import choose_l2
from .lbfgs import Minimum, merge_minima
from .prediction import predict_out_of_fold

if TYPE_CHECKING:
    from .config import ProbeConfig

log = logging.getLogger("mmaudit")

# Tolerance with bfloat16 products: a step that gains less is not worth its time (at 5e-4 the loss is .004 better).
_BFLOAT16_TOLERANCE = 2e-3
_MIN_BFLOAT16_SIZE = 1 << 22  # rows times features, below which bfloat16 saves too little time for its rounding
_MAX_TERMS = 1 << 16  # of texts, the most frequent ones; 10^5 short texts have about as many that occur twice
_MAX_TERM_WEIGHTS = 1 << 26  # of all probes: 256 MiB
_TYPICAL_STEPS = 10  # of the fits measured; a hard one takes a few hundred
_MAX_SECONDS = 60.0  # a fit whose typical number of steps takes longer is logged
_MIN_LOGITS = 1 << 26  # rows x probes x outputs; below, ten steps take a few seconds, and nothing is measured
_TIMED_LOGITS = 1 << 23  # a few hundredths of a second, unless _MIN_TIMED_ROWS rows have more
_MIN_TIMED_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """p linear models, r repeats of f folds: theta (p, d + t + 1, k) of standardised features and terms of texts.

    The curve of a probe that chose quadratic boundaries, else None, is added to its logits. snapshots are the thetas of
    the first repeat during the fit, after 1, 2, 4, ... steps and the last.
    """

    inputs: Inputs
    cross_fits: tuple[CrossFit, ...]
    units: Units
    term_units: TermUnits | None
    theta: Tensor
    curves: tuple[Curve | None, ...]
    l2: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Compute out-of-fold logits in each repeat: (r, b, k)."""
        states = self._predict(self.cross_fits, self.theta[None], rows, self.inputs if inputs is None else inputs)
        return np.asarray(states[0])

    def logits_by_epoch(self, rows: RowIndex) -> NDArray[np.float32]:
        """Compute logits of the first repeat at its snapshots: (e, b, k). Only the last snapshot has curves."""
        return np.asarray(self._predict(self.cross_fits[:1], torch.stack(self.snapshots), rows, self.inputs)[:, 0])

    def take(self, samples: RowIndex, inputs: Inputs) -> LinearProbe:
        """Return the probe for a part of the samples (b,), whose features are `inputs`."""
        return replace(self, inputs=inputs, cross_fits=tuple(item.take(samples) for item in self.cross_fits))

    def _predict(
        self, cross_fits: Sequence[CrossFit], thetas: Tensor, rows: RowIndex, inputs: Inputs
    ) -> NDArray[np.float32]:
        """Compute logits of several states (e, p, d + 1, k) of the probes, the last with curves: (e, r, b, k)."""
        logits = np.empty((len(thetas), len(cross_fits), len(rows), thetas.shape[3]), dtype=np.float32)
        straight: tuple[Curve | None, ...] = (None,) * len(self.curves)
        for positions, numbers in self.units.read(Numbers(inputs=inputs), rows):
            z = _Standardised(numbers=numbers, terms=self._read_terms(inputs, rows[positions]))
            for state, theta in enumerate(thetas):
                curves = self.curves if state == len(thetas) - 1 else straight
                predicted = predict_out_of_fold(cross_fits, rows[positions], _predictor(theta, curves, z))
                logits[state, :, positions] = predicted.cpu().numpy()
        return logits

    def _read_terms(self, inputs: Inputs, rows: RowIndex) -> csr_array | None:
        """Read the terms (b, t) of texts in the units of the probe; None without texts."""
        if self.term_units is None:
            return None
        return self.term_units.standardise(read_terms(inputs, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standardised:
    """Standardised rows: numbers (b, d), and terms of texts (b, t)."""

    numbers: Tensor
    terms: csr_array | None

    def logits(self, theta: Tensor, positions: Tensor) -> Tensor:
        """Compute the logits (c, k) of the rows at these positions under one model theta (d + t + 1, k)."""
        d = self.numbers.shape[1]
        logits = torch.addmm(theta[-1], self.numbers[positions], theta[:d])
        if self.terms is None:
            return logits
        return logits.add_(torch.from_numpy(self.terms[positions.numpy()] @ theta[d:-1].numpy()))


def fit_linear(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    fit_rows: FitRows,
    *,
    config: ProbeConfig,
    device: str,
    part_l2: Sequence[Tensor] = (),
) -> LinearProbe:
    """Fit all folds and repeats as one stacked parameter, each on its own rows and with its own l2, see choose_l2.

    part_l2: of joint inputs, the l2 (p,) of the same probes of each part alone. The penalties of the parts then keep
    these ratios, and l2 is their common factor: a part that is noise alone is as good as left out.
    """
    design = _read(inputs, target, fit_rows, config=config, device=device)
    if part_l2:
        assert isinstance(inputs, JointInputs)
        design = replace(design, relative_l2=_relative_l2(inputs, design, torch.stack(list(part_l2), dim=1)))
    torch_target = TorchTarget.of(target, fit_rows.rows, design.curvature)
    log_estimate(design, torch_target, fit_rows, max_steps=config.max_steps)
    l2 = choose_l2(design, torch_target, fit_rows, key=cross_fits[0].key, config=config)
    fitted = _fit(design, torch_target, fit_rows, l2, config)
    mixed = MixedModels(theta=fitted.theta, curves=(None,) * len(l2))
    if _uses_gaussian(design, torch_target, fit_rows, config):
        mixed = mix_in_gaussian(
            design,
            torch_target,
            fit_rows,
            cross_fits,
            theta=fitted.theta,
            l2=l2,
            max_steps=config.max_steps,
            curved=config.kind == "auto",
        )
    num_first = cross_fits[0].num_folds
    return LinearProbe(
        inputs=inputs,
        cross_fits=tuple(cross_fits),
        units=design.units,
        term_units=design.term_units,
        theta=_in_units(mixed.theta, torch_target),
        curves=mixed.curves,
        l2=l2,
        num_steps=fitted.num_steps,
        snapshots=tuple(
            _in_units(snapshot[:num_first], torch_target) for snapshot in (*fitted.snapshots[:-1], mixed.theta)
        ),
    )


def _read(inputs: Inputs, target: Target, fit_rows: FitRows, *, config: ProbeConfig, device: str) -> Design:
    """Read the rows that any probe trains on; those of texts are sparse and stay on the CPU."""
    rows, num_probes = fit_rows.rows, fit_rows.train_mask.shape[1]
    size = len(rows) * Numbers(inputs=inputs).num_features
    if not has_terms(inputs):
        return read_design(inputs, rows, products=product_dtype(config.precision, device, size=size), device=device)
    max_terms = min(_MAX_TERMS, max(1, _MAX_TERM_WEIGHTS // (num_probes * target.num_outputs)))
    return read_text_design(
        inputs, rows, products=product_dtype(config.precision, "cpu", size=size), max_terms=max_terms
    )


def _relative_l2(inputs: JointInputs, design: Design, part_l2: Tensor) -> Tensor:
    """Return factors of l2 (p, d + t) in the ratios of part_l2 (p, m), whose geometric mean over the parts is 1."""
    terms = np.empty(0, np.intp) if design.term_units is None else design.term_units.terms
    part_of_column = np.concatenate(inputs.parts_of_columns(terms))
    factor = part_l2 / part_l2.log().mean(dim=1, keepdim=True).exp()
    return factor[:, torch.from_numpy(part_of_column).to(factor.device)]


def _fit(design: Design, torch_target: TorchTarget, fit_rows: FitRows, l2: Tensor, config: ProbeConfig) -> Minimum:
    """Fit every probe from zero weights, so that the snapshots cover the whole fit."""
    coarse = design.rows.dtype == torch.bfloat16
    loss = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask).to(l2.device))
    fitted = [
        fit_glm(
            loss.take_masks(probes),
            l2[probes],
            max_steps=config.max_steps,
            tolerance=max(config.tolerance, _BFLOAT16_TOLERANCE if coarse else 0.0),
            patience=1 if coarse else 2,
        )
        for probes in probe_batches(loss)
    ]
    return merge_minima(fitted)


def _uses_gaussian(design: Design, torch_target: TorchTarget, fit_rows: FitRows, config: ProbeConfig) -> bool:
    """Whether a Gaussian is mixed in: few enough rows and features, held-out rows, and more than one candidate l2."""
    small = len(fit_rows.rows) <= MAX_ROWS and design.num_features <= MAX_FEATURES and design.terms is None
    chooses = len(config.l2_penalties) > 1 and fit_rows.can_choose
    return config.gaussian and torch_target.task == "classification" and small and chooses


def _predictor(theta: Tensor, curves: Sequence[Curve | None], z: _Standardised) -> Callable[[int, Tensor], Tensor]:
    def predict_rows(probe: int, positions: Tensor) -> Tensor:
        straight, curve = z.logits(theta[probe], positions), curves[probe]
        return straight if curve is None else straight + curve.logits(z.numbers[positions])

    return predict_rows


def product_dtype(precision: str, device: str, *, size: int) -> torch.dtype:
    """Return the dtype of matrix products, by what the hardware supports: never by a measurement, which may vary."""
    if precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        able = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cpu
        precision = "bfloat16" if able and size >= _MIN_BFLOAT16_SIZE else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def _in_units(theta: Tensor, torch_target: TorchTarget) -> Tensor:
    """Return models (p, d + 1, k) whose outputs are in the units of the target."""
    scaled = theta * torch_target.scale
    scaled[:, -1] += torch_target.centre
    return scaled


def log_estimate(design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, max_steps: int) -> None:
    """Log the seconds per step, the number of steps and the settings that reduce them, if a fit may take long."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    if num_rows * num_probes * torch_target.num_outputs < _MIN_LOGITS:
        return
    seconds = step_seconds(design, torch_target, fit_rows)
    steps = min(_TYPICAL_STEPS, max_steps)
    if seconds * steps > _MAX_SECONDS:
        log.info(
            "fitting %d probes to %d rows, %d outputs and %d features: %.1f s per step, %d steps %s, at most %d steps "
            "%s; limit it with --set probe.max_steps=N, or shorten it with --repeats 1, --set probe.folds=2, "
            "--set probe.max_rows=N, --set probe.joint=false or --set probe.control=false",
            num_probes,
            num_rows,
            torch_target.num_outputs,
            design.num_features,
            seconds,
            steps,
            _duration(steps * seconds),
            max_steps,
            _duration(max_steps * seconds),
        )


def step_seconds(design: Design, torch_target: TorchTarget, fit_rows: FitRows) -> float:
    """Measure the seconds of one loss and gradient of all probes: the faster of two runs over a few rows, scaled up."""
    num_rows, num_probes = len(fit_rows.rows), int(fit_rows.train_mask.shape[1])
    num_timed = min(num_rows, max(_MIN_TIMED_ROWS, _TIMED_LOGITS // (num_probes * torch_target.num_outputs)))
    loss = GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask).to(design.rows.device))
    loss = replace(loss, weights=loss.weights[:num_timed])
    theta = design.curvature.new_full((num_probes, design.num_features + 1, torch_target.num_outputs), 1e-3)
    column = torch.arange(num_probes, device=theta.device)
    seconds = list[float]()
    for _ in range(2):
        start = time.perf_counter()
        loss.compute(theta, column)[0].cpu()  # the copy synchronises with a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds) * (num_rows / num_timed)


def _duration(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
