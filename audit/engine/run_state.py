"""What a run keeps beside its probes to score other rows with them: classes, ranges, and folds of what it knows.

A probe may only score rows whose group and content it was not trained on. So the folds of all groups are kept, or of
all ids where there are no groups, and those of all contents, each as a hash of 64 bits with one fold per repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.labels import Labels, ReadAs
from ..errors import RunError
from ..hashing import hash_rank
from ..parsing import RequiredKeys, Shape
from ..row_arrays import gather, positions_of, scatter, slices, sorted_pieces
from ..scores.mixture import Mixture
from ..storage import read_json, read_table, write_json, write_parquet
from .row_data import ORDER_PURPOSE, EncodedData, RowData
from .scoring import Whole
from .selection import ChosenRows, Selection

STATE_SCHEMA = "mmaudit.probes/1"
_STATE, _KEYS, _CONTENTS = "state.json", "keys.parquet", "contents.parquet"
_RANGE = [float]
_SHAPE: Shape = RequiredKeys(
    schema=str,
    task=str,
    num_outputs=int,
    num_folds=[int],
    num_features=[int],
    classes=[int],
    class_names=[str],
    labels=RequiredKeys({"texts": [str], "edges": [float], "outputs": [str], "width?": int}),
    ranges=RequiredKeys(similarity=_RANGE, total_loss=_RANGE),
    mixture={},
    by_group=bool,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folds:
    """Folds of groups, ids or contents, by their hashes.

    hash (h,), ascending; fold (r, h) in each repeat, negative where no row of it is scored; split (h,), an index in
    SPLITS, of a test split that was cut; else None.
    """

    hash: NDArray[np.uint64]
    fold: NDArray[np.int16]
    split: NDArray[np.int8] | None = None

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], fold: NDArray[np.int16], split: NDArray[np.int8] | None = None) -> Folds:
        """Sort entries by hash; of equal hashes the first stays."""
        unique, first = np.unique(hashes, return_index=True)
        return cls(hash=unique, fold=fold[:, first], split=None if split is None else split[first])

    @classmethod
    def from_table(cls, table: pa.Table) -> Folds:
        """Read the entries of `to_table`."""
        names = [name for name in table.column_names if name.startswith("fold ")]
        fold = np.stack([table[name].to_numpy() for name in names]).astype(np.int16, copy=False)
        split = table["split"].to_numpy() if "split" in table.column_names else None
        return cls(hash=table["hash"].to_numpy(), fold=fold, split=split)

    def to_table(self) -> pa.Table:
        """Return the columns hash, `fold 0` and so on, and split."""
        folds = {f"fold {repeat}": values for repeat, values in enumerate(self.fold)}
        return pa.table({"hash": self.hash, **folds} | ({} if self.split is None else {"split": self.split}))

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return the entry of each hash (b,), negative where there is none."""
        if not len(self.hash):
            return np.full(len(hashes), -1, dtype=np.intp)
        position = np.minimum(np.searchsorted(self.hash, hashes), len(self.hash) - 1)
        return np.where(self.hash[position] == hashes, position, -1)

    def merge(self, added: Folds) -> Folds:
        """Return the entries of both; of equal hashes those of this one, but for folds that it does not have."""
        position = self.find(added.hash)
        fold, inside = self.fold, position >= 0
        known = position[inside]
        if (fold[:, known] < 0).any():
            fold = fold.copy()
            fold[:, known] = np.where(fold[:, known] < 0, added.fold[:, inside], fold[:, known])
        new = np.flatnonzero(~inside)
        places = np.searchsorted(self.hash, added.hash[new])
        has_split = self.split is not None and added.split is not None
        return Folds(
            hash=np.insert(self.hash, places, added.hash[new]),
            fold=np.insert(fold, places, added.fold[:, new], axis=1),
            split=np.insert(self.split, places, added.split[new]) if has_split else None,  # type: ignore[arg-type, index]
        )


