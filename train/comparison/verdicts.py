"""Comparisons of methods on the same test samples: differences against a baseline, verdicts, tables and a forest plot.

The statistics are those of `difference`. A condition is a method on a manifest; its trainings differ in their seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...audit.errors import ConfigError, choices, printable
from ..difference import MIN_TEST_SAMPLES, Condition, Difference, Mask, compare_on, format_p
from .findings import Finding, StudyDesign, check_findings, compare_filters
from .metrics import (
    Probabilities,
    TestPredictions,
    tabulate_metrics,
    tabulate_missing,
    tabulate_runs,
)
from .rows import tabulate_differences, tabulate_unimodal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .column_figure import FigureTables

Correctness = NDArray[np.float64]

_UNIMODAL = " alone"  # ends the name of a method of one modality
_COLUMNS = ("manifest", "method", "accuracy", "difference", "95% interval", "p", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Result of `compare` and `compare_predictions`: which methods help, by how much, and what could be shown at all.

    Attributes:
        name: Name of the comparison.
        baseline: The method that the others are compared with.
        summary: One row per manifest, method and subset: accuracy of both, their difference with its 95% interval, p,
            and on the subset `all` the p corrected for the comparisons of the manifest (`p_holm`, Holm) and the
            verdict; smallest_effect is the smallest true difference that is shown with a probability of .8, on the
            subset `all` as the first of as many comparisons as Holm corrects for. Rows of the kind `control` compare a
            control with what it controls.
        metrics: One row per manifest, method, subset and metric (`accuracy`, `macro_f1`, `map`, `ece`, all in [0, 1]):
            the mean over trainings (`value`) with its 95% interval over test samples and trainings, NaN of one
            training. They have no verdict.
        missing: Accuracy on all test samples (`accuracy`, with its 95% interval) if each lacks a `modality` with a
            probability of `rate`; one row per manifest, method, modality and rate from 0 to 1. The expectation is
            linear in the rate: the curves follow from the predictions with the modality absent, which networks of
            mmaudit treat as features of 0.
        findings: Outcomes of the checks F1 to F3, claims of the balanced dataset's study, by method and manifest.
        selection: Filtering by the gap's mixture against all data, the random control, and filtering by the balance
            score, corrected among themselves; None without conditions that are filtered so.
        runs: One row per training and subset: accuracy, macro-F1, MAP and ECE in [0, 1], where they are known.
        per_sample: One row per test sample: its id, and a column MANIFEST/METHOD/SEED per training, True where it is
            correct.
        correct: Correctness (S, n) by (manifest, method).
        subsets: Masks (n,) of the test samples by subset.
        unimodal: The modality of each condition that trains one alone.
        group: Group of each test sample, (n,); None where samples are independent.
        warnings: What limits the verdicts, one sentence each.
        folder: Folder of the files; None without files.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> trained = {"joint": rng.random((5, 900)) < 0.6, "ours": rng.random((5, 900)) < 0.7}
        >>> mmaudit.compare_predictions(trained).summary["verdict"].tolist()
        ['helps']
    """

    name: str
    baseline: str
    summary: pd.DataFrame
    metrics: pd.DataFrame
    missing: pd.DataFrame
    findings: tuple[Finding, ...] = ()
    selection: pd.DataFrame | None = None
    runs: pd.DataFrame
    per_sample: pd.DataFrame
    correct: Mapping[Condition, Correctness]
    subsets: Mapping[str, Mask]
    unimodal: Mapping[Condition, str] = field(default_factory=dict)
    group: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    folder: Path | None = field(default=None)

    def difference(self, a: str, b: str, subset: str = "all") -> Difference:
        """Compute the difference of accuracy a - b of two methods, each METHOD or MANIFEST/METHOD.

        METHOD alone is that of the first manifest. No correction for several comparisons is made.

        Raises:
            ConfigError: There is no such method or subset.

        Example:
            >>> comparison.difference("balanced/joint", "all/joint").mean
        """
        if subset not in self.subsets:
            raise ConfigError(f"no subset {subset}; {choices(subset, self.subsets)}")
        first, second = (self.correct[self._find(name)] for name in (a, b))
        return compare_on(self.subsets[subset], first, second, group=self.group)

    def sentences(self) -> list[str]:
        """Return the verdicts in words, one per comparison on all test samples, with interval and smallest effect."""
        rows = self.summary[self.summary["subset"] == "all"]
        return [_sentence(row) for row in rows.to_dict("records")]

    def table(self) -> pd.DataFrame:
        """Return the comparisons on all test samples as texts, differences in points; files table.* are made of it."""
        rows = self.summary[self.summary["subset"] == "all"].to_dict("records")
        baselines = {
            (row["reference_manifest"], self.baseline): f"{row['reference_accuracy']:.3f}"
            for row in rows
            if row["reference"] == self.baseline
        }
        lines = [[*condition, accuracy, "", "", "", "baseline"] for condition, accuracy in baselines.items()]
        lines += [
            [
                row["manifest"],
                row["method"] if row["kind"] == "method" else f"control: {row['method']}",
                f"{row['accuracy']:.3f}",
                _points(row["difference"]),
                "" if np.isnan(row["p"]) else f"[{_points(row['low'])}, {_points(row['high'])}]",
                "" if np.isnan(row["p_holm"]) else format_p(row["p_holm"]),
                row["verdict"],
            ]
            for row in rows
        ]
        return pd.DataFrame(lines, columns=list(_COLUMNS)).sort_values("manifest", kind="stable", ignore_index=True)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [[text.replace("|", "\\|") for text in map(printable, row)] for row in self.table().to_numpy().tolist()]
        lines = [" | ".join(row) for row in [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows]]
        return "".join(f"| {line} |\n" for line in lines)

    def to_latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs.

        Example:
            >>> print(comparison.to_latex())
        """
        rows = [[_latex(text) for text in row] for row in [list(_COLUMNS), *self.table().to_numpy().tolist()]]
        lines = [" & ".join(row) + r" \\" for row in rows]
        top = [rf"\begin{{tabular}}{{ll{'r' * (len(_COLUMNS) - 3)}l}}", r"\toprule", lines[0], r"\midrule"]
        return "\n".join([*top, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])

    def against_unimodal(self) -> pd.DataFrame:
        """Compare the methods with the best unimodal model of their manifest, in rows like those of `summary`.

        Unimodal models are the controls of one modality, or methods named `MODALITY alone`. The best one is that of the
        highest accuracy on all test samples: chosen on the samples that it is tested on, it is favoured a little, and
        the methods are not. The verdicts are better, worse or no evidence, corrected for the methods of the manifest
        (Holm). The table has no rows where no modality was trained alone.

        Example:
            >>> comparison.against_unimodal()[["method", "reference", "difference"]]
        """
        table = self.summary[self.summary["kind"] == "control"]
        return tabulate_unimodal(
            self.correct,
            unimodal=self._unimodal(),
            controls=[*zip(table["manifest"], table["method"], strict=True)],
            subsets=self.subsets,
            group=self.group,
        )

    def plot(self, kind: str = "forest") -> Figure:
        """Return a figure of matplotlib, 3.3 inches wide, the column of a paper.

        Args:
            kind: `forest` (differences from the baseline on all test samples), `forest-unimodal` (from the best
                unimodal model), `subsets` (accuracy by subset), `threshold` (accuracy on the samples that a modality
                dominates by more than T, over T), `missing` (accuracy over the share of test samples without a
                modality) or `missing-MODALITY`. Kinds without data do not exist.

        Raises:
            ConfigError: There is no such kind.

        Example:
            >>> comparison.plot("threshold").savefig("threshold.pdf")
        """
        from .figures import build_figure, figure_kinds

        tables = self.figure_tables()
        if kind not in (kinds := figure_kinds(tables)):
            raise ConfigError(f"no figure {kind}; {choices(kind, kinds)}")
        return build_figure(tables, kind)

    def figure_tables(self) -> FigureTables:
        """Return what the figures are drawn from."""
        from .column_figure import FigureTables

        return FigureTables(
            baseline=self.baseline,
            summary=self.summary,
            unimodal=self.against_unimodal(),
            unimodal_methods=frozenset(method for _, method in self._unimodal()),
            metrics=self.metrics,
            missing=self.missing,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return verdicts in words, findings, warnings, the tables and the folder as JSON values."""
        return {
            "name": self.name,
            "baseline": self.baseline,
            "verdicts": self.sentences(),
            "findings": [finding.to_dict() for finding in self.findings],
            "warnings": list(self.warnings),
            "summary": _records(self.summary),
            "metrics": _records(self.metrics),
            "missing": _records(self.missing),
            "selection": None if self.selection is None else _records(self.selection),
            "folder": None if self.folder is None else str(self.folder),
        }

    def _unimodal(self) -> list[Condition]:
        """Return the conditions of one modality, by their names where that is not recorded."""
        return [c for c in self.correct if c in self.unimodal or (not self.unimodal and c[1].endswith(_UNIMODAL))]

    def _find(self, name: str) -> Condition:
        """Return the condition of METHOD or MANIFEST/METHOD."""
        names = {condition: _text(condition) for condition in self.correct}
        for condition, text in names.items():
            if name in (text, condition[1]):
                return condition
        raise ConfigError(f"no method {name}; {choices(name, {*names.values(), *(key[1] for key in names)})}")


