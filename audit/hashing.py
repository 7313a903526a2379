"""Chance that depends on nothing but a seed and an id: not on row order, workers or shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def hash_rank(keys: Iterable[str], *, seed: int, purpose: str) -> NDArray[np.uint64]:
    """Hash each key to 64 bits, uniformly. `purpose` keeps two uses of one seed independent of each other."""
    start = hashlib.blake2b(f"{seed}\0{purpose}\0".encode(), digest_size=8)
    digests = bytearray()
    for key in keys:
        digest = start.copy()
        digest.update(key.encode())
        digests += digest.digest()
    return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64)


def canonical_order(ids: NDArray[np.object_]) -> NDArray[np.intp]:
    """Return the order (n,) of unique ids by a hash of each: the same order of samples however the rows are shuffled.

    By the hash, not by the ids, so that every k-th row is a fair sample where ids follow a pattern.
    """
    key = hash_rank(ids, seed=0, purpose="row order")
    order = np.argsort(key, kind="stable")
    if (np.diff(key[order]) == 0).any():  # two hashes of 64 bits are equal in one set of 10^7 ids out of 370,000
        order = np.array(sorted(range(len(ids)), key=lambda row: (key[row], ids[row])), dtype=np.intp)
    return order


def hash_ids(ids: pa.Array, *, seed: int, purpose: str) -> NDArray[np.uint64]:
    """Hash strings (n,) to 64 bits, uniformly, eight bytes of all of them at a time: 10^7 ids take a second.

    For choosing among more samples than `hash_rank`, which is cryptographic, has time for. Raises ValueError for nulls.
    """
    if ids.null_count:
        raise ValueError(f"{ids.null_count} ids are null")
    strings = ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64, len(strings) + 1, 8 * strings.offset)
    whole = np.zeros(ends[-1] - ends[0] + 8, dtype=np.uint8)  # eight more, so that words are read wherever they begin
    if data is not None:
        whole[:-8] = np.frombuffer(data, np.uint8, len(whole) - 8, ends[0])
    words = np.ndarray(len(whole) - 7, dtype="<u8", buffer=whole.data, strides=(1,))
    place, left = ends[:-1] - ends[0], np.diff(ends)
    found = splitmix64(left.astype(np.uint64) ^ hash_rank([purpose], seed=seed, purpose="ids")[0])
    rows = np.arange(len(found))
    while len(rows := rows[left > 0]):
        place, left = place[left > 0], left[left > 0]
        word = words[place] & (_ONES >> ((8 - np.minimum(left, 8)) * 8).astype(np.uint64))
        found[rows] = splitmix64(found[rows] ^ word)
        place, left = place + 8, left - 8
    return found


_ONES = np.uint64(2**64 - 1)


def splitmix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit words one to one, so that each bit in flips half of those out: SplitMix64, Steele et al. 2014."""
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class LargeBytes(Protocol):
    """Bytes that are not in memory: their number, and those that stand for their content, block by block."""

    def __len__(self) -> int: ...

    def digested(self) -> Iterator[bytes]:
        """Yield the bytes that are hashed."""


def digest(*parts: bytes | LargeBytes) -> str:
    """Fingerprint some bytes in 32 hexadecimal digits; the cut between the parts counts."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        for block in [part] if isinstance(part, bytes) else part.digested():
            whole.update(block)
    return whole.hexdigest()
