"""A probe: how sure is one modality alone, asked by a model that never saw the sample?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigError, choices
from .logistic import Logistic, fit_logistic

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
    crossing: Crossing,
    *,
    num_classes: int,
    config: ProbeConfig,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Give out-of-fold class probabilities (n, k), rows summing to 1, from features (n, d) and labels (n,) in [0, k).

    A row outside `crossing.fits` (a test sample) is scored by the probe of its fold and learned from by none.
    """
    x = torch.from_numpy(np.array(matrix, dtype=np.float32)).to(device)
    y = torch.from_numpy(label.astype(np.int64)).to(device)
    fold = torch.from_numpy(crossing.fold.astype(np.int64)).to(device)
    mask = torch.stack([fold != index for index in range(crossing.num_folds)], dim=1)
    mask &= torch.from_numpy(crossing.fits).to(device)[:, None]
    strength = _choose_strength(x, y, mask, crossing, num_classes=num_classes, config=config)
    probe = _fit(x, y, mask, strength, num_classes=num_classes, config=config)
    return np.asarray(probe.logits(x, fold).softmax(dim=1).cpu().numpy())


def _fit(x: Tensor, y: Tensor, mask: Tensor, strength: Tensor, *, num_classes: int, config: ProbeConfig) -> Logistic:
    return fit_logistic(
        x,
        y,
        mask=mask,
        strength=strength,
        num_classes=num_classes,
        max_steps=config.max_steps,
        tolerance=config.tolerance,
    )


def _choose_strength(
    x: Tensor, y: Tensor, mask: Tensor, crossing: Crossing, *, num_classes: int, config: ProbeConfig
) -> Tensor:
    """Give each fold's probe (f,) the strength with the least loss on a fifth of the rows it may learn from."""
    candidates = torch.tensor(config.strengths, dtype=x.dtype, device=x.device)
    num_folds = mask.shape[1]
    rows = torch.from_numpy(_some_rows(crossing, config.choice_rows)).to(x.device)
    x, y, mask = x[rows], y[rows], mask[rows]
    aside = torch.from_numpy(crossing.inner == 0).to(x.device)[rows][:, None] & mask
    learn = mask & ~aside
    if len(candidates) == 1 or not (aside.any(dim=0) & learn.any(dim=0)).all():
        return candidates[len(candidates) // 2].expand(num_folds)
    pairs = len(candidates)
    probe = _fit(
        x,
        y,
        learn.repeat_interleave(pairs, dim=1),
        candidates.repeat(num_folds),
        num_classes=num_classes,
        config=replace(config, tolerance=_CHOICE_TOLERANCE),
    )
    losses = torch.full((num_folds, pairs), torch.inf)
    for fold in range(num_folds):
        held = aside[:, fold]
        for pair in range(pairs):
            index = fold * pairs + pair
            logits = x[held] @ probe.weight[index] + probe.bias[index]
            losses[fold, pair] = torch.nn.functional.cross_entropy(logits, y[held])
    return candidates[losses.argmin(dim=1).to(x.device)]


def _some_rows(crossing: Crossing, most: int) -> NDArray[np.intp]:
    rows = np.flatnonzero(crossing.fits)
    return rows if len(rows) <= most else np.sort(rows[np.argsort(crossing.key[rows], kind="stable")[:most]])
