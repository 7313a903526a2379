"""Features, labels and splits of the samples of a manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.dataset.samples import Samples
from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.features.backbone_inputs import Backbone
from ..audit.features.cached_matrix import FeatureMatrix
from ..audit.features.encode import EncodeTask
from ..audit.features.encoded_samples import Status, missing_in_source, row_content
from ..audit.features.encoders import input_shape, is_network, stored_pictures
from ..audit.features.matrix import Inputs
from ..audit.hashing import canonical_order
from ..audit.probes.crops import PictureView
from ..audit.workers import NETWORK_THREADS, NUM_THREADS, fixed_threads
from ..rebalance.curriculum import RowIndex, with_validation
from ..rebalance.manifest import Manifest

Options = ParamSpec("Options")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """n samples, those of the manifest and the test samples it left out, ordered by a hash of their ids: arrays (n,).

    inputs: m matrices (n, d_j), NaN where a modality is missing; present (n, m): whether it is available. shapes: shape
    of a row of each modality, (d_j,) for vectors, or that of a network's input. views: how each modality's rows become
    a network's input; None, also for all of them: rows have the shape. backbones: the pretrained model that each
    modality's rows are inputs of; None, also for all of them: of none. content: digests of each sample's media. label:
    int64 in [0, k), indexing `class_names`. task: classification, multilabel or regression; of the last two, label is
    a stratum, values (n, k) float32 is the target, 0 and 1 or a number in the units of the data, and class_names are
    the names of its k columns. split: train, validation, test. rank: 0 = most balanced, -1 outside the
    manifest. balance in [-1, 1] and p_balanced in [0, 1] may be NaN. in_manifest: whether a sample is in the manifest.
    """

    sample_id: NDArray[np.object_]
    inputs: tuple[Inputs, ...]
    present: NDArray[np.bool_]
    shapes: tuple[tuple[int, ...], ...]
    content: NDArray[np.object_]
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
    manifest: Manifest,
    dropped: pa.Table | None,
    *,
    samples: Samples,
    statuses: Sequence[Status],
    tasks: Sequence[EncodeTask],
    validation_fraction: float,
    seed: int,
) -> Examples:
    """Join a manifest, and the test rows dropped from it, with the features of its source, by id.

    All results are then computed on the same test set, whatever a manifest keeps. Without a validation split one is cut
    from train by hash(seed, group or id). Raises ManifestError where the source has changed.
    """
    table, in_manifest = _with_dropped_test(manifest.table, dropped)
    ids = np.array(table["sample_id"].to_pylist(), dtype=object)
    rows = _find_rows(ids, samples.sample_id)
    content = row_content([status.content[rows] for status in statuses])
    has_own_splits = bool(manifest.provenance.get("recipe", {}).get("resplit"))
    _check_unchanged(table, samples, rows, content=content, with_splits=not has_own_splits)
    _check_usable(ids, rows, statuses)
    order = canonical_order(ids)  # the order of the manifest does not change a training
    table, in_manifest = table.take(order), in_manifest[order]
    ids, rows, content = ids[order], rows[order], content[order]
    codes, label = np.unique(table["label"].to_numpy(), return_inverse=True)
    inputs = [FeatureMatrix.of(tasks, status, rows) for status in statuses]
    class_names = dict(zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True))
    values = None if samples.values is None else np.ascontiguousarray(samples.values[rows])
    split = with_validation(table, ids, label.astype(np.int32), fraction=validation_fraction, seed=seed)
    return Examples(
        sample_id=ids,
        inputs=tuple(inputs),
        present=np.stack([matrix.present for matrix in inputs], axis=1),
        shapes=tuple(_shape_of(matrix, tasks) for matrix in inputs),
        content=content,
        modalities=tuple(status.modality.name for status in statuses),
        label=label.astype(np.int64),
        class_names=tuple(str(class_names[code]) for code in codes.tolist()) if values is None else samples.outputs,
        split=split,
        rank=np.where(in_manifest, table["rank"].to_pandas().fillna(-1), -1).astype(np.int64),
        weight=np.array(table["weight"].to_pandas().fillna(1.0), dtype=np.float32),
        discrepancy=np.array(table["discrepancy"].to_pandas(), dtype=np.float64),
        balance=np.array(table["balance"].to_pandas(), dtype=np.float64),
        p_balanced=np.array(table["p_balanced"].to_pandas(), dtype=np.float64),
        in_manifest=in_manifest,
        views=tuple(_view_of(matrix, tasks) for matrix in inputs),
        backbones=tuple(Backbone.of(status.modality, tasks[0].media) for status in statuses),
        task=samples.task,
        values=values,
    )


def _check_unchanged(
    table: pa.Table, samples: Samples, rows: RowIndex, *, content: NDArray[np.object_], with_splits: bool
) -> None:
    """Raise ManifestError where the content, label or split of a manifest's row differs from those of its source."""
    columns = {
        "content": ("content", content),
        "label": ("label_name", np.array(samples.class_names, dtype=object)[samples.label[rows]]),
        "split": ("split", samples.split[rows]),
    }
    ids = np.array(table["sample_id"].to_pylist(), dtype=object)
    for name, (column, current) in columns.items():
        if name != "split" or with_splits:
            _check_same(name, ids, np.array(table[column].to_pylist(), dtype=object), current)


