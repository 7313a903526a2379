"""Groups that splits share: columns of groups, overlap against chance, and likeness within groups.

A column qualifies by its values, not by its name. It groups the samples if the split separates its values far better
than chance, or if samples with the same value are more alike than others of their class. All rules are mmaudit's own.
Likeness is tested by permutations within classes. n samples, b rows, p projected features, v values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import gammaln

from .dataset.dataset import Dataset
from .dataset.samples import Samples
from .features.matrix import Inputs, RowIndex
from .findings import EXAMPLES, Finding, Messages, SplitPair, is_present
from .hashing import hash_rank
from .near_duplicates import project

ALIKE_ROWS = 2048
MAX_ROWS_OF_VALUE = 64
PERMUTATIONS = 200
NEIGHBOURS = 4  # numbers permuted among each other: near numbers are alike in a quantity, not in an identifier


def likeness(
    inputs: Sequence[tuple[Inputs, NDArray[np.bool_]]],
    column: NDArray[np.object_],
    label: NDArray[np.integer],
    *,
    order: RowIndex,
    seed: int,
) -> float | None:
    """Return the largest z, over the modalities, of how alike samples of the same value are; None if not testable.

    `inputs` are features and the mask (n,) of the samples that have them, `order` (n,) is that of the ids' hashes.

    The statistic is the sum of the cosines of all pairs of samples with the same value, after subtraction of the mean
    of the class; its null distribution permutes the values within the class. Whole values are drawn, by their hash, up
    to 2,048 rows. Values that are numbers are permuted among the four nearest numbers only: ages or durations, of which
    near ones are alike too, are no groups.
    """
    scores = []
    rows = _draw_values(column, order, seed=seed)
    for modality_inputs, modality_present in inputs:
        modality_rows = rows[modality_present[rows]]
        projected = project(modality_inputs, modality_rows, seed=seed)
        if projected is not None:
            scores.append(_likeness_z(projected, column[modality_rows], label[modality_rows], seed=seed))
    known = [score for score in scores if score is not None]
    return max(known, default=None)


def _draw_values(column: NDArray[np.object_], order: RowIndex, *, seed: int) -> RowIndex:
    """Return the rows of values drawn by hash, of each the first MAX_ROWS_OF_VALUE in this order of all rows (n,)."""
    rows = order[is_present(column)[order]]
    names, code, counts = np.unique(column[rows].astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(hash_rank(names.tolist(), seed=seed, purpose="groups"), kind="stable")
    sizes = np.minimum(counts, MAX_ROWS_OF_VALUE)
    drawn = order[np.cumsum(sizes[order]) <= max(ALIKE_ROWS, int(sizes[order[0]]))]
    drawn = drawn[counts[drawn] > 1]
    parts = [rows[code == value][:MAX_ROWS_OF_VALUE] for value in drawn.tolist()]
    return np.concatenate([np.zeros(0, np.intp), *parts])


def _likeness_z(
    features: NDArray[np.float32], values: NDArray[np.object_], label: NDArray[np.integer], *, seed: int
) -> float | None:
    names, code = np.unique(values.astype(str), return_inverse=True)
    _, stratum = np.unique(np.stack([label, _neighbourhoods(names)[code]]), axis=1, return_inverse=True)
    stratum = stratum.ravel()
    _, label_code = np.unique(label, return_inverse=True)
    deviation = features - _means(features, label_code)[label_code]
    deviation /= np.maximum(np.linalg.norm(deviation, axis=1, keepdims=True), 1e-12)
    order = np.argsort(stratum, kind="stable")
    generator = np.random.default_rng(seed)

    starts = np.searchsorted(np.sort(code), np.arange(len(names)))  # a permutation keeps the number of rows by value

    def statistic(codes: NDArray[np.intp]) -> float:
        sums = np.add.reduceat(deviation[np.argsort(codes, kind="stable")], starts, axis=0)
        return float((sums**2).sum())

    null = []
    for _ in range(PERMUTATIONS):
        shuffled = np.empty_like(code)
        shuffled[order] = code[np.lexsort((generator.random(len(code)), stratum))]
        null.append(statistic(shuffled))
    spread = float(np.std(null, ddof=1))
    return (statistic(code) - float(np.mean(null))) / spread if spread > 1e-9 * abs(np.mean(null)) else None


def _neighbourhoods(names: NDArray[np.str_]) -> NDArray[np.intp]:
    """Return the number of the neighbourhood of each value (v,): blocks of NEIGHBOURS by size if all are numbers."""
    try:
        numbers = names.astype(np.float64)
    except ValueError:
        return np.zeros(len(names), dtype=np.intp)
    return np.asarray(np.argsort(np.argsort(numbers)) // NEIGHBOURS)


def _means(features: NDArray[np.float32], code: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the mean features (k, p) of each class."""
    sums = np.zeros((code.max() + 1, features.shape[1]))
    np.add.at(sums, code, features)
    return sums / np.bincount(code)[:, None]


