"""Results of commands as text, on stdout."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..audit.errors import cut_distinct, printable

if TYPE_CHECKING:
    from ..rebalance.diff import ManifestDiff
    from ..rebalance.score_agreement import ScoreAgreement
    from ..rebalance.verify import Verification
    from .manifests import Epoch
    from .training import FinetuneResult

_BALANCED_SHARE = (0.4, 0.6)  # share of samples with D > 0; outside this range a balanced split gets a warning
_NAME_CELLS = 32  # of a name in a table; three such columns and the numbers fill a wide terminal
_SPLIT_ORDER = ("train", "validation", "test", "all")


def print_line(line: str) -> None:
    """Print one line on stdout, without control characters."""
    print(printable(line))


def print_text(text: str) -> None:
    """Print a text of several lines on stdout, without control characters other than its line feeds."""
    for line in text.split("\n"):
        print_line(line)


def print_score(record: dict[str, Any]) -> None:
    """Print the counts of scored and quarantined samples, and the metrics of the probes; of a stage, what it did."""
    if "stage" in record:
        done = f"{len(record['parts'])} of {record['num_parts']} parts"
        following = "--append " * record.get("append", False) + f"--stage {record['next_stage']}"
        print_line(f"stage {record['stage']}: {done}; when all are done: {following}")
        return
    counts = record["counts"]
    strata = "classes" if record["config"]["data"]["task"] == "classification" else "strata"
    print_line(
        f"scored {counts['scored']} of {counts['input']} samples, {counts['quarantined']} quarantined; "
        f"{record['num_classes']} {strata}, {record['num_folds']} folds"
        + (f" over {record['num_groups']} groups" if record["num_groups"] else "")
    )
    for reason, number in record["quarantine"].items():
        print_line(f"  quarantined: {number} x {reason}")
    if record["quarantine"]:
        print_line(f"  by sample: {Path(record['report']).parent / 'quarantine.parquet'}")
    probe_report = record["probe_report"]
    names = [entry["name"] for entry in probe_report["probe_metrics"]]
    width, metric = _column_width(names, minimum=10), probe_report["metric"]
    for entry, name in zip(probe_report["probe_metrics"], _cells(names, width), strict=True):
        interval, calibration = f"95% [{entry['low']:.3f}, {entry['high']:.3f}]", entry["calibration"]
        line = f"  {name}  {entry['value']:.3f}  {metric} out of fold, {interval}"
        if calibration and calibration["ece_after"] is not None:
            line += f"; ECE {calibration['ece_after']:.3f}, by chance {calibration['ece_floor']:.3f}"
        print_line(line)
    for name in ("majority", "uniform"):
        print_line(f"  {name:>{width}}  {probe_report['chance'][name]:.3f}")
    print_line(f"  gap mixture: {record['gap_verdict']}")
    _print_stability(record)
    for warning in record["warnings"]:
        print_line(f"  warning: {warning}")
    print_line(record["headline"])
    print_line(f"report: {record['report']}")


def _print_stability(record: dict[str, Any]) -> None:
    """Print the shares of balanced samples that all modalities get right or wrong, and the reliability."""
    from .report.verdict import percent, plain

    if side := record["balanced_side"]:
        right, wrong = percent(side["all_correct"]), percent(side["all_wrong"])
        shares = f"{right} right by all modalities, {wrong} wrong by all"
        print_line(f"  balanced: {side['n']} samples, {shares}")
    if record["margin_check"]["survives"]:
        print_line(
            "  the modes remain with the modalities paired at random within classes: they are not in the pairing"
        )
    halves = record["halves"] or {"reliability": [], "reason": "probe.halves is off"}
    values = ", ".join(
        f"{row['modality']} r = {plain(row['r'])}, z = {plain(row['z'], 1)}" for row in halves["reliability"]
    )
    print_line(f"  discrepancy by halves of the features: {values or 'not measured: ' + halves['reason']}")


_MAX_CLASSES = 12  # that are printed


def print_check(summary: dict[str, Any]) -> None:
    """Print the modalities, the unusable samples and the leaks of a dataset."""
    print_line(f"{summary['source']}: {summary['usable']} of {summary['input']} samples are usable")
    for modality in summary["modalities"]:
        print_line(f"  modality {modality}")
    for group in summary["unusable"]:
        print_line(
            f"  unusable: {group['count']} x {group['reason']}, {group['modality'] or 'sample'}: {group['example']}"
        )
    noun = {"multilabel": "labels", "regression": "ranges of the target"}.get(summary["task"], "classes")
    print_line(f"  {len(summary['classes'])} {noun}: {_counts_text(summary['classes'])}")
    is_cut = summary["split_source"] == "cut"
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
    print_line(f"  splits: {splits}" + ("; the data state none, so that a test split was cut" if is_cut else ""))
    for note in summary["leakage"]["notes"]:
        print_line(f"  note: {note}")
    for finding in summary["leakage"]["findings"]:
        print_line(f"  LEAK: {finding['message']}")
    if not summary["leakage"]["leaks"]:
        print_line(_verdict_without_leaks(summary))
        for line in summary["leakage"]["sensitivity"]:
            print_line(f"  sensitivity: {line}")


def _verdict_without_leaks(summary: dict[str, Any]) -> str:
    if not summary["leakage"]["compared"]:
        return "leaks were not tested: there are no two splits to compare"
    if summary["split_source"] == "cut":
        return "the data state no splits: only the split cut here was tested"
    return "no leaks found"


def _counts_text(counts: dict[str, int]) -> str:
    """Return names with their counts, the most frequent first: of more than a dozen the first and last six."""
    texts = [f"{name}: {count}" for name, count in counts.items()]
    if len(texts) > _MAX_CLASSES:
        half = _MAX_CLASSES // 2
        texts = [*texts[:half], f"and {len(texts) - 2 * half} more", *texts[-half:]]
    return ", ".join(texts)


def print_ingest(summary: dict[str, Any]) -> None:
    """Print the numbers of listed and missing clips."""
    print_line(summary["message"])
    for note in summary["notes"]:
        print_line(f"  note: {note}")
    print_line(f"metadata: {summary['path']}")


def print_split(summary: dict[str, Any]) -> None:
    """Print a split: rows kept, uniformity, and for a balanced split its shortages and its size at other tolerances."""
    verb = "kept" if summary["file"] or not summary["kept"] else "would keep"
    print_line(f"{summary['name']}: {verb} {summary['kept']} of {summary['scored']} samples ({summary['between']})")
    if len(summary["splits"]) > 1:
        counts = sorted(summary["splits"].items(), key=lambda pair: _SPLIT_ORDER.index(pair[0]))
        print_line(f"  {', '.join(f'{name} {count}' for name, count in counts)}")
    if "gap_verdict" in summary:
        print_line(f"  the gap is {summary['gap_verdict']}")
    if summary["reasons"]:
        print_line(f"  dropped: {', '.join(f'{number} {reason}' for reason, number in summary['reasons'].items())}")
    before, after = summary["before"], summary["after"]
    pooled = "distance to uniform"
    if "curve" in summary and (len(summary["distances"]) > 1 or "grid_distances" in summary):
        _print_distances_by_split(summary)
        pooled += " of all splits together"
    print_line(f"  {pooled} {before['distance']:.3f} before, {after['distance']:.3f} after")
    print_line(f"  KS to uniform       {before['ks']:.3f} before, {after['ks']:.3f} after")
    print_line(f"  share with D > 0    {before['positive']:.3f} before, {after['positive']:.3f} after")
    if "curve" in summary:
        _print_balance(summary)
    print_line(f"manifest: {summary['file'] or 'not written (dry run)'}")


def _print_distances_by_split(summary: dict[str, Any]) -> None:
    """Print the distance to uniform of each split by itself; the tolerance constrains the largest, which is first."""
    over = " over the grid of both confidences" if "grid_distances" in summary else ""
    distances = summary.get("grid_distances", summary["distances"])
    worst, *others = sorted(distances.items(), key=lambda pair: -pair[1])
    marks = [f"{worst[0]} {worst[1]:.3f} (the worst split)" if others else f"{worst[0]} {worst[1]:.3f}"]
    marks += [f"{name} {distance:.3f}" for name, distance in others]
    print_line(f"  distance to uniform{over}: {', '.join(marks)}")


def _print_balance(summary: dict[str, Any]) -> None:
    after = summary["after"]
    if halves := summary["halves"]:
        print_line(
            f"  by halves of the features: distance {halves['selected']:.3f} by the half it is selected by, "
            f"{halves['measured']:.3f} by the other ({halves['chance']:.3f} by chance)"
        )
    if round(summary["effective_size"]) < summary["kept"]:
        print_line(f"  effective sample size with weights: {summary['effective_size']:.0f} of {summary['kept']}")
    worst = ", ".join(f"{row['name']} {row['distance_after']:.2f}" for row in summary["least_uniform_classes"])
    print_line(f"  least uniform classes: {worst}")
    if summary["empty_bins"]:
        print_line(f"  empty bins: {', '.join(map(str, summary['empty_bins']))}; uniform over the other bins")
    for row in summary["shortages"][:3]:
        cell = f"class {row['class']}, bin {row['bin']} [{row['low']:.2f}, {row['high']:.2f})"
        print_line(f"  shortage: {cell}: {row['has']} samples, even share {row['even_share']:,.1f}")
    if not _BALANCED_SHARE[0] <= after["positive"] <= _BALANCED_SHARE[1]:
        print_line("  warning: uniform only over the non-empty bins; one side has too few samples for a balanced split")
    sizes = ", ".join(f"{point['tolerance']:g}: {point['size']}" for point in summary["curve"])
    print_line(f"  samples kept by tolerance  {sizes}")


def print_order(summary: dict[str, Any]) -> None:
    """Print the number and share of the training samples in an epoch."""
    samples = f"{summary['samples']} of {summary['total']} training samples"
    print_line(f"epoch {summary['epoch']}: {samples} ({summary['share']:.1%})")
    print_line(f"  first samples: {', '.join(map(str, summary['first']))}")


def dump_order(epoch: Epoch) -> None:
    """Print every step and id of an epoch as CSV for a program: ids unchanged, quoted where CSV needs it.

    On a terminal they are printed without control characters.
    """
    to_terminal = sys.stdout.isatty()
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["step", "sample_id"])
    for step, ids in epoch.steps():
        rows.writerows([step, printable(name) if to_terminal else name] for name in ids)


def print_lines(result: Verification | ManifestDiff | ScoreAgreement) -> None:
    """Print the checks of a manifest, or how two manifests or score tables differ, one per line."""
    for line in result.lines():
        print_line(line)


def print_replay(summary: dict[str, Any]) -> None:
    """Print whether a rebuilt manifest is identical."""
    outcome = "identical, byte by byte" if summary["identical"] else f"NOT identical: {', '.join(summary['differ'])}"
    print_line(f"{summary['file']} rebuilt from {summary['scores']}: {outcome}")


def print_card(summary: dict[str, Any]) -> None:
    """Print a dataset card section, or the file it was written to."""
    if summary["file"] is None:
        print_text(summary["card"])
    else:
        print_line(f"card: {summary['file']}")


def print_export(summary: dict[str, Any]) -> None:
    """Print the rows, counts and files of an export."""
    print_line(f"{summary['rows']} samples as {summary['format']}")
    for key, value in summary.items():
        if key not in ("rows", "format", "files") and value:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print_line(f"  {key.replace('_', ' ')}: {text}")
    files = summary["files"]
    print_line(f"files: {', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''}")


def _cells(texts: Iterable[str], width: int) -> list[str]:
    """Align texts to the right of a column, which wide characters of Chinese or emoji fill by two cells each.

    A longer text is cut in the middle, or so that it remains distinct from the others.
    """
    from rich.cells import cell_len

    def fits(text: str) -> bool:
        return cell_len(text) <= width

    def cut(text: str) -> str:
        parts = (f"{text[: kept // 3]}…{text[kept // 3 - kept :]}" for kept in range(len(text) - 1, 0, -1))
        return text if fits(text) else next(filter(fits, parts))

    names = cut_distinct([printable(text) for text in texts], cut=cut, fits=fits)
    return [" " * (width - cell_len(name)) + name for name in names]


def _column_width(names: Iterable[str], *, minimum: int = 0) -> int:
    """Return the width of a column that holds these names, at most _NAME_CELLS."""
    from rich.cells import cell_len

    return min(max([minimum, *(cell_len(printable(name)) for name in names)]), max(_NAME_CELLS, minimum))


def print_finetune(result: FinetuneResult) -> None:
    """Print the main metric of the task on the test split, overall and by subset, and the folder of the fine-tuning."""
    from ..train.task_metrics import metrics_of

    metrics = result.metrics
    counts, of_task = metrics["counts"], metrics_of(metrics)
    guesses = ", ".join(f"{name} {metrics['chance'][name]:.3f}" for name in of_task.chance)
    print_line(
        f"trained on {counts['train']}, validated on {counts['validation']}, tested on {counts['test']} samples; "
        f"epoch kept: {metrics['best_epoch']}; guessing: {guesses}"
    )
    branches = sorted(metrics["test"]["all"]["branches"], key=lambda name: (name == "fused", name))
    width, widths = _column_width(metrics["test"], minimum=24), [_column_width([name], minimum=10) for name in branches]
    names = [name.strip() for name in _cells(branches, _NAME_CELLS)]
    heads = [_cells([name], size)[0] for name, size in zip(names, widths, strict=True)]
    print_line(f"  {of_task.name:>{width}} {'n':>6} {' '.join(heads)}")
    subsets = sorted(metrics["test"].items(), key=lambda pair: (pair[0] != "all", pair[0]))
    for (_, subset), name in zip(subsets, _cells(dict(subsets), width), strict=True):
        values = [_decimal(subset["branches"][key][of_task.main]) if subset["n"] else "-" for key in branches]
        cells = [f"{value:>{size}}" for value, size in zip(values, widths, strict=True)]
        print_line(f"  {name} {subset['n']:>6} {' '.join(cells)}")
    fused = metrics["test"]["all"]["branches"]["fused"]
    others = [
        f"{_METRIC_NAMES[key]} {_decimal(fused[key])}{_interval(fused, key)}"
        for key in of_task.keys[1:]
        if key != "ece"
    ]
    print_line(f"  fused: {', '.join(([f'95%{text}'] if (text := _interval(fused, of_task.main)) else []) + others)}")
    _print_answer(metrics)
    if metrics["test_labels_in_scores"]:
        print_line(
            "note: the probes behind this manifest were fitted on test samples too, so test labels influenced the "
            "choice of training samples; to compare methods, score with --learn-from train"
        )
    print_line(f"fine-tuning: {result.folder}")


_METRIC_NAMES = {
    "map": "MAP",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "label_accuracy": "label accuracy",
    "pearson": "Pearson r",
    "sign_accuracy": "accuracy of the sign",
}


def _decimal(value: float | None) -> str:
    """Format a metric; "-" where it is not defined."""
    return "-" if value is None else f"{value:.3f}"


def _interval(metrics: dict[str, Any], key: str) -> str:
    """Format the interval of a metric, after a space; "" where it has none."""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def _print_answer(metrics: dict[str, Any]) -> None:
    """Print which logits are tested as the fused prediction, where they are not the fusion's own."""
    added = {"heads": "the unimodal logits", "all": "the fused and unimodal logits"}.get(metrics.get("answer", "fused"))
    if added is not None:
        print_line(f"  fused here: the sum of {added} (finetune.answer = {metrics['answer']})")


