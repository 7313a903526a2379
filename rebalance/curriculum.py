"""Curriculum order: the samples of each epoch and step, and the pacing functions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.dataset.columns import SPLITS
from ..audit.dataset.samples import cut_by_keys
from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.hashing import hash_ids, hash_rank, iterate_strings, splitmix64
from ..audit.parsing import check_choices, check_ranges

log = logging.getLogger("mmaudit")


class Pacing(Protocol):
    """Share of the samples used in epoch t = 1, 2, ...: in (0, 1], non-decreasing, and exactly 1 from T on.

    `start` is lambda0 in (0, 1], the share at a notional epoch 0 that is not trained; `grow_epochs` is T, at least 1.
    """

    def __call__(self, epoch: int, *, start: float, grow_epochs: int) -> float:
        """Compute lambda(t)."""


def root_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Compute the share of the samples used in epoch t = 1, 2, ..., in (0, 1], most balanced first.

    lambda(t) = min(1, sqrt(t (1 - lambda0^2) / T_grow + lambda0^2)): BSS-H, arXiv 2501.01470, with lambda0 = 0.1 and
    T_grow = 40 there.
    """
    if epoch >= grow_epochs:
        return 1.0  # the root may round to just below 1, and the floor would then drop a sample
    return min(1.0, math.sqrt(epoch * (1 - start**2) / grow_epochs + start**2))


def linear_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Compute lambda(t) = lambda0 + (1 - lambda0) t / T: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else _interpolate(epoch / grow_epochs, start)


