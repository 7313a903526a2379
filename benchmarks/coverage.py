"""Coverage of the 95% intervals of a run, with and without groups; exit 1 if one lies outside its bounds.

Run with: python benchmarks/coverage.py [--draws N] [--only metrics]; minutes on two cores. The bounds are [0.92, 0.97];
of the gain over the best modality with unequal groups, where the wider tail has few degrees of freedom, [0.92, 1]; of
the metrics of a comparison [0.93, 0.97].
Each row draws datasets of n samples, computes an interval from each, and counts those that hold the true value. Groups
differ: the chance of a sample is drawn by group from a Beta distribution of intraclass correlation 0.1. Unequal groups
have sizes of .6^g. The metrics of a comparison are means over trainings, which differ in what they learned of each
sample and, by a standard deviation of 0.1 in the logit of the true class, on all; their true value is the mean over
draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmaudit.audit.metrics import mean_interval, share_interval
from mmaudit.audit.scores.probe_report import gain_over_best
from mmaudit.train.metric_intervals import METRICS, PROBABILITY_METRICS, MetricInterval, accuracy, metric_interval

LOWEST, HIGHEST = 0.92, 0.97
LOWEST_OF_METRICS = 0.93
OVER_BEST, UNEQUAL = "gain over the best", "10 of sizes .6^g"
SIZES = (100, 300, 1_000)
CORRELATION = 0.1
NUM_MODALITIES = 4  # whose best one is chosen, all equally good

Groups = NDArray[np.int64] | None
Draw = Callable[[np.random.Generator, int], tuple[float, float, float]]  # low, high and the true value


def no_groups(n: int) -> Groups:
    return None


def equal_groups(n: int) -> Groups:
    return np.arange(n, dtype=np.int64) % 20


def unequal_groups(n: int) -> Groups:
    sizes = np.maximum(1, np.round(0.4 * n * 0.6 ** np.arange(10)).astype(int))
    return np.repeat(np.arange(10), sizes)[:n].astype(np.int64)


def chances(rng: np.random.Generator, mean: float, groups: Groups, n: int) -> NDArray[np.float64]:
    """Draw the probability of each sample, (n,): that of its group."""
    if groups is None:
        return np.full(n, mean)
    scale = 1 / CORRELATION - 1
    return rng.beta(mean * scale, (1 - mean) * scale, int(groups.max()) + 1)[groups]


def share(rng: np.random.Generator, groups: Groups, n: int, *, mean: float) -> tuple[float, float, float]:
    """Compute the interval of a share, as of an accuracy or of the samples that a modality is ahead on."""
    interval = share_interval(rng.random(n) < chances(rng, mean, groups, n), groups)
    return interval["low"], interval["high"], mean


def lean(rng: np.random.Generator, groups: Groups, n: int) -> tuple[float, float, float]:
    """Compute the interval of a mean of -1, 0 and 1, such as the lean."""
    ahead = rng.random(n) < chances(rng, 0.5, groups, n)
    interval = mean_interval(np.where(rng.random(n) < 0.4, 0.0, np.where(ahead, 1.0, -1.0)), groups)
    return interval["low"], interval["high"], 0.0


def over_best(rng: np.random.Generator, groups: Groups, n: int) -> tuple[float, float, float]:
    """Compute the interval of the fusion's gain over the best of equal modalities: the fusion is 5 points better."""
    chance = chances(rng, 0.6, groups, n)
    correct = (rng.random((n, NUM_MODALITIES)) < chance[:, None]).astype(np.float32)
    fused = (rng.random(n) < np.minimum(chance + 0.05, 1)).astype(np.float32)
    gain = gain_over_best([str(index) for index in range(NUM_MODALITIES)], correct, fused, groups)
    return gain.low, gain.high, float(np.mean(np.minimum(chance + 0.05, 1) - chance))


QUANTITIES: dict[str, Callable[..., tuple[float, float, float]]] = {
    "share of .5": lambda *arguments: share(*arguments, mean=0.5),
    "share of .8": lambda *arguments: share(*arguments, mean=0.8),
    "lean": lean,
    OVER_BEST: over_best,
}
GROUPS: dict[str, Callable[[int], Groups]] = {
    "none": no_groups,
    "20 equal": equal_groups,
    UNEQUAL: unequal_groups,
}


