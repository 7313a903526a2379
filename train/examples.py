"""Features, labels and splits of the samples of a manifest."""

from __future__ import annotations

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
from ..audit.features.encoders import input_shape, is_network, stored_pictures
from ..audit.features.found_rows import FoundRows, find_rows
from ..audit.features.matrix import Inputs
from ..audit.hashing import IdIndex, canonical_order, iterate_strings
from ..audit.probes.crops import PictureView
from ..audit.workers import NETWORK_THREADS, NUM_THREADS, fixed_threads
from ..rebalance.curriculum import cut_validation
from ..rebalance.manifest import DROPPED_COLUMNS, Manifest, ManifestFile, states_split

Options = ParamSpec("Options")
Result = TypeVar("Result")

ROWS = (  # columns of a manifest that are read
    *("sample_id", "content", "label", "label_name", "split", "group"),
    *("rank", "weight", "discrepancy", "balance", "p_balanced"),
)
DROPPED_ROWS = tuple(name for name in ROWS if name in DROPPED_COLUMNS)
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
        only_test: Load the samples of the test split alone.

    Raises:
        ManifestError: The source has changed, or the manifest is malformed.
    """
    cuts_validation = not only_test and validation_fraction > 0 and not states_split(manifest, "validation")
    rows = _ManifestRows(with_groups=cuts_validation)
    for batch in manifest.batches(ROWS):
        rows.add(batch, "test" if only_test else None)
    num_kept = rows.num_rows
    for batch in dropped or ():
        rows.add(batch.filter(pc.equal(batch["split"], "test")), None)
    if only_test and not rows.num_rows:
        return load_examples(
            manifest, None, dataset=dataset, tasks=tasks, validation_fraction=validation_fraction, seed=seed
        )
    table = rows.collect(num_kept)
    found = find_rows(dataset, tasks, table.index)
    table.check_source(found, with_splits=not manifest.provenance.get("recipe", {}).get("resplit"))
    order = canonical_order(table.sample_id)  # the order of the manifest does not change a training
    ids, row = table.sample_id.take(pa.array(order)), found.row[order]
    codes = np.array(sorted(table.name_of_label), dtype=np.int32)
    label = np.searchsorted(codes, table.numbers.pop("label")[order])
    inputs = [FeatureMatrix.of(tasks, usable, row) for usable in found.usable]
    values = None if found.labels.values is None else np.ascontiguousarray(found.labels.values[order])
    class_names = tuple(str(table.names[table.name_of_label[code]]) for code in codes.tolist())
    group = None if table.group is None else table.group.take(pa.array(order))
    stated = np.array(table.names, dtype=object)[table.split[order]]
    split = cut_validation(stated, ids, label.astype(np.int32), group, fraction=validation_fraction, seed=seed)
    numbers: dict[str, Any] = {
        column: table.numbers.pop(column)[order].astype(type_) for column, (_, _, type_) in _NUMBERS.items()
    }
    return Examples(
        sample_id=ids,
        inputs=tuple(inputs),
        present=np.stack([matrix.present for matrix in inputs], axis=1),
        shapes=tuple(_shape_of(matrix, tasks) for matrix in inputs),
        content=found.content[order],
        modalities=tuple(usable.modality.name for usable in found.usable),
        label=label.astype(np.int64),
        class_names=class_names if values is None else found.labels.outputs,
        split=split,
        in_manifest=order < num_kept,
        views=tuple(_view_of(matrix, tasks) for matrix in inputs),
        backbones=tuple(Backbone.of(usable.modality, tasks[0].media) for usable in found.usable),
        task=dataset.task,
        values=values,
        **numbers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Rows (n,) of a manifest and its dropped rows, without an object per row.

    names: strings of which label_name (n,), split (n,) and name_of_label hold the indices. content: digests, b"" where
    unknown. numbers: the label, and columns of _NUMBERS, by name. group: names, None where there are none to read.
    """

    index: IdIndex
    names: list[str | None]
    name_of_label: dict[int, int]
    label_name: NDArray[np.int32]
    split: NDArray[np.int32]
    content: NDArray[np.bytes_]
    numbers: dict[str, NDArray[Any]]
    group: pa.Array | None

    @property
    def sample_id(self) -> pa.LargeStringArray:
        """Ids of the rows."""
        return self.index.ids

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
        self._check_same("content", (self.content != b"") & (self.content != found.content))
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


class _ManifestRows:
    """Batches of a manifest, of which strings that repeat become codes."""

    def __init__(self, *, with_groups: bool) -> None:
        self.with_groups = with_groups
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
        content = (text.encode() for text in iterate_strings(batch["content"].fill_null("")))
        self.parts["content"].append(np.fromiter(content, dtype="S32", count=len(batch)))
        self.parts["sample_id"] += batch["sample_id"].cast(pa.large_string()).chunks
        self.parts["group"] += batch["group"].chunks if self.with_groups else []
        self.parts["label"].append(batch["label"].to_numpy())
        for name in ("label_name", "split"):
            self.parts[name].append(self._codes(batch[name]))
        for name, (type_, missing, _) in _NUMBERS.items():
            column = batch[name].fill_null(missing) if name in batch.column_names else pa.repeat(missing, len(batch))
            self.parts[name].append(column.to_numpy().astype(type_, copy=False))

    def _codes(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        """Return the index of each string (n,) among those that have occurred."""
        values, code = coded_column(column)
        codes = [self.code_of.setdefault(value, len(self.code_of)) for value in values]
        return np.asarray(np.array(codes, dtype=np.int32)[code])

    def collect(self, num_kept: int) -> _Table:
        """Return all rows, of which the first `num_kept` are the manifest's. Raises ManifestError for repeated ids."""
        ids = pa.chunked_array(self.parts.pop("sample_id"), pa.large_string()).combine_chunks()
        group = self.parts.pop("group")
        try:
            index = IdIndex.of(ids)
        except ValueError as error:
            kept = pc.is_in(ids.slice(num_kept), value_set=ids.slice(0, num_kept))
            if number := kept.true_count:
                first = pc.min(ids.slice(num_kept).filter(kept)).as_py()
                reason = f"{number} samples are both kept and dropped (the first: {first}): run mmaudit split again"
            else:
                reason = f"{error} in the manifest: recreate it with mmaudit split"
            raise ManifestError(reason) from error
        columns = {name: np.concatenate(self.parts.pop(name)) for name in list(self.parts)}
        return _Table(
            index=index,
            names=list(self.code_of),
            name_of_label=self.name_of_label,
            label_name=columns.pop("label_name"),
            split=columns.pop("split"),
            content=columns.pop("content"),
            numbers=columns,
            group=pa.chunked_array(group, pa.string()).combine_chunks() if self.with_groups else None,
        )


def _view_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> PictureView | None:
    """Return how stored pictures become a network's input; None where they are stored as it reads them."""
    stored = stored_pictures(matrix.status.modality, tasks[0].media)
    return None if stored is None else PictureView(shape=_shape_of(matrix, tasks), stored=stored)


def _shape_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> tuple[int, ...]:
    modality = matrix.status.modality
    return input_shape(modality, tasks[0].media) if is_network(modality) else (matrix.num_features,)
