"""Laws of a choice: each cell keeps its first rows by hash, as a slow sort finds them, and ranks count what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.errors import ManifestError, ScoreError
from mmaudit.audit.hashing import hash_ids
from mmaudit.rebalance import external_sort as spill
from mmaudit.rebalance import score_files as parts
from mmaudit.rebalance import score_tables as shards
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreBatch, ScoreFiles, hash_keys, open_scores
from mmaudit.rebalance.selection import RowOutcome, Selection, select_rows

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Some:
    """A rule: so many of each split and class, by hash or by confidence; none of those whose id ends in 7."""

    wanted: Counts
    num_classes: int
    by_score: bool = False
    name: str = "some"
    between: str = "audio:visual"
    reason: str = "out"

    @property
    def num_cells(self) -> int:
        return len(self.wanted)

    def cells(self, rows: ScoreBatch) -> NDArray[np.int32]:
        never = np.array([name.endswith("7") for name in rows.table["sample_id"].to_pylist()])
        return np.where(never, -1, rows.split.astype(np.int32) * self.num_classes + rows.label).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        return self.wanted

    def order(self, rows: ScoreBatch) -> NDArray[np.uint64]:
        return ~rows.key

    def explain(self, rows: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        return chance


def table(n: int, *, seed: int, start: int = 0, **more: Any) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "sample_id": [f"s{one:04d}" for one in range(start, start + n)],
        "label": np.r_[np.arange(3), rng.integers(0, 3, n)][:n],
        "split": ["test", *rng.choice(["train", "test"], n)][:n],
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
    }
    return pa.table({**columns, **more})


def opened(folder: Path, whole: pa.Table, *, seed: int = 0) -> ScoreFiles:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(whole, folder / "scores.parquet")
    return open_scores(folder / "scores.parquet", seed=seed)


def decided(made: Selection) -> dict[str, NDArray[Any]]:
    """Decide about all rows, in their order."""
    each = [(rows, made.decide(rows)) for rows in made.scores.batches()]
    return {
        "id": np.concatenate([rows.table["sample_id"].to_pylist() for rows, _ in each]),
        "keep": np.concatenate([found.keep for _, found in each]),
        "rank": np.concatenate([found.rank for _, found in each]),
        "reason": np.concatenate([found.reason for _, found in each]),
        "score": np.concatenate([found.outcome.score for _, found in each]),
        "threshold": np.concatenate([found.outcome.threshold for _, found in each]),
        "discrepancy": np.concatenate([found.discrepancy for _, found in each]),
    }


def slowly(whole: pa.Table, found: ScoreFiles, rule: Some) -> set[str]:
    """Sort the rows of each cell by their hash and take the first."""
    key = hash_ids(whole["sample_id"].combine_chunks(), seed=found.seed, purpose="split").tolist()
    cells: dict[int, list[tuple[int, str]]] = {}
    for row, one in zip(whole.to_pylist(), key, strict=True):
        place = found.splits.index(row["split"]) * rule.num_classes + found.classes.to_pylist().index(row["label"])
        if not row["sample_id"].endswith("7"):
            cells.setdefault(place, []).append((-one if rule.by_score else one, row["sample_id"]))
    return {name for place, rows in cells.items() for _, name in sorted(rows)[: rule.wanted[place]]}


@pytest.mark.parametrize("where", ["memory", "disk"])
@settings(deadline=None, max_examples=25)
@given(st.integers(3, 80), st.integers(0, 10**6), st.integers(1, 80), st.booleans())
def test_each_cell_keeps_its_first_by_hash(
    tmp_path_factory: pytest.TempPathFactory, where: str, n: int, seed: int, batch: int, by_score: bool
) -> None:
    folder, whole = tmp_path_factory.mktemp("choice"), table(n, seed=seed)
    found = opened(folder, whole, seed=seed)
    k = len(found.classes)
    wanted = np.random.default_rng(seed).integers(0, 12, len(found.splits) * k)
    wanted[0] += 1  # so that a sample is kept
    rule = Some(wanted=wanted, num_classes=k, by_score=by_score)
    expected = slowly(whole, found, rule)
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BATCH_ROWS", batch)
        patch.setattr(spill, "_PART_ROWS", 4 if where == "disk" else 1 << 18)
        made = select_rows(found, rule, scratch=folder / "scratch")
        told = decided(made)
    assert set(told["id"][told["keep"]]) == expected
    assert made.quota.sum() == len(expected)
    assert not (folder / "scratch").exists() or not any((folder / "scratch").iterdir())
    never = np.array([name.endswith("7") for name in told["id"]])
    assert [made.reasons[one] for one in told["reason"][never]] == ["missing-modality"] * never.sum()
    assert set(told["reason"][~never].tolist()) <= {0}
    assert np.isnan(told["score"][never]).all()
    assert np.isnan(told["threshold"][never]).all()
    low = told["keep"][~never] <= (told["score"][~never] <= told["threshold"][~never])
    high = ~told["keep"][~never] <= (told["score"][~never] >= told["threshold"][~never])
    assert (low & high).all()
    assert told["discrepancy"].tolist() == [
        float(a - b)
        for a, b in zip(whole["confidence_audio"].to_numpy(), whole["confidence_visual"].to_numpy(), strict=True)
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 60), st.integers(0, 10**6), st.sampled_from(["balance", "holes", "ends", "gap"]))
def test_the_rank_is_the_number_of_kept_rows_that_are_more_balanced(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    balance = rng.uniform(-1, 1, n).astype(np.float32)
    if kind == "ends":  # the last is a rounding error above 1, and as balanced as can be
        balance = rng.choice(np.array([-1, 0, 0.25, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32), n)
    holes = rng.random(n) < 0.3 if kind == "holes" else np.zeros(n, bool)
    holes[0] = False
    more = {} if kind == "gap" else {"balance": pa.array(balance, mask=holes)}
    whole = table(n, seed=seed, **more)
    found = opened(tmp_path_factory.mktemp("rank"), whole)
    wanted = np.full(len(found.splits) * len(found.classes), 5)
    told = decided(select_rows(found, Some(wanted=wanted, num_classes=len(found.classes)), scratch=Path("unused")))
    if kind == "gap":
        value = 1 - np.abs(told["discrepancy"].astype(np.float64))
    else:
        value = np.where(holes, -1, np.minimum(balance.astype(np.float64), 1))  # unknown: as the least balanced
    step = 3 * 2.0**-20  # steps of 2 / 2^20, and the rounding of float32
    kept = value[told["keep"]]
    for rank, one in zip(told["rank"][told["keep"]], kept, strict=True):
        assert (kept > one + step).sum() <= rank <= (kept > one).sum()
    if kind == "ends":
        assert told["rank"][told["keep"]].tolist() == [int((kept > one).sum()) for one in kept]


def test_what_is_decided_of_a_row_depends_on_no_other(tmp_path: Path) -> None:
    found = opened(tmp_path, table(60, seed=0))
    made = select_rows(found, Some(wanted=np.full(6, 4), num_classes=3), scratch=tmp_path)
    (rows,) = found.batches()
    whole = made.decide(rows)
    for place in range(60):
        one = ScoreBatch(
            table=rows.table.slice(place, 1),
            key=rows.key[place : place + 1],
            label=rows.label[place : place + 1],
            split=rows.split[place : place + 1],
            confidence=rows.confidence[place : place + 1],
            excluded_by=rows.excluded_by[place : place + 1],
            modalities=rows.modalities,
        )
        alone = made.decide(one)
        assert (alone.keep[0], alone.rank[0], alone.reason[0]) == (
            whole.keep[place],
            whole.rank[place],
            whole.reason[place],
        )


def test_more_than_there_is_keeps_all_and_an_empty_cell_none(tmp_path: Path) -> None:
    found = opened(tmp_path, table(40, seed=0))
    made = select_rows(found, Some(wanted=np.array([1_000, 0, 0, 0, 0, 1_000]), num_classes=3), scratch=tmp_path)
    told = decided(made)
    assert made.quota.tolist() == [made.counts[0], 0, 0, 0, 0, made.counts[5]]
    assert told["keep"].sum() == made.counts[0] + made.counts[5]


def test_who_is_barred_is_in_no_cell_and_says_by_whom(tmp_path: Path) -> None:
    whole = table(40, seed=0)
    found = opened(tmp_path, whole)
    here = pa.chunked_array([whole["sample_id"].combine_chunks().slice(0, 20)])
    there = pa.chunked_array([whole["sample_id"].combine_chunks().slice(0, 5)])
    members = (
        ManifestMembers(name="a", keys=np.sort(hash_keys(here, seed=0)), include=True),
        ManifestMembers(name="b", keys=np.sort(hash_keys(there, seed=0)), include=False),
    )
    found = ScoreFiles(
        **{name: getattr(found, name) for name in ScoreFiles.__slots__ if name != "members"}, members=members
    )
    made = select_rows(found, Some(wanted=np.full(6, 1_000), num_classes=3), scratch=tmp_path)
    told = decided(made)
    reasons = [made.reasons[one] for one in told["reason"]]
    assert reasons[:5] == ["in-b"] * 5
    assert reasons[20:] == ["not-in-a"] * 20
    assert told["keep"].tolist() == [5 <= one < 20 and one % 10 != 7 for one in range(40)]
    assert np.isnan(told["score"][20:]).all()
    assert made.counts.sum() == 13  # of fifteen two end in 7


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_id_that_stands_twice_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "disk":
        monkeypatch.setattr(spill, "_PART_ROWS", 4)
    rule = Some(wanted=np.full(6, 4), num_classes=3)
    within = table(6, seed=0, sample_id=["d", "b", "b", "a", "a", "a"])
    with pytest.raises(ScoreError, match=r"3 ids occur more than once in the score table \(the first: a\)"):
        select_rows(opened(tmp_path / "a", within), rule, scratch=tmp_path / "scratch")
    (tmp_path / "b").mkdir()
    pq.write_table(table(20, seed=0), tmp_path / "b" / "0.parquet")
    pq.write_table(table(20, seed=1, start=18), tmp_path / "b" / "1.parquet")
    with pytest.raises(ScoreError, match=r"2 ids occur more than once in the score table \(the first: s0018\)"):
        select_rows(open_scores(tmp_path / "b", seed=0), rule, scratch=tmp_path / "scratch")
    assert where == "memory" or not any((tmp_path / "scratch").iterdir())


def test_two_ids_of_one_hash_are_two_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "hash_keys", lambda ids, *, seed: np.zeros(len(ids), dtype=np.uint64))
    found = opened(tmp_path, table(20, seed=0))
    told = decided(select_rows(found, Some(wanted=np.full(6, 100), num_classes=3), scratch=tmp_path))
    assert told["keep"].sum() == 18


def test_nothing_kept_is_refused(tmp_path: Path) -> None:
    found = opened(tmp_path, table(40, seed=0))
    with pytest.raises(ManifestError, match="some: none of the 40 scored samples qualifies; relax the rule"):
        select_rows(found, Some(wanted=np.zeros(6, int), num_classes=3), scratch=tmp_path)


def test_the_scratch_folder_is_empty_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_PART_ROWS", 4)
    monkeypatch.setattr(parts, "BATCH_ROWS", 10)
    bad = np.where(np.arange(40) == 35, 2.0, 0.5).astype(np.float32)
    found = opened(tmp_path, table(40, seed=0, confidence_audio=bad))
    with pytest.raises(ScoreError, match="confidence_audio of sample s0035 is 2"):
        select_rows(found, Some(wanted=np.full(6, 4), num_classes=3), scratch=tmp_path / "scratch")
    assert not any((tmp_path / "scratch").iterdir())
