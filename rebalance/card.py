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
from .manifest import batches_of, dropped_path, num_rows_of, provenance_of, rows_of
from .split_stats import read_numbers

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def escape_markdown(text: object) -> str:
    """Give a name as Markdown that reads as the name, on one line, in a table too."""
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))


def code_span(value: object) -> str:
    """Give text as a code span, whatever backticks it holds."""
    text = _one_line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a table; all columns but the first are of numbers, or bars."""
    marks = ["---", *("---" if name == "" else "---:" for name in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


MAX_SHORTAGES = 5  # that a card lists
_BAR_WIDTH = 24  # characters of the longest bar
_PROBE_KEYS = ("kind", "folds", "repeats", "learn_from")  # what decides most about a confidence
_REQUIRED_KEYS = ("between", "kept", "scored", "before", "after", "bins", "counts_before", "counts_after", "classes")
_PAPER = "Xia et al., Balanced Audiovisual Dataset for Imbalance Analysis, arXiv 2302.10912"


def card(manifest: Path, *, balance: dict[str, Any] | None = None, file_name: str | None = None) -> str:
    """Give the section of a dataset card on a manifest, as Markdown that begins with `## Modality balance`.

    `balance` is Tally.numbers with name, recipe and, of a balanced split, curve; None is NAME.balance.json where it
    lies beside, and a section without them otherwise. `file_name` is what the manifest is called in the text. What
    was dropped is counted in NAME.dropped.parquet where that lies beside. Raises ManifestError for a file that is no
    manifest, and for numbers, or dropped rows, of another one.
    """
    manifest = Path(manifest)
    provenance, about = provenance_of(manifest), rows_of(manifest)
    rows = num_rows_of(manifest)
    beside = manifest.with_name(f"{manifest.stem}.balance.json")
    if balance is None and beside.is_file():
        balance = read_numbers(beside, error=ManifestError)
    name = file_name or manifest.name
    between = str((balance or provenance).get("between", ""))
    parts = [["## Modality balance"], [_introduction(name, rows, between, balance, provenance)]]
    if balance is not None:
        _check_numbers(balance, rows, about.get("digest"), manifest)
        parts += [
            _before_after(balance, between),
            _histogram(balance, between),
            _splits(balance),
            _worst_class(balance),
            _shortages(balance),
            _curve(balance),
        ]
    parts += [_dropped(manifest, about), _how_made(provenance, about, balance), _caveats(between, provenance)]
    parts += [_loading(name), _citation()]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _check_numbers(balance: dict[str, Any], rows: int, digest: object, manifest: Path) -> None:
    missing = [key for key in _REQUIRED_KEYS if key not in balance]
    if missing:
        raise ManifestError(f"the numbers of {manifest} lack {', '.join(missing)}: make them anew with mmaudit split")
    if not len(balance["counts_before"]) == len(balance["counts_after"]) == balance["bins"]:
        raise ManifestError(f"the numbers of {manifest} do not count {balance['bins']} bins: run mmaudit split again")
    if balance["kept"] != rows or balance.get("digest", digest) != digest:
        raise ManifestError(
            f"the numbers of {manifest} are those of {balance['kept']:,} other rows than the {rows:,} it holds: "
            "run mmaudit split again"
        )


def _introduction(
    name: str, rows: int, between: str, balance: dict[str, Any] | None, provenance: dict[str, Any]
) -> str:
    scored = None if balance is None else int(balance.get("scored", 0))
    share = f" of {scored:,} scored samples ({_format_percent(rows / scored)})" if scored else " samples"
    subset = provenance.get("subset")
    what = f"the subset **{escape_markdown(subset)}**" if subset else "a subset"
    first, second = _side_names(between)
    told = f" Its modality discrepancy is taken between **{first}** and **{second}**." if first else ""
    lacking = "" if balance is not None else " No numbers of its balance lie beside it; `mmaudit split` writes them."
    return f"{code_span(name)} is {what}: {rows:,}{share} are kept.{told}{lacking}"


def _side_names(between: str) -> tuple[str, str]:
    """Name the sides of a discrepancy: +1 is the first, -1 the second."""
    first, _, second = between.partition(":")
    return escape_markdown(first), escape_markdown(second) if second else "the others"


def _before_after(balance: dict[str, Any], between: str) -> list[str]:
    before, after = balance["before"], balance["after"]
    first, second = _side_names(between)
    left = [_format_percent(1 - each["positive"]) for each in (before, after)]
    rows = [
        ("samples", f"{balance['scored']:,}", f"{balance['kept']:,}"),
        *(
            (what, _format_number(before[key]), _format_number(after[key]))
            for what, key in (
                ("total-variation distance to uniform (0 = even)", "distance"),
                ("Kolmogorov-Smirnov distance to uniform (0 = even)", "ks"),
            )
        ),
        (f"share that prefers {first}", _format_percent(before["positive"]), _format_percent(after["positive"])),
        (f"share that does not: it prefers {second}, or neither", *left),
    ]
    effective = balance.get("effective_size")
    if effective is not None and abs(effective - balance["kept"]) > 0.5:
        rows.append(("effective size, by weights", "", f"{effective:,.0f}"))
    return markdown_table(("", "all scored", "kept"), rows)


def _histogram(balance: dict[str, Any], between: str) -> list[str]:
    """Give samples by bin, and bars of the kept ones, each of at most 24 characters."""
    num_bins = int(balance["bins"])
    most = max([float(each) for each in balance["counts_after"]] or [0]) or 1.0
    first, second = _side_names(between)
    pairs = zip(balance["counts_before"], balance["counts_after"], strict=True)
    edges = [2 * place / num_bins - 1 for place in range(num_bins + 1)]
    rows = [
        (
            f"{edges[place]:+.2f} to {edges[place + 1]:+.2f}",
            f"{before:,}",
            f"{after:,.0f}",
            "█" * max(round(_BAR_WIDTH * after / most), int(after > 0)),
        )
        for place, (before, after) in enumerate(pairs)
    ]
    head = (f"discrepancy (-1 {second}, +1 {first})", "scored", "kept", "")
    return markdown_table(head, rows)


def _splits(balance: dict[str, Any]) -> list[str]:
    distances = balance.get("distances", {})
    if len(distances) < 2:
        return []
    each = ", ".join(f"{escape_markdown(name)} {_format_number(value)}" for name, value in distances.items())
    return [f"Distance to uniform by split: {each}."]


def _worst_class(balance: dict[str, Any]) -> list[str]:
    kept = [each for each in balance["classes"] if each["after"] > 0]
    lost = [escape_markdown(each["name"]) for each in balance["classes"] if each["before"] > 0 and not each["after"]]
    said = []
    if kept:
        worst = max(kept, key=lambda each: each["distance_after"])
        said.append(
            f"Of {len(balance['classes']):,} classes, **{escape_markdown(worst['name'])}** is the least even: distance "
            f"{_format_number(worst['distance_after'])} (before: {_format_number(worst['distance_before'])}), "
            f"{worst['after']:,.0f} of its {worst['before']:,} samples kept."
        )
    if lost:
        more = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        said.append(f"Classes of which nothing is kept: {', '.join(lost[:5])}{more}.")
    return said


def _shortages(balance: dict[str, Any]) -> list[str]:
    found = balance.get("shortages", [])[:MAX_SHORTAGES]
    if not found:
        return []
    said = [
        f"- {escape_markdown(each['class'])} has {each['has']:,} samples in [{each['low']:+.2f}, {each['high']:+.2f}), "
        f"where an even share is {each['even']:,.1f}"
        for each in found
    ]
    return ["What is short, the worst first:", "", *said]


def _curve(balance: dict[str, Any]) -> list[str]:
    points = balance.get("curve") or []
    if not points:
        return []
    rows = [(f"{each['tolerance']:g}", f"{each['size']:,}", _format_number(each["distance"])) for each in points]
    return ["What other tolerances would keep:", "", *markdown_table(("tolerance", "samples", "distance"), rows)]


def _dropped(manifest: Path, about: dict[str, Any]) -> list[str]:
    """Count why samples were dropped, where the file that says so lies beside."""
    beside = dropped_path(manifest)
    if not beside.is_file():
        return []
    if rows_of(beside).get("dropped_from") != about.get("digest"):
        raise ManifestError(f"{beside} holds the rows dropped from another manifest: run mmaudit split again")
    counts: Counter[str] = Counter()
    for table in batches_of(beside, columns=["reason"]):
        for pair in pc.value_counts(table["reason"]).to_pylist():
            counts[str(pair["values"])] += int(pair["counts"])
    if not counts:
        return ["Nothing was dropped."]
    each = ", ".join(f"{number:,} {code_span(reason)}" for reason, number in sorted(counts.items()))
    return [f"Dropped: {each}. Each stands in {code_span(beside.name)} with its reason, score and threshold."]


def _how_made(provenance: dict[str, Any], about: dict[str, Any], balance: dict[str, Any] | None) -> list[str]:
    scores = provenance.get("scores", {})
    config = scores.get("config", {})
    recipe = provenance.get("rule") or (balance or {}).get("recipe") or {}
    probe = {name: config["probe"][name] for name in _PROBE_KEYS if name in config.get("probe", {})}
    encoders = {each["name"]: each.get("encoder", "statistics") for each in scores.get("modalities", [])}
    facts: list[tuple[str, object]] = [
        ("mmaudit", scores.get("version")),
        ("rule", _flatten_settings(recipe)),
        ("seed", recipe.get("seed", config.get("seed"))),
        ("probes", _flatten_settings(probe)),
        ("encoders", _flatten_settings(encoders)),
        ("dataset fingerprint", scores.get("fingerprint")),
        ("schema", provenance.get("schema")),
        ("rows", about.get("rows")),
        ("row digest", about.get("digest")),
    ]
    told = [f"- {what}: {code_span(value)}" for what, value in facts if value not in (None, "")]
    return ["### How it was made", "", *told] if told else []


def _flatten_settings(content: dict[str, Any]) -> str:
    """Write nested settings as `name=value, section.name=value`, those without a value left out."""
    return ", ".join(f"{name}={value}" for name, value in _setting_pairs(content, ""))


def _setting_pairs(content: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _setting_pairs(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _caveats(between: str, provenance: dict[str, Any]) -> list[str]:
    first, second = _side_names(between) if between else ("one modality", "the other")
    said = [
        f"- The discrepancy is the confidence in the true class of a probe of {first} minus that of {second}, each "
        "read by a probe that never saw the sample. Other probes or encoders give other discrepancies: what is even "
        "for these need not be even for a larger model.",
        "- A discrepancy near 0 means that both modalities carry the sample, or that neither does.",
        "- Uniformity is of the whole set and of each split over the bins that hold samples; of single classes it is "
        "relative only.",
    ]
    learned = provenance.get("scores", {}).get("config", {}).get("probe", {}).get("learn_from")
    if learned == "all":
        said.append("- The probes learned from all splits, the test split too, always out of fold.")
    return ["### What to keep in mind", "", *said]


def _loading(name: str) -> list[str]:
    written = json.dumps(name, ensure_ascii=not name.isprintable())
    return [
        "### How to load it",
        "",
        "```python",
        "import pandas as pd",
        "from datasets import load_dataset",
        "",
        f"frame = pd.read_parquet({written})",
        f'rows = load_dataset("parquet", data_files={written})',
        "```",
        "",
        "```bash",
        f"mmaudit verify {_shell_quoted(name)}   # are these rows, and this source, still what they were?",
        f"mmaudit replay {_shell_quoted(name)}   # make it again from the same scores and rule",
        "```",
    ]


def _citation() -> list[str]:
    return [
        "### Citation",
        "",
        f"The balanced split follows the idea of {_PAPER}; its builder is mmaudit's.",
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


def _format_number(value: float) -> str:
    return f"{value:.3f}"


def _format_percent(share: float) -> str:
    return f"{100 * share:.1f} %"
