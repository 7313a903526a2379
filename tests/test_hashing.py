"""Tests of seeded hashes: equal keys have equal hashes anywhere, and different purposes are independent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.hashing import (
    SECRET_BYTES,
    digest,
    file_digest,
    hash_ids,
    hash_rank,
    is_signed,
    sign,
    splitmix64,
    state_folder,
)


@given(st.lists(st.text(), max_size=20), st.integers(-5, 5), st.randoms())
def test_hash_of_key_is_independent_of_other_keys(keys: list[str], seed: int, random: Random) -> None:
    hash_of_key = dict(zip(keys, hash_rank(keys, seed=seed, purpose="p").tolist(), strict=True))
    shuffled = random.sample(keys, len(keys))
    assert hash_rank(shuffled, seed=seed, purpose="p").tolist() == [hash_of_key[key] for key in shuffled]


def test_hash_rank_equals_blake2b() -> None:
    """The values are fixed: others would change the folds and splits of a seed."""
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
def test_digest_depends_on_boundaries_between_parts(first: list[bytes], second: list[bytes]) -> None:
    assert (digest(*first) == digest(*second)) == (first == second)
    assert len(digest(*first)) == 32
    assert digest(b"ab", b"c") != digest(b"a", b"bc")


def hashed(ids: list[str], *, seed: int = 0, purpose: str = "p") -> NDArray[np.uint64]:
    return hash_ids(pa.array(ids, pa.string()), seed=seed, purpose=purpose)


def slow_hash(text: str, *, seed: int, purpose: str) -> int:
    """Hash one string as documented: its length and the seed first, then eight bytes at a time."""
    raw = text.encode()
    mixed = mix(len(raw) ^ int(hash_rank([purpose], seed=seed, purpose="ids")[0]))
    for first in range(0, len(raw), 8):
        mixed = mix(mixed ^ int.from_bytes(raw[first : first + 8], "little"))
    return mixed


def mix(word: int) -> int:
    """Compute SplitMix64 with Python integers, as published."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_splitmix64_equals_reference_implementation() -> None:
    """First values of the reference implementation of SplitMix64 with the state 1234567."""
    states = np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(states).tolist() == expected == [mix(state) for state in states.tolist()]


@given(st.lists(st.text(max_size=40), max_size=12), st.integers(-5, 5), st.sampled_from(["split", "x"]))
def test_hash_ids_equals_slow_reference(ids: list[str], seed: int, purpose: str) -> None:
    expected = [slow_hash(text, seed=seed, purpose=purpose) for text in ids]
    assert hashed(ids, seed=seed, purpose=purpose).tolist() == expected


