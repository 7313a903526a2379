"""Score tables, manifests with their metadata, and run folders, of other shapes than mmaudit writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .mutate import EDGE_INTEGERS, EDGE_TEXTS, mutate_bytes, mutate_json, mutate_text
from .seeds import SPLITS, Seeds
from .tables import odd_type, write_table

FORMATS = ("csv", "jsonl", "npy", "ogm", "webdataset", "datasets")


def score_tables(rng: Random, seeds: Seeds) -> list[str]:
    """Write a score table, mmaudit's own or anybody's, with odd values, types and columns, and split it."""
    table = pq.read_table(seeds.path("run/scores.parquet")) if rng.random() < 0.4 else _foreign_scores(rng)
    if rng.random() < 0.3:
        table = table.replace_schema_metadata(odd_metadata(rng, table.schema.metadata))
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        table = change_table(rng, table)
    if rng.random() < 0.2:
        Path("shards").mkdir()
        write_table(rng, table, Path("shards/a.parquet"))
        write_table(rng, change_table(rng, table) if rng.random() < 0.5 else table, Path("shards/b.parquet"))
        name = rng.choice(("shards", "shards/*.parquet"))
    else:
        name = "scores.parquet"
        write_table(rng, table, Path(name))
    return ["split", "--scores", name, *split_options(rng, table.column_names)]


def _foreign_scores(rng: Random) -> pa.Table:
    """Return the columns that anybody's score table needs, of two or three modalities."""
    num_rows = rng.choice((0, 1, 2, 5, 40, 40, 40))
    numbers = np.random.default_rng(rng.getrandbits(32))
    columns: dict[str, Any] = {
        "sample_id": [f"s{row}" for row in range(num_rows)],
        "label": [row % 3 for row in range(num_rows)],
    }
    if rng.random() < 0.5:
        columns["label_name"] = [f"c{row % 3}" for row in range(num_rows)]
    if rng.random() < 0.6:
        columns["split"] = [SPLITS[row % 6] for row in range(num_rows)]
    if rng.random() < 0.4:
        columns["group"] = [f"g{row % 7}" for row in range(num_rows)]
    for name in ("a", "b", "c")[: rng.choice((2, 2, 3))]:
        columns[f"confidence_{name}"] = numbers.random(num_rows)
    for name in ("gap", "balance", "p_balanced", "discrepancy"):
        if rng.random() < 0.15:
            columns[name] = numbers.random(num_rows)
    return pa.table(columns)


def split_options(rng: Random, names: list[str]) -> list[str]:
    """Return which samples to choose, and now and then how."""
    first = next((name.removeprefix("confidence_") for name in names if name.startswith("confidence_")), "audio")
    argv = list(
        rng.choice(
            (
                ["--balanced"],
                ["--balanced", "--grid"],
                ["--balanced", "--by", "weight"],
                ["--balanced", "--size", "10"],
                ["--balanced", "--bins", rng.choice(("2", "auto", "1000"))],
                ["--subset", f"{first}-preferred"],
                ["--subset", rng.choice(("balanced:0.2", "most-balanced:20%", "least-balanced:5", "random:50%"))],
                ["--dominated", f"{first}:0.2"],
                ["--gmm", rng.choice(("balanced", "imbalanced"))],
                ["--resplit", "80/10/10"],
                ["--balanced", "--resplit", rng.choice(("80/10/10", "1/1/98", "100/0/0"))],
            )
        )
    )
    if rng.random() < 0.2:
        argv += ["--between", rng.choice((first, f"{first}:b", "b:a"))]
    if rng.random() < 0.2:
        argv += ["--dry-run"]
    return argv + (["--json"] if rng.random() < 0.3 else [])


def change_table(rng: Random, table: pa.Table) -> pa.Table:
    """Return a table with one column, some rows, or the names changed."""
    change = rng.choice(_TABLE_CHANGES)
    return change(rng, table) if table.num_columns else table


def _change_cells(rng: Random, table: pa.Table) -> pa.Table:
    """Replace up to three cells of a column, or all of them, by values that the column's type holds."""
    number = rng.randrange(table.num_columns)
    column = table.column(number)
    cells = column.to_pylist()
    rows = range(len(cells)) if rng.random() < 0.2 else [rng.randrange(len(cells)) for _ in range(3)] if cells else ()
    for row in rows:
        cells[row] = _cell_like(rng, column.type)
    try:
        return table.set_column(number, table.field(number), pa.array(cells, column.type))
    except (pa.ArrowException, OverflowError):
        return table


