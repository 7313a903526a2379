"""Level and power of the comparison of two methods, by simulation; exit code 1 if a bound is missed.

Run with: python benchmarks/verdict.py [--draws N]; about ten minutes on two cores with 4,000 draws a cell.
A draw is one comparison: each test sample has a probability of being predicted correctly by each method, of which a
part is its own, a part that of the method on this sample, and with groups a part that of the method on its group; each
training shifts all probabilities of its method by a normal number, whose standard deviation is given in points of
accuracy. The level counts claims where both methods have the same expected accuracy over all samples, groups and
trainings. Bounds: at most .06 in every cell, values below .03 are marked; methods that differ by 5 points are told
apart in 80% of comparisons at n = 1,000, S = 5 and a deviation of at most one point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmaudit.train.difference import LEVEL, compare_correctness, holm

SIZES, SEEDS, DEVIATIONS = (300, 1_000, 5_000), (3, 5), (0.0, 0.01, 0.02)
NUM_GROUPS = 20
HIGHEST_LEVEL, LOW_LEVEL, LOWEST_POWER = 0.06, 0.03, 0.8
BATCH = 250  # draws of one task

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One design: test samples, trainings of each method, deviation over trainings, groups, and the true difference."""

    n: int
    seeds: int
    deviation: float
    grouped: bool
    effect: float = 0.0


def draw_methods(cell: Cell, num_methods: int, rng: np.random.Generator) -> tuple[list[Array], NDArray[np.intp] | None]:
    """Draw the correctness (S, n) of methods on the same samples, the first better by the effect, and the groups."""
    group = rng.permutation(np.arange(cell.n) % NUM_GROUPS) if cell.grouped else None
    own = rng.normal(0, 0.3, cell.n)
    methods = []
    for index in range(num_methods):
        chance = 0.65 + own + rng.normal(0, 0.15, cell.n)
        if group is not None:
            chance = chance + rng.normal(0, 0.03, NUM_GROUPS)[group]
        shift = rng.normal(0, cell.deviation, (cell.seeds, 1)) + (cell.effect if index == 0 else 0.0)
        methods.append((rng.random((cell.seeds, cell.n)) < chance + shift).astype(np.float64))
    return methods, group


def count_claims(cell: Cell, seed: int, *, num_draws: int) -> int:
    """Count the comparisons of two methods that claim a difference."""
    rng = np.random.default_rng([seed, cell.n, cell.seeds, round(1000 * cell.deviation), cell.grouped])
    claims = 0
    for _ in range(num_draws):
        (a, b), group = draw_methods(cell, 2, rng)
        claims += compare_correctness(a, b, group=None if group is None else group.tolist()).p < LEVEL
    return claims


def count_families(cell: Cell, seed: int, *, num_draws: int) -> int:
    """Count the tables of five methods against a baseline, corrected by Holm, that claim any difference."""
    rng = np.random.default_rng([seed, cell.n, cell.seeds, 6])
    claims = 0
    for _ in range(num_draws):
        (baseline, *others), group = draw_methods(cell, 6, rng)
        groups = None if group is None else group.tolist()
        p = [compare_correctness(method, baseline, group=groups).p for method in others]
        claims += min(holm(p)) < LEVEL
    return claims


def rate(pool: ProcessPoolExecutor, count: Callable[..., int], cell: Cell, draws: int) -> float:
    """Return the share of draws with a claim."""
    run = partial(count, cell, num_draws=BATCH)
    return sum(pool.map(run, range(draws // BATCH))) / (draws // BATCH * BATCH)


def levels(pool: ProcessPoolExecutor, draws: int) -> Iterator[tuple[Cell, float]]:
    for grouped in (False, True):
        for n in SIZES:
            for seeds in SEEDS:
                for deviation in DEVIATIONS:
                    cell = Cell(n=n, seeds=seeds, deviation=deviation, grouped=grouped)
                    yield cell, rate(pool, count_claims, cell, draws)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=4_000, help="comparisons of each cell")
    draws = max(BATCH, parser.parse_args().draws)
    met = True
    with ProcessPoolExecutor(2) as pool:
        print("| groups | n | S | deviation, points | level |\n|---|---|---|---|---|")
        for cell, level in levels(pool, draws):
            met &= level <= HIGHEST_LEVEL
            mark = " above .06" if level > HIGHEST_LEVEL else " (low)" if level < LOW_LEVEL else ""
            kind = NUM_GROUPS if cell.grouped else "none"
            print(f"| {kind} | {cell.n} | {cell.seeds} | {100 * cell.deviation:.0f} | {level:.3f}{mark} |", flush=True)
        print("\n| n | S | any of five claims, Holm |\n|---|---|---|")
        for n in SIZES[:2]:
            cell = Cell(n=n, seeds=5, deviation=0.01, grouped=False)
            level = rate(pool, count_families, cell, draws // 2)
            met &= level <= HIGHEST_LEVEL
            print(f"| {n} | 5 | {level:.3f} |", flush=True)
        print("\n| n | S | deviation, points | +1 | +2 | +3 | +5 points |\n|---|---|---|---|---|---|---|")
        for n in SIZES:
            for deviation in (0.005, 0.01):
                cells = [
                    Cell(n=n, seeds=5, deviation=deviation, grouped=False, effect=e) for e in (0.01, 0.02, 0.03, 0.05)
                ]
                power = [rate(pool, count_claims, cell, draws // 4) for cell in cells]
                met &= n != 1_000 or power[-1] >= LOWEST_POWER
                print(f"| {n} | 5 | {100 * deviation:.1f} | {' | '.join(f'{p:.2f}' for p in power)} |", flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
