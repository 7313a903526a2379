"""Encoded samples: a dataset with the status of each modality of each row."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.dataset import Dataset
from ..dataset.labels import MAX_NUMBER
from ..dataset.modalities import Modality
from ..dataset.samples import Samples
from ..errors import ScoreError
from ..hashing import digest
from ..quarantine import Quarantined, Reason, UnusableError
from ..workers import prefetch_map
from .encode import EncodeTask, Status, load_cell_content, read_status
from .encoders import encode_vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSamples:
    """What a dataset is made of: its samples, and how each fared in each modality."""

    samples: Samples
    statuses: tuple[Status, ...]

    @property
    def content(self) -> NDArray[np.object_]:
        """One digest for each sample (n,) over all its modalities."""
        return row_content(self.statuses)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of ids, labels, splits, groups and content, whatever the row order or the file format."""
        return dataset_fingerprint(self.samples, self.content)


def dataset_fingerprint(samples: Samples, content: NDArray[np.object_]) -> str:
    """Fingerprint samples and what each is made of, (n,), as Stock.content gives it."""
    names = np.array([*samples.class_names, "", ""], dtype=object)[samples.label]  # those without a label are last
    group = samples.group if samples.group is not None else np.full(len(samples), "", dtype=object)
    rows = zip(samples.sample_id, names, samples.split, group, content, strict=True)
    return digest(*sorted("\0".join(row).encode() for row in rows))


def collect_encoded(dataset: Dataset, samples: Samples, tasks: Sequence[EncodeTask]) -> EncodedSamples:
    """Read from the cache what every sample of an encoded dataset is made of."""
    statuses = tuple(read_status(tasks, modality, samples.sample_id) for modality in dataset.modalities)
    return EncodedSamples(samples=samples, statuses=statuses)


def row_content(statuses: Sequence[Status]) -> NDArray[np.object_]:
    """Give one digest for each sample (n,) over all its modalities."""
    parts = zip(*(status.content.tolist() for status in statuses), strict=True)
    return np.array([digest(b"".join(row)) for row in parts], dtype=object)


def without_usable(status: Status) -> NDArray[np.bool_]:
    """Tell which samples (n,) the source itself gives nothing for in this modality: their cell is null."""
    empty = np.zeros(len(status.usable), dtype=bool)
    null = f"{status.modality.column} is null"
    empty[[row for row, reason, detail in status.problem if reason is Reason.MISSING and detail == null]] = True
    return empty


