"""Tests of every command as text and as JSON: exit code 0, only progress on stderr, JSON that parses."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from mmaudit.cli.main import app, main
from mmaudit.rebalance import EXPORTERS


@dataclass(frozen=True)
class Finished:
    """Exit code and printed text of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """A function that runs a command through main, with its logging."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    logger = logging.getLogger("mmaudit")
    before = logger.handlers, logger.level, logger.propagate

    def run(*words: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["mmaudit", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Finished(code if isinstance(code, int) else 0, printed.out, printed.err)

    yield run
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture(scope="session")
def demo_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo of 120 samples, with two manifests, two fine-tunings and a report, and its printed text."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    result = CliRunner().invoke(app, ["demo", str(folder), "--num-samples", "120"])
    assert result.exit_code == 0, result.output
    return folder, result.stdout


@pytest.fixture(scope="session")
def demo_folder(demo_text: tuple[Path, str]) -> Path:
    return demo_text[0]


def succeed(command: Command, *words: str | Path) -> str:
    """Run a command that must succeed without a traceback or a warning; return the printed text."""
    finished = command(*words)
    assert finished.code == 0, finished.err
    assert not re.search(r"Traceback|Warning|error:", finished.err), finished.err
    return finished.out


def strict_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not valid JSON")

    content = json.loads(text, parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def check_text_and_json(
    command: Command, words: list[str | Path], *, text: list[str], keys: list[str]
) -> dict[str, Any]:
    """Check a command's text and its JSON, and return the JSON."""
    printed = succeed(command, *words)
    for part in text:
        assert part in printed, printed
    assert not re.search(r"\{'|\x1b|\bnan\b", printed), printed
    content = strict_json(succeed(command, *words, "--json"))
    assert not [key for key in keys if key not in content], content
    return content


def test_demo(command: Command, demo_text: tuple[Path, str]) -> None:
    folder, printed = demo_text
    for part in ("Spearman", "balanced split: ", "report: "):
        assert part in printed
    summary = strict_json(succeed(command, "demo", folder, "--num-samples", "120", "--json"))
    assert set(summary) == {"recovery", "kept", "distance", "report"}
    assert f"{summary['kept']} samples" in printed
    assert Path(summary["report"]).is_file()
    names = ["run.json", "scores.parquet", "quarantine.parquet", "mixture.json", "report.html", "report.json"]
    assert all((folder / "run" / name).stat().st_size > 0 for name in names)
    truth, scores = (
        pd.read_parquet(path).set_index("sample_id")["discrepancy"]
        for path in (folder / "truth.parquet", folder / "run" / "scores.parquet")
    )
    spearman = scores.corr(truth, method="spearman")  # pandas joins them by id
    assert set(scores.index) == set(truth.index)
    assert spearman >= 0.7
    assert summary["recovery"]["spearman"] == pytest.approx(spearman, abs=1e-6)


def test_manifests_open_in_datasets_and_pandas(demo_folder: Path, tmp_path: Path) -> None:
    path = demo_folder / "run" / "manifests" / "balanced.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path))
    frame = pd.read_parquet(path)
    assert rows["sample_id"][:] == frame["sample_id"].tolist()
    assert (demo_folder / "data" / frame["audio_file_name"][0]).is_file()
    dropped = pq.read_table(path.with_name("balanced.dropped.parquet"))
    assert len(dropped) + len(frame) == len(pd.read_parquet(demo_folder / "truth.parquet"))
    assert dropped["reason"].null_count == 0


def test_check(command: Command, demo_folder: Path, tmp_path: Path) -> None:
    summary = check_text_and_json(
        command,
        ["check", demo_folder / "data", "--run", tmp_path / "run", "--num-workers", "0"],
        text=["120 of 120 samples are usable", "modality audio=", "10 classes: ", "the data state no splits: "],
        keys=["source", "input", "usable", "modalities", "unusable", "task", "classes", "splits", "leakage"],
    )
    assert summary["usable"] == sum(summary["classes"].values()) == sum(summary["splits"].values()) == 120
    assert (summary["splits"]["test"], summary["split_source"]) == (24, "cut")


def test_score(command: Command, demo_folder: Path) -> None:
    record = check_text_and_json(
        command,
        ["score", demo_folder / "data", "--run", demo_folder / "run", "--learn-from", "train", "--num-workers", "0"],
        text=["scored 120 of 120 samples, 0 quarantined", "chance", "gap mixture", "report: "],
        keys=["counts", "probe_report", "gap_verdict", "report"],
    )
    assert record["counts"]["scored"] == 120


