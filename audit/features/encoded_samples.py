"""Encoded samples: a dataset with the status of each modality of each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..dataset.cells import null_error
from ..dataset.dataset import Dataset
from ..dataset.labels import MAX_NUMBER, UnknownLabels
from ..dataset.modalities import Modality
from ..dataset.samples import Samples
from ..errors import DatasetError, Quarantined, Reason, ScoreError, UnusableError
from ..hashing import digest
from ..row_arrays import contains, gather, index_type, repeated_in, sorted_pieces, true_rows
from ..workers import prefetch_map
from .cached_matrix import recurring_rows
from .encode import EncodeTask, column_of, content_of, load_cell_content, read_arrow
from .left_out import ID, LeftOut
from .vectors import check_lengths, encode_vectors

SORTED_ROWS = 1 << 20  # of a fingerprint: a million rows of 100 bytes are sorted in a second
DIGEST_SUM = 1 << 128  # modulus of a sum of digests
DATA_CHANGED = "the data changed while they were read: run the command again"


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
    def usable(self) -> NDArray[np.bool_]:
        """Whether each modality of each sample was encoded, (n, m)."""
        return np.stack([status.usable for status in self.statuses], axis=1)

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Whether the sample lacks the modality in the source, (n, m)."""
        return np.stack([missing_in_source(status) for status in self.statuses], axis=1)

    @property
    def is_scorable(self) -> NDArray[np.bool_]:
        """Which samples (n,) have at least two usable modalities and no damaged one."""
        return scorable_rows(self.usable, self.missing)

    def content_word(self, number: int, rows: NDArray[np.integer[Any]] | None = None) -> NDArray[np.uint64]:
        """Return the first or the second word of the content digest of these samples (b,), ascending; None: of all."""
        words = np.asarray(digest_words(self.content)[number])
        return words if rows is None else words[rows]

    @property
    def is_distinctive(self) -> NDArray[np.bool_]:
        """Which samples (n,) have a modality whose content does not recur by chance."""
        return np.asarray((self.usable & ~np.stack([status.recurs for status in self.statuses], axis=1)).any(axis=1))

    def problems(self, rows: NDArray[np.bool_]) -> Iterator[tuple[int, str, Reason, str]]:
        """Yield row, modality, reason and detail of what is not usable in the rows of a mask (n,), by modality."""
        for status in self.statuses:
            for row, reason, detail in status.problem:
                if rows[row]:
                    yield row, status.modality.name, reason, detail

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
    return fingerprint_of(("\0".join(row).encode() for row in rows), num_rows=len(samples))


def fingerprint_of(rows: Iterable[bytes], *, num_rows: int) -> str:
    """Return the fingerprint of the rows of a dataset, in any order: bytes of id, class, split, group and content.

    That of up to SORTED_ROWS rows is the digest of the sorted rows; that of more, which are not held at once, the sum
    of their digests.
    """
    if num_rows <= SORTED_ROWS:
        return digest(*sorted(rows))
    return fingerprint_of_sums(int(digest(row), 16) for row in rows)


def fingerprint_of_sums(sums: Iterable[int]) -> str:
    """Return the fingerprint of more than SORTED_ROWS rows by sums of their digests, such as those of parts."""
    return f"{sum(sums) % DIGEST_SUM:032x}"


def collect_encoded(dataset: Dataset, samples: Samples, tasks: Sequence[EncodeTask]) -> EncodedSamples:
    """Read the encoding status of every sample of an encoded dataset from the cache."""
    statuses = tuple(read_status(tasks, modality, samples.sample_id) for modality in dataset.modalities)
    return EncodedSamples(samples=samples, statuses=statuses)


def read_status(tasks: Sequence[EncodeTask], modality: Modality, sample_id: NDArray[np.object_] | None) -> Status:
    """Read the status of all samples of a dataset, in dataset order, in one modality from the cache.

    A million samples take 33 MB. Raises DatasetError if no sample is usable, vectors differ in length, or the ids of
    the cache are not `sample_id` (n,), unless None.
    """
    num_rows = sum(task.shard.num_rows for task in tasks)
    if sample_id is not None and len(sample_id) != num_rows:
        raise DatasetError(DATA_CHANGED)
    usable, content = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype="S32")
    problem: list[tuple[int, Reason, str]] = []
    lengths: set[int] = set()
    start = 0
    for task in tasks:
        table = read_arrow(task.file(modality))
        rows = slice(start, start + table.num_rows)
        expected = column_of(table, "sample_id") if sample_id is None else pa.array(sample_id[rows], pa.string())
        if table.num_rows != task.shard.num_rows or not column_of(table, "sample_id").equals(expected):
            raise DatasetError(DATA_CHANGED)
        usable[rows] = column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
        content[rows] = content_of(table)
        problem += [(start + row, reason, detail) for row, reason, detail in problems_of(table)]
        lengths |= lengths_of(table)
        start = rows.stop
    if not usable.any():
        first = problem[0]
        raise DatasetError(f"no sample has a usable {modality.name}; the first: {first[1].value}, {first[2]}")
    check_lengths(lengths, modality)
    status = Status(
        modality=modality, usable=usable, content=content, recurs=np.zeros(num_rows, bool), problem=tuple(problem)
    )
    starts = np.cumsum([0, *(task.shard.num_rows for task in tasks)]).tolist()
    recurs = recurring_rows(tasks, status, lambda index: content[starts[index] : starts[index + 1]])
    return replace(status, recurs=recurs)


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