def _cell_like(rng: Random, type_: pa.DataType) -> Any:
    if rng.random() < 0.25:
        return None
    if pa.types.is_integer(type_):
        bits = min(type_.bit_width, 63) - 1
        return rng.choice([value for value in EDGE_INTEGERS if -1 <= value < 2**bits])
    if pa.types.is_floating(type_):
        return rng.choice((0.0, 1.0, -1.0, 0.5, 1.1, float("nan"), float("inf"), 1e-30))
    return rng.choice(EDGE_TEXTS)


def _change_type(rng: Random, table: pa.Table) -> pa.Table:
    number = rng.randrange(table.num_columns)
    return table.set_column(number, table.column_names[number], odd_type(rng, table.column(number)))


def _drop_column(rng: Random, table: pa.Table) -> pa.Table:
    return table.remove_column(rng.randrange(table.num_columns))


def _repeat_column(rng: Random, table: pa.Table) -> pa.Table:
    number = rng.randrange(table.num_columns)
    return table.append_column(table.column_names[number], table.column(rng.choice((number, 0))))


def _rename_column(rng: Random, table: pa.Table) -> pa.Table:
    names = list(table.column_names)
    names[rng.randrange(len(names))] = rng.choice((*EDGE_TEXTS, *names, "confidence_", "confidence_fused", "x_path"))
    return table.rename_columns(names)


def _change_rows(rng: Random, table: pa.Table) -> pa.Table:
    rows = list(range(table.num_rows))
    rng.shuffle(rows)
    count = rng.choice((0, 1, 2, len(rows)))
    repeated = rows[:2] if rng.random() < 0.5 else []
    return table.take(pa.array([*rows[:count], *repeated], pa.int64()))


_TABLE_CHANGES: tuple[Callable[[Random, pa.Table], pa.Table], ...] = (
    _change_cells,
    _change_cells,
    _change_cells,
    _change_type,
    _change_type,
    _drop_column,
    _repeat_column,
    _rename_column,
    _change_rows,
)


