"""Tests of the stage select on many rows: at most 40 bytes a row, and the arrays of a plain selection."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mmaudit.audit import row_arrays
from mmaudit.audit.dataset.columns import SPLITS
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.engine.row_data import ORDER_PURPOSE, EncodedData, RowData
from mmaudit.audit.engine.run_state import Folds, tables_of_contents, tables_of_keys
from mmaudit.audit.engine.selection import (
    ChosenRows,
    Selection,
    choose_rows,
    describe_chosen,
    fingerprint,
    selection_tables,
)
from mmaudit.audit.errors import Reason
from mmaudit.audit.features import encoded_samples
from mmaudit.audit.features.encode import EncodeTask, read_arrow, write_arrow
from mmaudit.audit.hashing import digest, hash_rank
from mmaudit.audit.probes import folds
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.folds import fold_purposes

PART_ROWS, WIDTH, FOLDS, REPEATS = 1_000, 9, 5, 3
CONFIG = ProbeConfig(folds=FOLDS, repeats=REPEATS)


@dataclass(frozen=True)
class Case:
    """Columns of n rows."""

    label: Callable[[np.random.Generator, int], list[Any]] = lambda rng, n: [f"c{i}" for i in rng.integers(0, 9, n)]
    group: Callable[[np.random.Generator, int], list[str]] | None = None
    task: str = "classification"
    split: bool = True
    copies: float = 0.0  # share of rows whose content is that of another
    modalities: str = "ab"
    unlabelled: bool = False


def label_sets(rng: np.random.Generator, n: int) -> list[Any]:
    drawn = rng.random((n, 20)) < 0.1
    return [[f"l{j}" for j in np.flatnonzero(row)] for row in drawn]


CASES = {
    "classes": Case(),
    "cut test split": Case(split=False),
    "numbered classes": Case(label=lambda rng, n: rng.integers(0, 300, n).tolist()),
    "groups": Case(group=lambda rng, n: [f"g{i}" for i in rng.integers(0, 50, n)], split=False),
    "copies": Case(copies=0.9),
    "label sets": Case(label=label_sets, task="multilabel"),
    "sets as texts": Case(
        label=lambda rng, n: [f"x{i % 7}|y{i % 3}" for i in rng.integers(0, 99, n)], task="multilabel"
    ),
    "regression": Case(label=lambda rng, n: rng.standard_normal(n).tolist(), task="regression", split=False),
    "regression with groups": Case(
        label=lambda rng, n: rng.standard_normal(n).tolist(),
        task="regression",
        group=lambda rng, n: [f"g{i}" for i in rng.integers(0, 50, n)],
    ),
    "regression with groups, nine modalities": Case(
        label=lambda rng, n: rng.standard_normal(n).tolist(),
        task="regression",
        group=lambda rng, n: [f"g{i}" for i in rng.integers(0, 50, n)],
        modalities="abcdefghi",
    ),
    "unlabelled": Case(unlabelled=True),
    "many groups": Case(group=lambda rng, n: [f"g{i}" for i in rng.integers(0, n, n)], split=False),
}


@dataclass(frozen=True)
class Stored:
    """Row tables and status tables of parts as files, and the cache files of their shards."""

    dataset: Dataset
    rows: list[Path]
    statuses: list[Path]
    tasks: tuple[EncodeTask, ...]

    def row_data(self) -> RowData:
        return RowData.of(
            self.dataset,
            lambda part: read_arrow(self.rows[part]),
            num_parts=len(self.rows),
            seed=0,
            test_fraction=0.2,
        )

    def encoded(self, data: RowData) -> EncodedData:
        return EncodedData(samples=data, tasks=self.tasks, read_status=lambda part: read_arrow(self.statuses[part]))


def store(case: Case, folder: Path, num_rows: int, *, seed: int = 0) -> Stored:
    """Write the tables of rows, with drawn hashes; of copies also the cache files, of which 1% are not usable."""
    rng = np.random.default_rng(seed)
    vectors = [[0.5] * WIDTH] * 3
    columns: dict[str, Any] = {"id": ["a", "b", "c"], "label": case.label(rng, 3)}
    columns |= dict.fromkeys(case.modalities, vectors)
    columns |= {"group": ["x", "y", "z"]} if case.group else {}
    columns |= {"split": ["train"] * 3} if case.split else {}
    pq.write_table(pa.table(columns), folder / "d.parquet")
    settings: dict[str, Any] = {"group": "group"} if case.group else {}
    dataset = open_dataset(
        folder / "d.parquet",
        DataConfig(modality=tuple(f"{name}={name}" for name in case.modalities), task=case.task, **settings),
    )
    label = case.label(rng, num_rows)
    if case.unlabelled:
        label = [None if i % 2 else value for i, value in enumerate(label)]
    purposes = [ORDER_PURPOSE, "test split"] + [name for repeat in range(REPEATS) for name in fold_purposes(repeat)]
    table: dict[str, Any] = {"id": [f"s{i:07d}" for i in range(num_rows)]}
    table |= {f"hash {name}": rng.integers(0, 2**64, num_rows, dtype=np.uint64) for name in purposes}
    texts = {"label": label}
    texts |= {"group": case.group(rng, num_rows)} if case.group else {}
    texts |= {"split": [SPLITS[i] for i in rng.integers(0, 2, num_rows)]} if case.split else {}
    table |= {name: pa.array(values) for name, values in texts.items()}
    content = np.arange(num_rows)
    copied = rng.random(num_rows) < case.copies
    content[copied] = rng.integers(0, num_rows, int(copied.sum()))
    words = np.random.default_rng(7).integers(0, 2**64, (2, num_rows), dtype=np.uint64)[:, content]
    usable = rng.random((len(case.modalities), num_rows)) < (0.99 if case.copies else 1.0)
    status = {"high": words[0], "low": words[1]}
    for name, mask in zip(case.modalities, usable, strict=True):
        status |= {f"usable {name}": mask, f"missing {name}": ~mask & (np.arange(num_rows) % 2 == 0)}
    parts = range(0, num_rows, PART_ROWS)
    paths = [folder / f"{start}.arrow" for start in parts]
    statuses = [folder / f"{start}-status.arrow" for start in parts]
    for start, rows_path, status_path in zip(parts, paths, statuses, strict=True):
        part = pa.table(table).slice(start, PART_ROWS)
        for name in texts:
            if pa.types.is_string(part[name].type):
                part = part.set_column(part.column_names.index(name), name, part[name].dictionary_encode())
        write_arrow(part.combine_chunks(), rows_path)
        write_arrow(pa.table(status).slice(start, PART_ROWS), status_path)
    tasks = [
        _write_task(folder / f"{start}", words[0, start : start + PART_ROWS], usable[:, start : start + PART_ROWS])
        for start in (parts if case.copies else ())
    ]
    return Stored(dataset, paths, statuses, tuple(tasks))


def _write_task(folder: Path, words: NDArray[np.uint64], usable: NDArray[np.bool_]) -> EncodeTask:
    """Write the cache files of a shard, whose vectors are distinctive."""
    folder.mkdir()
    numbers = words[:, None] * np.arange(1, 2 * WIDTH, 2, dtype=np.uint64)  # equal where the contents are
    for name, mask in zip("ab", usable, strict=True):
        contents = b"".join((f"{word:016x}" * 2).encode() for word in words.tolist())
        rows = [row if is_usable else None for row, is_usable in zip(numbers.tolist(), mask.tolist(), strict=True)]
        vectors = pa.array(rows, pa.list_(pa.uint64())).cast(pa.list_(pa.float32()), safe=False)
        nulls = pa.array([None if is_usable else Reason.CORRUPT.value for is_usable in mask.tolist()], pa.string())
        content = pa.Array.from_buffers(pa.binary(32), len(words), [None, pa.py_buffer(contents)])
        table = pa.table({"content": content, "reason": nulls, "detail": nulls, "vector": vectors})
        write_arrow(table, folder / f"{name}.arrow")
    shard = SimpleNamespace(num_rows=len(words), first=int(folder.name))
    files = {name: folder / f"{name}.arrow" for name in "ab"}
    return cast("EncodeTask", SimpleNamespace(file=lambda modality: files[modality.name], shard=shard))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Leave free lists filled, which a collection empties: tuples that Python keeps for reuse take half a megabyte."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def small_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what does not grow with the rows be small, as it is beside 10^8 rows."""
    monkeypatch.setattr(row_arrays, "CHUNK_ROWS", PART_ROWS)
    monkeypatch.setattr(row_arrays, "_MIN_PIECE", 1_000)
    monkeypatch.setattr(encoded_samples, "SORTED_ROWS", 1_000)
    monkeypatch.setattr(folds, "_CELLS", 4_000)


