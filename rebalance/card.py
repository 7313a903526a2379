"""Dataset cards of manifests, in Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ..audit.errors import ManifestError, printable
from .manifest import (
    balance_path,
    check_dropped_from,
    dropped_path,
    read_batches_of_manifest,
    read_num_rows,
    read_provenance,
    read_stated_digests,
)
from .split_stats import read_numbers

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def escape_markdown(text: object) -> str:
    """Return text escaped for Markdown, on one line, also safe in a table cell."""
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))


def code_span(value: object) -> str:
    """Return text as a Markdown code span, with a fence longer than any run of backticks in it."""
    text = _one_line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns after the first are right-aligned unless their header is empty."""
    marks = ["---", *("---" if name == "" else "---:" for name in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


MAX_SHORTAGES = 5  # listed in a card
_BAR_WIDTH = 24  # characters of the longest bar
_PROBE_KEYS = ("kind", "folds", "repeats", "learn_from")  # settings with the largest influence on a confidence
_PAPER = "Xia et al., Balanced Audiovisual Dataset for Imbalance Analysis, arXiv 2302.10912"


def dataset_card(manifest: Path) -> str:
    """Return the dataset-card section on a manifest, as Markdown that begins with `## Modality balance`.

    Numbers of the split are those of NAME.balance.json in the same folder, dropped rows are counted in
    NAME.dropped.parquet; without these files the card has no such sections.

    Raises:
        ManifestError: The file is not a manifest, or the numbers or dropped rows belong to another manifest.
    """
    provenance, record = read_provenance(manifest), read_stated_digests(manifest)
    rows, numbers_file = read_num_rows(manifest), balance_path(manifest)
    balance = read_numbers(numbers_file, error=ManifestError) if numbers_file.is_file() else None
    between = str((balance or provenance).get("between", ""))
    sections = [["## Modality balance"], [_introduction(manifest.name, rows, between, balance, provenance)]]
    if balance is not None:
        if (balance["kept"], balance["digest"]) != (rows, record.get("digest", balance["digest"])):
            raise ManifestError(
                f"the numbers of {manifest} belong to another manifest of {balance['kept']:,} rows; it holds {rows:,}: "
                "run mmaudit split again"
            )
        sections += [
            _before_after(balance, between),
            _histogram(balance, between),
            _splits(balance),
            _worst_class(balance),
            _shortages(balance),
            _curve(balance),
        ]
    sections += [_dropped(manifest, record), _how_made(provenance, record, balance), _caveats(between, provenance)]
    sections += [_loading(manifest.name), _citation()]
    return "\n\n".join("\n".join(section_lines) for section_lines in sections if section_lines) + "\n"


def _introduction(
    name: str, rows: int, between: str, balance: dict[str, Any] | None, provenance: dict[str, Any]
) -> str:
    scored = None if balance is None else balance["scored"]
    share_text = f" of {scored:,} scored samples ({_percent(rows / scored)})" if scored else " samples"
    subset = provenance.get("subset")
    subset_text = f"the subset **{escape_markdown(subset)}**" if subset else "a subset"
    first, second = _side_names(between)
    between_text = f" The modality discrepancy is computed between **{first}** and **{second}**." if first else ""
    missing_note = "" if balance is not None else " Its balance numbers were not found; `mmaudit split` writes them."
    return f"{code_span(name)} is {subset_text}: {rows:,}{share_text} are kept.{between_text}{missing_note}"


def _side_names(between: str) -> tuple[str, str]:
    """Return the names of both sides of a discrepancy: +1 is the first, -1 the second."""
    first, _, second = between.partition(":")
    return escape_markdown(first), escape_markdown(second) if second else "the others"


def _before_after(balance: dict[str, Any], between: str) -> list[str]:
    before, after = balance["before"], balance["after"]
    first, second = _side_names(between)
    not_positive = [_percent(1 - side["positive"]) for side in (before, after)]
    rows = [
        ("samples", f"{balance['scored']:,}", f"{balance['kept']:,}"),
        *(
            (label, _number(before[key]), _number(after[key]))
            for label, key in (
                ("total-variation distance to uniform (0 = uniform)", "distance"),
                ("Kolmogorov-Smirnov distance to uniform (0 = uniform)", "ks"),
            )
        ),
        (
            f"share of {first}-preferred samples",
            _percent(before["positive"]),
            _percent(after["positive"]),
        ),
        (f"remaining share: {second}-preferred, or neither", *not_positive),
    ]
    effective = balance["effective_size"]
    if abs(effective - balance["kept"]) > 0.5:
        rows.append(("effective size of the weighted samples", "", f"{effective:,.0f}"))
    return markdown_table(("", "all scored", "kept"), rows)


def _histogram(balance: dict[str, Any], between: str) -> list[str]:
    """Return a table of samples by bin, with bars of at most 24 characters for the kept ones."""
    num_bins = balance["bins"]
    largest_count = max(balance["counts_after"], default=0) or 1
    first, second = _side_names(between)
    counts = zip(balance["counts_before"], balance["counts_after"], strict=True)
    edges = [2 * bin_index / num_bins - 1 for bin_index in range(num_bins + 1)]
    rows = [
        (
            f"{edges[bin_index]:+.2f} to {edges[bin_index + 1]:+.2f}",
            f"{before:,}",
            f"{after:,.0f}",
            "█" * max(round(_BAR_WIDTH * after / largest_count), int(after > 0)),
        )
        for bin_index, (before, after) in enumerate(counts)
    ]
    head = (f"discrepancy (-1 {second}, +1 {first})", "scored", "kept", "")
    return markdown_table(head, rows)


def _splits(balance: dict[str, Any]) -> list[str]:
    """Return the distance of each split, and that by features that the split is not selected by."""
    distances, halves = balance["distances"], balance.get("halves")
    lines = []
    if len(distances) > 1:
        distances_text = ", ".join(f"{escape_markdown(name)} {_number(value)}" for name, value in distances.items())
        lines.append(f"Distance to uniform by split: {distances_text}.")
    if halves:
        lines.append(
            f"Selected by half of the features and measured by the other half: {_number(halves['measured'])} "
            f"({_number(halves['chance'])} by chance in a uniform sample of as many)."
        )
    return lines


def _worst_class(balance: dict[str, Any]) -> list[str]:
    kept_classes = [entry for entry in balance["classes"] if entry["after"] > 0]
    lost = [
        escape_markdown(entry["name"]) for entry in balance["classes"] if entry["before"] > 0 and not entry["after"]
    ]
    sentences = []
    if kept_classes:
        worst = max(kept_classes, key=lambda entry: entry["distance_after"])
        sentences.append(
            f"Of {len(balance['classes']):,} classes, **{escape_markdown(worst['name'])}** is the least uniform: "
            f"distance {_number(worst['distance_after'])} (before: {_number(worst['distance_before'])}), "
            f"{worst['after']:,.0f} of its {worst['before']:,} samples kept."
        )
    if lost:
        remainder = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        sentences.append(f"Classes without kept samples: {', '.join(lost[:5])}{remainder}.")
    return sentences


def _shortages(balance: dict[str, Any]) -> list[str]:
    shortages = balance["shortages"][:MAX_SHORTAGES]
    if not shortages:
        return []
    bullets = [
        f"- {escape_markdown(shortage['class'])} has {shortage['has']:,} samples in "
        f"[{shortage['low']:+.2f}, {shortage['high']:+.2f}), where a uniform share is {shortage['even_share']:,.1f}"
        for shortage in shortages
    ]
    return ["Bins short of samples, largest shortage first:", "", *bullets]


def _curve(balance: dict[str, Any]) -> list[str]:
    points = balance.get("curve") or []
    if not points:
        return []
    rows = [(f"{point['tolerance']:g}", f"{point['size']:,}", _number(point["distance"])) for point in points]
    return ["Sizes at other tolerances:", "", *markdown_table(("tolerance", "samples", "distance"), rows)]


def _dropped(manifest: Path, record: dict[str, Any]) -> list[str]:
    """Return the counts of dropped samples by reason, if the file of dropped rows is in the same folder."""
    dropped_file = dropped_path(manifest)
    if not dropped_file.is_file():
        return []
    check_dropped_from(dropped_file, record.get("digest"))
    counts: Counter[str] = Counter()
    for table in read_batches_of_manifest(dropped_file, columns=["reason"]):
        for value_count in pc.value_counts(table["reason"]).to_pylist():
            counts[str(value_count["values"])] += int(value_count["counts"])
    if not counts:
        return ["No samples were dropped."]
    counts_text = ", ".join(f"{count:,} {code_span(reason)}" for reason, count in sorted(counts.items()))
    return [f"Dropped: {counts_text}. {code_span(dropped_file.name)} lists each with its reason, score and threshold."]


def _how_made(provenance: dict[str, Any], record: dict[str, Any], balance: dict[str, Any] | None) -> list[str]:
    scores = provenance.get("scores", {})
    config = scores.get("config", {})
    recipe = provenance.get("recipe") or (balance or {}).get("recipe") or {}
    probe = {name: config["probe"][name] for name in _PROBE_KEYS if name in config.get("probe", {})}
    encoders = {
        modality["name"]: "vectors as they are" if modality.get("kind") == "features" else modality["encoder"]
        for modality in scores.get("modalities", [])
        if "encoder" in modality or modality.get("kind") == "features"
    }
    facts: list[tuple[str, object]] = [
        ("mmaudit", scores.get("version")),
        ("recipe", _flatten_settings(recipe)),
        ("seed", recipe.get("seed", config.get("seed"))),
        ("probes", _flatten_settings(probe)),
        ("encoders", _flatten_settings(encoders)),
        ("dataset fingerprint", scores.get("fingerprint")),
        ("schema", provenance.get("schema")),
        ("rows", record.get("rows")),
        ("row digest", record.get("digest")),
    ]
    bullets = [f"- {label}: {code_span(value)}" for label, value in facts if value not in (None, "")]
    return ["### How it was made", "", *bullets] if bullets else []


def _flatten_settings(content: dict[str, Any]) -> str:
    """Return nested settings as `name=value, section.name=value`, leaving out those without a value."""
    return ", ".join(f"{name}={value}" for name, value in _setting_pairs(content, ""))


def _setting_pairs(content: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _setting_pairs(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _caveats(between: str, provenance: dict[str, Any]) -> list[str]:
    first, second = _side_names(between) if between else ("one modality", "the other")
    bullets = [
        f"- The discrepancy is the confidence in the true class of a probe of {first} minus that of {second}, each "
        "out of fold: the probe was not trained on the sample. Other probes or encoders give other discrepancies: a "
        "set that is uniform for these need not be uniform for a larger model.",
        "- A discrepancy near 0 means that both modalities are informative for the sample, or that neither is.",
        "- Uniformity holds for the whole set and for each split over the bins that hold samples; for single classes "
        "it is relative only.",
    ]
    learn_from = provenance.get("scores", {}).get("config", {}).get("probe", {}).get("learn_from")
    if learn_from == "all":
        bullets.append("- The probes were trained on all splits, including the test split, always out of fold.")
    return ["### Limitations", "", *bullets]


def _loading(name: str) -> list[str]:
    quoted_name = json.dumps(name, ensure_ascii=not name.isprintable())
    return [
        "### How to load it",
        "",
        "```python",
        "import pandas as pd",
        "from datasets import load_dataset",
        "",
        f"frame = pd.read_parquet({quoted_name})",
        f'rows = load_dataset("parquet", data_files={quoted_name})',
        "```",
        "",
        "```bash",
        f"mmaudit verify {_shell_quoted(name)}   # check that the rows and the source are unchanged",
        f"mmaudit replay {_shell_quoted(name)}   # rebuild it from the same scores and recipe",
        "```",
    ]


def _citation() -> list[str]:
    return [
        "### Citation",
        "",
        f"The balanced split follows the idea of {_PAPER}; the algorithm is mmaudit's.",
        "",
        "```bibtex",
        "@article{xia2023balanced,",
        "  title   = {Balanced Audiovisual Dataset for Imbalance Analysis},",
        "  author  = {Xia, Wenke and Zhao, Xu and Pang, Xincheng and Zhang, Changqing and Hu, Di},",
        "  journal = {arXiv preprint arXiv:2302.10912},",
        "  year    = {2023}",
        "}",
        "```",
    ]


def _shell_quoted(name: str) -> str:
    return shlex.quote(_one_line(name))


def _number(value: float) -> str:
    return f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
