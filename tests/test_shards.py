"""Laws of reading score tables: the same rows whatever the files, and each fault named at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError, ManifestError, ScoreError
from mmaudit.audit.hashing import hash_ids
from mmaudit.audit.scores.table import ScoreTable, read_scores, write_scores
from mmaudit.rebalance import score_files as parts
from mmaudit.rebalance.score_tables import ManifestMembers, ScoreFiles, keys_of, open_scores, same_dataset

N = 24


def table(n: int = N, *, start: int = 0, **more: Any) -> pa.Table:
    """Give a score table; a column of None is left out."""
    rng = np.random.default_rng(start)
    number = np.arange(start, start + n)
    columns: dict[str, Any] = {
        "sample_id": [f"s{one:03d}" for one in number],
        "label": pa.array(number % 3, pa.int32()),
        "label_name": [f"class {one % 3}" for one in number],
        "split": ["test" if one % 4 == 0 else "train" for one in number],
        "confidence_audio": rng.random(n).astype(np.float32),
        "confidence_visual": rng.random(n).astype(np.float32),
    }
    return pa.table({name: values for name, values in {**columns, **more}.items() if values is not None})


def written(folder: Path, *tables: pa.Table, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(tables):
        pq.write_table(each, folder / f"part-{number}.parquet", **options)
    return folder


def all_of(found: ScoreFiles) -> dict[str, list[Any]]:
    """Read everything there is of the rows."""
    read: dict[str, list[Any]] = {"id": [], "key": [], "class": [], "name": [], "split": [], "confidence": []}
    for rows in found.rows():
        read["id"] += rows.table["sample_id"].to_pylist()
        read["key"] += rows.key.tolist()
        read["class"] += [found.classes[place].as_py() for place in rows.label]
        read["name"] += [found.class_names[place] for place in rows.label]
        read["split"] += [found.splits[place] for place in rows.split]
        read["confidence"] += rows.confidence.tolist()
    return read


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, N - 1), max_size=4, unique=True).map(sorted),
    st.integers(1, N),
    st.integers(1, N),
    st.randoms(use_true_random=False),
)
def test_rows_are_the_same_however_they_lie(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], group: int, batch: int, random: Any
) -> None:
    whole, folder = table(), tmp_path_factory.mktemp("shards")
    expected = all_of(open_scores(written(folder / "one", whole), seed=3))
    assert expected["id"] == whole["sample_id"].to_pylist()
    assert expected["class"] == whole["label"].to_pylist()
    assert expected["name"] == whole["label_name"].to_pylist()
    assert expected["split"] == whole["split"].to_pylist()
    places = list(zip([0, *cuts], [*cuts, N], strict=True))
    names = random.sample([folder / f"{one}.parquet" for one in "abcdefgh"], len(places))
    for path, (first, end) in zip(names, places, strict=True):
        pq.write_table(whole.slice(first, end - first), path, row_group_size=group)
    random.shuffle(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BATCH_ROWS", batch)
        for source in (folder, names, str(folder / "*.parquet")):
            found = open_scores(source, seed=3)
            assert all_of(found) == expected
            assert (found.num_rows, found.splits) == (N, ("test", "train"))


def test_a_table_in_memory_is_read_as_its_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "plain.parquet")
    scores = read_scores(tmp_path / "plain.parquet")
    write_scores(scores, tmp_path / "ours.parquet")
    assert isinstance(scores, ScoreTable)
    there, here = (open_scores(each, seed=0) for each in (tmp_path / "ours.parquet", scores))
    assert all_of(there) == all_of(here)
    assert there.columns == here.columns
    assert there.modalities == here.modalities == ("audio", "visual")


def test_keys_are_hashes_of_the_ids() -> None:
    ids = table()["sample_id"]
    assert keys_of(ids, seed=5).tolist() == hash_ids(ids.combine_chunks(), seed=5, purpose="split").tolist()
    assert set(keys_of(ids, seed=5).tolist()).isdisjoint(keys_of(ids, seed=6).tolist())


WORDS = pa.array([f"class {one % 3}" for one in range(N)])
DRESSED: dict[str, dict[str, Any]] = {
    "label alone": {"label_name": None},
    "label_name alone": {"label": None},
    "odd numbers": {"label": pa.array([(-5, 2_000_000_000, 7)[one % 3] for one in range(N)])},
    "wide numbers": {"label": pa.array([one % 3 for one in range(N)], pa.uint64())},
    "numbers as floats": {"label": pa.array([float(one % 3) for one in range(N)])},
    "words for numbers": {"label": WORDS, "label_name": None},
    "codes": {
        "sample_id": pa.array([f"s{one:03d}" for one in range(N)]).dictionary_encode(),
        "label": pa.array([one % 3 for one in range(N)]).dictionary_encode(),
        "label_name": WORDS.dictionary_encode(),
        "split": pa.array(["train"] * N).dictionary_encode(),
    },
    "large strings": {
        "sample_id": pa.array([f"s{one:03d}" for one in range(N)], pa.large_string()),
        "label_name": WORDS.cast(pa.large_string()),
    },
    "numbers as ids": {"sample_id": pa.array(range(N))},
}


@pytest.mark.parametrize("dress", sorted(DRESSED))
def test_labels_and_ids_may_come_as_anybody_writes_them(tmp_path: Path, dress: str) -> None:
    plain = table(**DRESSED[dress])
    found = open_scores(written(tmp_path, plain), seed=0)
    read = all_of(found)
    ids = [str(one) for one in plain["sample_id"].to_pylist()]
    assert [str(one) for one in read["id"]] == ids
    assert read["key"] == hash_ids(pa.array(ids), seed=0, purpose="split").tolist()
    same = plain["label" if "label" in plain.column_names else "label_name"].to_pylist()
    assert read["class"] == same
    assert read["name"] == (
        plain["label_name"].to_pylist() if "label_name" in plain.column_names else list(map(str, same))
    )
    assert len(found.class_names) == 3


@pytest.mark.parametrize(
    ("split", "splits"),
    [
        (None, {"all"}),
        (pa.nulls(N), {"all"}),
        (pa.nulls(N, pa.string()), {"all"}),
        (pa.array(["train", None] * (N // 2)), {"all", "train"}),
    ],
)
def test_who_has_no_split_is_in_the_split_all(tmp_path: Path, split: Any, splits: set[str]) -> None:
    found = open_scores(written(tmp_path, table(split=split)), seed=0)
    assert sorted(splits) == list(found.splits)
    told = ["all" if one is None else str(one) for one in ([None] * N if split is None else split.to_pylist())]
    assert all_of(found)["split"] == told


def test_test_samples_choose_only_where_there_are_no_others(tmp_path: Path) -> None:
    found = open_scores(written(tmp_path / "a", table()), seed=0)
    chooses = np.concatenate([found.chooses(rows) for rows in found.rows()])
    assert chooses.tolist() == [one % 4 != 0 for one in range(N)]
    alone = open_scores(written(tmp_path / "b", table(split=["test"] * N)), seed=0)
    assert all(alone.chooses(rows).all() for rows in alone.rows())


def test_a_missing_modality_is_nan_and_the_gap_is_over_the_others(tmp_path: Path) -> None:
    third = pa.array([None if one % 2 else 0.5 for one in range(N)], pa.float32())
    found = open_scores(written(tmp_path, table(confidence_text=third)), seed=0)
    (rows,) = found.rows()
    values = rows.confidence
    assert np.isnan(values[:, 2]).tolist() == [bool(one % 2) for one in range(N)]
    assert rows.gap == pytest.approx(np.nanmax(values, axis=1) - np.nanmin(values, axis=1))
    assert np.isnan(rows.discrepancy("audio:text")).tolist() == np.isnan(values[:, 2]).tolist()
    assert rows.discrepancy("audio:visual").tolist() == (values[:, 0] - values[:, 1]).tolist()
    assert rows.numbers("balance") is None


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
@pytest.mark.parametrize("type_", [pa.null(), pa.float32()])
def test_a_column_that_is_null_throughout_is_as_none(tmp_path: Path, type_: pa.DataType, options: Any) -> None:
    nulls = table(balance=pa.nulls(N, type_))
    found = open_scores(written(tmp_path / "a", nulls, **options), seed=0)
    assert "balance" not in found.columns
    some = table(start=N, balance=pa.array([None] * (N - 1) + [0.5], pa.float32()))
    both = open_scores(written(tmp_path / "b", nulls, some, **options), seed=0)
    values = np.concatenate([rows.numbers("balance") for rows in both.rows()])
    assert np.isnan(values[:-1]).all()
    assert values[-1] == 0.5


def test_of_more_modalities_the_most_confident_is_against_the_rest(tmp_path: Path) -> None:
    third = np.where(np.arange(N) % 4 == 0, 0.0, 1.0)  # the test samples, which have no say, lack it
    found = open_scores(written(tmp_path, table(confidence_text=third)), seed=0)
    assert found.default_between() == "text"
    assert open_scores(written(tmp_path / "two", table()), seed=0).default_between() == "audio:visual"


@pytest.mark.parametrize("inside", [True, False])
def test_members_bar_the_others(tmp_path: Path, inside: bool) -> None:
    folder = written(tmp_path, table())
    found = open_scores(folder, seed=0)
    chosen = pa.chunked_array([table()["sample_id"].combine_chunks().slice(4, 6)])
    members = ManifestMembers(name="some", keys=np.sort(keys_of(chosen, seed=0)), inside=inside)
    assert members.reason == ("not-in-some" if inside else "in-some")
    key = np.array(all_of(found)["key"], dtype=np.uint64)
    assert members.admits(key).tolist() == [(4 <= one < 10) == inside for one in range(N)]


def value_at(place: int, value: float | None) -> pa.Array:
    values: list[float | None] = [0.5] * N
    values[place] = value
    return pa.array(values, pa.float32())


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "too large": (
        {"confidence_audio": value_at(3, 1.5)},
        r"part-0\.parquet: confidence_audio of sample s003 is 1.5, outside \[0, 1\]: rescore, or mend the table",
    ),
    "too small": ({"confidence_visual": value_at(0, -0.1)}, "confidence_visual of sample s000 is -0.1, outside"),
    "not a number": ({"confidence_audio": value_at(7, float("nan"))}, "confidence_audio of sample s007 is nan"),
    "infinite": ({"confidence_audio": value_at(7, float("inf"))}, "confidence_audio of sample s007 is inf"),
    "balance": ({"balance": value_at(5, -1.01)}, r"balance of sample s005 is -1.01, outside \[-1, 1\]"),
    "posterior": ({"p_balanced": value_at(5, -0.5)}, r"p_balanced of sample s005 is -0.5, outside \[0, 1\]"),
    "one confidence": ({"confidence_audio": value_at(9, None)}, "sample s009 has fewer than two values of confidence"),
    "null id": ({"sample_id": pa.array([None, *map(str, range(1, N))])}, "column sample_id holds nulls"),
    "null label": ({"label": pa.array([1, None] * (N // 2))}, "column label holds nulls; every scored sample"),
    "null name": ({"label": None, "label_name": ["a", None] * (N // 2)}, "column label_name holds nulls"),
    "fraction": ({"label": pa.array([0.5] * N)}, "column label does not hold classes"),
    "wide label": ({"label": pa.array([1, 2**31] * (N // 2))}, "label 2147483648 has more than 32 bits"),
    "lists": ({"label": pa.array([[1]] * N)}, r"column label holds list<.*>; it must hold one string or number"),
    "words": ({"confidence_audio": ["high"] * N}, "column confidence_audio does not hold numbers"),
    "bytes": (
        {"sample_id": pa.array([b"\xff%d" % one for one in range(N)])},
        "column sample_id holds binary; it must hold",
    ),
    "two names": ({"label_name": [f"class {one % 2}" for one in range(N)]}, "labels have more than one label_name"),
    "bool label": ({"label": pa.array([one % 2 == 0 for one in range(N)])}, "column label holds bool; it must"),
    "date label": ({"label": pa.array([1] * N, pa.int32()).cast(pa.date32())}, "column label holds date32"),
    "group bytes": ({"group": pa.array([b"g"] * N)}, "column group holds binary; it must hold one string or number"),
    "group list": ({"group": pa.array([[1]] * N)}, r"column group holds list<.*>; it must hold one string or number"),
    "one modality": ({"confidence_visual": None}, "is not a score table: it needs sample_id, label"),
    "no label": ({"label": None, "label_name": None}, "is not a score table: it needs sample_id, label"),
    "no id": ({"sample_id": None}, "is not a score table: it needs sample_id, label"),
}


@pytest.mark.parametrize("fault", sorted(SPOILED))
def test_what_is_wrong_with_a_table_is_told_in_one_line(tmp_path: Path, fault: str) -> None:
    columns, words = SPOILED[fault]
    written(tmp_path, table(**columns))
    with pytest.raises(ScoreError, match=words) as caught:
        all_of(open_scores(tmp_path, seed=0))
    assert "\n" not in str(caught.value)


def test_a_little_more_than_one_is_rounding(tmp_path: Path) -> None:
    assert all_of(open_scores(written(tmp_path, table(confidence_audio=value_at(3, 1 + 5e-7))), seed=0))["id"]


def test_the_first_fault_is_named_though_it_lies_in_a_later_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BATCH_ROWS", 5)
    written(tmp_path, table(confidence_audio=pa.array([0.5] * 17 + [2.0, 3.0] + [0.5] * 5, pa.float32())))
    with pytest.raises(ScoreError, match="confidence_audio of sample s017 is 2,"):
        all_of(open_scores(tmp_path, seed=0))


def test_files_that_are_no_shards_of_one_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"part-1.* and .*part-0.* are no shards of one table: only one of them has x"):
        open_scores(written(tmp_path / "a", table(), table(start=N, x=[1] * N)), seed=0)
    with pytest.raises(ScoreError, match="column label is int in one shard and str in another"):
        open_scores(written(tmp_path / "b", table(), table(start=N, label=WORDS)), seed=0)
    twice = pa.Table.from_arrays([*table().columns, table()["label"]], names=[*table().column_names, "label"])
    with pytest.raises(ScoreError, match=r"part-0\.parquet has 2 columns label"):
        open_scores(written(tmp_path / "c", twice), seed=0)


def test_shards_may_differ_in_width_and_order_of_columns(tmp_path: Path) -> None:
    wide = table(start=N, label=pa.array([1_000] * N, pa.int64()), label_name=["many"] * N)
    found = open_scores(
        written(
            tmp_path,
            table(label=pa.array([1] * N, pa.uint8()), label_name=["one"] * N),
            wide.select(wide.column_names[::-1]),
        ),
        seed=0,
    )
    assert all_of(found)["class"] == [1] * N + [1_000] * N


def test_shards_without_rows_count_for_nothing(tmp_path: Path) -> None:
    found = open_scores(written(tmp_path / "a", table().slice(0, 0), table(), table().slice(0, 0)), seed=0)
    assert len(found.parts) == 1
    assert len(all_of(found)["id"]) == N
    with pytest.raises(ScoreError, match="the score table holds no rows"):
        open_scores(written(tmp_path / "b", table().slice(0, 0)), seed=0)


def test_what_is_not_there_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none.parquet", str(tmp_path / "*.parquet"), [tmp_path / "none"]):
        with pytest.raises(ScoreError, match=r"no score table .*: name a Parquet file, a folder of them or a glob"):
            open_scores(source, seed=0)
    (tmp_path / "text.parquet").write_text("sample_id,label\n")
    with pytest.raises(ScoreError, match=r"text\.parquet cannot be read as Parquet"):
        open_scores(tmp_path / "text.parquet", seed=0)


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = written(tmp_path, table()) / "part-0.parquet"
    assert open_scores([path, path, tmp_path], seed=0).num_rows == N


def test_a_modality_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (rows,) = open_scores(written(tmp_path, table()), seed=0).rows()
    with pytest.raises(ConfigError, match="--between audio:smell: no modality 'smell'"):
        rows.discrepancy("audio:smell")


def test_provenances_of_two_datasets_are_told_apart() -> None:
    same_dataset({"fingerprint": "a"}, {"fingerprint": "a"}, name="m")
    same_dataset({"fingerprint": "a"}, {}, name="m")
    with pytest.raises(ManifestError, match="m was made from another dataset than these scores"):
        same_dataset({"fingerprint": "a"}, {"fingerprint": "b"}, name="m")
