"""Stages `score` and `finish`: the score table of a part, first without and then with what needs all samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .. import metrics as measures
from ..dataset.columns import SPLITS
from ..dataset.dataset import Dataset
from ..features.cached_matrix import FeatureMatrix, UsableRows
from ..features.encode import EncodeTask
from ..features.matrix import RowIndex
from ..probes.probe_set import ProbeSet
from ..scores.gap_checks import count_balanced
from ..scores.mixture import Mixture
from ..scores.sample_scores import compute_sample_scores, report_columns, score_columns, total_loss
from ..scores.stability import HalfAudit
from ..scores.table import ScoreTable, float_column, to_null
from ..workers import Progress
from .plan import Part
from .selection import Selection, content_digests


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRows:
    """The samples of one part in the order of the selection (b,), and the tables of the part's rows.

    row: their rows in the part (b,).
    """

    samples: RowIndex
    row: RowIndex
    rows: pa.Table
    status: pa.Table

    @classmethod
    def of(cls, selection: Selection, part: Part, *, rows: pa.Table, status: pa.Table) -> PartRows:
        """Find the samples of a part."""
        samples = selection.samples_in(part.first, part.num_rows)
        return cls(samples=samples, row=selection.row[samples] - part.first, rows=rows, status=status)


def part_inputs(
    dataset: Dataset, tasks: Sequence[EncodeTask], status: pa.Table, row: RowIndex, *, num_features: Sequence[int]
) -> tuple[FeatureMatrix, ...]:
    """Return the features of rows of one part, of which `tasks` are the shards, in each modality.

    num_features: of each modality, since a part may have no row with it.
    """
    usable = [status[f"usable {modality.name}"].to_numpy(zero_copy_only=False) for modality in dataset.modalities]
    statuses = [
        UsableRows(modality=modality, usable=mask) for modality, mask in zip(dataset.modalities, usable, strict=True)
    ]
    sizes = zip(statuses, num_features, strict=True)
    return tuple(FeatureMatrix.of(tasks, status, row, num_features=size) for status, size in sizes)


def score_part(
    probe_set: ProbeSet,
    selection: Selection,
    part: PartRows,
    *,
    path_columns: Sequence[str],
    halves: HalfAudit | None,
    seed: int,
    progress: Progress,
) -> tuple[pa.Table, pa.Table]:
    """Score the samples of a part.

    Returns:
        The score table in the order of the dataset, with nulls for what `finish_part` adds, and a table in the same
        order of what the report needs besides: see report_columns, and total_loss.
    """
    sample_scores = compute_sample_scores(probe_set, seed=seed, progress=progress)
    names = tuple(calibrated.name for calibrated in probe_set.probes)
    label, rows = selection.label_of(selection.target.label[part.samples]), part.rows.take(pa.array(part.row))
    contents = np.array(content_digests(part.status), dtype=object)
    group = None if selection.group is None else np.array(rows["group"].to_pylist(), dtype=object)
    paths = {f"path {name}": name for name in path_columns}
    scores = ScoreTable(
        sample_id=np.array(rows["id"].to_pylist(), dtype=object),
        label=label,
        label_name=np.array(selection.class_names, dtype=object)[label],
        modalities=names,
        split=np.array(SPLITS, dtype=object)[selection.split[part.samples]],
        group=group,
        fold=selection.cross_fits[0].fold[part.samples].astype(np.int16),
        content=contents[part.row],
        paths=rows.select(list(paths)).rename_columns(list(paths.values())),
        **score_columns(sample_scores, task=selection.target.task, classes=selection.classes),
        **_half_columns(halves, part.samples),
    )
    report = report_columns(sample_scores, names, joint=probe_set.joint is not None)
    table, order = scores.to_arrow(), np.argsort(part.row)
    measured = {name: values for name, values in report.items() if name not in table.column_names}
    measured["total_loss"] = total_loss(scores)
    return table.take(pa.array(order)), pa.table({name: values[order] for name, values in measured.items()})


def _half_columns(halves: HalfAudit | None, samples: RowIndex) -> dict[str, Any]:
    """Return the confidences of some samples by halves of the features, NaN where they were not measured."""
    if halves is None or halves.confidences is None:
        return {}
    num_measured = len(halves.confidences[0])
    columns = {}
    for name, confidence in zip(("half_a", "half_b"), halves.confidences, strict=True):
        columns[name] = np.full((len(samples), confidence.shape[1]), np.nan, np.float32)
        inside = samples < num_measured
        columns[name][inside] = confidence[samples[inside]]
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What the last columns of a part need of all samples: the ranges of two columns and the mixture of the gap."""

    similarity: tuple[float, float]
    total_loss: tuple[float, float]
    mixture: Mixture


def finish_part(scores: pa.Table, measured: pa.Table, whole: Whole, *, names: Sequence[str]) -> tuple[pa.Table, Any]:
    """Add balance and p_balanced to the score table of a part; return it with the counts of balanced_side."""
    similarity, total = float_column(scores, "similarity"), measured["total_loss"].to_numpy()
    balance = measures.minmax(similarity, whole.similarity) - measures.minmax(total, whole.total_loss)
    p_balanced = whole.mixture.posterior(float_column(scores, "gap"))
    for name, values in (("balance", balance), ("p_balanced", p_balanced)):
        index = scores.column_names.index(name)
        scores = scores.set_column(index, name, to_null(name, values))
    return scores, _count_balanced(scores, p_balanced >= 0.5, names=names)


def _count_balanced(scores: pa.Table, rows: Any, *, names: Sequence[str]) -> dict[str, int] | None:
    """Count the balanced samples of a part, see count_balanced; None without predicted classes."""
    columns = [f"prediction_{name}" for name in names]
    if any(name not in scores.column_names or pa.types.is_floating(scores[name].type) for name in columns):
        return None
    label = scores["label"].to_numpy()
    right = np.stack([scores[name].fill_null(-1).to_numpy() == label for name in columns], axis=1)
    present = np.stack([scores[f"confidence_{name}"].is_valid().to_numpy() for name in names], axis=1)
    return count_balanced(rows, right, present)


def take_probes(probe_set: ProbeSet, samples: RowIndex, inputs: Sequence[FeatureMatrix]) -> ProbeSet:
    """Return the probe set of the samples of a part; of all samples itself, without a copy."""
    return probe_set if len(samples) == len(probe_set.target) else probe_set.take(samples, inputs)