def print_evaluate(evaluation: dict[str, Any]) -> None:
    """Print all metrics by subset, the classes or labels of lowest recall, and the contribution of each modality."""
    from ..train.task_metrics import metrics_of

    samples = f"{evaluation['n']} samples of split {evaluation['split']} of {evaluation['manifest'] or 'its data'}"
    print_line(f"{evaluation['name']} on {samples}")
    if evaluation.get("num_trained_on", 0) is None:
        print_line("  overlap with its training samples unknown: its manifest was removed or changed, or it had none")
    elif evaluation.get("num_trained_on"):
        print_line(
            f"  {evaluation['num_trained_on']} of them were used in training or validation: metrics are too high"
        )
    measures, tested = metrics_of(evaluation).keys, evaluation["test"]
    widths = [max(9, len(name)) for name in measures]
    branch_names = {name for subset in tested.values() for name in subset.get("branches", {})}
    width, branch_width = _column_width(tested, minimum=24), _column_width(branch_names, minimum=10)
    print_line(f"  {'':>{width}} {'n':>6} {'branch':>{branch_width}} " + _columns(measures, widths))
    subsets = sorted(tested.items(), key=lambda pair: (pair[0] != "all", pair[0]))
    ordered = sorted(branch_names, key=lambda name: (name != "fused", name))
    branch_cells = dict(zip(ordered, _cells(ordered, branch_width), strict=True))
    for (_, subset), name in zip(subsets, _cells(dict(subsets), width), strict=True):
        for branch in [branch for branch in ordered if branch in subset.get("branches", {})]:
            cells = _columns([_decimal(subset["branches"][branch][key]) for key in measures], widths)
            print_line(f"  {name} {subset['n']:>6} {branch_cells[branch]} {cells}")
    _print_answer(evaluation)
    classes = evaluation["test_by_class"].items()
    weakest = sorted((row["branches"]["fused"]["recall"], name) for name, row in classes if row["n"])[:3]
    if weakest:
        print_line(f"  lowest recall: {', '.join(f'{name} {recall:.3f}' for recall, name in weakest)}")
    _print_contribution(evaluation["contribution"], name=metrics_of(evaluation).sample_value)
    print_line(f"all metrics: {evaluation['file']}")


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _print_contribution(analysis: dict[str, Any], *, name: str) -> None:
    shares = analysis["contribution"]
    parts = ", ".join(
        f"{name} {interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
        for name, interval in shares["modalities"].items()
    )
    title = {"mae": "MAE", "label_accuracy": "label accuracy"}.get(name, name)
    sign = "; less by" if name == "mae" else ","
    print_line(f"  {title} {shares['all']:.3f} = {shares['nobody']:.3f} without any modality{sign} {parts}")
    if "confusion" not in analysis:
        return
    confusion = analysis["confusion"]
    print_line(
        f"  correct with one modality alone and wrong with all: {confusion['confused']['share']:.3f}; "
        f"wrong with each alone and correct with all: {confusion['synergy']['share']:.3f}"
    )