def test_report(command: Command, demo_folder: Path) -> None:
    summary = check_text_and_json(command, ["report", "--run", demo_folder / "run"], text=["report: "], keys=["report"])
    assert Path(summary["report"]).is_file()


def test_split(command: Command, demo_folder: Path) -> None:
    summary = check_text_and_json(
        command,
        ["split", "--balanced", "--overwrite", "--run", demo_folder / "run"],
        text=["of 120 samples", "distance to uniform", "manifest: "],
        keys=["file", "kept", "splits", "before", "after", "curve"],
    )
    assert Path(summary["file"]).is_file()


@pytest.mark.parametrize("dry", [False, True])
def test_split_of_a_subset(command: Command, demo_folder: Path, dry: bool) -> None:
    words: list[str | Path] = ["split", "--subset", "random:50%", "--run", demo_folder / "run"]
    words += ["--dry-run" if dry else "--overwrite"]
    printed = succeed(command, *words)
    assert ("would keep" in printed, "dry run" in printed) == (dry, dry)
    assert (strict_json(succeed(command, *words, "--json"))["file"] is None) == dry


def test_finetune_and_evaluate(command: Command, demo_folder: Path) -> None:
    run: list[str | Path] = ["--run", demo_folder / "run", "--num-workers", "0"]
    trained = check_text_and_json(
        command,
        ["finetune", "--manifest", "balanced", "--epochs", "1", "--name", "short", *run],
        text=["trained on ", "accuracy", "fused: 95% ", "epoch kept: "],
        keys=["counts", "chance", "test", "best_epoch"],
    )
    evaluated = check_text_and_json(
        command,
        ["evaluate", "short", *run],
        text=["short on ", "lowest recall: ", "correct with one modality alone", "all metrics: "],
        keys=["name", "n", "split", "test", "test_by_class", "contribution", "file"],
    )
    assert Path(evaluated["file"]).is_file()
    assert evaluated["n"] == trained["counts"]["test"]


def test_order(command: Command, demo_folder: Path) -> None:
    summary = check_text_and_json(
        command,
        ["order", "balanced", "--epoch", "2", "--run", demo_folder / "run"],
        text=["epoch 2: ", "training samples", "first samples: keypad-"],
        keys=["epoch", "samples", "total", "share", "first"],
    )
    dumped = succeed(command, "order", "balanced", "--epoch", "2", "--dump", "--run", demo_folder / "run").splitlines()
    assert dumped[0] == "step,sample_id"
    assert len(dumped) == 1 + summary["samples"]
    assert [line.split(",")[1] for line in dumped[1:6]] == summary["first"]


def test_verify(command: Command, demo_folder: Path) -> None:
    summary = check_text_and_json(
        command,
        ["verify", "balanced", "--run", demo_folder / "run"],
        text=["ids"],
        keys=["manifest", "passed", "checks"],
    )
    assert summary["passed"] is True


def test_diff(command: Command, demo_folder: Path) -> None:
    names = ("balanced", "gmm-balanced")
    difference = check_text_and_json(
        command,
        ["diff", *names, "--run", demo_folder / "run"],
        text=["only"],
        keys=["both", "only_a", "only_b"],
    )
    files = [demo_folder / "run" / "manifests" / f"{name}.parquet" for name in names]
    first, second = (set(pq.read_table(file)["sample_id"].to_pylist()) for file in files)
    assert difference["both"] == len(first & second)
    assert (difference["only_a"]["count"], difference["only_b"]["count"]) == (len(first - second), len(second - first))


def test_replay(command: Command, demo_folder: Path) -> None:
    summary = check_text_and_json(
        command,
        ["replay", "balanced", "--run", demo_folder / "run"],
        text=["identical, byte by byte"],
        keys=["file", "scores", "identical", "differ"],
    )
    assert summary["identical"] is True


