"""Intervals of metrics: the metrics without a sample or a group, coverage, and what rules an interval out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.train.difference import compare_correctness
from mmaudit.train.evaluate import compute_metrics
from mmaudit.train.metric_intervals import (
    METRICS,
    PROBABILITY_METRICS,
    MetricValue,
    accuracy,
    dense_groups,
    metric_interval,
)

Probabilities = NDArray[np.float32]


def draw(
    n: int, k: int, *, seed: int = 0, ties: bool = False
) -> tuple[Probabilities, NDArray[np.int64], NDArray[np.int64]]:
    """Return probabilities (n, k), labels and groups (n,); with ties the probabilities are rounded to tenths."""
    rng = np.random.default_rng([seed, n, k])
    probability = rng.dirichlet(np.full(k, 0.5), n).astype(np.float32)
    label = np.where(rng.random(n) < 0.5, probability.argmax(axis=1), rng.integers(0, k, n))
    group = np.unique(rng.integers(0, n // 6, n), return_inverse=True)[1].astype(np.int64)
    return np.round(probability, 1) if ties else probability, label, group


@pytest.mark.parametrize("metric", PROBABILITY_METRICS)
@pytest.mark.parametrize(("n", "k", "ties"), [(60, 3, False), (60, 3, True), (36, 12, True)])
def test_metric_without_a_sample_or_group_is_the_metric_of_the_others(metric: str, n: int, k: int, ties: bool) -> None:
    """With 12 classes of 36 samples some occur once, and do not occur without that sample."""
    probability, label, group = draw(n, k, ties=ties)

    def computed(rows: NDArray[np.bool_]) -> float:
        return compute_metrics(probability[rows], label[rows])[metric]

    value = PROBABILITY_METRICS[metric](probability, label, group)
    assert value.value == pytest.approx(compute_metrics(probability, label)[metric])
    assert value.without_sample == pytest.approx([computed(np.arange(n) != row) for row in range(n)])
    assert value.without_group == pytest.approx([computed(group != code) for code in range(group.max() + 1)])


def test_average_precision_by_groups_is_equal_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    probability, label, group = draw(60, 3)
    whole = PROBABILITY_METRICS["map"](probability, label, group)
    monkeypatch.setattr("mmaudit.train.metric_intervals._MAX_CELLS", 50)
    parts = PROBABILITY_METRICS["map"](probability, label, group)
    assert np.array_equal(parts.without_group, whole.without_group)  # type: ignore[arg-type]


@pytest.mark.parametrize("grouped", [False, True])
def test_interval_of_accuracy_has_the_variance_of_a_comparison_with_a_constant(grouped: bool) -> None:
    """Against a method that is always wrong the difference is the accuracy."""
    rng = np.random.default_rng(0)
    correct = (rng.random((4, 200)) < rng.random(200)).astype(float)
    group = np.arange(200) % 12 if grouped else None
    interval = metric_interval([accuracy(run, group) for run in correct], group)
    names = None if group is None else group.tolist()
    difference = compare_correctness(correct, np.zeros((4, 200)), group=names)
    assert interval.value == pytest.approx(difference.mean)
    share = interval.value
    width = np.log(interval.high / (1 - interval.high)) - np.log(interval.low / (1 - interval.low))
    # Both half-widths are t times the standard error; df differ by the degrees of freedom of the constant.
    assert width * share * (1 - share) / 2 == pytest.approx((difference.high - difference.low) / 2, rel=0.02)


def test_one_training_or_one_group_has_no_interval() -> None:
    probability, label, _ = draw(60, 3)
    for compute in PROBABILITY_METRICS.values():
        value = compute(probability, label, None)
        assert np.isnan(metric_interval([value], None).low)
    one = np.zeros(60, dtype=np.int64)
    interval = metric_interval([accuracy(np.ones(60), one)] * 3, one)
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.value == 1


def test_without_variation_the_interval_is_wilsons() -> None:
    perfect = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    values = [compute(perfect, np.arange(40) % 4, None) for compute in PROBABILITY_METRICS.values()]
    for value, expected in zip([*values, accuracy(np.ones(40), None)], (1, 1, 0, 1), strict=True):
        interval = metric_interval([value, value], None)
        assert interval.value == expected
        assert (interval.low, interval.high) == pytest.approx((0.912, 1) if expected else (0, 0.088), abs=2e-3)


def coverage(*, n: int, seeds: int, num_groups: int | None, num_draws: int) -> dict[str, float]:
    """Return the share of intervals of three classes that hold the mean of the metric over draws."""
    rng, drawn = np.random.default_rng([n, seeds]), []
    for _ in range(num_draws):
        label = rng.integers(0, 3, n)
        group = None if num_groups is None else dense_groups(np.arange(n, dtype=np.int64) % num_groups)
        hard = rng.normal(0, 1, n) + (0 if group is None else rng.normal(0, 0.7, num_groups)[group])
        own = rng.normal(0, 1, (n, 3))
        runs: dict[str, list[MetricValue]] = {metric: [] for metric in METRICS}
        for _ in range(seeds):
            logits = own + 0.5 * rng.normal(0, 1, (n, 3))
            logits[np.arange(n), label] += 1 + hard + rng.normal(0, 0.1)
            odds = np.exp(2 * logits - 2 * logits.max(axis=1, keepdims=True))
            probability = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
            runs["accuracy"].append(accuracy(probability.argmax(axis=1) == label, group))
            for metric, compute in PROBABILITY_METRICS.items():
                runs[metric].append(compute(probability, label, group))
        drawn.append([metric_interval(values, group) for values in runs.values()])
    means = np.mean([[interval.value for interval in row] for row in drawn], axis=0)
    holds = [[row.low <= mean <= row.high for row, mean in zip(rows, means, strict=True)] for rows in drawn]
    return dict(zip(METRICS, np.mean(holds, axis=0).tolist(), strict=True))


def test_intervals_cover() -> None:
    """60 draws: of four coverages of .95 one lies below .85 in 1 of 200."""
    assert min(coverage(n=90, seeds=2, num_groups=None, num_draws=60).values()) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [None, 15])
def test_intervals_cover_with_and_without_groups(num_groups: int | None) -> None:
    measured = coverage(n=120, seeds=3, num_groups=num_groups, num_draws=600).values()
    assert min(measured) > 0.92
    assert max(measured) < 0.985
