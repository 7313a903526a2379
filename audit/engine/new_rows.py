"""Rows that the saved probes of a run score: their labels and splits as in the run, and the probes that score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.labels import NO_LABEL, NO_NAMES, OTHER, UNKNOWN_LABEL, Labels, Target
from ..errors import DatasetError, Quarantined, Reason
from ..features.encoded_samples import select_usable, sort_quarantined
from ..hashing import hash_rank
from ..probes.cross_fit import CrossFit
from ..probes.folds import KEY_PURPOSE, fold_purposes
from .fit_results import FitResults
from .plan import Part
from .row_data import CUT_PURPOSE, ORDER_PURPOSE, EncodedData, RowData
from .run_state import RunState, hash_groups
from .selection import Selection, quarantined_tables, selection_record, selection_tables
from .stages import ScoringJob, encode, read_rows


class OtherRowsNeeded(Exception):  # no error: caught by the caller, who reads all rows
    """What is to be decided of some parts of the data depends on rows of other parts."""


def read_as_in_run(
    job: ScoringJob, state: RunState, *, trust_unchanged: bool, parts: Sequence[Part] | None = None
) -> EncodedData:
    """Read and encode the rows of a job, or of some consecutive parts, with labels and splits as in a run.

    See as_in_run and encode_dataset.
    """
    parts = job.plan.parts if parts is None else parts
    read_rows(job, parts)
    data = job.row_data(read_as=state.read_as, parts=parts)
    encode(job, parts, trust_unchanged=trust_unchanged)
    data = as_in_run(data, state, seed=job.seed, test_fraction=job.test_fraction)
    return job.encoded(data, parts=parts, num_features=state.num_features)


def as_in_run(data: RowData, state: RunState, *, seed: int, test_fraction: float) -> RowData:
    """Return rows whose labels are numbered as those of a run, and whose splits follow from its own if it cut one.

    Raises:
        DatasetError: No label is a class of the run.
    """
    labels = _labels_as_in_run(data.labels, state)
    if not (labels.label >= 0).any():
        names = ", ".join(state.labels["texts"][:5] if state.task == "classification" else state.labels["outputs"][:5])
        raise DatasetError(f"{data.dataset.source}: no label is a class of the run, which has {names}")
    split = data.split
    if state.keys.split is not None:
        split = _splits_as_in_run(data, state, seed=seed, test_fraction=test_fraction)
    return replace(data, labels=labels, split=split)


def _labels_as_in_run(labels: Labels, state: RunState) -> Labels:
    if state.task == "classification":
        number_of = {text: number for number, text in enumerate(state.labels["texts"])}
        numbers = [number_of.get(text, UNKNOWN_LABEL) for text in labels.texts]
        label = np.array([*numbers, UNKNOWN_LABEL, NO_LABEL], dtype=np.int32)[labels.label]  # -2 and -1 are the last
        new = np.flatnonzero((label == UNKNOWN_LABEL) & (labels.label >= 0)).tolist()
        unknown = (*labels.unknown, *((row, labels.texts[labels.label[row]]) for row in new))
        return replace(labels, label=label, unknown=unknown, names=state.class_names, outputs=state.class_names)
    if state.task == "regression":
        return replace(labels, names=state.class_names)
    return _label_sets_as_in_run(labels, state)


def _label_sets_as_in_run(labels: Labels, state: RunState) -> Labels:
    """Return label sets whose columns are the run's; a row with another label is unknown."""
    assert labels.values is not None
    outputs = state.labels["outputs"]
    columns = {name: column for column, name in enumerate(labels.outputs)}
    zeros = np.where(np.isnan(labels.values[:, :1]), np.nan, 0).astype(np.float32)
    values = np.concatenate(
        [labels.values[:, [columns[name]]] if name in columns else zeros for name in outputs], axis=1
    )
    added = [column for name, column in columns.items() if name not in outputs]
    strange = np.flatnonzero((labels.values[:, added] == 1).any(axis=1)).tolist()
    first = {row: labels.outputs[added[int((labels.values[row, added] == 1).argmax())]] for row in strange}
    names = state.class_names if OTHER in state.class_names else (*state.class_names, OTHER)
    number_of = {name: number for number, name in enumerate(names)}
    label = labels.label.copy()
    for row in np.flatnonzero(label >= 0).tolist():
        present = "|".join(name for name, value in zip(outputs, values[row].tolist(), strict=True) if value == 1)
        label[row] = UNKNOWN_LABEL if row in first else number_of.get(present or NO_NAMES, number_of[OTHER])
    values[strange] = np.nan
    unknown = (*labels.unknown, *first.items())
    return replace(labels, label=label, values=values, names=names, outputs=tuple(outputs), unknown=unknown)


