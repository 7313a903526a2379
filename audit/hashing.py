"""Chance that depends on nothing but a seed and an id: not on row order, workers or shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
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


def digest(*parts: bytes) -> str:
    """Fingerprint some bytes in 32 hexadecimal digits; the cut between the parts counts."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()
