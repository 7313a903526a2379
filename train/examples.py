"""Features, labels and splits of the samples of a manifest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.dataset.columns import SPLITS
from ..audit.dataset.dataset import Dataset
from ..audit.dataset.labels import coded_column
from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.features.backbone_inputs import Backbone
from ..audit.features.cached_matrix import FeatureMatrix
from ..audit.features.encode import EncodeTask
from ..audit.features.encoded_samples import digest_texts, digest_words
from ..audit.features.encoders import input_shape, is_network, stored_pictures
from ..audit.features.found_rows import FoundRows, find_rows
from ..audit.features.matrix import Inputs
from ..audit.hashing import IdIndex, canonical_order
from ..audit.probes.crops import PictureView
from ..audit.row_arrays import index_type
from ..audit.workers import NETWORK_THREADS, NUM_THREADS, fixed_threads, release_memory
from ..rebalance.curriculum import cut_validation
from ..rebalance.manifest import DROPPED_COLUMNS, Manifest, ManifestFile, states_split

Options = ParamSpec("Options")
Result = TypeVar("Result")

ROWS = (  # columns of a manifest that are read
    *("sample_id", "content", "label", "label_name", "split"),
    *("rank", "weight", "discrepancy", "balance", "p_balanced"),
)
DROPPED_ROWS = tuple(name for name in (*ROWS, "group") if name in DROPPED_COLUMNS)
_TESTED = (*ROWS[:5], "discrepancy")  # those that an evaluation needs
_NUMBERS: dict[str, tuple[type, float, type]] = {  # type in a manifest, value where there is none, type of examples
    "rank": (np.int32, -1, np.int64),
    "weight": (np.float32, 1.0, np.float32),
    "discrepancy": (np.float32, np.nan, np.float64),
    "balance": (np.float32, np.nan, np.float64),
    "p_balanced": (np.float32, np.nan, np.float64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """n samples, those of the manifest and the test samples it left out, ordered by a hash of their ids: arrays (n,).

    sample_id: unique. inputs: m matrices (n, d_j), NaN where a modality is missing; present (n, m): whether it is
    available. shapes: shape of a row of each modality, (d_j,) for vectors, or that of a network's input. views: how
    each modality's rows become a network's input; None, also for all of them: rows have the shape. backbones: the
    pretrained model that each modality's rows are inputs of; None, also for all of them: of none. content: digests of
    each sample's media, dtype S32. label: int64 in [0, k), indexing `class_names`. task: classification, multilabel or
    regression; of the last two, label is a stratum, values (n, k) float32 is the target, 0 and 1 or a number in the
    units of the data, and class_names are the names of its k columns. split: train, validation, test. rank: 0 = most
    balanced, -1 outside the manifest. balance in [-1, 1] and p_balanced in [0, 1] may be NaN. in_manifest: whether a
    sample is in the manifest.
    """

    sample_id: pa.LargeStringArray
    inputs: tuple[Inputs, ...]
    present: NDArray[np.bool_]
    shapes: tuple[tuple[int, ...], ...]
    content: NDArray[np.bytes_]
    modalities: tuple[str, ...]
    label: NDArray[np.int64]
    class_names: tuple[str, ...]
    split: NDArray[np.object_]
    rank: NDArray[np.int64]
    weight: NDArray[np.float32]
    discrepancy: NDArray[np.float64]
    balance: NDArray[np.float64]
    p_balanced: NDArray[np.float64]
    in_manifest: NDArray[np.bool_]
    views: tuple[PictureView | None, ...] = ()
    backbones: tuple[Backbone | None, ...] = ()
    task: str = "classification"
    values: NDArray[np.float32] | None = None

    @property
    def target(self) -> NDArray[Any]:
        """What is predicted: classes (n,), or values (n, k)."""
        return self.label if self.values is None else self.values

    @property
    def modalities_text(self) -> str:
        """The modalities, for the end of a message."""
        return f"the modalities are {', '.join(self.modalities)}"

    @property
    def num_threads(self) -> int:
        """Number of threads of a training.

        The products of vectors are too small for two: they took 1.1 to 1.6 times the CPU time of one thread (hidden 128
        to 1,024, batches of 64 and 256), and with other jobs on the machine twice its wall time.
        """
        are_vectors = all(len(shape) == 1 for shape in self.shapes) and not any(self.backbones)
        return NUM_THREADS if are_vectors else NETWORK_THREADS

    def __len__(self) -> int:
        return len(self.sample_id)

    def ids(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.object_]:
        """Return the ids of some rows, by default of all, as strings."""
        ids = self.sample_id if rows is None else self.sample_id.take(pa.array(rows))
        return np.array(ids.to_pylist(), dtype=object)

    def encoded_ids(self, rows: NDArray[np.integer[Any]]) -> list[bytes]:
        """Return the ids of some rows in UTF-8."""
        return list(self.sample_id.take(pa.array(rows)).cast(pa.large_binary()).to_pylist())

    def rows(self, split: str) -> NDArray[np.intp]:
        """Return the rows of one split."""
        return np.flatnonzero(self.split == split)

    def only(self, modality: str) -> Examples:
        """Return the same samples with one modality. Raises ConfigError where there is no such modality."""
        if modality not in self.modalities:
            raise ConfigError(f"--only {modality}: no such modality; {choices(modality, self.modalities)}")
        index = self.modalities.index(modality)
        return replace(
            self,
            inputs=(self.inputs[index],),
            present=self.present[:, [index]],
            shapes=(self.shapes[index],),
            modalities=(self.modalities[index],),
            views=self.views[index : index + 1],
            backbones=self.backbones[index : index + 1],
        )


def in_fixed_threads(
    function: Callable[Concatenate[Examples, Options], Result],
) -> Callable[Concatenate[Examples, Options], Result]:
    """Run a function of examples with their number of threads, whatever the caller's setting is."""

    @wraps(function)
    def limited(examples: Examples, /, *args: Options.args, **options: Options.kwargs) -> Result:
        with fixed_threads(examples.num_threads):
            return function(examples, *args, **options)

    return limited


