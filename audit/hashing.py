"""Seeded hashes of ids, digests of content, and signatures of files."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def hash_rank(keys: Iterable[str], *, seed: int, purpose: str) -> NDArray[np.uint64]:
    """Hash each key to 64 bits, uniformly. Hashes of different `purpose` are independent under the same seed."""
    prefix = hashlib.blake2b(f"{seed}\0{purpose}\0".encode(), digest_size=8)
    digests = bytearray()
    for key in keys:
        digest = prefix.copy()
        digest.update(key.encode())
        digests += digest.digest()
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def canonical_order(ids: NDArray[np.object_] | pa.Array) -> NDArray[np.intp]:
    """Return the order (n,) of unique ids by their hashes, which does not depend on the order of the rows.

    Sorted by hash, not by id, so that every k-th row is a fair sample where ids follow a pattern.
    """
    hashes = hash_rank(iterate_strings(ids) if isinstance(ids, pa.Array) else ids, seed=0, purpose="row order")
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():  # two 64-bit hashes collide in one of 370,000 sets of 10^7 ids
        order = np.array(sorted(range(len(ids)), key=lambda row: (hashes[row], str(ids[row]))), dtype=np.intp)
    return order


def iterate_strings(strings: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """Yield the strings of an Arrow column, of which few are Python objects at a time."""
    for start in range(0, len(strings), _STRINGS):
        yield from strings.slice(start, _STRINGS).to_pylist()


def hash_ids(ids: pa.Array, *, seed: int, purpose: str) -> NDArray[np.uint64]:
    """Hash strings (n,) to 64 bits, uniformly, eight bytes of all strings at a time: 10^7 ids take a second.

    For more samples than the cryptographic `hash_rank` can process quickly. Raises ValueError for nulls.
    """
    if ids.null_count:
        raise ValueError(f"{ids.null_count} ids are null")
    if len(ids) > _HASHED_STRINGS:  # a hash takes 60 bytes of memory while it is computed
        parts = [ids.slice(start, _HASHED_STRINGS) for start in range(0, len(ids), _HASHED_STRINGS)]
        return np.concatenate([hash_ids(part, seed=seed, purpose=purpose) for part in parts])
    strings = ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64, len(strings) + 1, 8 * strings.offset)
    padded = np.zeros(ends[-1] - ends[0] + 8, dtype=np.uint8)  # eight more: a word can be read at every byte
    if data is not None:
        padded[:-8] = np.frombuffer(data, np.uint8, len(padded) - 8, ends[0])
    words = np.ndarray(len(padded) - 7, dtype="<u8", buffer=padded.data, strides=(1,))
    position, num_bytes_left = ends[:-1] - ends[0], np.diff(ends)
    hashes = splitmix64(num_bytes_left.astype(np.uint64) ^ hash_rank([purpose], seed=seed, purpose="ids")[0])
    rows = np.arange(len(hashes))
    while len(rows := rows[num_bytes_left > 0]):
        position, num_bytes_left = position[num_bytes_left > 0], num_bytes_left[num_bytes_left > 0]
        word = words[position] & (_ONES >> ((8 - np.minimum(num_bytes_left, 8)) * 8).astype(np.uint64))
        hashes[rows] = splitmix64(hashes[rows] ^ word)
        position, num_bytes_left = position + 8, num_bytes_left - 8
    return hashes


_ONES = np.uint64(2**64 - 1)
_STRINGS = 1 << 14  # Python objects at a time
_HASHED_STRINGS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class IdIndex:
    """An index of unique ids (n,), large strings: 16 bytes an id besides them.

    keys (n,): their hashes with `seed`, ascending and unique; order (n,): the id of each.

    Example:
        >>> index = IdIndex.of(pa.array(["a", "b", "c"], pa.large_string()))
        >>> index.find(pa.array(["x", "c"]))
        (array([2]), array([1]))
    """

    ids: pa.LargeStringArray
    keys: NDArray[np.uint64]
    order: NDArray[np.intp]
    seed: int

    @classmethod
    def of(cls, ids: pa.LargeStringArray) -> IdIndex:
        """Index unique ids (n,). Raises ValueError for repeated ones and nulls."""
        seed = 0
        while True:
            hashes = hash_ids(ids, seed=seed, purpose="id index")
            order = np.argsort(hashes)
            keys = hashes[order]
            is_repeated = np.r_[False, keys[1:] == keys[:-1]]
            if not is_repeated.any():
                return cls(ids=ids, keys=keys, order=order, seed=seed)
            same = ids.filter(pa.array(np.isin(hashes, keys[is_repeated]))).to_pylist()
            if len(set(same)) < len(same):
                raise ValueError(f"{len(same) - len(set(same))} ids are repeated")
            seed += 1  # two hashes are equal in one of 370,000 sets of 10^7 ids

    def find(self, names: pa.Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the positions in `ids` (f,) of the names that are among them, and their positions in `names` (f,)."""
        if not len(self.ids) or not len(names):
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        hashes = hash_ids(names, seed=self.seed, purpose="id index")
        place = np.minimum(np.searchsorted(self.keys, hashes), len(self.keys) - 1)
        found = np.flatnonzero(self.keys[place] == hashes)
        positions = self.order[place[found]]
        same = pc.equal(self.ids.take(pa.array(positions)), names.take(pa.array(found)).cast(pa.large_string()))
        is_same = same.to_numpy(zero_copy_only=False)
        return positions[is_same], found[is_same]


