"""Tests of appending to a run in parts: unchanged parts are not read; stages, arrays and Ray give the same bytes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grown import CONFIG, NUM_OLD, check_close, files, record, table, with_copy, write

from mmaudit.audit.engine import selection, stages
from mmaudit.audit.engine.known_rows import KnownRows, merge_hashes
from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.audit.engine.run_state import Folds
from mmaudit.audit.errors import ConfigError, DatasetError, RunError
from mmaudit.audit.features import encoded_samples
from mmaudit.audit.locks import write_lock
from mmaudit.cli import append_files, appending, staging
from mmaudit.cli.provenance import origin_of, own_record
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import split
from mmaudit.rebalance.manifest import compute_digests, read_manifest

IN_PARTS = replace(CONFIG, parts=PartsConfig(rows=15))
pytestmark = pytest.mark.usefixtures("quick_scores")


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fingerprints be sums of digests, as those of more than a million rows are."""
    for module in (encoded_samples, selection, appending):
        monkeypatch.setattr(module, "SORTED_ROWS", 40)


@pytest.fixture
def folder(request: pytest.FixtureRequest, sums: None, tmp_path: Path) -> Path:
    """A folder with `data/a.parquet`, its run in six parts, and `data/b.parquet`, which can be appended."""
    rows, folder = table(by_group=getattr(request, "param", True)), tmp_path / "set"
    write(rows.slice(0, NUM_OLD), folder / "data" / "a.parquet")
    run(folder)
    write(rows.slice(NUM_OLD, 40), folder / "b.parquet")
    shutil.copy(folder / "b.parquet", folder / "data" / "b.parquet")
    return folder


with_and_without_groups = pytest.mark.parametrize(
    "folder", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["groups", "ids"], indirect=True
)


def run(folder: Path, **options: Any) -> Any:
    return score(folder / "data" / "*.parquet", run=folder / "run", config=IN_PARTS, num_workers=0, **options)


