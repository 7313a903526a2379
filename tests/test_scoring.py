"""Tests of the commands as functions: repetition finishes interrupted work, and conflicting writers are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from runs import copy_run

from mmaudit.audit.errors import RunError
from mmaudit.audit.locks import write_lock
from mmaudit.cli import scoring, staging, training
from mmaudit.cli.checking import check
from mmaudit.cli.config import RunConfig
from mmaudit.cli.evaluating import evaluate
from mmaudit.cli.manifests import export
from mmaudit.cli.reporting import report
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import replay, split
from mmaudit.cli.training import finetune

pytestmark = pytest.mark.usefixtures("quick_scores")

QUICK = replace(
    RunConfig(),
    probe=replace(RunConfig().probe, repeats=1, folds=2),
    finetune=replace(RunConfig().finetune, epochs=2),
)


class Killed(BaseException):
    """A kill, after which no code runs."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=120), path)
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a manifest and a fine-tuning; read-only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    score(data, run=run, config=QUICK, num_workers=0)
    split(run=run, config=QUICK, subset="balanced:0.9", name="even")
    finetune("even", run=run, config=QUICK, name="tuned", num_workers=0)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files except the feature cache."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in contents.items() if not name.startswith("features/")}


def hidden(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name[0] == "."]


def kill_in(monkeypatch: pytest.MonkeyPatch, module: object, name: str, command: Callable[[], object]) -> None:
    """Run a command that is killed when it calls a function."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(Killed):
            command()


def test_missing_report_is_written_by_the_next_score(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run)
    kill_in(monkeypatch, scoring, "_write_report", lambda: score(data, run=run, config=QUICK, num_workers=0))
    assert Run(run).is_scored()
    assert not Run(run).report_file.exists()
    score(data, run=run, config=QUICK, num_workers=0)
    assert Run(run).report_file.exists()
    assert hidden(run) == []


def test_killed_overwrite_keeps_the_old_run_and_can_be_repeated(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)

    def overwrite() -> None:
        score(data, run=run, config=replace(QUICK, seed=1), num_workers=0, overwrite=True)

    for name in ("finished_parts", "write_parquet", "write_json"):
        kill_in(monkeypatch, staging, name, overwrite)
        assert files(run) == before
    overwrite()
    assert Run(run).record()["seed"] == 1
    assert not Run(run).manifest("even").exists()
    assert hidden(run) == []


def test_first_score_keeps_manifests_of_other_tables(data: Path, run: Path) -> None:
    scores = shutil.copy(run / "scores.parquet", run.parent / "theirs.parquet")
    shutil.rmtree(run)
    split(run=run, scores=scores, config=QUICK, subset="balanced:0.9", name="even")
    score(data, run=run, config=QUICK, num_workers=0)
    assert Run(run).manifest("even").exists()


def test_killed_finetune_overwrite_keeps_the_old_one_and_resumes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run)
    config = replace(QUICK, finetune=replace(QUICK.finetune, epochs=3))

    def overwrite() -> None:
        finetune("even", run=run, config=config, name="tuned", num_workers=0, overwrite=True)

    kill_in(monkeypatch, training, "write_json", overwrite)
    assert {name: content for name, content in files(run).items() if ".new" not in name} == before
    assert (run / "finetune" / ".new" / "tuned" / "state" / "last.pt").exists()
    overwrite()
    assert len((run / "finetune" / "tuned" / "history.jsonl").read_text().splitlines()) == 3
    assert hidden(run) == []
    kill_in(monkeypatch, training, "swap_finetune", overwrite)
    report(run=run)  # any command that opens the run completes it
    assert hidden(run) == []
    assert Run(run).finetunes() == [run / "finetune" / "tuned"]


def test_conflicting_writers_are_refused(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run)
    with write_lock(run, "finetune/other", command="mmaudit finetune"):
        with pytest.raises(RunError, match=r"run is being written by mmaudit finetune \(process \d+ on "):
            score(data, run=run, config=replace(QUICK, seed=1), num_workers=0, overwrite=True)
        finetune("even", run=run, config=QUICK, name="beside", num_workers=0)
        score(data, run=run, config=QUICK, num_workers=0)  # nothing to do
        with pytest.raises(RunError, match=r"finetune/other is being written by mmaudit finetune"):
            finetune("even", run=run, config=QUICK, name="other", num_workers=0)
    with write_lock(run, command="mmaudit score"):
        monkeypatch.setattr("mmaudit.cli.splitting.WAIT_SECONDS", 0.0)
        monkeypatch.setattr("mmaudit.cli.reporting.WAIT_SECONDS", 0.0)
        monkeypatch.setattr("mmaudit.cli.evaluating.WAIT_SECONDS", 0.0)
        for command in (
            lambda: split(run=run, config=QUICK, subset="balanced:0.9", name="second"),
            lambda: finetune("even", run=run, config=QUICK, name="third", num_workers=0),
            lambda: evaluate("tuned", run=run, num_workers=0),
            lambda: check(data, run=run, config=QUICK, num_workers=0),
            lambda: report(run=run),
        ):
            with pytest.raises(RunError, match="is being written by mmaudit score"):
                command()
        out = run.parent / "out.csv"
        assert export("even", run=run, out=out, format="csv").files == (str(out),)  # written outside the run
        assert split(run=run, config=QUICK, subset="balanced:0.9", dry_run=True).manifest is None
    assert {name for name in files(run) if "beside" not in name} == set(before)
    assert hidden(run) == []


def test_replay_writes_nothing_to_the_run(run: Path) -> None:
    before = files(run)
    manifests = run / "manifests"
    stamp = manifests.stat().st_mtime_ns
    assert replay("even", run=run).identical
    assert manifests.stat().st_mtime_ns == stamp  # no file was created or removed in it
    assert files(run) == before


def test_run_of_another_config_raises_and_names_the_setting(data: Path, run: Path) -> None:
    other = replace(QUICK, probe=replace(QUICK.probe, repeats=2))
    with pytest.raises(RunError, match=r"probe\.repeats is 1 in the run and 2 now; pass another --run, or --overwrite"):
        score(data, run=run, config=other, num_workers=0)