def splitmix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit words by a bijection in which each input bit flips half of the output bits.

    SplitMix64, Steele et al. 2014.
    """
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class LargeBytes(Protocol):
    """Bytes that are not in memory: their number, and the blocks that are hashed in their place."""

    def __len__(self) -> int: ...

    def digest_blocks(self) -> Iterator[bytes]:
        """Yield the bytes that are hashed."""


def digest(*parts: bytes | memoryview | LargeBytes) -> str:
    """Return a digest of bytes, 32 hexadecimal digits; the boundaries between the parts are part of it."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        for block in [part] if isinstance(part, (bytes, memoryview)) else part.digest_blocks():
            hasher.update(block)
    return hasher.hexdigest()


log = logging.getLogger("mmaudit")

SECRET_BYTES = 32


def state_folder() -> Path:
    """Return $XDG_STATE_HOME/mmaudit, or ~/.local/state/mmaudit where that is unset or, against its rules, relative."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "mmaudit"


def sign(content: Mapping[str, Any]) -> str | None:
    """Return the signature of plain values, 64 hexadecimal digits; without a secret log one warning and return None.

    The secret is created when it is first needed. A state folder that cannot be written is no error.
    """
    try:
        path = state_folder() / "secret"
        secret = _read_secret(path) if path.exists() else _make_secret(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        log.warning("not signed: the secret cannot be stored in the state folder (%s)", error)
        return None
    return None if secret is None else _hmac(secret, content)


def is_signed(content: Mapping[str, Any], signature: object) -> bool:
    """Return whether `signature` is the signature of these plain values by this user on this machine."""
    try:
        path = state_folder() / "secret"
        secret = _read_secret(path) if path.exists() else None
    except (OSError, RuntimeError):
        return False
    if secret is None or not isinstance(signature, str):
        return False
    return hmac.compare_digest(_hmac(secret, content).encode(), signature.encode("utf-8", "replace"))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits, at 1 to 2 GB per second."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _hmac(secret: bytes, content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _read_secret(path: Path) -> bytes | None:
    """Read the secret; log one warning and return None if it is damaged or readable by other users."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        secret = file.read(SECRET_BYTES + 1)
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        log.warning("%s is ignored: it must belong to you, with mode 0600; delete it and score again", path)
        return None
    if len(secret) != SECRET_BYTES:
        log.warning("%s is damaged: delete it and score again", path)
        return None
    return secret


def _make_secret(path: Path) -> bytes | None:
    """Write a new secret atomically and return it; two processes that do so at once return the same secret."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces a secret written meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return _read_secret(path)
