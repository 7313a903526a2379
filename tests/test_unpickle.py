"""Tests of reading pickles: arrays round-trip, and no code that a pickle refers to is run."""

from __future__ import annotations

import contextlib
import decimal
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmaudit.audit.downloads.unpickle import read_pickle
from mmaudit.audit.errors import DatasetError

TYPES = ["<f4", ">f8", "<i8", "|u1", "|b1", "<f2", "<U3", "|S4", ">i2"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def is_equal(actual: Any, expected: Any) -> bool:
    if isinstance(actual, np.ndarray):
        if actual.dtype == object:
            return bool(actual.shape == expected.shape and all(map(is_equal, actual.ravel(), expected.ravel())))
        is_same_type = (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        return bool(is_same_type and actual.tobytes() == expected.tobytes())
    if isinstance(actual, dict):
        return list(actual) == list(expected) and all(is_equal(actual[key], expected[key]) for key in actual)
    if isinstance(actual, (list, tuple)):
        return type(actual) is type(expected) and len(actual) == len(expected) and all(map(is_equal, actual, expected))
    return bool(actual == expected)


@given(
    array=st.sampled_from(TYPES).flatmap(
        lambda name: arrays.arrays(np.dtype(name), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    by_column=st.booleans(),
    protocol=st.sampled_from(PROTOCOLS),
)
@settings(max_examples=examples(150))
def test_arrays_round_trip(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any], by_column: bool, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "one.pkl"
    written = np.asfortranarray(array) if by_column else array
    path.write_bytes(pickle.dumps({"a": written, "b": [written, (written,)]}, protocol=protocol))
    assert is_equal(read_pickle(path), {"a": written, "b": [written, (written,)]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_scalars_round_trip(tmp_path: Path, protocol: int) -> None:
    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = np.arange(3), np.arange(3) + 1  # of equal shape, but two separate items
    content = {
        "ids": ["a$_$1", b"b[2]", "c"],
        "ordered": OrderedDict(x=1, y=None),
        "scalar": [np.float32(0.5), np.int64(7), np.bool_(True)],
        "set": {1, 2},
        "ragged": ragged,
        "words": np.array(["one", None, 3], dtype=object),
    }
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(path)
    assert read["scalar"] == [0.5, 7, True]
    assert is_equal(read["ragged"], ragged)
    assert {key: read[key] for key in ("ids", "set")} == {key: content[key] for key in ("ids", "set")}
    assert (read["ordered"], read["words"].tolist()) == ({"x": 1, "y": None}, ["one", None, 3])


def test_python_2_pickle_is_read(tmp_path: Path) -> None:
    # Output of Python 2 for numpy.array([1, 2], "<i2"): the content is a string.
    text = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n"
        b"(S'i2'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\x02\\x00'\ntb."
    )
    (tmp_path / "two.pkl").write_bytes(text)
    assert is_equal(read_pickle(tmp_path / "two.pkl"), np.array([1, 2], "<i2"))


class CallOnLoad:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_function_is_called(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps({"train": CallOnLoad(os.mkdir, str(mark))}, protocol=protocol))
    with pytest.raises(
        DatasetError, match=r"it refers to (posix|nt)\.mkdir, and only numpy arrays and plain containers"
    ):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "function", [eval, getattr, open, io.BytesIO, decimal.Decimal, np.load, np.frombuffer, pickle.loads]
)
def test_other_names_raise_error(tmp_path: Path, function: Any) -> None:
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps([function]))
    with pytest.raises(DatasetError, match=rf"it refers to .*{function.__name__}"):
        read_pickle(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps(list(range(99)))[:-9], b"(lp0\n.", b"\x80\x05."]
)
def test_files_that_are_not_pickles_raise_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "one.pkl"
    path.write_bytes(content)
    if content == b"(lp0\n.":  # a valid pickle: an empty list in protocol 0
        assert read_pickle(path) == []
        return
    with pytest.raises(DatasetError, match=r"one\.pkl cannot be read as a pickle"):
        read_pickle(path)


@given(st.data())
@settings(max_examples=examples(200))
def test_mutated_pickle_is_read_or_raises_dataset_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(
        pickle.dumps(
            {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": ["x", (1, None)]},
            protocol=data.draw(st.sampled_from(PROTOCOLS)),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "spoiled.pkl"
    path.write_bytes(bytes(content))
    with contextlib.suppress(DatasetError):  # any other error fails the test
        read_pickle(path)


def test_stated_size_beyond_file_end_raises_error(tmp_path: Path) -> None:
    path = tmp_path / "one.pkl"
    for code in (pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8):
        path.write_bytes(b"\x80\x05" + code + (1 << 40).to_bytes(8, "little") + b"short.")
        with pytest.raises(DatasetError, match="it ends before the 1,099,511,627,776 bytes that it states"):
            read_pickle(path)


@pytest.mark.parametrize("dtype", ["M8[s]", "c8", [("a", "<f4")]])
def test_unsupported_dtypes_raise_error(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps(np.zeros(2, dtype=dtype)))
    with pytest.raises(DatasetError, match=r"arrays of type .* are not read"):
        read_pickle(path)