def test_card(command: Command, demo_folder: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["card", "balanced", "--run", demo_folder / "run"]
    summary = check_text_and_json(
        command, words, text=["## Modality balance", "### How to load it"], keys=["manifest", "file", "card"]
    )
    assert succeed(command, *words).strip() == summary["card"].strip()
    assert succeed(command, *words, "--out", tmp_path / "card.md") == f"card: {tmp_path / 'card.md'}\n"
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == summary["card"]


@pytest.mark.parametrize("form", EXPORTERS)
def test_export(command: Command, demo_folder: Path, tmp_path: Path, form: str) -> None:
    words: list[str | Path] = ["export", "balanced", "--format", form, "--run", demo_folder / "run", "--overwrite"]
    summary = check_text_and_json(
        command,
        [*words, "--out", tmp_path / "out"],
        text=[f"samples as {form}", "files: "],
        keys=["format", "files", "rows"],
    )
    assert summary["files"]
    assert all(Path(name).stat().st_size for name in summary["files"])


def test_export_in_its_own_process_prints_no_warning(demo_folder: Path, tmp_path: Path) -> None:
    words = ["export", "balanced", "--format", "csv", "--run", demo_folder / "run", "--out", tmp_path / "out.csv"]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mmaudit", *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[1] == f"files: {tmp_path / 'out.csv'}"


def test_export_prints_skipped_samples(command: Command, demo_folder: Path, tmp_path: Path) -> None:
    lost = next((demo_folder / "data" / "audio").glob("*.wav"))
    manifest = strict_json(succeed(command, "split", "--subset", "random:100%", "--name", "whole", "--run",
                                   demo_folder / "run", "--json"))["file"]  # fmt: skip
    content = lost.read_bytes()
    lost.unlink()
    try:
        printed = succeed(command, "export", manifest, "--format", "webdataset", "--out", tmp_path / "tars",
                          "--skip-missing")  # fmt: skip
    finally:
        lost.write_bytes(content)
    assert "  skipped: 1\n" in printed


def test_ingest(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {name: rng.standard_normal((4, 3, 2)) for name in ("text", "audio", "vision")}
    np.savez(
        tmp_path / "train.npz", id=np.array(["a$_$0", "a$_$1", "b$_$0", "c$_$0"]),
        regression_labels=np.array([-1.0, 1.0, 0.0, math.pi]), **fields,
    )  # fmt: skip
    summary = check_text_and_json(
        command,
        ["ingest", "mosei", tmp_path, "--out", tmp_path / "rows.parquet"],
        text=["metadata: ", "note: no classes in the file"],
        keys=["path", "message", "notes"],
    )
    assert Path(summary["path"]).is_file()


def test_escape_formulas_keeps_ordinary_names(command: Command, demo_folder: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["export", "balanced", "--format", "csv", "--run", demo_folder / "run"]
    text = {}
    for options in ((), ("--no-escape-formulas",)):
        succeed(command, *words, *options, "--out", tmp_path / f"{len(options)}.csv")
        text[options] = (tmp_path / f"{len(options)}.csv").read_text(encoding="utf-8")
    assert text[()] == text["--no-escape-formulas",]  # of ordinary names nothing changes
    assert "keypad-" in text[()]


HOSTILE = "\x1b[2Jname\nreport: forged\u202e"


def test_names_in_data_are_printed_without_control_characters(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"id": f"{HOSTILE}{row}", "label": f"{HOSTILE}{row % 2}", "a": rng.standard_normal(3).tolist(),
             "b": (rng.standard_normal(2) + row % 2).tolist()} for row in range(40)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run: list[str | Path] = ["--run", tmp_path / "run"]
    score: list[str | Path] = ["score", tmp_path / "rows.parquet", "--repeats", "1", "--num-workers", "0", *run]
    commands: list[list[str | Path]] = [
        ["check", tmp_path / "rows.parquet", "--num-workers", "0", "--run", tmp_path / "run"],
        score,
        ["split", "--subset", "random:50%", "--name", "half", "--overwrite", *run],
        ["order", "half", *run],
        ["card", "half", *run],
        ["verify", "half", *run],
    ]
    for words in commands:
        finished = command(*words)
        assert finished.code == 0, finished.err
        for printed in (finished.out, finished.err):
            assert not set(printed) & set("\x1b\u202e")
            assert "report: forged" not in printed.splitlines()
        assert json.loads(command(*words, "--json").out)
    assert "\\x1b[2Jname\\nreport: forged\\u202e" in command(*commands[3]).out
    dumped = succeed(command, "order", "half", "--dump", *run)
    ids = [row[1] for row in csv.reader(io.StringIO(dumped))][1:]
    assert ids
    assert set(ids) <= {row["id"] for row in rows}
