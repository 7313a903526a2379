"""Simulation of the table in audit/scores/dip.py, printed as Python. Takes a few minutes on two cores.

Run with: python benchmarks/dip_table.py
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import numpy as np

from mmaudit.audit.scores.dip import LEVELS, SIZES, dip

NUM_DRAWS = 20_000  # of which 20 are above the last level, 0.999
SEED = 0


def quantiles(size: int) -> str:
    """Return a row of the table: the quantiles of sqrt(size) * dip of uniform samples at LEVELS."""
    rng = np.random.default_rng([SEED, size])
    dips = [dip(rng.random(size)) for _ in range(NUM_DRAWS)]
    row = np.sqrt(size) * np.quantile(dips, LEVELS)
    return f"        [{', '.join(f'{q:.4f}' for q in row)}],  # {size}"


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        for row in pool.map(quantiles, SIZES[::-1]):
            print(row, flush=True)