def load_examples(
    manifest: Manifest | ManifestFile,
    dropped: Iterable[pa.Table] | None,
    *,
    dataset: Dataset,
    tasks: Sequence[EncodeTask],
    validation_fraction: float,
    seed: int,
    only_test: bool = False,
) -> Examples:
    """Join a manifest, and the test rows dropped from it, with the features of its source, by id.

    All results are then computed on the same test set, whatever a manifest keeps. Without a validation split one is cut
    from train by hash(seed, group or id). Memory is some hundred bytes a sample, and one for each row of the source.

    Args:
        manifest: The manifest.
        dropped: Batches of the rows that were dropped from it, with the columns of DROPPED_ROWS; None: unknown.
        dataset: Its source.
        tasks: The encoded shards of the source.
        validation_fraction: Share of the training rows that is cut.
        seed: Seed of the cut.
        only_test: Load the samples of the test split alone, with what an evaluation reads: not their ranks, weights,
            balance, posteriors and contents.

    Raises:
        ManifestError: The source has changed, or the manifest is malformed.
    """
    names = [name for name in ROWS if not only_test or name in _TESTED]
    if not only_test and validation_fraction > 0 and not states_split(manifest, "validation"):
        names.append("group")
    release_memory()  # a tenth of a gigabyte of row groups that the columns were inferred from
    table = _read_table(manifest, dropped, names, only_test=only_test)
    if only_test and not len(table.sample_id):  # the message of it names the splits that there are
        table, only_test = _read_table(manifest, None, list(ROWS), only_test=False), False
    found = find_rows(dataset, tasks, _index(table.sample_id, table.num_kept))
    release_memory()  # tables of the shards
    table.check_source(found, with_splits=not manifest.provenance.get("recipe", {}).get("resplit"))
    order = canonical_order(table.sample_id)  # the order of the manifest does not change a training
    content = _repeat(b"", len(order)) if only_test else digest_texts(found.content[order])
    row, labels, usable = found.row[order], found.labels, found.usable
    row = row.astype(index_type(len(usable[0].usable)), copy=False)
    del found  # half of the memory
    table.sort(order)
    codes = np.array(sorted(table.name_of_label), dtype=np.int32)
    label = np.searchsorted(codes, table.numbers.pop("label"))
    class_names = tuple(str(table.names[table.name_of_label[code]]) for code in codes.tolist())
    values = None if labels.values is None else np.ascontiguousarray(labels.values[order])
    numbers: dict[str, Any] = {
        name: table.numbers.pop(name).astype(type_) if name in table.numbers else _repeat(type_(missing), len(order))
        for name, (_, missing, type_) in _NUMBERS.items()
    }
    split = _repeat("test", len(order))
    if not only_test:
        split = np.array(table.names, dtype=object)[table.split]
        options: dict[str, Any] = {"fraction": validation_fraction, "seed": seed}
        split = cut_validation(split, table.sample_id, label.astype(np.int32), table.group, **options)
    inputs = [FeatureMatrix.of(tasks, rows, row) for rows in usable]
    return Examples(
        sample_id=table.sample_id,
        inputs=tuple(inputs),
        present=np.stack([matrix.present for matrix in inputs], axis=1),
        shapes=tuple(_shape_of(matrix, tasks) for matrix in inputs),
        content=content,
        modalities=tuple(rows.modality.name for rows in usable),
        label=label.astype(np.int64, copy=False),
        class_names=class_names if values is None else labels.outputs,
        split=split,
        in_manifest=order < table.num_kept,
        views=tuple(_view_of(matrix, tasks) for matrix in inputs),
        backbones=tuple(Backbone.of(rows.modality, tasks[0].media) for rows in usable),
        task=dataset.task,
        values=values,
        **numbers,
    )


