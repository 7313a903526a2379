"""Tests of other data scored by the probes of a run: its own data have its own scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from grown import CONFIG, IN_PARTS, NUM_OLD, QUICK, check_close, files, table, with_copy, write
from typer.testing import CliRunner

import mmaudit
from mmaudit.audit.dataset.dataset import DataConfig
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError, RunError
from mmaudit.audit.remote import requests
from mmaudit.cli import applying
from mmaudit.cli.applying import apply
from mmaudit.cli.config import RunConfig
from mmaudit.cli.main import app
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score

pytestmark = pytest.mark.usefixtures("quick_scores")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 90 grouped samples; read-only."""
    folder = tmp_path_factory.mktemp("scored")
    write(table().slice(0, NUM_OLD), folder / "old.parquet")
    score(folder / "old.parquet", run=folder / "run", config=CONFIG, num_workers=0)
    return folder / "run"


def own_scores(run: Path, applied: Path) -> tuple[pa.Table, pa.Table]:
    """Return the scores of a run and those of its own data by apply, which has no halves of the features."""
    first, second = (
        Run(folder).scores().to_arrow() if folder == run else scores_of(folder) for folder in (run, applied)
    )
    assert {name for name in first.column_names if not name.startswith("half_")} == {*second.column_names}
    return first.select(second.column_names), second


def scores_of(folder: Path) -> pa.Table:
    return mmaudit.read_scores(Run(folder).score_source).to_arrow()


@pytest.mark.parametrize("by_group", [pytest.param(True, marks=pytest.mark.slow), False])
def test_own_data_have_their_own_scores(by_group: bool, tmp_path: Path) -> None:
    rows = table(by_group=by_group)
    write(rows, tmp_path / "d.parquet")
    config = IN_PARTS if by_group else CONFIG
    score(tmp_path / "d.parquet", run=tmp_path / "run", config=config, num_workers=0)
    result = apply(tmp_path / "run", tmp_path / "d.parquet", num_workers=0)
    assert result.folder == tmp_path / "run" / "applied" / "d"
    first, second = own_scores(tmp_path / "run", result.folder)
    assert second.equals(first)
    assert result.num_known == result.num_scored == len(rows)
    assert result.record["comparison"]["gap"]["difference"]["mean"] == 0
    renamed = rows.set_column(0, "id", pa.array([f"other-{row}" for row in range(len(rows))]))
    write(renamed.drop_columns(["group"]) if by_group else renamed, tmp_path / "renamed.parquet")
    group = "none" if by_group else None
    by_content = apply(tmp_path / "run", tmp_path / "renamed.parquet", num_workers=0, group=group)
    again = scores_of(by_content.folder)
    assert again["sample_id"].to_pylist() == renamed["id"].to_pylist()
    check_close(again.select(["fold", "confidence_audio"]), first.select(["fold", "confidence_audio"]))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_own_label_sets_and_numbers_have_their_own_scores(task: str, tmp_path: Path) -> None:
    rows, rng = table(), np.random.default_rng(3)
    labels: dict[str, Any] = {
        "multilabel": [["a", "b"][: 1 + row % 2] if row % 9 else ["c"] for row in range(len(rows))],
        "regression": np.round(rng.random(len(rows)), 1),
    }
    rows = rows.set_column(1, "label", pa.array(labels[task]))
    write(rows, tmp_path / "d.parquet")
    config = replace(RunConfig(), probe=QUICK, data=DataConfig(task=task))
    score(tmp_path / "d.parquet", run=tmp_path / "run", config=config, num_workers=0)
    result = apply(tmp_path / "run", tmp_path / "d.parquet", num_workers=0)
    first, second = own_scores(tmp_path / "run", result.folder)
    assert second.equals(first)
    write(rows.slice(0, 40), tmp_path / "few.parquet")  # its own deciles and common sets would be other ones
    few = scores_of(apply(tmp_path / "run", tmp_path / "few.parquet", num_workers=0).folder)
    check_close(few, first.slice(0, 40))


def test_unknown_classes_and_copies(run: Path, tmp_path: Path) -> None:
    rows = table(seed=5).slice(0, 30).set_column(0, "id", pa.array([f"n{row}" for row in range(30)]))
    label = pa.array([99 if row == 3 else value for row, value in enumerate(rows["label"].to_pylist())])
    rows = rows.set_column(1, "label", label)
    copy = with_copy(table(), of=2, name="copy")
    copy = copy.set_column(copy.column_names.index("group"), "group", pa.array(["new"]))
    write(pa.concat_tables([rows, copy]), tmp_path / "new.parquet")
    result = apply(run, tmp_path / "new.parquet", num_workers=0, out=tmp_path / "out")
    assert (result.num_samples, result.num_scored) == (31, 30)
    assert result.record["quarantine"] == {"unknown-label": 1}
    scores = {row["sample_id"]: row for row in scores_of(tmp_path / "out").to_pylist()}
    own = {row["sample_id"]: row for row in Run(run).scores().to_arrow().to_pylist()}
    assert scores["copy"]["fold"] == own["s0002"]["fold"]
    assert scores["copy"]["confidence_audio"] == pytest.approx(own["s0002"]["confidence_audio"], abs=1e-6)
    assert scores["n4"]["label_name"] == "4"  # not renumbered without the class 3
    provenance = pq.read_schema(tmp_path / "out" / "scores.parquet").metadata[b"mmaudit"]
    assert json.loads(provenance)["applied"]["run"] == Run(run).record()["fingerprint"]