def digest_words(digests: Iterable[str]) -> NDArray[np.uint64]:
    """Return digests (n,) of 32 hexadecimal digits as two words each, (2, n), whose order is that of the digests."""
    words = np.frombuffer(bytes.fromhex("".join(digests)), dtype=">u8").reshape(-1, 2)
    return np.ascontiguousarray(words.T, dtype=np.uint64)


def digest_texts(words: NDArray[np.uint64]) -> NDArray[np.bytes_]:
    """Return digests of two words each (n, 2) as hexadecimal digits (n,), dtype S32."""
    return np.frombuffer(words.astype(">u8").tobytes().hex().encode(), dtype="S32")


def missing_in_source(status: Status) -> NDArray[np.bool_]:
    """Return a mask (n,) of the samples that lack this modality in the source.

    Their cell is null, or their clip has other tracks only, as a silent film among films with sound.
    """
    missing = np.zeros(len(status.usable), dtype=bool)
    for row, reason, detail in status.problem:
        missing[row] = reason is Reason.NO_TRACK or is_null_cell(reason, detail, status.modality)
    return missing


def is_null_cell(reason: Reason, detail: str, modality: Modality) -> bool:
    """Return whether a sample is not usable because its cell is null."""
    null = null_error(modality.column)
    return (reason, detail) == (null.reason, null.detail)