@given(st.lists(st.text(max_size=12), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_hash_ids_is_independent_of_array_type_and_slicing(ids: list[str], first: int, length: int) -> None:
    array, expected = pa.array(ids, pa.string()), hashed(ids).tolist()
    for converted in (array, array.cast(pa.large_string()), array.cast(pa.large_binary()), array.dictionary_encode()):
        plain = converted.cast(pa.string()) if pa.types.is_dictionary(converted.type) else converted
        assert hash_ids(plain, seed=0, purpose="p").tolist() == expected
        assert hash_ids(plain.slice(first, length), seed=0, purpose="p").tolist() == expected[first : first + length]
    pieces = pa.chunked_array([array.slice(0, first), array.slice(first)])
    assert hash_ids(pieces.combine_chunks(), seed=0, purpose="p").tolist() == expected


def test_empty_long_and_unusual_ids_have_distinct_hashes() -> None:
    ids = ["", "\0", "\0\0", "a", "a\0", "\0a", "ä", "漢字", "🎻" * 3, "x" * 8, "x" * 9, "x" * 16, "x" * 100_000]
    ids += ["x" * 7 + "\0", "x" * 7, "x" * 99_999 + "y"]
    assert len(set(hashed(ids).tolist())) == len(ids)
    assert hashed([]).tolist() == []
    with pytest.raises(ValueError, match="1 ids are null"):
        hash_ids(pa.array(["a", None]), seed=0, purpose="p")


def test_hashes_of_a_million_similar_ids_are_uniform_and_unique() -> None:
    n = 1_000_000
    ids = pa.array([f"clip_{number:09d}" for number in range(n)])
    keys = hash_ids(ids, seed=0, purpose="split")
    assert len(np.unique(keys)) == n
    for shift in (52, 26, 0):  # the first, middle and last bits
        counts = np.bincount(((keys >> np.uint64(shift)) & np.uint64(0xFFF)).astype(np.int64), minlength=4_096)
        chi_squared = ((counts - n / 4_096) ** 2).sum() / (n / 4_096)
        assert abs(chi_squared - 4_095) < 5 * np.sqrt(2 * 4_095)
    for seed, purpose in ((1, "split"), (0, "unique")):
        other_keys = hash_ids(ids, seed=seed, purpose=purpose)
        assert abs(np.corrcoef(keys / 2.0**64, other_keys / 2.0**64)[0, 1]) < 5 / np.sqrt(n)
    position = np.arange(n) / n
    assert abs(np.corrcoef(keys / 2.0**64, position)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("position", [0, 6, 8, 12])
def test_one_input_bit_flips_half_of_the_output_bits(position: int) -> None:
    ids = [f"{text:013d}" for text in range(2_000)]
    changed = [text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :] for text in ids]
    flips = np.unpackbits((hashed(ids) ^ hashed(changed)).view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert flips.shape == (64,)
    assert np.abs(flips - 0.5).max() < 6 * 0.5 / np.sqrt(2_000)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
CONTENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
relaxed = settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the state folder of a new user, which does not exist yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mmaudit"


@relaxed
@given(CONTENTS, CONTENTS)
def test_signature_is_valid_for_one_content_only(content: dict[str, object], other_content: dict[str, object]) -> None:
    signature = sign(content)
    assert signature is not None
    assert is_signed(dict(reversed(content.items())), signature)
    is_same = json.dumps(other_content, sort_keys=True) == json.dumps(content, sort_keys=True)
    assert is_signed(other_content, signature) == is_same


@pytest.mark.parametrize("signature", [None, "", 3, "0" * 64, "é", "\ud800", ["a"]])
def test_other_values_are_not_signatures(signature: object) -> None:
    assert sign({}) is not None
    assert not is_signed({}, signature)


def test_secret_is_private_and_created_once(state: Path) -> None:
    assert not is_signed({}, "0" * 64)
    assert not state.exists()  # checking a signature creates no secret
    first = sign({"a": 1})
    assert state == state_folder()
    assert [path.name for path in state.iterdir()] == ["secret"]
    assert (state / "secret").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    assert len((state / "secret").read_bytes()) == SECRET_BYTES
    assert sign({"a": 1}) == first


def test_another_user_has_another_secret(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = sign({})
    assert is_signed({}, signature)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert sign({}) != signature
    assert not is_signed({}, signature)


def test_relative_state_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "state", "./state"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_folder() == tmp_path / ".local" / "state" / "mmaudit"


@pytest.mark.parametrize("fault", ["parent is a file", "folder is a file", "no home"])
def test_without_a_state_folder_nothing_is_signed(
    state: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "no home":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        blocked_path = state.parent if fault == "parent is a file" else state
        blocked_path.parent.mkdir(exist_ok=True)
        blocked_path.write_text("")
    with caplog.at_level(logging.WARNING):
        assert sign({}) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("not signed: the secret cannot be stored in the state folder (")
    assert not is_signed({}, "0" * 64)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(bytes(5), 0o600, "is damaged"), (bytes(33), 0o600, "is damaged"), (bytes(32), 0o644, "mode 0600")],
)
def test_damaged_or_readable_secret_is_ignored(
    state: Path, content: bytes, mode: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    signature = sign({})
    (state / "secret").write_bytes(content)
    (state / "secret").chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert sign({}) is None
        assert not is_signed({}, signature)
    assert words in caplog.messages[0]
    assert (state / "secret").read_bytes() == content


def test_simultaneous_processes_share_one_secret(state: Path) -> None:
    program = "import sys; sys.stdin.read(); from mmaudit.audit.hashing import sign; print(sign({'a': 1}))"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    for process in started:
        process.stdin = None  # closed
    printed = {process.communicate(timeout=60)[0] for process in started}
    assert printed == {f"{sign({'a': 1})}\n"}
    assert os.listdir(state) == ["secret"]


def test_file_digest_equals_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