def _repeat(value: Any, n: int) -> NDArray[Any]:
    """Return an array (n,) of one value that takes the memory of one."""
    return np.broadcast_to(np.array(value, dtype=object if isinstance(value, str) else None), n)


@dataclass(slots=True, kw_only=True)
class _Table:
    """Rows (n,) of a manifest, of which the first `num_kept`, and its dropped rows, without an object per row.

    names: strings of which label_name (n,), split (n,) and name_of_label hold the indices. content: digests as two
    words (n, 2), 0 where unknown. numbers: the label, and columns of _NUMBERS, by name. group: names, None where there
    are none to read.
    """

    sample_id: pa.LargeStringArray
    num_kept: int
    names: list[str | None]
    name_of_label: dict[int, int]
    label_name: NDArray[np.int32]
    split: NDArray[np.int32]
    content: NDArray[np.uint64]
    numbers: dict[str, NDArray[Any]]
    group: pa.Array | None

    def sort(self, order: NDArray[np.intp]) -> None:
        """Sort the rows, without what `check_source` has compared."""
        self.content = self.content[:0]
        self.label_name = self.label_name[:0]
        self.sample_id = self.sample_id.take(pa.array(order))
        self.split = self.split[order]
        self.numbers = {name: self.numbers.pop(name)[order] for name in list(self.numbers)}
        self.group = None if self.group is None else self.group.take(pa.array(order))

    def check_source(self, found: FoundRows, *, with_splits: bool) -> None:
        """Raise ManifestError where rows are not in their source, have changed there, or cannot be used."""
        missing = np.flatnonzero(found.row < 0)
        if len(missing):
            raise ManifestError(
                f"{len(missing)} of {len(self.sample_id)} samples of the manifest are not in its source (the first: "
                f"{self.sample_id[missing[0]]}); rescore with mmaudit score, or set the folder of the data with --data"
            )
        code_of = {name: code for code, name in enumerate(self.names)}
        unknown = code_of.get(None, -1)
        label = np.array([*(code_of.get(name, -2) for name in found.labels.names), -2, -2])[found.labels.label]
        self._check_same("content", self.content.any(axis=1) & (self.content != found.content).any(axis=1))
        self._check_same("label", (self.label_name != unknown) & (self.label_name != label))
        if with_splits and found.split is not None:
            split = np.array([code_of[name] for name in SPLITS])[found.split]
            self._check_same("split", (self.split != unknown) & (self.split != split))
        for usable, damaged in zip(found.usable, found.damaged.T, strict=True):
            if damaged.any():
                raise ManifestError(
                    f"{int(damaged.sum())} samples of the manifest have no usable {usable.modality.name} (the first: "
                    f"{self.sample_id[int(damaged.argmax())]})"
                )

    def _check_same(self, field_name: str, is_changed: NDArray[np.bool_]) -> None:
        if is_changed.any():
            raise ManifestError(
                f"{int(is_changed.sum())} of {len(self.sample_id)} samples have changed their {field_name} since the "
                f"manifest was made (the first: {self.sample_id[int(is_changed.argmax())]}); rescore with mmaudit "
                "score and split again"
            )


def _read_table(
    manifest: Manifest | ManifestFile, dropped: Iterable[pa.Table] | None, names: Sequence[str], *, only_test: bool
) -> _Table:
    """Read columns of the rows of a manifest, or of its test split, and of the test rows dropped from it."""
    rows = _ManifestRows(names)
    for batch in manifest.batches([*names, "rank"] if only_test else names):
        rows.add(batch, "test" if only_test else None)
    num_kept = rows.num_rows
    for batch in dropped or ():
        rows.add(batch.filter(pc.equal(batch["split"], "test")), None)
    return rows.collect(num_kept)


