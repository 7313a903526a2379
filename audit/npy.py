"""Plain NumPy arrays in the .npy format, read within the size of what holds them."""

from __future__ import annotations

import math
import struct
import tokenize
import zlib
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

# What NumPy raises for a header or a body that is damaged, and zlib below it for a member of an archive.
BROKEN = (
    tokenize.TokenError,
    zlib.error,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def check_header(stream: IO[bytes], *, num_bytes: int) -> None:
    """Raise one of BROKEN where the header announces objects, or more than the `num_bytes` of header and body."""
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    announced = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or announced > num_bytes:
        content = "objects" if dtype.hasobject else f"{announced:,} bytes"
        raise ValueError(f"its header announces {content}, and it has {num_bytes:,} bytes")


def read_array(stream: IO[bytes]) -> NDArray[Any]:
    """Read the array of a stream whose header was checked; one of BROKEN where the body is damaged."""
    return np.asarray(npy.read_array(stream, allow_pickle=False))
