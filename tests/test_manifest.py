"""Tests of manifests: round trips, digests that detect any change, and errors for damaged files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ManifestError
from mmaudit.rebalance import manifest
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.manifest import (
    COLUMNS,
    RANGES,
    REPEATING,
    Manifest,
    RowDigest,
    check_columns,
    compute_digests,
    dropped_path,
    read_batches_of_manifest,
    read_dropped,
    read_manifest,
    read_provenance,
    read_stated_digests,
    regroup,
    table_digest,
)
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split


def written(folder: Path, n: int = 40, *, seed: int = 0) -> Path:
    """Split n scored samples into folder/m.parquet and its dropped rows."""
    rng = np.random.default_rng(seed)
    scores = pa.table(
        {
            "sample_id": [f"s{number}" for number in range(n)],
            "label": np.arange(n) % 3,
            "label_name": [f"class {number % 3}" for number in range(n)],
            "split": ["test" if number % 5 == 0 else "train" for number in range(n)],
            "group": [f"g{number % 4}" for number in range(n)],
            "confidence_audio": rng.random(n).astype(np.float32),
            "confidence_visual": rng.random(n).astype(np.float32),
            "p_balanced": rng.random(n).astype(np.float32),
            "content": [f"{number:032x}" for number in range(n)],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(scores, folder / "scores.parquet")
    score_files = open_scores(folder / "scores.parquet", seed=0)
    rule = plan_balanced(score_files, BalancedConfig(bins=4))
    write_split(select_rows(score_files, rule, scratch=folder), folder / "m.parquet", name="even", recipe={"seed": 3})
    return folder / "m.parquet"


def test_manifest_round_trips(tmp_path: Path) -> None:
    path = written(tmp_path)
    loaded = read_manifest(path)
    dropped = read_dropped(path, loaded)
    assert dropped is not None
    assert len(loaded) + len(dropped) == 40
    metadata = loaded.digests.metadata
    assert read_stated_digests(path) == {"rows": len(loaded), "digest": loaded.digest(), "metadata": metadata}
    stated = {
        "rows": len(dropped),
        "digest": table_digest(dropped),
        "metadata": metadata,
        "dropped_from": loaded.digest(),
    }
    assert read_stated_digests(dropped_path(path)) == stated
    assert compute_digests(path) == loaded.digests
    assert read_provenance(path) == loaded.provenance
    assert loaded.provenance["recipe"] == {"seed": 3}
    assert pa.concat_tables(read_batches_of_manifest(path)).equals(loaded.table.replace_schema_metadata(None))
    assert [table.column_names for table in read_batches_of_manifest(path, columns=["sample_id"])] == [["sample_id"]]
    assert set(RANGES) <= set(COLUMNS)


def test_strings_and_numbers_mark_missing_values(tmp_path: Path) -> None:
    loaded = read_manifest(written(tmp_path))
    assert loaded.strings("label_name").tolist() == loaded.table["label_name"].to_pylist()
    assert loaded.numbers("rank").tolist() == loaded.table["rank"].to_pylist()
    assert np.isnan(loaded.numbers("balance")).all()  # not in the scores
    without = loaded.table.set_column(3, "split", pa.nulls(len(loaded), pa.string()))
    assert replace(loaded, table=without).strings("split").tolist() == [None] * len(loaded)


def test_pandas_and_datasets_read_a_manifest(tmp_path: Path) -> None:
    import datasets

    path = written(tmp_path)
    rows = [{**row, "balance": 0.0} for row in read_manifest(path).table.to_pylist()]
    frame = pd.read_parquet(path)
    frame["balance"] = 0.0  # null throughout, which is NaN here and None there
    assert frame.to_dict("records") == rows
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [{**row, "balance": 0.0} for row in loaded] == rows


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "label_name": st.none() | st.sampled_from(["", "a", "b", "ä"]),
    "sample_id": st.none() | st.text(max_size=4),
    "label": st.none() | st.integers(-3, 3),
    "gap": st.none() | st.sampled_from([0.0, 0.5, 1.0]),
    "extra": st.none() | st.booleans(),
}
TYPES = {
    "label_name": pa.string(),
    "sample_id": pa.string(),
    "label": pa.int32(),
    "gap": pa.float32(),
    "extra": pa.bool_(),
}


def tables(min_rows: int = 0) -> st.SearchStrategy[pa.Table]:
    rows = st.lists(st.fixed_dictionaries(VALUES), min_size=min_rows, max_size=14)
    return rows.map(
        lambda records: pa.table({name: pa.array([record[name] for record in records], TYPES[name]) for name in TYPES})
    )


@settings(deadline=None)
@given(tables(), st.lists(st.integers(0, 14), max_size=4).map(sorted), st.booleans(), st.integers(1, 6))
def test_digest_is_independent_of_batches_and_encoding(
    table: pa.Table, cuts: list[int], coded: bool, group: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "GROUP_ROWS", group)
        ends = [0, *(min(cut, len(table)) for cut in cuts), len(table)]
        pieces = [table.slice(first, end - first) for first, end in pairwise(ends)]
        assert [len(piece) for piece in regroup(pieces)] == [len(piece) for piece in regroup([table])]
        digest = RowDigest()
        for piece in regroup(pieces):
            if coded:  # a dictionary with unused values, in another order
                codes = pa.array(["z", *piece["label_name"].to_pylist()], pa.string()).dictionary_encode().slice(1)
                piece = piece.set_column(0, "label_name", codes)
            digest.add(piece.select(piece.column_names[::-1]))
        assert digest.hexdigest() == table_digest(table)


@settings(max_examples=examples(300))
@given(tables(), tables())
def test_digests_are_equal_only_for_equal_tables(first: pa.Table, second: pa.Table) -> None:
    assert (table_digest(first) == table_digest(second)) == first.equals(second)


@settings(deadline=None)
@given(tables(min_rows=1), st.sampled_from(sorted(VALUES)), st.data())
def test_digest_changes_with_any_value(table: pa.Table, name: str, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(table) - 1))
    values = table[name].to_pylist()
    new_value = data.draw(
        VALUES[name].filter(lambda value: value != values[row] or type(value) is not type(values[row]))
    )
    values[row] = new_value
    changed = table.set_column(table.column_names.index(name), name, pa.array(values, TYPES[name]))
    assert table_digest(changed) != table_digest(table)


def test_digest_depends_on_order_names_and_text_boundaries() -> None:
    table = pa.table({"a": ["ab", "c"], "b": ["x", "y"]})
    changed = [
        table.take(pa.array([1, 0])),
        table.rename_columns(["a", "c"]),
        table.rename_columns(["b", "a"]),
        pa.table({"a": ["a", "bc"], "b": ["x", "y"]}),
        pa.table({"a": ["ab", "c"]}),
    ]
    digests = {table_digest(entry) for entry in [table, *changed]}
    assert len(digests) == 1 + len(changed)
    assert {len(entry) for entry in digests} == {32}


@pytest.mark.parametrize("column", sorted(COLUMNS))
def test_digest_depends_on_every_column(tmp_path: Path, column: str) -> None:
    loaded = read_manifest(written(tmp_path))
    values = loaded.table[column].to_pylist()
    new_value: Any = "other" if COLUMNS[column] == pa.string() else (values[0] or 0) + 1
    index = loaded.table.column_names.index(column)
    changed = loaded.table.set_column(index, column, pa.array([new_value, *values[1:]], COLUMNS[column]))
    assert replace(loaded, table=changed).digest() != loaded.digest()
    assert set(REPEATING) - {"reason"} <= set(COLUMNS)


def test_regroup_keeps_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "GROUP_ROWS", 4)
    pieces = [pa.table({"a": np.arange(first, end)}) for first, end in pairwise([0, 1, 1, 9, 11])]
    regrouped = list(regroup(pieces))
    assert [len(table) for table in regrouped] == [4, 4, 3]
    assert pa.concat_tables(regrouped)["a"].to_pylist() == list(range(11))
    assert list(regroup([])) == []


def test_file_that_is_no_manifest_raises(tmp_path: Path) -> None:
    table = read_manifest(written(tmp_path)).table
    invalid = {
        "is not a manifest: it lacks rank, content; create one with: mmaudit split": table.drop_columns(
            ["rank", "content"]
        ),
        "column label of the manifest holds nulls": table.set_column(1, "label", pa.nulls(len(table), pa.int32())),
        "column sample_id of the manifest holds nulls": table.set_column(
            0, "sample_id", pa.nulls(len(table), pa.string())
        ),
        "2 ids occur more than once in the manifest": pa.concat_tables([table, table.slice(0, 2)]),
    }
    for words, content in invalid.items():
        pq.write_table(content, tmp_path / "bad.parquet")
        with pytest.raises(ManifestError, match=words):
            read_manifest(tmp_path / "bad.parquet")
    with pytest.raises(ManifestError, match="somewhere is not a manifest: it lacks sample_id"):
        check_columns(pa.schema([]), where="somewhere")


def test_unreadable_file_raises(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("sample_id,label\n")
    for read in (
        read_manifest,
        read_provenance,
        read_stated_digests,
        lambda path: list(read_batches_of_manifest(path)),
    ):
        with pytest.raises(ManifestError, match=r"text\.parquet cannot be read as Parquet"):
            read(tmp_path / "text.parquet")
        with pytest.raises(ManifestError, match=r"no such file: .*none\.parquet"):
            read(tmp_path / "none.parquet")


def test_hash_collision_is_no_repeated_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = read_manifest(written(tmp_path))
    monkeypatch.setattr(manifest, "hash_ids", lambda ids, **_: np.zeros(len(ids), dtype=np.uint64))
    assert len(Manifest(table=loaded.table, provenance={})) == len(loaded)
    with pytest.raises(ManifestError, match="1 ids occur more than once"):
        Manifest(table=pa.concat_tables([loaded.table, loaded.table.slice(0, 1)]), provenance={})


def test_file_without_metadata_states_nothing(tmp_path: Path) -> None:
    pq.write_table(read_manifest(written(tmp_path)).table.replace_schema_metadata(None), tmp_path / "other.parquet")
    assert read_stated_digests(tmp_path / "other.parquet") == {}
    assert read_provenance(tmp_path / "other.parquet") == {}


def test_dropped_rows_may_be_absent(tmp_path: Path) -> None:
    path = written(tmp_path)
    dropped_path(path).unlink()
    assert read_dropped(path, read_manifest(path)) is None


def test_dropped_rows_of_another_manifest_raise(tmp_path: Path) -> None:
    path = written(tmp_path)
    loaded = read_manifest(path)
    shorter = replace(loaded, table=loaded.table.slice(1))
    with pytest.raises(ManifestError, match=r"m\.dropped\.parquet holds the rows dropped from another manifest"):
        read_dropped(path, shorter)


def invalid_utf8(values: list[bytes]) -> pa.Array:
    """Return a string column of invalid UTF-8."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_invalid_utf8_text_raises(tmp_path: Path) -> None:
    path = written(tmp_path)
    table = pq.read_table(path)
    index = table.column_names.index("group")
    for column in (invalid_utf8([b"\xff"] * len(table)), invalid_utf8([b"\xff"] * len(table)).dictionary_encode()):
        pq.write_table(table.set_column(index, "group", column), path)
        with pytest.raises(ManifestError, match=r"cannot be read as Parquet: .*UTF8"):
            list(read_batches_of_manifest(path))
        assert sum(len(table_) for table_ in read_batches_of_manifest(path, columns=["sample_id"])) == len(table)


