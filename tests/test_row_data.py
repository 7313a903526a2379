"""Tests of the columns of large data: they hold what Samples and EncodedSamples hold, whatever the parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.columns import SPLITS
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import Samples, read_samples
from mmaudit.audit.engine.plan import PartsConfig, plan_parts
from mmaudit.audit.engine.row_data import EncodedData, RowData, read_row_table, read_status_table
from mmaudit.audit.engine.selection import (
    fingerprint,
    number_by_occurrence,
    quarantined_tables,
    read_selection,
    select,
    selection_record,
    selection_tables,
)
from mmaudit.audit.errors import DatasetError
from mmaudit.audit.features import encoded_samples
from mmaudit.audit.features.encode import EncodeTask, encode_dataset
from mmaudit.audit.features.encoded_samples import EncodedSamples, collect_encoded, select_usable
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.workers import no_progress

N = 60


def columns(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal((N, 9)).astype(np.float32).tolist() for name in ("a", "b")}
    vectors["a"][5] = None
    vectors["b"][7] = [float("nan")] * 9
    vectors["a"][11], vectors["b"][11] = vectors["a"][10], vectors["b"][10]
    label: list[Any] = [f"class {row % 3}" for row in range(N)]
    label[20] = None
    return {"id": [f"s{row}" for row in range(N)], "label": label, **vectors, **changes}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "numbers": ({"label": [None if row == 9 else row % 4 for row in range(N)]}, {}),
    "names": ({"label": [row % 2 for row in range(N)], "label_name": [f"n{row % 2}" for row in range(N)]}, {}),
    "classes": ({}, {"classes": ("class 0", "class 2")}),
    "split": ({"split": [["Train", "val", "TEST"][row % 3] for row in range(N)]}, {}),
    "group": ({"group": [None if row % 9 == 0 else f"g{row % 7}" for row in range(N)]}, {}),
    "number groups": ({"group": [float(row % 7) for row in range(N)]}, {}),
    "row numbers": ({}, {"id": "none"}),
    "regression": ({"label": [None if row == 3 else row / 7 for row in range(N)]}, {"task": "regression"}),
    "label sets": ({"label": [["x"], ["x", "y"], []] * (N // 3)}, {"task": "multilabel"}),
}


def open_case(name: str, folder: Path) -> Dataset:
    changes, config = CASES[name]
    pq.write_table(pa.table(columns(**changes)), folder / "d.parquet", row_group_size=13)
    return open_dataset(folder / "d.parquet", DataConfig(modality=("a=a", "b=b"), **config))


def both(dataset: Dataset, folder: Path, *, part_rows: int) -> tuple[EncodedSamples, EncodedData]:
    """Read a dataset as samples, and as columns of parts."""
    samples = read_samples(dataset, seed=3, test_fraction=0.2)
    tasks = encode_dataset(dataset, folder, media=MediaConfig(), num_workers=0, progress=no_progress)
    return collect_encoded(dataset, samples, tasks), encoded_data(dataset, tasks, part_rows=part_rows)


def encoded_data(dataset: Dataset, tasks: list[EncodeTask], *, part_rows: int) -> EncodedData:
    parts = plan_parts(dataset.shards, config=PartsConfig(rows=part_rows), depends_on=()).parts
    rows = [
        read_row_table(dataset, dataset.shards[part.first_shard : part.end_shard], seed=3, repeats=2) for part in parts
    ]
    statuses = [
        read_status_table(dataset, tasks[part.first_shard : part.end_shard], table)
        for part, table in zip(parts, rows, strict=True)
    ]
    data = RowData.of(dataset, rows.__getitem__, num_parts=len(parts), seed=3, test_fraction=0.2)
    return EncodedData(samples=data, tasks=tuple(tasks), read_status=statuses.__getitem__)


@pytest.mark.parametrize("part_rows", [1, 100])
@pytest.mark.parametrize("name", CASES)
def test_columns_are_those_of_samples(name: str, part_rows: int, tmp_path: Path) -> None:
    encoded, columnar = both(open_case(name, tmp_path), tmp_path / "f", part_rows=part_rows)
    samples, data = encoded.samples, columnar.samples
    assert isinstance(samples, Samples)
    assert data.ids_of(np.arange(N)).tolist() == samples.sample_id.tolist()
    np.testing.assert_array_equal(data.label, samples.label)
    assert (data.class_names, data.outputs, data.unknown) == (samples.class_names, samples.outputs, samples.unknown)
    assert [SPLITS[code] for code in data.split.tolist()] == samples.split.tolist()
    groups = None if data.group is None else [data.group_names[code] for code in data.group.tolist()]
    assert groups == (None if samples.group is None else samples.group.tolist())
    first, second = (
        np.zeros(0) if target.values is None else target.values for target in (data.target, samples.target)
    )
    np.testing.assert_array_equal(first, second)
    if samples.group is None:
        own, expected_hashes = (rows.hash_ids(seed=3, purpose="fold 1") for rows in (data, samples))
        np.testing.assert_array_equal(own, expected_hashes)
    np.testing.assert_array_equal(columnar.usable, encoded.usable)
    np.testing.assert_array_equal(columnar.missing, encoded.missing)
    for number in (0, 1):
        np.testing.assert_array_equal(columnar.content_word(number), encoded.content_word(number))
    assert fingerprint(columnar) == encoded.fingerprint
    for keep in (False, True):
        rows, left_out = select_usable(columnar, keep_duplicates=keep)
        expected_rows, expected = select_usable(encoded, keep_duplicates=keep)
        assert rows.tolist() == expected_rows.tolist()
        assert left_out == expected


def test_selection_is_written_and_read(tmp_path: Path) -> None:
    for name in ("plain", "group", "regression"):
        columnar = both(open_case(name, tmp_path), tmp_path / name, part_rows=20)[1]
        selection = select(columnar, probe=ProbeConfig(folds=2, repeats=2), seed=3, keep_duplicates=False)
        quarantined = pa.concat_tables(quarantined_tables(selection))
        again = read_selection(*selection_tables(selection), quarantined, selection_record(selection))
        for field in selection.__dataclass_fields__:
            if field not in ("target", "cross_fits", "order"):
                np.testing.assert_array_equal(getattr(again, field), getattr(selection, field))
        for first, second in zip(again.cross_fits, selection.cross_fits, strict=True):
            for field in ("fold", "inner", "fits", "key"):
                np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
        np.testing.assert_array_equal(again.target.label, selection.target.label)
        np.testing.assert_array_equal(again.dataset_order, np.argsort(selection.row))
        assert again.dataset_order is again.order
        pairs = [(getattr(again, field), getattr(selection, field)) for field in ("row", "usable_bits", "split")]
        pairs.append((again.cross_fits[0].fits, selection.cross_fits[0].fits))
        if selection.target.values is not None:
            np.testing.assert_array_equal(again.target.values, selection.target.values)
            pairs.append((again.target.values, selection.target.values))
        assert all(np.shares_memory(*pair) for pair in pairs)  # without copies
        counted = sorted([*selection.row.tolist(), *(int(entry.sample_id[1:]) for entry in selection.quarantined)])
        assert counted == list(range(N))


def test_part_reads_its_own_samples_only(tmp_path: Path) -> None:
    columnar = both(open_case("plain", tmp_path), tmp_path / "plain", part_rows=20)[1]
    selection = select(columnar, probe=ProbeConfig(folds=2, repeats=2), seed=3, keep_duplicates=False)
    read: list[int] = []

    class Rows(list[int]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    counted: Any = {"row": Rows(selection.row.tolist()), "order": selection.dataset_order}
    for first in (0, 3, 40, N - 7, N):
        expected = np.flatnonzero((selection.row >= first) & (selection.row < first + 20))
        np.testing.assert_array_equal(selection.samples_in(first, 20), expected)
        read.clear()
        np.testing.assert_array_equal(replace(selection, **counted).samples_in(first, 20), expected)
        assert len(read) <= 2 * np.ceil(np.log2(len(selection) + 1))


def test_groups_are_numbered_by_occurrence() -> None:
    assert number_by_occurrence(np.array([7, 2, 7, 0], np.int32)).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("ids", "message"), [(["s1"] * 2, "1 ids are repeated in id"), ([None, "x"], "1 rows without")]
)
def test_ids_are_checked_over_all_parts(ids: list[Any], message: str, tmp_path: Path) -> None:
    names = [*ids[:1], *(f"n{row}" for row in range(N - 2)), *ids[1:]]
    pq.write_table(pa.table(columns(id=names)), tmp_path / "d.parquet", row_group_size=13)
    dataset = open_dataset(tmp_path / "d.parquet", DataConfig(modality=("a=a", "b=b")))
    tables = [read_row_table(dataset, [shard], seed=0, repeats=1) for shard in dataset.shards]
    with pytest.raises(DatasetError, match=message):
        RowData.of(dataset, tables.__getitem__, num_parts=len(tables), seed=0, test_fraction=0.2)


def test_fingerprint_of_many_rows_does_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {number}".encode() for number in range(50)]
    few = encoded_samples.fingerprint_of(rows, num_rows=50)
    monkeypatch.setattr(encoded_samples, "SORTED_ROWS", 49)
    many = encoded_samples.fingerprint_of(rows, num_rows=50)
    assert many == encoded_samples.fingerprint_of(reversed(rows), num_rows=50) != few
    assert many != encoded_samples.fingerprint_of([*rows[1:], b"another"], num_rows=50)
    assert len(many) == len(few) == 32
