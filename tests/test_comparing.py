"""Tests of compare: cells and controls, reruns, interruptions, and one-line errors for bad input."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import gaussian_table
from runs import copy_run, score_all_and_few
from typer.testing import CliRunner, Result

import mmaudit
from mmaudit.audit.errors import ConfigError, ManifestError, RunError
from mmaudit.cli.comparison import cells as cells_module
from mmaudit.cli.comparison import schedule as schedule_module
from mmaudit.cli.comparison.cells import Cell, Loading, clear_loaded, load_manifests, train_cell
from mmaudit.cli.comparison.results import study_design
from mmaudit.cli.config import RunConfig
from mmaudit.cli.main import app
from mmaudit.cli.provenance import SourceOptions
from mmaudit.cli.report.page import render, report_numbers
from mmaudit.cli.run import Run
from mmaudit.cli.training_source import EncodedSource, ManifestSource
from mmaudit.train.comparison import figures
from mmaudit.train.comparison.cells import MethodSpec, parse_method
from mmaudit.train.comparison.findings import Filtering
from mmaudit.train.comparison.verdicts import Comparison
from mmaudit.train.evaluate import compute_metrics

pytestmark = pytest.mark.usefixtures("no_reports")

torch.set_num_threads(1)

METHODS = ["joint", "bss-h+sum", "ogm-ge: balancing.ogm.alpha=0.8"]
QUICK = {"finetune.epochs": 2, "finetune.hidden": 8, "finetune.batch_size": 32}
FRAMES = ("runs", "per_sample", "summary", "metrics", "missing")
TABLES = (*(f"{name}.parquet" for name in FRAMES), "findings.json", "table.md", "table.csv", "table.tex")


def mmaudit_cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def compare(run: Path, **options: Any) -> Comparison:
    given: dict[str, Any] = {"manifest": ["few", "all"], "method": METHODS, "seeds": 2, "settings": QUICK}
    return mmaudit.compare(**{**given, "run": run, "num_workers": 0, "progress": False, **options})


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module", autouse=True)
def drawing_only_the_forest_plot() -> Iterator[None]:
    """Draw one figure per comparison: all of them take seconds, and test_comparison_figures.py tests them."""
    draw = figures.draw_files
    with pytest.MonkeyPatch.context() as patch:
        kinds = figures.figure_kinds
        patch.setattr(
            figures,
            "draw_files",
            lambda tables: draw(tables, [kind for kind in kinds(tables) if kind == "forest"], formats=("svg",)),
        )
        yield


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run with the manifests `all` and `few`; read-only."""
    return score_all_and_few(tmp_path_factory.mktemp("comparing"))


