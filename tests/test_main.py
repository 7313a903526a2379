"""Tests of the command line: its options are the signatures and docstrings of the public functions."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from typer.testing import CliRunner, Result

import mmaudit
from mmaudit.audit.downloads import DOWNLOADS
from mmaudit.audit.registry import Registry
from mmaudit.cli.main import COMMANDS, app
from mmaudit.cli.progress import progress_bars
from mmaudit.rebalance import EXPORTERS
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.sampling import SAMPLERS

pytestmark = pytest.mark.usefixtures("quick_scores")

QUICK = ("--repeats", "1", "--num-workers", "0", "--set", "probe.folds=2")


def run_command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=60), path)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored run; tests add manifests of names of their own."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    assert run_command("score", data, "--run", folder, *QUICK).exit_code == 0
    return folder


def test_commands_are_listed_in_the_order_of_the_pipeline() -> None:
    listed = re.findall(r"^│ (\w+) ", run_command("--help").output.partition("Commands")[2], flags=re.MULTILINE)
    assert listed == [command.name for command in COMMANDS]
    order = [listed.index(name) for name in ("ingest", "check", "score", "split", "finetune", "evaluate", "report")]
    assert order == sorted(order)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_is_a_public_function_with_the_same_options(command: str) -> None:
    function = getattr(mmaudit, command)
    parameters = inspect.signature(function).parameters.values()
    help_text = run_command(command, "--help").output
    for parameter in parameters:
        if parameter.name == "progress":
            continue
        name = {"settings": "set", "lists": "list"}.get(parameter.name, parameter.name).replace("_", "-")
        assert re.search(rf"--(no-)?{name}\b|\b{name.upper()}\b", help_text), parameter.name
    assert "Args:" not in help_text
    documentation = inspect.getdoc(function)
    assert documentation is not None
    sections = [section for section in ("Args:", "Returns:", "Raises:", "Example:") if section in documentation]
    assert sections[-1] == "Example:"
    assert "Returns:" in sections


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_the_first_panel_of_options_holds_at_most_a_dozen(command: str) -> None:
    output = run_command(command, "--help").output
    panel = re.search(r"─ Options ─.*?╰", output, flags=re.DOTALL)
    options = re.findall(r"^│ [* ] ? *--(\w[\w-]*)", panel[0] if panel else "", flags=re.MULTILINE)
    assert len([name for name in options if name != "help"]) <= 12


def test_version_is_printed() -> None:
    assert run_command("--version").output == f"mmaudit {mmaudit.__version__}\n"


def test_quiet_prints_results_only(data: Path, run: Path, tmp_path: Path) -> None:
    for words, has_log in (((), True), (("--quiet",), False)):
        finished = run_command("score", data, "--run", tmp_path / f"run{has_log}", *QUICK, *words)
        assert ("modalities: " in finished.stderr) == has_log
        assert "scored 60 of 60" in finished.stdout
    verbose = run_command("--verbose", "score", data, "--run", tmp_path / "verbose", *QUICK)
    assert re.search(r"^\[ *\d+\.\d s\] probe took \d+\.\d s$", verbose.stderr, flags=re.MULTILINE)


def test_a_result_is_the_same_from_python_and_as_json(run: Path) -> None:
    options: dict[str, Any] = {"balanced": True, "tolerance": 0.3, "dry_run": True}
    printed = run_command("split", "--balanced", "--tolerance", "0.3", "--dry-run", "--run", run, "--json")
    assert mmaudit.split(run=run, **options).to_dict() == json.loads(printed.stdout)


def test_common_settings_are_keywords_and_override_the_others(data: Path, tmp_path: Path) -> None:
    scored = mmaudit.score(
        data,
        run=tmp_path / "run",
        modality={"first": "audio", "second": "visual"},
        repeats=1,
        num_workers=0,
        settings={"probe.folds": 2, "probe.repeats": 2},
        progress=False,
    )
    assert [modality["name"] for modality in scored.record["modalities"]] == ["first", "second"]
    assert (scored.record["config"]["probe"]["folds"], scored.record["config"]["probe"]["repeats"]) == (2, 1)
    assert (scored.num_scored, scored.num_samples, len(scored.scores)) == (60, 60, 60)


def test_environment_sets_the_run_folder_and_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMAUDIT_RUN", str(tmp_path / "named"))
    monkeypatch.setenv("MMAUDIT_PROBE_FOLDS", "3")
    finished = run_command("score", data, "--repeats", "1", "--num-workers", "0")
    assert finished.exit_code == 0, finished.output
    record = json.loads((tmp_path / "named" / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["probe"]["folds"] == 3


def test_split_replaces_a_manifest_only_on_request(run: Path) -> None:
    words = ("split", "--subset", "balanced:0.5", "--name", "once", "--run", run)
    assert run_command(*words).exit_code == 0
    refused = run_command(*words)
    assert refused.exit_code == 2
    assert "once.parquet exists: pass another --name, or --overwrite" in refused.stderr
    assert run_command(*words, "--dry-run").exit_code == 0
    assert run_command(*words, "--overwrite").exit_code == 0


def test_progress_is_shown_unless_it_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    for shown in (True, False):
        with progress_bars(shown) as progress:
            progress("encode", 1, 2)
            progress("encode", 2, 2)
        drawn = capsys.readouterr().err
        assert ("encode " + "#" * 40 + " 2/2\n" in drawn) == shown
        assert ("encode " + "#" * 20 + "." * 20 + " 1/2" in drawn) == shown


def test_methods_are_listed_with_needs_and_settings() -> None:
    printed = run_command("methods", "--kind", "sampler").stdout
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("sampler")] == list(SAMPLERS)
    assert "needs 2 modalities; unimodal losses, such as --balancing sum" in printed
    table = json.loads(run_command("methods", "--json").stdout)["methods"]
    kinds = list(dict.fromkeys(row["kind"] for row in table))
    assert kinds == ["download", "reader", "encoder", "exporter", "sampler", "balancer", "fusion", "tracker"]
    (ogm,) = (row for row in table if row["name"] == "ogm" and row["kind"] == "balancer")
    assert {key["key"] for key in ogm["keys"]} >= {"balancing.ogm.alpha", "balancing.ogm.first_epoch"}
    assert all(row["help"] for row in table)
    refused = run_command("methods", "--kind", "samplers")
    assert (refused.exit_code, "did you mean sampler?" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("command", "registry"), [("ingest", DOWNLOADS), ("export", EXPORTERS), ("finetune", BALANCERS)]
)
def test_help_lists_the_names_of_the_registry(command: str, registry: Registry) -> None:
    words = set(re.findall(r"[\w-]+", run_command(command, "--help").output))
    assert set(registry) <= words


def test_public_names_are_listed() -> None:
    assert dir(mmaudit) == sorted(mmaudit.__all__)
    assert {"score", "split", "ScoreResult"} <= set(dir(mmaudit))