def scorable_rows(usable: NDArray[np.bool_], missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which rows (n,) have at least two of m usable modalities (n, m) and no damaged one; missing (n, m)."""
    return np.asarray((usable | missing).all(axis=1) & (usable.sum(axis=1) >= 2))


class EncodedRows(Protocol):
    """What the selection of usable samples needs of n encoded rows: EncodedSamples, or columns of many rows."""

    @property
    def samples(self) -> LabelledRows:
        """Labels and ids."""

    @property
    def is_scorable(self) -> NDArray[np.bool_]:
        """Which rows (n,) have at least two usable modalities and no damaged one."""

    def content_word(self, number: int, rows: NDArray[np.integer[Any]] | None = None) -> NDArray[np.uint64]:
        """Return the first or the second word of the content digest of these rows (b,), ascending; None: of all."""

    @property
    def is_distinctive(self) -> NDArray[np.bool_]:
        """Which rows (n,) have a modality whose content does not recur by chance."""

    def problems(self, rows: NDArray[np.bool_]) -> Iterator[tuple[int, str, Reason, str]]:
        """Yield row, modality, reason and detail of what is not usable in the rows of a mask (n,), by modality."""


class LabelledRows(Protocol):
    """Labels of n rows, and their ids."""

    @property
    def task(self) -> str:
        """classification, multilabel or regression."""

    @property
    def label(self) -> NDArray[np.int32]:
        """Class or stratum (n,), negative without one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or strata."""

    @property
    def unknown(self) -> Sequence[tuple[int, str]]:
        """Row and label of each row whose label is not among the classes."""

    def ids_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the ids of a few rows."""


def select_usable(encoded: EncodedRows, *, keep_duplicates: bool) -> tuple[NDArray[np.intp], list[Quarantined]]:
    """Return the rows that can be scored, and the reasons for every excluded sample.

    A sample is scored if it has a label, at least two usable modalities and no damaged one: a null in the source, or a
    clip without this track, counts as a missing modality. Of samples with the same content in every modality only the
    one with the smallest id is scored, unless `keep_duplicates`, or unless the content of all of them recurs by chance.
    """
    rows, left_out = usable_rows(encoded, keep_duplicates=keep_duplicates)
    return rows.astype(np.intp), list(left_out)


def usable_rows(encoded: EncodedRows, *, keep_duplicates: bool) -> tuple[NDArray[np.integer[Any]], LeftOut]:
    """Return what `select_usable` does, without an object per row."""
    samples, is_scorable = encoded.samples, encoded.is_scorable
    left_out = LeftOut.of(encoded.problems(~is_scorable), ids_of=samples.ids_of).merge(_without_label(samples))
    is_scorable &= samples.label >= 0
    rows = true_rows(is_scorable)
    del is_scorable
    if not keep_duplicates:
        rows, copies = _drop_duplicates(encoded, rows)
        left_out = left_out.merge(copies)
    if len(rows) == 0:
        requirement = "a label, at least two usable modalities and no damaged one"
        raise ScoreError(f"no sample has {requirement}; the first problem: {left_out[0]}")
    return rows, left_out


def sort_quarantined(quarantined: Sequence[Quarantined], sample_id: NDArray[np.object_]) -> tuple[Quarantined, ...]:
    """Sort excluded samples by sample order; several reasons of one sample keep their order."""
    row_of_id = {name: row for row, name in enumerate(sample_id.tolist())}
    return tuple(sorted(quarantined, key=lambda entry: row_of_id[entry.sample_id]))


def _without_label(samples: LabelledRows) -> LeftOut:
    """Return an entry for each sample without a label, or with an unknown one."""
    rows = true_rows(samples.label < 0)
    unknown = samples.unknown if isinstance(samples.unknown, UnknownLabels) else UnknownLabels.of(samples.unknown)
    if samples.task == "regression":
        texts = [f"{text} is not a number of at most {MAX_NUMBER:g}" for text in unknown.texts]
    else:
        texts = [f"{text!r} is not among the classes" for text in unknown.texts]
    order = np.argsort(unknown.rows, kind="stable")
    is_unknown = np.isin(rows, unknown.rows)
    nothing = np.zeros(int((~is_unknown).sum()), np.int32)
    null = LeftOut.alike(
        rows[~is_unknown], Reason.NO_LABEL, text=nothing, texts=["the label is null"], ids_of=samples.ids_of
    )
    strange = LeftOut.alike(
        unknown.rows[order], Reason.UNKNOWN_LABEL, text=unknown.code[order], texts=texts, ids_of=samples.ids_of
    )
    return null.merge(strange).sorted()


def _drop_duplicates(encoded: EncodedRows, rows: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], LeftOut]:
    """Return the rows without duplicates in every modality, and the duplicates; of equal rows the smallest id stays."""
    ids_of, label = encoded.samples.ids_of, encoded.samples.label
    words = encoded.content_word(0, rows)
    words.sort()
    repeated = repeated_in(words)
    nothing = np.zeros(0, index_type(len(label)))
    none = LeftOut.alike(nothing, Reason.DUPLICATE, text=nothing, texts=(), ids_of=ids_of)
    if not len(repeated):  # of other rows neither id nor recurrence is looked up
        return rows, none
    del words
    is_repeated = contains(repeated, encoded.content_word(0, rows))
    del repeated
    same, is_distinctive = rows[is_repeated], None
    high = encoded.content_word(0, same)
    copies, originals = [nothing], [nothing]
    for piece in sorted_pieces(high):
        positions = np.sort(piece)
        own, own_high = same[positions], high[positions]
        low = encoded.content_word(1, own)
        order = _order_of_contents(own_high, low, ids_of(own))
        equal = (own_high[order][1:] == own_high[order][:-1]) & (low[order][1:] == low[order][:-1])
        if not equal.any():
            continue
        is_distinctive = encoded.is_distinctive if is_distinctive is None else is_distinctive
        is_copy = np.r_[False, equal] & is_distinctive[own[order]]
        first = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))
        copies.append(own[order[is_copy]])
        originals.append(own[order[first[is_copy]]])
    del high, is_distinctive
    copy, original = np.concatenate(copies), np.concatenate(originals)
    keep = np.ones(len(label), dtype=bool)
    keep[copy] = False
    texts = (f"the same content as {ID}", f"the same content as {ID}, which has another label")
    has_other = (gather(label, copy) != gather(label, original)).astype(np.int8)
    left_out = LeftOut.alike(copy, Reason.DUPLICATE, text=has_other, texts=texts, ids_of=ids_of, original=original)
    return rows[gather(keep, rows)], left_out


def _order_of_contents(
    high: NDArray[np.uint64], low: NDArray[np.uint64], ids: NDArray[np.object_]
) -> NDArray[np.integer[Any]]:
    """Return the order (n,) of contents by their two words, and of equal ones by id."""
    keys = pa.table({"high": high, "low": low, "id": pa.array(ids, pa.string())})
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in ("high", "low", "id")])
    return np.asarray(order.to_numpy(), dtype=np.intp)


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
    num_threads = dataset.read_threads(modality, cells)
    loading = prefetch_map(
        lambda cell: load_cell_content(dataset, modality, cell.as_py()), cells, num_threads=num_threads
    )
    for row, (loaded, content) in enumerate(loading):
        digests.append(content)
        if isinstance(loaded, UnusableError):
            problems.setdefault(row, loaded.detail)
    return np.array(digests, dtype="S32")