def print_compare(summary: dict[str, Any]) -> None:
    """Print the verdicts of a comparison in words, its findings, what limits them, and its folder."""
    for line in summary["verdicts"]:
        print_line(line)
    if not summary["verdicts"]:
        print_line("no comparison of two methods is finished")
    for finding in summary["findings"]:
        print_line(f"{finding['name']} {finding['outcome']}: {finding['sentence']}")
    for row in summary["selection"] or ():
        points = [f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high")]
        print_line(f"{row['comparison']}: {row['verdict']}, {points[0]} points, 95% [{points[1]}, {points[2]}]")
    for warning in summary["warnings"]:
        print_line(f"warning: {warning}")
    print_line(f"tables and correctness by sample: {summary['folder']}")


def print_study(summary: dict[str, Any]) -> None:
    """Print the verdicts on all samples of each dataset of a study, and its page."""
    for name, entry in summary["sets"].items():
        for line in entry["methods"]["verdicts"]:
            print_line(f"{name}: {line}")
        for row in entry["probes"]:
            if row["measures"]:
                rank = row["measures"][0]["rank"]["value"]
                print_line(f"{name}: rank agreement with {row['name']} {'none' if rank is None else f'{rank:.2f}'}")
    print_line(f"page: {summary['page']}")


def print_methods(summary: dict[str, Any]) -> None:
    """Print one line per method, and below it what it needs; or the presets."""
    if "presets" in summary:
        print_presets(summary["presets"])
        return
    rows = summary["methods"]
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        paper = f" ({row['paper']})" if row["paper"] else ""
        print_line(f"{row['kind']:<9} {row['name']:<{width}}  {row['help']}{paper}")
        if row["needs"]:
            print_line(f"{'':<9} {'':<{width}}  needs {'; '.join(row['needs'])}")


MIN_SHARING = 6  # presets with the same note, which is then printed once: 10 notes of the 34 presets


def print_presets(presets: list[dict[str, Any]]) -> None:
    """Print each preset with its paper, reported figures, what is not stated and what it cannot reproduce."""
    width = max(len(preset["name"]) for preset in presets)
    uses = Counter(text for preset in presets for key in ("not_stated", "differs") for text in preset[key])
    numbers = {text: number for number, text in enumerate((t for t, n in uses.items() if n >= MIN_SHARING), start=1)}
    for preset in presets:
        print_line(f"{preset['name']:<{width}}  {preset['title']} ({preset['paper']})")
        for text in preset["reported"] or ["not read"]:
            print_line(f"{'':<{width}}  reported: {text}")
        for heading, key in (("not stated", "not_stated"), ("differs", "differs")):
            shared = " ".join(f"[{numbers[text]}]" for text in preset[key] if text in numbers)
            for text in (*(text for text in preset[key] if text not in numbers), shared):
                if text:
                    print_line(f"{'':<{width}}  {heading}: {text}")
    for text, number in numbers.items():
        print_line(f"[{number}] {text}")


def print_plan(summary: dict[str, Any]) -> None:
    """Print the script of a plan."""
    print_text(summary["script"].rstrip())


def print_apply(summary: dict[str, Any]) -> None:
    """Print the counts of other data scored by the probes of a run, and how their distributions differ."""
    counts, comparison = summary["counts"], summary["comparison"]
    print_line(
        f"scored {counts['scored']} of {counts['input']} samples by the probes of {summary['run']}, "
        f"{counts['quarantined']} quarantined; {counts['known']} are known to the run"
    )
    for reason, number in summary["quarantine"].items():
        print_line(f"  quarantined: {number} x {reason}")
    rows = [("gap", comparison["gap"]), (f"discrepancy {comparison['between']}", comparison["discrepancy"])]
    rows += [(f"confidence {name}", column) for name, column in comparison["confidence"].items()]
    labels = [name for name, _ in rows]
    width = _column_width(labels, minimum=10)
    for label, (_, column) in zip(_cells(labels, width), rows, strict=True):
        if column["difference"] is not None:
            print_line(f"  mean {label}  {_shift(column, sign='+' if label.strip().startswith('disc') else '')}")
    if balanced := comparison.get("balanced"):
        run, data = (f"{100 * balanced[key]['share']:.1f}%" for key in ("run", "data"))
        low, high = (100 * balanced["data"][key] for key in ("low", "high"))
        print_line(f"  balanced by the mixture of the run: {data} [{low:.1f}, {high:.1f}], in the run {run}")
    print_line(f"results: {summary['folder']}")


def _shift(column: dict[str, Any], *, sign: str) -> str:
    """Format a mean of the data beside that of the run, their difference, and the distance of the distributions."""
    difference = column["difference"]
    interval = f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
    distance = f"KS distance {column['ks']:.3f}" + ("" if column["p"] is None else f", p {column['p']:.2g}")
    return (
        f"{column['data']['mean']:{sign}.3f}, in the run {column['run']['mean']:{sign}.3f}: {difference['mean']:+.3f} "
        f"95% {interval}; {distance}"
    )


def print_report(summary: dict[str, Any]) -> None:
    """Print the path of the report."""
    print_line(f"report: {summary['report']}")


def print_demo(summary: dict[str, Any]) -> None:
    """Print how well the planted discrepancy was recovered."""
    recovery = summary["recovery"]
    print_line(
        f"planted against estimated discrepancy: Spearman {recovery['spearman']:.3f} "
        f"[{recovery['interval'][0]:.3f}, {recovery['interval'][1]:.3f}] on {recovery['num_samples']} samples"
    )
    print_line(f"balanced split: {summary['kept']} samples, distance to uniform {summary['distance']:.3f}")
    print_line(f"report: {summary['report']}")
