"""The page of a study: Markdown and figures, written from the numbers of study.json only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...audit.errors import printable
from ...audit.storage import write_text
from ...train.difference import format_p
from .claims import ClaimOutcome, check_claims

Numbers = Mapping[str, Any]


def write_page(numbers: Numbers, folder: Path) -> Path:
    """Write folder/study.md, and the figures it shows to folder/study/NAME-*.svg; return the path of the page."""
    from .figures import FIGURES

    for name, entry in numbers["sets"].items():
        for kind, draw in FIGURES.items():
            if (picture := draw(entry)) is not None:
                write_text(picture, folder / "study" / f"{name}-{kind}.svg")
    path = folder / "study.md"
    write_text(page_text(numbers), path)
    return path


def page_text(numbers: Numbers) -> str:
    """Return the page as Markdown."""
    claims = {name: check_claims(entry) for name, entry in numbers["sets"].items()}
    parts = [
        "# Results of the study",
        _introduction(numbers),
        *_in_short(numbers, claims),
        *(part for name, entry in numbers["sets"].items() for part in _set_parts(name, entry, claims[name])),
        *_agreement_parts(numbers),
        *_limits(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(numbers: Numbers) -> str:
    sets = numbers["sets"]
    trainings = sum(entry[key]["num_trainings"] for entry in sets.values() for key in ("methods", "subsets"))
    seeds = numbers["seeds"]
    return (
        f"Written by `mmaudit study`: {trainings:,} trainings of {len(sets)} {_plural('dataset', len(sets))} with "
        f"{seeds} {_plural('seed', seeds)} each. All trainings of a dataset read as many "
        f"samples, and are tested on the same test samples, whose labels no probe was fitted on. Verdicts are those of "
        f"`mmaudit compare`: `helps` and `hurts` where p, corrected for all methods (Holm), is below .05."
    )


def _in_short(numbers: Numbers, claims: Mapping[str, Sequence[ClaimOutcome]]) -> Iterator[str]:
    """Yield the verdicts on all methods, and the table of claims by dataset."""
    yield "## In short"
    lines = [_verdict_line(name, entry["methods"], numbers["seeds"]) for name, entry in numbers["sets"].items()]
    lines += [_shuffled_line(name, entry["shuffled"]) for name, entry in numbers["sets"].items()]
    lines += [_truth_line(name, entry) for name, entry in numbers["sets"].items() if entry["truth"]]
    lines += [_network_line(name, entry) for name, entry in numbers["sets"].items() if entry["networks"]]
    yield "\n".join(f"- {line}" for line in lines)
    yield "## Published claims"
    outcomes = Counter(outcome.outcome for entries in claims.values() for outcome in entries)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items(), key=lambda pair: -pair[1]))
    yield (
        f"Claims and datasets: {counts or 'none was tested'}. A claim *cannot be told* where no difference is shown "
        "and one of the published size is not excluded; the sentences of each dataset below have the numbers. The "
        "published networks are larger, and trained on other data: nothing here repeats a published table."
    )
    names = list(claims)
    texts = list(dict.fromkeys(outcome.claim for entries in claims.values() for outcome in entries))
    rows = [
        [text, *(_outcomes([row for row in claims[name] if row.claim == text]) for name in names)] for text in texts
    ]
    yield _table(["claim", *names], rows)


def _outcomes(rows: Sequence[ClaimOutcome]) -> str:
    """Return the outcome of a claim on a dataset; several checks of it, by method or manifest, are counted."""
    counts = Counter(row.outcome for row in rows)
    if len(counts) < 2:
        return next(iter(counts), "not tested")
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())


def _verdict_line(name: str, comparison: Numbers, seeds: int) -> str:
    rows = [row for row in comparison["summary"] if row["subset"] == "all" and row["kind"] == "method"]
    if not rows:
        return f"**{name}**: one method was trained, and nothing is compared."
    verdicts = Counter(row["verdict"] for row in rows)
    if verdicts["no verdict"] == len(rows):
        return f"**{name}**: no verdict on any of {len(rows)} methods, with {seeds} {_plural('seed', seeds)}."
    smallest = sorted(100 * row["smallest_effect"] for row in rows if row["smallest_effect"] is not None)
    shown = (
        f"smallest effect that shows: {median(smallest):.1f} points (median of {smallest[0]:.1f} to {smallest[-1]:.1f})"
    )
    named = [
        f"{row['method']} {row['verdict']} ({100 * row['difference']:+.1f})"
        for row in rows
        if row["verdict"] in ("helps", "hurts")
    ]
    if not named:
        return (
            f"**{name}**: no evidence that any of {len(rows)} {_plural('method', len(rows))} helps or hurts; {shown}."
        )
    return f"**{name}**: {', '.join(named)}; no evidence of the other {len(rows) - len(named)}; {shown}."


def _shuffled_line(name: str, rows: Sequence[Numbers]) -> str:
    failed = [row["method"] for row in rows if not row["above"]]
    if failed:
        return f"**{name}**: not better than on shuffled labels: {', '.join(failed)}."
    return f"**{name}**: each of {len(rows)} methods is better with every seed than on shuffled labels."


def _truth_line(name: str, entry: Numbers) -> str:
    return f"**{name}**: the discrepancy agrees with the planted one by {_interval(entry['truth']['rank'])} (Spearman)."


def _network_line(name: str, entry: Numbers) -> str:
    rows = [row for row in entry["networks"] if row["rank"]["value"] is not None]
    if not rows:
        return f"**{name}**: the branches of the networks do not vary: no agreement with the probes."
    values = sorted(row["rank"]["value"] for row in rows)
    above = sum(row["rank"]["low"] > 0 for row in rows)
    return (
        f"**{name}**: probes foretell the branches of networks trained afterwards with a rank agreement of "
        f"{values[0]:.2f} to {values[-1]:.2f} within classes, above 0 for {above} of {len(rows)} methods."
    )


def _set_parts(name: str, entry: Numbers, claims: Sequence[ClaimOutcome]) -> Iterator[str]:
    yield f"## {name}"
    accuracy = ", ".join(f"{probe} {value:.3f}" for probe, value in entry["accuracy"].items())
    groups = f" in {entry['num_groups']} groups" if entry["num_groups"] else ""
    reliability = ", ".join(f"{row['modality']} r = {row['r']:.2f}" for row in entry["reliability"]) or "not measured"
    lean = entry["lean"]
    yield (
        f"{entry['num_samples']:,} samples{groups}, {entry['num_classes']} classes, {entry['num_test']:,} test samples."
        f" Accuracy of the probes out of fold: {accuracy}. Reliability of the discrepancy by halves of the features: "
        f"{reliability}. Share of samples that {entry['between'].replace(':', ' leads minus that which ')} leads "
        f"(|D| > 0.2): {lean['mean']:+.2f} [{lean['low']:+.2f}, {lean['high']:+.2f}]."
    )
    if entry["truth"]:
        yield entry["truth_text"]
        yield _picture(name, "truth", "Mean discrepancy by planted discrepancy")
    yield _table(
        ["training samples of", *entry["manifests"]],
        [["", *(f"{counts['train']:,}" for counts in entry["manifests"].values())]],
    )
    yield _picture(name, "methods", "Differences of accuracy from the baseline, in points, with 95% intervals")
    yield "### Methods on all samples"
    yield _comparison_table(entry["methods"], entry["shuffled"])
    yield "### Subsets"
    yield _comparison_table(entry["subsets"], ())
    yield "### Claims, with numbers"
    yield "\n".join(_claim_lines(claims)) or "None was tested."
    warnings = list(dict.fromkeys([*entry["methods"]["warnings"], *entry["subsets"]["warnings"]]))
    if warnings:
        yield "Limits of these comparisons:\n\n" + "\n".join(f"- {warning}" for warning in warnings)


def _claim_lines(claims: Sequence[ClaimOutcome]) -> Iterator[str]:
    """Yield each claim with its sentence, or with those of several checks below it."""
    for claim in dict.fromkeys(row.claim for row in claims):
        rows = [row for row in claims if row.claim == claim]
        if len(rows) == 1:
            yield f"- {claim}: **{rows[0].outcome}**. {rows[0].sentence}"
        else:
            yield f"- {claim}:"
            yield from (f"  - **{row.outcome}**. {row.sentence}" for row in rows)


def _comparison_table(comparison: Numbers, shuffled: Sequence[Numbers]) -> str:
    chance = {row["method"]: f"{row['shuffled']:.3f}" for row in shuffled}
    columns = ["manifest", "method", "accuracy", "difference", "95% interval", "p", "verdict"]
    baseline = comparison["baseline"]
    rows = [
        [manifest, baseline, f"{mean:.3f} ± {spread:.3f}", "", "", "", "baseline"]
        for manifest, method, mean, spread in _accuracies(comparison)
        if method == baseline and not manifest.startswith("random-like-")
    ]
    spread_of = {(manifest, method): spread for manifest, method, _, spread in _accuracies(comparison)}
    for row in (row for row in comparison["summary"] if row["subset"] == "all"):
        against = "" if row["kind"] == "method" else f" (against {row['reference']} on {row['reference_manifest']})"
        has_interval = row["p"] is not None
        rows.append(
            [
                row["manifest"],
                row["method"] + against,
                f"{row['accuracy']:.3f} ± {spread_of.get((row['manifest'], row['method']), 0):.3f}",
                f"{100 * row['difference']:+.1f}",
                f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" if has_interval else "",
                "" if row["p_holm"] is None else format_p(row["p_holm"]),
                row["verdict"],
            ]
        )
    if chance:
        columns.append("on shuffled labels")
        rows = [[*cells, chance.get(cells[1], "")] for cells in rows]
    return _table(columns, rows)


def _accuracies(comparison: Numbers) -> Iterator[tuple[str, str, float, float]]:
    for condition, (mean, spread) in comparison["accuracies"].items():
        manifest, _, method = condition.partition("/")
        yield manifest, method, mean, spread


def _agreement_parts(numbers: Numbers) -> Iterator[str]:
    yield "## How much of a discrepancy is the data's, and how much the probe's?"
    yield (
        "Spearman's rank correlation of the discrepancies of single samples within classes, by `mmaudit diff`. The "
        "ceilings are what two runs of the same kind reach: with other folds and the same features, and by other "
        "features of the same modalities (halves, Spearman-Brown). Kappa is that of the preferred side."
    )
    rows = []
    for name, entry in numbers["sets"].items():
        for probe in entry["probes"]:
            for measure, side in zip(probe["measures"][::2], probe["sides"][::2], strict=True):
                rows.append(
                    [
                        name,
                        f"{probe['name']} ({', '.join(f'{value:.2f}' for value in probe['accuracy'].values())})",
                        measure["between"],
                        _interval(measure["rank"]),
                        _number(measure["ceiling_folds"]),
                        _number(measure["ceiling_features"]),
                        _interval(side["kappa"]),
                    ]
                )
    columns = ["dataset", "scored by (accuracies)", "modalities", "rank agreement", "ceiling, other folds"]
    yield _table([*columns, "ceiling, other features", "kappa"], rows)
    yield from (
        _picture(name, "agreement", "Rank agreement with the probes' discrepancies") for name in numbers["sets"]
    )
    yield "## Do probes foretell which samples a network reads by one modality?"
    yield (
        "Discrepancies of the probes against those of the branches of networks trained afterwards, on test samples, "
        "means over seeds. The ceiling is the root of both reliabilities, over folds and over seeds. Kappa is that of "
        "the samples that one modality dominates by more than 0.2."
    )
    rows = [
        [
            name,
            row["method"],
            _interval(row["rank"]),
            _number(row["ceiling"]),
            _number(row["between_seeds"]),
            _interval(row["kappa"]),
        ]
        for name, entry in numbers["sets"].items()
        for row in entry["networks"]
    ]
    yield _table(["dataset", "method", "rank agreement", "ceiling", "between two seeds", "kappa"], rows)


def _limits(numbers: Numbers) -> Iterator[str]:
    yield "## What this does not show"
    lines = []
    if numbers["seeds"] < 2:
        lines.append("One seed has no variance of training: there is no verdict on this page.")
    for name, entry in numbers["sets"].items():
        rows = [row for row in entry["methods"]["summary"] if row["subset"] == "all" and row["smallest_effect"]]
        if rows:
            effect = 100 * min(row["smallest_effect"] for row in rows)
            lines.append(f"{name}: {entry['num_test']:,} test samples show no effect below {effect:.1f} points.")
    lines += [
        "Networks are small, and settings are mmaudit's defaults with schedules scaled to the length of the trainings: "
        "a method may need other ones. No setting was tuned on these data.",
        "A verdict holds for these data; that of another dataset may be another.",
        "Planted imbalance is noise or exchanged features: it is not that of natural data.",
    ]
    yield "\n".join(f"- {line}" for line in lines)


def _picture(name: str, kind: str, text: str) -> str:
    path = f"study/{name}-{kind}.svg"
    return f"![{text}: {name}]({f'<{path}>' if ' ' in path else path})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    clean: Callable[[str], str] = lambda text: printable(text).replace("|", "\\|")  # noqa: E731
    lines = [" | ".join(map(clean, cells)) for cells in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def _interval(agreement: Numbers) -> str:
    if agreement["value"] is None:
        return "none"
    return f"{agreement['value']:.2f} [{agreement['low']:.2f}, {agreement['high']:.2f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"
