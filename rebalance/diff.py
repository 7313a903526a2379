"""Differences of two manifests."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .join import ManifestJoin, RowIndex, column_keys, column_numbers
from .manifest import batches_of, check_types, provenance_of, read_manifest_schema

NUMBER_COLUMNS = ("discrepancy", "gap", "balance", "p_balanced", "weight", "rank")
NAME_COLUMNS = ("bin", "split", "label", "label_name", "subset", "group", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueSamples:
    """Samples that one manifest has alone: how many, by split, by class, and the least ids of them."""

    count: int
    by_split: dict[str, int]
    by_class: dict[str, int]
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedNames:
    """Samples of both of which a column says other things: how many, and the least ids, with A's and B's value."""

    count: int
    first: tuple[tuple[str, Any, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedNumbers:
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
class ManifestDiff:
    """What two manifests, A and B, do not share. Rows are joined by id; their order does not count.

    moved: the columns of names and of bins; shifted: those of numbers. provenance: what differs of it, as
    {path: (A's value, B's)}. same_dataset: whether the fingerprints agree; None where one of them is not told.
    """

    a: str
    b: str
    rows_a: int
    rows_b: int
    both: int
    only_a: UniqueSamples
    only_b: UniqueSamples
    moved: dict[str, ChangedNames]
    shifted: dict[str, ChangedNumbers]
    provenance: dict[str, tuple[Any, Any]]
    same_dataset: bool | None
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether they hold the same samples, say the same of them, and were made from the same."""
        columns: list[ChangedNames | ChangedNumbers] = [*self.moved.values(), *self.shifted.values()]
        return not (self.only_a.count or self.only_b.count or self.provenance or any(each.count for each in columns))

    def to_dict(self) -> dict[str, Any]:
        """Give it in plain values."""
        return {"same": self.same, **{each.name: _to_json_value(getattr(self, each.name)) for each in fields(self)}}

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
                said.append(f"{column}: {shift.count:,} differ, {_describe_change(shift)}")
        said += [f"{path}: {here!r} in A, {there!r} in B" for path, (here, there) in self.provenance.items()]
        return said


def diff(a: Path, b: Path, *, tolerance: float = 1e-6, most: int = 20) -> ManifestDiff:
    """Compare two manifests by id; of each kind of difference the first `most` are named.

    Numbers that differ by no more than `tolerance` are the same. Two of 10^7 rows take 2.1 GB. Raises ManifestError
    where one of them is none, or has an id twice.
    """
    told = [provenance_of(path) for path in (a, b)]
    for path in (a, b):
        check_types(read_manifest_schema(path), where=str(path))
    join = ManifestJoin.of(a, b)
    prints = [_fingerprint(each) for each in told]
    return ManifestDiff(
        a=str(a),
        b=str(b),
        rows_a=len(join.codes[0]),
        rows_b=len(join.codes[1]),
        both=len(join.in_a),
        only_a=_unique_samples(join, 0, most=most),
        only_b=_unique_samples(join, 1, most=most),
        moved={name: _changed_names(name, join, most=most) for name in NAME_COLUMNS},
        shifted={name: _changed_numbers(name, join, tolerance=tolerance, most=most) for name in NUMBER_COLUMNS},
        provenance=_changed_provenance(*told),
        same_dataset=None if None in prints else prints[0] == prints[1],
        tolerance=tolerance,
    )


def _unique_samples(join: ManifestJoin, side: int, *, most: int) -> UniqueSamples:
    """Tell of the samples that A (side 0) or B (side 1) has alone."""
    rows = (join.alone_a, join.alone_b)[side]
    alone = np.zeros(len(join.codes[side]), dtype=bool)
    alone[rows] = True
    by_split, by_class = Counter[str](), Counter[str]()
    start = 0
    for table in batches_of(join.paths[side], columns=["split", "label", "label_name"]) if len(rows) else ():
        some = table.filter(pa.array(alone[start : start + len(table)]))
        start += len(table)
        for each in some.group_by(some.column_names).aggregate([([], "count_all")]).to_pylist():
            by_split[_name_or_none(each["split"])] += each["count_all"]
            by_class[_name_or_none(each["label"] if each["label_name"] is None else each["label_name"])] += each[
                "count_all"
            ]
    return UniqueSamples(
        count=len(rows),
        by_split=dict(sorted(by_split.items())),
        by_class=dict(sorted(by_class.items())),
        first=tuple(join.named(join.least(join.codes[side][rows], most=most))),
    )


def _changed_names(name: str, join: ManifestJoin, *, most: int) -> ChangedNames:
    here, there = (column_keys(path, name, len(rows)) for path, rows in zip(join.paths, join.codes, strict=True))
    changed = np.flatnonzero(here[join.in_a] != there[join.in_b])
    least = join.least(join.codes[0][join.in_a[changed]], most=most)
    return ChangedNames(count=len(changed), first=join.pairs(name, least))


def _changed_numbers(name: str, join: ManifestJoin, *, tolerance: float, most: int) -> ChangedNumbers:
    here, there = (column_numbers(path, name, len(rows)) for path, rows in zip(join.paths, join.codes, strict=True))
    here, there = here[join.in_a], there[join.in_b]
    change = np.abs(here - there)
    change[np.isnan(here) & np.isnan(there)] = 0
    told = ~(np.isnan(here) | np.isnan(there))
    change[np.isnan(change)] = np.inf  # one of them has no value
    beyond = np.flatnonzero(change > tolerance)
    largest = join.codes[0][join.in_a[_largest_changes(change, beyond, join, most=most)]]
    return ChangedNumbers(
        count=len(beyond),
        largest=float(change[told].max()) if told.any() else None,
        mean=float(change[told].mean()) if told.any() else None,
        correlation=_correlation(here[told], there[told]),
        first=join.pairs(name, largest),
    )


def _largest_changes(change: NDArray[np.float64], beyond: RowIndex, join: ManifestJoin, *, most: int) -> RowIndex:
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


def _fingerprint(provenance: dict[str, Any]) -> str | None:
    scores = provenance.get("scores")
    found = scores.get("fingerprint") if isinstance(scores, dict) else None
    return None if found is None else str(found)


def _changed_provenance(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
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


def _to_json_value(value: Any) -> Any:
    """Give a value as JSON knows it: no tuples, and no number that is not one."""
    if is_dataclass(value):
        return {each.name: _to_json_value(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _to_json_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name_or_none(value: object) -> str:
    return "none" if value is None else str(value)


def _describe_change(shift: ChangedNumbers) -> str:
    name, here, there = shift.first[0]
    said = f"the largest change: {name}, {here} in A and {there} in B"
    return said if shift.correlation is None else f"{said}; correlation {shift.correlation:.4f}"