def odd_metadata(rng: Random, metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Return schema metadata whose JSON has other shapes or types at some keys, or is damaged as text."""
    metadata = {key: value for key, value in (metadata or {}).items() if key.startswith(b"mmaudit")}
    metadata = metadata or {b"mmaudit": b'{"fingerprint": "x"}'}
    key = rng.choice(sorted(metadata))
    if rng.random() < 0.1:
        return {**metadata, key: mutate_bytes(rng, metadata[key])}
    return {**metadata, key: json_bytes(mutate_json(rng, json.loads(metadata[key])))}


def json_bytes(content: Any) -> bytes:
    """Return JSON text, that of integers of thousands of digits included."""
    try:
        return json.dumps(content).encode()
    except ValueError:  # an integer of more digits than Python writes
        return b'{"schema": ' + b"9" * 5000 + b"}"
    except RecursionError:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000


def manifests(rng: Random, seeds: Seeds) -> list[str]:
    """Write a manifest with odd rows, columns or metadata, its companions beside it, and run a command on it."""
    run = rng.choice(("run", "run", "media-run"))
    name = rng.choice(("balanced", "some"))
    home = seeds.path(f"{run}/manifests")
    for path in home.glob(f"{name}.*"):
        shutil.copy(path, path.name)
    shutil.copy(seeds.path(f"{run}/scores.parquet"), "scores.parquet")
    target = rng.choice(("manifest", "manifest", "manifest", "metadata", "metadata", "metadata", "dropped", "numbers"))
    if target == "numbers":
        path = Path(f"{name}.balance.json")
        path.write_bytes(json_bytes(mutate_json(rng, json.loads(path.read_bytes()))))
    else:
        path = Path(f"{name}.dropped.parquet" if target == "dropped" else f"{name}.parquet")
        _change_manifest(rng, path, metadata=target == "metadata")
    data = str(seeds.path("features.parquet" if run == "run" else "media"))
    return manifest_command(rng, f"{name}.parquet", data=data, run=str(seeds.path(run)))


def _change_manifest(rng: Random, path: Path, *, metadata: bool) -> None:
    table = pq.read_table(path)
    about = table.schema.metadata
    if metadata or rng.random() < 0.1:
        about = _hostile_metadata(rng, about) if rng.random() < 0.2 else odd_metadata(rng, about)
    if not metadata:
        for _ in range(rng.choice((1, 1, 2))):
            table = change_table(rng, table)
    write_table(rng, table.replace_schema_metadata(about), path)


def _hostile_metadata(rng: Random, metadata: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return metadata that name code beside the manifest, or a folder outside with leave to read it."""
    content = json.loads(metadata[b"mmaudit"])
    scores = content.get("scores", {})
    modality = rng.choice(scores["modalities"])
    modality["encoder"] = rng.choice(("hostile_code:run", "cProfile:run", "hf:../outside"))
    if rng.random() < 0.5:
        scores["config"]["data"]["encoder"] = [f"{modality['name']}={modality['encoder']}"]
    if rng.random() < 0.5:
        scores["source"] = rng.choice((os.path.abspath("../outside"), "../outside", "hostile/name"))
        scores["config"]["data"]["allow_outside"] = True
    return {**metadata, b"mmaudit": json.dumps(content).encode()}


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
            ["export", path, "--format", rng.choice(FORMATS), "--out", "out", *moved, *json_],
            ["export", path, "--format", rng.choice(FORMATS), "--out", "out", "--skip-missing", *moved],
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


_RUN_FILES = (
    "run.json",
    "run.json",
    "run.json",
    "mixture.json",
    "mixture.json",
    "scores.parquet",
    "quarantine.parquet",
    "manifests/balanced.parquet",
    "manifests/balanced.balance.json",
    "finetune/balanced-concat-uniform/metrics.json",
    "finetune/balanced-concat-uniform/metrics.json",
    "finetune/balanced-concat-uniform/history.jsonl",
    "finetune/balanced-concat-uniform/config.toml",
    "finetune/balanced-concat-uniform/model.safetensors",
    "finetune/balanced-concat-uniform/state/last.pt",
    "features/*/*.arrow",
    "report.json",
)


def run_folders(rng: Random, seeds: Seeds) -> list[str]:
    """Damage one file of a whole run folder, and run a command that reads it."""
    shutil.copytree(seeds.path("run"), "run", ignore=shutil.ignore_patterns("figures", "report.html"))
    pattern = rng.choice(_RUN_FILES)
    paths = sorted(Path("run").glob(pattern))
    if not paths:
        pattern, paths = "run.json", [Path("run/run.json")]
    _damage(rng, rng.choice(paths))
    return _run_command(rng, pattern, data=str(seeds.path("features.parquet")))


def _damage(rng: Random, path: Path) -> None:
    """Change a file in the ways of its format, replace it by something else, or damage its bytes."""
    change = rng.random()
    if change < 0.04:
        path.unlink()
        path.mkdir()
    elif change < 0.08:
        path.write_bytes(rng.choice((b"", b"null", b"[]", b"\x00" * 100, b"\xff\xfe")))
    elif path.suffix == ".json" and change < 0.9:
        path.write_bytes(json_bytes(mutate_json(rng, json.loads(path.read_bytes()))))
    elif path.suffix == ".jsonl" and change < 0.9:
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_bytes(b"\n".join(json_bytes(mutate_json(rng, json.loads(line))) for line in lines))
    elif path.suffix == ".toml":
        path.write_text(mutate_text(rng, path.read_text(encoding="utf-8")), encoding="utf-8", errors="replace")
    elif path.suffix == ".parquet" and change < 0.8:
        _change_manifest(rng, path, metadata=rng.random() < 0.4 and b"mmaudit" in (pq.read_schema(path).metadata or {}))
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _run_command(rng: Random, pattern: str, *, data: str) -> list[str]:
    """Return a command that reads the damaged file."""
    workers = ["--num-workers", "0"]
    score = ["score", data, "--group", "group", "--repeats", "1", *workers]
    tune = ["finetune", "--manifest", "balanced", "--epochs", "1", *workers, "--data", data]
    evaluate = ["evaluate", "balanced-concat-uniform", *workers, "--data", data]
    if pattern.startswith("finetune"):
        argv = rng.choice((["report"], evaluate, evaluate, tune, [*tune, "--name", "n", "--init", "balanced-concat-uniform"]))
    elif pattern.startswith("features"):
        argv = rng.choice((score, tune, evaluate))
    elif pattern.startswith("manifests"):
        argv = rng.choice((["report"], ["verify", "balanced"], ["replay", "balanced"], evaluate))
    else:
        argv = rng.choice((["report"], ["split", *split_options(rng, [])], score, ["check", data, *workers], ["split", "--gmm", "balanced"]))
    return [*argv, "--run", "run"]
