"""Agreement of two score tables of the same samples: of their discrepancies, their gaps and the subsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..audit.agreement import MIN_SAMPLES, Agreement, ceiling, rank_agreement, reliability_of_mean, side_agreement
from ..audit.errors import ScoreError
from ..audit.metrics import DOMINATED_THRESHOLDS, Floats, dominated_name
from ..audit.parsing import provenance_section
from ..audit.scores.table import ScoreTable
from .diff import changed_provenance

_SETTINGS = ("config.data.encoder", "config.probe", "config.network", "config.media", "config.seed", "modalities")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureAgreement:
    """Agreement of one measure in two score tables.

    Attributes:
        measure: discrepancy or gap.
        between: The two modalities, as A:B.
        rank: Spearman's rank correlation within classes.
        ceiling_features: Largest correlation of measures as reliable as these two by halves of the features; None where
            a table has no halves.
        ceiling_folds: The same by other folds with the same features; None where a table has no repeats, or more than
            two modalities.
    """

    measure: str
    between: str
    rank: Agreement
    ceiling_features: float | None
    ceiling_folds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SideAgreement:
    """Cohen's kappa of the samples of either side of two tables: preferred at the threshold 0, dominated above it."""

    between: str
    threshold: float
    kappa: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAgreement:
    """Agreement of two score tables, A and B, on the samples in both. Rows are joined by id.

    Attributes:
        a: Name of table A.
        b: Name of table B.
        rows_a: Samples in A.
        rows_b: Samples in B.
        both: Samples in both, of which everything else is.
        labels_differ: Samples in both whose classes have other names.
        modalities: Modalities in both.
        same_dataset: Whether the fingerprints are equal; None if one of them is not recorded.
        settings: Settings and encoders that differ, as {path: (A's value, B's)}.
        measures: Rank agreement of discrepancy and gap, for each pair of modalities.
        sides: Kappa of the subsets, for each pair of modalities.
    """

    a: str
    b: str
    rows_a: int
    rows_b: int
    both: int
    labels_differ: int
    modalities: tuple[str, ...]
    same_dataset: bool | None
    settings: dict[str, tuple[Any, Any]]
    measures: tuple[MeasureAgreement, ...]
    sides: tuple[SideAgreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the agreement as JSON values."""
        content = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()} | {
            "settings": {path: list(pair) for path, pair in self.settings.items()}
        }

    def lines(self) -> list[str]:
        """Return the agreement as lines of text for the terminal."""
        lines = [
            f"A {self.a}: {self.rows_a:,} samples, B {self.b}: {self.rows_b:,}; {self.both:,} in both are compared"
        ]
        if self.same_dataset is False:
            lines.append("the fingerprints differ: other data, or another test split was cut")
        if self.labels_differ:
            lines.append(f"label: {self.labels_differ:,} samples are of another class in B; A's classes are used")
        lines += [f"{path}: {value_a!r} in A, {value_b!r} in B" for path, (value_a, value_b) in self.settings.items()]
        lines += [_measure_line(row) for row in self.measures]
        lines += [_side_line(row) for row in self.sides]
        return lines


def compare_scores(a: ScoreTable, b: ScoreTable, *, name_a: str = "A", name_b: str = "B") -> ScoreAgreement:
    """Compare two score tables by id: how alike the discrepancies of single samples are, and how alike they could be.

    Args:
        a, b: The tables; with other samples, those in both are compared.
        name_a, name_b: What they are called in the result.

    Raises:
        ScoreError: Fewer than 20 samples, or fewer than two modalities, are in both.
    """
    modalities = tuple(name for name in a.modalities if name in b.modalities)
    if len(modalities) < 2:
        raise ScoreError(
            f"{name_a} has the modalities {', '.join(a.modalities)}, {name_b} {', '.join(b.modalities)}: a discrepancy "
            "needs two in common"
        )
    row_of = {name: row for row, name in enumerate(b.sample_id.tolist())}
    in_a = [row for row, name in enumerate(a.sample_id.tolist()) if name in row_of]
    if len(in_a) < MIN_SAMPLES:
        raise ScoreError(
            f"{name_a} and {name_b} have {len(in_a)} samples in common, at least {MIN_SAMPLES} are needed: compare "
            "score tables of the same data"
        )
    first = a.take(np.array(in_a, dtype=np.intp))
    second = b.take(np.array([row_of[name] for name in first.sample_id.tolist()], dtype=np.intp))
    fingerprints = [table.provenance.get("fingerprint") for table in (a, b)]
    changed = changed_provenance(a.provenance, b.provenance)
    return ScoreAgreement(
        a=name_a,
        b=name_b,
        rows_a=len(a),
        rows_b=len(b),
        both=len(first),
        labels_differ=int((first.label_name.astype(str) != second.label_name.astype(str)).sum()),
        modalities=modalities,
        same_dataset=None if None in fingerprints else fingerprints[0] == fingerprints[1],
        settings={path: pair for path, pair in changed.items() if path.startswith(_SETTINGS)},
        measures=tuple(_measures(first, second, modalities)),
        sides=tuple(_sides(first, second, modalities)),
    )


def _measures(a: ScoreTable, b: ScoreTable, modalities: tuple[str, ...]) -> Iterator[MeasureAgreement]:
    for pair in combinations(modalities, 2):
        for measure in ("discrepancy", "gap"):
            values = [_measure(table, table.confidence, pair, measure) for table in (a, b)]
            halves = [reliability_by_halves(table, pair, measure=measure) for table in (a, b)]
            folds = [reliability_by_folds(table, pair) if measure == "discrepancy" else None for table in (a, b)]
            yield MeasureAgreement(
                measure=measure,
                between=":".join(pair),
                rank=rank_agreement(*values, label=a.label, sample_id=a.sample_id, group=a.group),
                ceiling_features=ceiling(*halves),
                ceiling_folds=ceiling(*folds),
            )


def _sides(a: ScoreTable, b: ScoreTable, modalities: tuple[str, ...]) -> Iterator[SideAgreement]:
    for pair in combinations(modalities, 2):
        values = [_measure(table, table.confidence, pair, "discrepancy") for table in (a, b)]
        for threshold in (0, DOMINATED_THRESHOLDS[0]):
            kappa = side_agreement(*values, threshold=threshold, sample_id=a.sample_id, group=a.group)
            yield SideAgreement(between=":".join(pair), threshold=threshold, kappa=kappa)


def _measure(table: ScoreTable, confidence: Floats, pair: tuple[str, ...], measure: str) -> Floats:
    first, second = (confidence[:, table.modalities.index(name)] for name in pair)
    return np.asarray(first - second if measure == "discrepancy" else np.abs(first - second))


def reliability_by_halves(table: ScoreTable, pair: tuple[str, ...], *, measure: str = "discrepancy") -> float | None:
    """Compute the reliability in [0, 1] of a measure by all features, from those by two disjoint halves of them.

    Spearman-Brown of the rank agreement within classes of the halves; None where the table has no halves.
    """
    if table.half_a is None or table.half_b is None:
        return None
    halves = [_measure(table, half, pair, measure) for half in (table.half_a, table.half_b)]
    r = rank_agreement(*halves, label=table.label, sample_id=table.sample_id, group=table.group).value
    return None if r is None else reliability_of_mean(r, 2)


def reliability_by_folds(table: ScoreTable, pair: tuple[str, ...]) -> float | None:
    """Compute the reliability in [0, 1] of a discrepancy over other folds, with the same features.

    One minus the variance over R repeats, divided by R, as a share of the variance within classes. None where the table
    has one repeat, does not state their number, or has more than two modalities, whose pairs have no deviation.
    """
    repeats = provenance_section(provenance_section(table.provenance, "config"), "probe").get("repeats")
    if table.discrepancy_sd is None or len(table.modalities) > 2 or not isinstance(repeats, int) or repeats < 2:
        return None
    values, noise = table.discrepancy(":".join(pair)).astype(np.float64), table.discrepancy_sd[:, 0]
    valid = ~(np.isnan(values) | np.isnan(noise))
    codes = np.unique(table.label[valid], return_inverse=True)[1]
    means = np.bincount(codes, weights=values[valid]) / np.bincount(codes)
    variance = float(((values[valid] - means[codes]) ** 2).mean())
    return max(0.0, 1 - float((noise[valid] ** 2).mean()) / repeats / variance) if variance > 1e-12 else None


def _measure_line(row: MeasureAgreement) -> str:
    name = f"{row.measure} {row.between}"
    if row.rank.value is None:
        return f"{name}: no rank agreement, since the measure does not vary within classes in both tables"
    ceilings = [
        f"{value:.2f} {text}"
        for value, text in ((row.ceiling_features, "by other features"), (row.ceiling_folds, "by other folds"))
        if value is not None
    ]
    text = f"{name}: rank agreement within classes {_interval(row.rank)}"
    return f"{text}; ceiling {', '.join(ceilings)}" if ceilings else f"{text}; ceiling not measured"


def _side_line(row: SideAgreement) -> str:
    first, _, second = row.between.partition(":")
    names = [dominated_name(side, row.threshold) for side in (first, second)]
    if row.kappa.value is None:
        return f"{names[0]} and {names[1]}: all samples are on one side in both tables"
    rest = " and the rest" if row.threshold else ""
    return f"{names[0]}, {names[1]}{rest}: Cohen's kappa {_interval(row.kappa)}"


def _interval(agreement: Agreement) -> str:
    return f"{agreement.value:.2f}, 95% [{agreement.low:.2f}, {agreement.high:.2f}]"