def test_invalid_utf8_column_name_raises(tmp_path: Path) -> None:
    path = written(tmp_path)
    pq.write_table(pq.read_table(path), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"group", b"gr\xffup"))
    for read in (read_provenance, read_stated_digests, lambda file: list(read_batches_of_manifest(file))):
        with pytest.raises(ManifestError, match="cannot be read as Parquet"):
            read(path)


def test_damaged_pages_raise(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"cannot be read as Parquet: ."):
        list(read_batches_of_manifest(path))


def test_binary_columns_have_a_digest() -> None:
    def of(*values: bytes | None) -> str:
        return table_digest(
            pa.table({"group": pa.array(values, pa.binary()), "sample_id": pa.array(values, pa.binary())})
        )

    assert of(b"\xff", None, b"a") == of(b"\xff", None, b"a")
    assert len({of(b"\xff", None, b"a"), of(None, b"\xff", b"a"), of(b"\xfe", None, b"a")}) == 3


def test_manifest_of_another_version_raises(tmp_path: Path) -> None:
    path = written(tmp_path)
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"mmaudit": b'{"schema": "mmaudit.manifest/2"}'}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ManifestError, match=r"is mmaudit\.manifest/2, but this mmaudit reads mmaudit\.manifest/3: run"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", [1]),
        ("scores", []),
        ("scores.modalities", {"audio": 1}),
        ("scores.modalities", ["audio"]),
        ("scores.modalities", [{"name": 5}]),
        ("scores.config", 5),
        ("scores.config.data", []),
        ("scores.config.data.allow_outside", "yes"),
        ("recipe", "balanced"),
        ("recipe.balanced", [20]),
        ("recipe.seed", "0"),
        ("subset", {}),
        ("between", 3),
    ],
)
def test_invalid_metadata_raise_and_name_the_key(tmp_path: Path, key: str, value: Any) -> None:
    content: Any = value
    for name in reversed(key.split(".") if key else []):
        content = {name: content}
    path = written(tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"mmaudit": json.dumps(content)}), path)
    for read in (read_provenance, read_manifest):
        with pytest.raises(ManifestError, match=rf"damaged: {re.escape(key) or 'the document'}\S* is .*; it must be"):
            read(path)


