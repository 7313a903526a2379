"""Features, labels and splits of the samples of a manifest, on the device or read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.dataset.columns import SPLITS
from ..audit.dataset.samples import Samples, stratified_cut
from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.features.encode import EncodeTask, Status
from ..audit.features.encoded_samples import row_content, without_usable
from ..audit.features.encoders import input_shape, is_network
from ..audit.features.matrix import FeatureMatrix, Inputs, chunks
from ..audit.hashing import canonical_order
from ..audit.workers import prefetch_map
from ..rebalance.manifest import Manifest

Rows = NDArray[np.int64]
Item = TypeVar("Item")

READERS = 2  # threads that read ahead


class Store:
    """The inputs of n samples, m modalities. What fits in `most_bytes` stays on the device; the rest is read in time.

    Everything was decoded and encoded once, by worker processes, into the feature cache: what is read here are rows of
    matrices, by threads, into pinned memory where the device is CUDA.
    """

    def __init__(self, inputs: Sequence[Inputs], *, device: str, most_bytes: int) -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self.held: list[Tensor | None] = [None] * len(inputs)
        left = most_bytes
        for place in sorted(range(len(inputs)), key=lambda index: _bytes_of(inputs[index])):
            size = _bytes_of(inputs[place])
            if size <= left:
                self.held[place] = self._whole(inputs[place])
                left -= size

    @property
    def is_resident(self) -> bool:
        """Tell whether all inputs are on the device."""
        return all(each is not None for each in self.held)

    def stream(
        self, items: Iterable[Item], rows_of: Callable[[Item], Sequence[Rows]], *, num_threads: int = READERS
    ) -> Iterator[tuple[Item, tuple[Tensor, ...]]]:
        """Give each item with its inputs on the device, m tensors (b_j, d_j): of the rows (b_j,) of each modality.

        Threads read what follows, unless all is on the device.
        """

        def read(item: Item) -> tuple[Item, Sequence[Rows], list[Tensor | None]]:
            rows = rows_of(item)
            return item, rows, self._read(rows)

        for item, rows, found in prefetch_map(read, items, num_threads=0 if self.is_resident else num_threads):
            yield item, self._to_device(rows, found)

    def _whole(self, inputs: Inputs) -> Tensor:
        parts = [_tensor(inputs.read(rows)) for rows in chunks(inputs)]
        return torch.cat(parts).to(self.device)

    def _read(self, rows: Sequence[Rows]) -> list[Tensor | None]:
        """Read what is not on the device yet."""
        found = [
            _tensor(each.read(some)) if held is None else None
            for each, some, held in zip(self.inputs, rows, self.held, strict=True)
        ]
        if self.device.type == "cuda":
            return [None if each is None else each.pin_memory() for each in found]
        return found

    def _to_device(self, rows: Sequence[Rows], found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(
            _there(each).to(self.device, non_blocking=True)
            if held is None
            else held.index_select(0, torch.from_numpy(some).to(self.device, non_blocking=True))
            for held, some, each in zip(self.held, rows, found, strict=True)
        )


def _there(each: Tensor | None) -> Tensor:
    assert each is not None
    return each


def _tensor(read: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(read, requirements=("C", "W")))


def _bytes_of(inputs: Inputs) -> int:
    """Give the size of the whole matrix, by what its first row is made of."""
    if inputs.num_rows == 0:
        return 0
    return int(inputs.num_rows * inputs.num_features * inputs.read(np.arange(1)).dtype.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """n samples, those of the manifest and the test samples it left out, by a hash of their ids: arrays (n,).

    inputs: m matrices (n, d_j), NaN where a modality is missing; present (n, m): whether it is there. shapes: what a
    row of each is, (d_j,) for vectors, or the shape of what a network reads. content: digests of what each sample is
    made of.
    label: int64 in [0, k), numbering `class_names`. split: train, validation, test.
    rank: 0 = most balanced, -1 outside the manifest. balance in [-1, 1] and p_balanced in [0, 1] may be NaN.
    `chosen` tells the manifest's own samples.
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
    chosen: NDArray[np.bool_]

    @property
    def named(self) -> str:
        """The modalities, for the end of a message."""
        return f"the modalities are {', '.join(self.modalities)}"

    def rows(self, split: str) -> NDArray[np.intp]:
        """Give the rows of one split."""
        return np.flatnonzero(self.split == split)

    def only(self, modality: str) -> Examples:
        """Give the same samples in one modality alone. Raises ConfigError where there is no such one."""
        if modality not in self.modalities:
            raise ConfigError(f"--only {modality}: {choices(modality, self.modalities)}")
        place = self.modalities.index(modality)
        return replace(
            self,
            inputs=(self.inputs[place],),
            present=self.present[:, [place]],
            shapes=(self.shapes[place],),
            modalities=(self.modalities[place],),
        )


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

    Every figure then stands on the same test set, whatever a manifest keeps. Without a validation split one is cut
    from train by hash(seed, group or id). Raises ManifestError where the source has changed.
    """
    table, chosen = _with_dropped_test(manifest.table, dropped)
    ids = np.array(table["sample_id"].to_pylist(), dtype=object)
    rows = _find_rows(ids, samples.sample_id)
    names = np.array(samples.class_names, dtype=object)[samples.label[rows]]
    content = row_content(statuses)[rows]
    for what, column, now in (
        ("content", "content", content),
        ("label", "label_name", names),
        ("split", "split", samples.split[rows]),
    ):
        if column == "split" and manifest.provenance.get("rule", {}).get("resplit"):
            continue  # the manifest has splits of its own
        _check_same(what, ids, np.array(table[column].to_pylist(), dtype=object), now)
    _check_usable(ids, rows, statuses)
    order = canonical_order(ids)  # whatever the order of the manifest, a training is the same
    table, chosen, ids, rows, content = table.take(order), chosen[order], ids[order], rows[order], content[order]
    codes, label = np.unique(table["label"].to_numpy(), return_inverse=True)
    inputs = [FeatureMatrix.of(tasks, status, rows) for status in statuses]
    class_names = dict(zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True))
    split = with_validation(table, ids, label.astype(np.int32), fraction=validation_fraction, seed=seed)
    return Examples(
        sample_id=ids,
        inputs=tuple(inputs),
        present=np.stack([each.present for each in inputs], axis=1),
        shapes=tuple(_shape_of(each, tasks) for each in inputs),
        content=content,
        modalities=tuple(status.modality.name for status in statuses),
        label=label.astype(np.int64),
        class_names=tuple(str(class_names[code]) for code in codes.tolist()),
        split=split,
        rank=np.where(chosen, table["rank"].to_pandas().fillna(-1), -1).astype(np.int64),
        weight=np.array(table["weight"].to_pandas().fillna(1.0), dtype=np.float32),
        discrepancy=np.array(table["discrepancy"].to_pandas(), dtype=np.float64),
        balance=np.array(table["balance"].to_pandas(), dtype=np.float64),
        p_balanced=np.array(table["p_balanced"].to_pandas(), dtype=np.float64),
        chosen=chosen,
    )


def _shape_of(matrix: FeatureMatrix, tasks: Sequence[EncodeTask]) -> tuple[int, ...]:
    modality = matrix.status.modality
    return input_shape(modality, tasks[0].media) if is_network(modality) else (matrix.num_features,)


def _with_dropped_test(kept: pa.Table, dropped: pa.Table | None) -> tuple[pa.Table, NDArray[np.bool_]]:
    if dropped is None:
        return kept, np.ones(len(kept), dtype=bool)
    names = [name for name in kept.column_names if name in dropped.column_names]
    both = set(kept["sample_id"].to_pylist()) & set(dropped["sample_id"].to_pylist())
    if both:
        raise ManifestError(f"{len(both)} samples are both kept and dropped ({min(both)}): run mmaudit split again")
    test = dropped.filter(pa.compute.equal(dropped["split"], "test"))
    table = pa.concat_tables([kept, test.select(names)], promote_options="default")
    return table, np.arange(len(table)) < len(kept)


def _find_rows(ids: NDArray[np.object_], all_ids: NDArray[np.object_]) -> NDArray[np.intp]:
    number = {name: row for row, name in enumerate(all_ids)}
    lost = [name for name in ids if name not in number]
    if lost:
        raise ManifestError(
            f"{len(lost)} of {len(ids)} samples of the manifest are not in its source (the first: {lost[0]}); "
            "rescore with mmaudit score, or say where the data are with --data"
        )
    return np.array([number[name] for name in ids], dtype=np.intp)


def _check_same(what: str, ids: NDArray[np.object_], then: NDArray[np.object_], now: NDArray[np.object_]) -> None:
    changed = [name for name, old, new in zip(ids, then, now, strict=True) if old is not None and old != new]
    if changed:
        raise ManifestError(
            f"{len(changed)} of {len(ids)} samples have changed their {what} since the manifest was made "
            f"(the first: {changed[0]}); rescore with mmaudit score and split again"
        )


def _check_usable(ids: NDArray[np.object_], rows: NDArray[np.intp], statuses: Sequence[Status]) -> None:
    for status in statuses:
        bad = ids[~(status.usable | without_usable(status))[rows]]
        if len(bad):
            raise ManifestError(f"{len(bad)} samples of the manifest have no usable {status.modality.name}: {bad[0]}")


def with_validation(
    table: pa.Table, ids: NDArray[np.object_], label: NDArray[np.int32], *, fraction: float, seed: int
) -> NDArray[np.object_]:
    """Give the split of each row (n,), with a validation split cut from the training rows where there is none."""
    split = np.array(table["split"].to_pylist(), dtype=object)
    unknown = {str(name) for name in split} - set(SPLITS)
    if unknown:
        raise ManifestError(f"column split of the manifest holds {sorted(unknown)[0]!r}: train, validation or test")
    if "validation" in split:
        return split
    train = np.flatnonzero(split == "train")
    groups = table["group"].to_pylist() if "group" in table.column_names else [None]
    group = None if None in groups else np.array(groups, dtype=object)[train]
    drawn = stratified_cut(ids[train], label[train], group, fraction=fraction, seed=seed, purpose="validation split")
    split[train[drawn]] = "validation"
    return split