def run_select(stored: Stored) -> tuple[ChosenRows, Selection, int, int]:
    """Run the stage; return what was chosen, and how many rows the tables of contents and keys have."""
    data = stored.row_data()
    encoded = stored.encoded(data)
    chosen = choose_rows(encoded, probe=CONFIG, seed=0, keep_duplicates=False)
    num_contents = sum(table.num_rows for table in tables_of_contents(encoded, chosen))
    num_keys = sum(table.num_rows for table in tables_of_keys(data, chosen))
    selection = describe_chosen(encoded, chosen)
    del data, encoded
    selection_tables(selection)  # as the stage fit writes them
    return chosen, selection, num_contents, num_keys


def peak_of_select(stored: Stored) -> int:
    """Return the largest number of bytes that numpy, Python and Arrow hold at once for the stage."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        run_select(stored)
        return int(tracemalloc.get_traced_memory()[1] + pool.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)


QUICK = ("classes", "groups", "label sets", "regression with groups, nine modalities")


@pytest.mark.usefixtures("small_constants", "no_collection")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_select_holds_at_most_40_bytes_a_row(name: str, tmp_path: Path) -> None:
    sizes = (3_000, 9_000)
    stored = []
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        stored.append(store(CASES[name], tmp_path / str(size), size))
    run_select(stored[1])  # imports, and what Python interns and keeps for reuse
    peaks = [peak_of_select(rows) for rows in stored]
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) <= 40


def plain_folds(
    keys: NDArray[np.uint64], label: NDArray[np.int32], fits: NDArray[np.bool_], num_folds: int
) -> NDArray[np.intp]:
    """Assign samples to folds in turn, class by class, training samples first, from sorted columns."""
    order = np.lexsort((keys, ~fits, label))
    size, num_training = np.bincount(label), np.bincount(label[fits], minlength=int(label.max()) + 1)
    position = np.arange(len(label)) - (np.cumsum(size) - size)[label[order]]
    fold = np.empty(len(label), np.intp)
    fold[order] = ((np.cumsum(num_training) - num_training)[label[order]] + position) % num_folds
    return fold


def plain_group_folds(
    keys: NDArray[np.uint64], group: NDArray[np.intp], label: NDArray[np.int32], num_folds: int
) -> NDArray[np.intp]:
    """Assign groups to folds greedily, the largest first, from a table of their classes; all rows are trained on."""
    counts = np.zeros((len(keys), int(label.max()) + 1))
    np.add.at(counts, (group, label), 1)
    share = 1.0 / np.maximum(counts.sum(axis=0), 1)
    fold, fold_counts = np.empty(len(keys), np.intp), np.zeros((num_folds, counts.shape[1]))
    for number in np.lexsort((keys, -counts.sum(axis=1))):
        cost = (fold_counts * counts[number] * share**2).sum(axis=1)
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        fold[number] = best[np.argmin(fold_counts[best].sum(axis=1))]
        fold_counts[fold[number]] += counts[number]
    return fold[group]


def whole(paths: list[Path]) -> pa.Table:
    return pa.concat_tables([read_arrow(path) for path in paths]).unify_dictionaries().combine_chunks()


@pytest.mark.usefixtures("small_constants")
@pytest.mark.parametrize("name", CASES)
def test_selection_is_that_of_sorted_columns(name: str, tmp_path: Path) -> None:
    """All columns in memory, sorted and indexed by numpy at once; every row may be trained on."""
    case = CASES[name]
    stored = store(case, tmp_path, 5_000)
    data = stored.row_data()
    encoded = stored.encoded(data)
    chosen = choose_rows(encoded, probe=CONFIG, seed=0, keep_duplicates=False)
    selection = describe_chosen(encoded, chosen)
    rows, status = whole(stored.rows), whole(stored.statuses)
    label = np.array(data.label)
    if case.task == "classification":
        texts = rows["label"].to_pylist()
        expected = [None if number < 0 else data.class_names[number] for number in label.tolist()]
        assert expected == [None if text is None else str(text) for text in texts]
    usable, missing = (
        np.stack([status[f"{kind} {modality}"].to_numpy() for modality in case.modalities], axis=1)
        for kind in ("usable", "missing")
    )
    is_scored = (label >= 0) & (usable | missing).all(axis=1) & (usable.sum(axis=1) > 1)
    ids = np.array(rows["id"].to_pylist(), dtype=object)
    words = status["high"].to_numpy()
    original: dict[int, int] = {}
    for row in np.flatnonzero(is_scored)[np.argsort(ids[is_scored])].tolist():
        is_scored[row] = original.setdefault(int(words[row]), row) == row
    row = np.flatnonzero(is_scored)
    row = row[np.argsort(rows[f"hash {ORDER_PURPOSE}"].to_numpy()[row], kind="stable")]
    np.testing.assert_array_equal(selection.row, row)
    assert selection.row.dtype == np.int32
    np.testing.assert_array_equal(selection.label, label[row])
    np.testing.assert_array_equal(selection.split, data.split[row])
    for index, column in enumerate(usable.T):
        np.testing.assert_array_equal(selection.has_modality(index), column)
    if data.labels.values is not None:
        assert selection.target.values is not None
        np.testing.assert_array_equal(np.asarray(selection.target.values), np.asarray(data.labels.values)[row])
    groups = None
    group_names: tuple[str, ...] = ()
    if data.group is not None:
        names = np.array(rows["group"].to_pylist())
        group_names = data.group_names  # read anew at each access
        np.testing.assert_array_equal(np.array(group_names)[data.group], names)
        groups, group = np.unique(data.group[row], return_inverse=True)
    for repeat, cross_fit in enumerate(selection.cross_fits):
        for purpose, fold in zip(fold_purposes(repeat), (cross_fit.fold, cross_fit.inner), strict=True):
            if groups is None:
                keys = rows[f"hash {purpose}"].to_numpy()[row]
                plain = plain_folds(keys, selection.target.label, np.ones(len(row), bool), FOLDS)
            else:
                keys = hash_rank(np.array(group_names)[groups].tolist(), seed=0, purpose=purpose)
                plain = plain_group_folds(keys, group, selection.target.label, FOLDS)
            np.testing.assert_array_equal(fold, plain)
    _check_others(selection, ids, label, original, words)
    _check_tables(selection, data, encoded, rows, words)


def _check_others(
    selection: Selection,
    ids: NDArray[np.object_],
    label: NDArray[np.int32],
    original: dict[int, int],
    words: NDArray[np.uint64],
) -> None:
    """Compare the samples that are not scored with those that a loop over all rows finds."""
    scored = set(selection.row.tolist())
    expected: dict[str, str] = {}
    for row in range(len(ids)):
        if row in scored:
            continue
        if label[row] < 0:
            expected[ids[row]] = "the label is null"
        elif (first := original.get(int(words[row]))) is not None:
            note = "" if label[row] == label[first] else ", which has another label"
            expected[ids[row]] = f"the same content as {ids[first]}{note}"
    entries = list(selection.quarantined)
    assert [entry.sample_id for entry in entries] == sorted(entry.sample_id for entry in entries)
    copies = {entry.sample_id: entry.detail for entry in entries if entry.reason is not Reason.CORRUPT}
    unusable = {entry.sample_id for entry in entries if entry.reason is Reason.CORRUPT}
    assert copies == {name: detail for name, detail in expected.items() if name in copies or name not in unusable}
    assert {*copies, *unusable} == {ids[row] for row in range(len(ids)) if row not in scored}


def _check_tables(
    selection: Selection, data: RowData, encoded: EncodedData, rows: pa.Table, words: NDArray[np.uint64]
) -> None:
    """Compare the folds that a run keeps, of contents and of ids or groups, with dictionaries of them."""
    fold_of_row = {
        row: [int(folds.fold[position]) for folds in selection.cross_fits]
        for position, row in enumerate(selection.row.tolist())
    }
    contents = Folds.from_table(pa.concat_tables(tables_of_contents(encoded, selection)))
    assert contents.fold.dtype == np.int16
    assert dict(zip(contents.hash.tolist(), contents.fold.T.tolist(), strict=True)) == {
        int(words[row]): folds for row, folds in fold_of_row.items()
    }
    assert (np.diff(contents.hash) > 0).all()
    keys = Folds.from_table(pa.concat_tables(tables_of_keys(data, selection)))
    if data.group is None:
        hashes = rows[f"hash {ORDER_PURPOSE}"].to_numpy()
    else:
        hashes = hash_rank(rows["group"].to_pylist(), seed=0, purpose=ORDER_PURPOSE)
    expected = {int(value): [-1] * REPEATS for value in hashes}
    expected |= {int(hashes[row]): folds for row, folds in fold_of_row.items()}
    assert dict(zip(keys.hash.tolist(), keys.fold.T.tolist(), strict=True)) == expected
    if keys.split is not None:
        splits = dict(zip(hashes.tolist(), data.split.tolist(), strict=True))
        assert dict(zip(keys.hash.tolist(), keys.split.tolist(), strict=True)) == splits
    assert (np.diff(keys.hash) > 0).all()


@pytest.mark.usefixtures("small_constants")
def test_fingerprint_reads_each_part_once(tmp_path: Path) -> None:
    stored = store(CASES["groups"], tmp_path, 9_000)
    data, reads = stored.row_data(), list[int]()

    def read(part: int) -> pa.Table:
        reads.append(part)
        return read_arrow(stored.rows[part])

    counted = replace(data, read_rows=read)
    value = fingerprint(stored.encoded(counted))
    assert reads == list(range(len(stored.rows)))
    rows, status = whole(stored.rows), whole(stored.statuses)
    total = 0
    for name, label, split, group, high, low in zip(
        rows["id"].to_pylist(),
        rows["label"].to_pylist(),
        data.split.tolist(),
        rows["group"].to_pylist(),
        status["high"].to_pylist(),
        status["low"].to_pylist(),
        strict=True,
    ):
        total += int(digest("\0".join((name, label, SPLITS[split], group, f"{high:016x}{low:016x}")).encode()), 16)
    assert value == f"{total % 2**128:032x}"