def build_comparison(
    correct: Mapping[Condition, Correctness],
    *,
    name: str,
    baseline: str,
    subsets: Mapping[str, Mask],
    group: Sequence[str] | None,
    trainings: Sequence[Mapping[str, Any]],
    sample_id: Sequence[Any] | NDArray[Any],
    controls: Mapping[Condition, Condition] | None = None,
    seeds: Mapping[Condition, Sequence[int]] | None = None,
    label: NDArray[np.int64] | None = None,
    probabilities: Mapping[Condition, Probabilities] | None = None,
    without: Mapping[Condition, Mapping[str, Correctness]] | None = None,
    design: StudyDesign | None = None,
    warnings: Sequence[str] = (),
    folder: Path | None = None,
) -> Comparison:
    """Build a comparison from the correctness (S, n) of each condition, each control with what it controls.

    Each method is compared with the baseline on its own manifest. A condition without trainings, since all diverged, is
    not in `correct`, and its rows are missing. trainings: manifest, method and seed of each training, and what else is
    known of it. label (n,), probabilities (S, n, k) and without: as in `TestPredictions`.
    """
    controls, design = controls or {}, design or StudyDesign()
    tested = TestPredictions(
        correct=correct,
        seeds={condition: (seeds or {}).get(condition, range(len(values))) for condition, values in correct.items()},
        kinds={condition: "control" if condition in controls else "method" for condition in correct},
        subsets=subsets,
        group=group,
        label=label,
        probabilities=probabilities or {},
        without=without or {},
    )
    metrics, measured = tabulate_metrics(tested)
    num_samples = len(next(iter(subsets.values())))
    return Comparison(
        name=name,
        baseline=baseline,
        summary=tabulate_differences(correct, baseline=baseline, controls=controls, subsets=subsets, group=group),
        metrics=metrics,
        missing=tabulate_missing(tested),
        findings=check_findings(
            correct, baseline=baseline, controls=frozenset(controls), subsets=subsets, group=group, design=design
        ),
        selection=compare_filters(correct, design, group=group),
        runs=tabulate_runs(trainings, measured, num_samples),
        per_sample=_per_sample(tested, sample_id),
        correct=correct,
        subsets=subsets,
        unimodal=design.unimodal,
        group=None if group is None else tuple(group),
        warnings=(*warnings, *_limits(correct, num_samples)),
        folder=folder,
    )