# A column with one of these words in its name may have few values, as one of speakers may; it still has to group.
GROUP_WORDS = frozenset(
    (
        *(
            "actor",
            "speaker",
            "talker",
            "singer",
            "subject",
            "subj",
            "participant",
            "person",
            "identity",
            "user",
            "uid",
        ),
        *("patient", "author", "session", "recording", "dialogue", "dialog", "conversation", "video", "youtube"),
        *("movie", "film", "song", "track", "group"),
    )
)
MIN_VALUES = 8  # ours: fewer values are categories, such as a sex, a statement or a language
REPEATED_SHARE = 0.5  # ours: of the rows with a value, those that share it with another row
APART_Z = -4.0  # of the number of shared values: below it, the split was made by the column
NAMED_Z = 4.0  # of a column named like a group
ALIKE_Z = 5.0  # ours: of 408 columns of random values the largest z was 3.7; of actors 296, of speakers 50


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupColumn:
    """A column (n,) whose values may be groups, None where unknown; whether it is the dataset's, or named like one."""

    name: str
    values: NDArray[np.object_]
    is_declared: bool
    is_named: bool


def is_group_name(name: str) -> bool:
    """Return whether a word of a column's name usually names groups: actor, SpeakerID, subject_id, participant-code."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()
    return bool(set(re.split(r"[\W\d_]+", words)) & GROUP_WORDS)


def group_columns(samples: Samples, groups: Mapping[str, NDArray[np.object_]]) -> tuple[list[GroupColumn], Messages]:
    """Return the distinct columns that may hold groups, and notes on those that do not though they are called so.

    A column whose values part the samples as `samples.group` does is that of the user, and is used as it is.
    """
    columns = dict(groups)
    if samples.group is not None:  # samples without a group have their id there
        columns.setdefault("group", np.where(samples.group == samples.sample_id, np.array(None), samples.group))
    declared = None if samples.group is None else _partition(samples.group)
    group_columns: list[GroupColumn] = []
    seen_partitions: set[bytes] = set()
    messages: Messages = []
    for name in sorted(columns, key="group".__eq__):  # the least specific name last
        values = columns[name].tolist()
        column = np.array([None if value is None or value != value else str(value) for value in values], dtype=object)
        partition = _partition(column)
        num_distinct, num_present = len(set(column.tolist()) - {None}), int(is_present(column).sum())
        filled = np.where(is_present(column), column, samples.sample_id)
        is_declared = declared is not None and (name == "group" or _partition(filled) == declared)
        is_named = is_group_name(name)
        if num_distinct < 2 or num_distinct == num_present:
            reason = "has a different value in every row" if num_distinct > 1 else f"has {num_distinct} distinct values"
            messages += [f"column {name!r} {reason}: not used as groups"] if is_declared or is_named else []
        elif partition not in seen_partitions and (is_declared or is_named or has_many_values(_counts(column))):
            group_columns.append(GroupColumn(name=name, values=column, is_declared=is_declared, is_named=is_named))
        seen_partitions.add(partition)
    return group_columns, messages


def _counts(column: NDArray[np.object_]) -> NDArray[np.integer]:
    """Return the number of rows of each value (v,)."""
    return np.asarray(np.unique(column[is_present(column)].astype(str), return_counts=True)[1])


def _partition(column: NDArray[np.object_]) -> bytes:
    """Return which rows (n,) have equal values, as bytes that do not depend on the values."""
    code_of_value = {value: index for index, value in enumerate(dict.fromkeys(column.tolist()))}
    return np.array([-1 if value is None else code_of_value[value] for value in column]).tobytes()


def shared_groups(pair: SplitPair, column: GroupColumn, alike: Callable[[GroupColumn], float | None]) -> Messages:
    """Find groups that occur in both splits, and note the columns that are shared but group nothing.

    `alike` returns how alike samples of the same value are, see `likeness`.
    """
    overlap = count_overlap(pair, column.values)
    if not overlap.shared:
        return []
    reference, heldout = pair.between
    count, of = len(overlap.shared), overlap.num_heldout
    chance = f"a random split shares {overlap.expected:.1f}"
    if not (column.is_declared or overlap.z < APART_Z):
        z = alike(column)
        if z is not None and z < (NAMED_Z if column.is_named else ALIKE_Z):
            return [
                f"column {column.name!r}: {count} of {of} {heldout} values also in {reference} ({chance}), but samples "
                f"of the same value are not more alike than others of their class (z = {z:.1f}): not used as groups"
            ]
        if z is None and not column.is_named:
            return []
    shared = set(overlap.shared)
    return [
        Finding(
            what="groups",
            name=column.name,
            between=pair.between,
            examples=tuple((value, value) for value in overlap.shared[:EXAMPLES]),
            message=f"{count} of {of} {heldout} {_plural(column.name)} also in {reference} ({chance})",
            count=count,
            of=of,
            samples=sum(value in shared for value in column.values[pair.heldout_rows].tolist()),
        )
    ]


def _plural(name: str) -> str:
    """Return the plural of a column name: actors, identities, classes, and videos for video_id."""
    word = name.casefold().removesuffix("_id").replace("_", " ")
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Values of a column that both splits hold, and the number that random splits of the same sizes would share."""

    shared: tuple[str, ...]
    num_reference: int
    num_heldout: int
    expected: float
    spread: float

    @property
    def z(self) -> float:
        """Standard score of the number of shared values; negative: the split keeps values together."""
        return (len(self.shared) - self.expected) / self.spread if self.spread > 0 else 0.0


