"""Tests of failures: errors of the user are one line with path and reason, all others are reported as bugs."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from mmaudit.audit.errors import GateError, RunError, attach_file_name, file_of
from mmaudit.audit.features.encode import write_arrow
from mmaudit.audit.storage import write_parquet, write_text
from mmaudit.audit.workers import prefetch_map
from mmaudit.cli import reporting
from mmaudit.cli.failures import Failure, begin_stage, describe
from mmaudit.cli.main import app
from mmaudit.cli.progress import progress_bars
from mmaudit.train.checkpoint import save_model, save_state

pytestmark = pytest.mark.usefixtures("quick_scores")

BUG = "this is a bug, please report it with"


def described(error: BaseException, **parameters: object) -> Failure:
    begin_stage("")
    return describe(error, command="score", parameters=parameters)


def mmaudit(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Callable[..., Result]]:
    """A function that makes `mmaudit report` raise an error in the stage `draw`, and returns the command."""

    def install(error: BaseException) -> Callable[..., Result]:
        def report(*, run: str) -> Path:
            with progress_bars() as progress:
                progress("draw", 1, 2)
            raise error

        monkeypatch.setattr(reporting, "report", report)
        return mmaudit

    return install


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/a"), "run/a: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; check its permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"a\xff"), r"a\udcff: File name too long; shorten the name"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory; one of the folders in"),
        (FileNotFoundError("/no/such"), "DATA: /no/such"),
        (OSError(errno.EMFILE, "Failed to open 'x'. Detail: [errno 24]"), "DATA: Failed to open 'x'. Detail: [errno"),
        (RuntimeError("sqlite: database or disk is full; No space left on device"), "DATA: No space left on device; f"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "not enough memory (DefaultCPUAllocator"),
        (MemoryError(), "not enough memory (none is left): lower --num-workers or --batch-size"),
        (UnicodeEncodeError("utf-8", "b\udcff", 1, 2, "surrogates not allowed"), r"the name b\udcff is not UTF-8: ren"),
        (RunError("two\nlines stay as they are"), "two\nlines stay as they are"),
    ],
)
def test_errors_of_the_user_are_one_line(error: Exception, line: str) -> None:
    failure = described(error, data="DATA", run="run")
    assert failure.code == 2
    assert failure.line is not None
    assert failure.line.startswith(f"error: {line}")


def test_exit_codes_of_gate_pipe_and_interrupt() -> None:
    assert described(GateError("data leak")) == Failure(line="failed: data leak", code=3)
    assert described(BrokenPipeError()) == Failure(line=None, code=141)
    assert described(KeyboardInterrupt()).code == 130


def test_error_raised_from_an_os_error_is_not_a_bug() -> None:
    def caused(number: int, *, is_cause: bool) -> Exception:
        try:
            try:
                raise OSError(number, os.strerror(number), "file")
            except OSError as error:
                if is_cause:
                    raise ValueError("other") from error
                raise ValueError("other")  # noqa: B904
        except ValueError as error:
            return error

    assert described(caused(errno.ENOENT, is_cause=True)).code == 2
    assert described(caused(errno.ENOSPC, is_cause=False)).code == 2  # torch.save hides it in this way
    assert described(caused(errno.ENOENT, is_cause=False)).code == 1  # it was only being handled


@pytest.mark.parametrize(
    "error", [ValueError("odd\nvalue"), RecursionError("deep"), KeyError("name"), AssertionError()]
)
def test_other_errors_are_reported_as_bugs(
    error: Exception, failing: Callable[[BaseException], Callable[..., Result]]
) -> None:
    result = failing(error)("report", "--run", "somewhere")
    assert result.exit_code == 1
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    assert result.output == f"mmaudit failed in report, draw on somewhere: {text}; {BUG} somewhere\n"


@pytest.mark.parametrize("words", [("--debug", "report"), ("report", "--debug"), ("report",)])
def test_traceback_is_printed_only_with_debug(
    words: tuple[str, ...], failing: Callable[[BaseException], Callable[..., Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--debug" not in words:
        monkeypatch.setenv("MMAUDIT_DEBUG", "1")
    run = failing(ValueError("odd"))
    result = run(*words)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.output
    monkeypatch.delenv("MMAUDIT_DEBUG", raising=False)
    assert "Traceback" not in run("report").output


def test_bug_report_names_the_file_being_read() -> None:
    def read(name: str) -> None:
        with attach_file_name("outer.parquet"), attach_file_name(name):
            raise ValueError("odd")

    with pytest.raises(ValueError, match="odd") as caught:
        list(prefetch_map(read, ["inner.wav"], num_threads=1))
    assert file_of(caught.value) == "inner.wav"
    line = f"mmaudit failed in score on inner.wav: ValueError: odd; {BUG} inner.wav"
    assert described(caught.value, data="DATA").line == line


def limited(write: Callable[[], object]) -> OSError | Exception:
    """Return the error of a write beyond the limit on file size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        write()
    except Exception as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    raise AssertionError("the write was not refused")


def writers(path: Path) -> dict[str, Callable[[], object]]:
    numbers = np.random.default_rng(0).random(100_000)
    table, tensors = pa.table({"a": numbers}), {"a": torch.from_numpy(numbers)}
    return {
        "text": lambda: write_text("x" * 100_000, path),
        "parquet": lambda: write_parquet(table, path, provenance={}),
        "arrow": lambda: write_arrow(table, path),
        "model": lambda: save_model(tensors, path, about={}),
        "state": lambda: save_state(tensors, path),
    }


@pytest.mark.parametrize("kind", ["text", "parquet", "arrow", "model", "state"])
def test_failed_write_names_the_path_and_keeps_the_old_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    failure = described(limited(writers(path)[kind]), data="DATA")
    assert failure.code == 2
    assert failure.line is not None
    assert failure.line.startswith(f"error: {path}: ")
    assert re.search(r"File too large.*; raise the limit on the size of files", failure.line)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def command(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    words = tuple(map(str, words))
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "mmaudit", *words], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_closed_pipe_ends_quietly_and_full_stdout_fails(tmp_path: Path) -> None:
    table = pa.table({"sample_id": [f"s{n}" for n in range(200)], "label": [n % 2 for n in range(200)]})
    rng = np.random.default_rng(0)
    for name in ("confidence_a", "confidence_b"):
        table = table.append_column(name, pa.array(rng.random(200, dtype=np.float32)))
    pq.write_table(table, tmp_path / "scores.parquet")
    words = ["split", "--balanced", "--scores", tmp_path / "scores.parquet", "--run", tmp_path / "run", "--overwrite"]
    line = f"{sys.executable} -m mmaudit {' '.join(map(str, words))} | true; exit ${{PIPESTATUS[0]}}"
    closed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in closed.stderr
    assert "rror" not in closed.stderr
    assert closed.returncode in (0, 141)
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mmaudit", *map(str, words)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: standard output: No space left on device")


def test_names_not_in_utf8_are_printed_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xff")
    result = command("score", tmp_path / name)
    assert result.returncode == 2
    assert "no such folder or file" in result.stderr
    assert r"b\udcff" in result.stderr
    assert "Traceback" not in result.stderr


def test_file_in_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = mmaudit("report", "--run", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