def _per_sample(tested: TestPredictions, sample_id: Sequence[Any] | NDArray[Any]) -> pd.DataFrame:
    columns = {
        f"{_text(condition)}/{seed}": values[position] > 0.5
        for condition, values in tested.correct.items()
        for position, seed in enumerate(tested.seeds[condition])
    }
    return pd.DataFrame({"sample_id": sample_id, **columns})


def _limits(correct: Mapping[Condition, Correctness], n: int) -> list[str]:
    """Return what rules out verdicts."""
    limits = []
    if n < MIN_TEST_SAMPLES:
        limits.append(f"{n} test samples: with fewer than {MIN_TEST_SAMPLES} nothing can be shown")
    single = [_text(condition) for condition, values in correct.items() if len(values) < 2]
    if single:
        names = "all methods" if len(single) == len(correct) else ", ".join(single)
        limits.append(
            f"one training of {names}: without several seeds there is no variance of training, and no verdict"
        )
    return limits


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return the rows of a table with None for NaN."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _sentence(row: Mapping[Any, Any]) -> str:
    """Return the verdict of a row of the summary in words."""
    against = row["reference"] if row["manifest"] == row["reference_manifest"] else _label_of_reference(row)
    text = f"{_label(row)}: {row['verdict']}, {_points(row['difference'])} points against {against}"
    if np.isnan(row["p"]):
        return text
    return (
        f"{text}, 95% [{_points(row['low'])}, {_points(row['high'])}], p {format_p(row['p_holm'])} (Holm); "
        f"smallest effect this design shows with power .8: {100 * row['smallest_effect']:.1f} points"
    )


def _label(row: Mapping[Any, Any]) -> str:
    control = "control " if row["kind"] == "control" else ""
    return f"{control}{row['method']}" + (f" on {row['manifest']}" if row["manifest"] else "")


def _label_of_reference(row: Mapping[Any, Any]) -> str:
    return f"{row['reference']} on {row['reference_manifest']}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _text(condition: Condition) -> str:
    return "/".join(part for part in condition if part)


def _latex(text: object) -> str:
    escaped = printable(text).replace("\\", r"\textbackslash ")
    return "".join(rf"\{char}" if char in "&%$#_{}" else char for char in escaped).replace("~", r"\textasciitilde ")
