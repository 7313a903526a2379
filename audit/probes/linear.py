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

from .cross_fit import Lesson
from .design import Design
from .glm import fit_glm, mean_loss
from .targets import Aim, choose_outputs

if TYPE_CHECKING:
    from .config import ProbeConfig
from collections.abc import Callable, Sequence

from ..dataset.labels import Target
from ..features.matrix import Inputs, Rows
from .cross_fit import Crossing, ask_own
from .design import Units, read_design
from .gaussian import MOST_FEATURES, MOST_ROWS, Mixed, mix_in_gaussian
from .glm import log_estimate
from .lbfgs import Minimum
from .quadratic import Curve

_HOPE = 2.0  # steps like the last in which a weak strength must be able to make up for what it is behind
_TOLERANCE = 4e-2  # what a fit still lacks then does not change the order; a tighter one hears noise in few rows
_MAX_STEPS = 10
_MARGIN = 1e-5  # ten times what rounding does to a mean loss: of two that are so close, the stronger is taken


def choose_strength(
    design: Design, answer: Aim, lesson: Lesson, *, key: NDArray[np.uint64], config: ProbeConfig
) -> Tensor:
    """Give each of p probes the strength with the least loss on rows set aside of its own, (p,).

    It is chosen on the first rows by key, of many outputs on some of them alone, and carried over as scikit-learn's C,
    the inverse variance of a prior: beside a mean over s times as many rows it is s times less. With nothing to choose
    by, it is the middle one.
    """
    path = sorted(config.strengths, reverse=True)
    answer, chosen = _choice_data(answer, key[lesson.rows], max_rows=config.choice_rows)
    few = lesson.take(np.flatnonzero(chosen))
    if len(path) == 1 or not few.can_choose:
        return design.curvature.new_full((lesson.learn.shape[1],), path[len(path) // 2])
    seen = few.learn & ~few.aside
    strength = _race(
        _part(design, answer, chosen, seen),
        _part(design, answer, chosen, few.aside),
        path,
        task=answer.task,
        num_outputs=answer.num_outputs,
    )
    return strength * torch.from_numpy(seen.sum(axis=0) / lesson.learn.sum(axis=0)).to(strength)


def _choice_data(answer: Aim, key: NDArray[np.uint64], *, max_rows: int) -> tuple[Aim, NDArray[np.bool_]]:
    """Return the target with the outputs that a strength is chosen on, and which of the n rows, with keys (n,)."""
    label, k = answer.found, answer.num_outputs
    rows, outputs = choose_outputs(label.cpu().numpy(), key, task=answer.task, num_outputs=k, max_rows=max_rows)
    mask = np.isin(np.arange(len(key)), rows)
    if len(outputs) == k:
        return answer, mask
    index = torch.from_numpy(outputs).to(label.device)
    label = torch.searchsorted(index, label) if answer.task == "classification" else label[:, index]
    return replace(answer, found=label, num_outputs=len(outputs)), mask


Part = tuple[Design, Tensor, Tensor]


def _part(design: Design, answer: Aim, chosen: NDArray[np.bool_], mask: NDArray[np.bool_]) -> Part:
    """Give the rows among the chosen that the mask (s, p) has any use for: design, answer and mask."""
    some = mask.any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(chosen)[some]).to(design.rows.device)
    return design.take(rows), answer.found[rows], torch.from_numpy(mask[some]).to(rows.device)


def _race(seen: Part, aside: Part, path: list[float], *, task: str, num_outputs: int) -> Tensor:
    """Fit all probes under all strengths as one stacked parameter, and give the best strength of each: (p,).

    Model s * p + j is probe j under strength s, on the rows of probe j: whatever the strengths, one mask a probe.
    """
    design, answer, learn = seen
    strengths = design.curvature.new_tensor(path)
    race = _Race(aside=aside, task=task, losses=strengths.new_full((len(path), learn.shape[1]), torch.inf))
    fit_glm(
        design,
        answer,
        task=task,
        learn=learn,
        strength=strengths.repeat_interleave(learn.shape[1]),
        start=strengths.new_zeros(race.losses.numel(), design.rows.shape[1] + 1, num_outputs),
        max_steps=_MAX_STEPS,
        tolerance=_TOLERANCE,
        patience=1,
        judge=race.judge,
    )
    return _least_between(race.losses, strengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Race:
    """What is known so far: losses (s, p) on the rows set aside, strongest strength first; infinite once it is out."""

    aside: Part
    task: str
    losses: Tensor

    def judge(self, alive: Tensor, theta: Tensor) -> Tensor:
        """Write down the losses of those that still run, and tell which of them stay.

        A fit of a weak strength that is farther behind than it gains is out: what it does from here on is overfit. Who
        is stronger than the best stays to its end, which is near, since rows aside speak for weak fits until they are
        done; so does the next weaker one, for the parabola.
        """
        design, answer, rows = self.aside
        place, probe = alive // rows.shape[1], alive % rows.shape[1]
        loss = mean_loss(design, answer, task=self.task, rows=rows, whose=probe, theta=theta)
        gain = self.losses[place, probe] - loss
        self.losses[place, probe] = loss
        best = _first_least(self.losses)
        behind = loss - self.losses[best[probe], probe]
        stays = (place <= best[probe] + 1) | (behind <= _HOPE * gain)
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
    crossings: tuple[Crossing, ...]
    units: Units
    theta: Tensor
    curves: tuple[Curve | None, ...]
    strength: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask in each round the probe that never saw the row: (r, b, k)."""
        found = self._ask(self.crossings, self.theta[None], rows, self.inputs if inputs is None else inputs)
        return np.asarray(found[0])

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way: (e, b, k). Only the last have curves."""
        return np.asarray(self._ask(self.crossings[:1], torch.stack(self.snapshots), rows, self.inputs)[:, 0])

    def _ask(self, crossings: Sequence[Crossing], thetas: Tensor, rows: Rows, inputs: Inputs) -> NDArray[np.float32]:
        """Ask several states (e, p, d + 1, k) of the probes, the last of them with curves: (e, r, b, k)."""
        out = np.empty((len(thetas), len(crossings), len(rows), thetas.shape[3]), dtype=np.float32)
        straight: tuple[Curve | None, ...] = (None,) * len(self.curves)
        for place, z in self.units.read(inputs, rows):
            for state, theta in enumerate(thetas):
                curves = self.curves if state == len(thetas) - 1 else straight
                found = ask_own(crossings, rows[place], _asker(theta, curves, z))
                out[state, :, place] = found.cpu().numpy()
        return out


def fit_linear(
    inputs: Inputs,
    target: Target,
    crossings: Sequence[Crossing],
    lesson: Lesson,
    *,
    config: ProbeConfig,
    device: str,
) -> LinearProbe:
    """Fit all folds and rounds as one stacked parameter, each on its own rows and with the strength it chose.

    The strength is chosen on some of the rows and carried over as scikit-learn's C, the variance of a prior: beside a
    mean over s times as many rows it is s times less.
    """
    products = products_of(config.precision, device, size=len(lesson.rows) * inputs.num_features)
    design = read_design(inputs, lesson.rows, products=products, device=device)
    answer = Aim.of(target, lesson.rows, design.curvature)
    log_estimate(design, answer, lesson, max_steps=config.max_steps)
    strength = choose_strength(design, answer, lesson, key=crossings[0].key, config=config)
    found = _fit(design, answer, lesson, strength, config)
    mixed = Mixed(theta=found.theta, curves=(None,) * len(strength))
    if _wants_gaussian(design, answer, lesson, config):
        mixed = mix_in_gaussian(
            design,
            answer.found,
            lesson,
            crossings,
            theta=found.theta,
            strength=strength,
            max_steps=config.max_steps,
            curved=config.kind == "auto",
        )
    first = crossings[0].num_folds
    return LinearProbe(
        inputs=inputs,
        crossings=tuple(crossings),
        units=design.units,
        theta=_in_units(mixed.theta, answer),
        curves=mixed.curves,
        strength=strength,
        num_steps=found.num_steps,
        snapshots=tuple(_in_units(moment[:first], answer) for moment in (*found.snapshots[:-1], mixed.theta)),
    )


def _fit(design: Design, answer: Aim, lesson: Lesson, strength: Tensor, config: ProbeConfig) -> Minimum:
    """Fit every probe from nothing, so that the way there can be told."""
    learn = torch.from_numpy(lesson.learn).to(strength.device)
    coarse = design.rows.dtype == torch.bfloat16
    return fit_glm(
        design,
        answer.found,
        task=answer.task,
        learn=learn,
        strength=strength,
        start=strength.new_zeros(len(strength), design.rows.shape[1] + 1, answer.num_outputs),
        max_steps=config.max_steps,
        tolerance=max(config.tolerance, _COARSE if coarse else 0.0),
        patience=1 if coarse else 2,
    )


def _wants_gaussian(design: Design, answer: Aim, lesson: Lesson, config: ProbeConfig) -> bool:
    """Tell whether rows are few enough, and there are some to choose by; a strength that is given is to stand alone."""
    small = len(lesson.rows) <= MOST_ROWS and design.rows.shape[1] <= MOST_FEATURES
    chooses = len(config.strengths) > 1 and lesson.can_choose
    return config.gaussian and answer.task == "classification" and small and chooses


def _asker(theta: Tensor, curves: Sequence[Curve | None], z: Tensor) -> Callable[[int, Tensor], Tensor]:
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


def _in_units(theta: Tensor, answer: Aim) -> Tensor:
    """Give models (p, d + 1, k) whose outputs are in the units of the target."""
    moved = theta * answer.scale
    moved[:, -1] += answer.centre
    return moved
