"""Standard error of a command: its log, and progress as bars, one line in a notebook, or lines now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..audit.errors import printable
from ..audit.workers import format_duration

if TYPE_CHECKING:
    from ..audit.workers import Progress

_LINE_SECONDS = 10.0  # between two lines of progress if stderr is not a terminal
_LINE_SHARE = 0.1  # of the time since the start of the stage, if that is longer: an hour prints about 40 lines
_BAR_WIDTH = 40


def print_status(line: str) -> None:
    """Print one line on stderr, without control characters."""
    print(printable(line), file=sys.stderr, flush=True)


class _OneLine(logging.Formatter):
    """Formatter of one line per message, without control characters; a traceback keeps its lines."""

    def __init__(self, *, with_seconds: bool) -> None:
        super().__init__()
        self._with_seconds = with_seconds

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        seconds = f"[{record.relativeCreated / 1000:6.1f} s] " if self._with_seconds else ""
        lines = [seconds + printable(record.getMessage())]
        if record.exc_info:
            lines += [printable(line) for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(lines)


class _Once(logging.Filter):
    """Passes a warning once: a command that opens a manifest for every method would repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is no warning, or one that was not passed before."""
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in self.warnings
        self.warnings.add(text)
        return is_new


def configure_logging(level: int = logging.INFO, *, with_seconds: bool = False) -> None:
    """Send the log of the stages to stderr, one line per message, on request with the seconds since the start.

    A warning is printed once.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    handler.setFormatter(_OneLine(with_seconds=with_seconds))
    logger = logging.getLogger("mmaudit")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    logging.raiseExceptions = False  # a closed terminal or a full disk for the log does not fail the command


@dataclass(slots=True)
class TimeLeft:
    """Remaining time of a stage, from the mean time of the steps since its first report."""

    start: float
    first_done: int
    last: float
    done: int

    @classmethod
    def begin(cls, done: int) -> TimeLeft:
        """Begin with the steps that were done before, whose time is unknown."""
        seconds = time.monotonic()
        return cls(start=seconds, first_done=done, last=seconds, done=done)

    def update(self, done: int) -> None:
        """Record the number of finished steps."""
        if done != self.done:
            self.done, self.last = done, time.monotonic()

    def seconds(self, total: int) -> float | None:
        """Estimate the seconds that the other steps will take; None before a step was timed."""
        steps = self.done - self.first_done
        if steps < 1:
            return None
        left = (self.last - self.start) / steps * (total - self.done)
        return max(left - (time.monotonic() - self.last), 0.0)

    def text(self, total: int) -> str:
        """Return the remaining time as "about 12 min left"; "" before a step was timed and after the last."""
        seconds = self.seconds(total)
        return "" if seconds is None or self.done >= total else f"about {format_duration(seconds)} left"


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Progress]:
    """Yield a progress callback that draws bars in a terminal or notebook, and else prints a line now and then.

    If it is not `shown` it prints nothing. An interrupt is raised at the next call.
    """
    from .failures import begin_stage, raise_if_interrupted

    with _drawing(shown) as draw:

        def progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
            raise_if_interrupted()
            begin_stage(stage)
            draw(stage, done, total, detail=detail)

        yield progress


@contextmanager
def _drawing(shown: bool) -> Iterator[Progress]:
    """Yield a function that shows the progress of a stage."""
    if not shown:
        yield lambda stage, done, total, *, detail="": None
    elif "ipykernel" in sys.modules:
        yield _Notebook()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        with _terminal_bars() as draw:
            yield draw


@contextmanager
def _terminal_bars() -> Iterator[Progress]:
    """Yield a function that draws a bar per stage, its remaining time, and below the bars what runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        """Remaining time and what runs; rich's own estimate knows only the steps of the last 30 seconds."""

        def render(self, task: Task) -> Text:
            """Return the text of a stage that runs; of a finished one, its duration."""
            if task.finished:
                return Text(format_duration(task.finished_time or 0.0))
            texts = (task.fields["time_left"].text(int(task.total or 0)), task.fields["detail"])
            return Text(", ".join(text for text in texts if text), overflow="ellipsis", no_wrap=True)

    columns = (TextColumn("{task.description:>8}", markup=False), BarColumn(), MofNCompleteColumn(), TimeLeftColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int, *, detail: str = "") -> None:
            if stage not in tasks or (bars.tasks[tasks[stage]].finished and done < total):
                tasks[stage] = bars.add_task(printable(stage), total=total, time_left=TimeLeft.begin(done), detail="")
            task = bars.tasks[tasks[stage]]
            task.fields["time_left"].update(done)
            bars.update(task.id, completed=done, total=total, detail=printable(detail))

        yield draw


class _Notebook:
    """A bar of 40 characters on one line of a cell's output; rich's bars need ipywidgets there."""

    def __init__(self) -> None:
        self._stage, self._time_left, self._width = "", TimeLeft.begin(0), 0

    def __call__(self, stage: str, done: int, total: int, *, detail: str = "") -> None:
        if stage != self._stage:
            self._stage, self._time_left, self._width = stage, TimeLeft.begin(done), 0
        self._time_left.update(done)
        filled = _BAR_WIDTH * done // max(total, 1)
        line = f"{printable(stage):>8} {'#' * filled}{'.' * (_BAR_WIDTH - filled)} {done}/{total}"
        rest = ", ".join(text for text in (self._time_left.text(total), printable(detail)) if text)
        line = f"{line} {rest}" if rest and done < total else line
        padding = " " * (self._width - len(line))  # covers the rest of a longer line before it
        self._width = len(line)
        print(f"\r{line}{padding}", end="\n" if done >= total else "", file=sys.stderr)


class _Lines:
    """Progress as a line every ten seconds, later less often; shorter stages print none."""

    def __init__(self) -> None:
        self._stage, self._time_left = "", TimeLeft.begin(0)
        self._start = self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, *, detail: str = "") -> None:
        seconds = time.monotonic()
        if stage != self._stage:
            self._stage, self._time_left, self._start = stage, TimeLeft.begin(done), seconds
        self._time_left.update(done)
        if seconds - self._last >= max(_LINE_SECONDS, _LINE_SHARE * (seconds - self._start)):
            self._last = seconds
            rest = "; ".join(text for text in (self._time_left.text(total), detail) if text)
            print_status(f"{stage}: {done} of {total}{f', {rest}' if rest else ''}")