@pytest.fixture(scope="module")
def finished(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A finished comparison; its run is read-only."""
    return compare(copy_run(scored, tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Path:
    """A writable copy of the scored run."""
    return copy_run(scored, tmp_path / "run")


@pytest.fixture
def done(finished: Comparison, tmp_path: Path) -> Path:
    """A writable copy of the run with the finished comparison."""
    assert finished.folder is not None
    return copy_run(finished.folder.parents[1], tmp_path / "run")


def test_every_cell_is_tested_on_one_test_set_with_equal_samples_seen(finished: Comparison) -> None:
    runs = finished.runs[finished.runs["subset"] == "all"]
    conditions = {*zip(runs["manifest"], runs["method"], strict=True)}
    controls = ["audio alone", "visual alone", "anti-curriculum for bss-h+sum", "shuffled labels"]
    expected = {(manifest, method) for manifest in ("few", "all") for method in [*METHODS, *controls]}
    assert conditions == expected | {("random-like-few", "joint")}
    assert len(runs) == 2 * len(conditions)
    assert runs["n"].nunique() == 1
    assert runs["n"].iloc[0] == len(finished.per_sample) == finished.subsets["all"].sum()
    of_largest = runs[(runs["manifest"] == "all") & (runs["method"] == "joint")]
    budget = of_largest["samples_seen"].iloc[0]
    assert of_largest["epochs"].unique().tolist() == [2]
    assert runs["samples_seen"].between(budget, budget + 31).all()  # to the batch
    assert runs[runs["manifest"] == "few"]["epochs"].min() > 2
    accuracy = [finished.per_sample[f"{row.manifest}/{row.method}/{row.seed}"].mean() for row in runs.itertuples()]
    assert runs["accuracy"].tolist() == pytest.approx(accuracy)
    modalities = np.where(runs["method"].str.endswith("alone"), 1, 2)
    assert runs["rows_read"].tolist() == (modalities * runs["samples_seen"]).tolist()
    assert runs[["macro_f1", "map", "ece"]].notna().all(axis=None)
    classes = [name for name in finished.subsets if name.startswith("class:")]
    assert sum(finished.subsets[name].sum() for name in classes) == len(finished.per_sample)
    assert {"all", "audio-preferred", "visual-dominated-0.4"} <= set(finished.runs["subset"])


def test_summary_compares_methods_with_the_baseline_and_controls_with_what_they_control(finished: Comparison) -> None:
    rows = finished.summary[finished.summary["subset"] == "all"].to_dict("records")
    summary: dict[Any, Any] = {(row["manifest"], row["method"]): row for row in rows}
    for manifest in ("few", "all"):
        method = summary[manifest, "bss-h+sum"]
        assert (method["reference"], method["kind"]) == ("joint", "method")
        control = summary[manifest, "anti-curriculum for bss-h+sum"]
        assert (control["reference"], control["kind"]) == ("bss-h+sum", "control")
    random = summary["random-like-few", "joint"]
    assert (random["reference_manifest"], random["reference"], random["kind"]) == ("few", "joint", "control")
    row = summary["few", "bss-h+sum"]
    difference = finished.difference("few/bss-h+sum", "few/joint")
    assert (row["difference"], row["low"], row["p"]) == (difference.mean, difference.low, difference.p)


def test_random_control_has_as_many_samples_of_each_class_and_split(finished: Comparison) -> None:
    assert finished.folder is not None
    tables = [
        pd.read_parquet(finished.folder.parents[1] / "manifests" / f"{name}.parquet", columns=["split", "label"])
        for name in ("few", "random-like-few")
    ]
    first, second = (table.value_counts().to_dict() for table in tables)
    assert first == second


def test_files_hold_the_result(finished: Comparison) -> None:
    assert finished.folder is not None
    for name in FRAMES:
        pd.testing.assert_frame_equal(pd.read_parquet(finished.folder / f"{name}.parquet"), getattr(finished, name))
    content = json.loads((finished.folder / "findings.json").read_text())["findings"]
    assert content == [finding.to_dict() for finding in finished.findings]
    assert not (finished.folder / "selection.parquet").exists()
    assert (finished.folder / "table.tex").read_text() == finished.to_latex()
    assert (finished.folder / "table.md").read_text() == finished.to_markdown()


def test_page_states_the_verdicts_and_the_command_and_the_report_leads_to_it(done: Path) -> None:
    folder = done / "compare" / "few-all"
    page, stated = (folder / "compare.html").read_text(), json.loads((folder / "compare.json").read_text())
    assert stated["headline"] in page
    assert "data:image/svg+xml;base64," in page
    assert (folder / "figures" / "forest.svg").exists()
    command = re.search(r"<pre>(.*)</pre>", page)
    assert command is not None
    words = shlex.split(html.unescape(command[1]))[2:]
    rerun = mmaudit_cli("compare", *words, "--run", done, "--num-workers", "0")
    assert rerun.exit_code == 0, rerun.output
    assert (folder / "compare.html").read_text() == page
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">IIII", 13, 0, 2, 2)
    report = render(
        report_numbers(Run(done)), dict.fromkeys(("discrepancy", "classes", "gap", "maps", "training"), png)
    )
    assert 'href="compare/few-all/compare.html"' in report
    assert stated["headline"] in report


def cell_predictions(comparison: Comparison, manifest: str, method: str, seed: int) -> pd.DataFrame:
    assert comparison.folder is not None
    return pd.read_parquet(comparison.folder / "cells" / manifest / method / f"seed-{seed}" / "predictions.parquet")


def test_metrics_are_those_of_the_stored_probabilities(finished: Comparison) -> None:
    tables = [cell_predictions(finished, "all", "joint", seed) for seed in (0, 1)]
    mask = finished.subsets["audio-preferred"]
    computed = [
        compute_metrics(np.stack(table["probabilities"].tolist())[mask], table["label"].to_numpy()[mask])
        for table in tables
    ]
    rows = finished.metrics.query("manifest == 'all' and method == 'joint' and subset == 'audio-preferred'")
    assert rows["metric"].tolist() == ["accuracy", "macro_f1", "map", "ece"]
    for row in rows.to_dict("records"):
        assert row["value"] == pytest.approx(np.mean([metrics[str(row["metric"])] for metrics in computed]))
        assert 0 <= row["low"] < row["value"] < row["high"] <= 1
        assert (row["num_samples"], row["num_seeds"], row["kind"]) == (mask.sum(), 2, "method")
    assert set(finished.metrics[finished.metrics["method"] == "audio alone"]["kind"]) == {"control"}
    of_class = finished.metrics[finished.metrics["subset"].str.startswith("class:")]
    assert set(of_class["metric"]) == {"accuracy", "ece"}


def test_missing_modality_is_linear_between_both_predictions(finished: Comparison) -> None:
    tables = [cell_predictions(finished, "all", "joint", seed) for seed in (0, 1)]
    curves = {key: rows for key, rows in finished.missing.groupby(["manifest", "method", "modality"])}
    curve = curves["all", "joint", "audio"].set_index("rate")["accuracy"]
    assert curve.index.tolist() == [step / 10 for step in range(11)]
    full, without = (np.mean([table[name].mean() for table in tables]) for name in ("correct", "correct_without_audio"))
    assert curve.to_numpy() == pytest.approx(np.linspace(full, without, 11))
    assert full > without
    assert curves["all", "audio alone", "visual"]["accuracy"].nunique() == 1  # it reads no visual
    assert finished.missing["low"].le(finished.missing["accuracy"]).all()


def test_findings_of_modalities_trained_alone_are_reported(finished: Comparison) -> None:
    names = [finding.name for finding in finished.findings]
    assert names == ["F1"] * 4 + ["F3"] * 2  # two methods on two manifests, neither of which is balanced
    assert {finding.outcome for finding in finished.findings} <= {"seen here", "not seen here", "cannot tell"}
    assert finished.unimodal["all", "audio alone"] == "audio"


def test_manifests_and_methods_have_their_role_in_findings_and_filters(run: Path) -> None:
    mmaudit.split(run=run, gmm="balanced", name="gmm")
    mmaudit.split(run=run, balanced=True, tolerance=0.0, name="even")
    mmaudit.split(run=run, subset="random", like="gmm", name="drawn")
    names = ["all", "few", "gmm", "even", "drawn"]
    loading = Loading(
        run=run,
        manifests=tuple(run / "manifests" / f"{name}.parquet" for name in names),
        options=SourceOptions(),
        config=RunConfig(),
        num_workers=0,
    )
    kept = replace(RunConfig(), finetune=replace(RunConfig().finetune, keep_posterior=0.5))
    greedy = replace(RunConfig(), finetune=replace(RunConfig().finetune, balancing="greedy"))
    texts = {"joint: optim.lr=0.1 finetune.keep_posterior=0.5": kept, "greedy": greedy, "joint": RunConfig()}
    specs = [(parse_method(text), config) for text, config in texts.items()]
    specs.append((MethodSpec(name="audio alone", only="audio"), RunConfig()))
    cells = [
        Cell(manifest=name, method=spec, seed=0, config=config, budget=1, is_first=True)
        for name in names
        for spec, config in specs
    ]
    design = study_design(cells, load_manifests(loading))
    clear_loaded()
    assert design.balanced == {"even"}
    assert design.greedy == {"greedy"}
    assert design.unimodal == {(name, "audio alone"): "audio" for name in names}
    roles = {name: design.filtering.get((name, "joint")) for name in names}
    assert roles == {
        "all": Filtering(role="all", method="joint"),
        "few": Filtering(role="balance-score", method="joint"),
        "gmm": Filtering(role="gmm", method="joint", manifest="gmm"),
        "even": None,
        "drawn": Filtering(role="random", method="joint", manifest="gmm"),
    }
    kept_on_all = design.filtering["all", "joint: optim.lr=0.1 finetune.keep_posterior=0.5"]
    assert kept_on_all == Filtering(role="gmm", method="joint: optim.lr=0.1")


@pytest.mark.slow
def test_filters_have_a_table_of_their_own(run: Path) -> None:
    mmaudit.split(run=run, gmm="balanced", name="gmm")
    options: dict[str, Any] = {"manifest": ["all", "few", "gmm"], "method": ["joint"], "name": "filters"}
    comparison = compare(run, **options)
    assert comparison.selection is not None
    assert comparison.selection["comparison"].tolist() == [
        "joint on gmm against joint on all (all data)",
        "joint on gmm against joint on few (filtering by the balance score)",
        "joint on gmm against joint on random-like-gmm (the random control)",
    ]
    assert comparison.folder is not None
    pd.testing.assert_frame_equal(pd.read_parquet(comparison.folder / "selection.parquet"), comparison.selection)
    assert len(comparison.to_dict()["selection"]) == 3
    compare(run, **{**options, "manifest": ["all", "few"]})
    assert not (comparison.folder / "selection.parquet").exists()


def test_damaged_predictions_are_refused(done: Path) -> None:
    path = done / "compare" / "few-all" / "cells" / "all" / "joint" / "seed-0" / "predictions.parquet"
    pq.write_table(pq.read_table(path).drop_columns("probabilities"), path)
    with pytest.raises(RunError, match="seed-0 is damaged, its test samples or columns are others: remove it"):
        compare(done)


def test_rerun_trains_nothing_and_a_removed_cell_has_the_same_bytes(
    done: Path, finished: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished.folder is not None
    folder = done / "compare" / "few-all"
    predictions = folder / "cells" / "all" / "joint" / "seed-1" / "predictions.parquet"
    before = predictions.read_bytes()
    shutil.rmtree(predictions.parent)
    trained: list[Cell] = []

    def recorded(cell: Cell, **options: Any) -> float:
        trained.append(cell)
        return train_cell(cell, **options)

    monkeypatch.setattr(schedule_module, "train_cell", recorded)
    compare(done)
    assert [(cell.manifest, cell.method.name, cell.seed) for cell in trained] == [("all", "joint", 1)]
    assert predictions.read_bytes() == before
    assert file_bytes(folder) == file_bytes(finished.folder)


def test_interrupt_loses_no_finished_cell(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"manifest": ["all"], "method": ["joint", "sum"], "controls": False, "name": "cut"}
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "train", _interrupted_after(3, cells_module.train))
        with pytest.raises(KeyboardInterrupt):
            compare(run, **options)
    folder = run / "compare" / "cut"
    cells = [path.parent for path in folder.glob("cells/*/*/*/cell.json")]
    assert len(cells) == 3
    assert not list(folder.glob("cells/*/*/.mmaudit*"))
    before = {cell: (cell / "cell.json").stat().st_mtime_ns for cell in cells}
    compare(run, **options)
    assert before == {cell: (cell / "cell.json").stat().st_mtime_ns for cell in cells}
    whole = compare(run, **{**options, "name": "whole"})
    assert whole.folder is not None
    assert file_bytes(folder) == file_bytes(whole.folder)


def _interrupted_after(number: int, train: Callable[..., Any]) -> Callable[..., Any]:
    """Return the training function; of the trainings of whole cells, `number` succeed."""
    left = [number]

    def interrupted(*values: Any, **options: Any) -> Any:
        if options.get("max_samples") is None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return train(*values, **options)

    return interrupted


GRID: dict[str, Any] = {"manifest": ["few"], "method": ["joint", "sum"], "grid": {"optim.lr": [1e-3, 1e-2]}}


def test_grid_is_chosen_and_trained(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        comparison = compare(run, **GRID)
    assert comparison.folder is not None
    table = pd.read_parquet(comparison.folder / "grid.parquet")
    assert table.groupby(["manifest", "method"])["chosen"].agg(["sum", "size"]).to_numpy().tolist() == [[1, 2]] * 4
    assert set(table["seed"]) == {1000}
    assert table["samples_seen"].min() >= comparison.runs["samples_seen"].min()
    for row in table[table["chosen"]].to_dict("records"):
        method, setting = str(row["method"]), str(row["setting"])
        cells = [*comparison.folder.glob(f"cells/few/{method.replace(' ', '-')}*/seed-0/cell.json")]
        assert f"optim.lr={json.loads(cells[0].read_text())['config']['optim']['lr']}" == setting
        assert f"{method} on few: {setting}, validation accuracy" in caplog.text
    assert any("optim.lr was chosen at the edge of its grid" in text for text in comparison.warnings)
    before = {path: path.stat().st_mtime_ns for path in comparison.folder.glob("grid/*/*/*/cell.json")}
    assert len(before) == len(table)
    compare(run, **GRID)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_shards_leave_the_tables_to_the_last_one(run: Path) -> None:
    options: dict[str, Any] = {"manifest": ["few"], "method": ["joint", "sum"], "name": "parts"}
    first = compare(run, shard="1/2", **options)
    assert first.summary.empty
    assert first.warnings == (
        "shard 1/2 is finished, and others are not: run them, then the same command without --shard",
    )
    assert first.folder is not None
    assert not (first.folder / "runs.parquet").exists()
    num_cells = len([*first.folder.glob("cells/*/*/*/cell.json")])
    assert compare(run, shard="2/2", **options).summary["verdict"].any()
    assert len([*first.folder.glob("cells/*/*/*/cell.json")]) in (2 * num_cells, 2 * num_cells - 1, 2 * num_cells + 1)
    whole = compare(run, **{**options, "name": "whole"})
    assert whole.folder is not None
    assert file_bytes(first.folder) == file_bytes(whole.folder)


def test_random_manifest_may_be_compared_with_every_method(done: Path) -> None:
    comparison = compare(done, manifest=["few", "random-like-few"], method=["joint", "sum"], seeds=1)
    overall = comparison.summary[comparison.summary["subset"] == "all"]
    rows = overall[overall["manifest"] == "random-like-few"]
    kinds = {(row.method, row.reference_manifest): row.kind for row in rows.itertuples()}
    assert kinds["joint", "few"] == "control"
    assert kinds["sum", "random-like-few"] == "method"
    assert not comparison.runs.duplicated(["manifest", "method", "seed", "subset"]).any()


def test_data_are_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ManifestSource] = []
    read = ManifestSource.read

    def recorded(source: ManifestSource, config: RunConfig, **options: Any) -> EncodedSource:
        calls.append(source)
        return read(source, config, **options)

    monkeypatch.setattr(ManifestSource, "read", recorded)
    compare(run, method=["joint"], controls=False)
    assert len(calls) == 1


def test_diverged_training_is_reported_and_the_others_stand(run: Path) -> None:
    comparison = compare(run, manifest=["all"], method=["joint", "sum", "joint: optim.lr=1e30"], controls=False)
    assert any("joint: optim.lr=1e30 on all diverged with seeds 0, 1" in text for text in comparison.warnings)
    assert comparison.summary["method"].unique().tolist() == ["sum"]
    statuses = comparison.runs[comparison.runs["subset"] == "all"].groupby("method")["status"].unique()
    assert statuses["joint: optim.lr=1e30"].tolist() == ["diverged"]
    assert statuses["sum"].tolist() == ["finished"]


def test_cells_of_other_settings_code_or_data_are_refused(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="was trained with other settings: pass another --name"):
        compare(done, settings={**QUICK, "finetune.hidden": 9})
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "_code_digest", lambda: "other")
        with pytest.raises(RunError, match="was trained with other code"):
            compare(done)
    mmaudit.split(run=done, subset="most-balanced:50%", name="few", overwrite=True)
    with pytest.raises(RunError, match=r"random-like-few.parquet was not drawn like the present few"):
        compare(done)
    with pytest.raises(RunError, match="was trained with other data"):
        compare(done, controls=False)


def test_one_seed_has_no_verdict_and_prints_it(run: Path) -> None:
    words: list[str | Path] = ["compare", "--run", run, "--manifest", "all", "--seeds", "1"]
    words += ["--method", "joint", "--method", "sum"]
    settings = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    result = mmaudit_cli(*words, *settings, "--no-controls", "--num-workers", "0", "--quiet")
    assert result.exit_code == 0, result.output
    assert "sum on all: no verdict, " in result.output.splitlines()[0]
    assert "warning: one training of all methods" in result.output
    content = json.loads(mmaudit_cli(*words, *settings, "--no-controls", "--num-workers", "0", "--json").stdout)
    assert content["summary"][0]["verdict"] == "no verdict"


def test_plan_states_what_options_override(run: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('manifests = ["all"]\nmethods = ["joint", "sum"]\nseeds = 1\nname = "mine"\ncontrols = false\n')
    comparison = compare(run, manifest=(), method=(), seeds=None, plan=plan)
    assert (comparison.name, len(comparison.correct)) == ("mine", 2)
    assert {len(values) for values in comparison.correct.values()} == {1}
    assert {len(values) for values in compare(run, manifest=(), method=(), plan=plan).correct.values()} == {2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": ["joint", "ogm-gee"]}, "no method ogm-gee; did you mean ogm-ge"),
        ({"jobs": 0}, "--jobs 0: at least 1"),
        ({"shard": "3/2"}, "--shard 3/2: not of the form i/n"),
        ({"grid": ["optim.lrr=1,2"]}, r"no config key optim\.lrr; did you mean optim\.lr"),
        ({"method": ["joint", "joint: optim.lrr=2"]}, r"no config key optim\.lrr; did you mean optim\.lr"),
        ({"name": "../elsewhere"}, "a name must not contain /"),
        ({"method": ["joint: optim.lrr=1"]}, "optim.lrr"),
    ],
)
def test_bad_options_are_refused(run: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, RunError), match=words):
        compare(run, **options)


def test_settings_without_effect_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"manifest": ["all"], "controls": False, "seeds": 1}
    methods = ["sum: balancing.ogm.alpha=0.5", "ogm: balancing.ogm.alpha=0.5"]
    compare(run, method=methods, settings={**QUICK, "optim.lr_step": 3, "finetune.save_steps": 2}, **options)
    lines = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert lines == [
        "settings without effect in mmaudit compare, method sum: balancing.ogm.alpha=0.5: balancing.ogm.alpha (--set)",
        "settings without effect in mmaudit compare: optim.lr_step, finetune.save_steps (--set)",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--manifest", "all", "--method", "ogm-gee"], "no method ogm-gee; did you mean ogm-ge"),
        (["--manifest", "all", "--method", "preset:ogm-ge-cremed"], "no preset ogm-ge-cremed; did you mean"),
        (["--manifest", "al", "--method", "joint"], "did you mean all"),
        (["--manifest", "all", "--method", "joint", "--seeds", "0"], "--seeds 0: at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(scored: Path, words: list[str], message: str) -> None:
    result = mmaudit_cli("compare", "--run", scored, *words, "--num-workers", "0")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_manifest_of_another_dataset_is_refused(run: Path, tmp_path: Path) -> None:
    pq.write_table(gaussian_table(num_samples=120, seed=1), tmp_path / "data.parquet")
    other = tmp_path / "other"
    mmaudit.score(tmp_path / "data.parquet", run=other, repeats=1, num_workers=0, progress=False)
    mmaudit.split(run=other, subset="most-balanced:100%", name="others")
    with pytest.raises(ManifestError, match="was made from another dataset"):
        compare(run, manifest=["all", str(other / "manifests" / "others.parquet")])


@pytest.fixture
def without_test(tmp_path: Path) -> Path:
    """A scored run whose data have no test samples."""
    table = gaussian_table(num_samples=90)
    table = table.set_column(table.column_names.index("split"), "split", [["train"] * 90])
    pq.write_table(table, tmp_path / "data.parquet")
    mmaudit.score(tmp_path / "data.parquet", run=tmp_path / "bare", repeats=1, num_workers=0, progress=False)
    mmaudit.split(run=tmp_path / "bare", subset="most-balanced:100%", name="all")
    return tmp_path / "bare"


def test_data_without_test_samples_are_refused(without_test: Path) -> None:
    with pytest.raises(
        ManifestError, match="no common test samples: where the data have none, mmaudit split --resplit"
    ):
        compare(without_test, manifest=["all"])


def test_numbers_and_label_sets_are_refused(tmp_path: Path) -> None:
    pq.write_table(gaussian_table(num_samples=90), tmp_path / "data.parquet")
    options: dict[str, Any] = {"repeats": 1, "num_workers": 0, "progress": False}
    mmaudit.score(tmp_path / "data.parquet", run=tmp_path / "run", settings={"data.task": "regression"}, **options)
    mmaudit.split(run=tmp_path / "run", subset="most-balanced:100%", name="all")
    with pytest.raises(ManifestError, match=r"compare needs classes, .*; the scores are of regression"):
        compare(tmp_path / "run", manifest=["all"])


def test_manifests_of_other_splits_are_refused(run: Path) -> None:
    mmaudit.split(run=run, resplit="60/20/20", name="resplit")
    with pytest.raises(ManifestError, match="trains on test samples of another manifest"):
        compare(run, manifest=["all", "resplit"])


def test_few_test_samples_show_nothing(tmp_path: Path) -> None:
    pq.write_table(gaussian_table(num_samples=100), tmp_path / "data.parquet")
    run = tmp_path / "run"
    mmaudit.score(tmp_path / "data.parquet", run=run, repeats=1, num_workers=0, progress=False)
    mmaudit.split(run=run, subset="most-balanced:100%", name="all")
    comparison = compare(run, manifest=["all"], method=["joint", "sum"], controls=False)
    assert len(comparison.per_sample) < 30
    assert any("with fewer than 30 nothing can be shown" in text for text in comparison.warnings)
    assert any("fitted on test labels too" in text for text in comparison.warnings)
    assert comparison.summary["verdict"].unique().tolist() == ["no verdict", ""]


def test_groups_of_the_data_are_those_of_the_intervals(tmp_path: Path) -> None:
    table = gaussian_table(num_samples=240).append_column("speaker", [[f"p{number // 12}" for number in range(240)]])
    table = table.drop_columns("split")
    pq.write_table(table, tmp_path / "data.parquet")
    run = tmp_path / "run"
    mmaudit.score(tmp_path / "data.parquet", run=run, group="speaker", repeats=1, num_workers=0, progress=False)
    mmaudit.split(run=run, subset="most-balanced:100%", name="all")
    comparison = compare(run, manifest=["all"], method=["joint", "sum"], controls=False)
    assert comparison.group is not None
    speaker = dict(zip(table["id"].to_pylist(), table["speaker"].to_pylist(), strict=True))
    assert list(comparison.group) == [speaker[name] for name in comparison.per_sample["sample_id"]]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(run: Path, finished: Comparison) -> None:
    assert finished.folder is not None
    comparison = compare(run, jobs=2)
    assert comparison.folder is not None
    assert file_bytes(comparison.folder) == file_bytes(finished.folder)
    assert np.array_equal(comparison.correct["all", "joint"], finished.correct["all", "joint"])


WORDS = ["--manifest", "few", "--manifest", "all", "--method", "joint", "--method", "bss-h+sum", "--seeds", "2"]


def start(run: Path, *words: str, settings: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """Start `mmaudit compare` in a process of its own, in a group of its own."""
    pairs = [word for key, value in (settings or QUICK).items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "mmaudit", "compare", "--run", str(run), *WORDS, *pairs, "--num-workers", "0"]
    return subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, start_new_session=True)


def cells_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*/seed-*/cell.json")}


@pytest.mark.slow
def test_two_shards_at_the_same_time_write_what_one_process_writes(run: Path) -> None:
    """The random control, which both need, is drawn by one of them; the last one to end, or a last call, collects."""
    shards = [start(run, "--name", "parts", "--shard", f"{number}/2") for number in (1, 2)]
    errors = [shard.communicate(timeout=300)[1] for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0], errors
    assert (run / "manifests" / "random-like-few.parquet").exists()
    folder, before = run / "compare" / "parts", cells_of(run / "compare" / "parts")
    options: dict[str, Any] = {"method": ["joint", "bss-h+sum"]}
    whole = compare(run, name="whole", **options)
    assert whole.folder is not None
    assert len(before) == len(cells_of(whole.folder))
    compare(run, name="parts", **options)
    assert cells_of(folder) == before
    assert file_bytes(folder) == file_bytes(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [(signal.SIGKILL, signal.SIGINT), (signal.SIGTERM, signal.SIGKILL)])
def test_killed_twice_and_finished_with_the_same_bytes(run: Path, signals: tuple[signal.Signals, ...]) -> None:
    folder, settings = run / "compare" / "cut", {**QUICK, "finetune.epochs": 12}
    for number in signals:
        before = cells_of(folder)
        process = start(run, "--name", "cut", "--jobs", "2", "--no-controls", settings=settings)
        end = time.monotonic() + 200
        while len(cells_of(folder)) < len(before) + 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert before.items() <= cells_of(folder).items()
    before = cells_of(folder)
    process = start(run, "--name", "cut", "--jobs", "2", "--no-controls", settings=settings)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert before.items() <= cells_of(folder).items()
    assert not [*folder.rglob(".mmaudit-*")]
    options: dict[str, Any] = {"method": ["joint", "bss-h+sum"], "controls": False, "settings": settings}
    whole = compare(run, name="whole", **options)
    assert whole.folder is not None
    assert file_bytes(folder) == file_bytes(whole.folder)