def count_overlap(pair: SplitPair, column: NDArray[np.object_]) -> Overlap:
    """Count the values of a column (n,), None where unknown, that both splits hold.

    A value of s rows occurs in both halves of N rows, m of them held out, with probability
    1 - C(N - s, m) / C(N, m) - C(m, s) / C(N, s).
    """
    reference, heldout = (
        [value for value in column[rows].tolist() if value is not None]
        for rows in (pair.reference_rows, pair.heldout_rows)
    )
    _, sizes = np.unique(np.array(reference + heldout, dtype=str), return_counts=True)
    total, num_heldout = len(reference) + len(heldout), len(heldout)
    both = np.clip(1 - _none_drawn(total, num_heldout, sizes) - _none_drawn(total, total - num_heldout, sizes), 0, 1)
    return Overlap(
        shared=tuple(sorted(set(reference) & set(heldout))),
        num_reference=len(set(reference)),
        num_heldout=len(set(heldout)),
        expected=float(both.sum()),
        spread=float(np.sqrt((both * (1 - both)).sum())),
    )


def _none_drawn(total: int, drawn: int, sizes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the probability that `drawn` of `total` rows, drawn at random, hold none of `sizes` rows."""
    left = total - sizes - drawn
    log = (
        gammaln(total - sizes + 1) + gammaln(total - drawn + 1) - gammaln(np.maximum(left, 0) + 1) - gammaln(total + 1)
    )
    return np.where(left >= 0, np.exp(log), 0.0)


def has_many_values(counts: NDArray[np.integer]) -> bool:
    """Return whether a column with these numbers of rows by value (v,) has many values of several rows each.

    At least 8 values and sqrt(n) / 2, most of whose rows share theirs with another row.
    """
    total = counts.sum()
    return bool(
        len(counts) >= max(MIN_VALUES, np.sqrt(total) / 2) and counts[counts > 1].sum() >= REPEATED_SHARE * total
    )


def read_group_columns(dataset: Dataset) -> dict[str, NDArray[np.object_]]:
    """Read the columns (n,) of a dataset that may group its samples, as strings, null as None.

    The group column, those called like groups, and those of text or whole numbers with many values; neither ids nor
    labels nor modalities. Counted by Arrow first: a million rows of Python strings take a second a column.
    """
    roles = dataset.columns
    used = {modality.column for modality in dataset.modalities} | {*roles.names} - {roles.group}
    used -= set(roles.id) if len(roles.id) > 1 else set()  # the parts of an id may be groups
    columns = {}
    for field in dataset.schema:
        if field.name in used or not (field.name == roles.group or _may_group(field.type)):
            continue
        cells = pa.chunked_array(
            [chunk for shard in dataset.shards for chunk in shard.read([field.name])[field.name].chunks], field.type
        )
        if field.name == roles.group or is_group_name(field.name) or _has_many_values(cells):
            values = [None if cell is None else str(cell) for cell in cells.to_pylist()]
            columns[field.name] = np.array(values, dtype=object)
    return columns


def _may_group(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_integer(type_)
        or pa.types.is_dictionary(type_)
        or pa.types.is_floating(type_)
    )


def _has_many_values(cells: pa.ChunkedArray) -> bool:
    """Return whether a column has many values of several rows each; numbers with a fraction are quantities."""
    cells = cells.drop_null()
    if pa.types.is_floating(cells.type) and not pc.all(pc.equal(pc.floor(cells), cells)).as_py():
        return False
    return has_many_values(cells.value_counts().field("counts").to_numpy())
