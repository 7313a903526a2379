"""Mutations of bytes, texts and JSON values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

# Integers that overflow a type, or that a reader must not trust in a length field.
EDGE_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64,
)
EDGE_FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0000001, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
EDGE_TEXTS = (
    "",
    " ",
    "\t",
    "a\nb",
    "a\r\nb",
    "x\x00y",
    "\x1b[2J\x1b]0;title\x07",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@x",
    "NaN",
    "null",
    "None",
    "true",
    "1e400",
    "007",
    "../outside/secret.txt",
    "/dev/zero/x",  # an absolute path that cannot be created
    "~",
    "a/b",
    "a\\b",
    ".hidden",
    "con",
    "ß\u0301\u202e\u2028\ufeff",
    "\U0001f600",
    "x" * 300,
    "x" * 70_000,
    "%s%n{0}{a}",
    "[bold]",
    "<script>",
    "--help",
    "train",
    "holdout",
)


def mutate_bytes(rng: Random, data: bytes, *, low: int = 0, high: int | None = None) -> bytes:
    """Return the bytes with 1 to 8 random changes between the offsets `low` and `high`; the length may change."""
    high = len(data) if high is None else min(high, len(data))
    low = max(0, min(low, high))
    head, body, tail = data[:low], bytearray(data[low:high]), data[high:]
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        body = rng.choice(_BYTE_CHANGES)(rng, body)
    return head + bytes(body) + tail


def _flip_bit(rng: Random, body: bytearray) -> bytearray:
    if body:
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return body


def _set_byte(rng: Random, body: bytearray) -> bytearray:
    if body:
        body[rng.randrange(len(body))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return body


def _set_integer(rng: Random, body: bytearray) -> bytearray:
    width = rng.choice((2, 4, 8))
    if len(body) >= width:
        start = rng.randrange(len(body) - width + 1)
        value = rng.choice(EDGE_INTEGERS) % (1 << (8 * width))
        body[start : start + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return body


def _cut(rng: Random, body: bytearray) -> bytearray:
    start = rng.randrange(len(body) + 1)
    return body[:start] + body[start + rng.choice((1, 4, 64, 1024)) :]


def _truncate(rng: Random, body: bytearray) -> bytearray:
    return body[: rng.randrange(len(body) + 1)]


def _insert(rng: Random, body: bytearray) -> bytearray:
    start = rng.randrange(len(body) + 1)
    return body[:start] + rng.randbytes(rng.choice((1, 2, 16, 256))) + body[start:]


def _repeat(rng: Random, body: bytearray) -> bytearray:
    start = rng.randrange(len(body) + 1)
    part = body[start : start + rng.choice((1, 8, 128))]
    return body[:start] + part * rng.choice((2, 3, 40)) + body[start:]


def _zeros(rng: Random, body: bytearray) -> bytearray:
    start = rng.randrange(len(body) + 1)
    end = min(len(body), start + rng.choice((4, 32, 512)))
    body[start:end] = bytes(end - start)
    return body


_BYTE_CHANGES: tuple[Callable[[Random, bytearray], bytearray], ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_byte,
    _set_integer,
    _set_integer,
    _cut,
    _truncate,
    _insert,
    _repeat,
    _zeros,
)


def odd_value(rng: Random) -> Any:
    """Return a JSON value of a type or size that its reader may not expect."""
    choice = rng.randrange(12)
    if choice < 3:
        return rng.choice(EDGE_TEXTS)
    if choice < 6:
        return rng.choice(EDGE_INTEGERS)
    if choice < 7:
        return rng.choice(EDGE_FLOATS)
    if choice < 9:
        return rng.choice((None, True, False))
    return rng.choice(([], {}, [None], [[1], "a"], {"a": None}, {"": {}}, [{}], nested(rng.choice((5, 900))), 10**4000))


def nested(depth: int) -> Any:
    """Return lists and objects within one another."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def mutate_json(rng: Random, content: Any) -> Any:
    """Return a copy of a JSON value with 1 to 3 keys or items replaced, removed, renamed or wrapped."""
    content = copy.deepcopy(content)
    if rng.random() < 0.05:
        return odd_value(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        slots = _slots(content)
        if not slots:
            return content
        # A shallow key decides more than one of hundreds of numbers below: depth is drawn before the key.
        depth = rng.choice(sorted({depth for depth, _, _ in slots}))
        _, parent, key = rng.choice([slot for slot in slots if slot[0] == depth])
        _change_slot(rng, parent, key)
    return content


def _slots(value: Any, depth: int = 0) -> list[tuple[int, Any, Any]]:
    """Return (depth, container, key) of every key and item of nested containers."""
    if depth > 12 or not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))[:20]
    slots = [(depth, value, key) for key in keys]
    return slots + [slot for key in keys for slot in _slots(value[key], depth + 1)]


def _change_slot(rng: Random, parent: Any, key: Any) -> None:
    change = rng.randrange(6)
    value = parent[key]
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[rng.choice(EDGE_TEXTS)] = parent.pop(key)
    elif change == 2:
        parent[key] = rng.choice(([value], {"value": value}, str(value), [value] * 3))
    elif change == 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = rng.choice((-value, value * 1e9, value + 0.5, float("nan"), 10**30))
    else:
        parent[key] = odd_value(rng)


def mutate_text(rng: Random, text: str) -> str:
    """Return a text with 1 to 3 lines, fields or characters changed."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        number = rng.randrange(len(lines))
        lines[number] = _change_line(rng, lines[number])
        if rng.random() < 0.15:
            lines.insert(number, rng.choice(lines))
        if rng.random() < 0.1 and len(lines) > 1:
            del lines[rng.randrange(len(lines))]
    return "\n".join(lines)


def _change_line(rng: Random, line: str) -> str:
    separator = rng.choice((",", " ", "&", "\t", '"', ":"))
    fields = line.split(separator)
    number = rng.randrange(len(fields))
    change = rng.randrange(6)
    if change == 0:
        fields[number] = rng.choice(EDGE_TEXTS)
    elif change == 1:
        fields[number] = str(rng.choice(EDGE_INTEGERS))
    elif change == 2:
        del fields[number]
    elif change == 3:
        fields.insert(number, rng.choice(fields))
    elif change == 4:
        fields[number] = '"' + fields[number]
    else:
        rng.shuffle(fields)
    return separator.join(fields)


ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252", "utf-7", "shift_jis")


def encode_oddly(rng: Random, text: str) -> bytes:
    """Return a text in another encoding, or in UTF-8 with bytes, line ends or separators that are not as usual."""
    change = rng.randrange(9)
    if change < 3:
        return text.encode(rng.choice(ENCODINGS), "replace")
    data = text.encode("utf-8", "surrogatepass")
    if change == 3:
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\r", b"\x0b", b"\xe2\x80\xa8", b"\x00")))
    if change == 4:
        return data.replace(b",", rng.choice((b";", b"\t", b"|", b"\x01", b", ", b'","')))
    if change == 5:
        return _splice(
            rng, data, rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\x1a"))
        )
    if change == 6:
        return _splice(rng, data, rng.choice((b'"', b"'", b'"""', b"\\", b"\xef\xbb\xbf", b"\n", b"\r")))
    if change == 7:
        return _splice(rng, data, b"a" * rng.choice((10_000, 2_000_000)))
    return mutate_bytes(rng, data)


def _splice(rng: Random, data: bytes, part: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + part + data[start:]
