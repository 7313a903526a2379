"""Contribution of each modality to the accuracy of the fused prediction.

Letters: n samples, m modalities. A set of modalities is a frozenset of their indices; a modality outside the set is
absent: its features are 0 (`FusionNet.fused_logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit import metrics as intervals
from ..audit.metrics import Floats, Groups, shapley
from .network import FusionNet, Outputs

ModalitySet = frozenset[int]
CorrectMask = NDArray[np.bool_]
NO_MODALITY: ModalitySet = frozenset()


def shapley_sets(num_modalities: int, *, seed: int = 0) -> list[ModalitySet]:
    """Return the sets of modalities that `contribution` needs, smallest first, from the empty set to all modalities.

    All 2^m up to six modalities; beyond that those of the orders that `shapley` draws with the seed.
    """
    sets = {NO_MODALITY}

    def record(modality_set: ModalitySet) -> Floats:
        sets.add(modality_set)
        return np.zeros(1, np.float32)

    shapley(record, num_modalities, seed=seed)
    return sorted(sets, key=lambda modality_set: (len(modality_set), sorted(modality_set)))


def correct_by_set(net: FusionNet, sets: Sequence[ModalitySet]) -> Callable[[Outputs, Tensor], Tensor]:
    """Return a function of outputs and label: is the fused prediction correct with only a set present, (s, b)?"""

    def read(outputs: Outputs, label: Tensor) -> Tensor:
        used_modalities = [[index in modality_set for index in range(net.num_modalities)] for modality_set in sets]
        return torch.stack(
            [net.fused_logits(outputs.features, used).argmax(dim=1) == label for used in used_modalities]
        )

    return read


def measure_contribution(
    correct: Mapping[ModalitySet, CorrectMask],
    unimodal_correct: CorrectMask,
    modalities: Sequence[str],
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute how the modalities contribute to the fused prediction: {n, contribution, confusion}, or {n: 0}.

    correct: for each set of `shapley_sets`, whether the fused prediction is correct (n,). unimodal_correct (n, m):
    whether each modality's own prediction is. groups (n,): samples that are resampled together. See `contribution`,
    `confusion`.
    """
    fused_correct = correct[frozenset(range(len(modalities)))]
    if len(fused_correct) == 0:
        return {"n": 0}
    return {
        "n": len(fused_correct),
        "contribution": contribution(correct, modalities, groups=groups, seed=seed),
        "confusion": confusion(fused_correct, unimodal_correct, modalities, groups=groups),
    }


def contribution(
    correct: Mapping[ModalitySet, CorrectMask], modalities: Sequence[str], *, groups: Groups = None, seed: int = 0
) -> dict[str, Any]:
    """Split the accuracy v(all) - v(none) by Shapley values: {nobody, all, modalities, sets}.

    v(S) in [0, 1] is the accuracy of the fused prediction with only the set S present; v(none), key `nobody`, is that
    of the prediction with every modality absent, one class for all samples: its chance level. modalities: {name: {mean,
    low, high}} in [-1, 1], above 0 where a modality helps, with a 95% interval over samples; they sum to v(all) -
    v(none). sets: {modalities, accuracy} of each set. The value is the accuracy; subtracting v(none) is ours. Exact up
    to six modalities.
    """
    baseline = correct[NO_MODALITY].astype(np.float32)
    shapley_values = shapley(lambda modality_set: correct[modality_set] - baseline, len(modalities), seed=seed)
    accuracy = {modality_set: float(is_correct.mean()) for modality_set, is_correct in correct.items()}
    return {
        "nobody": accuracy[NO_MODALITY],
        "all": accuracy[frozenset(range(len(modalities)))],
        "modalities": {
            name: intervals.mean_interval(values.astype(np.float64), groups)
            for name, values in zip(modalities, shapley_values.T, strict=True)
        },
        "sets": [
            {"modalities": [modalities[index] for index in sorted(modality_set)], "accuracy": accuracy[modality_set]}
            for modality_set in sorted(accuracy, key=lambda modality_set: (len(modality_set), sorted(modality_set)))
        ],
    }


def confusion(
    fused_correct: CorrectMask, unimodal_correct: CorrectMask, modalities: Sequence[str], *, groups: Groups = None
) -> dict[str, Any]:
    """Count the samples that fusion gets wrong although a modality is correct, and those that only fusion gets right.

    fused_correct (n,), unimodal_correct (n, m): whether the fused prediction and that of each modality are correct.
    Returns {confused, confused_by, synergy}. confused_by: per modality, correct alone and wrong when fused; confused:
    with at least one of them; synergy: every modality wrong and fused correct. Each is {n, share, low, high}, a share
    of all samples in [0, 1] with its 95% interval. The definitions are ours.
    """
    return {
        "confused": intervals.share_interval(unimodal_correct.any(axis=1) & ~fused_correct, groups),
        "confused_by": {
            name: intervals.share_interval(correct_alone & ~fused_correct, groups)
            for name, correct_alone in zip(modalities, unimodal_correct.T, strict=True)
        },
        "synergy": intervals.share_interval(~unimodal_correct.any(axis=1) & fused_correct, groups),
    }
