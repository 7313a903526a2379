"""Curriculum order: the samples of each epoch and step, and the pacing of their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.hashing import hash_ids, hash_rank, splitmix64


class Pacing(Protocol):
    """Share of the samples that epoch t = 1, 2, ... sees: in (0, 1], never falling, and exactly 1 from T on.

    `start` is the share lambda0 in (0, 1] of an epoch 0, which nobody sees; `grow_epochs` is T, at least 1.
    """

    def __call__(self, epoch: int, *, start: float, grow_epochs: int) -> float:
        """Give lambda(t)."""


def root_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """Share of the samples that epoch t = 1, 2, ... sees, in (0, 1], most balanced first.

    lambda(t) = min(1, sqrt(t (1 - lambda0^2) / T_grow + lambda0^2)): BSS-H, arXiv 2501.01470, with lambda0 = 0.1 and
    T_grow = 40 there.
    """
    if epoch >= grow_epochs:
        return 1.0  # the root may round to just below, and the floor would then leave a sample out
    return min(1.0, math.sqrt(epoch * (1 - start**2) / grow_epochs + start**2))


def linear_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0 + (1 - lambda0) t / T: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else _interpolate(epoch / grow_epochs, start)


def step_pacing(epoch: int, *, start: float, grow_epochs: int, steps: int = 5) -> float:
    """A staircase of equal rises, every T / steps epochs: lambda0 + (1 - lambda0) floor(steps t / T) / steps.

    The form with any number of rises, and five of them, are ours. One rise, at T, is the step of Wu et al. (arXiv
    2012.03107); Penha and Hauff (arXiv 1912.08555) see one third, two thirds and all, each for a third of T.
    """
    return 1.0 if epoch >= grow_epochs else _interpolate(steps * epoch // grow_epochs / steps, start)


def geometric_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0^(1 - t / T), the same factor every epoch: Penha and Hauff, arXiv 1912.08555."""
    return 1.0 if epoch >= grow_epochs else min(1.0, start ** (1 - epoch / grow_epochs))


