"""Cross-fitted linear probes, with the choice of their L2 penalty.

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
from torch import Tensor

from ..dataset.labels import Target
from ..features.matrix import Inputs, RowIndex
from .cross_fit import CrossFit, FitRows, predict_out_of_fold
from .design import Design, TorchTarget, Units, choose_outputs, read_design
from .gaussian import MAX_FEATURES, MAX_ROWS, Curve, MixedModels, mix_in_gaussian
from .glm import GlmLoss, Minimum, fit_glm

if TYPE_CHECKING:
    from .config import ProbeConfig

log = logging.getLogger("mmaudit")

_MAX_LOSS_RATIO = 2.0  # a trial goes on while its excess loss is at most this many times the gain of its last step
_TOLERANCE = 4e-2  # enough to rank the penalties; with few rows, a tighter tolerance fits noise
_MAX_STEPS = 10
_MARGIN = 1e-5  # ten times the rounding error of a mean loss: of two losses this close, the larger l2 is chosen
# Tolerance with bfloat16 products: a step that gains less is not worth its time (at 5e-4 the loss is .004 better).
_BFLOAT16_TOLERANCE = 2e-3
_MIN_BFLOAT16_SIZE = 1 << 22  # rows times features, below which bfloat16 saves too little time for its rounding
_TYPICAL_STEPS = 10  # of the fits measured; a hard one takes a few hundred
_MAX_SECONDS = 60.0  # a fit whose typical number of steps takes longer is logged
_MIN_LOGITS = 1 << 26  # rows x probes x outputs; below, ten steps take a few seconds, and nothing is measured
_TIMED_LOGITS = 1 << 23  # a few hundredths of a second, unless _MIN_TIMED_ROWS rows have more
_MIN_TIMED_ROWS = 128


def choose_l2(
    design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, key: NDArray[np.uint64], config: ProbeConfig
) -> Tensor:
    """Choose for each of p probes the l2 with the lowest loss on the rows that it holds out, (p,).

    It is chosen on the first rows by key, and of many outputs on a subset, and scaled like scikit-learn's C, the
    variance of a prior: for a mean over s times as many rows it is s times smaller. Without held-out rows it is the
    middle one of the candidates.
    """
    path = sorted(config.l2_penalties, reverse=True)
    torch_target, is_chosen = _choice_data(torch_target, key[fit_rows.rows], max_rows=config.choice_rows)
    choice_rows = fit_rows.take(np.flatnonzero(is_chosen))
    if len(path) == 1 or not choice_rows.can_choose:
        return design.curvature.new_full((fit_rows.train_mask.shape[1],), path[len(path) // 2])
    train_only = choice_rows.train_mask & ~choice_rows.holdout_mask
    train_loss, holdout_loss = (
        _loss_over(design, torch_target, is_chosen, mask) for mask in (train_only, choice_rows.holdout_mask)
    )
    l2 = _compare_l2(train_loss, holdout_loss, design.curvature.new_tensor(path))
    return l2 * torch.from_numpy(train_only.sum(axis=0) / fit_rows.train_mask.sum(axis=0)).to(l2)


def _choice_data(
    torch_target: TorchTarget, key: NDArray[np.uint64], *, max_rows: int
) -> tuple[TorchTarget, NDArray[np.bool_]]:
    """Return the target with the outputs that l2 is chosen on, and the mask (n,) of the rows, with keys (n,)."""
    label, k = torch_target.values, torch_target.num_outputs
    rows, outputs = choose_outputs(label.cpu().numpy(), key, task=torch_target.task, num_outputs=k, max_rows=max_rows)
    mask = np.isin(np.arange(len(key)), rows)
    if len(outputs) == k:
        return torch_target, mask
    index = torch.from_numpy(outputs).to(label.device)
    label = torch.searchsorted(index, label) if torch_target.task == "classification" else label[:, index]
    return replace(torch_target, values=label, num_outputs=len(outputs)), mask


def _loss_over(
    design: Design, torch_target: TorchTarget, is_chosen: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> GlmLoss:
    """Return the losses over the masks (s, p) of the chosen rows, without the rows that are in no mask."""
    used = mask.any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(is_chosen)[used]).to(design.rows.device)
    torch_target = replace(torch_target, values=torch_target.values[rows])
    return GlmLoss.of(design.take(rows), torch_target, torch.from_numpy(mask[used]).to(rows.device))


def _compare_l2(train_loss: GlmLoss, holdout_loss: GlmLoss, path: Tensor) -> Tensor:
    """Fit all probes with all penalties as one stacked parameter, and return the best l2 of each probe: (p,).

    Model s * p + j is probe j with penalty s, on the rows of probe j: one mask per probe serves all penalties.
    """
    num_probes = train_loss.weights.shape[1]
    trial = _L2Trial(holdout_loss=holdout_loss, losses=path.new_full((len(path), num_probes), torch.inf))
    fit_glm(
        train_loss,
        path.repeat_interleave(num_probes),
        max_steps=_MAX_STEPS,
        tolerance=_TOLERANCE,
        patience=1,
        select_active=trial.select_active,
    )
    return _interpolate_l2(trial.losses, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _L2Trial:
    """Losses (s, p) on the held-out rows after the last step, largest l2 first; infinite once a trial is stopped."""

    holdout_loss: GlmLoss
    losses: Tensor

    def select_active(self, alive: Tensor, theta: Tensor) -> Tensor:
        """Record the losses of the active fits and return the mask of those to continue.

        A fit with less l2 than the best is stopped when its loss exceeds the best by more than _MAX_LOSS_RATIO times
        the gain of its last step: further steps overfit. Fits with more l2 than the best run to their end, which is
        near, since held-out rows favour weak penalties until a fit has converged; so does the next weaker one, which
        the parabola needs.
        """
        num_probes = self.losses.shape[1]
        l2_index, probe = alive // num_probes, alive % num_probes
        loss, _ = self.holdout_loss.compute(theta, probe, with_gradient=False)
        gain = self.losses[l2_index, probe] - loss
        self.losses[l2_index, probe] = loss
        best = _first_minimum(self.losses)
        excess = loss - self.losses[best[probe], probe]
        continues = (l2_index <= best[probe] + 1) | (excess <= _MAX_LOSS_RATIO * gain)
        self.losses[l2_index[~continues], probe[~continues]] = torch.inf
        return continues


def _first_minimum(losses: Tensor) -> Tensor:
    """Return the index (p,) of the first penalty after which a probe's loss (s, p) does not fall by _MARGIN or more."""
    rises = losses[1:] >= losses[:-1] - _MARGIN
    return torch.cat([rises, torch.ones_like(rises[:1])]).int().argmax(dim=0)


