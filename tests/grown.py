"""Data that grow: grouped samples of Gaussian features, of which some come later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import gaussian_table

from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run

QUICK = ProbeConfig(folds=3, repeats=2, l2_penalties=(1e-2,), control=False, halves=False)
CONFIG = replace(RunConfig(), probe=QUICK)
IN_PARTS = replace(CONFIG, parts=PartsConfig(rows=30))  # of up to 120 rows one part
NUM_OLD, NUM_ALL = 90, 150


def table(*, by_group: bool = True, with_split: bool = False, seed: int = 0) -> pa.Table:
    """Return 150 samples in groups of five or ten; of the last 60, 45 are of groups that the first 90 have, too.

    Vectors have nine numbers: equal ones of fewer than eight are no copies.
    """
    rows = gaussian_table(num_samples=NUM_ALL, num_classes=9, seed=seed)
    if not with_split:
        rows = rows.drop_columns(["split"])
    if by_group:
        group = [f"g{row // 5 if row < NUM_OLD else 9 + (row - NUM_OLD) // 5}" for row in range(NUM_ALL)]
        rows = rows.append_column("group", pa.array(group))
    return rows


def with_copy(rows: pa.Table, *, of: int, name: str) -> pa.Table:
    """Return one row with the content of another one, and another id."""
    row = rows.slice(of, 1)
    return row.set_column(row.column_names.index("id"), "id", pa.array([name]))


def write(rows: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=15)


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files but the feature cache, run.json, which has times, and the report."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    left_out = ("features/", "run.json", "report.", "figures/")
    return {name: content for name, content in contents.items() if not name.startswith(left_out)}


def record(run: Path) -> dict[str, object]:
    """Return run.json without times and signature."""
    content = Run(run).record()
    return {key: value for key, value in content.items() if key not in ("seconds", "signature")}


def check_close(first: pa.Table, second: pa.Table) -> None:
    """Check that two score tables are equal up to the last digits of float32, and in everything else."""
    assert first.schema.names == second.schema.names
    for one, another in zip(first, second, strict=True):
        if pa.types.is_floating(one.type):
            np.testing.assert_allclose(one.to_numpy(), another.to_numpy(), atol=1e-6)
        else:
            assert one.equals(another)