def measure(num_draws: int) -> Iterator[tuple[str, str, list[float]]]:
    """Yield for each quantity and kind of groups the coverage at each size."""
    for name, quantity in QUANTITIES.items():
        for kind, make in GROUPS.items():
            yield name, kind, [coverage(quantity, make, n, num_draws) for n in SIZES]


def coverage(quantity: Any, make: Callable[[int], Groups], n: int, num_draws: int) -> float:
    rng = np.random.default_rng(n)
    groups = make(n)
    size = n if groups is None else len(groups)
    covered = 0
    for _ in range(num_draws):
        low, high, truth = quantity(rng, groups, size)
        covered += low <= truth <= high
    return covered / num_draws


DESIGNS = ((300, 5, 3), (1_000, 10, 5))  # test samples, classes, trainings


def draw_metrics(rng: np.random.Generator, groups: Groups, *, n: int, k: int, seeds: int) -> list[MetricInterval]:
    """Draw probabilities (n, k) of trainings, overconfident by a factor of 2, and compute the metrics' intervals."""
    rows, label = np.arange(n), rng.integers(0, k, n)
    margin = 1.5 + rng.normal(0, 1, n) + (0 if groups is None else rng.normal(0, 0.7, int(groups.max()) + 1)[groups])
    shared = rng.normal(0, 1, (n, k))
    values: dict[str, list[Any]] = {metric: [] for metric in METRICS}
    for _ in range(seeds):
        logits = shared + 0.5 * rng.normal(0, 1, (n, k))
        logits[rows, label] += margin + rng.normal(0, 0.1)
        odds = np.exp(2 * (logits - logits.max(axis=1, keepdims=True)))
        probability = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        values["accuracy"].append(accuracy((probability.argmax(axis=1) == label).astype(np.float64), groups))
        for metric, compute in PROBABILITY_METRICS.items():
            values[metric].append(compute(probability, label, groups))
    return [metric_interval(values[metric], groups) for metric in METRICS]


def measure_metrics(num_draws: int) -> Iterator[tuple[str, str, int, float]]:
    """Yield for each kind of groups and design the coverage of each metric."""
    for kind, make in (("none", no_groups), ("20 equal", equal_groups)):
        for n, k, seeds in DESIGNS:
            rng = np.random.default_rng([n, k])
            drawn = [draw_metrics(rng, make(n), n=n, k=k, seeds=seeds) for _ in range(num_draws)]
            for metric, intervals in zip(METRICS, zip(*drawn, strict=True), strict=True):
                truth = np.mean([interval.value for interval in intervals])
                yield metric, kind, n, float(np.mean([row.low <= truth <= row.high for row in intervals]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=2_000, help="datasets drawn for each cell")
    parser.add_argument("--only", choices=["metrics"], help="the metrics of a comparison alone")
    options = parser.parse_args()
    met = True
    print("| metric over trainings | groups | n | coverage |\n|---|---|---|---|")
    for metric, kind, n, value in measure_metrics(options.draws):
        met &= LOWEST_OF_METRICS <= value <= HIGHEST
        print(f"| {metric} | {kind} | {n:,} | {value:.3f} |", flush=True)
    if options.only:
        return 0 if met else 1
    rows = list(measure(options.draws))
    print(f"| quantity | groups | {' | '.join(f'n = {n:,}' for n in SIZES)} |\n|---|---|{'---|' * len(SIZES)}")
    for name, kind, covered in rows:
        print(f"| {name} | {kind} | {' | '.join(f'{value:.3f}' for value in covered)} |")
    met &= all(is_within(name, kind, value) for name, kind, covered in rows for value in covered)
    return 0 if met else 1


def is_within(name: str, kind: str, value: float) -> bool:
    """Return whether a coverage lies within its bounds."""
    highest = 1.0 if (name, kind) == (OVER_BEST, UNEQUAL) else HIGHEST
    return LOWEST <= value <= highest


if __name__ == "__main__":
    raise SystemExit(main())
