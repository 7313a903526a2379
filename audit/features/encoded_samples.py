"""Encoded samples: a dataset with the status of each modality of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.cells import null_error
from ..dataset.dataset import Dataset
from ..dataset.labels import MAX_NUMBER
from ..dataset.modalities import Modality
from ..dataset.samples import Samples
from ..errors import DatasetError, Quarantined, Reason, ScoreError, UnusableError
from ..hashing import digest
from .cached_matrix import recurring_rows
from .encode import EncodeTask, column_of, content_of, load_cell_content, read_arrow
from .vectors import check_lengths, encode_vectors

_DATA_CHANGED = "the data changed while they were read: run the command again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Encoding status of n samples in one modality.

    usable: bool (n,). content: digests of the input (n,), dtype S32. recurs: bool (n,), whether equal content occurs by
    chance, see `recurring_rows`. problem: (row, reason, detail) of each unusable sample.
    """

    modality: Modality
    usable: NDArray[np.bool_]
    content: NDArray[np.bytes_]
    recurs: NDArray[np.bool_]
    problem: tuple[tuple[int, Reason, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSamples:
    """The samples of a dataset and their encoding status in each modality."""

    samples: Samples
    statuses: tuple[Status, ...]

    @property
    def content(self) -> NDArray[np.object_]:
        """Digest of each sample (n,) over all its modalities."""
        return row_content([status.content for status in self.statuses])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of ids, labels, splits, groups and content; independent of row order and file format."""
        return dataset_fingerprint(self.samples, self.content)


def dataset_fingerprint(samples: Samples, content: NDArray[np.object_]) -> str:
    """Return the fingerprint of samples and their content digests (n,); see EncodedSamples.content."""
    # Negative labels index the last two entries.
    names = np.array([*samples.class_names, "", ""], dtype=object)[samples.label]
    group = samples.group if samples.group is not None else np.full(len(samples), "", dtype=object)
    rows = zip(samples.sample_id, names, samples.split, group, content, strict=True)
    return digest(*sorted("\0".join(row).encode() for row in rows))


def collect_encoded(dataset: Dataset, samples: Samples, tasks: Sequence[EncodeTask]) -> EncodedSamples:
    """Read the encoding status of every sample of an encoded dataset from the cache."""
    statuses = tuple(read_status(tasks, modality, samples.sample_id) for modality in dataset.modalities)
    return EncodedSamples(samples=samples, statuses=statuses)


def read_status(tasks: Sequence[EncodeTask], modality: Modality, sample_id: NDArray[np.object_]) -> Status:
    """Read the status of all samples of a dataset, in dataset order, in one modality from the cache.

    A million samples take 33 MB. Raises DatasetError if no sample is usable, or vectors differ in length.
    """
    num_rows = len(sample_id)
    usable, content = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype="S32")
    problem: list[tuple[int, Reason, str]] = []
    lengths: set[int] = set()
    start = 0
    for task in tasks:
        table = read_arrow(task.file(modality))
        rows = slice(start, start + table.num_rows)
        if not column_of(table, "sample_id").equals(pa.array(sample_id[rows], pa.string())):
            raise DatasetError(_DATA_CHANGED)
        usable[rows] = column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
        content[rows] = content_of(table)
        problem += [(start + row, reason, detail) for row, reason, detail in problems_of(table)]
        lengths |= lengths_of(table)
        start = rows.stop
    if start != num_rows:
        raise DatasetError(_DATA_CHANGED)
    if not usable.any():
        first = problem[0]
        raise DatasetError(f"no sample has a usable {modality.name}; the first: {first[1].value}, {first[2]}")
    check_lengths(lengths, modality)
    status = Status(
        modality=modality, usable=usable, content=content, recurs=np.zeros(num_rows, bool), problem=tuple(problem)
    )
    return replace(status, recurs=recurring_rows(tasks, status))


def problems_of(table: pa.Table) -> Iterator[tuple[int, Reason, str]]:
    """Yield row, reason and detail of each unusable row."""
    rows = np.flatnonzero(column_of(table, "reason").is_valid().to_numpy(zero_copy_only=False))
    unusable = table.select(["reason", "detail"]).take(pa.array(rows)).to_pydict()
    for row, reason, detail in zip(rows.tolist(), unusable["reason"], unusable["detail"], strict=True):
        yield row, Reason(reason), detail


def lengths_of(table: pa.Table) -> set[int]:
    """Return the distinct lengths of the usable vectors."""
    vector = column_of(table, "vector")
    valid = vector.is_valid().to_numpy(zero_copy_only=False)
    return set(np.unique(np.diff(vector.offsets.to_numpy())[valid]).tolist())


def row_content(contents: Sequence[NDArray[np.bytes_]]) -> NDArray[np.object_]:
    """Return one digest per sample (n,) over the digests (n,) of all its modalities."""
    parts = zip(*(content.tolist() for content in contents), strict=True)
    return np.array([digest(b"".join(row)) for row in parts], dtype=object)


def missing_in_source(status: Status) -> NDArray[np.bool_]:
    """Return a mask (n,) of the samples that lack this modality in the source.

    Their cell is null, or their clip has other tracks only, as a silent film among films with sound.
    """
    missing = np.zeros(len(status.usable), dtype=bool)
    null = null_error(status.modality.column)
    for row, reason, detail in status.problem:
        missing[row] = reason is Reason.NO_TRACK or (reason, detail) == (null.reason, null.detail)
    return missing


def select_usable(encoded: EncodedSamples, *, keep_duplicates: bool) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Return the rows that can be scored, and the reasons for every excluded sample.

    A sample is scored if it has a label, at least two usable modalities and no damaged one: a null in the source, or a
    clip without this track, counts as a missing modality. Of samples with the same content in every modality only the
    one with the smallest id is scored, unless `keep_duplicates`, or unless the content of all of them recurs by chance.
    """
    samples, statuses = encoded.samples, encoded.statuses
    missing = np.stack([missing_in_source(status) for status in statuses], axis=1)
    usable = np.stack([status.usable for status in statuses], axis=1)
    is_scorable = (usable | missing).all(axis=1) & (usable.sum(axis=1) >= 2)
    quarantined = [
        Quarantined(sample_id=samples.sample_id[row], modality=status.modality.name, reason=reason, detail=detail)
        for status in statuses
        for row, reason, detail in status.problem
        if not is_scorable[row]
    ]
    quarantined += _without_label(samples)
    rows = np.flatnonzero((samples.label >= 0) & is_scorable)
    if not keep_duplicates:
        rows, copies = _drop_duplicates(encoded, rows)
        quarantined += copies
    if len(rows) == 0:
        requirement = "a label, at least two usable modalities and no damaged one"
        raise ScoreError(f"no sample has {requirement}; the first problem: {quarantined[0]}")
    return rows, quarantined


def sort_quarantined(quarantined: Sequence[Quarantined], sample_id: NDArray[np.object_]) -> tuple[Quarantined, ...]:
    """Sort excluded samples by sample order; several reasons of one sample keep their order."""
    row_of_id = {name: row for row, name in enumerate(sample_id.tolist())}
    return tuple(sorted(quarantined, key=lambda entry: row_of_id[entry.sample_id]))


def _without_label(samples: Samples) -> list[Quarantined]:
    """Return an entry for each sample without a label, or with an unknown one."""
    unknown, quarantined = dict(samples.unknown), []
    for row in np.flatnonzero(samples.label < 0).tolist():
        reason, detail = Reason.NO_LABEL, "the label is null"
        if row in unknown and samples.class_names:
            reason, detail = Reason.UNKNOWN_LABEL, f"{unknown[row]!r} is not among the classes"
        elif row in unknown:
            reason, detail = Reason.UNKNOWN_LABEL, f"{unknown[row]} is not a number of at most {MAX_NUMBER:g}"
        quarantined.append(Quarantined(sample_id=samples.sample_id[row], reason=reason, detail=detail))
    return quarantined


def _drop_duplicates(encoded: EncodedSamples, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Return the rows without duplicates in every modality, and the duplicates; of equal rows the smallest id stays."""
    samples, content = encoded.samples, encoded.content[rows]
    order = np.lexsort((samples.sample_id[rows].astype(str), content.astype(str)))
    is_distinctive = np.any([status.usable & ~status.recurs for status in encoded.statuses], axis=0)
    is_copy = np.r_[False, content[order][1:] == content[order][:-1]] & is_distinctive[rows[order]]
    if not is_copy.any():
        return rows, []
    first = order[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))]
    copies = []
    for position in np.flatnonzero(is_copy):
        row, original = rows[order[position]], rows[first[position]]
        note = "" if samples.label[row] == samples.label[original] else ", which has another label"
        detail = f"the same content as {samples.sample_id[original]}{note}"
        copies.append(Quarantined(sample_id=samples.sample_id[row], reason=Reason.DUPLICATE, detail=detail))
    keep = np.ones(len(rows), dtype=bool)
    keep[order[is_copy]] = False
    return rows[keep], copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentHashes:
    """Digest of a sample over all modalities, as in EncodedSamples.content; `problem` if one cannot be read."""

    sample_id: str
    content: str
    problem: str | None = None


def content_hashes(dataset: Dataset) -> Iterator[ContentHashes]:
    """Yield the content hashes of all samples, in dataset order, without encoding.

    Raises DatasetError for a path outside the dataset's folder, unless allowed.
    """
    for shard in dataset.shards:
        rows = dataset.read(shard)
        ids = dataset.sample_ids(rows, shard)
        problems: dict[int, str] = {}
        hashed: dict[tuple[str, str], NDArray[np.bytes_]] = {}
        contents = []
        for modality in dataset.modalities:
            if modality.content_key not in hashed:
                hashed[modality.content_key] = _hash_cells(dataset, modality, rows[modality.column], problems)
            contents.append(hashed[modality.content_key])
        for row, row_digest in enumerate(row_content(contents)):
            yield ContentHashes(sample_id=ids[row], content=row_digest, problem=problems.get(row))


def _hash_cells(
    dataset: Dataset, modality: Modality, cells: pa.ChunkedArray, problems: dict[int, str]
) -> NDArray[np.bytes_]:
    """Return the same digests of these cells as encoding computes; unreadable cells are added to `problems`."""
    if modality.kind == "features" and not dataset.in_files(modality):
        return encode_vectors(cells, modality).content
    digests = []
    for row, cell in enumerate(cells):
        loaded, content = load_cell_content(dataset, modality, cell.as_py())
        digests.append(content)
        if isinstance(loaded, UnusableError):
            problems.setdefault(row, loaded.detail)
    return np.array(digests, dtype="S32")
