"""Damaged bytes of Parquet files, WebDataset tars and saved datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from .arrow import write_table
from .mutate import mutate_bytes, mutate_json
from .scores import json_bytes
from .seeds import Seeds
from .tables import audit_command


def parquet_bytes(rng: Random, seeds: Seeds) -> list[str]:
    """Damage the bytes of a features table, a score table or a manifest, in its pages or its footer, and read it."""
    name, command = rng.choice(_PARQUET_READERS)
    data = seeds.data(name)
    if rng.random() < 0.4:
        table = pq.read_table(seeds.path(name))
        write_table(rng, table, Path("valid.parquet"))
        data = Path("valid.parquet").read_bytes()
        Path("valid.parquet").unlink()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    region = rng.randrange(5)
    if region < 2:
        data = mutate_bytes(rng, data, low=4, high=footer)
    elif region < 4:
        data = mutate_bytes(rng, data, low=footer, high=len(data) - 8)
    else:
        data = rng.choice(
            (
                mutate_bytes(rng, data, low=len(data) - 8),
                data[:footer] + seeds.data("run/scores.parquet")[-4000:],
                data[: rng.randrange(len(data))],
                b"PAR1" + data,
                data[:-4] + b"PARE",
                mutate_bytes(rng, data),
            )
        )
    Path("damaged.parquet").write_bytes(data)
    return command(rng) if callable(command) else [*command]


def _verify_or_export(rng: Random) -> list[str]:
    return rng.choice(
        (
            ["verify", "damaged.parquet", "--no-media"],
            ["verify", "damaged.parquet"],
            ["diff", "damaged.parquet", "damaged.parquet"],
            ["card", "damaged.parquet"],
            ["order", "damaged.parquet"],
            ["replay", "damaged.parquet"],
            ["export", "damaged.parquet", "--format", rng.choice(("csv", "jsonl", "npy", "ogm")), "--out", "out"],
        )
    )


def _split_scores(rng: Random) -> list[str]:
    return ["split", "--scores", "damaged.parquet", *rng.choice((["--balanced"], ["--subset", "random:5"]))]


_PARQUET_READERS: tuple[tuple[str, Any], ...] = (
    ("features.parquet", lambda rng: audit_command(rng, "damaged.parquet")),
    ("run/scores.parquet", _split_scores),
    ("run/scores.parquet", _split_scores),
    ("run/manifests/balanced.parquet", _verify_or_export),
    ("media-run/manifests/some.parquet", _verify_or_export),
)


def tars_and_saved(rng: Random, seeds: Seeds) -> list[str]:
    """Damage a WebDataset tar, or a file of a dataset saved by `datasets`, and audit it."""
    if rng.random() < 0.5:
        return _damaged_tar(rng, seeds)
    shutil.copytree(seeds.path("saved"), "saved")
    paths = sorted(path for path in Path("saved").rglob("*") if path.is_file())
    path = rng.choice(paths)
    if path.suffix == ".json" and rng.random() < 0.8:
        content = mutate_json(rng, json.loads(path.read_text(encoding="utf-8")))
        path.write_bytes(json_bytes(content))
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return audit_command(rng, "saved")


def _damaged_tar(rng: Random, seeds: Seeds) -> list[str]:
    data = seeds.data("shard.tar")
    if rng.random() < 0.5:
        # Within a header of 512 bytes: name, mode, size, checksum, type, link name
        start = 512 * rng.randrange(len(data) // 512)
        data = mutate_bytes(rng, data, low=start, high=start + 512)
    else:
        data = mutate_bytes(rng, data)
    if rng.random() < 0.4:
        data = _with_checksums(data)
    Path("shard.tar").write_bytes(data)
    return audit_command(rng, "shard.tar")


def _with_checksums(data: bytes) -> bytes:
    """Return a tar in which every header that the reader reaches has the right checksum."""
    out, start = bytearray(data), 0
    while start + 512 <= len(out) and any(out[start : start + 512]):
        out[start + 148 : start + 156] = b" " * 8
        out[start + 148 : start + 156] = b"%06o\0 " % sum(out[start : start + 512])
        try:
            size = int(bytes(out[start + 124 : start + 136]).strip(b" \0") or b"0", 8)
        except ValueError:
            break
        start += 512 * (1 + (max(size, 0) + 511) // 512)
    return bytes(out)
