"""A probe: how sure is one modality alone, asked by a model that never saw the sample?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigError, choices
from .logistic import Design, fit_design, make_design, mean_loss

_CHOICE_TOLERANCE = 1e-4  # settles the order of losses that differ in the third digit; a third of the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How the cross-fitted probes are trained. All constants are mmaudit's defaults."""

    folds: int = 5
    repeats: int = 3  # rounds of cross-fitting with other folds; probabilities are averaged over them
    learn_from: str = "all"  # splits that probes learn from: "all", or "train" for all but the test split
    # What a strength means stands in logistic.py: 1 / (C n) in scikit-learn's terms.
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    choice_rows: int = 20_000  # rows on which the strength is chosen; the probe itself learns from all
    max_steps: int = 300
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.learn_from not in ("all", "train"):
            raise ConfigError(f"probe.learn_from is {self.learn_from!r}; {choices(self.learn_from, ('all', 'train'))}")
        for name in ("folds", "repeats", "choice_rows", "max_steps"):
            least = 2 if name == "folds" else 1
            if getattr(self, name) < least:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.strengths or min(self.strengths) <= 0:
            raise ConfigError(f"probe.strengths is {list(self.strengths)}; give one or more, all above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Who learns from whom in one round of cross-fitting: arrays of shape (n,).

    The probe of fold j learns from the rows that `fits` and are not in fold j, and scores the rows of fold j.
    `inner` deals the same rows once more, so that each probe can choose its strength on rows it then sets aside.
    """

    fold: NDArray[np.int16]
    inner: NDArray[np.int16]
    fits: NDArray[np.bool_]
    key: NDArray[np.uint64]  # hash of the id: which rows stand for all when there are many

    @property
    def num_folds(self) -> int:
        """Folds that there really are."""
        return int(self.fold.max()) + 1


def cross_fit(
    matrix: NDArray[np.float32],
    label: NDArray[np.int32],
    crossings: Sequence[Crossing],
    *,
    num_classes: int,
    config: ProbeConfig,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Give out-of-fold class probabilities (r, n, k), rows summing to 1, one (n, k) for each of r rounds.

    matrix (n, d) are features, label (n,) in [0, k). A row outside a round's `fits` is scored by the probe of its fold
    and learned from by none. All probes of all rounds are fitted at once.
    """
    x = torch.from_numpy(np.array(matrix, dtype=np.float32)).to(device)
    design = make_design(x)
    y = torch.from_numpy(label.astype(np.int64)).to(device)
    mask = torch.cat([_masks(crossing, device) for crossing in crossings], dim=1)
    inner = [torch.from_numpy(crossing.inner == 0).to(device)[:, None] for crossing in crossings]
    aside = torch.cat([rows.expand(-1, c.num_folds) for rows, c in zip(inner, crossings, strict=True)], dim=1) & mask
    rows = torch.from_numpy(_some_rows(crossings[0], config.choice_rows)).to(device)
    strength, start = _choose_strength(
        design.take(rows), y[rows], mask[rows], aside[rows], num_classes=num_classes, config=config
    )
    theta, _ = fit_design(
        design,
        y,
        mask=mask,
        strength=strength,
        start=start,
        max_steps=config.max_steps,
        tolerance=config.tolerance,
    )
    ends = np.cumsum([crossing.num_folds for crossing in crossings])
    rounds = []
    for crossing, end in zip(crossings, ends, strict=True):
        which = torch.from_numpy(crossing.fold.astype(np.int64) + end - crossing.num_folds).to(device)
        rounds.append(design.logits(theta, which).softmax(dim=1).cpu().numpy())
    return np.stack(rounds)


def _masks(crossing: Crossing, device: str) -> Tensor:
    """Rows that each fold's probe learns from, (n, f)."""
    folds = np.arange(crossing.num_folds)
    return torch.from_numpy((crossing.fold[:, None] != folds) & crossing.fits[:, None]).to(device)


def _choose_strength(
    design: Design, label: Tensor, mask: Tensor, aside: Tensor, *, num_classes: int, config: ProbeConfig
) -> tuple[Tensor, Tensor]:
    """Give each of p probes the strength with the least loss on rows set `aside` (n, p) of its own, (p,), and weights.

    From the strongest to the weakest, each fit starting where the last one ended; a probe whose loss rises stops there.
    """
    p, learn = mask.shape[1], mask & ~aside
    path = sorted(config.strengths, reverse=True)
    strength = design.rows.new_full((p,), path[len(path) // 2])
    theta = design.rows.new_zeros(p, design.rows.shape[1] + 1, num_classes)
    if len(path) == 1 or not bool((aside.any(dim=0) & learn.any(dim=0)).all()):
        return strength, theta
    least = torch.full_like(strength, torch.inf)
    chosen = theta.clone()
    going = torch.arange(p, device=theta.device)
    for candidate in path:
        theta[going], _ = fit_design(
            design,
            label,
            mask=learn[:, going],
            strength=torch.full_like(strength[going], candidate),
            start=theta[going],
            max_steps=config.max_steps,
            tolerance=_CHOICE_TOLERANCE,
        )
        loss = mean_loss(design, label, mask=aside[:, going], theta=theta[going])
        better = loss < least[going]
        going, loss = going[better], loss[better]
        if len(going) == 0:
            break
        least[going], strength[going], chosen[going] = loss, candidate, theta[going]
    return strength, chosen


def _some_rows(crossing: Crossing, most: int) -> NDArray[np.intp]:
    """Rows on which strengths are chosen: those that probes learn from, or the first `most` of them by key."""
    rows = np.flatnonzero(crossing.fits)
    return rows if len(rows) <= most else np.sort(rows[np.argsort(crossing.key[rows], kind="stable")[:most]])
