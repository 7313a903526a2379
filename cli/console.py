"""Output on the terminal: progress bars and results as text."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..audit.errors import printable

if TYPE_CHECKING:
    from ..audit.workers import Progress
    from .manifests import Epoch

_EVEN = (0.4, 0.6)  # share of samples with D > 0 in a split that may be called balanced without a warning
_QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


def print_status(line: str) -> None:
    """Print one line on stderr, without control characters."""
    print(printable(line), file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """Print one line on stdout, without control characters."""
    print(printable(line))


def print_text(text: str) -> None:
    """Print a text of several lines on stdout, without control characters but its line feeds."""
    for line in text.split("\n"):
        print_line(line)


class _OneLine(logging.Formatter):
    """A message on one line, without control characters; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        lines = [printable(record.getMessage())]
        if record.exc_info:
            lines += [printable(line) for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(lines)


def configure_logging() -> None:
    """Send what the stages log to stderr, one line a message."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logger = logging.getLogger("mmaudit")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.raiseExceptions = False  # a terminal that is gone, or a full disk behind it, is no error of the command


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Give a progress that draws bars on a terminal, and elsewhere a line now and then."""
    from .failures import begin_stage, raise_if_seen

    if not sys.stderr.isatty():
        lines = _Lines()

        def tell(stage: str, done: int, total: int) -> None:
            raise_if_seen()
            begin_stage(stage)
            lines(stage, done, total)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            raise_if_seen()
            begin_stage(stage)
            if stage not in tasks or bars.tasks[tasks[stage]].finished:
                tasks[stage] = bars.add_task(printable(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


class _Lines:
    """Progress as a line every ten seconds, and none for what is quicker."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _QUIET_SECONDS:
            self._last = now
            print_status(f"{stage}: {done} of {total}")


def print_score(record: dict[str, Any]) -> None:
    """Tell what was scored and how good the probes are."""
    counts = record["counts"]
    strata = "classes" if record["config"]["data"]["task"] == "classification" else "strata"
    print_line(
        f"scored {counts['scored']} of {counts['input']} samples, {counts['quarantined']} quarantined; "
        f"{record['classes']} {strata}, {record['folds']} folds"
        + (f" over {record['groups']} groups" if record["groups"] else "")
    )
    for reason, number in record["quarantine"].items():
        print_line(f"  quarantined: {number} x {reason}")
    if record["quarantine"]:
        print_line(f"  each with its modality and its reason in {Path(record['report']).parent / 'quarantine.parquet'}")
    probe_report = record["probe_report"]
    for found in probe_report["probe_metrics"]:
        name, metric = found["name"], probe_report["metric"]
        print_line(
            f"  {name:>10}  {found['value']:.3f}  {metric} out of fold, 95% [{found['low']:.3f}, {found['high']:.3f}]"
        )
    print_line(f"  {'chance':>10}  {probe_report['chance']:.3f}")
    for found in probe_report["controls"]:
        if found["leaks"]:
            print_line(
                f"  warning: a probe of {found['name']} on shuffled labels reaches {found['value']:.3f}, above chance "
                f"({found['chance']:.3f}): something tells the labels that should not"
            )
    print_line(f"  gap mixture: {record['verdict']}")
    print_line(f"report: {record['report']}")


def print_check(found: dict[str, Any]) -> None:
    """Tell what would be read, what is unusable, and what leaks."""
    print_line(f"{found['source']}: {found['usable']} of {found['input']} samples can be scored")
    for modality in found["modalities"]:
        print_line(f"  modality {modality}")
    for each in found["unusable"]:
        print_line(
            f"  unusable: {each['count']} x {each['reason']}, {each['modality'] or 'sample'}: such as {each['example']}"
        )
    for note in found["leakage"]["notes"]:
        print_line(f"  note: {note}")
    for finding in found["leakage"]["findings"]:
        print_line(f"  LEAK: {finding['message']}")
    if not found["leakage"]["leaks"]:
        print_line("no leak found")


def print_ingest(found: dict[str, Any]) -> None:
    """Tell how many clips are there."""
    print_line(found["message"])
    for note in found["notes"]:
        print_line(f"  note: {note}")
    print_line(f"metadata: {found['path']}")


def print_split(summary: dict[str, Any]) -> None:
    """Tell what was kept, how uniform it is, what is short, and for the balanced split what tolerances would keep."""
    would = "" if summary["file"] else "would keep " if summary["kept"] else ""
    print_line(
        f"{summary['name']}: {would or 'kept '}{summary['kept']} of {summary['scored']} samples ({summary['between']})"
    )
    if "verdict" in summary:
        print_line(f"  the gap is {summary['verdict']}")
    if summary["reasons"]:
        print_line(f"  dropped: {', '.join(f'{number} {reason}' for reason, number in summary['reasons'].items())}")
    before, after = summary["before"], summary["after"]
    print_line(f"  distance to uniform {before['distance']:.3f} before, {after['distance']:.3f} after")
    print_line(f"  KS to uniform       {before['ks']:.3f} before, {after['ks']:.3f} after")
    print_line(f"  share with D > 0    {before['positive']:.3f} before, {after['positive']:.3f} after")
    if "curve" in summary:
        _print_balance(summary)
    print_line(f"manifest: {summary['file'] or 'none: a dry run'}")


def _print_balance(summary: dict[str, Any]) -> None:
    after = summary["after"]
    if "grid_distances" in summary:
        parts = ", ".join(f"{name} {distance:.3f}" for name, distance in summary["grid_distances"].items())
        print_line(f"  over the grid of both confidences, which is what was made even: {parts}")
    elif len(summary["distances"]) > 1:
        parts = ", ".join(f"{name} {distance:.3f}" for name, distance in summary["distances"].items())
        print_line(f"  each split on its own: {parts}")
    if round(summary["effective_size"]) < summary["kept"]:
        print_line(f"  effective sample size, with the weights: {summary['effective_size']:.0f} of {summary['kept']}")
    worst = ", ".join(f"{each['name']} {each['distance_after']:.2f}" for each in summary["least_uniform_classes"])
    print_line(f"  classes farthest from uniform: {worst}")
    if summary["empty_bins"]:
        print_line(f"  bins without any sample: {', '.join(map(str, summary['empty_bins']))}; uniform over the others")
    for each in summary["shortages"][:3]:
        place = f"bin {each['bin']} [{each['low']:.2f}, {each['high']:.2f})"
        print_line(
            f"  short: class {each['class']} has {each['has']} samples in {place}; an even share is {each['even']:,.1f}"
        )
    if not _EVEN[0] <= after["positive"] <= _EVEN[1]:
        print_line("  warning: uniform only over the bins that hold samples; one side has too few to make the two even")
    kept = ", ".join(f"{point['tolerance']:g}: {point['size']}" for point in summary["curve"])
    print_line(f"  a tolerance would keep  {kept}")


def print_order(found: dict[str, Any]) -> None:
    """Tell how much of the training samples an epoch sees."""
    print_line(
        f"epoch {found['epoch']}: {found['samples']} of {found['total']} training samples ({found['share']:.1%})"
    )
    print_line(f"  the first: {', '.join(map(str, found['first']))}")


def dump_order(epoch: Epoch) -> None:
    """Print every step and id of an epoch as CSV, for a program: ids exactly as they are, quoted where CSV needs it.

    On a terminal, where no program reads them, they are printed without control characters.
    """
    to_terminal = sys.stdout.isatty()
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["step", "sample_id"])
    for step, ids in epoch.steps():
        rows.writerows([step, printable(name) if to_terminal else name] for name in ids)


def print_verify(found: dict[str, Any]) -> None:
    """Tell each check in a line."""
    for line in found["lines"]:
        print_line(line)


def print_diff(found: dict[str, Any]) -> None:
    """Tell what differs."""
    for line in found["lines"]:
        print_line(line)


def print_replay(found: dict[str, Any]) -> None:
    """Tell whether a manifest made again is the same."""
    same = "the same, byte by byte" if found["identical"] else f"NOT the same: {', '.join(found['differ'])}"
    print_line(f"{found['file']} made again from {found['scores']} is {same}")


def print_card(result: dict[str, Any]) -> None:
    """Print the section of a dataset card, or the file that it was written to."""
    if result["file"] is None:
        print_text(result["card"])
    else:
        print_line(f"card: {result['file']}")


def print_export(result: dict[str, Any]) -> None:
    """Print what was written."""
    print_line(f"{result['rows']} samples as {result['format']}")
    for key, value in result.items():
        if key not in ("rows", "format", "files") and value:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print_line(f"  {key.replace('_', ' ')}: {text}")
    files = result["files"]
    print_line(f"files: {', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''}")


def print_finetune(metrics: dict[str, Any]) -> None:
    """Tell accuracy on the test split, overall and by subset."""
    counts, chance = metrics["counts"], metrics["chance"]
    print_line(
        f"trained on {counts['train']}, validated on {counts['validation']}, tested on {counts['test']} samples; "
        f"epoch kept: {metrics['best_epoch']}; chance {chance['majority']:.3f}"
    )
    branches = sorted(metrics["test"]["all"]["branches"], key=lambda name: (name == "fused", name))
    print_line(f"  {'accuracy':>24} {'n':>6} " + " ".join(f"{name:>10.10}" for name in branches))
    for subset, found in sorted(metrics["test"].items(), key=lambda pair: (pair[0] != "all", pair[0])):
        cells = [f"{found['branches'][name]['accuracy']:>10.3f}" if found["n"] else f"{'-':>10}" for name in branches]
        print_line(f"  {subset:>24} {found['n']:>6} " + " ".join(cells))
    fused = metrics["test"]["all"]["branches"]["fused"]
    interval = f"[{fused['accuracy_low']:.3f}, {fused['accuracy_high']:.3f}]"
    print_line(f"  fused: 95% {interval}, MAP {fused['map']:.3f}, macro-F1 {fused['macro_f1']:.3f}")
    if metrics["test_labels_in_scores"]:
        print_line(
            "note: the probes behind this manifest learned from test samples too, so test labels had a part in "
            "choosing what to train on; for a clean comparison score with --learn-from train"
        )


def print_evaluate(found: dict[str, Any]) -> None:
    """Tell every measure by subset, accuracy by class, and what each modality contributes."""
    print_line(f"{found['name']} on {found['n']} samples of split {found['split']} of {found['manifest']}")
    if found.get("learned_from", 0) is None:
        print_line("  whether it was trained on some of them is not known: its own manifest is gone, or has changed")
    elif found.get("learned_from"):
        print_line(f"  {found['learned_from']} of them it was trained on, or chosen by: these figures are too good")
    measures = ("accuracy", "map", "macro_f1", "ece")
    print_line(f"  {'':>24} {'n':>6} {'branch':>10} " + " ".join(f"{name:>9}" for name in measures))
    for subset, each in sorted(found["test"].items(), key=lambda pair: (pair[0] != "all", pair[0])):
        for branch, values in sorted(each.get("branches", {}).items(), key=lambda pair: (pair[0] != "fused", pair[0])):
            cells = " ".join(f"{values[name]:>9.3f}" for name in measures)
            print_line(f"  {subset:>24} {each['n']:>6} {branch:>10.10} {cells}")
    weakest = sorted(
        ((each["branches"]["fused"]["recall"], name) for name, each in found["test_by_class"].items() if each["n"]),
    )[:3]
    print_line(f"  least recall: {', '.join(f'{name} {recall:.3f}' for recall, name in weakest)}")
    _print_contribution(found["contribution"])
    print_line(f"all measures: {found['file']}")


def _print_contribution(found: dict[str, Any]) -> None:
    shares = found["contribution"]
    parts = ", ".join(
        f"{name} {each['mean']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]"
        for name, each in shares["modalities"].items()
    )
    print_line(f"  accuracy {shares['all']:.3f} = {shares['nobody']:.3f} with nothing there, {parts}")
    confusion = found["confusion"]
    print_line(
        f"  right with one alone and wrong together: {confusion['confused']['share']:.3f}; "
        f"wrong with each alone and right together: {confusion['synergy']['share']:.3f}"
    )


def print_report(result: dict[str, Any]) -> None:
    """Tell where the report is."""
    print_line(f"report: {result['report']}")


def print_demo(result: dict[str, Any]) -> None:
    """Tell how well the planted truth was recovered."""
    recovery = result["recovery"]
    print_line(
        f"planted against estimated discrepancy: Spearman {recovery['spearman']:.3f} "
        f"[{recovery['interval'][0]:.3f}, {recovery['interval'][1]:.3f}] on {recovery['num_samples']} samples"
    )
    print_line(f"balanced split: {result['kept']} samples, distance to uniform {result['distance']:.3f}")
    print_line(f"report: {result['report']}")
