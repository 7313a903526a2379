"""Diff: which samples do two manifests not share, and what do they say differently of those they do?"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from .manifest import COLUMNS, batches_of, check_columns, provenance_of
from .shards import keys_of

SCORES = ("discrepancy", "gap", "balance", "p_balanced", "weight", "rank")
NAMES = ("bin", "split", "label", "label_name", "subset", "group", "content")
_BLOCK = 1 << 20  # rows that are compared at once

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """Samples that one manifest has alone: how many, by split, by class, and the least ids of them."""

    count: int
    by_split: dict[str, int]
    by_class: dict[str, int]
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Samples of both of which a column says other things: how many, and the least ids, with A's and B's value."""

    count: int
    first: tuple[tuple[str, Any, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How far a column of numbers has moved over the samples of both.

    count: those further apart than the tolerance, and those that only one of the manifests has a value for. largest
    and mean are of the absolute change, correlation is Pearson's r; None where there is nothing to tell it from.
    first: the largest changes, with A's and B's value.
    """

    count: int
    largest: float | None
    mean: float | None
    correlation: float | None
    first: tuple[tuple[str, float | None, float | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What two manifests, A and B, do not share. Rows are joined by id; their order does not count.

    moved: the columns of names and of bins; shifted: those of numbers. provenance: what differs of it, as
    {path: (A's value, B's)}. same_dataset: whether the fingerprints agree; None where one of them is not told.
    """

    a: str
    b: str
    rows_a: int
    rows_b: int
    both: int
    only_a: Only
    only_b: Only
    moved: dict[str, Moved]
    shifted: dict[str, Shift]
    provenance: dict[str, tuple[Any, Any]]
    same_dataset: bool | None
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether they hold the same samples, say the same of them, and were made from the same."""
        columns: list[Moved | Shift] = [*self.moved.values(), *self.shifted.values()]
        return not (self.only_a.count or self.only_b.count or self.provenance or any(each.count for each in columns))

    def to_dict(self) -> dict[str, Any]:
        """Give it in plain values."""
        return {"same": self.same, **{each.name: _plain(getattr(self, each.name)) for each in fields(self)}}

    def lines(self) -> list[str]:
        """Give it in lines, for people."""
        if self.same:
            return [f"{self.a} and {self.b} are the same: {self.rows_a:,} samples"]
        said = [f"A {self.a}: {self.rows_a:,} samples, B {self.b}: {self.rows_b:,}; in both {self.both:,}"]
        if self.same_dataset is False:
            said.append("they were made from different datasets: their fingerprints differ")
        for name, only in (("A", self.only_a), ("B", self.only_b)):
            if only.count:
                splits = ", ".join(f"{number:,} {split}" for split, number in only.by_split.items())
                said.append(f"only in {name}: {only.count:,} ({splits}), the first: {', '.join(only.first[:3])}")
        for column, moved in self.moved.items():
            if moved.count:
                name, here, there = moved.first[0]
                said.append(f"{column}: {moved.count:,} differ, the first: {name}, {here} in A and {there} in B")
        for column, shift in self.shifted.items():
            if shift.count:
                said.append(f"{column}: {shift.count:,} differ, {_say_shift(shift)}")
        said += [f"{path}: {here!r} in A, {there!r} in B" for path, (here, there) in self.provenance.items()]
        return said


def diff(a: Path, b: Path, *, tolerance: float = 1e-6, most: int = 20) -> Difference:
    """Compare two manifests by id; of each kind of difference the first `most` are named.

    Numbers that differ by no more than `tolerance` are the same. Two of 10^7 rows take 2.1 GB. Raises ManifestError
    where one of them is none, or has an id twice.
    """
    try:
        return _diff(a, b, tolerance=tolerance, most=most)
    except UnicodeDecodeError as cause:
        raise ManifestError(f"{a} or {b} is damaged: {cause}; see mmaudit verify") from cause


def _diff(a: Path, b: Path, *, tolerance: float, most: int) -> Difference:
    told = [provenance_of(path) for path in (a, b)]
    for path in (a, b):
        _check(path)
    join = _Join.of(a, b)
    prints = [_fingerprint(each) for each in told]
    return Difference(
        a=str(a),
        b=str(b),
        rows_a=len(join.codes[0]),
        rows_b=len(join.codes[1]),
        both=len(join.in_a),
        only_a=_only(join, 0, most=most),
        only_b=_only(join, 1, most=most),
        moved={name: _moved(name, join, most=most) for name in NAMES},
        shifted={name: _shift(name, join, tolerance=tolerance, most=most) for name in SCORES},
        provenance=_differing(*told),
        same_dataset=None if None in prints else prints[0] == prints[1],
        tolerance=tolerance,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Join:
    """Where the samples of both stand in A and in B, (s,), and the rows that each has alone."""

    paths: tuple[Path, Path]
    in_a: Rows
    in_b: Rows
    alone_a: Rows
    alone_b: Rows
    codes: tuple[NDArray[np.int32], NDArray[np.int32]]  # of each row, (n,): the place of its id in `names`
    names: pa.Array

    @classmethod
    def of(cls, a: Path, b: Path) -> _Join:
        """Join two files; ids are compared as they are, not by a hash of them."""
        parts = [_ids(path) for path in (a, b)]
        both = pa.chunked_array([chunk for part in parts for chunk in part], pa.large_string()).dictionary_encode()
        chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in both.chunks]
        names = both.chunk(both.num_chunks - 1).dictionary if both.num_chunks else pa.array([], pa.large_string())
        codes = [_joined(chunks[: len(parts[0])]), _joined(chunks[len(parts[0]) :])]
        for path, code in zip((a, b), codes, strict=True):
            _check_unique(path, code, names)
        place = np.full(len(names), -1, dtype=np.int64)
        place[codes[1]] = np.arange(len(codes[1]))
        there = place[codes[0]]
        in_b = there[there >= 0]
        alone = np.ones(len(codes[1]), dtype=bool)
        alone[in_b] = False
        return cls(
            paths=(a, b),
            in_a=np.flatnonzero(there >= 0),
            in_b=in_b,
            alone_a=np.flatnonzero(there < 0),
            alone_b=np.flatnonzero(alone),
            codes=(codes[0], codes[1]),
            names=names,
        )

    def least(self, codes: NDArray[np.int32], *, most: int) -> NDArray[np.int32]:
        """Give those of the least ids, in their order."""
        held = codes[:0]
        for start in range(0, len(codes), _BLOCK):
            some = np.r_[held, codes[start : start + _BLOCK]]
            order = pc.sort_indices(self.names.take(pa.array(some))).to_numpy()[:most]
            held = some[order]
        return held

    def rows_of(self, codes: NDArray[np.int32]) -> tuple[Rows, Rows]:
        """Give the rows in A and in B of samples of both."""
        shared = self.codes[0][self.in_a]
        place = [int(np.argmax(shared == code)) for code in codes]
        return self.in_a[place], self.in_b[place]

    def named(self, codes: NDArray[np.int32]) -> list[str]:
        """Give ids."""
        return [str(each) for each in self.names.take(pa.array(codes)).to_pylist()]

    def pairs(self, name: str, codes: NDArray[np.int32]) -> tuple[tuple[str, Any, Any], ...]:
        """Give id, A's value and B's of some samples of both."""
        if len(codes) == 0:
            return ()
        values = [_at(path, name, rows) for path, rows in zip(self.paths, self.rows_of(codes), strict=True)]
        return tuple(zip(self.named(codes), *values, strict=True))


def _only(join: _Join, side: int, *, most: int) -> Only:
    """Tell of the samples that A (side 0) or B (side 1) has alone."""
    rows = (join.alone_a, join.alone_b)[side]
    alone = np.zeros(len(join.codes[side]), dtype=bool)
    alone[rows] = True
    by_split, by_class = Counter[str](), Counter[str]()
    start = 0
    for table in _read(join.paths[side], ["split", "label", "label_name"]) if len(rows) else ():
        some = table.filter(pa.array(alone[start : start + len(table)]))
        start += len(table)
        for each in some.group_by(some.column_names).aggregate([([], "count_all")]).to_pylist():
            by_split[_word(each["split"])] += each["count_all"]
            by_class[_word(each["label"] if each["label_name"] is None else each["label_name"])] += each["count_all"]
    return Only(
        count=len(rows),
        by_split=dict(sorted(by_split.items())),
        by_class=dict(sorted(by_class.items())),
        first=tuple(join.named(join.least(join.codes[side][rows], most=most))),
    )


def _moved(name: str, join: _Join, *, most: int) -> Moved:
    here, there = (_keys(path, name, len(rows)) for path, rows in zip(join.paths, join.codes, strict=True))
    changed = np.flatnonzero(here[join.in_a] != there[join.in_b])
    least = join.least(join.codes[0][join.in_a[changed]], most=most)
    return Moved(count=len(changed), first=join.pairs(name, least))


def _shift(name: str, join: _Join, *, tolerance: float, most: int) -> Shift:
    here, there = (_numbers(path, name, len(rows)) for path, rows in zip(join.paths, join.codes, strict=True))
    here, there = here[join.in_a], there[join.in_b]
    change = np.abs(here - there)
    change[np.isnan(here) & np.isnan(there)] = 0
    told = ~(np.isnan(here) | np.isnan(there))
    change[np.isnan(change)] = np.inf  # one of them has no value
    beyond = np.flatnonzero(change > tolerance)
    largest = join.codes[0][join.in_a[_largest(change, beyond, join, most=most)]]
    return Shift(
        count=len(beyond),
        largest=float(change[told].max()) if told.any() else None,
        mean=float(change[told].mean()) if told.any() else None,
        correlation=_correlation(here[told], there[told]),
        first=join.pairs(name, largest),
    )


def _largest(change: NDArray[np.float64], beyond: Rows, join: _Join, *, most: int) -> Rows:
    """Give the places of the largest changes, largest first; of equals those of the least ids."""
    if len(beyond) > most:
        least = np.partition(change[beyond], len(beyond) - most)[len(beyond) - most] if most else np.inf
        above, equal = beyond[change[beyond] > least], beyond[change[beyond] == least]
        codes = join.codes[0][join.in_a[equal]]
        equal = equal[np.isin(codes, join.least(codes, most=most - len(above)))]
        beyond = np.r_[above, equal]
    names = np.array(join.named(join.codes[0][join.in_a[beyond]]), dtype=object)
    order = sorted(range(len(beyond)), key=lambda at: (-change[beyond[at]], names[at]))
    return beyond[np.array(order, dtype=np.intp)]


def _correlation(here: NDArray[np.float64], there: NDArray[np.float64]) -> float | None:
    if len(here) < 2 or np.ptp(here) == 0 or np.ptp(there) == 0:
        return None
    here, there = here - here.mean(), there - there.mean()
    found = float((here @ there) / np.sqrt((here @ here) * (there @ there)))
    return found if np.isfinite(found) else None


def _check(path: Path) -> None:
    """Raise ManifestError where a file lacks columns of a manifest, or has others under their names."""
    schema = pq.read_schema(path)
    check_columns(schema, where=str(path))
    for name, right in COLUMNS.items():
        type_ = schema.field(name).type
        strings = pa.types.is_string(type_) or pa.types.is_large_string(type_)
        numbers = pa.types.is_integer(type_) or pa.types.is_floating(type_)
        if not (strings if right == pa.string() else numbers) and not pa.types.is_null(type_):
            raise ManifestError(f"{path} is not a manifest: its {name} is {type_}, not {right}")


def _read(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    try:
        yield from batches_of(path, columns=columns)
    except (pa.ArrowException, OSError) as cause:
        raise ManifestError(f"{path} is damaged: {str(cause).splitlines()[0]}") from cause


def _ids(path: Path) -> list[pa.Array]:
    columns = [table["sample_id"] for table in _read(path, ["sample_id"])]
    nulls = sum(column.null_count for column in columns)
    if nulls:
        raise ManifestError(f"{nulls} ids are null in {path}: make it anew with mmaudit split")
    return [column.cast(pa.large_string()).combine_chunks() for column in columns]


def _joined(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _check_unique(path: Path, codes: NDArray[np.int32], names: pa.Array) -> None:
    times = np.bincount(codes, minlength=len(names))
    if times.max(initial=0) > 1:
        twice = int((times > 1).sum())
        name = names[int(np.argmax(times > 1))].as_py()
        raise ManifestError(f"{twice} ids stand more than once in {path} (one of them: {name}): see mmaudit verify")


def _keys(path: Path, name: str, num_rows: int) -> NDArray[np.uint64]:
    """Give 64 bits for each value of a column, (n,): of strings a hash, so that a change is missed once in 2^64."""
    return _column([np.zeros(0, np.uint64), *(_keys_of(table[name]) for table in _read(path, [name]))], path, num_rows)


def _column(parts: Sequence[NDArray[Any]], path: Path, num_rows: int) -> NDArray[Any]:
    found = np.concatenate(parts)
    if len(found) != num_rows:
        raise ManifestError(f"{path} is damaged: a column of {len(found)} values stands beside {num_rows} ids")
    return found


def _keys_of(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return _floats(column).view(np.uint64)
    found = keys_of(column.fill_null(""), seed=0)
    found[column.is_null().to_numpy()] = 0
    return found


def _numbers(path: Path, name: str, num_rows: int) -> NDArray[np.float64]:
    """Give a column of numbers, (n,), null as NaN."""
    return _column([np.zeros(0), *(_floats(table[name]) for table in _read(path, [name]))], path, num_rows)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.array(column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy())


def _at(path: Path, name: str, rows: Rows) -> list[Any]:
    """Give the values of a column in these rows."""
    found: dict[int, Any] = {}
    start = 0
    for table in _read(path, [name]):
        for row in rows[(rows >= start) & (rows < start + len(table))].tolist():
            found[row] = table[name][row - start].as_py()
        start += len(table)
    return [found[row] for row in rows.tolist()]


def _fingerprint(provenance: dict[str, Any]) -> str | None:
    scores = provenance.get("scores")
    found = scores.get("fingerprint") if isinstance(scores, dict) else None
    return None if found is None else str(found)


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Give what two provenances say differently, by path; what one does not say is None."""
    here, there = dict(_leaves(a, "")), dict(_leaves(b, ""))
    pairs = {path: (here.get(path), there.get(path)) for path in sorted(here.keys() | there.keys())}
    return {path: pair for path, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from _leaves(each, f"{path}[{number}]")
    else:
        yield path, value


def _plain(value: Any) -> Any:
    """Give a value as JSON knows it: no tuples, and no number that is not one."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def _say_shift(shift: Shift) -> str:
    name, here, there = shift.first[0]
    said = f"the largest change: {name}, {here} in A and {there} in B"
    return said if shift.correlation is None else f"{said}; correlation {shift.correlation:.4f}"
