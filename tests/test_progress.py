"""Tests of progress: the remaining time is shown, lines are few, and nothing is printed on request."""

from __future__ import annotations

import io
import sys

import pytest

from mmaudit.audit.workers import format_duration
from mmaudit.cli.progress import TimeLeft, progress_bars


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print as outside of notebooks, also after a test of this process that imported IPython's kernel."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mmaudit.cli.progress.time", clock)
    return clock


def test_durations_are_in_their_largest_unit() -> None:
    durations = (0.4, 89, 91, 12 * 60, 3 * 3600, 2.5 * 3600, 30 * 3600, 3 * 86400)
    printed = ["0 s", "89 s", "2 min", "12 min", "3 h", "2.5 h", "30 h", "3 days"]
    assert [format_duration(seconds) for seconds in durations] == printed


def test_time_left_counts_the_steps_that_were_timed(clock: Clock) -> None:
    time_left = TimeLeft.begin(60)  # of an earlier command: they took no time now
    assert time_left.seconds(100) is None
    assert time_left.text(100) == ""
    clock.seconds += 30
    time_left.update(61)
    assert time_left.seconds(100) == pytest.approx(39 * 30)
    clock.seconds += 10  # within the next step
    time_left.update(61)
    assert time_left.seconds(100) == pytest.approx(39 * 30 - 10)
    time_left.update(100)
    assert time_left.text(100) == ""


def test_lines_name_what_runs_and_become_rare(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for epoch in range(1801):
            progress("probe visual", epoch, 1800, detail=f"repeat 1 of 3, fold 1 of 5, epoch {epoch + 1} of 120")
            clock.seconds += 6
    lines = capsys.readouterr().err.splitlines()
    first = "probe visual: 2 of 1800, about 3 h left; repeat 1 of 3, fold 1 of 5, epoch 3 of 120"
    assert lines[0] == first
    assert 30 < len(lines) < 70


def test_short_stages_print_no_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for done in range(10):
            progress("encode", done, 9)
            clock.seconds += 0.9
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["terminal", "notebook", "lines"])
def test_hidden_progress_prints_nothing(
    kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: kind == "terminal")
    with progress_bars(False) as progress:
        for done in range(3):
            progress("encode", done, 2, detail="one")
            clock.seconds += 60
    printed = capsys.readouterr()
    assert printed.err == printed.out == ""


def test_bars_show_the_remaining_time_and_what_runs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bars() as progress:
        progress("probe [visual]", 0, 4)
        clock.seconds += 600
        progress("probe [visual]", 1, 4, detail="fold 2 of 4")
    drawn = terminal.getvalue()
    assert "probe [visual]" in drawn
    assert "about 30 min left, fold 2 of 4" in drawn


def test_notebook_line_covers_a_longer_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    with progress_bars() as progress:
        progress("probe", 0, 2)
        clock.seconds += 120
        progress("probe", 1, 2, detail="controls")
        progress("probe", 2, 2)
    lines = capsys.readouterr().err.split("\r")
    assert lines[2].endswith(" 1/2 about 2 min left, controls")
    assert lines[3].startswith("   probe " + "#" * 40 + " 2/2   ")
    assert len(lines[3].rstrip("\n")) == len(lines[2])
