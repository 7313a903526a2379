"""Strengths: how hard does each probe hold its weights back, chosen on rows it sets aside?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .aim import Aim
from .crossing import Lesson
from .design import Design
from .glm import fit_glm, mean_loss
from .outputs import choose_outputs

if TYPE_CHECKING:
    from .config import ProbeConfig

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
