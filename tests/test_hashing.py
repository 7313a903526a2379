"""Laws of seeded chance: the same key draws the same number anywhere, and different uses draw apart."""

from __future__ import annotations

import hashlib
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.hashing import digest, hash_ids, hash_rank, splitmix64


@given(st.lists(st.text(), max_size=20), st.integers(-5, 5), st.randoms())
def test_hash_of_key_is_independent_of_other_keys(keys: list[str], seed: int, random: Random) -> None:
    drawn = dict(zip(keys, hash_rank(keys, seed=seed, purpose="p").tolist(), strict=True))
    shuffled = random.sample(keys, len(keys))
    assert hash_rank(shuffled, seed=seed, purpose="p").tolist() == [drawn[key] for key in shuffled]


def test_hash_rank_equals_blake2b() -> None:
    """Pinned: other numbers would be other folds and splits under the same seed."""
    expected = int.from_bytes(hashlib.blake2b(b"7\0fold\0a", digest_size=8).digest(), "little")
    assert hash_rank(["a"], seed=7, purpose="fold").tolist() == [expected]


def test_hashes_are_uniform_and_independent_across_seeds_and_purposes() -> None:
    keys = [str(number) for number in range(4_000)]
    draws = [hash_rank(keys, seed=seed, purpose=purpose) / 2.0**64 for seed, purpose in ((0, "a"), (1, "a"), (0, "b"))]
    for draw in draws:
        counts = np.histogram(draw, bins=10, range=(0, 1))[0]
        assert (np.abs(counts - 400) < 5 * np.sqrt(400 * 0.9)).all()
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(3)).max() < 5 / np.sqrt(4_000)


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_digest_depends_on_boundaries_between_parts(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)
    assert len(digest(*one)) == 32
    assert digest(b"ab", b"c") != digest(b"a", b"bc")


def hashed(ids: list[str], *, seed: int = 0, purpose: str = "p") -> NDArray[np.uint64]:
    return hash_ids(pa.array(ids, pa.string()), seed=seed, purpose=purpose)


def slow_hash(text: str, *, seed: int, purpose: str) -> int:
    """Hash one string as the module says: its length and the seed first, then eight bytes at a time."""
    raw = text.encode()
    found = mix(len(raw) ^ int(hash_rank([purpose], seed=seed, purpose="ids")[0]))
    for first in range(0, len(raw), 8):
        found = mix(found ^ int.from_bytes(raw[first : first + 8], "little"))
    return found


def mix(word: int) -> int:
    """SplitMix64 in whole numbers, as its authors give it."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_splitmix64_equals_reference_implementation() -> None:
    """The first numbers that SplitMix64 draws from the state 1234567, from its reference implementation."""
    states = np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(states).tolist() == expected == [mix(one) for one in states.tolist()]


@given(st.lists(st.text(max_size=40), max_size=12), st.integers(-5, 5), st.sampled_from(["split", "x"]))
def test_hash_ids_equals_slow_reference(ids: list[str], seed: int, purpose: str) -> None:
    expected = [slow_hash(one, seed=seed, purpose=purpose) for one in ids]
    assert hashed(ids, seed=seed, purpose=purpose).tolist() == expected


@given(st.lists(st.text(max_size=12), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_hash_ids_is_independent_of_array_type_and_slicing(ids: list[str], first: int, length: int) -> None:
    whole, told = pa.array(ids, pa.string()), hashed(ids).tolist()
    for each in (whole, whole.cast(pa.large_string()), whole.cast(pa.large_binary()), whole.dictionary_encode()):
        plain = each.cast(pa.string()) if pa.types.is_dictionary(each.type) else each
        assert hash_ids(plain, seed=0, purpose="p").tolist() == told
        assert hash_ids(plain.slice(first, length), seed=0, purpose="p").tolist() == told[first : first + length]
    pieces = pa.chunked_array([whole.slice(0, first), whole.slice(first)])
    assert hash_ids(pieces.combine_chunks(), seed=0, purpose="p").tolist() == told


def test_empty_long_and_unusual_ids_have_distinct_hashes() -> None:
    ids = ["", "\0", "\0\0", "a", "a\0", "\0a", "ä", "漢字", "🎻" * 3, "x" * 8, "x" * 9, "x" * 16, "x" * 100_000]
    ids += ["x" * 7 + "\0", "x" * 7, "x" * 99_999 + "y"]
    assert len(set(hashed(ids).tolist())) == len(ids)
    assert hashed([]).tolist() == []
    with pytest.raises(ValueError, match="1 ids are null"):
        hash_ids(pa.array(["a", None]), seed=0, purpose="p")


def test_hashes_of_a_million_similar_ids_are_uniform_and_unique() -> None:
    n = 1_000_000
    ids = pa.array([f"clip_{one:09d}" for one in range(n)])
    keys = hash_ids(ids, seed=0, purpose="split")
    assert len(np.unique(keys)) == n
    for shift in (52, 26, 0):  # the first, middle and last bits
        counts = np.bincount(((keys >> np.uint64(shift)) & np.uint64(0xFFF)).astype(np.int64), minlength=4_096)
        chi = ((counts - n / 4_096) ** 2).sum() / (n / 4_096)
        assert abs(chi - 4_095) < 5 * np.sqrt(2 * 4_095)
    for seed, purpose in ((1, "split"), (0, "unique")):
        other = hash_ids(ids, seed=seed, purpose=purpose)
        assert abs(np.corrcoef(keys / 2.0**64, other / 2.0**64)[0, 1]) < 5 / np.sqrt(n)
    place = np.arange(n) / n
    assert abs(np.corrcoef(keys / 2.0**64, place)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("place", [0, 6, 8, 12])
def test_one_input_bit_flips_half_of_the_output_bits(place: int) -> None:
    ids = [f"{one:013d}" for one in range(2_000)]
    changed = [one[:place] + chr(ord(one[place]) ^ 1) + one[place + 1 :] for one in ids]
    flips = np.unpackbits((hashed(ids) ^ hashed(changed)).view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert flips.shape == (64,)
    assert np.abs(flips - 0.5).max() < 6 * 0.5 / np.sqrt(2_000)