class _ManifestRows:
    """Batches of a manifest, of which strings that repeat become codes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.code_of: dict[str | None, int] = {name: code for code, name in enumerate(SPLITS)}
        self.name_of_label: dict[int, int] = {}
        self.parts: dict[str, list[Any]] = defaultdict(list)
        self.num_rows = 0

    def add(self, batch: pa.Table, split: str | None) -> None:
        """Add the rows of a split, None for all, and the names of all labels.

        Raises ManifestError for nulls where there may be none.
        """
        for name in ("sample_id", "label", "rank"):
            if name in batch.column_names and batch[name].null_count:
                raise ManifestError(f"column {name} of the manifest holds nulls: recreate it with mmaudit split")
        pairs = batch["label"].to_numpy().astype(np.int64) << 32 | self._codes(batch["label_name"])
        self.name_of_label |= {pair >> 32: pair & 0xFFFFFFFF for pair in np.unique(pairs).tolist()}
        if split is not None:
            batch = batch.filter(pc.equal(batch["split"], split))
        self.num_rows += len(batch)
        self.parts["content"].append(_digest_words(batch["content"]))
        self.parts["sample_id"] += batch["sample_id"].cast(pa.large_string()).chunks
        self.parts["group"] += batch["group"].chunks if "group" in self.names else []
        self.parts["label"].append(batch["label"].to_numpy())
        for name in ("label_name", "split"):
            self.parts[name].append(self._codes(batch[name]))
        for name, (type_, missing, _) in _NUMBERS.items():
            if name not in self.names:
                continue
            column = batch[name].fill_null(missing) if name in batch.column_names else pa.repeat(missing, len(batch))
            self.parts[name].append(column.to_numpy().astype(type_, copy=False))

    def _codes(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        """Return the index of each string (n,) among those that have occurred."""
        values, code = coded_column(column)
        codes = [self.code_of.setdefault(value, len(self.code_of)) for value in values]
        return np.asarray(np.array(codes, dtype=np.int32)[code])

    def collect(self, num_kept: int) -> _Table:
        """Return all rows, of which the first `num_kept` are the manifest's."""
        release_memory()  # batches of the manifest
        ids = pa.chunked_array(self.parts.pop("sample_id"), pa.large_string()).combine_chunks()
        group = self.parts.pop("group")
        columns = {name: np.concatenate(self.parts.pop(name)) for name in list(self.parts)}
        return _Table(
            sample_id=ids,
            num_kept=num_kept,
            names=list(self.code_of),
            name_of_label=self.name_of_label,
            label_name=columns.pop("label_name"),
            split=columns.pop("split"),
            content=columns.pop("content"),
            numbers=columns,
            group=pa.chunked_array(group, pa.string()).combine_chunks() if "group" in self.names else None,
        )


def _index(ids: pa.LargeStringArray, num_kept: int) -> IdIndex:
    """Index ids. Raises ManifestError for ids that are repeated in a manifest, or both in it and among dropped rows."""
    try:
        return IdIndex.of(ids)
    except ValueError:
        number = len(ids) - len(ids.unique())
    dropped = ids.slice(num_kept)
    in_both = dropped.filter(pc.is_in(dropped, value_set=ids.slice(0, num_kept)))
    if not len(in_both):
        raise ManifestError(f"{number} ids occur more than once in the manifest: recreate it with mmaudit split")
    raise ManifestError(
        f"{len(in_both)} samples are both kept and dropped (the first: {pc.min(in_both).as_py()}): "
        "run mmaudit split again"
    )


def _digest_words(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return digests as two words (n, 2): 0 for null, and the largest numbers for what is not a digest."""
    unknown, other = "0" * 32, "f" * 32
    texts = column.fill_null(unknown).to_pylist()
    try:
        words = digest_words(texts).T
    except ValueError:
        words = np.zeros((0, 2), np.uint64)
    if len(words) != len(texts):
        words = digest_words(text if re.fullmatch("[0-9a-f]{32}", text) else other for text in texts).T
    return words


def _view_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> PictureView | None:
    """Return how stored pictures become a network's input; None where they are stored as it reads them."""
    stored = stored_pictures(matrix.status.modality, tasks[0].media)
    return None if stored is None else PictureView(shape=_shape_of(matrix, tasks), stored=stored)


def _shape_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> tuple[int, ...]:
    modality = matrix.status.modality
    return input_shape(modality, tasks[0].media) if is_network(modality) else (matrix.num_features,)
