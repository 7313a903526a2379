"""Cross-fitted linear probes, with the choice of their L2 penalty.

Of few rows a Gaussian model of the classes is mixed in (see gaussian.py). With covariances of each class's own, which
the kind "auto" allows and each probe tries, what is found is linear in the features no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cross_fit import FitRows
from .design import Design
from .glm import fit_glm, mean_loss
from .targets import TorchTarget, choose_outputs

if TYPE_CHECKING:
    from .config import ProbeConfig
from collections.abc import Callable, Sequence

from ..dataset.labels import Target
from ..features.matrix import Inputs, Rows
from .cross_fit import CrossFit, predict_out_of_fold
from .design import Units, read_design
from .gaussian import MOST_FEATURES, MOST_ROWS, Mixed, mix_in_gaussian
from .glm import log_estimate
from .lbfgs import Minimum
from .quadratic import Curve

_MAX_LOSS_RATIO = 2.0  # steps like the last in which a weak strength must be able to make up for what it is behind
_TOLERANCE = 4e-2  # what a fit still lacks then does not change the order; a tighter one hears noise in few rows
_MAX_STEPS = 10
_MARGIN = 1e-5  # ten times what rounding does to a mean loss: of two that are so close, the stronger is taken


def choose_l2(
    design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, key: NDArray[np.uint64], config: ProbeConfig
) -> Tensor:
    """Give each of p probes the strength with the least loss on rows set aside of its own, (p,).

    It is chosen on the first rows by key, of many outputs on some of them alone, and carried over as scikit-learn's C,
    the inverse variance of a prior: beside a mean over s times as many rows it is s times less. With nothing to choose
    by, it is the middle one.
    """
    path = sorted(config.l2_penalties, reverse=True)
    torch_target, chosen = _choice_data(torch_target, key[fit_rows.rows], max_rows=config.choice_rows)
    few = fit_rows.take(np.flatnonzero(chosen))
    if len(path) == 1 or not few.can_choose:
        return design.curvature.new_full((fit_rows.train_mask.shape[1],), path[len(path) // 2])
    seen = few.train_mask & ~few.holdout_mask
    l2 = _compare_l2(
        _part(design, torch_target, chosen, seen),
        _part(design, torch_target, chosen, few.holdout_mask),
        path,
        task=torch_target.task,
        num_outputs=torch_target.num_outputs,
    )
    return l2 * torch.from_numpy(seen.sum(axis=0) / fit_rows.train_mask.sum(axis=0)).to(l2)


def _choice_data(
    torch_target: TorchTarget, key: NDArray[np.uint64], *, max_rows: int
) -> tuple[TorchTarget, NDArray[np.bool_]]:
    """Return the target with the outputs that a strength is chosen on, and which of the n rows, with keys (n,)."""
    label, k = torch_target.values, torch_target.num_outputs
    rows, outputs = choose_outputs(label.cpu().numpy(), key, task=torch_target.task, num_outputs=k, max_rows=max_rows)
    mask = np.isin(np.arange(len(key)), rows)
    if len(outputs) == k:
        return torch_target, mask
    index = torch.from_numpy(outputs).to(label.device)
    label = torch.searchsorted(index, label) if torch_target.task == "classification" else label[:, index]
    return replace(torch_target, values=label, num_outputs=len(outputs)), mask


Part = tuple[Design, Tensor, Tensor]


def _part(design: Design, torch_target: TorchTarget, chosen: NDArray[np.bool_], mask: NDArray[np.bool_]) -> Part:
    """Give the rows among the chosen that the mask (s, p) has any use for: design, answer and mask."""
    some = mask.any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(chosen)[some]).to(design.rows.device)
    return design.take(rows), torch_target.values[rows], torch.from_numpy(mask[some]).to(rows.device)


def _compare_l2(seen: Part, holdout_mask: Part, path: list[float], *, task: str, num_outputs: int) -> Tensor:
    """Fit all probes under all strengths as one stacked parameter, and give the best strength of each: (p,).

    Model s * p + j is probe j under strength s, on the rows of probe j: whatever the strengths, one mask a probe.
    """
    design, torch_target, train_mask = seen
    l2_penalties = design.curvature.new_tensor(path)
    race = _L2Trial(
        holdout_mask=holdout_mask, task=task, losses=l2_penalties.new_full((len(path), train_mask.shape[1]), torch.inf)
    )
    fit_glm(
        design,
        torch_target,
        task=task,
        train_mask=train_mask,
        l2=l2_penalties.repeat_interleave(train_mask.shape[1]),
        start=l2_penalties.new_zeros(race.losses.numel(), design.rows.shape[1] + 1, num_outputs),
        max_steps=_MAX_STEPS,
        tolerance=_TOLERANCE,
        patience=1,
        select_active=race.select_active,
    )
    return _least_between(race.losses, l2_penalties)


@dataclass(frozen=True, slots=True, kw_only=True)
class _L2Trial:
    """What is known so far: losses (s, p) on the rows set aside, strongest strength first; infinite once it is out."""

    holdout_mask: Part
    task: str
    losses: Tensor

    def select_active(self, alive: Tensor, theta: Tensor) -> Tensor:
        """Write down the losses of those that still run, and tell which of them stay.

        A fit of a weak strength that is farther behind than it gains is out: what it does from here on is overfit. Who
        is stronger than the best stays to its end, which is near, since rows aside speak for weak fits until they are
        done; so does the next weaker one, for the parabola.
        """
        design, torch_target, rows = self.holdout_mask
        place, probe = alive // rows.shape[1], alive % rows.shape[1]
        loss = mean_loss(design, torch_target, task=self.task, rows=rows, column=probe, theta=theta)
        gain = self.losses[place, probe] - loss
        self.losses[place, probe] = loss
        best = _first_least(self.losses)
        behind = loss - self.losses[best[probe], probe]
        stays = (place <= best[probe] + 1) | (behind <= _MAX_LOSS_RATIO * gain)
        self.losses[place[~stays], probe[~stays]] = torch.inf
        return stays


def _first_least(losses: Tensor) -> Tensor:
    """Return the place (p,) after which each probe's loss (s, p) falls no more, by _MARGIN at least."""
    rises = losses[1:] >= losses[:-1] - _MARGIN
    return torch.cat([rises, torch.ones_like(rises[:1])]).int().argmax(dim=0)


