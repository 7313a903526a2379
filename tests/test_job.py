"""Tests of the rows of an export: plain values, valid JSON, exact when read back as float32."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.webdataset import ExportJob, plain_rows, split_name


def job_of(path: Path, table: pa.Table) -> ExportJob:
    pq.write_table(table, path)
    return ExportJob(
        manifest=path,
        schema=table.schema,
        paths=(),
        provenance={},
        root=None,
        allow_outside=False,
        samples_per_shard=1,
        skip_missing=False,
        clip=None,
    )


def num_digits(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)


@given(st.lists(st.none() | st.floats(width=32), max_size=9))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_floats_are_written_with_shortest_digits(tmp_path: Path, values: list[float | None]) -> None:
    table = pa.table({"gap": pa.array(values, pa.float32()), "score": pa.array(values, pa.float64())})
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in plain_rows(job_of(tmp_path / "m.parquet", table))]
    assert len(rows) == len(values)
    for row, value in zip(rows, values, strict=True):
        if value is None or not math.isfinite(value):
            assert row == {"gap": None, "score": None}
        else:
            assert (np.float32(row["gap"]), row["score"]) == (np.float32(value), value)
            assert num_digits(row["gap"]) <= num_digits(value)


def test_only_requested_columns_are_read(tmp_path: Path) -> None:
    job = job_of(tmp_path / "m.parquet", pa.table({"a": ["x"], "b": [1], "c": [0.5]}))
    assert list(plain_rows(job, "c", "a", "c")) == [{"c": 0.5, "a": "x"}]
    assert list(plain_rows(job)) == [{"a": "x", "b": 1, "c": 0.5}]


def test_split_name_must_be_usable_in_file_names() -> None:
    assert (split_name(None), split_name("train_2")) == ("all", "train_2")
    for name in ("a/b", "", "..", "a b"):
        with pytest.raises(ConfigError, match="is not usable in file names: use letters, digits and _"):
            split_name(name)
