"""Manifests whose rows, columns, metadata or companions are of other shapes than mmaudit writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmaudit.rebalance import EXPORTERS

from .arrow import write_table
from .mutate import mutate_json
from .scores import change_table, json_bytes, odd_metadata
from .seeds import Seeds


def manifests(rng: Random, seeds: Seeds) -> list[str]:
    """Write a manifest with odd rows, columns or metadata, and its companion files, and run a command on it."""
    run = rng.choice(("run", "run", "media-run"))
    name = rng.choice(("balanced", "some"))
    folder = seeds.path(f"{run}/manifests")
    for path in folder.glob(f"{name}.*"):
        shutil.copy(path, path.name)
    shutil.copy(seeds.path(f"{run}/scores.parquet"), "scores.parquet")
    target = rng.choice(("manifest", "manifest", "manifest", "metadata", "metadata", "metadata", "dropped", "numbers"))
    if target == "numbers":
        path = Path(f"{name}.balance.json")
        path.write_bytes(json_bytes(mutate_json(rng, json.loads(path.read_bytes()))))
    else:
        path = Path(f"{name}.dropped.parquet" if target == "dropped" else f"{name}.parquet")
        change_manifest(rng, path, metadata=target == "metadata")
    data = str(seeds.path("features.parquet" if run == "run" else "media"))
    return manifest_command(rng, f"{name}.parquet", data=data, run=str(seeds.path(run)))


def hostile_manifests(rng: Random, seeds: Seeds) -> list[str]:
    """Write a manifest whose metadata name code in its folder, or a folder outside with permission to read it."""
    for path in seeds.path("media-run/manifests").glob("some.*"):
        shutil.copy(path, path.name)
    shutil.copy(seeds.path("media-run/scores.parquet"), "scores.parquet")
    table = pq.read_table("some.parquet")
    content = json.loads(table.schema.metadata[b"mmaudit"])
    if rng.random() < 0.6:
        _name_code(rng, content["scores"])
    if rng.random() < 0.6:
        content["scores"]["source"] = rng.choice((os.path.abspath("../outside"), "../outside", "owner/name", "."))
        content["scores"]["config"]["data"]["allow_outside"] = True
        secret = rng.choice((os.path.abspath("../outside/secret.wav"), "../outside/secret.wav", "secret.wav"))
        number = table.column_names.index("audio_file_name")
        table = table.set_column(number, "audio_file_name", pa.array([secret] * table.num_rows))
    if rng.random() < 0.2:
        content["recipe"]["scores"] = rng.choice(("../outside/secret.txt", "/dev/zero", "missing/*.parquet"))
    metadata = {**table.schema.metadata, b"mmaudit": json.dumps(content).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), "some.parquet")
    moved = ["--data", str(seeds.path("media"))] if rng.random() < 0.5 else []
    return rng.choice(
        (
            ["verify", "some.parquet", *moved],
            ["export", "some.parquet", "--format", "webdataset", "--out", "out", *moved],
            ["export", "some.parquet", "--format", "webdataset", "--out", "out", "--skip-missing"],
            ["finetune", "--manifest", "some.parquet", "--epochs", "1", "--num-workers", "0", "--run", "own", *moved],
            ["replay", "some.parquet"],
            ["diff", "some.parquet", "some.parquet"],
            ["card", "some.parquet"],
        )
    )


def _name_code(rng: Random, scores: dict[str, Any]) -> None:
    """Name a function, as an encoder, in the list of modalities, in the config, or in both."""
    modality = rng.choice(scores["modalities"])
    code = rng.choice(("hostile_code:run",) * 4 + ("cProfile:run", "hf:../outside"))
    if rng.random() < 0.7:
        scores["config"]["data"]["encoder"] = [f"{modality['name']}={code}"]
    if rng.random() < 0.7:
        modality["encoder"] = code


def manifest_command(rng: Random, path: str, *, data: str, run: str) -> list[str]:
    """Return a command that reads a manifest; training commands are few, for they take seconds."""
    json_ = ["--json"] if rng.random() < 0.3 else []
    moved = ["--data", data] if rng.random() < 0.5 else []
    if rng.random() < 0.12:
        epochs = ["--epochs", "1", "--num-workers", "0", "--run", "own"]
        return ["finetune", "--manifest", path, *epochs, *moved, *_methods(rng), *json_]
    return rng.choice(
        (
            ["verify", path, *moved, *json_],
            ["verify", path, "--no-media", *json_],
            ["diff", path, f"{run}/manifests/balanced.parquet", *json_],
            ["diff", f"{run}/manifests/some.parquet", path, *json_],
            ["card", path],
            ["replay", path, *json_],
            ["replay", path, "--scores", "scores.parquet", *json_],
            ["order", path, *rng.choice(([], ["--dump"], ["--order", "weighted"], ["--epoch", "3"]))],
            ["export", path, "--format", rng.choice(list(EXPORTERS)), "--out", "out", *moved, *json_],
            ["export", path, "--format", rng.choice(list(EXPORTERS)), "--out", "out", "--skip-missing", *moved],
            ["split", "--scores", "scores.parquet", "--intersect", path, *json_],
            ["split", "--scores", "scores.parquet", "--subset", "random:5", "--exclude", path],
            ["split", "--scores", "scores.parquet", "--subset", "random", "--like", path],
        )
    )


def _methods(rng: Random) -> list[str]:
    return list(
        rng.choice(
            (
                [],
                [],
                ["--sampling", rng.choice(("bss-h", "bss-l", "dus-h", "smv", "class-balanced", "posterior"))],
                ["--balancing", rng.choice(("sum", "gmm", "ogm-ge", "gblend", "pmr", "mses"))],
                ["--keep-posterior", "0.5"],
            )
        )
    )


def change_manifest(rng: Random, path: Path, *, metadata: bool) -> None:
    table = pq.read_table(path)
    about = table.schema.metadata
    if metadata or rng.random() < 0.1:
        about = odd_metadata(rng, about)
    if not metadata:
        for _ in range(rng.choice((1, 1, 2))):
            table = change_table(rng, table)
    write_table(rng, table.replace_schema_metadata(about), path)