def tables_of_keys(data: RowData, chosen: ChosenRows | Selection) -> Iterator[pa.Table]:
    """Yield the folds of all groups of a dataset, or of all ids where it has none; splits where it had none."""
    with_split = data.dataset.columns.split is None
    if data.group is None:
        position = positions_of(chosen.row, len(data))
        for rows, hashes in data.sorted_ids():
            folds = _folds_at(chosen, gather(position, rows))
            yield Folds.of(hashes, folds, data.split[rows] if with_split else None).to_table()
        return
    hashes = data.hash_groups(seed=0, purpose=ORDER_PURPOSE)
    folds = np.full((len(chosen.cross_fits), len(hashes)), -1, dtype=chosen.cross_fits[0].fold.dtype)
    for part in slices(len(chosen.row)):
        group = data.group[chosen.row[part]]
        for repeat, cross_fit in enumerate(chosen.cross_fits):
            folds[repeat, group] = cross_fit.fold[part]
    split = scatter(data.split, data.group, np.zeros(len(hashes), dtype=np.int8)) if with_split else None
    for groups in sorted_pieces(hashes):
        own = folds[:, groups].astype(np.int16)
        yield Folds.of(hashes[groups], own, None if split is None else split[groups]).to_table()


def tables_of_contents(encoded: EncodedData, chosen: ChosenRows | Selection) -> Iterator[pa.Table]:
    """Yield the folds of the contents of all scored rows; of rows with equal contents those of the first by hash."""
    position = positions_of(chosen.row, len(encoded.samples))
    for rows, words in encoded.sorted_contents():
        own = gather(position, rows)
        own, words = own[own >= 0], words[own >= 0]
        order = np.lexsort((own, words))
        yield Folds.of(words[order], _folds_at(chosen, own[order])).to_table()


def _folds_at(chosen: ChosenRows | Selection, positions: NDArray[np.integer[Any]]) -> NDArray[np.int16]:
    """Return the folds (r, b) of chosen rows by position, negative where that is negative."""
    folds = np.stack([cross_fit.fold[positions] for cross_fit in chosen.cross_fits]).astype(np.int16)
    folds[:, positions < 0] = -1
    return folds


def folds_of_keys(data: RowData, selection: Selection) -> Folds:
    """Return the folds of `tables_of_keys`."""
    return Folds.from_table(pa.concat_tables(tables_of_keys(data, selection)))


def folds_of_contents(encoded: EncodedData, selection: Selection) -> Folds:
    """Return the folds of `tables_of_contents`."""
    return Folds.from_table(pa.concat_tables(tables_of_contents(encoded, selection)))


def hash_groups(names: Sequence[str]) -> NDArray[np.uint64]:
    """Return the hashes of groups by which their folds are kept."""
    return hash_rank(names, seed=0, purpose=ORDER_PURPOSE)