def _interpolate_l2(losses: Tensor, path: Tensor) -> Tensor:
    """Return the l2 at the vertex of the parabola through each probe's lowest loss and its two neighbours: (p,).

    The parabola is in log l2, and the vertex is bounded half-way to each neighbour. At an end of the candidates, the
    end itself.
    """
    best = _first_minimum(losses)
    weaker = losses.gather(0, (best + 1).clamp_max(len(path) - 1)[None])[0]
    inside = ((best > 0) & (best < len(path) - 1) & weaker.isfinite()).nonzero().squeeze(1)
    best_inside = best[inside]
    x0, x1, x2 = (path.log()[best_inside + step] for step in (-1, 0, 1))
    y0, y1, y2 = (losses[best_inside + step, inside] for step in (-1, 0, 1))
    left_slope, right_slope = (y0 - y1) / (x0 - x1), (y1 - y2) / (x1 - x2)
    curvature = (left_slope - right_slope) / (x0 - x2)
    vertex = (x0 + x1) / 2 - left_slope / (2 * curvature)
    vertex = torch.minimum(torch.maximum(vertex, (x1 + x2) / 2), (x0 + x1) / 2)  # x0 is the largest l2
    l2 = path[best].clone()
    l2[inside] = torch.where((curvature > 0) & vertex.isfinite(), vertex.exp(), l2[inside])
    return l2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """p linear models, r repeats of f folds: theta (p, d + 1, k) of standardised features.

    The curve of a probe that chose quadratic boundaries, else None, is added to its logits. snapshots are the thetas of
    the first repeat during the fit, after 1, 2, 4, ... steps and the last.
    """

    inputs: Inputs
    cross_fits: tuple[CrossFit, ...]
    units: Units
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

    def _predict(
        self, cross_fits: Sequence[CrossFit], thetas: Tensor, rows: RowIndex, inputs: Inputs
    ) -> NDArray[np.float32]:
        """Compute logits of several states (e, p, d + 1, k) of the probes, the last with curves: (e, r, b, k)."""
        logits = np.empty((len(thetas), len(cross_fits), len(rows), thetas.shape[3]), dtype=np.float32)
        straight: tuple[Curve | None, ...] = (None,) * len(self.curves)
        for positions, z in self.units.read(inputs, rows):
            for state, theta in enumerate(thetas):
                curves = self.curves if state == len(thetas) - 1 else straight
                predicted = predict_out_of_fold(cross_fits, rows[positions], _predictor(theta, curves, z))
                logits[state, :, positions] = predicted.cpu().numpy()
        return logits


