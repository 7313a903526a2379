"""Stage `merge`: what holds for all samples, from columns of the parts, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.modalities import Modality
from ..errors import Quarantined
from ..label_leaks import LabelLeak, LeakColumns, find_label_leaks
from ..metrics import Floats, value_range
from ..probes.probe_set import Calibration
from ..row_arrays import gather, scatter
from ..scores.gap_checks import (
    PERMUTED_ROWS,
    ClassCheck,
    MarginCheck,
    balanced_side,
    fit_by_class,
    permute_within_classes,
)
from ..scores.mixture import Mixture, MixtureConfig, fit_mixture
from ..scores.probe_report import Control, ProbeReport, compute_probe_report
from ..scores.stability import BisectionAudit, HalfAudit
from .scoring import Whole
from .selection import Selection, number_by_occurrence


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Results for all samples; see the fields of run.json with the same names."""

    whole: Whole
    class_check: ClassCheck
    margin_check: MarginCheck
    probe_report: ProbeReport
    label_leaks: tuple[LabelLeak, ...]

    @property
    def mixture(self) -> Mixture:
        """Mixture of the gap."""
        return self.whole.mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class PartColumns:
    """Columns of all samples, each read from the tables of all parts when it is needed.

    tables: reads the score table of a part and that of what the report needs besides.
    """

    num_parts: int
    tables: Callable[[int], tuple[pa.Table, pa.Table]]
    order: NDArray[np.integer[Any]]  # the samples in the order of the dataset

    def in_dataset_order(self, name: str) -> Floats:
        """Read a column in the order of the dataset (n,), null as NaN."""
        values = np.empty(len(self.order), dtype=np.float32)
        start = 0
        for index in range(self.num_parts):
            scores, measured = self.tables(index)
            if not scores.num_columns:
                continue  # no sample of the part is scored
            column = (scores if name in scores.column_names else measured)[name]
            values[start : start + len(column)] = column.to_numpy()
            start += len(column)
        return values

    def read(self, name: str) -> Floats:
        """Read a column in the order of the selection (n,), null as NaN."""
        values = np.empty(len(self.order), dtype=np.float32)
        return scatter(self.in_dataset_order(name), self.order, values)


def merge(
    selection: Selection,
    columns: PartColumns,
    *,
    modalities: Sequence[Modality],
    calibrations: Mapping[str, Calibration],
    controls: Sequence[Control],
    mixture: MixtureConfig,
    seed: int,
) -> Merged:
    """Compute what holds for all samples.

    The mixture and the ranges are those of the samples outside the test split. What permutes samples takes the first
    200,000, in the order of the hashes of their ids.
    """
    chooses = selection.not_test
    gap, label = columns.read("gap")[chooses], selection.label[chooses]
    fitted = fit_mixture(gap, config=mixture, seed=seed)
    class_check = fit_by_class(gap, label, config=mixture, seed=seed)
    permuted = np.flatnonzero(chooses)[:PERMUTED_ROWS]
    names = [modality.name for modality in modalities]
    confidence = np.stack([columns.read(f"confidence_{name}")[permuted] for name in names], axis=1)
    options: dict[str, Any] = {"config": mixture, "seed": seed, "bimodal": fitted.bimodal}
    return Merged(
        whole=Whole(
            similarity=value_range(columns.read("similarity"), chooses),
            total_loss=value_range(columns.read("total_loss"), chooses),
            mixture=fitted,
        ),
        class_check=class_check,
        margin_check=permute_within_classes(confidence, selection.label[permuted], **options),
        probe_report=compute_probe_report(
            columns.read, selection.target, calibrations, groups=selection.groups, controls=controls
        ),
        label_leaks=_label_leaks(selection, columns, modalities),
    )


def _label_leaks(selection: Selection, columns: PartColumns, modalities: Sequence[Modality]) -> tuple[LabelLeak, ...]:
    """Find label leaks; the samples are in the order of the dataset."""
    order, names = columns.order, [modality.name for modality in modalities]
    split, is_class = gather(selection.split, order), selection.target.task == "classification"

    def values(index: int) -> NDArray[np.float64]:
        kind = "correct" if is_class else "confidence"
        return columns.in_dataset_order(f"{kind}_{names[index]}").astype(np.float64)

    leak_columns = LeakColumns(
        modalities=tuple(names),
        is_class=is_class,
        label=gather(selection.label, order),
        train=split == SPLITS.index("train"),
        test=split == SPLITS.index("test"),
        groups=None if selection.group is None else number_by_occurrence(selection.group[order]),
        values=values,
    )
    return tuple(find_label_leaks(leak_columns, kinds={modality.name: modality.kind for modality in modalities}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Results of scoring, but for the score table: what run.json states. Every row is either scored or quarantined."""

    fingerprint: str
    quarantined: Sequence[Quarantined]
    num_scored: int
    num_classes: int
    num_groups: int | None
    num_folds: int
    mixture: Mixture
    class_check: ClassCheck
    margin_check: MarginCheck
    balanced_side: dict[str, float] | None
    probe_report: ProbeReport
    label_leaks: tuple[LabelLeak, ...]
    halves: HalfAudit | None
    bisections: BisectionAudit | None

    @classmethod
    def of(
        cls, selection: Selection, merged: Merged, *, halves: HalfAudit | None, bisections: BisectionAudit | None
    ) -> Audit:
        """Collect the results; `balanced_side` follows from finished parts."""
        return cls(
            fingerprint=selection.fingerprint,
            quarantined=selection.quarantined,
            num_scored=len(selection),
            num_classes=len(np.unique(selection.label)),
            num_groups=selection.num_groups,
            num_folds=selection.cross_fits[0].num_folds,
            mixture=merged.mixture,
            class_check=merged.class_check,
            margin_check=merged.margin_check,
            balanced_side=None,
            probe_report=merged.probe_report,
            label_leaks=merged.label_leaks,
            halves=halves,
            bisections=bisections,
        )

    def with_balanced(self, counts: Sequence[Mapping[str, int] | None]) -> Audit:
        """Return the results with the balanced samples of all parts, counted by finish_part."""
        return replace(self, balanced_side=balanced_side(counts))
