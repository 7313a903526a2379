"""Samples that are not scored, with the reasons, in columns: without an object per sample."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import Quarantined, Reason
from ..row_arrays import gather, slices

IdsOf = Callable[[NDArray[np.integer[Any]]], NDArray[np.object_]]
_REASONS = tuple(Reason)
_SCHEMA = pa.schema([(name, pa.string()) for name in ("sample_id", "modality", "reason", "detail")])
ID = "\0"  # stands for the id of the original in the text of a detail
_COLUMNS = ("row", "original", "modality", "reason", "text")


class LeftOut(Sequence[Quarantined]):
    """Entries of samples that are not scored (e,), which read as `Quarantined`; their ids are read when needed.

    row: the sample's; original: the row whose id stands in the detail, negative if none does; modality, text: index in
    `modalities` (negative: none) and `texts`; reason: index in Reason.
    """

    __slots__ = ("ids_of", "modalities", "modality", "original", "reason", "row", "text", "texts")

    def __init__(
        self, columns: dict[str, NDArray[Any]], *, modalities: Sequence[str], texts: Sequence[str], ids_of: IdsOf
    ) -> None:
        self.row, self.original, self.modality, self.reason, self.text = (columns[name] for name in _COLUMNS)
        self.modalities, self.texts, self.ids_of = tuple(modalities), tuple(texts), ids_of

    @classmethod
    def of(cls, entries: Iterable[tuple[int, str | None, Reason, str]], *, ids_of: IdsOf) -> LeftOut:
        """Build from row, modality, reason and detail of each entry."""
        modalities: dict[str, int] = {}
        texts: dict[str, int] = {}
        columns = {"row": array("q"), "modality": array("b"), "reason": array("b"), "text": array("i")}
        for row, modality, reason, detail in entries:
            columns["row"].append(row)
            columns["modality"].append(-1 if modality is None else modalities.setdefault(modality, len(modalities)))
            columns["reason"].append(_REASONS.index(reason))
            columns["text"].append(texts.setdefault(detail, len(texts)))
        types = {"row": np.int64, "modality": np.int8, "reason": np.int8, "text": np.int32}
        arrays = {name: np.array(values, types[name]) for name, values in columns.items()}
        arrays["original"] = np.full(len(arrays["row"]), -1, np.int32)
        return cls(arrays, modalities=list(modalities), texts=list(texts), ids_of=ids_of)

    @classmethod
    def alike(
        cls,
        row: NDArray[np.integer[Any]],
        reason: Reason,
        *,
        text: NDArray[np.integer[Any]],
        texts: Sequence[str],
        ids_of: IdsOf,
        original: NDArray[np.integer[Any]] | None = None,
    ) -> LeftOut:
        """Build from rows with one reason, which concerns no single modality; see the attributes."""
        num_entries = len(row)
        columns = {
            "row": row,
            "original": np.full(num_entries, -1, np.int32) if original is None else original,
            "modality": np.full(num_entries, -1, np.int8),
            "reason": np.full(num_entries, _REASONS.index(reason), np.int8),
            "text": text,
        }
        return cls(columns, modalities=(), texts=texts, ids_of=ids_of)

    def merge(self, *others: LeftOut) -> LeftOut:
        """Return the entries of this one, then those of others."""
        parts = [part for part in (self, *others) if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else self
        modalities = list(dict.fromkeys(name for part in parts for name in part.modalities))
        texts = list(dict.fromkeys(text for part in parts for text in part.texts))
        number_of = ({name: number for number, name in enumerate(names)} for names in (modalities, texts))
        number_of_modality, number_of_text = number_of
        columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "original", "reason")
        }
        columns["modality"] = np.concatenate(
            [
                np.array([*(number_of_modality[name] for name in part.modalities), -1], np.int8)[part.modality]
                for part in parts
            ]
        )
        columns["text"] = np.concatenate(
            [gather(np.array([number_of_text[text] for text in part.texts], np.int32), part.text) for part in parts]
        )
        return LeftOut(columns, modalities=modalities, texts=texts, ids_of=self.ids_of)

    def sorted(self) -> LeftOut:
        """Return the entries in the order of the rows; several of one row keep their order."""
        order = np.argsort(self.row, kind="stable")
        columns = {name: gather(getattr(self, name), order) for name in _COLUMNS}
        return LeftOut(columns, modalities=self.modalities, texts=self.texts, ids_of=self.ids_of)

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, key: int) -> Quarantined: ...

    @overload
    def __getitem__(self, key: slice) -> LeftOut: ...

    def __getitem__(self, key: int | slice) -> Quarantined | LeftOut:
        if isinstance(key, slice):
            columns = {name: getattr(self, name)[key] for name in _COLUMNS}
            return LeftOut(columns, modalities=self.modalities, texts=self.texts, ids_of=self.ids_of)
        position = range(len(self))[key]
        return next(iter(self[position : position + 1]))

    def __iter__(self) -> Iterator[Quarantined]:
        for table in self.tables():
            yield from QuarantineTable(table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def tables(self) -> Iterator[pa.Table]:
        """Yield the entries as tables of at most 2^18 rows, at least one, with the columns of quarantine.parquet."""
        if not len(self):
            yield _SCHEMA.empty_table()
        names = pa.array([*self.modalities, None], pa.string())
        reasons = pa.array([reason.value for reason in _REASONS], pa.string())
        texts = pa.array(self.texts, pa.string())
        around = [pa.array([text.partition(ID)[end] for text in self.texts], pa.string()) for end in (0, 2)]
        for part in slices(len(self)):
            detail = texts.take(pa.array(self.text[part]))
            has_original = self.original[part] >= 0
            if has_original.any():
                ids = pa.array(self.ids_of(self.original[part][has_original]), pa.string())
                before, after = (ends.take(pa.array(self.text[part][has_original])) for ends in around)
                joined = pc.binary_join_element_wise(before, ids, after, "")
                detail = pc.replace_with_mask(detail, pa.array(has_original), joined)
            columns = {
                "sample_id": pa.array(self.ids_of(self.row[part]), pa.string()),
                "modality": names.take(pa.array(self.modality[part] % np.int8(len(names)))),
                "reason": reasons.take(pa.array(self.reason[part])),
                "detail": detail,
            }
            yield pa.table(columns, schema=_SCHEMA)

    @property
    def table(self) -> pa.Table:
        """All entries as a table with the columns of quarantine.parquet."""
        return pa.concat_tables(self.tables())


class QuarantineTable(Sequence[Quarantined]):
    """The rows of a table with the columns of quarantine.parquet, which read as `Quarantined`."""

    __slots__ = ("table",)

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, key: int) -> Quarantined: ...

    @overload
    def __getitem__(self, key: slice) -> QuarantineTable: ...

    def __getitem__(self, key: int | slice) -> Quarantined | QuarantineTable:
        rows = range(len(self))[key]
        if isinstance(rows, range):
            return QuarantineTable(self.table.take(pa.array(rows, pa.int64())))
        return next(iter(QuarantineTable(self.table.slice(rows, 1))))

    def __iter__(self) -> Iterator[Quarantined]:
        for batch in self.table.to_batches(max_chunksize=1 << 16):
            for name, modality, reason, detail in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Quarantined(sample_id=name, modality=modality, reason=Reason(reason), detail=detail)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list
