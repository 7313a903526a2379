"""Contribution of each modality to the accuracy of the fused prediction.

Letters: n samples, m modalities. A set of modalities is a frozenset of their numbers; what is not in it is absent: it
has features of 0 (`FusionNet.fused_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit import intervals
from ..audit.intervals import Groups
from ..audit.metrics import Floats, shapley
from .network import FusionNet, Outputs

Modalities = frozenset[int]
Right = NDArray[np.bool_]
NOBODY: Modalities = frozenset()


def sets_to_ask(num_modalities: int, *, seed: int = 0) -> list[Modalities]:
    """Give the sets that `contribution` needs, smallest first: nobody, ..., all of them.

    All 2^m up to six modalities; beyond that those of the orders that `shapley` draws with the seed.
    """
    asked = {NOBODY}

    def note(chosen: Modalities) -> Floats:
        asked.add(chosen)
        return np.zeros(1, np.float32)

    shapley(note, num_modalities, seed=seed)
    return sorted(asked, key=lambda chosen: (len(chosen), sorted(chosen)))


def right_of_sets(net: FusionNet, sets: Sequence[Modalities]) -> Callable[[Outputs, Tensor], Tensor]:
    """Give a reading for `Lab.read`: is the fused answer right if only a set of the s sets is there? (s, b)."""

    def read(outputs: Outputs, label: Tensor) -> Tensor:
        heard = [[index in chosen for index in range(net.num_modalities)] for chosen in sets]
        return torch.stack([net.fused_of(outputs.features, each).argmax(dim=1) == label for each in heard])

    return read


def measure_contribution(
    right: Mapping[Modalities, Right],
    own_right: Right,
    modalities: Sequence[str],
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Tell who carries the fused answer: {n, contribution, confusion}, or {n: 0}; see the two functions.

    right: of each set of `sets_to_ask`, whether the fused answer is right (n,). own_right (n, m): whether what each
    modality says alone is. groups (n,): samples that stand or fall together.
    """
    together = right[frozenset(range(len(modalities)))]
    if len(together) == 0:
        return {"n": 0}
    return {
        "n": len(together),
        "contribution": contribution(right, modalities, groups=groups, seed=seed),
        "confusion": confusion(together, own_right, modalities, groups=groups),
    }


def contribution(
    right: Mapping[Modalities, Right], modalities: Sequence[str], *, groups: Groups = None, seed: int = 0
) -> dict[str, Any]:
    """Share the accuracy v(all) - v(nobody) among modalities by their Shapley values: {nobody, all, modalities, sets}.

    v(S) in [0, 1] is the accuracy of the fused answer if only the set S is there; v(nobody) that of what the network
    says with everything absent, one class for all samples: its chance level. modalities: {name: {mean, low, high}} in
    [-1, 1], above 0 where a modality helps, with a 95% interval over samples; they sum to v(all) - v(nobody). sets:
    {modalities, accuracy} of each set. The value is the accuracy; that nobody's is taken off is ours. Exact up to six
    modalities.
    """
    nobody = right[NOBODY].astype(np.float32)
    each = shapley(lambda chosen: right[chosen] - nobody, len(modalities), seed=seed)
    accuracy = {chosen: float(found.mean()) for chosen, found in right.items()}
    return {
        "nobody": accuracy[NOBODY],
        "all": accuracy[frozenset(range(len(modalities)))],
        "modalities": {
            name: intervals.mean(values.astype(np.float64), groups)
            for name, values in zip(modalities, each.T, strict=True)
        },
        "sets": [
            {"modalities": [modalities[index] for index in sorted(chosen)], "accuracy": accuracy[chosen]}
            for chosen in sorted(accuracy, key=lambda chosen: (len(chosen), sorted(chosen)))
        ],
    }


def confusion(together: Right, own_right: Right, modalities: Sequence[str], *, groups: Groups = None) -> dict[str, Any]:
    """Count the samples that fusion spoils, and those that it alone gets right: {confused, confused_by, synergy}.

    together (n,): whether the fused answer is right; own_right (n, m): whether what each modality says alone is.
    confused_by: of each modality, right alone and wrong together; confused: with one of them at least; synergy: wrong
    with each alone and right together. Each is {n, share, low, high}, a share of all samples in [0, 1] with its 95%
    interval. The definitions are ours.
    """
    return {
        "confused": intervals.share(own_right.any(axis=1) & ~together, groups),
        "confused_by": {
            name: intervals.share(alone & ~together, groups)
            for name, alone in zip(modalities, own_right.T, strict=True)
        },
        "synergy": intervals.share(~own_right.any(axis=1) & together, groups),
    }