def _splits_as_in_run(data: RowData, state: RunState, *, seed: int, test_fraction: float) -> NDArray[np.int8]:
    """Return the split of rows where the run cut one: of known groups or ids theirs, of others by their hashes.

    A row's split does not depend on other rows, so that it stays when more are appended.
    """
    assert state.keys.split is not None
    if data.group is None:
        known = state.keys.find(data.hash_ids(seed=0, purpose=ORDER_PURPOSE))
        keys = data.hash_ids(seed=seed, purpose=CUT_PURPOSE)
    else:
        known = state.keys.find(hash_groups(data.group_names))
        keys = hash_rank(data.group_names, seed=seed, purpose=CUT_PURPOSE)
    is_test = keys < np.uint64(test_fraction * 2.0**64)
    cut = np.where(is_test, SPLITS.index("test"), SPLITS.index("train"))
    split = np.where(known >= 0, state.keys.split[known], cut).astype(np.int8)
    return split if data.group is None else split[data.group]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRows:
    """The rows that the probes of a run score.

    num_known: How many of them the run knows by group, id or content. num_trained: How many have the content of a
    sample of another group, which a probe of theirs was trained on.
    """

    selection: Selection
    num_known: int
    num_trained: int


def select_new(
    encoded: EncodedData,
    state: RunState,
    *,
    is_new: NDArray[np.bool_],
    seed: int,
    copies: str,
    fingerprint: str,
    is_whole: bool = True,
) -> NewRows:
    """Select what of the rows of a mask (N,) is scored, with the folds whose probes were not trained on it.

    A row of a group that the run knows has the fold of the group; where there are no groups, that of its content or
    id. Other rows have the fold of their content if it is known, or one drawn by the hash of their group or id: they
    are scored by one probe of each repeat, as the run's own test samples are.

    Args:
        encoded: All rows, with labels and splits as in the run.
        state: The run.
        is_new: The rows that may be scored.
        seed: Seed of the run.
        copies: Which rows are quarantined as copies: "known", rows with the content of a scored one, before them or in
            the run; "trained", those of a known group, of whose content a probe of their fold was trained on a copy;
            "none".
        fingerprint: Fingerprint of the data.
        is_whole: Whether the rows are those of all parts.

    Raises:
        OtherRowsNeeded: Whether rows are copies depends on rows of other parts.
    """
    data = encoded.samples
    rows, left_out = select_usable(encoded, keep_duplicates=True)
    rows = rows[is_new[rows]]
    names = set(data.ids_of(np.flatnonzero(is_new)).tolist())
    left_out = [entry for entry in left_out if entry.sample_id in names]
    if state.task == "classification":
        has_probe = np.isin(data.label[rows], state.classes)
        left_out += _without_probe(data, rows[~has_probe])
        rows = rows[has_probe]
    rows = data.canonical_order(rows).astype(np.intp)
    words = encoded.content_word(0)[rows]
    folds, is_known, is_trained = _folds(data, rows, words, state, seed=seed)
    is_copy = (
        _copies(encoded, rows, words, state, is_whole=is_whole)
        if copies == "known"
        else is_trained & (copies == "trained")
    )
    left_out += [
        Quarantined(sample_id=name, reason=Reason.DUPLICATE, detail="the same content as a scored sample")
        for name in data.ids_of(rows[is_copy])
    ]
    selection = _selection(
        encoded, rows[~is_copy], folds[:, ~is_copy], state, seed=seed, fingerprint=fingerprint, left_out=left_out
    )
    num_known, num_trained = int(is_known[~is_copy].sum()), int(is_trained[~is_copy].sum())
    return NewRows(selection=selection, num_known=num_known, num_trained=num_trained)


def _selection(
    encoded: EncodedData,
    rows: NDArray[np.intp],
    folds: NDArray[np.int16],
    state: RunState,
    *,
    seed: int,
    fingerprint: str,
    left_out: list[Quarantined],
) -> Selection:
    data, n = encoded.samples, len(rows)
    values = data.labels.values
    label = data.label[rows]
    target = np.searchsorted(state.classes, label).astype(np.int32) if state.task == "classification" else label
    # Networks score rows in the order of the keys.
    key = hash_rank(data.ids_of(rows), seed=seed, purpose=KEY_PURPOSE)
    common: dict[str, Any] = {"key": key, "fits": np.zeros(n, bool), "inner": np.zeros(n, np.int16)}
    is_scored = np.zeros(len(data), dtype=bool)
    is_scored[rows] = True
    return Selection(
        row=rows,
        target=Target(
            task=state.task,
            label=target,
            num_outputs=state.num_outputs,
            values=None if values is None else values[rows],
        ),
        classes=state.classes,
        class_names=data.class_names,
        split=data.split[rows],
        group=None if data.group is None else data.group[rows],
        cross_fits=tuple(
            CrossFit(fold=fold, num_folds=number, **common) for fold, number in zip(folds, state.num_folds, strict=True)
        ),
        usable_bits=encoded.usable_bits,
        quarantined=sort_quarantined(left_out, data.ids_of(np.flatnonzero(~is_scored))),
        fingerprint=fingerprint,
    )


