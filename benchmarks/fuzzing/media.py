"""Folders of media that are damaged, that declare more than they hold, or that are not regular files."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from .mutate import EDGE_INTEGERS, mutate_bytes
from .seeds import FILMS, PICTURES, SOUNDS, Seeds, picture, sound, write_wav

NUM_SAMPLES = 6
LARGE_SIDES = (20_000, 46_340, 65_535, 2**31 - 1)


def media(rng: Random, seeds: Seeds) -> list[str]:
    """Write a folder of sounds and pictures, or films, of which one to three are odd, and audit it."""
    sounds, pictures = rng.choice(SOUNDS), rng.choice(PICTURES)
    film = rng.choice(FILMS) if rng.random() < 0.25 else None
    lines = ["id,label,file_name" if film else "id,label,audio_file_name,image_file_name"]
    for row in range(NUM_SAMPLES):
        names = [f"{row}.{film}"] if film else [f"{row}.{sounds}", f"{row}.{pictures}"]
        for name in names:
            _write_valid(row, Path(name), seeds)
        lines.append(",".join([f"m{row}", f"c{row % 2}", *names]))
    for _ in range(rng.choice((1, 1, 2, 3))):
        _replace(rng, Path(rng.choice(lines[1:]).split(",")[rng.choice((2, -1))]), seeds)
    Path("metadata.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if rng.random() < 0.05:
        return ["score", ".", "--num-workers", "0", "--repeats", "1", "--set", "probe.folds=2", "--run", "own"]
    outside = ["--allow-outside"] if rng.random() < 0.1 else []
    return ["check", ".", "--num-workers", "0", *outside, *(["--json"] if rng.random() < 0.3 else [])]


def _write_valid(row: int, path: Path, seeds: Seeds) -> None:
    """Write a file that can be decoded; wav and pictures without loss differ by row, the others are one seed."""
    if path.suffix == ".wav":
        write_wav(path, sound(row))
    elif path.suffix in (".png", ".bmp", ".tiff"):
        picture(row).save(path)
    else:
        shutil.copy(seeds.path(f"formats/x{path.suffix}"), path)


def _replace(rng: Random, path: Path, seeds: Seeds) -> None:
    """Damage a file, write a header that declares more than the file holds, or replace it by something not a file."""
    roll = rng.random()
    if roll < 0.62:
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            path.write_bytes(mutate_bytes(rng, data, high=rng.choice((64, 64, 512, len(data)))))
    elif roll < 0.82:
        _remove(path)
        path.write_bytes(rng.choice(_BOMBS)(rng))
    elif roll < 0.88:
        _remove(path)
        shutil.copy(seeds.path(f"formats/x.{rng.choice((*SOUNDS, *PICTURES, *FILMS))}"), path)
    else:
        _remove(path)
        rng.choice(_NO_FILES)(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _side(rng: Random) -> int:
    return rng.choice(LARGE_SIDES)


def _png(rng: Random) -> bytes:
    """Return a PNG of few bytes whose header announces a great picture, with all of its rows or without."""
    width, height = _side(rng), rng.choice((1, 20_000, 65_535))
    bits, colour = rng.choice(((8, 2), (16, 6), (1, 0), (8, 3)))
    body = zlib.compress(bytes(rng.choice((10, 30_000_000))), 9)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    if rng.random() < 0.3:
        chunks.insert(1, (rng.choice((b"iCCP", b"zTXt")), b"x\0\0" + zlib.compress(bytes(60_000_000), 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _tiff(rng: Random) -> bytes:
    """Return a TIFF whose tags announce a great picture in one strip or in many."""
    side = rng.choice((20_000, 46_340, 65_535))
    tags = {
        256: side,
        257: side,
        258: 8,
        259: rng.choice((1, 5, 8, 7, 4)),
        262: rng.choice((1, 2)),
        273: 8,
        277: rng.choice((1, 3, 4)),
    }
    tags |= {278: rng.choice((1, side)), 279: rng.choice((0, 100, 2**32 - 1))}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, rng.choice((1, 1, 1, 2**28)) if rng.random() < 0.1 else 1, value)
        for tag, value in sorted(tags.items())
    )
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", rng.choice((0, 8)))
        + bytes(200)
    )


def _gif(rng: Random) -> bytes:
    """Return a GIF with a great canvas and one small frame, many times over."""
    canvas = struct.pack("<HH", 65_535, rng.choice((1, 20_000, 65_535)))
    frame = b"!\xf9\x04\x08\x01\x00\x00\x00" + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    return b"GIF89a" + canvas + b"\xf0\0\0\0\0\0\xff\xff\xff" + frame * rng.choice((1, 3, 5000)) + b";"


def _webp(rng: Random) -> bytes:
    """Return a WebP whose header announces 16,383 pixels a side, or a canvas of 16 million."""
    if rng.random() < 0.5:
        body = b"VP8L" + struct.pack("<I", 9) + b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(5)
    else:
        size = (2**24 - 1).to_bytes(3, "little")
        body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + size + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _bmp(rng: Random) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII",
        40,
        _side(rng),
        rng.choice((1, -1, 30_000)),
        1,
        rng.choice((1, 8, 24, 32)),
        rng.choice((0, 1)),
        0,
        0,
        0,
        0,
        0,
    )
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(100)


def _wav(rng: Random) -> bytes:
    """Return a wav whose format and sizes are not those of its content."""
    channels, rate, bits = (
        rng.choice((0, 1, 2, 65_535)),
        rng.choice((0, 1, 8_000, 2**32 - 1)),
        rng.choice((0, 8, 16, 24, 32, 64)),
    )
    block = rng.choice((channels * bits // 8, 0, 65_535)) & 0xFFFF
    layout = struct.pack(
        "<HHIIHH", rng.choice((1, 3, 0xFFFE, 85, 2)), channels, rate, rate * block & 0xFFFFFFFF, block, bits
    )
    size = rng.choice((0, 1000, 2**31, 2**32 - 1))
    head = b"RIFF" + struct.pack("<I", rng.choice((36, 2**32 - 1))) + b"WAVEfmt " + struct.pack("<I", 16) + layout
    return head + b"data" + struct.pack("<I", size) + rng.randbytes(4000)


def _long_wav(rng: Random) -> bytes:
    """Return an hour of silence and a click, 58 MB, of which only the first seconds are used."""
    layout = struct.pack("<HHIIHH", 1, 1, 8_000, 16_000, 2, 16)
    size = 2 * 8_000 * 3600
    head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + layout
    return head + b"data" + struct.pack("<I", size) + rng.randbytes(16_000) + bytes(size - 16_000)


def _flac(rng: Random) -> bytes:
    """Return a FLAC header that announces 2^36 samples, and nothing after it."""
    numbers = 8_000 << 44 | rng.choice((0, 7)) << 41 | 15 << 36 | rng.choice((0, 2**36 - 1))
    return b"fLaC\x80\0\0\x22" + struct.pack(">HH", 4096, 4096) + bytes(6) + numbers.to_bytes(8, "big") + bytes(16)


def _mp4(rng: Random) -> bytes:
    """Return an MP4 of boxes within boxes, with sizes of edges."""
    body = rng.randbytes(50)
    for _ in range(rng.choice((1, 10, 3000))):
        name = rng.choice((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz", b"udta", b"meta"))
        size = rng.choice((len(body) + 8,) * 9 + EDGE_INTEGERS[:8]) & 0xFFFFFFFF
        body = struct.pack(">I", size) + name + body
    return struct.pack(">I", 16) + b"ftypisom" + bytes(4) + body


_BOMBS: tuple[Callable[[Random], bytes], ...] = (
    _png,
    _png,
    _tiff,
    _tiff,
    _gif,
    _webp,
    _bmp,
    _wav,
    _wav,
    _long_wav,
    _flac,
    _mp4,
)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # the path of one may have 108 characters
    os.rename("socket", path)


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _large_file(path: Path) -> None:
    """Write a file of 3 GB that takes no room on disk."""
    with path.open("wb") as file:
        file.write(
            b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0"
            b"data\xff\xff\xff\xff"
        )
        file.truncate(3 << 30)


_NO_FILES: tuple[Callable[[Path], None], ...] = (
    os.mkfifo,
    os.mkfifo,
    _socket,
    Path.mkdir,
    Path.touch,
    _large_file,
    _link_to("/dev/zero"),
    _link_to("/dev/null"),
    _link_to("/proc/self/mem"),
    _link_to("../outside/secret.wav"),
    _link_to("itself/loop"),
    lambda path: path.symlink_to(path.name),
)


def layouts(rng: Random, seeds: Seeds) -> list[str]:
    """Write folders sorted by class, with odd names, links, empty and nested folders, and audit them."""
    base = rng.choice((".", "train", "data"))
    for row in range(NUM_SAMPLES):
        folder = Path(base) / rng.choice(
            ("dog", "cat", "train", "audio", "image", "\udcff", "a" * 200, ".hidden", "-x", "a,b")
        )
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("wav", "png"):
            _write_valid(row, folder / f"{rng.choice((str(row), 'x', 'x' * 240, 'é' * 100))}.{suffix}", seeds)
    folder = next(path for path in sorted(Path(base).iterdir()) if path.is_dir())
    odd_path = folder / rng.choice(("odd.wav", "odd.png", "odd", "0.mp4", "odd.txt"))
    if not odd_path.exists():
        rng.choice(_NO_FILES)(odd_path)
    return ["check", base, "--num-workers", "0", *(["--json"] if rng.random() < 0.3 else [])]
