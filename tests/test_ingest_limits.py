"""Tests of hostile pickles and npz files: one line of error, within seconds and with memory limited by file size."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from mmaudit.audit.downloads import unpickle
from mmaudit.audit.downloads.ingest import ingest
from mmaudit.audit.downloads.unpickle import read_pickle
from mmaudit.audit.errors import DatasetError

LATIN1 = b"c_codecs\nencode\n"


def exponential(depth: int, *, kind: str = "list") -> bytes:
    """Return a pickle of containers that each hold the previous one twice: 2 ** depth items in a few hundred bytes."""
    content: Any = "ha"
    for _ in range(depth):
        content = [content, content] if kind == "list" else (content, content)
        if kind == "array":
            array = np.empty(2, dtype=object)
            array[0] = array[1] = content[0]
            content = array
        if kind == "dict":
            content = {"a": content[0], "b": content[0]}
    return pickle.dumps({"train": content})


def self_containing() -> bytes:
    content: list[Any] = []
    content.append(content)
    return pickle.dumps(content)


def deeply_nested(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


def repeated_copies(times: int) -> bytes:
    """Return a pickle that encodes one text of a megabyte many times."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"q\0"
    call = LATIN1 + b"h\0" + b"X\6\0\0\0latin1" + b"\x86R"
    return b"\x80\x04(" + text + call * times + b"l."


def colliding_keys(count: int) -> bytes:
    """Return a pickled dictionary whose keys, multiples of 2^61 - 1, all have the hash 0."""
    keys = [(number * (2**61 - 1)).to_bytes(10, "little") for number in range(count)]
    return b"\x80\x04}(" + b"".join(b"\x8a\x0a" + key + b"N" for key in keys) + b"u."


def nested_key() -> bytes:
    key: Any = ()
    for _ in range(40):
        key = (key, key)
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.dump(key)
    key_pickle = stream.getvalue()[:-1]
    return b"\x80\x04}" + key_pickle[2 + 9 :] + b"Ns."


BOMBS: dict[str, Callable[[], bytes]] = {
    "exponential lists": lambda: exponential(30),
    "exponential tuples": lambda: exponential(40, kind="tuple"),
    "exponential dictionaries": lambda: exponential(30, kind="dict"),
    "exponential object arrays": lambda: exponential(30, kind="array"),
    "list that contains itself": self_containing,
    "10,000 lists deep": lambda: deeply_nested(10_000),
    "copies": lambda: repeated_copies(3_000),
    "keys with equal hashes": lambda: colliding_keys(20_000),
    "a key of tuples": nested_key,
    "a number of 2 GB": lambda: b"\x80\x04\x8b\xff\xff\xff\x7f\1.",
    "missing frame": lambda: b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\0]." ,
    "an unhashable key": lambda: b"\x80\x04}]Ns.",
    "array of missing objects": lambda: pickle.dumps(np.array([None, "x"], dtype=object))[:-12] + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_hostile_pickle_fails_within_time_and_memory_limits(tmp_path: Path, kind: str) -> None:
    (tmp_path / "unaligned_50.pkl").write_bytes(BOMBS[kind]())
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(DatasetError) as caught:
            ingest("mosei", tmp_path, out=tmp_path / "o.parquet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert time.monotonic() - start < 20
    assert peak < 200e6
    assert not (tmp_path / "o.parquet").exists()


def test_number_of_opcodes_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps([None] * 50, protocol=4))
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 40)
    with pytest.raises(DatasetError, match="more than 40 steps"):
        read_pickle(path)
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 60)
    assert read_pickle(path) == [None] * 50


def test_shared_objects_stay_shared_and_repeated_values_are_read(tmp_path: Path) -> None:
    array, words = np.arange(1_000.0), ["neutral"] * 5_000
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps({"a": [array, array], "words": words}))
    read = read_pickle(path)
    assert read["a"][0] is read["a"][1]
    assert read["words"] == words


FIELDS = {
    "text": np.ones((2, 3)),
    "audio": np.ones((2, 3)),
    "vision": np.ones((2, 3)),
    "regression_labels": [1.0, -1.0],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 1}, "id is of type int, expected an array or list"),
        ({"id": [1, 10**5_000]}, "an id cannot be written as text"),
        ({"id": ["a", "\ud800"]}, "an id cannot be written as text"),
        ({"id": ["a", {}]}, "an id is of type dict"),
        ({"id": ["a", ["b", ["c"]]]}, "an id is of type list"),
        ({"id": np.array("a")}, "id is of type ndarray"),
        ({"text": [10**400, 1]}, "text is not an array of numbers"),
        ({"text": ["x" * 10_000, "y"]}, "text is not an array of numbers"),
        ({"text": [[1.0], [1.0, 2.0]]}, "text is not an array of numbers"),
        ({"text": {"a": 1, "b": 2}}, "text is of type dict"),
        ({"regression_labels": 3}, "regression_labels is of type int"),
        ({"id": [], "text": [], "audio": [], "vision": [], "regression_labels": []}, "it contains no utterance"),
    ],
)
def test_field_of_wrong_type_raises_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "one.pkl").write_bytes(pickle.dumps({"train": {"id": ["a", "b"], **FIELDS, **change}}))
    with pytest.raises(DatasetError, match=rf"one\.pkl, train.*{message}"):
        ingest("mosei", tmp_path, out=tmp_path / "o.parquet")


@pytest.mark.parametrize("content", [{}, {"train": {}}, {"train": 3}, [1], {"train": []}])
def test_pickle_without_utterances_raises_error(tmp_path: Path, content: Any) -> None:
    (tmp_path / "one.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match=r"one\.pkl (contains no utterance|is not a dictionary of splits)"):
        ingest("mosei", tmp_path, out=tmp_path / "o.parquet")


def write_npz(path: Path, header: bytes, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text.npy", header + content)


def header_of(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": descr})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("header", "content", "message"),
    [
        (header_of((10**13,)), b"", "states 40,000,000,000,000 bytes"),
        (header_of((1 << 25,)), bytes(1 << 27), "it expands to"),
        (header_of((2,), "|O"), b"", "states objects"),
        (header_of((2,), "<U100000000"), b"", "states 800,000,000 bytes"),
        (b"no array", b"", "cannot be read as .npz"),
        (header_of((4,))[:-20], b"", "cannot be read as .npz"),
    ],
    ids=["size", "expansion", "objects", "strings", "no array", "cut"],
)
def test_npz_with_false_header_raises_error(tmp_path: Path, header: bytes, content: bytes, message: str) -> None:
    write_npz(tmp_path / "train.npz", header, content)
    with pytest.raises(DatasetError, match=message) as caught:
        ingest("mosei", tmp_path, out=tmp_path / "o.parquet")
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_npz_raises_error(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "train.npz", text=np.random.default_rng(0).random(500))
    data = bytearray((tmp_path / "train.npz").read_bytes())
    for position in range(0, len(data), 61):
        damaged = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        (tmp_path / "train.npz").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"train\.npz"):
            ingest("mosei", tmp_path, out=tmp_path / "o.parquet")