def exponential_pacing(epoch: int, *, start: float, grow_epochs: int) -> float:
    """lambda(t) = lambda0 + (1 - lambda0) (e^(10 t / T) - 1) / (e^10 - 1): Wu, Dyer and Neyshabur, arXiv 2012.03107.

    The latest of all: at T / 2 it has risen by 0.7% of the way.
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


# Weights of the draws, up to a factor, from balance scores (n,) in [-1, 1], high = balanced. The linear one is that of
# BSS-L's code, where 1.01 leaves the least balanced sample a weight of 0.01; softmax is its paper's, arXiv 2501.01470.
WEIGHTS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "linear": lambda balance: 1.01 + balance,
    "softmax": np.exp,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Which order the samples come in. The constants are those of BSS-H and of BSS-L's code (arXiv 2501.01470).

    curriculum: a shuffled pass over the most balanced share, which grows by `pacing`; anti-curriculum: over the least
    balanced one. shuffled: over everything. weighted: balanced ones rather early (draw = "order", nobody is skipped),
    or rather often (draw = "replacement", as many draws as samples).
    """

    order: str = "curriculum"
    pacing: str = "root"
    start: float = 0.1  # share of the samples at epoch 0
    grow_epochs: int = 40  # epoch from which every sample is seen
    steps: int = 5  # rises of the step pacing
    draw: str = "order"
    weight: str = "linear"

    def __post_init__(self) -> None:
        for name, known in (("order", ORDERS), ("pacing", PACINGS), ("draw", DRAWS), ("weight", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"order.{name} is {getattr(self, name)}: {choices(getattr(self, name), known)}")
        if not 0 < self.start <= 1:
            raise ConfigError(f"order.start is {self.start}; a share lies in (0, 1]")
        for name in ("grow_epochs", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"order.{name} is {getattr(self, name)}; it must be at least 1")

    def share(self, epoch: int) -> float:
        """Share of the samples that epoch t = 1, 2, ... of a curriculum sees, in (0, 1]."""
        if self.pacing == "step":  # the one with a constant of its own
            return step_pacing(epoch, start=self.start, grow_epochs=self.grow_epochs, steps=self.steps)
        return PACINGS[self.pacing](epoch, start=self.start, grow_epochs=self.grow_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """What an order is made from: the columns (n,) of `order_of`, and the epoch."""

    rank: NDArray[np.integer]
    balance: NDArray[np.floating[Any]] | None
    key: Keys
    config: OrderConfig
    seed: int
    number: int

    def shuffled(self, rows: RowIndex) -> RowIndex:
        """Give rows in an order of this epoch's own."""
        key = self.key[rows]
        return rows[_sort_rows(_hash_for_epoch(key, seed=self.seed, epoch=self.number), key)]

    def weight(self) -> NDArray[np.float64]:
        """Weights (n,) of the draws, above 0. Raises ManifestError where a score is missing or out of range."""
        if self.balance is None:
            raise ManifestError("a weighted order draws by balance scores; there are none: rescore with mmaudit score")
        balance = np.asarray(self.balance, dtype=np.float64)
        wrong = np.flatnonzero(~np.isfinite(balance) | (np.abs(balance) > 1 + 1e-6))  # float32 may round beyond 1
        if len(wrong):
            raise ManifestError(
                f"{len(wrong)} of {len(balance)} balance scores are no number in [-1, 1] (row {wrong[0]} has "
                f"{balance[wrong[0]]}), and a weighted order draws by them: leave those samples out, or rescore"
            )
        return WEIGHTS[self.config.weight](balance)


def order_of(
    *,
    rank: NDArray[np.integer],
    key: Keys,
    config: OrderConfig,
    seed: int,
    epoch: int,
    balance: NDArray[np.floating[Any]] | None = None,
) -> RowIndex:
    """Give the rows of a manifest that epoch 1, 2, ... sees, in order: shape (n',), n' <= n, at least one.

    rank (n,): number of samples that are more balanced, 0 = most balanced; equal scores share a rank. key (n,): hash of
    the ids, see `id_key`; it breaks ties, and makes the order one of ids: rows that stand otherwise in the manifest
    come in the same order. balance (n,) in [-1, 1], high = balanced: for the weighted order alone.
    Shuffles are made of whole numbers, and are alike on every machine; weighted draws are as alike as its logarithms.
    Raises ConfigError for an epoch before 1, ManifestError for columns that do not fit or lack what the order needs.
    """
    _check_epoch(epoch)
    for name, column in (("key", key), ("balance", balance)):
        if column is not None and column.shape != (len(rank),):
            raise ManifestError(
                f"{name} has shape {column.shape} beside {len(rank)} ranks: take one manifest's columns"
            )
    if len(rank) == 0:
        raise ManifestError("there are no samples to order: the manifest is empty, or none of its rows is of the split")
    return ORDERS[config.order](_Epoch(rank=rank, balance=balance, key=key, config=config, seed=seed, number=epoch))


def draw_rows(weight: NDArray[np.float64], *, key: Keys, draw: str, seed: int, epoch: int) -> RowIndex:
    """Draw n of n rows for epoch 1, 2, ..., chances by weights (n,), which count up to a factor.

    draw: "order", without replacement, so that all come and heavy ones rather early; "replacement", so that heavy ones
    come rather often, and light ones perhaps not at all. key (n,): see `order_of`, of whose weighted order these are
    the draws; what is drawn depends on ids, not on how rows stand. Raises ConfigError for an epoch before 1 or an
    unknown draw, ManifestError for weights that are not above 0.
    """
    _check_epoch(epoch)
    if draw not in DRAWS:
        raise ConfigError(f"order.draw is {draw}: {choices(draw, DRAWS)}")
    if key.shape != weight.shape or len(weight) == 0:
        raise ManifestError(f"key has shape {key.shape} beside weights of shape {weight.shape}: take one manifest's")
    wrong = np.flatnonzero(~((weight > 0) & np.isfinite(weight)))
    if len(wrong):
        raise ManifestError(f"{len(wrong)} weights are no number above 0 (row {wrong[0]} has {weight[wrong[0]]})")
    return DRAWS[draw](weight, key, seed, epoch)


def id_key(sample_id: Iterable[str]) -> Keys:
    """Hash sample ids to the keys (n,) of `order_of`. One key for all seeds and epochs: those are mixed in there."""
    return hash_ids(pa.array(sample_id, pa.string()), seed=0, purpose="order")


def num_steps(order: RowIndex, *, batch_size: int) -> int:
    """Count the steps of an epoch; the last may be smaller than the others."""
    return -(-len(order) // batch_size)


def batch_of(order: RowIndex, *, step: int, batch_size: int, num_ranks: int = 1, rank: int = 0) -> RowIndex:
    """Give the rows of step 0, 1, ... of an epoch, or what a process of `rank` in [0, num_ranks) has of them.

    `batch_size` counts the samples of a step over all processes. Their shares one after another are the step, whatever
    their number; they differ by one sample at most, and are empty where a last step has fewer samples than processes.
    Raises ConfigError for a step or rank that does not exist.
    """
    if batch_size < 1 or not 0 <= step < num_steps(order, batch_size=batch_size):
        raise ConfigError(
            f"step {step} of {len(order)} samples in batches of {batch_size}: batches have a sample at least, "
            f"and steps are counted from 0 to {num_steps(order, batch_size=max(1, batch_size)) - 1}"
        )
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"rank {rank} of {num_ranks} processes: ranks are counted from 0 to {num_ranks - 1}")
    whole = order[step * batch_size : (step + 1) * batch_size]
    return whole[rank * len(whole) // num_ranks : (rank + 1) * len(whole) // num_ranks]


def _paced_order(now: _Epoch, rank: NDArray[np.integer]) -> RowIndex:
    """Shuffle the first floor(n share) rows by (rank, key)."""
    size = max(1, math.floor(len(rank) * now.config.share(now.number)))
    if size == len(rank):
        return now.shuffled(np.arange(size))
    last = np.partition(rank, size - 1)[size - 1]
    surely, tied = np.flatnonzero(rank < last), np.flatnonzero(rank == last)
    key = now.key[tied]
    return now.shuffled(np.concatenate([surely, tied[_sort_rows(key, key)[: size - len(surely)]]]))


def _weighted_order(now: _Epoch) -> RowIndex:
    return DRAWS[now.config.draw](now.weight(), now.key, now.seed, now.number)


def _draw_without_replacement(weight: NDArray[np.float64], key: Keys, seed: int, epoch: int) -> RowIndex:
    """Draw without replacement, chances by weight: ascending E / w, E exponential (Efraimidis and Spirakis 2006).

    torch.multinomial would stop at 2^24 rows.
    """
    waits = -np.log(_to_uniform(_hash_for_epoch(key, seed=seed, epoch=epoch))) / weight
    return _sort_rows(waits.view(np.uint64), key)  # the bits of floats above 0 are in their order


def _draw_with_replacement(weight: NDArray[np.float64], key: Keys, seed: int, epoch: int) -> RowIndex:
    """Draw n rows with replacement, chances by weight: draw j turns chance j of the epoch over the sums up to a row.

    The chances are looked up in ascending order: one by one they took 25 s for 2^24 rows, all of it cache misses.
    """
    by_key = _sort_rows(key, key)
    sums = np.cumsum(weight[by_key])
    chances = _hash_for_epoch(np.arange(len(by_key), dtype=np.uint64), seed=seed, epoch=epoch)
    ascending = _sort_rows(chances, chances)
    rows = np.empty_like(by_key)
    rows[ascending] = by_key[np.searchsorted(sums, _to_uniform(chances[ascending]) * sums[-1], side="right")]
    return rows


def _hash_for_epoch(key: Keys, *, seed: int, epoch: int) -> Keys:
    """Hash to another 64 bits for every seed and epoch: one to one, so that only equal keys stay equal."""
    word = hash_rank([str(epoch)], seed=seed, purpose="order")[0]
    hashed = np.empty_like(key)
    for start in range(0, len(key), 2**15):  # within the cache: 2^24 keys in a third of the time
        part = slice(start, start + 2**15)
        hashed[part] = splitmix64(splitmix64(key[part] ^ word) ^ word)
    return hashed


def _check_epoch(epoch: int) -> None:
    if epoch < 1:
        raise ConfigError(f"epoch {epoch}: epochs are counted from 1")


def _to_uniform(words: Keys) -> NDArray[np.float64]:
    """Numbers in (0, 1), neither end included, from the upper 52 bits: with 53, the largest would round to 1."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _sort_rows(words: NDArray[np.uint64], key: Keys) -> RowIndex:
    """Give rows by ascending (word, key).

    What is sorted is one word a row, its upper bits and the row below them: two thirds of the time of an argsort. The
    rows that the upper bits leave tied are then sorted by all.
    """
    row_bits = np.uint64(len(words).bit_length())
    packed = words >> row_bits << row_bits
    packed |= np.arange(len(words), dtype=np.uint64)
    packed.sort()
    upper = packed >> row_bits
    same = upper[1:] == upper[:-1]
    rows = (packed ^ (upper << row_bits)).view(np.int64)
    at = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
    tied = np.sort(rows[at])
    rows[at] = tied[np.lexsort((key[tied], words[tied]))]
    return rows


ORDERS: dict[str, Callable[[_Epoch], RowIndex]] = {
    "curriculum": lambda now: _paced_order(now, now.rank),
    "anti-curriculum": lambda now: _paced_order(now, ~now.rank),  # -1 - rank: no overflow, and the same ties
    "shuffled": lambda now: now.shuffled(np.arange(len(now.rank))),
    "weighted": _weighted_order,
}

DRAWS: dict[str, Callable[[NDArray[np.float64], Keys, int, int], RowIndex]] = {  # see draw_rows
    "order": _draw_without_replacement,
    "replacement": _draw_with_replacement,
}