def describe_labels(labels: Labels) -> dict[str, Any]:
    """Return how labels are read, as JSON values: the classes as they stand in the data, and ReadAs."""
    described = {"texts": list(labels.texts), "edges": list(labels.read_as.edges), "outputs": list(labels.outputs)}
    return described | ({} if labels.read_as.width is None else {"width": labels.read_as.width})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What scoring other rows needs of a run besides its probes.

    Attributes:
        task: classification, multilabel or regression.
        num_outputs: Outputs of a probe, k.
        num_folds: Folds of each repeat.
        num_features: Features of each modality.
        classes: The source's label of each class that the probes know (k,).
        class_names: Names of the source's classes or strata, by label.
        labels: How labels are read, see describe_labels.
        whole: Ranges and mixture of the run, by which balance and p_balanced of other rows are computed.
        by_group: Whether `keys` are groups, otherwise ids.
        keys: Folds of groups or ids.
        contents: Folds of contents.
    """

    task: str
    num_outputs: int
    num_folds: tuple[int, ...]
    num_features: tuple[int, ...]
    classes: NDArray[np.int32]
    class_names: tuple[str, ...]
    labels: Mapping[str, Any]
    whole: Whole
    by_group: bool
    keys: Folds
    contents: Folds

    @classmethod
    def of(
        cls, selection: Selection, *, whole: Whole, num_features: Sequence[int], labels: Mapping[str, Any], folds: Any
    ) -> RunState:
        """Return the state of a run from its selection; `folds` are the tables of keys and contents."""
        keys, contents = folds
        return cls(
            task=selection.target.task,
            num_outputs=selection.target.num_outputs,
            num_folds=tuple(cross_fit.num_folds for cross_fit in selection.cross_fits),
            num_features=tuple(num_features),
            classes=selection.classes,
            class_names=selection.class_names,
            labels=labels,
            whole=whole,
            by_group=selection.group is not None,
            keys=Folds.from_table(keys),
            contents=Folds.from_table(contents),
        )

    def __post_init__(self) -> None:
        num_folds, folds = len(self.num_folds), (self.keys.fold, self.contents.fold)
        is_valid = num_folds > 0 and min(self.num_folds) > 0 and all(len(fold) == num_folds for fold in folds)
        if not is_valid or any((fold >= np.array(self.num_folds)[:, None]).any() for fold in folds):
            raise RunError("the folds kept beside the probes are damaged: score the data again")
        if len(self.whole.similarity) != 2 or len(self.whole.total_loss) != 2:
            raise RunError("the ranges kept beside the probes are damaged: score the data again")

    @property
    def read_as(self) -> ReadAs:
        """How labels of other rows are read."""
        return ReadAs(edges=tuple(self.labels["edges"]), width=self.labels.get("width"))

    @property
    def num_groups(self) -> int | None:
        """Number of groups with a scored row; None without groups."""
        return int((self.keys.fold[0] >= 0).sum()) if self.by_group else None

    def write(self, folder: Path) -> None:
        """Write the state beside the probes: state.json, keys.parquet and contents.parquet."""
        content = {
            "schema": STATE_SCHEMA,
            "task": self.task,
            "num_outputs": self.num_outputs,
            "num_folds": list(self.num_folds),
            "num_features": list(self.num_features),
            "classes": self.classes.tolist(),
            "class_names": list(self.class_names),
            "labels": dict(self.labels),
            "ranges": {"similarity": list(self.whole.similarity), "total_loss": list(self.whole.total_loss)},
            "mixture": self.whole.mixture.to_json(),
            "by_group": self.by_group,
        }
        write_parquet(self.keys.to_table(), folder / _KEYS, provenance={})
        write_parquet(self.contents.to_table(), folder / _CONTENTS, provenance={})
        write_json(content, folder / _STATE)

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read the state of a run; raise RunError if it has none."""
        if not (folder / _STATE).exists():
            raise RunError(
                f"{folder.parent} keeps no probes that can score other rows: score its data again with: mmaudit score "
                f"DATA --run {folder.parent} --overwrite"
            )
        content = read_json(folder / _STATE, error=RunError, shape=_SHAPE)
        similarity, total_loss = (tuple(content["ranges"][name]) for name in ("similarity", "total_loss"))
        keys, contents = (read_table(folder / name, error=RunError) for name in (_KEYS, _CONTENTS))
        return cls(
            task=content["task"],
            num_outputs=content["num_outputs"],
            num_folds=tuple(content["num_folds"]),
            num_features=tuple(content["num_features"]),
            classes=np.array(content["classes"], dtype=np.int32),
            class_names=tuple(content["class_names"]),
            labels=content["labels"],
            whole=Whole(similarity=similarity, total_loss=total_loss, mixture=Mixture.from_json(content["mixture"])),
            by_group=content["by_group"],
            keys=Folds.from_table(keys),
            contents=Folds.from_table(contents),
        )