def read_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the parts whose rows are read."""
    read: list[int] = []
    write_rows = stages._write_rows

    def record_part(job: Any, part: Any) -> None:
        read.append(part.index)
        write_rows(job, part)

    monkeypatch.setattr(stages, "_write_rows", record_part)
    return read


@with_and_without_groups
def test_only_parts_that_changed_are_read_and_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"part-{number:05d}.parquet" for number in range(5)]
    before = [(folder / "run" / "scores" / name).stat().st_ino for name in names]
    old = Run(folder / "run").scores().to_arrow()
    read = read_shards(monkeypatch)
    run(folder, append=True)
    assert read == [5, 6, 7, 8]  # the last one of before is written again
    assert [(folder / "run" / "scores" / name).stat().st_ino for name in names] == before
    assert len(list((folder / "run" / "scores").iterdir())) == 9
    scores = Run(folder / "run").scores()
    assert scores.to_arrow().slice(0, NUM_OLD).equals(old)
    assert scores.provenance["fingerprint"] == record(folder / "run")["fingerprint"]
    assert record(folder / "run")["counts"] == {"input": 130, "scored": 130, "quarantined": 0}
    read.clear()
    run(folder)  # the same data: nothing to do
    assert read == [8]


@with_and_without_groups
def test_the_whole_is_that_of_an_append_that_reads_all(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "all")
    (tmp_path / "all" / "probes" / "rows.json").unlink()  # as of a run of an earlier version
    run(folder, append=True)
    score(folder / "data" / "*.parquet", run=tmp_path / "all", config=IN_PARTS, num_workers=0, append=True)
    assert (
        files(folder / "run" / "scores")["part-00008.parquet"]
        == files(tmp_path / "all" / "scores")["part-00008.parquet"]
    )
    assert files(folder / "run" / "probes") == files(tmp_path / "all" / "probes")
    records = [record(path) for path in (folder / "run", tmp_path / "all")]
    assert records[0] == records[1]
    assert Run(folder / "run").scores().to_arrow().equals(Run(tmp_path / "all").scores().to_arrow())


def test_a_fingerprint_of_appended_rows_is_that_of_all_rows(folder: Path, tmp_path: Path) -> None:
    run(folder, append=True)
    rows = pa.concat_tables([pq.read_table(folder / "data" / f"{name}.parquet") for name in "ab"])
    scores = Run(folder / "run").scores().to_arrow().select(["sample_id", "split"])
    rows = rows.append_column("split", scores["split"])
    write(rows, tmp_path / "whole.parquet")
    config = replace(IN_PARTS, data=replace(IN_PARTS.data, split="split"))
    whole = score(tmp_path / "whole.parquet", run=tmp_path / "run", config=config, num_workers=0)
    assert whole.record["fingerprint"] == record(folder / "run")["fingerprint"]


def test_splits_of_a_run_with_linked_parts_are_trusted(folder: Path) -> None:
    run(folder, append=True)
    path = split(run=folder / "run", config=IN_PARTS, subset="balanced:0.9", name="even").manifest
    assert own_record(folder / "run")[1] == ""
    assert path is not None
    origin = origin_of(path, read_manifest(path).provenance, compute_digests(path))
    assert (origin.doubt, origin.is_own) == ("", True)


def in_stages(folder: Path, count: int, *, repeat: bool = False) -> None:
    """Run all stages of an append, the processes of a stage in reverse order."""
    for stage in staging.STAGES:
        shards = [f"{number}/{count}" for number in range(count, 0, -1)]
        for shard in shards if stage in staging.BY_PART else [None]:
            for _ in range(1 + (repeat and stage != "merge")):
                run(folder, append=True, stage=stage, shard=shard)


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_stages_give_the_bytes_of_one_process(count: int, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "before")
    run(folder, append=True)
    expected, stated = files(folder / "run"), record(folder / "run")
    shutil.rmtree(folder / "run")
    shutil.copytree(tmp_path / "before", folder / "run")
    in_stages(folder, count, repeat=count == 3)
    assert files(folder / "run") == expected
    assert record(folder / "run") == stated
    assert not (folder / "run" / "stages").exists()
    in_stages(folder, 1)  # a script that is submitted again has nothing to append
    assert files(folder / "run") == expected


def test_a_stage_states_what_follows(folder: Path) -> None:
    done = run(folder, append=True, stage="encode", shard="2/2")
    assert (done.parts, done.next_stage, done.to_dict()["append"]) == ((6, 8), "fit", True)
    with pytest.raises(RunError, match="run the stage that writes it again, --stage encode"):
        run(folder, append=True, stage="score")
    with pytest.raises(ConfigError, match="--shard 1/2 of --stage fit"):
        run(folder, append=True, stage="fit", shard="1/2")


@pytest.mark.parametrize("stage", ["fit", "score", "merge"])
def test_data_or_a_run_that_change_between_stages_are_refused(stage: str, folder: Path, tmp_path: Path) -> None:
    run(folder, append=True, stage="encode")
    before = files(folder / "run" / "scores")
    shutil.copytree(folder / "data", tmp_path / "data")
    write(pq.read_table(folder / "b.parquet").slice(0, 30), folder / "data" / "b.parquet")
    with pytest.raises(RunError, match="begin with --append --stage encode"):
        run(folder, append=True, stage=stage)
    assert files(folder / "run" / "scores") == before
    run(folder, append=True)  # by another process meanwhile
    with pytest.raises(RunError, match="rows were appended meanwhile; begin with --append --stage encode"):
        run(folder, append=True, stage=stage)
    assert record(folder / "run")["counts"]["input"] == 120  # type: ignore[index]


def test_an_old_file_that_changed_is_read_and_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, before = pq.read_table(folder / "data" / "a.parquet"), files(folder / "run")
    label = pa.array([(value + (row == 8)) % 9 for row, value in enumerate(rows["label"].to_pylist())])
    write(rows.set_column(1, "label", label), folder / "data" / "a.parquet")
    with pytest.raises(RunError, match="has another label, group, split or content"):
        run(folder, append=True)
    write(rows.slice(3), folder / "data" / "a.parquet")
    with pytest.raises(RunError, match=r"3 of the 90 samples .* are not in"):
        run(folder, append=True)
    write(rows, folder / "data" / "a.parquet")  # the same rows, at another time
    assert {name: content for name, content in files(folder / "run").items() if name[:6] != "stages"} == before
    read = read_shards(monkeypatch)
    run(folder, append=True)
    assert read == list(range(9))


@with_and_without_groups
def test_ids_and_copies_of_unread_parts_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, new = pq.read_table(folder / "data" / "a.parquet"), pq.read_table(folder / "b.parquet")
    same_id = new.slice(0, 1).set_column(0, "id", pa.array([rows["id"][4].as_py()]))
    write(pa.concat_tables([new, same_id]), folder / "data" / "b.parquet")
    with pytest.raises(DatasetError, match="s0004"):
        run(folder, append=True)
    write(pa.concat_tables([new, with_copy(rows, of=4, name="copy")]), folder / "data" / "b.parquet")
    read = read_shards(monkeypatch)
    run(folder, append=True)
    assert read[:4] == [5, 6, 7, 8]  # whether vectors recur by chance is decided on all rows
    assert set(read[4:]) >= {0, 1, 2, 3, 4}
    quarantined = pq.read_table(folder / "run" / "quarantine.parquet").to_pylist()
    assert [(row["sample_id"], row["reason"]) for row in quarantined] == [("copy", "duplicate")]


@pytest.mark.usefixtures("sums")
def test_new_rows_and_the_last_part_may_lack_a_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(IN_PARTS, probe=replace(IN_PARTS.probe, folds=2, repeats=1))
    rows, num_known = table(), NUM_OLD - 15
    third = [*rows["audio"].to_pylist()[:num_known], *[None] * (len(rows) - num_known)]
    rows = rows.append_column("third", pa.array(third, pa.list_(pa.float32())))
    options: dict[str, Any] = {"config": config, "num_workers": 0}
    write(rows.slice(0, NUM_OLD), tmp_path / "data" / "a.parquet")
    score(tmp_path / "data" / "*.parquet", run=tmp_path / "run", **options)
    write(rows.slice(NUM_OLD, 40), tmp_path / "data" / "b.parquet")
    read = read_shards(monkeypatch)
    score(tmp_path / "data" / "*.parquet", run=tmp_path / "run", append=True, **options)
    assert read == [5, 6, 7, 8]
    scores = Run(tmp_path / "run").scores().to_arrow()
    assert len(scores) == 130
    assert scores["confidence_third"].is_null().to_pylist() == [row >= num_known for row in range(130)]
    assert scores["confidence_audio"].null_count == scores["confidence_visual"].null_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["select_new", "score_part", "publish_appended", "replacing"])
def test_killed_between_stages_is_resumed_to_the_same_bytes(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "run", tmp_path / "before")
    run(folder, append=True)
    expected, stated = files(folder / "run"), record(folder / "run")
    shutil.rmtree(folder / "run")
    shutil.copytree(tmp_path / "before", folder / "run")
    before = files(folder / "run")
    module: Any = {"score_part": stages, "replacing": append_files}.get(name, appending)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(KeyboardInterrupt):
            in_stages(folder, 2)
    assert {file: content for file, content in files(folder / "run").items() if file[:7] != "stages/"} == before
    in_stages(folder, 3)
    assert files(folder / "run") == expected
    assert record(folder / "run") == stated


def test_a_second_append_at_once_waits_or_is_refused(folder: Path) -> None:
    with (
        write_lock(folder / "run", "stages/append-score-1-of-2", command="mmaudit score --append --stage score"),
        pytest.raises(RunError, match="is being written by mmaudit score --append --stage score"),
    ):
        run(folder, append=True)
    run(folder, append=True, stage="encode")
    with (
        write_lock(folder / "run", "stages/append-encode-1-of-2", command="mmaudit score --append --stage encode"),
        pytest.raises(RunError, match="is being written"),
    ):
        run(folder, append=True, stage="encode", shard="1/2")


@pytest.mark.slow
def test_two_steps_are_one_step(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "before")
    run(folder, append=True)
    once = Run(folder / "run").scores().to_arrow()
    probes = files(folder / "run" / "probes")
    shutil.rmtree(folder / "run")
    shutil.copytree(tmp_path / "before", folder / "run")
    rows = pq.read_table(folder / "b.parquet")
    stamp = (folder / "data" / "b.parquet").stat()
    write(rows.slice(0, 25), folder / "data" / "b.parquet")
    run(folder, append=True)
    shutil.copy(folder / "b.parquet", folder / "data" / "b.parquet")
    os.utime(folder / "data" / "b.parquet", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run(folder, append=True)
    check_close(Run(folder / "run").scores().to_arrow(), once)
    assert files(folder / "run" / "probes") == probes


@pytest.mark.slow
def test_ray_gives_the_bytes_of_one_process(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    shutil.copytree(folder / "run", tmp_path / "before")
    run(folder, append=True)
    expected, stated = files(folder / "run"), record(folder / "run")
    shutil.rmtree(folder / "run")
    shutil.copytree(tmp_path / "before", folder / "run")
    score(
        folder / "data" / "*.parquet",
        run=folder / "run",
        config=IN_PARTS,
        append=True,
        engine="ray",
        num_workers=2,
        settings=["ray.memory_gb=0.5"],
    )
    assert files(folder / "run") == expected
    assert record(folder / "run") == stated


def test_hashes_are_merged_in_order() -> None:
    first, second = np.array([2, 5, 9], np.uint64), np.array([7, 2, 7, 1], np.uint64)
    assert merge_hashes(first, second).tolist() == [1, 2, 5, 7, 9]


def test_folds_of_new_entries_are_merged_into_known_ones() -> None:
    first = Folds.of(np.array([9, 2, 5], np.uint64), np.array([[0, -1, 1], [1, -1, 0]], np.int16))
    second = Folds.of(np.array([5, 2, 7], np.uint64), np.array([[3, 4, 2], [3, 4, 2]], np.int16))
    merged = first.merge(second)
    assert merged.hash.tolist() == [2, 5, 7, 9]
    assert merged.fold.tolist() == [[4, 1, 2, 0], [4, 0, 2, 1]]
    assert first.fold[0, 0] == -1  # unchanged


def test_damaged_file_of_known_rows_is_named(folder: Path) -> None:
    file = folder / "run" / "probes" / "rows.json"
    known = KnownRows.read(file.parent)
    assert known is not None
    assert [part.num_rows for part in known.parts] == [15] * 6
    file.write_text(file.read_text().replace('"sum": "', '"sum": "x'))
    with pytest.raises(RunError, match=r"rows\.json is damaged"):
        run(folder, append=True)
