"""Tests of appended rows: earlier scores stay, new rows are scored by probes that were not trained on them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from grown import (
    CONFIG,
    IN_PARTS,
    NUM_ALL,
    NUM_OLD,
    check_close,
    files,
    record,
    table,
    with_copy,
    write,
)

from mmaudit.audit.engine import stages
from mmaudit.audit.engine.run_state import RunState, hash_groups
from mmaudit.audit.errors import ConfigError, RunError
from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.cli import append_files, appending
from mmaudit.cli.config import RunConfig
from mmaudit.cli.provenance import origin_of, own_record
from mmaudit.cli.report.page import report_numbers
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import split
from mmaudit.rebalance.manifest import compute_digests, read_manifest

pytestmark = pytest.mark.usefixtures("quick_scores")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/a.parquet` and its run in one part, and `b.parquet` to be added; read-only."""
    folder = tmp_path_factory.mktemp("scored")
    rows = table()
    write(rows.slice(0, NUM_OLD), folder / "data" / "a.parquet")
    score(folder / "data" / "*.parquet", run=folder / "run", config=CONFIG, num_workers=0)
    copy = with_copy(rows, of=4, name="copy")
    write(pa.concat_tables([rows.slice(NUM_OLD), copy]), folder / "b.parquet")
    return folder