def step_pacing(epoch: int, *, start: float, grow_epochs: int, steps: int = 5) -> float:
    """Compute equal steps, one every T / steps epochs: lambda0 + (1 - lambda0) floor(steps t / T) / steps.

    The form with any number of steps, and the default of five, are ours. One step, at T, is that of Wu et al. (arXiv
    2012.03107); Penha and Hauff (arXiv 1912.08555) use one third, two thirds and all, each for a third of T.
    """
    return 1.0 if epoch >= grow_epochs else _interpolate(steps * epoch // grow_epochs / steps, start)


def geometric_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Compute lambda(t) = lambda0^(1 - t / T), a constant factor per epoch: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else min(1.0, start ** (1 - epoch / grow_epochs))


def exponential_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Compute lambda(t) = lambda0 + (1 - lambda0) (e^(10 t / T) - 1) / (e^10 - 1).

    From Wu, Dyer and Neyshabur, arXiv 2012.03107. The latest increase of all: at T / 2 it has covered 0.7% of the way.
    """
    return 1.0 if epoch >= grow_epochs else _interpolate(math.expm1(10 * epoch / grow_epochs) / math.expm1(10), start)


def _interpolate(progress: float, start: float) -> float:
    return min(1.0, start + (1 - start) * progress)


PACINGS: dict[str, Pacing] = {
    "root": root_pacing,
    "linear": linear_pacing,
    "step": step_pacing,
    "geometric": geometric_pacing,
    "exponential": exponential_pacing,
}


RowIndex = NDArray[np.int64]
Keys = NDArray[np.uint64]


# Unnormalised draw weights from balance scores (n,) in [-1, 1], high = balanced. `linear` is that of BSS-L's code,
# where 1.01 leaves the least balanced sample a weight of 0.01; `softmax` is that of its paper, arXiv 2501.01470.
WEIGHTS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "linear": lambda balance: 1.01 + balance,
    "softmax": np.exp,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Order of the samples in training, section `order` of a config.

    The defaults are those of BSS-H and of BSS-L's code (arXiv 2501.01470).

    Args:
        order: "curriculum", a shuffled pass over the most balanced share, which grows by `pacing`; "anti-curriculum",
            over the least balanced share; "shuffled", over all samples; "weighted", balanced samples tend to come
            earlier or more often, see `draw`.
        pacing: Growth of the share: "root", "linear", "step", "geometric" or "exponential".
        start: Share of the samples at epoch 0, in (0, 1].
        grow_epochs: Epoch from which all samples are used, at least 1.
        steps: Number of steps of the step pacing, at least 1.
        draw: Of the weighted order: "order", without replacement, every sample once; "replacement", as many draws as
            samples.
        weight: Of the weighted order: how weights follow from balance scores, "linear" or "softmax".

    Raises:
        ConfigError: A name is unknown or a number out of range.

    Example:
        >>> OrderConfig(pacing="linear", grow_epochs=10).share(5)
        0.55
    """

    order: str = "curriculum"
    pacing: str = "root"
    start: float = 0.1
    grow_epochs: int = 40
    steps: int = 5
    draw: str = "order"
    weight: str = "linear"

    def __post_init__(self) -> None:
        check_choices("order", self, order=ORDERS, pacing=PACINGS, draw=DRAWS, weight=WEIGHTS)
        check_ranges("order", self, start="(0, 1]", grow_epochs="[1, inf)", steps="[1, inf)")

    def share(self, epoch: int) -> float:
        """Compute the share of the samples used in epoch t = 1, 2, ... of a curriculum, in (0, 1]."""
        if self.pacing == "step":  # the only pacing with a parameter of its own
            return step_pacing(epoch, start=self.start, grow_epochs=self.grow_epochs, steps=self.steps)
        return PACINGS[self.pacing](epoch, start=self.start, grow_epochs=self.grow_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """Inputs of an order function: the columns (n,) of `order_of`, the config, and the epoch."""

    rank: NDArray[np.integer]
    balance: NDArray[np.floating[Any]] | None
    key: Keys
    config: OrderConfig
    seed: int
    number: int

    def shuffled(self, rows: RowIndex) -> RowIndex:
        """Return the rows shuffled by a hash of this seed and epoch."""
        key = self.key[rows]
        return rows[_sort_rows(_hash_for_epoch(key, seed=self.seed, epoch=self.number), key)]

    def weight(self) -> NDArray[np.float64]:
        """Weights (n,) of the draws, above 0. Raises ManifestError where a score is missing or out of range."""
        if self.balance is None:
            raise ManifestError("a weighted order needs balance scores; none found: rescore with mmaudit score")
        balance = np.asarray(self.balance, dtype=np.float64)
        invalid_rows = np.flatnonzero(~np.isfinite(balance) | (np.abs(balance) > 1 + 1e-6))  # float32 rounding
        if len(invalid_rows):
            raise ManifestError(
                f"{len(invalid_rows)} of {len(balance)} balance scores are not in [-1, 1] (row {invalid_rows[0]} has "
                f"{balance[invalid_rows[0]]}), and a weighted order needs them: remove those samples, or rescore"
            )
        return WEIGHTS[self.config.weight](balance)


def with_validation(table: pa.Table, *, fraction: float, seed: int) -> NDArray[np.object_]:
    """Return the split of each row of a manifest (n,), with a validation split cut from train where there is none."""
    column = table["split"].dictionary_encode(null_encoding="encode").combine_chunks()
    names, code = np.array(column.dictionary.to_pylist(), dtype=object), column.indices.to_numpy()
    split = names[code] if len(names) else np.zeros(0, dtype=object)
    group = table["group"] if "group" in table.column_names else None
    label = np.asarray(table["label"].to_numpy(), dtype=np.int32)
    return cut_validation(split, table["sample_id"], label, group, fraction=fraction, seed=seed)


def cut_validation(
    split: NDArray[np.object_],
    ids: pa.Array | pa.ChunkedArray,
    label: NDArray[np.int32],
    group: pa.Array | pa.ChunkedArray | None,
    *,
    fraction: float,
    seed: int,
) -> NDArray[np.object_]:
    """Return splits (n,) with a validation split cut from the training rows, by hash(seed, group or id), unless stated.

    It takes no more than `fraction` of the training rows, in whole groups; 0 cuts none. Where every group is larger it
    is cut within groups, which a warning states: the validation loss then also measures what is learned of a group.
    group: of each row (n,); as good as None where one is null.
    """
    unknown = {str(name) for name in set(split)} - set(SPLITS)
    if unknown:
        raise ManifestError(
            f"column split of the manifest has {sorted(unknown)[0]!r}, must be one of train, validation, test"
        )
    is_train = split == "train"
    if fraction == 0 or not is_train.any() or (split == "validation").any():
        return split
    train, label, of_train = np.flatnonzero(is_train), label[is_train], pa.array(is_train)
    selected = np.zeros(len(train), dtype=bool)
    if group is not None and group.null_count:
        group = None
    if group is not None:
        coded = group.filter(of_train).dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        keys = hash_rank(iterate_strings(coded.dictionary), seed=seed, purpose="validation split")
        selected = cut_by_keys(keys, label, coded.indices.to_numpy(), fraction=fraction, at_most=True)
    if not selected.any():
        keys = hash_rank(iterate_strings(ids.filter(of_train)), seed=seed, purpose="validation split")
        selected = cut_by_keys(keys, label, None, fraction=fraction)
        if group is not None:
            log.warning(
                "no group has as few as %d training samples (finetune.validation_fraction %g of %d): the validation "
                "split is cut within groups",
                int(selected.sum()),
                fraction,
                len(train),
            )
    split = split.copy()
    split[train[selected]] = "validation"
    return split


def split_rows(table: pa.Table, split: str | Sequence[str], *, validation_fraction: float, seed: int) -> RowIndex:
    """Return the rows of splits of a manifest, ascending; a validation split is cut as in `with_validation`.

    Without one, and with a fraction of 0, there is none. Raises ManifestError where the manifest has no such rows.
    """
    names = (split,) if isinstance(split, str) else tuple(split)
    for name in names:
        if name not in SPLITS:
            raise ConfigError(f"split {name!r}: no such split; {choices(str(name), SPLITS)}")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}: it must lie in [0, 1)")
    column = table["split"]
    has_validation = bool(pc.any(pc.equal(column, "validation")).as_py())
    if not has_validation and validation_fraction > 0 and {"train", "validation"} & {*names}:
        cut = with_validation(table, fraction=validation_fraction, seed=seed)
        num_cut, num_train = int((cut == "validation").sum()), pc.sum(pc.equal(column, "train")).as_py()
        log.warning(
            "the manifest has no validation split: %d of its %d training rows are cut as one, as in finetune "
            "(validation_fraction=0 cuts none)",
            num_cut,
            num_train,
        )
        column = pa.chunked_array([pa.array(cut, pa.string())])
    rows: RowIndex = np.flatnonzero(pc.is_in(column, value_set=pa.array(names)).to_numpy(zero_copy_only=False))
    if len(rows) == 0:
        raise ManifestError(f"the manifest has no rows of split {' or '.join(names)}")
    return rows


def training_rows(
    split: NDArray[np.object_], p_balanced: NDArray[np.float64], *, keep_posterior: float | None = None
) -> RowIndex:
    """Return the rows of the training split, only those with P(balanced) >= `keep_posterior` if it is set."""
    train = np.flatnonzero(split == "train")
    if keep_posterior is None:
        return train
    if np.isnan(p_balanced[train]).any():
        raise ManifestError("--keep-posterior: the manifest has no p_balanced; rescore with mmaudit score, split again")
    return train[p_balanced[train] >= keep_posterior]


def epoch_order(
    *,
    rank: NDArray[np.integer],
    key: Keys,
    config: OrderConfig,
    seed: int,
    epoch: int,
    balance: NDArray[np.floating[Any]] | None = None,
) -> RowIndex:
    """Compute the rows of a manifest used in epoch 1, 2, ..., in order: shape (n',), 1 <= n' <= n.

    Shuffles use integers only and are identical on every machine; weighted draws are as reproducible as `log`.

    Args:
        rank: (n,) number of samples that are more balanced, 0 = most balanced; equal scores share a rank.
        key: (n,) hash of the ids, see `id_key`. It breaks ties, and makes the order depend on ids only, not on the
            order of the rows in the manifest.
        config: which order.
        seed: seed of the shuffles and draws.
        epoch: number of the epoch, from 1.
        balance: (n,) in [-1, 1], high = balanced; used by the weighted order only.

    Raises:
        ConfigError: the epoch is below 1.
        ManifestError: the columns differ in shape, are empty, or lack what the order needs.
    """
    _check_epoch(epoch)
    for name, column in (("key", key), ("balance", balance)):
        if column is not None and column.shape != (len(rank),):
            raise ManifestError(
                f"{name} has shape {column.shape}, expected ({len(rank)},) as rank: use columns of one manifest"
            )
    if len(rank) == 0:
        raise ManifestError("no samples to order: the manifest is empty, or has no rows of the split")
    return ORDERS[config.order](_Epoch(rank=rank, balance=balance, key=key, config=config, seed=seed, number=epoch))


def draw_rows(weight: NDArray[np.float64], *, key: Keys, draw: str, seed: int, epoch: int) -> RowIndex:
    """Draw n of n rows for epoch 1, 2, ... with probabilities proportional to weights (n,).

    draw: "order", without replacement: every row once, heavy ones tend to come early; "replacement": heavy rows tend
    to come often, and light ones possibly not at all. key (n,): see `order_of`, whose weighted order uses these draws;
    the draws depend on ids, not on the order of the rows. Raises ConfigError for an epoch below 1 or an unknown draw,
    ManifestError for weights that are not above 0.
    """
    _check_epoch(epoch)
    if draw not in DRAWS:
        raise ConfigError(f"order.draw is {draw}; {choices(draw, DRAWS)}")
    if key.shape != weight.shape or len(weight) == 0:
        raise ManifestError(
            f"key has shape {key.shape}, weights {weight.shape}: they must be equal and not empty; use one manifest's"
        )
    invalid_rows = np.flatnonzero(~((weight > 0) & np.isfinite(weight)))
    if len(invalid_rows):
        raise ManifestError(
            f"{len(invalid_rows)} weights are not above 0 (row {invalid_rows[0]} has {weight[invalid_rows[0]]})"
        )
    return DRAWS[draw](weight, key, seed, epoch)


def id_keys(sample_id: Iterable[str] | pa.Array) -> Keys:
    """Hash sample ids to the keys (n,) of `order_of`; seed and epoch are mixed in there."""
    ids = sample_id if isinstance(sample_id, pa.Array) else pa.array(sample_id, pa.string())
    return hash_ids(ids, seed=0, purpose="order")


def num_steps(order: RowIndex, *, batch_size: int) -> int:
    """Compute the number of steps of an epoch; the last may have fewer samples."""
    return -(-len(order) // batch_size)


def batch_rows(order: RowIndex, *, step: int, batch_size: int) -> RowIndex:
    """Return the rows of step 0, 1, ... of an epoch. Raises ConfigError for a step that does not exist."""
    if batch_size < 1 or not 0 <= step < num_steps(order, batch_size=batch_size):
        raise ConfigError(
            f"step {step} of {len(order)} samples in batches of {batch_size}: batch_size must be at least 1, "
            f"and step between 0 and {num_steps(order, batch_size=max(1, batch_size)) - 1}"
        )
    return order[step * batch_size : (step + 1) * batch_size]


def _paced_order(epoch: _Epoch, rank: NDArray[np.integer]) -> RowIndex:
    """Shuffle the first floor(n share) rows by (rank, key)."""
    size = max(1, math.floor(len(rank) * epoch.config.share(epoch.number)))
    if size == len(rank):
        return epoch.shuffled(np.arange(size))
    cut_rank = np.partition(rank, size - 1)[size - 1]
    above_cut, at_cut = np.flatnonzero(rank < cut_rank), np.flatnonzero(rank == cut_rank)
    tied_key = epoch.key[at_cut]
    return epoch.shuffled(np.concatenate([above_cut, at_cut[_sort_rows(tied_key, tied_key)[: size - len(above_cut)]]]))


def _weighted_order(epoch: _Epoch) -> RowIndex:
    return DRAWS[epoch.config.draw](epoch.weight(), epoch.key, epoch.seed, epoch.number)


def _draw_without_replacement(weight: NDArray[np.float64], key: Keys, seed: int, epoch: int) -> RowIndex:
    """Draw without replacement by weight: sort by E / w with E exponential (Efraimidis and Spirakis 2006).

    torch.multinomial is limited to 2^24 rows.
    """
    waiting_times = -np.log(_to_uniform(_hash_for_epoch(key, seed=seed, epoch=epoch))) / weight
    return _sort_rows(waiting_times.view(np.uint64), key)  # the bit patterns of positive floats sort as the floats do


def _draw_with_replacement(weight: NDArray[np.float64], key: Keys, seed: int, epoch: int) -> RowIndex:
    """Draw n rows with replacement by weight: draw j looks up uniform number j of the epoch in the cumulative weights.

    The numbers are looked up in ascending order: unsorted, 2^24 rows took 25 s, all of it cache misses.
    """
    by_key = _sort_rows(key, key)
    cumulative = np.cumsum(weight[by_key])
    hashes = _hash_for_epoch(np.arange(len(by_key), dtype=np.uint64), seed=seed, epoch=epoch)
    by_hash = _sort_rows(hashes, hashes)
    rows = np.empty_like(by_key)
    rows[by_hash] = by_key[np.searchsorted(cumulative, _to_uniform(hashes[by_hash]) * cumulative[-1], side="right")]
    return rows


def _hash_for_epoch(key: Keys, *, seed: int, epoch: int) -> Keys:
    """Hash keys to 64 bits that depend on seed and epoch; a bijection, so that only equal keys stay equal."""
    epoch_hash = hash_rank([str(epoch)], seed=seed, purpose="order")[0]
    hashed = np.empty_like(key)
    for start in range(0, len(key), 2**15):  # blocks fit in the cache: a third of the time for 2^24 keys
        block = slice(start, start + 2**15)
        hashed[block] = splitmix64(splitmix64(key[block] ^ epoch_hash) ^ epoch_hash)
    return hashed


def _check_epoch(epoch: int) -> None:
    if epoch < 1:
        raise ConfigError(f"epoch {epoch}: it must be at least 1")


def _to_uniform(words: Keys) -> NDArray[np.float64]:
    """Return numbers in the open interval (0, 1) from the upper 52 bits: with 53, the largest would round to 1."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _sort_rows(words: NDArray[np.uint64], key: Keys) -> RowIndex:
    """Return the rows sorted by ascending (word, key).

    One word per row is sorted, its upper bits with the row index in the lower ones: two thirds of the time of an
    argsort. Rows tied in the upper bits are then sorted by the full (word, key).
    """
    row_bits = np.uint64(len(words).bit_length())
    packed = words >> row_bits << row_bits
    packed |= np.arange(len(words), dtype=np.uint64)
    packed.sort()
    upper = packed >> row_bits
    equal_to_next = upper[1:] == upper[:-1]
    rows = (packed ^ (upper << row_bits)).view(np.int64)
    tied_positions = np.flatnonzero(np.r_[equal_to_next, False] | np.r_[False, equal_to_next])
    tied_rows = np.sort(rows[tied_positions])
    rows[tied_positions] = tied_rows[np.lexsort((key[tied_rows], words[tied_rows]))]
    return rows


ORDERS: dict[str, Callable[[_Epoch], RowIndex]] = {
    "curriculum": lambda epoch: _paced_order(epoch, epoch.rank),
    "anti-curriculum": lambda epoch: _paced_order(epoch, ~epoch.rank),  # -1 - rank: no overflow, and the same ties
    "shuffled": lambda epoch: epoch.shuffled(np.arange(len(epoch.rank))),
    "weighted": _weighted_order,
}

DRAWS: dict[str, Callable[[NDArray[np.float64], Keys, int, int], RowIndex]] = {  # see draw_rows
    "order": _draw_without_replacement,
    "replacement": _draw_with_replacement,
}
