"""Rounds of cross-fitting: which rows does an audit score, and who learns from whom?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import ScoreError
from .hashing import hash_rank
from .probing.config import ProbeConfig
from .probing.folds import assign_folds, in_one_fold
from .probing.probe import Crossing
from .quality import Quarantined, Reason
from .source.samples import Samples


def plan_rounds(
    samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int
) -> tuple[NDArray[np.intp], list[Crossing], list[Quarantined]]:
    """Deal the rows into folds, once a repeat, leaving out classes that one fold holds alone in any of them.

    Gives the rows that stay, a crossing a repeat, and the samples of classes too rare. Strata that are no classes,
    as of a regression, are never too rare.
    """
    left_out: list[Quarantined] = []
    while True:
        crossings = [_crossing(samples, rows, config, seed=seed, repeat=repeat) for repeat in range(config.repeats)]
        if samples.task != "classification":
            return rows, crossings, left_out
        label = samples.label[rows]
        rare = np.logical_or.reduce([in_one_fold(label, crossing.fold, crossing.fits) for crossing in crossings])
        if not rare.any():
            return rows, crossings, left_out
        left_out += [_rare(samples, rows, row) for row in rows[rare]]
        rows = rows[~rare]
        if len(rows) == 0:
            raise ScoreError(f"no class can be cross-fitted; the first: {left_out[0].detail}")


def _crossing(samples: Samples, rows: NDArray[np.intp], config: ProbeConfig, *, seed: int, repeat: int) -> Crossing:
    train = samples.split[rows] != "test"
    if not train.any():  # the mixture is never fitted to test samples either
        raise ScoreError("every usable sample is a test sample: a probe has nothing to learn from; pass --split none")
    fits = train | (config.learn_from == "all")
    group = None if samples.group is None else samples.group[rows]
    ids, label = samples.sample_id[rows], samples.label[rows]
    deals = [
        assign_folds(ids, label, group, fits, num_folds=config.folds, seed=seed, purpose=f"{purpose} {repeat}")
        for purpose in ("fold", "inner fold")
    ]
    key = hash_rank(ids, seed=seed, purpose="strength rows")
    return Crossing(fold=deals[0], inner=deals[1], fits=fits, key=key)


def _rare(samples: Samples, rows: NDArray[np.intp], row: int) -> Quarantined:
    peers = rows[samples.label[rows] == samples.label[row]]
    detail = f"class {samples.class_names[samples.label[row]]!r} has {len(peers)} usable samples"
    if samples.group is not None and len(peers):
        detail += f", of {len(set(samples.group[peers]))} groups"
    return Quarantined(
        sample_id=samples.sample_id[row], modality=None, reason=Reason.RARE_CLASS, detail=f"{detail}, all in one fold"
    )
