"""Coverage of the 95% intervals of a run, with and without groups; exit 1 if one lies outside its bounds.

Run with: python benchmarks/coverage.py [--draws N]; a minute on two cores. The bounds are [0.92, 0.97]; of the gain
over the best modality with unequal groups, where the wider tail has few degrees of freedom, [0.92, 1].
Each row draws datasets of n samples, computes an interval from each, and counts those that hold the true value. Groups
differ: the chance of a sample is drawn by group from a Beta distribution of intraclass correlation 0.1. Unequal groups
have sizes of .6^g.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmaudit.audit.metrics import mean_interval, share_interval
from mmaudit.audit.scores.probe_report import gain_over_best

LOWEST, HIGHEST = 0.92, 0.97
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=2_000, help="datasets drawn for each cell")
    rows = list(measure(parser.parse_args().draws))
    print(f"| quantity | groups | {' | '.join(f'n = {n:,}' for n in SIZES)} |\n|---|---|{'---|' * len(SIZES)}")
    for name, kind, covered in rows:
        print(f"| {name} | {kind} | {' | '.join(f'{value:.3f}' for value in covered)} |")
    return 0 if all(is_within(name, kind, value) for name, kind, covered in rows for value in covered) else 1


def is_within(name: str, kind: str, value: float) -> bool:
    """Return whether a coverage lies within its bounds."""
    highest = 1.0 if (name, kind) == (OVER_BEST, UNEQUAL) else HIGHEST
    return LOWEST <= value <= highest


if __name__ == "__main__":
    raise SystemExit(main())
