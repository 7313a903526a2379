"""Tests of the checks of one file: values in range pass, others are counted and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.storage import PROVENANCE_KEY
from mmaudit.rebalance.checks import BOUNDS, CheckedFile, non_null_ids, provenance_section
from mmaudit.rebalance.manifest import COLUMNS, RANGES, ROWS_KEY, SCHEMA_VERSION, metadata_digest, table_digest
from mmaudit.rebalance.selection import ExternalSort

N = 6
PROVENANCE = {"schema": f"mmaudit.manifest/{SCHEMA_VERSION}", "recipe": {"balanced": {"bins": 4}}}
COLUMN: dict[str, list[Any]] = {
    "sample_id": [f"s{row}" for row in range(N)],
    "label": [row % 2 for row in range(N)],
    "label_name": ["ab"[row % 2] for row in range(N)],
    "split": ["train"] * N,
    "subset": ["balanced"] * N,
    "bin": [row % 4 for row in range(N)],
    "rank": list(range(N)),
    "weight": [1.0] * N,
    "discrepancy": [0.0] * N,
    "gap": [0.0] * N,
    "balance": [None] * N,
    "p_balanced": [0.5] * N,
    "group": [None] * N,
    "content": [None] * N,
}


def write(
    path: Path, changed: dict[str, list[Any]] | None = None, *, columns: dict[str, pa.DataType] = COLUMNS
) -> Path:
    """Write a file whose metadata match its rows."""
    table = pa.table({name: pa.array({**COLUMN, **(changed or {})}[name], type_) for name, type_ in columns.items()})
    metadata = {PROVENANCE_KEY: json.dumps(PROVENANCE).encode()}
    stated = {"rows": len(table), "digest": table_digest(table), "metadata": metadata_digest(metadata)}
    pq.write_table(table.replace_schema_metadata({**metadata, ROWS_KEY.encode(): json.dumps(stated).encode()}), path)
    return path


def checked(path: Path, provenance: dict[str, Any] = PROVENANCE) -> CheckedFile:
    file = CheckedFile(path, COLUMNS, provenance)
    with ExternalSort(file.num_rows, path.parent) as ids:
        file.read_all(ids, 0)
    return file


def failed(file: CheckedFile) -> Iterator[str]:
    return (check.name for check in file.checks("") if not check.held)


def test_every_range_of_a_manifest_is_checked() -> None:
    assert BOUNDS.keys() == RANGES.keys()


def test_valid_file_passes_every_check(tmp_path: Path) -> None:
    file = checked(write(tmp_path / "m.parquet"))
    assert [check.name for check in file.checks("x ")] == [
        "x schema",
        "x rows",
        "x digest",
        "x metadata",
        "x nulls",
        "x ranges",
    ]
    assert all(check.held for check in file.checks(""))
    assert (file.names_of_label, file.subsets) == ({0: {"a"}, 1: {"b"}}, {"balanced"})


@given(st.lists(st.none() | st.floats(-3, 3, width=32), min_size=N, max_size=N), st.sampled_from(["gap", "balance"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_out_of_range_and_nulls_are_counted(tmp_path: Path, values: list[Any], name: str) -> None:
    file = checked(write(tmp_path / "m.parquet", {name: values}))
    low, high = BOUNDS[name]
    beyond = [value for value in values if value is not None and not low - 2e-6 <= value <= high + 2e-6]
    nulls = values.count(None) if name == "gap" else 0
    assert file.out_of_range[name] == len(beyond)
    assert file.nulls[name] == nulls
    assert set(failed(file)) == {value for value, number in (("ranges", len(beyond)), ("nulls", nulls)) if number}


@pytest.mark.parametrize(
    ("recipe", "beyond"),
    [({}, 0), ({"bins": 4}, 0), ({"bins": 3}, 1), ({"bins": 2, "grid": True}, 0), ({"bins": 0}, 0)],
)
def test_largest_bin_follows_from_the_recipe(tmp_path: Path, recipe: dict[str, Any], beyond: int) -> None:
    file = checked(write(tmp_path / "m.parquet"), {**PROVENANCE, "recipe": {"balanced": recipe}})
    assert file.out_of_range["bin"] == beyond


def test_rows_and_digest_are_compared_with_the_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert set(failed(checked(path))) == {"rows", "digest"} | {"ranges"}  # the last rank is past the last row
    pq.write_table(table.replace_schema_metadata(None), path)
    assert set(failed(checked(path))) == {"schema", "rows", "digest", "metadata"}
    pq.write_table(table.set_column(5, "bin", table["bin"].cast(pa.int64())), path)
    assert set(failed(checked(path))) == {"schema"} | {"digest"}


def test_missing_column_ends_the_checks(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", columns={name: type_ for name, type_ in COLUMNS.items() if name != "gap"})
    (check,) = CheckedFile(path, COLUMNS, PROVENANCE).checks("")
    assert (check.held, check.detail) == (False, "m.parquet lacks gap: run mmaudit split again")


def test_invalid_columns_raise(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"sample_id": [1]}), path)
    with pytest.raises(ManifestError, match="its sample_id is int64, not string"):
        CheckedFile(path, COLUMNS, {})
    pq.write_table(pa.table({"sample_id": ["a"], "gap": [[1]]}), path)
    with pytest.raises(ManifestError, match="its gap is list<"):
        CheckedFile(path, COLUMNS, {})


def test_missing_sections_and_null_ids() -> None:
    assert provenance_section({"recipe": {"a": 1}}, "recipe") == {"a": 1}
    assert provenance_section({"recipe": "a"}, "recipe") == provenance_section({}, "recipe") == {}
    assert non_null_ids(pa.chunked_array([["a", None, "b"]])).to_pylist() == ["a", "b"]
    assert np.isinf(BOUNDS["rank"][1])
