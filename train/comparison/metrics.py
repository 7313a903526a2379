"""Tables of a comparison: metrics by training, metrics with intervals, and accuracy at rates of a missing modality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...audit.metrics import Groups, group_codes
from ..difference import Array, Condition, Mask
from ..metric_intervals import METRICS, PROBABILITY_METRICS, MetricValue, accuracy, dense_groups, metric_interval

CLASS_PREFIX = "class:"  # of the subset of a class's samples
MISSING_PREFIX = "missing:"  # of the subset of samples that lack a modality in the data
RATES = tuple(step / 10 for step in range(11))  # at which a modality is missing
METRIC_COLUMNS = (
    *("manifest", "method", "kind", "subset", "metric", "value", "low", "high", "num_samples", "num_seeds"),
)
MISSING_COLUMNS = ("manifest", "method", "kind", "modality", "rate", "accuracy", "low", "high")
_OF_CLASSES = ("macro_f1", "map")  # which have no meaning on the samples of one class

Probabilities = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TestPredictions:
    """Predictions of n test samples by the trainings of the conditions, each condition with its own S.

    Attributes:
        correct: Correctness (S, n) by condition, 0 or 1.
        seeds: Seed of each training, by condition.
        kinds: "method" or "control", by condition.
        subsets: Masks (n,) by name.
        group: Group of each test sample; None where samples are independent.
        label: Class of each test sample (n,), in [0, k); None where only correctness is known.
        probabilities: Probabilities (S, n, k) by condition, where they are known; read once each, so that a mapping
            may read them from files.
        without: Correctness (S, n) by condition and modality with that modality absent, where it is known.
    """

    __test__ = False  # no class of tests

    correct: Mapping[Condition, Array]
    seeds: Mapping[Condition, Sequence[int]]
    kinds: Mapping[Condition, str]
    subsets: Mapping[str, Mask]
    group: Sequence[str] | None = None
    label: NDArray[np.int64] | None = None
    probabilities: Mapping[Condition, Probabilities]
    without: Mapping[Condition, Mapping[str, Array]]

    def codes(self) -> Groups:
        """Return the group index of each test sample."""
        return None if self.group is None else group_codes(np.array(self.group, dtype=object))


def tabulate_metrics(tested: TestPredictions) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Compute the table of metrics with intervals, and the metrics of each training and subset as records.

    Macro-F1 and MAP are means over classes, and have no rows on the subset of one class.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    codes = tested.codes()
    for condition, correct in tested.correct.items():
        probabilities = tested.probabilities.get(condition)
        for subset, mask in tested.subsets.items():
            if not mask.any():
                continue
            groups = dense_groups(None if codes is None else codes[mask])
            values: dict[str, list[MetricValue]] = {"accuracy": [accuracy(run[mask], groups) for run in correct]}
            if probabilities is not None and tested.label is not None:
                label = tested.label[mask]
                values |= {
                    metric: [compute(run[mask], label, groups) for run in probabilities]
                    for metric, compute in PROBABILITY_METRICS.items()
                    if not (subset.startswith(CLASS_PREFIX) and metric in _OF_CLASSES)
                }
            identity = {"manifest": condition[0], "method": condition[1]}
            for metric in METRICS:
                if metric in values:
                    interval = metric_interval(values[metric], groups)
                    numbers = {"value": interval.value, "low": interval.low, "high": interval.high}
                    counts = {"num_samples": int(mask.sum()), "num_seeds": len(correct)}
                    names = {"kind": tested.kinds[condition], "subset": subset, "metric": metric}
                    rows.append(identity | names | numbers | counts)
            runs += [
                identity
                | {"seed": seed, "subset": subset, "n": int(mask.sum())}
                | {metric: values[metric][position].value for metric in METRICS if metric in values}
                for position, seed in enumerate(tested.seeds[condition])
            ]
    return pd.DataFrame(rows, columns=list(METRIC_COLUMNS)), runs


def tabulate_missing(tested: TestPredictions) -> pd.DataFrame:
    """Compute the accuracy on all test samples if each lacks a modality with a probability of 0, .1, ... 1.

    The expectation over which samples lack it is exactly linear in the rate r: sample i of a training is predicted
    correctly with the probability (1 - r) correct_i + r correct_i(without the modality). The curve is therefore made of
    the predictions with the modality absent, without drawing samples, and its intervals are of these mixtures.
    """
    rows = []
    codes = dense_groups(tested.codes())
    for condition, by_modality in tested.without.items():
        for modality, without in by_modality.items():
            for rate, interval in _curve(tested.correct[condition], without, codes):
                identity = {"manifest": condition[0], "method": condition[1], "kind": tested.kinds[condition]}
                numbers = {"accuracy": interval.value, "low": interval.low, "high": interval.high}
                rows.append({**identity, "modality": modality, "rate": rate, **numbers})
    return pd.DataFrame(rows, columns=list(MISSING_COLUMNS))


def _curve(correct: Array, without: Array, groups: Groups) -> Iterator[tuple[float, Any]]:
    for rate in RATES:
        mixture = (1 - rate) * correct + rate * without
        yield rate, metric_interval([accuracy(run, groups) for run in mixture], groups)


def tabulate_runs(
    trainings: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], n: int
) -> pd.DataFrame:
    """Return one row per training and subset: what is known of each training, then n and the metrics.

    A training without metrics, since it diverged, has one row, of the subset `all`.
    """
    keys = ("manifest", "method", "seed")
    by_training: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in measured:
        by_training.setdefault(tuple(row[key] for key in keys), []).append(row)
    rows = [
        {**training, **row}
        for training in trainings
        for row in by_training.get(tuple(training[key] for key in keys), [{"subset": "all", "n": n}])
    ]
    known = [*dict.fromkeys(key for training in trainings for key in training)]
    return pd.DataFrame(rows, columns=[*known, "subset", "n", *METRICS])
