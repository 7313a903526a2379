"""Tests of exports: they are read back unchanged, written atomically, and deterministic."""

from __future__ import annotations

import csv
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.downloads.ingest import ingest
from mmaudit.audit.errors import ConfigError, ManifestError, RunError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance import EXPORTERS, saved_dataset
from mmaudit.rebalance import export as export_file
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.export import Exporter, ExportJob, contains_media, escape_formula, plain_rows, split_name
from mmaudit.rebalance.export import export_manifest as write_export
from mmaudit.rebalance.manifest import read_batches_of_manifest
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split

pytestmark = pytest.mark.usefixtures("quick_scores")

FOLDERS = [name for name in EXPORTERS if EXPORTERS.load(name).files is not None]
ROOT = Path(__file__).parent.parent
NUMBER = 24
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
odd_names = st.one_of(
    names, st.sampled_from(["a.b", "a/b.wav", "ä,ö", 'q"uo"te', "li\nne", "re\rturn", "..", "%2E", " x "])
)
many_names = st.lists(odd_names, min_size=2, max_size=6, unique=True)
relaxed = settings(
    deadline=None, max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MakeManifest = Callable[..., Path]


def export(manifest: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export with the media of folder/data."""
    return write_export(manifest, out, **{"root": manifest.parent / "data", **options})


def make(folder: Path, ids: list[str] | None = None, **changes: Any) -> Path:
    """Write a manifest of all samples, with media folder/data/a/0.wav and folder/data/0.png."""
    n = NUMBER if ids is None else len(ids)
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "sample_id": np.array(ids or [f"s{number}" for number in range(n)], dtype=object),
        "label": np.arange(n, dtype=np.int32) % 3,
        "label_name": np.array([f"class {number % 3}" for number in range(n)], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.random((n, 2)).astype(np.float32),
        "split": np.array([("test", "validation", "train")[min(number % 5, 2)] for number in range(n)], dtype=object),
        "balance": rng.uniform(-1, 1, n).astype(np.float32),
        "paths": pa.table(
            {
                "sound_file_name": [f"a/{number}.wav" for number in range(n)],
                "image_file_name": [f"{number}.PNG" for number in range(n)],
            }
        ),
        "provenance": {
            "modalities": [
                {"name": "audio", "column": "sound_file_name", "kind": "audio"},
                {"name": "visual", "column": "image_file_name", "kind": "image"},
            ],
        },
    }
    table = ScoreTable(**{**columns, **changes})
    score_files = open_scores(table, seed=0)
    selection = select_rows(
        score_files, plan_balanced(score_files, BalancedConfig(tolerance=1.0)), scratch=folder / "scratch"
    )
    write_split(selection, folder / "m.parquet", name="balanced", recipe={})
    return folder / "m.parquet"


def write_media(folder: Path, n: int = NUMBER) -> None:
    (folder / "data" / "a").mkdir(parents=True)
    for number in range(n):
        (folder / "data" / "a" / f"{number}.wav").write_bytes(b"sound %d" % number)
        (folder / "data" / f"{number}.PNG").write_bytes(b"sight %d" % number)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write_media(tmp_path)
    return make(tmp_path)


def rows_of(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None)


def tree(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def as_manifest(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in schema}, schema=schema)


@pytest.mark.parametrize("format_", EXPORTERS)
def test_export_is_deterministic_and_lists_its_files(manifest: Path, tmp_path: Path, format_: str) -> None:
    first = export(manifest, tmp_path / "one" / "out", format=format_)
    export(manifest, tmp_path / "two" / "out", format=format_)
    files = tree(tmp_path / "one" / "out")
    assert files == tree(tmp_path / "two" / "out")
    assert first["files"] == sorted(str(tmp_path / "one" / "out" / name).rstrip("/") for name in files)
    assert (first["rows"], first["format"]) == (NUMBER, format_)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["out"]  # no temporary files


def ids_of(out: Path, format_: str) -> list[str]:
    """Return the ids of an export, in its order."""
    if format_ == "csv":
        return [str(name) for name in pd.read_csv(out)["sample_id"]]
    if format_ == "jsonl":
        return [json.loads(line)["sample_id"] for line in out.read_text().splitlines()]
    if format_ == "npy":
        return [str(name) for name in np.load(out)]
    if format_ == "ogm":
        return [
            f"s{row[0]}"  # clips are named after their files
            for path in [*out.glob("t*.csv"), out / "val.csv"]
            for row in csv.reader(path.read_text().splitlines())
        ]
    if format_ == "webdataset":
        members = [member for path in sorted(out.iterdir()) for member in read_members(path)]
        return [json.loads(content)["sample_id"] for name, content in members if name.endswith(".json")]
    assert format_ == "datasets"
    import datasets

    return [name for split in datasets.load_from_disk(str(out)).values() for name in split["sample_id"]]


def read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content.read()


@pytest.mark.parametrize("format_", EXPORTERS)
def test_export_holds_every_sample_once(manifest: Path, tmp_path: Path, format_: str) -> None:
    summary = export(manifest, tmp_path / "out", format=format_)
    expected = rows_of(manifest)["sample_id"].to_pylist()
    exported = ids_of(tmp_path / "out", format_)
    assert sorted(exported) == sorted(expected)
    assert summary["rows"] == len(expected)
    if format_ not in FOLDERS:
        assert exported == expected


@pytest.mark.parametrize("format_", EXPORTERS)
def test_interrupted_export_leaves_what_was_there(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    folder = tmp_path / "exports"
    export(manifest, folder / "old", format=format_)
    before = tree(folder)
    write = EXPORTERS.load(format_).write

    def interrupted(self: Exporter, job: ExportJob, out: Path) -> dict[str, Any]:
        write(self, job, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(EXPORTERS.load(format_), "write", interrupted)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            export(manifest, folder / name, format=format_, overwrite=True)
    assert tree(folder) == before


@pytest.mark.parametrize("format_", EXPORTERS)
def test_only_a_format_with_media_needs_them(manifest: Path, tmp_path: Path, format_: str) -> None:
    has_media = contains_media(manifest, format_)
    assert has_media == EXPORTERS.load(format_).contains_media
    if has_media:
        with pytest.raises(ManifestError, match="the folder of its media is unknown; pass --data"):
            export(manifest, tmp_path / "out", format=format_, root=None)
    else:
        assert export(manifest, tmp_path / "out", format=format_, root=None)["rows"] == NUMBER


def test_score_table_is_not_overwritten(manifest: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    scores.write_bytes(b"scores")
    with pytest.raises(RunError, match=r"scores\.parquet is not a csv file: choose another path with --out"):
        export(manifest, scores, format="csv", overwrite=True)
    assert scores.read_bytes() == b"scores"


@pytest.mark.parametrize("format_", EXPORTERS)
def test_existing_export_is_overwritten_only_on_request(manifest: Path, tmp_path: Path, format_: str) -> None:
    out = tmp_path / "out"
    export(manifest, out, format=format_)
    before = tree(out)
    with pytest.raises(RunError, match="out exists: choose another path with --out, or pass --overwrite"):
        export(manifest, out, format=format_)
    other_manifest = make(tmp_path / "other", [f"t{number}" for number in range(9)], provenance={})
    export(other_manifest, out, format=format_, root=tmp_path / "data", overwrite=True)
    new_out = tmp_path / "fresh"
    export(other_manifest, new_out, format=format_, root=tmp_path / "data")
    assert tree(out) == tree(new_out) != before


@pytest.mark.parametrize("format_", FOLDERS)
def test_folder_of_other_files_is_never_overwritten(manifest: Path, tmp_path: Path, format_: str) -> None:
    with pytest.raises(RunError, match="not an export as"):
        export(manifest, tmp_path / "data", format=format_, overwrite=True)
    with pytest.raises(RunError, match=r"0\.PNG is a file, not an export"):
        export(manifest, tmp_path / "data" / "0.PNG", format=format_, overwrite=True)
    assert (tmp_path / "data" / "a" / "0.wav").read_bytes() == b"sound 0"


def test_invalid_arguments_raise(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--format cvs: no such name; did you mean csv\? \(available: csv, jsonl"):
        export(manifest, tmp_path / "x", format="cvs")
    with pytest.raises(ConfigError, match="is the manifest itself"):
        export(manifest, manifest, format="csv", overwrite=True)
    with pytest.raises(ManifestError, match="no such file"):
        export(tmp_path / "none.parquet", tmp_path / "x", format="csv")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "no.parquet")
    with pytest.raises(ManifestError, match="is not a manifest: it lacks sample_id"):
        export(tmp_path / "no.parquet", tmp_path / "x", format="csv")


@relaxed
@given(many_names)
def test_csv_and_jsonl_round_trip(tmp_path: Path, ids: list[str]) -> None:
    manifest = make(tmp_path, ids, label_name=np.array(ids, dtype=object), label=np.arange(len(ids), dtype=np.int32))
    rows = rows_of(manifest)
    export(manifest, tmp_path / "m.csv", format="csv", overwrite=True, escape_formulas=False)
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    columns = {
        name: [value or None for value in column] for name, column in zip(header, zip(*lines, strict=True), strict=True)
    }
    assert header == rows.column_names
    assert as_manifest(columns, rows.schema).equals(rows)
    export(manifest, tmp_path / "m.jsonl", format="jsonl", overwrite=True)
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert all(list(record) == rows.column_names for record in records)
    assert as_manifest({name: [record[name] for record in records] for name in rows.column_names}, rows.schema).equals(
        rows
    )


FORMULAS = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "'=1", "''-x", '=HYPERLINK("x")', "＝1"]
PLAIN = ["a=b", "1-2", "'quoted'", "x@y.z", "ordinary", "'"]


def test_csv_escapes_formulas_in_text_cells_only(tmp_path: Path) -> None:
    ids = [*FORMULAS, *PLAIN]
    manifest = make(tmp_path, ids, label_name=np.array(ids, dtype=object), label=np.arange(len(ids), dtype=np.int32))
    export(manifest, tmp_path / "m.csv", format="csv")
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    rows = rows_of(manifest)
    for name in ("sample_id", "label_name"):
        for cell, text in zip(columns[name], rows[name].to_pylist(), strict=True):
            assert cell == (f"'{text}" if text in FORMULAS else text)
            assert re.sub(r"^'('*[=+\-@\t\r\n＝＋－＠])", r"\1", cell) == text
    assert any(value.startswith("-") for value in columns["discrepancy"])
    assert [float(value) for value in columns["discrepancy"]] == pytest.approx(rows["discrepancy"].to_pylist())


def test_column_names_are_escaped() -> None:
    assert [escape_formula(name) for name in ("=cmd()", "'=x", "label")] == ["'=cmd()", "''=x", "label"]


def test_floats_are_written_with_shortest_digits(tmp_path: Path) -> None:
    manifest = make(tmp_path, ["a", "b"], confidence=np.array([[0.1, 0], [0.7, 0]], dtype=np.float32))
    export(manifest, tmp_path / "m.jsonl", format="jsonl")
    assert {json.loads(line)["gap"] for line in (tmp_path / "m.jsonl").read_text().splitlines()} == {0.1, 0.7}
    export(manifest, tmp_path / "m.csv", format="csv")
    frame = pd.read_csv(tmp_path / "m.csv")
    assert frame["gap"].astype("float32").tolist() == rows_of(manifest)["gap"].to_pylist()


@relaxed
@given(many_names)
def test_npy_holds_the_ids_in_order_without_pickle(tmp_path: Path, ids: list[str]) -> None:
    manifest = make(tmp_path, ids)
    export(manifest, tmp_path / "uid", format="npy", overwrite=True)
    array = np.load(tmp_path / "uid", allow_pickle=False)
    assert array.dtype.kind == "U"
    assert array.tolist() == rows_of(manifest)["sample_id"].to_pylist()


def test_id_ending_in_nul_raises(tmp_path: Path) -> None:
    manifest = make(tmp_path, ["a", "b\0"])
    with pytest.raises(ConfigError, match="ends in NUL, which numpy strips"):
        export(manifest, tmp_path / "uid.npy", format="npy")
    assert not (tmp_path / "uid.npy").exists()


def test_ogm_lists_are_read_by_the_adapter(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    lists = export(manifest, tmp_path / "download", format="ogm")
    assert [Path(entry).name for entry in lists["files"]] == ["stat.csv", "test.csv", "train.csv", "val.csv"]
    for number in range(NUMBER):  # clips are named after their files
        (tmp_path / "download" / "Image-01-FPS" / str(number)).mkdir(parents=True)
        (tmp_path / "download" / "Image-01-FPS" / str(number) / "1.png").write_bytes(b"x")
        (tmp_path / "download" / "AudioWAV").mkdir(exist_ok=True)
        (tmp_path / "download" / "AudioWAV" / f"{number}.wav").write_bytes(b"x")
    done = ingest("ogm-ge", tmp_path / "download")
    assert (done.listed, done.present) == (NUMBER, NUMBER)
    rows, ingested = rows_of(manifest), pq.read_table(done.path)
    expected = zip(
        rows["sample_id"].to_pylist(), rows["label_name"].to_pylist(), rows["split"].to_pylist(), strict=True
    )
    assert {(f"s{entry['id']}", entry["label"], entry["split"]) for entry in ingested.to_pylist()} == set(expected)


@relaxed
@given(many_names)
def test_ogm_lists_hold_any_valid_name(tmp_path: Path, ids: list[str]) -> None:
    classes = {"label_name": np.array(ids, dtype=object), "label": np.arange(len(ids), dtype=np.int32)}
    manifest = make(tmp_path, ids, **classes, paths=None)  # clips without files are named by id
    is_invalid = any(name != name.strip() or len(name.splitlines()) != 1 or "/" in name for name in ids)
    if is_invalid:
        with pytest.raises(ConfigError, match=r"OGM list cannot hold|is not a file name"):
            export(manifest, tmp_path / "lists", format="ogm", overwrite=True)
        return
    export(manifest, tmp_path / "lists", format="ogm", overwrite=True)
    lines = []
    for name in ("train", "val", "test"):
        if (path := tmp_path / "lists" / f"{name}.csv").exists():
            with path.open(encoding="utf-8", newline="") as file:
                lines += list(csv.reader(file))
    assert sorted(lines) == sorted([name, name] for name in ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, "is in split None"),
        (
            {"paths": pa.table({"wav": ["x.wav"] * NUMBER}), "label": np.zeros(NUMBER, dtype=np.int32),
             "label_name": np.array(["c"] * NUMBER, dtype=object)},
            "another sample has the same clip 'x' and class 'c'",
        ),
    ],
)  # fmt: skip
def test_rows_that_ogm_lists_cannot_hold_raise(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(make(tmp_path, **changes), tmp_path / "lists", format="ogm")
    assert not (tmp_path / "lists").exists()


def test_ogm_lists_of_another_split_raise(manifest: Path, tmp_path: Path) -> None:
    table = pq.read_table(manifest)
    split = pa.array(["fold1"] * len(table))
    pq.write_table(table.set_column(table.column_names.index("split"), "split", split), manifest)
    with pytest.raises(ConfigError, match="is in split 'fold1'; OGM lists exist for train"):
        export(manifest, tmp_path / "lists", format="ogm")
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), None])
def test_saved_dataset_round_trips(tmp_path: Path, splits: tuple[str, ...] | None) -> None:
    import datasets

    split = None if splits is None else np.array([splits[n % len(splits)] for n in range(NUMBER)], dtype=object)
    manifest = make(tmp_path, split=split)
    export(manifest, tmp_path / "saved", format="datasets")
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    rows = rows_of(manifest).to_pylist()
    if splits is not None and len(splits) > 1:
        assert set(loaded) == set(splits)
        for name in splits:
            assert loaded[name].to_list() == [row for row in rows if row["split"] == name]
    else:
        assert loaded.to_list() == rows
    dataset = open_dataset(tmp_path / "saved", DataConfig(split=None if splits else "none"))
    ids = [name for shard in dataset.shards for name in dataset.sample_ids(dataset.read(shard), shard)]
    assert sorted(ids) == sorted(row["sample_id"] for row in rows)


def test_export_in_batches_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path)
    whole_tables = {format_: tmp_path / f"one.{format_}" for format_ in ("csv", "jsonl", "npy", "ogm")}
    for format_, out in whole_tables.items():
        export(manifest, out, format=format_)

    def in_fives(path: Path, *, columns: list[str] | None = None) -> Any:
        for table in read_batches_of_manifest(path, columns=columns):
            for first in range(0, len(table), 5):
                yield table.slice(first, 5)

    for module in (export_file, saved_dataset):
        monkeypatch.setattr(module, "read_batches_of_manifest", in_fives)
    for format_, out in whole_tables.items():
        export(manifest, tmp_path / "again" / format_, format=format_)
        assert tree(tmp_path / "again" / format_) == tree(out)
    export(manifest, tmp_path / "saved", format="datasets")
    assert rows_of(manifest).num_rows == open_dataset(tmp_path / "saved").num_rows


# The rows of an export.


def job_of(path: Path, table: pa.Table) -> ExportJob:
    pq.write_table(table, path)
    return ExportJob(
        manifest=path,
        schema=table.schema,
        paths=(),
        provenance={},
        root=None,
        allow_outside=False,
        skip_missing=False,
        escape_formulas=True,
    )


def num_digits(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)


@given(st.lists(st.none() | st.floats(width=32), max_size=9))
@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_have_the_shortest_digits(tmp_path: Path, values: list[float | None]) -> None:
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
