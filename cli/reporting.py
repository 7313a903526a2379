"""The command that writes the report: report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.locks import WAIT_SECONDS, write_lock
from .remote_run import with_run
from .report import write_report
from .run import Run

# Apart from `score`: a report of 10^7 rows needs no package that decodes, encodes or trains.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportResult:
    """Files of a report.

    Attributes:
        page: The HTML page.
        numbers: Its numbers as JSON.
        figures: Its figures as PNG.
    """

    page: Path
    numbers: Path
    figures: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the paths as texts."""
        return {"report": str(self.page), "numbers": str(self.numbers), "figures": [str(path) for path in self.figures]}


@with_run("features", "stages", writes=True)
def report(*, run: str | Path = "mmaudit-run") -> ReportResult:
    """Write report.html, report.json and the figures from the files of the run folder.

    Args:
        run: Run folder, a path or a URL.

    Returns:
        The paths of the page, of its numbers and of the figures.

    Raises:
        RunError: The run is not scored, or one of its files is damaged.

    Example:
        >>> mmaudit.report(run="mmaudit-run").page
        PosixPath('mmaudit-run/report.html')
    """
    run_dir = Run.open(run)
    run_dir.record()
    with write_lock(run_dir.folder, "report.html", command="mmaudit report", wait_seconds=WAIT_SECONDS):
        page = write_report(run_dir)
    return ReportResult(
        page=page, numbers=page.with_suffix(".json"), figures=tuple(sorted(run_dir.figures.glob("*.png")))
    )