def _view_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> PictureView | None:
    """Return how stored pictures become a network's input; None where they are stored as it reads them."""
    stored = stored_pictures(matrix.status.modality, tasks[0].media)
    return None if stored is None else PictureView(shape=_shape_of(matrix, tasks), stored=stored)


def _shape_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> tuple[int, ...]:
    modality = matrix.status.modality
    return input_shape(modality, tasks[0].media) if is_network(modality) else (matrix.num_features,)


def _with_dropped_test(manifest_table: pa.Table, dropped: pa.Table | None) -> tuple[pa.Table, NDArray[np.bool_]]:
    if dropped is None:
        return manifest_table, np.ones(len(manifest_table), dtype=bool)
    names = [name for name in manifest_table.column_names if name in dropped.column_names]
    duplicates = set(manifest_table["sample_id"].to_pylist()) & set(dropped["sample_id"].to_pylist())
    if duplicates:
        raise ManifestError(
            f"{len(duplicates)} samples are both kept and dropped (the first: {min(duplicates)}): "
            "run mmaudit split again"
        )
    test = dropped.filter(pa.compute.equal(dropped["split"], "test"))
    table = pa.concat_tables([manifest_table, test.select(names)], promote_options="default")
    return table, np.arange(len(table)) < len(manifest_table)


def _find_rows(ids: NDArray[np.object_], all_ids: NDArray[np.object_]) -> NDArray[np.intp]:
    row_of_id = {sample_id: row for row, sample_id in enumerate(all_ids)}
    missing = [sample_id for sample_id in ids if sample_id not in row_of_id]
    if missing:
        raise ManifestError(
            f"{len(missing)} of {len(ids)} samples of the manifest are not in its source (the first: {missing[0]}); "
            "rescore with mmaudit score, or set the folder of the data with --data"
        )
    return np.array([row_of_id[sample_id] for sample_id in ids], dtype=np.intp)


def _check_same(
    field_name: str, ids: NDArray[np.object_], recorded: NDArray[np.object_], current: NDArray[np.object_]
) -> None:
    changed = [
        sample_id for sample_id, old, new in zip(ids, recorded, current, strict=True) if old is not None and old != new
    ]
    if changed:
        raise ManifestError(
            f"{len(changed)} of {len(ids)} samples have changed their {field_name} since the manifest was made "
            f"(the first: {changed[0]}); rescore with mmaudit score and split again"
        )


def _check_usable(ids: NDArray[np.object_], rows: NDArray[np.intp], statuses: Sequence[Status]) -> None:
    for status in statuses:
        unusable = ids[~(status.usable | missing_in_source(status))[rows]]
        if len(unusable):
            raise ManifestError(
                f"{len(unusable)} samples of the manifest have no usable {status.modality.name} "
                f"(the first: {unusable[0]})"
            )