def fit_linear(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    fit_rows: FitRows,
    *,
    config: ProbeConfig,
    device: str,
) -> LinearProbe:
    """Fit all folds and repeats as one stacked parameter, each on its own rows and with its own l2, see choose_l2."""
    products = product_dtype(config.precision, device, size=len(fit_rows.rows) * inputs.num_features)
    design = read_design(inputs, fit_rows.rows, products=products, device=device)
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
        theta=_in_units(mixed.theta, torch_target),
        curves=mixed.curves,
        l2=l2,
        num_steps=fitted.num_steps,
        snapshots=tuple(
            _in_units(snapshot[:num_first], torch_target) for snapshot in (*fitted.snapshots[:-1], mixed.theta)
        ),
    )


def _fit(design: Design, torch_target: TorchTarget, fit_rows: FitRows, l2: Tensor, config: ProbeConfig) -> Minimum:
    """Fit every probe from zero weights, so that the snapshots cover the whole fit."""
    coarse = design.rows.dtype == torch.bfloat16
    return fit_glm(
        GlmLoss.of(design, torch_target, torch.from_numpy(fit_rows.train_mask).to(l2.device)),
        l2,
        max_steps=config.max_steps,
        tolerance=max(config.tolerance, _BFLOAT16_TOLERANCE if coarse else 0.0),
        patience=1 if coarse else 2,
    )


def _uses_gaussian(design: Design, torch_target: TorchTarget, fit_rows: FitRows, config: ProbeConfig) -> bool:
    """Whether a Gaussian is mixed in: few enough rows and features, held-out rows, and more than one candidate l2."""
    small = len(fit_rows.rows) <= MAX_ROWS and design.rows.shape[1] <= MAX_FEATURES
    chooses = len(config.l2_penalties) > 1 and fit_rows.can_choose
    return config.gaussian and torch_target.task == "classification" and small and chooses


def _predictor(theta: Tensor, curves: Sequence[Curve | None], z: Tensor) -> Callable[[int, Tensor], Tensor]:
    def predict_rows(probe: int, positions: Tensor) -> Tensor:
        straight, curve = torch.addmm(theta[probe, -1], z[positions], theta[probe, :-1]), curves[probe]
        return straight if curve is None else straight + curve.logits(z[positions])

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
            design.rows.shape[1],
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
    theta = design.curvature.new_full((num_probes, design.rows.shape[1] + 1, torch_target.num_outputs), 1e-3)
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
