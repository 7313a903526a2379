"""Tests of selection: each cell keeps its first rows by hash, as a full sort does, and ranks count kept rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ManifestError, ScoreError
from mmaudit.audit.hashing import hash_ids
from mmaudit.rebalance import score_files as score_files_py
from mmaudit.rebalance import score_tables
from mmaudit.rebalance import selection as external_sort
from mmaudit.rebalance import selection as external_sort_module
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreBatch, ScoreFiles, hash_keys, open_scores
from mmaudit.rebalance.selection import RECORD, ExternalSort, RowOutcome, Selection, select_rows, share_total

pytestmark = pytest.mark.usefixtures("quick_scores")

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SomeRule:
    """Rule with a quota per split and class, by hash or its complement; rows whose id ends in 7 have no cell."""

    quota: Counts
    num_classes: int
    by_score: bool = False
    weighs: bool = False
    name: str = "some"
    between: str = "audio:visual"
    reason: str = "out"

    @property
    def num_cells(self) -> int:
        return len(self.quota)

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        ends_in_7 = np.array([name.endswith("7") for name in batch.table["sample_id"].to_pylist()])
        return np.where(ends_in_7, -1, batch.split.astype(np.int32) * self.num_classes + batch.label).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        return self.quota

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        return ~batch.key

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        return hash_outcome


def table(n: int, *, seed: int, start: int = 0, **columns_changed: Any) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "sample_id": [f"s{number:04d}" for number in range(start, start + n)],
        "label": np.r_[np.arange(3), rng.integers(0, 3, n)][:n],
        "split": ["test", *rng.choice(["train", "test"], n)][:n],
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
    }
    return pa.table({**columns, **columns_changed})


def open_table(folder: Path, scores: pa.Table, *, seed: int = 0) -> ScoreFiles:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(scores, folder / "scores.parquet")
    return open_scores(folder / "scores.parquet", seed=seed)


def decide_all(selection: Selection) -> dict[str, NDArray[Any]]:
    """Return the decisions on all rows, in row order."""
    decisions = [(batch, selection.decide(batch)) for batch in selection.scores.batches()]
    return {
        "id": np.concatenate([batch.table["sample_id"].to_pylist() for batch, _ in decisions]),
        "keep": np.concatenate([decision.keep for _, decision in decisions]),
        "rank": np.concatenate([decision.rank for _, decision in decisions]),
        "reason": np.concatenate([decision.reason for _, decision in decisions]),
        "score": np.concatenate([decision.outcome.score for _, decision in decisions]),
        "threshold": np.concatenate([decision.outcome.threshold for _, decision in decisions]),
        "discrepancy": np.concatenate([decision.discrepancy for _, decision in decisions]),
    }


def reference_selection(scores: pa.Table, score_files: ScoreFiles, rule: SomeRule) -> set[str]:
    """Select the first rows of each cell by a full sort of their hashes."""
    keys = hash_ids(scores["sample_id"].combine_chunks(), seed=score_files.seed, purpose="split").tolist()
    cells: dict[int, list[tuple[int, str]]] = {}
    for row, row_key in zip(scores.to_pylist(), keys, strict=True):
        cell = score_files.splits.index(row["split"]) * rule.num_classes + score_files.classes.to_pylist().index(
            row["label"]
        )
        if not row["sample_id"].endswith("7"):
            cells.setdefault(cell, []).append((-row_key if rule.by_score else row_key, row["sample_id"]))
    return {name for cell, rows in cells.items() for _, name in sorted(rows)[: rule.quota[cell]]}


@pytest.mark.parametrize("storage", ["memory", "disk"])
@settings(max_examples=examples(25))
@given(st.integers(3, 80), st.integers(0, 10**6), st.integers(1, 80), st.booleans())
def test_each_cell_keeps_its_first_rows_by_hash(
    tmp_path_factory: pytest.TempPathFactory, storage: str, n: int, seed: int, batch_rows: int, by_score: bool
) -> None:
    folder, scores = tmp_path_factory.mktemp("selection"), table(n, seed=seed)
    score_files = open_table(folder, scores, seed=seed)
    num_classes = len(score_files.classes)
    quota = np.random.default_rng(seed).integers(0, 12, len(score_files.splits) * num_classes)
    quota[0] += 1  # so that a sample is kept
    rule = SomeRule(quota=quota, num_classes=num_classes, by_score=by_score)
    expected = reference_selection(scores, score_files, rule)
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files_py, "BATCH_ROWS", batch_rows)
        patch.setattr(external_sort, "_PART_ROWS", 4 if storage == "disk" else 1 << 18)
        selection = select_rows(score_files, rule, scratch=folder / "scratch")
        decisions = decide_all(selection)
    assert set(decisions["id"][decisions["keep"]]) == expected
    assert selection.quota.sum() == len(expected)
    assert not (folder / "scratch").exists() or not any((folder / "scratch").iterdir())
    ends_in_7 = np.array([name.endswith("7") for name in decisions["id"]])
    assert [selection.reasons[reason] for reason in decisions["reason"][ends_in_7]] == [
        "missing-modality"
    ] * ends_in_7.sum()
    assert set(decisions["reason"][~ends_in_7].tolist()) <= {0}
    assert np.isnan(decisions["score"][ends_in_7]).all()
    assert np.isnan(decisions["threshold"][ends_in_7]).all()
    low = decisions["keep"][~ends_in_7] <= (decisions["score"][~ends_in_7] <= decisions["threshold"][~ends_in_7])
    high = ~decisions["keep"][~ends_in_7] <= (decisions["score"][~ends_in_7] >= decisions["threshold"][~ends_in_7])
    assert (low & high).all()
    assert decisions["discrepancy"].tolist() == [
        float(a - b)
        for a, b in zip(scores["confidence_audio"].to_numpy(), scores["confidence_visual"].to_numpy(), strict=True)
    ]


@settings(max_examples=examples(25))
@given(st.integers(3, 60), st.integers(0, 10**6), st.sampled_from(["balance", "holes", "ends", "gap"]))
def test_rank_counts_more_balanced_kept_rows(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    balance = rng.uniform(-1, 1, n).astype(np.float32)
    if kind == "ends":  # the last is a rounding error above 1, as balanced as 1
        balance = rng.choice(np.array([-1, 0, 0.25, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32), n)
    holes = rng.random(n) < 0.3 if kind == "holes" else np.zeros(n, bool)
    holes[0] = False
    columns = {} if kind == "gap" else {"balance": pa.array(balance, mask=holes)}
    scores = table(n, seed=seed, **columns)
    score_files = open_table(tmp_path_factory.mktemp("rank"), scores)
    quota = np.full(len(score_files.splits) * len(score_files.classes), 5)
    decisions = decide_all(
        select_rows(score_files, SomeRule(quota=quota, num_classes=len(score_files.classes)), scratch=Path("unused"))
    )
    if kind == "gap":
        value = 1 - np.abs(decisions["discrepancy"].astype(np.float64))
    else:
        # A missing value counts as least balanced.
        value = np.where(holes, -1, np.minimum(balance.astype(np.float64), 1))
    step = 3 * 2.0**-20  # steps of 2 / 2^20, and float32 rounding
    kept_values = value[decisions["keep"]]
    for rank, value_of_row in zip(decisions["rank"][decisions["keep"]], kept_values, strict=True):
        assert (kept_values > value_of_row + step).sum() <= rank <= (kept_values > value_of_row).sum()
    if kind == "ends":
        assert decisions["rank"][decisions["keep"]].tolist() == [
            int((kept_values > value_of_row).sum()) for value_of_row in kept_values
        ]


def test_decision_on_a_row_is_independent_of_others(tmp_path: Path) -> None:
    score_files = open_table(tmp_path, table(60, seed=0))
    selection = select_rows(score_files, SomeRule(quota=np.full(6, 4), num_classes=3), scratch=tmp_path)
    (batch,) = score_files.batches()
    decision = selection.decide(batch)
    for row in range(60):
        single = ScoreBatch(
            table=batch.table.slice(row, 1),
            key=batch.key[row : row + 1],
            label=batch.label[row : row + 1],
            split=batch.split[row : row + 1],
            confidence=batch.confidence[row : row + 1],
            excluded_by=batch.excluded_by[row : row + 1],
            modalities=batch.modalities,
        )
        single_decision = selection.decide(single)
        assert (single_decision.keep[0], single_decision.rank[0], single_decision.reason[0]) == (
            decision.keep[row],
            decision.rank[row],
            decision.reason[row],
        )


def test_quota_above_count_keeps_all_and_zero_keeps_none(tmp_path: Path) -> None:
    score_files = open_table(tmp_path, table(40, seed=0))
    selection = select_rows(
        score_files, SomeRule(quota=np.array([1_000, 0, 0, 0, 0, 1_000]), num_classes=3), scratch=tmp_path
    )
    decisions = decide_all(selection)
    assert selection.quota.tolist() == [selection.counts[0], 0, 0, 0, 0, selection.counts[5]]
    assert decisions["keep"].sum() == selection.counts[0] + selection.counts[5]


def test_excluded_rows_have_no_cell_and_name_the_manifest(tmp_path: Path) -> None:
    scores = table(40, seed=0)
    score_files = open_table(tmp_path, scores)
    included_ids = pa.chunked_array([scores["sample_id"].combine_chunks().slice(0, 20)])
    excluded_ids = pa.chunked_array([scores["sample_id"].combine_chunks().slice(0, 5)])
    members = (
        ManifestMembers(name="a", keys=np.sort(hash_keys(included_ids, seed=0)), include=True),
        ManifestMembers(name="b", keys=np.sort(hash_keys(excluded_ids, seed=0)), include=False),
    )
    score_files = ScoreFiles(
        **{name: getattr(score_files, name) for name in ScoreFiles.__slots__ if name != "members"}, members=members
    )
    selection = select_rows(score_files, SomeRule(quota=np.full(6, 1_000), num_classes=3), scratch=tmp_path)
    decisions = decide_all(selection)
    reasons = [selection.reasons[number] for number in decisions["reason"]]
    assert reasons[:5] == ["in-b"] * 5
    assert reasons[20:] == ["not-in-a"] * 20
    assert decisions["keep"].tolist() == [5 <= number < 20 and number % 10 != 7 for number in range(40)]
    assert np.isnan(decisions["score"][20:]).all()
    assert selection.counts.sum() == 13  # two of fifteen end in 7


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_repeated_id_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    if storage == "disk":
        monkeypatch.setattr(external_sort, "_PART_ROWS", 4)
    rule = SomeRule(quota=np.full(6, 4), num_classes=3)
    repeated = table(6, seed=0, sample_id=["d", "b", "b", "a", "a", "a"])
    with pytest.raises(ScoreError, match=r"3 ids occur more than once in the score table \(the first: a\)"):
        select_rows(open_table(tmp_path / "a", repeated), rule, scratch=tmp_path / "scratch")
    (tmp_path / "b").mkdir()
    pq.write_table(table(20, seed=0), tmp_path / "b" / "0.parquet")
    pq.write_table(table(20, seed=1, start=18), tmp_path / "b" / "1.parquet")
    with pytest.raises(ScoreError, match=r"2 ids occur more than once in the score table \(the first: s0018\)"):
        select_rows(open_scores(tmp_path / "b", seed=0), rule, scratch=tmp_path / "scratch")
    assert storage == "memory" or not any((tmp_path / "scratch").iterdir())


def test_hash_collision_is_no_repeated_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_tables, "hash_keys", lambda ids, *, seed: np.zeros(len(ids), dtype=np.uint64))
    score_files = open_table(tmp_path, table(20, seed=0))
    decisions = decide_all(select_rows(score_files, SomeRule(quota=np.full(6, 100), num_classes=3), scratch=tmp_path))
    assert decisions["keep"].sum() == 18


def test_empty_selection_raises(tmp_path: Path) -> None:
    score_files = open_table(tmp_path, table(40, seed=0))
    with pytest.raises(ManifestError, match="some: none of the 40 scored samples qualifies; relax the rule"):
        select_rows(score_files, SomeRule(quota=np.zeros(6, int), num_classes=3), scratch=tmp_path)


def test_scratch_folder_is_emptied_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "_PART_ROWS", 4)
    monkeypatch.setattr(score_files_py, "BATCH_ROWS", 10)
    bad = np.where(np.arange(40) == 35, 2.0, 0.5).astype(np.float32)
    score_files = open_table(tmp_path, table(40, seed=0, confidence_audio=bad))
    with pytest.raises(ScoreError, match="confidence_audio of sample s0035 is 2"):
        select_rows(score_files, SomeRule(quota=np.full(6, 4), num_classes=3), scratch=tmp_path / "scratch")
    assert not any((tmp_path / "scratch").iterdir())


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=6).map(np.array).filter(np.any), st.data())
def test_share_total_is_proportional(counts: Counts, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, int(counts.sum())))
    shares = share_total(total, counts)
    assert shares.sum() == total
    assert (shares <= counts).all()
    assert (np.abs(shares - total * counts / counts.sum()) < 1).all()


# Sorting on disk.

Keys = NDArray[np.uint64]
TOP = np.iinfo(np.uint64).max
QUICK = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["memory", "disk", "disk of few parts"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Storage of the records; parts of 4 rows make many parts in each of these tests."""
    if request.param != "memory":
        monkeypatch.setattr(external_sort_module, "_PART_ROWS", 4)
    if request.param == "disk of few parts":
        monkeypatch.setattr(external_sort_module, "_MAX_PARTS", 2)
    return str(request.param)