@pytest.fixture(scope="module")
def appended(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the rows appended at once; read-only."""
    folder = tmp_path_factory.mktemp("appended") / "set"
    shutil.copytree(scored, folder)
    grow(folder, folder / "b.parquet")
    return folder


def grow(folder: Path, file: Path, *, config: RunConfig = CONFIG) -> None:
    shutil.copy(file, folder / "data" / file.name)
    append(folder, config=config)


def append(folder: Path, *, config: RunConfig = CONFIG, **options: Any) -> None:
    score(folder / "data" / "*.parquet", run=folder / "run", config=config, num_workers=0, append=True, **options)


def test_earlier_scores_stay_and_counts_grow(scored: Path, appended: Path) -> None:
    before, after = (Run(folder / "run").scores().to_arrow() for folder in (scored, appended))
    assert after.slice(0, NUM_OLD).equals(before)
    assert len(after) == NUM_ALL
    counts = record(appended / "run")
    assert counts["counts"] == {"input": NUM_ALL + 1, "scored": NUM_ALL, "quarantined": 1}
    assert counts["appended"]["rows"] == NUM_ALL + 1 - NUM_OLD  # type: ignore[index]
    assert counts["num_groups"] == len(pc.unique(after["group"]))
    assert counts["probe_report"] == record(scored / "run")["probe_report"]
    quarantined = pq.read_table(appended / "run" / "quarantine.parquet").to_pylist()
    assert [(row["sample_id"], row["reason"]) for row in quarantined] == [("copy", "duplicate")]
    assert not (appended / "run" / "stages").exists()
    mixture = (scored / "run" / "mixture.json").read_bytes()
    assert (appended / "run" / "mixture.json").read_bytes() == mixture


def test_known_groups_keep_fold_and_split_and_others_follow_their_hash(scored: Path, appended: Path) -> None:
    before, after = (pq.read_table(folder / "run" / "scores.parquet") for folder in (scored, appended))
    known = {row["group"]: (row["fold"], row["split"]) for row in before.select(["group", "fold", "split"]).to_pylist()}
    new = after.slice(NUM_OLD).select(["group", "fold", "split"]).to_pylist()
    assert {row["group"] in known for row in new} == {True, False}
    for row in new:
        name = row["group"]
        fold = int(hash_rank([name], seed=0, purpose="fold 0")[0]) % 3
        is_test = int(hash_rank([name], seed=0, purpose="test split")[0]) < 0.2 * 2**64
        expected = known.get(name, (fold, "test" if is_test else "train"))
        assert (row["fold"], row["split"]) == expected
    state = RunState.read(appended / "run" / "probes")
    assert (state.keys.find(hash_groups([row["group"] for row in new])) >= 0).all()


def test_appending_twice_is_appending_once(scored: Path, appended: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(scored, folder)
    added = pq.read_table(folder / "b.parquet")
    write(added.slice(0, 25), folder / "data" / "b.parquet")
    append(folder)
    write(added, folder / "data" / "b.parquet")
    append(folder)
    check_close(*(Run(path / "run").scores().to_arrow() for path in (folder, appended)))
    once, twice = files(appended / "run"), files(folder / "run")
    of_paths = ("scores.parquet", "shards.json")  # last digits of float32; the file names of another folder
    for content in (once, twice):
        for name in of_paths:
            del content[name]
    assert twice == once
    records = [record(path / "run") for path in (folder, appended)]
    for entry in records:
        del entry["source"]
    assert records[0] == records[1]


def test_nothing_to_append_changes_nothing(appended: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = files(appended / "run")
    with caplog.at_level("INFO"):
        append(appended)
        score(appended / "data" / "*.parquet", run=appended / "run", config=CONFIG, num_workers=0)
    assert "nothing to append" in caplog.text
    assert "is already scored with these data and this config" in caplog.text
    assert files(appended / "run") == before


@pytest.mark.slow
def test_killed_append_is_resumed_to_the_same_bytes(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    write(table(with_split=True).slice(0, NUM_OLD), tmp_path / "data" / "a.parquet")
    score(tmp_path / "data" / "*.parquet", run=tmp_path / "run", config=IN_PARTS, num_workers=0)
    write(table(with_split=True).slice(NUM_OLD), tmp_path / "b.parquet")
    for folder in folders:
        shutil.copytree(tmp_path / "run", folder / "run")
        shutil.copytree(tmp_path / "data", folder / "data")
    grow(folders[0], tmp_path / "b.parquet", config=IN_PARTS)
    before, counted = files(folders[1] / "run"), [0]
    scored_part, publish = stages._score, append_files.publish_appended

    def count(*values: Any) -> Any:
        counted[0] += 1
        return scored_part(*values)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_score", count)
    monkeypatch.setattr("mmaudit.cli.appending.publish_appended", die)
    with pytest.raises(KeyboardInterrupt):
        grow(folders[1], tmp_path / "b.parquet", config=IN_PARTS)
    assert {name: content for name, content in files(folders[1] / "run").items() if name[:7] != "stages/"} == before
    num_parts, counted[0] = counted[0], 0
    monkeypatch.setattr("mmaudit.cli.appending.publish_appended", publish)
    append(folders[1], config=IN_PARTS)
    assert (num_parts, counted[0]) == (5, 0)
    for folder in folders:
        (folder / "run" / "shards.json").unlink()  # names the files of its folder
    assert files(folders[1] / "run") == files(folders[0] / "run")
    first = pq.read_table(folders[0] / "run" / "scores").slice(0, NUM_OLD)
    assert first.equals(pq.read_table(tmp_path / "run" / "scores.parquet"))  # one part then, five now


def test_rows_may_be_added_only(scored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(scored, folder)
    rows, before = table().slice(0, NUM_OLD), files(folder / "run")
    write(rows.slice(3), folder / "data" / "a.parquet")
    with pytest.raises(RunError, match=r"3 of the 90 samples .* are not in"):
        append(folder)
    label = pa.array([(value + (row == 8)) % 9 for row, value in enumerate(rows["label"].to_pylist())])
    write(rows.set_column(1, "label", label), folder / "data" / "a.parquet")
    with pytest.raises(RunError, match="has another label, group, split or content"):
        append(folder)
    write(rows, folder / "data" / "a.parquet")
    with pytest.raises(RunError, match=r"is a run of another config: probe\.folds is 3"):
        append(folder, config=replace(CONFIG, probe=ProbeConfig(folds=4)))
    with pytest.raises(ConfigError, match="--append with --overwrite"):
        append(folder, overwrite=True)
    with pytest.raises(RunError, match="holds no finished run"):
        score(folder / "data" / "*.parquet", run=tmp_path / "none", append=True)
    assert files(folder / "run") == before
    (folder / "run" / "probes" / "state.json").unlink()
    with pytest.raises(RunError, match="keeps no probes that can score other rows"):
        append(folder)


def test_grown_data_need_the_option(scored: Path, appended: Path, tmp_path: Path) -> None:
    for source in (scored, appended):
        folder = tmp_path / source.parent.name
        shutil.copytree(source, folder)
        write(
            table(seed=1).set_column(0, "id", pa.array([f"n{row}" for row in range(NUM_ALL)])),
            folder / "data/c.parquet",
        )
        with pytest.raises(RunError, match="--append"):
            score(folder / "data" / "*.parquet", run=folder / "run", config=CONFIG, num_workers=0)


def test_manifests_of_earlier_scores_stay_usable(tmp_path: Path) -> None:
    rows = table()
    write(rows.slice(0, NUM_OLD), tmp_path / "data" / "a.parquet")
    score(tmp_path / "data" / "*.parquet", run=tmp_path / "run", config=CONFIG, num_workers=0)
    path = split(run=tmp_path / "run", config=CONFIG, subset="balanced:0.5", name="even").manifest
    assert path is not None
    before = path.read_bytes()
    write(rows.slice(NUM_OLD), tmp_path / "b.parquet")
    grow(tmp_path, tmp_path / "b.parquet")
    assert path.read_bytes() == before
    own, doubt = own_record(tmp_path / "run")
    assert (own is not None, doubt) == (True, "")
    manifest = read_manifest(path)
    origin = origin_of(path, manifest.provenance, compute_digests(path))
    assert (origin.doubt, origin.is_own) == ("", True)
    numbers = report_numbers(Run(tmp_path / "run"))
    assert [entry["of_this_run"] for entry in numbers["manifests"]] == [False]
    assert any("60 samples were appended" in text for text in numbers["verdict"]["warnings"])


def test_tables_that_depend_on_something_else_are_removed(tmp_path: Path) -> None:
    rows = pa.table({"id": ["a"]})
    appending.resumable_store(tmp_path / "append", "first").write("rows", rows)
    assert appending.resumable_store(tmp_path / "append", "first").has("rows")
    assert not appending.resumable_store(tmp_path / "append", "second").has("rows")
    (tmp_path / "append" / "config.json").write_text("{")
    assert not appending.resumable_store(tmp_path / "append", "second").has("rows")