def _without_probe(data: RowData, rows: NDArray[np.intp]) -> list[Quarantined]:
    """Return an entry for each row of a class that the run has no probe of, since it had too few samples of it."""
    return [
        Quarantined(
            sample_id=name,
            reason=Reason.RARE_CLASS,
            detail=f"the run has no probe of the class {data.class_names[number]!r}",
        )
        for name, number in zip(data.ids_of(rows), data.label[rows].tolist(), strict=True)
    ]


def _folds(
    data: RowData, rows: NDArray[np.intp], words: NDArray[np.uint64], state: RunState, *, seed: int
) -> tuple[NDArray[np.int16], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the folds (r, b) of rows, whether the run knows them, and whether a probe was trained on their content."""
    content = state.contents.find(words)
    own = _known_keys(data, rows, state)
    by_content, by_key = state.contents.fold[:, content], state.keys.fold[:, own]
    has_content, has_key = content >= 0, (own >= 0) & (by_key[0] >= 0)
    drawn = np.stack(
        [
            (_hashes(data, rows, seed=seed, purpose=fold_purposes(repeat)[0]) % np.uint64(number)).astype(np.int16)
            for repeat, number in enumerate(state.num_folds)
        ]
    )
    if state.by_group:
        folds = np.where(has_key, by_key, np.where(has_content, by_content, drawn))
    else:
        folds = np.where(has_content, by_content, np.where(has_key, by_key, drawn))
    is_trained = has_content & (folds != by_content).any(axis=0)
    return folds.astype(np.int16), has_content | has_key, is_trained


def _known_keys(data: RowData, rows: NDArray[np.intp], state: RunState) -> NDArray[np.intp]:
    """Return the entry of the group of each row, or of its id where the run has no groups; negative without one."""
    if not state.by_group:
        return state.keys.find(data.hash_ids(seed=0, purpose=ORDER_PURPOSE)[rows])
    if data.group is None:
        return np.full(len(rows), -1, dtype=np.intp)
    return state.keys.find(hash_groups(data.group_names))[data.group[rows]]


def _hashes(data: RowData, rows: NDArray[np.intp], *, seed: int, purpose: str) -> NDArray[np.uint64]:
    if data.group is None:
        return hash_rank(data.ids_of(rows), seed=seed, purpose=purpose)
    return data.hash_groups(seed=seed, purpose=purpose)[data.group[rows]]


def _copies(
    encoded: EncodedData, rows: NDArray[np.intp], words: NDArray[np.uint64], state: RunState, *, is_whole: bool
) -> NDArray[np.bool_]:
    """Return which rows (b,) have the content of a row of the run, or of one before them in the data, not by chance."""
    order = np.lexsort((rows, words))
    is_copy = np.zeros(len(rows), dtype=bool)
    is_copy[order[1:]] = words[order][1:] == words[order][:-1]
    is_copy |= state.contents.find(words) >= 0
    if is_copy.any():
        copied = rows[is_copy]
        is_media = [modality.kind not in ("features", "text") for modality in encoded.modalities]
        has_vectors = any(modality.kind == "features" for modality in encoded.modalities)
        if not is_whole and has_vectors and not encoded.usable[copied][:, is_media].any(axis=1).all():
            raise OtherRowsNeeded  # whether vectors recur by chance is decided on all of them
        is_copy[is_copy] = encoded.is_distinctive[copied]
    return is_copy


def save_selection(
    job: ScoringJob, selection: Selection, state: RunState, *, about: Mapping[str, Any] | None = None
) -> FitResults:
    """Write a selection into the store of a job in place of the stage `fit`, and return the results that it stands for.

    The stages `score` and `finish` then score its rows with the probes of the job. about: JSON values that are kept
    with the selection, see `selected`.
    """
    counts: Mapping[str, Any] = {
        "selection": selection_record(selection),
        "controls": [],
        "num_features": list(state.num_features),
        "bisections": None,
        "about": dict(about or {}),
    }
    samples, rows = selection_tables(selection)
    job.store.write("halves", pa.table({}), counts={"halves": None})
    job.store.write("usable", rows)
    job.store.write_pieces("quarantined", quarantined_tables(selection))
    job.store.write("selection", samples, counts=counts)
    return FitResults(job=job)


def selected(job: ScoringJob) -> dict[str, Any]:
    """Return what save_selection kept with a selection."""
    return dict(job.store.counts("selection")["about"])