def select_usable(encoded: EncodedSamples, *, keep_duplicates: bool) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Give the rows that can be scored, and why each other one is left out.

    A sample is scored if it has a label and two usable modalities at least, and none that is there but broken: only
    what the source itself leaves out, as a null, counts as missing. Of samples with the same content in every modality
    the one with the least id is kept.
    """
    samples, statuses = encoded.samples, encoded.statuses
    missing = np.stack([without_usable(status) for status in statuses], axis=1)
    usable = np.stack([status.usable for status in statuses], axis=1)
    enough = (usable | missing).all(axis=1) & (usable.sum(axis=1) >= 2)
    left_out = [
        Quarantined(sample_id=samples.sample_id[row], modality=status.modality.name, reason=reason, detail=detail)
        for status in statuses
        for row, reason, detail in status.problem
        if not enough[row]
    ]
    left_out += _without_label(samples)
    rows = np.flatnonzero((samples.label >= 0) & enough)
    if not keep_duplicates:
        rows, copies = _without_copies(encoded, rows)
        left_out += copies
    if len(rows) == 0:
        raise ScoreError(f"no sample is usable in every modality; the first problem: {left_out[0]}")
    return rows, left_out


def sort_quarantined(left_out: Sequence[Quarantined], sample_id: NDArray[np.object_]) -> tuple[Quarantined, ...]:
    """Sort what was left out by the order of the samples; several reasons of one sample keep theirs."""
    place = {name: row for row, name in enumerate(sample_id.tolist())}
    return tuple(sorted(left_out, key=lambda quarantined: place[quarantined.sample_id]))


def _without_label(samples: Samples) -> list[Quarantined]:
    """Say of each sample without a usable label whether it has none, or one that does not exist."""
    unknown = dict(samples.unknown)
    return [
        Quarantined(
            sample_id=samples.sample_id[row],
            modality=None,
            reason=Reason.UNKNOWN_LABEL if row in unknown else Reason.NO_LABEL,
            detail=_what_label(unknown.get(row), classes=bool(samples.class_names)),
        )
        for row in np.flatnonzero(samples.label < 0).tolist()
    ]


def _what_label(found: str | None, *, classes: bool) -> str:
    if found is None:
        return "the label is null"
    return f"{found!r} is not among the classes" if classes else f"{found} is not a number of at most {MAX_NUMBER:g}"


def _without_copies(encoded: EncodedSamples, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Leave out all but one of the rows whose content is the same in every modality."""
    samples, content = encoded.samples, encoded.content[rows]
    order = np.lexsort((samples.sample_id[rows].astype(str), content.astype(str)))
    again = np.r_[False, content[order][1:] == content[order][:-1]]
    if not again.any():
        return rows, []
    first = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
    copies = []
    for place in np.flatnonzero(again):
        row, kept = rows[order[place]], rows[first[place]]
        also = "" if samples.label[row] == samples.label[kept] else ", which has another label"
        copies.append(
            Quarantined(
                sample_id=samples.sample_id[row],
                modality=None,
                reason=Reason.DUPLICATE,
                detail=f"the same content as {samples.sample_id[kept]}{also}",
            )
        )
    keep = np.ones(len(rows), dtype=bool)
    keep[order[again]] = False
    return rows[keep], copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentHashes:
    """What a sample is made of: `content` as in Stock.content, and `problem` where a modality cannot be read."""

    sample_id: str
    content: str
    problem: str | None = None


def content_hashes(
    dataset: Dataset, *, only: Container[str] | None = None, num_threads: int = 0
) -> Iterator[ContentHashes]:
    """Hash what every sample is made of, or those whose ids are in `only`, in the dataset's order; nothing is encoded.

    Threads read ahead. Raises DatasetError for a path that leads outside, unless the dataset allows that.
    """
    for shard in dataset.shards:
        ids = dataset.sample_ids(dataset.read(shard, modalities=False), shard)
        places = [place for place, name in enumerate(ids) if only is None or name in only]
        if not places:
            continue
        rows = dataset.read(shard)
        problems: dict[int, str] = {}
        seen: dict[tuple[str, str], NDArray[np.bytes_]] = {}  # a film's sound and sight are one file
        statuses = []
        for modality in dataset.modalities:
            form = "file" if modality.kind in ("audio", "image", "video") else modality.kind
            key = (modality.column, form)
            if key not in seen:
                seen[key] = _hash(dataset, modality, rows[modality.column], places, problems, num_threads=num_threads)
            usable = np.ones(len(places), dtype=bool)
            statuses.append(Status(modality=modality, usable=usable, content=seen[key], problem=()))
        for row, content in enumerate(row_content(statuses)):
            yield ContentHashes(sample_id=ids[places[row]], content=content, problem=problems.get(row))


def _hash(
    dataset: Dataset,
    modality: Modality,
    cells: pa.ChunkedArray,
    places: Sequence[int],
    problems: dict[int, str],
    *,
    num_threads: int,
) -> NDArray[np.bytes_]:
    """Give the digests of these cells, as encoding notes them, and note what cannot be read."""
    if modality.kind == "features":
        return encode_vectors(cells.take(pa.array(places)), modality).content
    found = []
    some = (cells[place] for place in places)
    for row, (content, problem) in enumerate(
        prefetch_map(partial(_hash_cell, dataset, modality), some, num_threads=num_threads)
    ):
        found.append(content)
        if problem is not None:
            problems.setdefault(row, problem)
    return np.array(found, dtype="S32")


def _hash_cell(dataset: Dataset, modality: Modality, cell: pa.Scalar) -> tuple[bytes, str | None]:
    loaded, content = load_cell_content(dataset, modality, cell)
    return content, loaded.detail if isinstance(loaded, UnusableError) else None
