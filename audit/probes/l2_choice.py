"""Choice of the L2 penalty of linear probes on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cross_fit import FitRows
from .design import Design, TorchTarget, choose_outputs
from .glm import GlmLoss, fit_glm, probe_batches

if TYPE_CHECKING:
    from .config import ProbeConfig

_MAX_LOSS_RATIO = 2.0  # a trial goes on while its excess loss is at most this many times the gain of its last step
_TOLERANCE = 4e-2  # enough to rank the penalties; with few rows, a tighter tolerance fits noise
_MAX_STEPS = 10
_USUAL = 0.3  # the largest l2 that all probes try: stronger ones suit noise, and take a fifth of a probe's time
_MARGIN = 1e-5  # ten times the rounding error of a mean loss: of two losses this close, the larger l2 is chosen


def choose_l2(
    design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, key: NDArray[np.uint64], config: ProbeConfig
) -> Tensor:
    """Choose for each of p probes the l2 with the lowest loss on the rows that it holds out, (p,).

    It is chosen on the first rows by key, and of many outputs on a subset, and scaled like scikit-learn's C, the
    variance of a prior: for a mean over s times as many rows it is s times smaller. Only probes for which the largest
    usual candidate is the best compare those above _USUAL. Without held-out rows it is the middle candidate.
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
    usual = [l2 for l2 in path if l2 <= _USUAL] or path
    l2 = _compare_in_batches(train_loss, holdout_loss, usual)
    noisy = (l2 == usual[0]).nonzero().squeeze(1)
    if len(usual) < len(path) and len(noisy):
        stronger = path[: len(path) - len(usual) + 2]  # two of the usual ones, to interpolate between
        l2[noisy] = _compare_in_batches(train_loss.take_masks(noisy), holdout_loss.take_masks(noisy), stronger)
    return l2 * torch.from_numpy(train_only.sum(axis=0) / fit_rows.train_mask.sum(axis=0)).to(l2)


def _compare_in_batches(train_loss: GlmLoss, holdout_loss: GlmLoss, path: list[float]) -> Tensor:
    """Compare the penalties, batch by batch of the probes: the best l2 of each, (p,)."""
    penalties = train_loss.design.curvature.new_tensor(path)
    batches = probe_batches(train_loss, models_per_probe=len(path))
    return torch.cat([_compare_l2(train_loss.take_masks(b), holdout_loss.take_masks(b), penalties) for b in batches])


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
