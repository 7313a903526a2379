"""Score tables, of mmaudit and of other tools, with odd values, types, columns and metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .arrow import odd_type, write_table
from .mutate import EDGE_INTEGERS, EDGE_TEXTS, mutate_bytes, mutate_json
from .seeds import SPLITS, Seeds


def score_tables(rng: Random, seeds: Seeds) -> list[str]:
    """Write a score table, of mmaudit or of another tool, with odd values, types and columns, and split it."""
    table = pq.read_table(seeds.path("run/scores.parquet")) if rng.random() < 0.4 else _foreign_scores(rng)
    if rng.random() < 0.3:
        table = table.replace_schema_metadata(odd_metadata(rng, table.schema.metadata))
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        table = change_table(rng, table)
    if rng.random() < 0.2:
        Path("shards").mkdir()
        write_table(rng, table, Path("shards/a.parquet"))
        write_table(rng, change_table(rng, table) if rng.random() < 0.5 else table, Path("shards/b.parquet"))
        name = rng.choice(("shards", "shards/*.parquet"))
    else:
        name = "scores.parquet"
        write_table(rng, table, Path(name))
    return ["split", "--scores", name, *split_options(rng, table.column_names)]


def _foreign_scores(rng: Random) -> pa.Table:
    """Return a score table with the required columns, of two or three modalities."""
    num_rows = rng.choice((0, 1, 2, 5, 40, 40, 40))
    numbers = np.random.default_rng(rng.getrandbits(32))
    columns: dict[str, Any] = {
        "sample_id": [f"s{row}" for row in range(num_rows)],
        "label": [row % 3 for row in range(num_rows)],
    }
    if rng.random() < 0.5:
        columns["label_name"] = [f"c{row % 3}" for row in range(num_rows)]
    if rng.random() < 0.6:
        columns["split"] = [SPLITS[row % 6] for row in range(num_rows)]
    if rng.random() < 0.4:
        columns["group"] = [f"g{row % 7}" for row in range(num_rows)]
    for name in ("a", "b", "c")[: rng.choice((2, 2, 3))]:
        columns[f"confidence_{name}"] = numbers.random(num_rows)
    for name in ("gap", "balance", "p_balanced", "discrepancy"):
        if rng.random() < 0.15:
            columns[name] = numbers.random(num_rows)
    return pa.table(columns)


def split_options(rng: Random, names: list[str]) -> list[str]:
    """Return options that select samples, sometimes with options of the selection."""
    first = next((name.removeprefix("confidence_") for name in names if name.startswith("confidence_")), "audio")
    argv = list(
        rng.choice(
            (
                ["--balanced"],
                ["--balanced", "--grid"],
                ["--balanced", "--by", "weight"],
                ["--balanced", "--size", "10"],
                ["--balanced", "--bins", rng.choice(("2", "auto", "1000"))],
                ["--subset", f"{first}-preferred"],
                ["--subset", rng.choice(("balanced:0.2", "most-balanced:20%", "least-balanced:5", "random:50%"))],
                ["--dominated", f"{first}:0.2"],
                ["--gmm", rng.choice(("balanced", "imbalanced"))],
                ["--resplit", "80/10/10"],
                ["--balanced", "--resplit", rng.choice(("80/10/10", "1/1/98", "100/0/0"))],
            )
        )
    )
    if rng.random() < 0.2:
        argv += ["--between", rng.choice((first, f"{first}:b", "b:a"))]
    if rng.random() < 0.2:
        argv += ["--dry-run"]
    return argv + (["--json"] if rng.random() < 0.3 else [])


def change_table(rng: Random, table: pa.Table) -> pa.Table:
    """Return a table with one column, some rows, or the names changed."""
    change = rng.choice(_TABLE_CHANGES)
    return change(rng, table) if table.num_columns else table


def _change_cells(rng: Random, table: pa.Table) -> pa.Table:
    """Replace up to three cells of a column, or all of them, by values that the column's type holds."""
    number = rng.randrange(table.num_columns)
    column = table.column(number)
    cells = column.to_pylist()
    rows = range(len(cells)) if rng.random() < 0.2 else [rng.randrange(len(cells)) for _ in range(3)] if cells else ()
    for row in rows:
        cells[row] = _cell_like(rng, column.type)
    try:
        return table.set_column(number, table.field(number), pa.array(cells, column.type))
    except (pa.ArrowException, OverflowError):
        return table


def _cell_like(rng: Random, type_: pa.DataType) -> Any:
    if rng.random() < 0.25:
        return None
    if pa.types.is_integer(type_):
        bits = min(type_.bit_width, 63) - 1
        return rng.choice([value for value in EDGE_INTEGERS if -1 <= value < 2**bits])
    if pa.types.is_floating(type_):
        return rng.choice((0.0, 1.0, -1.0, 0.5, 1.1, float("nan"), float("inf"), 1e-30))
    return rng.choice(EDGE_TEXTS)


def _change_type(rng: Random, table: pa.Table) -> pa.Table:
    number = rng.randrange(table.num_columns)
    return table.set_column(number, table.column_names[number], odd_type(rng, table.column(number)))


def _drop_column(rng: Random, table: pa.Table) -> pa.Table:
    return table.remove_column(rng.randrange(table.num_columns))


def _repeat_column(rng: Random, table: pa.Table) -> pa.Table:
    number = rng.randrange(table.num_columns)
    return table.append_column(table.column_names[number], table.column(rng.choice((number, 0))))


def _rename_column(rng: Random, table: pa.Table) -> pa.Table:
    names = list(table.column_names)
    names[rng.randrange(len(names))] = rng.choice((*EDGE_TEXTS, *names, "confidence_", "confidence_fused", "x_path"))
    return table.rename_columns(names)


def _change_rows(rng: Random, table: pa.Table) -> pa.Table:
    rows = list(range(table.num_rows))
    rng.shuffle(rows)
    count = rng.choice((0, 1, 2, len(rows)))
    repeated = rows[:2] if rng.random() < 0.5 else []
    indices = pa.array([*rows[:count], *repeated], pa.int64())
    try:
        return table.take(indices)
    except pa.ArrowNotImplementedError:  # Arrow cannot take rows of views
        return table.slice(0, count)


_TABLE_CHANGES: tuple[Callable[[Random, pa.Table], pa.Table], ...] = (
    _change_cells,
    _change_cells,
    _change_cells,
    _change_type,
    _change_type,
    _drop_column,
    _repeat_column,
    _rename_column,
    _change_rows,
)


def odd_metadata(rng: Random, metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Return schema metadata whose JSON has other shapes or types at some keys, or is damaged as text."""
    metadata = {key: value for key, value in (metadata or {}).items() if key.startswith(b"mmaudit")}
    metadata = metadata or {b"mmaudit": b'{"fingerprint": "x"}'}
    key = rng.choice(sorted(metadata))
    if rng.random() < 0.1:
        return {**metadata, key: mutate_bytes(rng, metadata[key])}
    return {**metadata, key: json_bytes(mutate_json(rng, json.loads(metadata[key])))}


def json_bytes(content: Any) -> bytes:
    """Return JSON text, that of integers of thousands of digits included."""
    try:
        return json.dumps(content).encode()
    except ValueError:  # an integer of more digits than Python writes
        return b'{"schema": ' + b"9" * 5000 + b"}"
    except RecursionError:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000