def test_content_in_another_group_is_counted(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = table()
    folds = dict(zip(*(Run(run).scores().to_arrow()[name].to_pylist() for name in ("group", "fold")), strict=True))
    group = next(name for name, fold in folds.items() if fold != folds["g0"])
    copy = with_copy(rows, of=0, name="copy")
    copy = copy.set_column(copy.column_names.index("group"), "group", pa.array([group]))
    write(copy, tmp_path / "copy.parquet")
    apply(run, tmp_path / "copy.parquet", num_workers=0, out=tmp_path / "out")
    assert "1 samples have the content of a sample of another group" in caplog.text
    assert scores_of(tmp_path / "out")["fold"].to_pylist() == [folds[group]]


THREE = replace(CONFIG, data=DataConfig(modality=("audio=audio", "visual=visual", "third=third")))


def with_third(rows: pa.Table, *, type_: pa.DataType | None = None) -> pa.Table:
    """Add a third modality; with a type, one that is null in all rows."""
    third = pa.nulls(len(rows), type_) if type_ is not None else rows["audio"].combine_chunks()
    return rows.append_column("third", third)


def test_data_that_lack_a_modality_are_scored_by_the_others(tmp_path: Path) -> None:
    rows = table(by_group=False)
    write(with_third(rows.slice(0, NUM_OLD)), tmp_path / "old.parquet")
    score(tmp_path / "old.parquet", run=tmp_path / "run", config=THREE, num_workers=0)
    types = {"vectors": rows["audio"].type, "lists": pa.list_(pa.float32())}
    if int(pa.__version__.partition(".")[0]) <= 21:  # it cannot read vectors of fixed size of which some are null
        del types["vectors"]
    tables = []
    for name, type_ in types.items():
        write(with_third(rows.slice(NUM_OLD), type_=type_), tmp_path / f"{name}.parquet")
        result = apply(tmp_path / "run", tmp_path / f"{name}.parquet", num_workers=0)
        assert (result.num_samples, result.num_scored) == (60, 60)
        tables.append(scores_of(result.folder))
        assert tables[-1]["confidence_third"].null_count == 60
        assert tables[-1]["confidence_audio"].null_count == tables[-1]["gap"].null_count == 0
        assert tables[-1].equals(tables[0])
    write(with_third(rows, type_=pa.null()), tmp_path / "untyped.parquet")
    with pytest.raises(DatasetError, match="a column of type null cannot be read as features"):
        apply(tmp_path / "run", tmp_path / "untyped.parquet", num_workers=0)


def test_rerun_gives_same_bytes_and_replaces(run: Path, tmp_path: Path) -> None:
    write(table().slice(60, 60), tmp_path / "new.parquet")
    apply(run, tmp_path / "new.parquet", num_workers=0, out=tmp_path / "out")
    before = files(tmp_path / "out")
    assert {"apply.json", "scores.parquet", "quarantine.parquet"} == set(before)
    apply(run, tmp_path / "new.parquet", num_workers=0, out=tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_tables_of_an_interrupted_command_with_another_label_column_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table(by_group=False)
    rows = rows.append_column("other", rows["label"].take(pa.array(np.roll(np.arange(len(rows)), 1))))
    write(rows, tmp_path / "d.parquet")
    config = replace(IN_PARTS, data=DataConfig(modality=("audio=audio", "visual=visual")))
    score(tmp_path / "d.parquet", run=tmp_path / "run", config=config, num_workers=0, label="label")
    expected = scores_of(apply(tmp_path / "run", tmp_path / "d.parquet", num_workers=0, out=tmp_path / "clean").folder)
    with monkeypatch.context() as patch:
        patch.setattr(applying, "score", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            apply(tmp_path / "run", tmp_path / "d.parquet", num_workers=0, label="other")
    assert (tmp_path / "run" / "applied" / "d" / "stages").exists()
    assert scores_of(apply(tmp_path / "run", tmp_path / "d.parquet", num_workers=0).folder).equals(expected)


def test_probes_that_change_meanwhile_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(table().slice(60, 60), tmp_path / "new.parquet")
    monkeypatch.setattr(applying, "_digest_probes", Mock(side_effect=[{"state.json": "a"}, {"state.json": "b"}]))
    with pytest.raises(RunError, match="was scored anew while its probes were applied"):
        apply(run, tmp_path / "new.parquet", num_workers=0, out=tmp_path / "out")
    assert not files(tmp_path / "out")


def test_vectors_of_two_labels_are_vectors_of_the_run(tmp_path: Path) -> None:
    """Where no vector of the data repeats an element, they could be names of labels."""
    rows, rng = table(by_group=False), np.random.default_rng(3)
    vectors = rng.integers(0, 2, (len(rows), 2))
    rows = rows.set_column(1, "label", pa.array(vectors.tolist()))
    write(rows, tmp_path / "d.parquet")
    config = replace(CONFIG, data=DataConfig(task="multilabel"))
    score(tmp_path / "d.parquet", run=tmp_path / "run", config=config, num_workers=0)
    own = Run(tmp_path / "run").scores().to_arrow()
    one_label = np.flatnonzero(vectors.sum(axis=1) == 1)
    write(rows.take(pa.array(one_label)), tmp_path / "few.parquet")
    few = scores_of(apply(tmp_path / "run", tmp_path / "few.parquet", num_workers=0).folder)
    names = dict(zip(own["sample_id"].to_pylist(), own["label_name"].to_pylist(), strict=True))
    assert few["label_name"].to_pylist() == [names[name] for name in few["sample_id"].to_pylist()]
    write(rows.set_column(1, "label", pa.array([["0", "1"]] * len(rows))), tmp_path / "names.parquet")
    with pytest.raises(DatasetError, match="0/1 vectors of length 2, and those of the data not"):
        apply(tmp_path / "run", tmp_path / "names.parquet", num_workers=0)


def test_data_that_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:
    rows = table().slice(0, 20)
    write(rows.drop_columns(["label"]), tmp_path / "unlabelled.parquet")
    with pytest.raises(DatasetError, match="confidences in the true class"):
        apply(run, tmp_path / "unlabelled.parquet")
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(200, np.float32)), 10)
    write(rows.set_column(2, "audio", wide), tmp_path / "wide.parquet")
    with pytest.raises(DatasetError, match="length of audio is 10, in the run 9"):
        apply(run, tmp_path / "wide.parquet")
    write(rows.set_column(1, "label", pa.array(["cat"] * 20)), tmp_path / "cats.parquet")
    with pytest.raises(DatasetError, match="no label is a class of the run, which has 0, 1"):
        apply(run, tmp_path / "cats.parquet", num_workers=0, out=tmp_path / "out")
    write(rows, tmp_path / "few.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(RunError, match="is no result of apply"):
        apply(run, tmp_path / "few.parquet", out=tmp_path / "full")
    assert not (tmp_path / "out" / "apply.json").exists()


def test_code_named_by_a_run_of_others_is_not_imported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["modalities"][0]["encoder"] = "hostile_encoder:encode"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ManifestError, match=r"not trusted to name data or code.* pass --encoder audio=hostile_encoder"):
        apply(tmp_path / "run", run.parent / "old.parquet")


def test_command_prints_the_comparison(run: Path, tmp_path: Path) -> None:
    write(table().slice(NUM_OLD), tmp_path / "new.parquet")
    words = ["apply", str(run), str(tmp_path / "new.parquet"), "--num-workers", "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "scored 60 of 60 samples by the probes of" in done.stdout
    for text in ("mean", "confidence audio", "KS distance", "balanced by the mixture of the run", "results:"):
        assert text in done.stdout
    done = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(done.stdout)["counts"]["known"] == 45


def test_run_at_a_url_is_applied_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    url, data = "memory://bucket/applied-run", tmp_path / "data" / "d.parquet"
    try:
        write(table().slice(0, NUM_OLD), data)
        score(data, run=url, config=CONFIG, num_workers=0)
        shutil.rmtree(tmp_path / "cache")  # as on another machine
        write(table().slice(NUM_OLD), tmp_path / "new.parquet")
        apply(url, tmp_path / "new.parquet", num_workers=0)
        with pytest.raises(ConfigError, match="pass a folder"):
            apply(url, tmp_path / "new.parquet", out="memory://bucket/out")
        write(table(), data)
        score(data, run=url, config=CONFIG, num_workers=0, append=True)
        remote = MemoryFileSystem()
        stated = json.loads(remote.cat_file("/bucket/applied-run/applied/new/apply.json"))
        assert stated["counts"]["known"] == 45
        assert json.loads(remote.cat_file("/bucket/applied-run/run.json"))["appended"]["scored"] == 60
    finally:
        MemoryFileSystem.store.clear()
        requests.forget()
