"""Samplers of PyTorch for loops of other libraries: the rows of a manifest in the order of a curriculum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.utils.data

from ..audit.errors import ConfigError, choices
from ..audit.hashing import digest, splitmix64
from ..audit.parsing import build_config
from ..rebalance.curriculum import OrderConfig, RowIndex, id_keys, split_rows
from ..rebalance.keep import Identify, dataset_ids, join_ids, open_manifest
from ..rebalance.manifest import Manifest
from .batches import ModelReader
from .config import FinetuneConfig, TrainConfig
from .methods import resolve
from .optimizer import DistributedContext
from .sampling import SAMPLERS
from .sampling.sampler import Ordered, Pool

_WEIGHTED = "weighted"  # the order of `mmaudit order`: bss-l by the manifest's scores, which never change
_BLOCK = 1 << 16  # rows that are converted to Python integers at once
_STATE_VERSION = 1


class _NoModel:
    """The ModelReader of a loop that is not mmaudit's: there is no model to evaluate."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"sampling {self._name} evaluates the model in training, which only mmaudit finetune does; in a loop of "
            f"your own use {_WEIGHTED}, the order by the manifest's balance scores, or another sampling"
        )


class ManifestSampler(torch.utils.data.Sampler[int]):
    """Sampler of PyTorch that draws the samples of a manifest from any map-style dataset, in a curriculum's order.

    It draws only samples of the manifest's split, never test samples unless `split` names them. The order depends on
    ids, seed and epoch only, and is that of `mmaudit.order` and `mmaudit finetune`: the same for any order of the
    dataset and any number of processes. The length of an epoch follows the pacing. Process `rank` of `num_replicas`
    draws every num_replicas-th index, so that batches of b samples in each process make the same global steps as
    batches of b * num_replicas in one. Where the processes would draw different numbers, samples of the last step are
    repeated: its set of ids stays the same. There is no limit of 2^24 rows.

    Args:
        manifest: The manifest, or its file.
        dataset: The dataset that the indices are of; needed for `id_of` only.
        ids: Id of each sample of the dataset (n,), in its order: strings or integers, in a list, an array or a column.
        id_of: In place of `ids`: the name of the field that holds a sample's id, or a function of the sample. It reads
            every sample once, except for a column of a Hugging Face dataset.
        sampling: uniform, bss-h, anti-curriculum, balanced-first, weighted, posterior or class-balanced, or an
            installed sampler that follows from the manifest alone. "weighted" draws by balance scores, as `mmaudit
            order` does.
        split: train, validation or test, or several.
        seed: Seed of the order.
        num_replicas: Processes that train together. Leave 1 where the library shards the loader itself, as accelerate,
            transformers and Lightning do.
        rank: Number of this process, from 0.
        validation_fraction: Share of the training rows that is the validation split where the manifest has none, as in
            `finetune` and `order`; 0 cuts none.
        allow_missing: Draw without the manifest's rows that the dataset lacks.
        settings: Settings of order and sampling, such as {"order.grow_epochs": 10}.

    Raises:
        DatasetError: Ids of the dataset are null or repeated, or a sample has no field `id_of`.
        ManifestError: The dataset lacks rows of the manifest, or all of them; the split is empty; or the manifest lacks
            the scores that the sampling needs.
        ConfigError: A name or setting does not exist, or the sampling evaluates the model in training.

    Example:
        >>> sampler = mmaudit.ManifestSampler("balanced.parquet", ids=dataset.ids, sampling="bss-h")
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler)
        >>> for epoch in range(40):
        ...     sampler.set_epoch(epoch)
        ...     for batch in loader: ...
    """

    def __init__(
        self,
        manifest: Manifest | str | Path,
        dataset: Any = None,
        *,
        ids: Any = None,
        id_of: str | Identify | None = None,
        sampling: str = "uniform",
        split: str | Sequence[str] = "train",
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        validation_fraction: float = 0.1,
        allow_missing: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ConfigError(f"rank {rank} of {num_replicas} processes: it must lie in [0, num_replicas)")
        opened = open_manifest(manifest)
        rows = split_rows(opened.table, split, validation_fraction=validation_fraction, seed=seed)
        names = dataset_ids(dataset, ids, id_of)
        rows, index = join_ids(opened.table["sample_id"], rows, names, allow_missing=allow_missing)
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0
        self._index = index  # of each row of the pool, the dataset's index
        self._sampler = _open_sampler(_pool(opened, rows), sampling, settings or {}, seed=seed)
        self._model: ModelReader = _NoModel(sampling)
        self._identity = _identity(self._sampler.pool, sampling, settings or {}, seed=seed)
        self.position = self._resume_at = 0
        self.is_drawn = (
            False  # whether the pass has drawn its last sample; a loop may stop there without asking for more
        )
        self._cached: tuple[int, RowIndex] | None = None
        self.order()  # samplings that evaluate the model raise here

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices of the epoch."""
        order, start = self.begin_pass()
        step, tail = self.num_replicas, (len(order) - start) % self.num_replicas
        for block in range(start, len(order), _BLOCK * step):
            indices = order[block + self.rank : min(block + _BLOCK * step, len(order)) : step].tolist()
            for number, index in enumerate(indices, start=1):
                self.position = min(block + number * step, len(order))
                self.is_drawn = self.position == len(order)
                yield index
        if 0 < tail <= self.rank:  # as many as the other processes: a sample of the last step once more
            self.position, self.is_drawn = len(order), True
            yield int(order[len(order) - tail + (self.rank - tail) % tail])
        self.end_pass()

    def __len__(self) -> int:
        """Return how many indices this process draws in a pass from the start that begins now."""
        return -(-len(self.order(self.next_epoch)) // self.num_replicas)

    @property
    def next_epoch(self) -> int:
        """Epoch of a pass that begins now."""
        return self.epoch + self.is_drawn

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0 as in PyTorch: epoch 0 is epoch 1 of `mmaudit.order` and of the pacing.

        Without a call a complete pass is followed by the next epoch, and an incomplete one by the same epoch. A
        position that `load_state_dict` has set is kept where the epoch is the same.

        Args:
            epoch: Number of the epoch, at least 0.

        Raises:
            ConfigError: The epoch is below 0.
        """
        if epoch < 0:
            raise ConfigError(f"epoch {epoch}: epochs of a sampler are counted from 0")
        if epoch != self.epoch:
            self.epoch, self.position, self._resume_at = int(epoch), 0, 0
        self.is_drawn = False

    def order(self, epoch: int | None = None) -> RowIndex:
        """Return the dataset's indices (n',) in the order of an epoch, over all processes.

        Args:
            epoch: Number of the epoch, from 0; by default the present one.

        Returns:
            Indices, int64. With draws with replacement some occur more than once, and others not at all.
        """
        epoch = self.epoch if epoch is None else epoch
        if self._cached is None or self._cached[0] != epoch:
            self._sampler.begin_epoch(epoch + 1, self._model)
            self._cached = (epoch, self._index[self._sampler.rows(epoch + 1)])
        return self._cached[1]

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch: the epoch, and how many samples all processes together have drawn.

        A loader that reads ahead has drawn more than the loop has used: StatefulDataLoader saves the state of each
        batch, and for others set `position` to the steps done times the samples per step over all processes.
        """
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "position": self.position,
            "identity": self._identity,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load a state; the next pass continues there, with any number of processes.

        Args:
            state: What `state_dict` returned.

        Raises:
            ConfigError: The state is of another manifest, sampling, seed or setting.
        """
        if (state.get("version"), state.get("identity")) != (_STATE_VERSION, self._identity):
            raise ConfigError(
                "the state of the sampler is of another manifest, split, sampling, seed or setting: its position means "
                "other samples here; start a new epoch, or restore the settings"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resume_at, self.is_drawn = self.position, self.position >= len(self.order())

    def begin_pass(self) -> tuple[RowIndex, int]:
        """Return the epoch's order and the position at which this pass begins."""
        start = 0 if self.is_drawn else self._resume_at
        self.epoch, self._resume_at, self.is_drawn = self.next_epoch, 0, False
        order = self.order()
        self.position = start
        return order, start

    def end_pass(self) -> None:
        """Record that the epoch is drawn: the next pass is the next epoch."""
        self.position, self.is_drawn = len(self.order()), True


class ManifestBatchSampler(torch.utils.data.BatchSampler):
    """Batch sampler of PyTorch whose steps over all processes are those of `mmaudit finetune`.

    `batch_size` counts the samples of a step over all processes of the sampler, and each process gets its adjacent
    part: the ids of step t are the same for any number of processes. Of a last step of fewer samples than processes
    some are drawn by more than one process, so that all have the same number of steps.

    Args:
        sampler: The samples and their order, with `num_replicas` and `rank`.
        batch_size: Samples of a step over all processes, at least `num_replicas`.
        drop_last: Leave out a last step of fewer samples.

    Raises:
        ConfigError: The batch size is below `num_replicas`.

    Example:
        >>> sampler = mmaudit.ManifestSampler("balanced.parquet", ids=dataset.ids, sampling="bss-h")
        >>> batches = mmaudit.ManifestBatchSampler(sampler, 64)
        >>> loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches)
    """

    sampler: ManifestSampler

    def __init__(self, sampler: ManifestSampler, batch_size: int, *, drop_last: bool = False) -> None:
        if batch_size < sampler.num_replicas:
            raise ConfigError(
                f"batch_size {batch_size} over {sampler.num_replicas} processes: at least one sample each"
            )
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's indices of each step."""
        sampler = self.sampler
        local_part = DistributedContext(rank=sampler.rank, world_size=sampler.num_replicas)
        order, start = sampler.begin_pass()
        last = len(order) - (len(order) - start) % self.batch_size if self.drop_last else len(order)
        for begin in range(start, last, self.batch_size):
            step = order[begin : begin + self.batch_size]
            local = step[local_part.slice(len(step))]
            if len(local) == 0:
                local = step[[sampler.rank % len(step)]]
            sampler.position = begin + len(step)
            sampler.is_drawn = begin + self.batch_size >= last
            yield local.tolist()
        sampler.end_pass()

    def __len__(self) -> int:
        """Return the number of steps in a pass from the start that begins now."""
        num = len(self.sampler.order(self.sampler.next_epoch))
        return num // self.batch_size if self.drop_last else -(-num // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; see `ManifestSampler.set_epoch`."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch; see `ManifestSampler.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load a state; see `ManifestSampler.load_state_dict`."""
        self.sampler.load_state_dict(state)


def _pool(manifest: Manifest, rows: RowIndex) -> Pool:
    """Return what samplers draw from, as of a fine-tuning: the columns of these rows of the manifest."""
    table = manifest.table.take(pa.array(rows))
    codes, label = np.unique(table["label"].to_numpy(), return_inverse=True)
    modalities = manifest.provenance.get("scores", {}).get("modalities") or ()
    scores = {
        name: np.array(table[name].to_pandas(), dtype=np.float64) for name in ("discrepancy", "balance", "p_balanced")
    }
    return Pool(
        key=id_keys(table["sample_id"].combine_chunks()),
        rank=table["rank"].to_numpy().astype(np.int64),
        label=label.astype(np.int64),
        num_classes=len(codes),
        num_modalities=max(2, len(modalities)),
        **scores,
    )


def _open_sampler(pool: Pool, sampling: str, settings: Mapping[str, Any], *, seed: int) -> Ordered:
    """Return the sampler of a name with its settings; ConfigError where its epochs are no order of rows."""
    sections = _sections(settings)
    name = sampling
    if sampling == _WEIGHTED:
        name = "bss-l"
        bss = {**sections["sampling"].get("bss", {}), "score_source": "manifest"}
        sections["sampling"] = {**sections["sampling"], "bss": bss}
    elif not SAMPLERS.offers(sampling):
        raise ConfigError(f"sampling {sampling}: no such name; {choices(sampling, [*_names(), _WEIGHTED])}")
    methods = resolve(
        TrainConfig(
            finetune=FinetuneConfig(sampling=name),
            order=build_config(OrderConfig, sections["order"], where="order."),
            sampling=sections["sampling"],
        )
    )
    if not issubclass(methods.sampler, Ordered):
        raise ConfigError(
            f"sampling {sampling} selects samples of single modalities by the training's outputs, which only mmaudit "
            f"finetune has; {choices(sampling, [*_names(), _WEIGHTED])}"
        )
    return methods.sampler(
        pool,
        methods.config.order,
        methods.sampler_config,
        batch_size=1,
        seed=seed,
        distributed=DistributedContext(),
    )


def _names() -> list[str]:
    """Return the built-in samplings whose epochs are orders that follow from the manifest."""
    loaded = {name: SAMPLERS.load(name) for name in SAMPLERS}
    return [name for name, method in loaded.items() if issubclass(method, Ordered) and name != "bss-l"]


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings such as "order.start" or "sampling.bss.beta" by section."""
    sections: dict[str, Any] = {"order": {}, "sampling": {}}
    for key, value in settings.items():
        section, *names = key.split(".")
        if section == "order" and len(names) == 1:
            sections["order"][names[0]] = value
        elif section == "sampling" and len(names) == 2:
            sections["sampling"].setdefault(names[0], {})[names[1]] = value
        else:
            raise ConfigError(
                f"setting {key}: a sampler has settings of order.* and sampling.*, as of mmaudit finetune"
            )
    return sections


def _identity(pool: Pool, sampling: str, settings: Mapping[str, Any], *, seed: int) -> int:
    """Return a number of 48 bits that differs where the order does, the same for any order of the rows."""
    text = repr((sampling, sorted(settings.items()), seed, len(pool)))
    rows = np.bitwise_xor.reduce(splitmix64(pool.key + pool.rank.astype(np.uint64)))
    return int(digest(text.encode(), int(rows).to_bytes(8, "little"))[:12], 16)
