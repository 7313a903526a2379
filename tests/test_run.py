"""Tests of the run folder: other folders are refused, and the feature cache is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import run_record

from mmaudit.audit.errors import ConfigError, RunError
from mmaudit.audit.scores.table import ScoreTable, write_scores
from mmaudit.cli.run import Run
from mmaudit.rebalance.manifest import dropped_path

RUN_FILES = [
    "run.json",
    "scores.parquet",
    "quarantine.parquet",
    "mixture.json",
    "recovery.json",
    "report.html",
    "report.json",
    "figures/gap.png",
    "manifests/balanced.parquet",
    "manifests/balanced.dropped.parquet",
    "finetune/balanced-concat-uniform/metrics.json",
    "finetune/balanced-concat-uniform/state/last.pt",
]
FEATURES = ["features/audio-0123/000000.arrow", "features/visual-0123/000000.arrow"]


def fill(folder: Path, names: list[str]) -> Run:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return Run(folder)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_file_names_of_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    paths = [run.record_file, run.scores_file, run.quarantine_file, run.mixture_file, run.recovery_file]
    paths += [run.report_file, run.report_file.with_suffix(".json"), run.figures / "gap.png"]
    paths += [run.manifest("balanced"), dropped_path(run.manifest("balanced"))]
    paths += [run.finetune("balanced-concat-uniform") / name for name in ("metrics.json", "state/last.pt")]
    assert [str(path.relative_to(tmp_path)) for path in paths] == RUN_FILES
    assert run.features == tmp_path / "features"


@pytest.mark.parametrize(
    "names", [None, [], FEATURES, RUN_FILES + FEATURES, RUN_FILES[1:3], [".DS_Store"], ["run.json", "notes.txt"]]
)
def test_new_empty_and_run_folders_are_accepted(tmp_path: Path, names: list[str] | None) -> None:
    folder = tmp_path / "run"
    if names is not None:
        folder.mkdir()
        fill(folder, names)
    Run(folder).check_folder()
    assert folder.exists() == (names is not None)
    assert names is None or files(folder) == sorted(names)


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, ["zebra.jpg", "cat.jpg", *FEATURES])
    with pytest.raises(RunError, match=r"holds cat\.jpg and is not a run; pass another folder with --run"):
        Run(tmp_path).check_folder()
    with pytest.raises(RunError, match=r"cat\.jpg is a file; pass a folder with --run"):
        Run(tmp_path / "cat.jpg").check_folder()


@pytest.mark.parametrize("name", ["../escaped", "a/b", "a\\b", ".hidden", "balanced.dropped", ""])
def test_name_leading_out_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    for path_of in (Run(tmp_path).manifest, Run(tmp_path).finetune):
        with pytest.raises(ConfigError, match="a name must not contain"):
            path_of(name)


def test_record_roundtrip(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run")
    assert not run.is_scored()
    run.write_record(run_record(seed=3))
    assert run.is_scored()
    assert run.record() == run_record(seed=3)


@pytest.mark.parametrize("key", run_record())
def test_record_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    run = Run(tmp_path)
    record = run_record()
    del record[key]
    run.write_record(record)
    with pytest.raises(RunError, match=f"run.json .* lacks {key}"):
        run.record()


def test_record_of_an_older_schema_names_both_versions(tmp_path: Path) -> None:
    run = Run(tmp_path)
    record = run_record(schema="mmaudit.run/1", version="0.0.9")
    run.write_record({key: value for key, value in record.items() if key != "num_classes"})
    with pytest.raises(RunError, match=r"was written by mmaudit 0\.0\.9, as mmaudit\.run/1 in place of mmaudit\.run/3"):
        run.record()


def test_scores_need_a_finished_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    scores = ScoreTable(
        sample_id=np.array(["a", "b"], dtype=object),
        label=np.array([0, 1], np.int32),
        label_name=np.array(["x", "y"], dtype=object),
        modalities=("audio", "visual"),
        confidence=np.array([[0.25, 0.5], [1, 0]], np.float32),
    )
    write_scores(scores, run.scores_file)
    words = f"{tmp_path} holds no finished run; create one with: mmaudit score DATA --run {tmp_path}"
    for read in (run.record, run.scores):
        with pytest.raises(RunError) as caught:
            read()
        assert str(caught.value) == words
    run.write_record(run_record())
    assert run.scores().to_arrow().equals(scores.to_arrow())


def test_manifests_are_listed_without_their_dropped_rows(tmp_path: Path) -> None:
    names = ["b.parquet", "b.dropped.parquet", "a.parquet", "notes.txt", ".c.parquet"]
    run = fill(tmp_path, [f"manifests/{name}" for name in names])
    assert [path.name for path in run.manifests()] == ["a.parquet", "b.parquet"]
    assert Run(tmp_path / "none").manifests() == []


def test_unfinished_fine_tunings_are_not_listed(tmp_path: Path) -> None:
    names = ["b/metrics.json", "a/metrics.json", "c/state/last.pt", ".new/a/metrics.json", ".new/metrics.json"]
    run = fill(tmp_path, [f"finetune/{name}" for name in names])
    assert run.finetunes() == [run.finetune("a"), run.finetune("b")]


def test_manifest_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    run = fill(tmp_path / "run", ["manifests/balanced.parquet", "manifests/gmm-balanced.parquet"])
    elsewhere = tmp_path / "my.parquet"
    elsewhere.write_text("")
    assert run.find_manifest("balanced") == run.manifest("balanced")
    assert run.find_manifest(str(elsewhere)) == elsewhere
    assert run.find_manifest(str(run.manifest("gmm-balanced"))) == run.manifest("gmm-balanced")
    with pytest.raises(
        RunError, match=r"no manifest balancd; did you mean balanced\? .*balanced, gmm-balanced\); .*split --balanced"
    ):
        run.find_manifest("balancd")
    with pytest.raises(RunError, match=r"no manifest balanced: .*none has no manifests; create one with"):
        Run(tmp_path / "none").find_manifest("balanced")


@pytest.mark.parametrize("name", ["a" * 250, "é" * 120, "a\0b", "a\nb", "\x1b[31m"])
def test_name_no_file_system_allows_is_refused(tmp_path: Path, name: str) -> None:
    for path_of in (Run(tmp_path).manifest, Run(tmp_path).finetune):
        with pytest.raises(ConfigError, match="a name has at most 200 bytes and no control characters"):
            path_of(name)


def test_probe_report_of_other_modalities_is_refused(tmp_path: Path) -> None:
    run, probe_report = Run(tmp_path), run_record()["probe_report"]
    uncalibrated = [{**probe_metric, "calibration": None} for probe_metric in probe_report["probe_metrics"]]
    damaged: list[dict[str, Any]] = [
        {"modalities": []},
        {"modalities": run_record()["modalities"][:1]},
        {"probe_report": {**probe_report, "gains": probe_report["gains"][:1]}},
        {"probe_report": {**probe_report, "probe_metrics": probe_report["probe_metrics"][1:]}},
        {"probe_report": {**probe_report, "gain_over_best": {**probe_report["gain_over_best"], "name": "smell"}}},
        {"probe_report": {**probe_report, "probe_metrics": uncalibrated}},
    ]
    for changes in damaged:
        run.write_record(run_record(**changes))
        with pytest.raises(RunError, match=r"run\.json is damaged: its probe_report"):
            run.record()


def record_with(**changes: Any) -> str:
    return json.dumps(run_record() | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "the document is"),
        (record_with(config=5), "config is 5; it must be an object"),
        (record_with(modalities=[5]), r"modalities\[0\] is 5; it must be an object"),
        (record_with(counts={"input": "x", "scored": 1, "quarantined": 0}), "counts.input is"),
        (record_with(probe_report={"metric": "accuracy"}), "probe_report lacks chance"),
        ("[" * 5_000, "nested more than 64 levels"),
        ('{"seed": ' + "9" * 5_000 + "}", "integer string conversion"),
    ],
)
def test_record_of_another_shape_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=rf"run\.json cannot be read: .*{reason}"):
        Run(tmp_path).record()