def draw_records(n: int, num_cells: int, seed: int) -> tuple[Keys, NDArray[np.int32], NDArray[np.uint32]]:
    """Draw n records, some with equal keys, some in no cell, some with the smallest or largest key."""
    rng = np.random.default_rng(seed)
    key = rng.integers(0, TOP, n, dtype=np.uint64, endpoint=True)
    key[rng.random(n) < 0.1] = 0
    key[rng.random(n) < 0.1] = TOP
    cell = rng.integers(-1, num_cells, n).astype(np.int32)
    return key, cell, rng.integers(0, 1 << 20, n).astype(np.uint32)


def filled_sort(records: tuple[NDArray[np.generic], ...], folder: Path, *, step: int = 7) -> ExternalSort:
    """Return an ExternalSort with the records added in pieces; the caller closes it."""
    n = len(records[0])
    external_sort = ExternalSort(n, folder)
    for first in range(0, n, step):
        external_sort.add(*(array[first : first + step] for array in records))  # type: ignore[arg-type]
    return external_sort


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_parts_hold_all_records_in_key_order(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        for _ in range(2):  # parts can be read repeatedly
            parts = list(external_sort.parts())
            records = np.concatenate(parts)
            assert sorted(records.tolist()) == sorted(zip(key.tolist(), cell.tolist(), imbalance.tolist(), strict=True))
            ends = [(part["key"].min(), part["key"].max()) for part in parts if len(part)]
            assert all(previous[1] < following[0] for previous, following in pairwise(ends))
            external_sort.add(key[:1], cell[:1], imbalance[:1])  # and records added afterwards
            key, cell, imbalance = (np.r_[array, array[:1]] for array in (key, cell, imbalance))
        if storage == "disk" and n >= 16:
            assert len(parts) >= 4


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_repeated_keys_match_numpy(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        keys, counts = np.unique(key, return_counts=True)
        assert external_sort.repeated().tolist() == keys[counts > 1].tolist()


@QUICK
@given(st.integers(0, 90), st.integers(1, 5), st.integers(0, 10**6))
def test_last_keys_match_a_full_sort(tmp_path: Path, storage: str, n: int, num_cells: int, seed: int) -> None:
    key, cell, imbalance = draw_records(n, num_cells, seed)
    rng = np.random.default_rng(seed)
    counts = np.bincount(cell[cell >= 0], minlength=num_cells)
    quota = rng.integers(0, counts + 2)
    counts_by_imbalance = np.zeros(int(imbalance.max(initial=0)) + 1, dtype=np.int64)
    with filled_sort((key, cell, imbalance), tmp_path) as external_sort:
        last_keys = external_sort.last_keys(quota, kept_imbalance=counts_by_imbalance)
        assert last_keys.tolist() == external_sort.last_keys(quota).tolist()
    is_kept = (cell >= 0) & (quota[cell] > 0) & (key <= last_keys[cell])
    assert counts_by_imbalance.tolist() == np.bincount(imbalance[is_kept], minlength=len(counts_by_imbalance)).tolist()
    for cell_index in range(num_cells):
        cell_keys = np.sort(key[cell == cell_index])
        expected = (
            0
            if quota[cell_index] == 0
            else TOP
            if quota[cell_index] > len(cell_keys)
            else cell_keys[quota[cell_index] - 1]
        )
        assert last_keys[cell_index] == expected


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_scratch_folder_is_emptied(tmp_path: Path, storage: str, error: type[Exception] | None) -> None:
    folder = tmp_path / "deep" / "scratch"

    def use() -> None:
        with filled_sort(draw_records(90, 3, 0), folder) as external_sort:
            external_sort.repeated()
            assert storage == "memory" or any(folder.iterdir())
            if error is not None:
                raise error("interrupted")

    if error is None:
        use()
    else:
        with pytest.raises(error, match="interrupted"):
            use()
    assert folder.exists() == (storage != "memory")
    assert storage == "memory" or not any(folder.iterdir())


def test_scratch_size_is_16_bytes_per_record(tmp_path: Path, storage: str) -> None:
    for n in (3, 4, 90):
        with filled_sort(draw_records(n, 3, 0), tmp_path) as external_sort:
            for _ in external_sort.parts():
                pass
            size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert size == (n * RECORD.itemsize if storage != "memory" and n >= 4 else 0)


def test_many_parts_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of open files is 1,024 on most machines, 256 on some; 10^9 rows have 1,024 parts."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(external_sort_module, "_PART_ROWS", 4)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, old[1]))
    try:
        with filled_sort(draw_records(5_000, 3, 0), tmp_path, step=1_000) as external_sort:
            assert len(list(external_sort.parts())) == 1_024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