def _least_between(losses: Tensor, path: Tensor) -> Tensor:
    """Give the strength at the vertex of the parabola through each probe's least loss and its neighbours: (p,).

    In log strength; at an end of what was tried, the end. It lies no farther than half-way to a neighbour.
    """
    best = _first_least(losses)
    weaker = losses.gather(0, (best + 1).clamp_max(len(path) - 1)[None])[0]
    inside = ((best > 0) & (best < len(path) - 1) & weaker.isfinite()).nonzero().squeeze(1)
    middle = best[inside]
    x0, x1, x2 = (path.log()[middle + step] for step in (-1, 0, 1))
    y0, y1, y2 = (losses[middle + step, inside] for step in (-1, 0, 1))
    left, right = (y0 - y1) / (x0 - x1), (y1 - y2) / (x1 - x2)
    bend = (left - right) / (x0 - x2)
    vertex = (x0 + x1) / 2 - left / (2 * bend)
    vertex = torch.minimum(torch.maximum(vertex, (x1 + x2) / 2), (x0 + x1) / 2)  # from the strongest to the weakest
    found = path[best].clone()
    found[inside] = torch.where((bend > 0) & vertex.isfinite(), vertex.exp(), found[inside])
    return found


_COARSE = (
    2e-3  # of bfloat16: a step that gains less is not worth its pass (at 5e-4 the loss out of fold is .004 better)
)
_SMALL = 1 << 22  # features in all, below which bfloat16 saves no time worth its rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """p linear models, r rounds of f folds: theta (p, d + 1, k) of standardised features.

    To the logits of a probe that has found curved boundaries better, its curve is added: it is linear no more.
    snapshots are the thetas of the first round on the way, after 1, 2, 4, ... steps and the last.
    """

    inputs: Inputs
    cross_fits: tuple[CrossFit, ...]
    units: Units
    theta: Tensor
    curves: tuple[Curve | None, ...]
    l2: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask in each round the probe that never saw the row: (r, b, k)."""
        found = self._predict(self.cross_fits, self.theta[None], rows, self.inputs if inputs is None else inputs)
        return np.asarray(found[0])

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way: (e, b, k). Only the last have curves."""
        return np.asarray(self._predict(self.cross_fits[:1], torch.stack(self.snapshots), rows, self.inputs)[:, 0])

    def _predict(
        self, cross_fits: Sequence[CrossFit], thetas: Tensor, rows: Rows, inputs: Inputs
    ) -> NDArray[np.float32]:
        """Ask several states (e, p, d + 1, k) of the probes, the last of them with curves: (e, r, b, k)."""
        out = np.empty((len(thetas), len(cross_fits), len(rows), thetas.shape[3]), dtype=np.float32)
        straight: tuple[Curve | None, ...] = (None,) * len(self.curves)
        for place, z in self.units.read(inputs, rows):
            for state, theta in enumerate(thetas):
                curves = self.curves if state == len(thetas) - 1 else straight
                found = predict_out_of_fold(cross_fits, rows[place], _predictor(theta, curves, z))
                out[state, :, place] = found.cpu().numpy()
        return out


def fit_linear(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    fit_rows: FitRows,
    *,
    config: ProbeConfig,
    device: str,
) -> LinearProbe:
    """Fit all folds and rounds as one stacked parameter, each on its own rows and with the strength it chose.

    The strength is chosen on some of the rows and carried over as scikit-learn's C, the variance of a prior: beside a
    mean over s times as many rows it is s times less.
    """
    products = products_of(config.precision, device, size=len(fit_rows.rows) * inputs.num_features)
    design = read_design(inputs, fit_rows.rows, products=products, device=device)
    torch_target = TorchTarget.of(target, fit_rows.rows, design.curvature)
    log_estimate(design, torch_target, fit_rows, max_steps=config.max_steps)
    l2 = choose_l2(design, torch_target, fit_rows, key=cross_fits[0].key, config=config)
    found = _fit(design, torch_target, fit_rows, l2, config)
    mixed = Mixed(theta=found.theta, curves=(None,) * len(l2))
    if _wants_gaussian(design, torch_target, fit_rows, config):
        mixed = mix_in_gaussian(
            design,
            torch_target.values,
            fit_rows,
            cross_fits,
            theta=found.theta,
            l2=l2,
            max_steps=config.max_steps,
            curved=config.kind == "auto",
        )
    first = cross_fits[0].num_folds
    return LinearProbe(
        inputs=inputs,
        cross_fits=tuple(cross_fits),
        units=design.units,
        theta=_in_units(mixed.theta, torch_target),
        curves=mixed.curves,
        l2=l2,
        num_steps=found.num_steps,
        snapshots=tuple(_in_units(moment[:first], torch_target) for moment in (*found.snapshots[:-1], mixed.theta)),
    )


def _fit(design: Design, torch_target: TorchTarget, fit_rows: FitRows, l2: Tensor, config: ProbeConfig) -> Minimum:
    """Fit every probe from nothing, so that the way there can be told."""
    train_mask = torch.from_numpy(fit_rows.train_mask).to(l2.device)
    coarse = design.rows.dtype == torch.bfloat16
    return fit_glm(
        design,
        torch_target.values,
        task=torch_target.task,
        train_mask=train_mask,
        l2=l2,
        start=l2.new_zeros(len(l2), design.rows.shape[1] + 1, torch_target.num_outputs),
        max_steps=config.max_steps,
        tolerance=max(config.tolerance, _COARSE if coarse else 0.0),
        patience=1 if coarse else 2,
    )


def _wants_gaussian(design: Design, torch_target: TorchTarget, fit_rows: FitRows, config: ProbeConfig) -> bool:
    """Tell whether rows are few enough, and there are some to choose by; a strength that is given is to stand alone."""
    small = len(fit_rows.rows) <= MOST_ROWS and design.rows.shape[1] <= MOST_FEATURES
    chooses = len(config.l2_penalties) > 1 and fit_rows.can_choose
    return config.gaussian and torch_target.task == "classification" and small and chooses


def _predictor(theta: Tensor, curves: Sequence[Curve | None], z: Tensor) -> Callable[[int, Tensor], Tensor]:
    def ask(probe: int, mine: Tensor) -> Tensor:
        straight, curve = torch.addmm(theta[probe, -1], z[mine], theta[probe, :-1]), curves[probe]
        return straight if curve is None else straight + curve.logits(z[mine])

    return ask


def products_of(precision: str, device: str, *, size: int) -> torch.dtype:
    """Choose the dtype of matrix products by what the machine can, never by how fast it seems just now."""
    if precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        able = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cpu
        precision = "bfloat16" if able and size >= _SMALL else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def _in_units(theta: Tensor, torch_target: TorchTarget) -> Tensor:
    """Give models (p, d + 1, k) whose outputs are in the units of the target."""
    moved = theta * torch_target.scale
    moved[:, -1] += torch_target.centre
    return moved
