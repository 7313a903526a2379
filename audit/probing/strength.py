"""Strengths: how hard does each probe hold its weights back, chosen on rows it sets aside?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .aim import Aim
from .crossing import Lesson, first_rows
from .design import Design
from .glm import fit_glm, mean_loss

if TYPE_CHECKING:
    from .config import ProbeConfig

_TOLERANCE = 1e-2  # a third of the steps of 1e-3, and the strengths chosen differ by a tenth
_MAX_STEPS = 8  # from the last strength's weights; what a fit still lacks then does not change the order


def choose_strength(
    design: Design, answer: Aim, lesson: Lesson, *, key: NDArray[np.uint64], config: ProbeConfig
) -> Tensor:
    """Give each of p probes the strength with the least loss on rows set aside of its own, (p,).

    It is chosen on the first rows by key and carried over as scikit-learn's C, the inverse variance of a prior: beside
    a mean over s times as many rows it is s times less. With nothing to choose by, it is the middle one.
    """
    path = sorted(config.strengths, reverse=True)
    chosen = np.isin(lesson.rows, first_rows(np.sort(lesson.rows), key, most=config.choice_rows))
    few = lesson.take(np.flatnonzero(chosen))
    if len(path) == 1 or not few.can_choose:
        return design.curvature.new_full((lesson.learn.shape[1],), path[len(path) // 2])
    seen = few.learn & ~few.aside
    strength = _follow(
        _part(design, answer, chosen, seen),
        _part(design, answer, chosen, few.aside),
        path,
        task=answer.task,
        num_outputs=answer.num_outputs,
    )
    return strength * torch.from_numpy(seen.sum(axis=0) / lesson.learn.sum(axis=0)).to(strength)


Part = tuple[Design, Tensor, Tensor]


def _part(design: Design, answer: Aim, chosen: NDArray[np.bool_], mask: NDArray[np.bool_]) -> Part:
    """Give the rows among the chosen that the mask (s, p) has any use for: design, answer and mask."""
    some = mask.any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(chosen)[some]).to(design.rows.device)
    return design.take(rows), answer.found[rows], torch.from_numpy(mask[some]).to(rows.device)


def _follow(seen: Part, aside: Part, path: list[float], *, task: str, num_outputs: int) -> Tensor:
    """Try strengths from the strongest to the weakest, all probes at once, and give the best of each: (p,).

    Each fit starts where the last one ended; a probe whose loss rises stops there.
    """
    design, answer, learn = seen
    p = learn.shape[1]
    losses = design.curvature.new_full((len(path), p), torch.inf)
    theta = design.curvature.new_zeros(p, design.rows.shape[1] + 1, num_outputs)
    going = torch.arange(p, device=theta.device)
    for place, candidate in enumerate(path):
        theta[going] = fit_glm(
            design,
            answer,
            task=task,
            learn=learn[:, going],
            strength=losses.new_full((len(going),), candidate),
            start=theta[going],
            max_steps=_MAX_STEPS,
            tolerance=_TOLERANCE,
            patience=1,
        ).theta
        loss = mean_loss(aside[0], aside[1], task=task, rows=aside[2][:, going], theta=theta[going])
        better = loss < losses[:, going].min(dim=0).values
        losses[place, going] = loss
        going = going[better]
        if len(going) == 0:
            break
    return _least_between(losses, losses.new_tensor(path))


def _least_between(losses: Tensor, path: Tensor) -> Tensor:
    """Give the strength at the vertex of the parabola through each probe's least loss and its neighbours: (p,).

    In log strength; at an end of what was tried, the end. It lies no farther than half-way to a neighbour.
    """
    best = losses.argmin(dim=0)
    inside = ((best > 0) & (best < len(path) - 1)).nonzero().squeeze(1)
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