def test_manifest_rewritten_with_other_types_has_the_same_digest(tmp_path: Path) -> None:
    path = written(tmp_path)
    table, digest = pq.read_table(path), read_manifest(path).digest()
    for type_ in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        texts = [name for name, type_of_column in COLUMNS.items() if type_of_column == pa.string()]
        rewritten = table
        for name in texts:
            rewritten = rewritten.set_column(
                rewritten.column_names.index(name), name, rewritten[name].combine_chunks().cast(type_)
            )
        pq.write_table(rewritten, path)
        assert read_manifest(path).digest() == digest


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("sample_id", pa.array(range(9)), "its sample_id is int64, not string"),
        ("sample_id", pa.array([b"x"] * 9), "its sample_id is binary, not string"),
        ("label", pa.array(["x"] * 9), "its label is string, not int32"),
        ("label", pa.array([2**40] * 9), "column label cannot be read"),
        ("split", pa.array([["x"]] * 9), "its split is list"),
        ("gap", pa.array([True] * 9), "its gap is bool, not float"),
    ],
)
def test_columns_of_invalid_types_raise(tmp_path: Path, name: str, values: pa.Array, reason: str) -> None:
    path = written(tmp_path)
    table = pq.read_table(path).slice(0, 9)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)
    with pytest.raises(ManifestError, match=reason):
        read_manifest(path)
