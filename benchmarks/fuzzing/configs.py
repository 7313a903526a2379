"""Configs in TOML, settings and options of the command line, with wrong keys, types, sizes and syntax."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

from .mutate import EDGE_FLOATS, EDGE_INTEGERS, EDGE_TEXTS, encode_oddly, mutate_bytes
from .seeds import Seeds

LONG_NAME = "n" * 300
AMOUNTS = ("epochs", "repeats", "max_steps", "folds", "rest", "patience")  # a large one is work that was asked for


def configs(rng: Random, seeds: Seeds) -> list[str]:
    """Write a config, or name settings and options, and run a command that reads them."""
    if rng.random() < 0.4:
        Path("run.toml").write_bytes(_toml(rng))
        options = ["--config", "run.toml"]
    elif rng.random() < 0.7:
        options = [part for _ in range(rng.choice((1, 1, 2))) for part in ("--set", _setting(rng))]
    else:
        options = _odd_option(rng)
    return [*_command(rng, seeds), *options]


def _command(rng: Random, seeds: Seeds) -> list[str]:
    features, run, workers = str(seeds.path("features.parquet")), str(seeds.path("run")), ["--num-workers", "0"]
    manifest = f"{run}/manifests/balanced.parquet"
    roll = rng.random()
    if roll < 0.08:
        return ["score", features, "--repeats", "1", *workers, "--run", "own"]
    if roll < 0.2:
        return ["finetune", "--manifest", manifest, "--epochs", "1", *workers, "--data", features, "--run", "own"]
    if roll < 0.5:
        return ["check", features, *workers]
    if roll < 0.6:
        return ["check", str(seeds.path("media")), *workers]
    if roll < 0.75:
        return ["order", manifest]
    return ["split", "--balanced", "--scores", f"{run}/scores.parquet"]


def config_keys() -> list[tuple[str, Any]]:
    """Return every key of the config as (SECTION.KEY, type)."""
    from mmaudit.cli.config import RunConfig

    return _keys_of(RunConfig, "")


def _keys_of(config: type, prefix: str) -> list[tuple[str, Any]]:
    hints = get_type_hints(config)
    keys: list[tuple[str, Any]] = []
    for field in fields(config):
        hint = hints[field.name]
        nested = _keys_of(hint, f"{prefix}{field.name}.") if is_dataclass(hint) and isinstance(hint, type) else []
        keys += nested or [(f"{prefix}{field.name}", hint)]
    return keys


def _setting(rng: Random) -> str:
    """Return SECTION.KEY=VALUE: a key that exists with a value of an edge, or text that is not of that form."""
    if rng.random() < 0.15:
        return rng.choice(
            (
                "=", "a", "a=", "=1", "..=1", ".seed=1", "seed=1=2", "seed.x=1", "probe=1", "probe.=1", "seed= ",
                "seed=" + "9" * 5000, "a." * 2000 + "b=1", "probe.folds=[" + "[" * 2000, "seed='",
                "seed=1\nprobe.folds=2",
                "\udcff=1", "seed=\udcff", "probe.kind=\x1b[31m", "__class__=1", "probe.__init__=1",
            )
        )  # fmt: skip
    key, hint = rng.choice(config_keys())
    value = _toml_value(rng, hint)
    if key.endswith(AMOUNTS) and value.isdigit():
        value = str(int(value) % 4)
    return f"{key}={value}"


def _toml_value(rng: Random, hint: Any) -> str:
    """Return a TOML value: of the type more often than not, at an edge of its range."""
    name = str(hint)
    if rng.random() < 0.2:
        return rng.choice(('""', "[]", "{}", "true", "1979-05-27", "[[1]]", "{a = 1}", "1", "1.5", '"x"', "nan", "inf"))
    if "tuple" in name and "float" not in name:
        return rng.choice(
            ('["audio"]', '["audio=0.1"]', '["audio=statistics"]', "[]", '[""]', '["a", "a"]', '["=", "="]')
        )
    if "tuple" in name:
        return rng.choice(("[]", "[0.0]", "[-1.0]", "[nan]", "[inf, 1.0]", "[1e-300]", "[" + "0.1, " * 500 + "]"))
    if "bool" in name:
        return rng.choice(("true", "false"))
    if "int" in name and "float" not in name:
        return str(rng.choice((*EDGE_INTEGERS, 3, 10, 1000, 10**6)))
    if "float" in name:
        return repr(rng.choice((*EDGE_FLOATS, 0.1, 2.0, 1e-9)))
    return rng.choice(
        ('"auto"', '"linear"', '"cpu"', '"balanced"', '"audio"', '""', '"\\u0000"', f'"{LONG_NAME}"', '"none"')
    )


def _toml(rng: Random) -> bytes:
    """Return a TOML file: keys of the config with edge values, or text that is no TOML, or of great depth."""
    lines = [_setting(rng) for _ in range(rng.choice((1, 1, 3)))]
    text = "\n".join(line.replace("=", " = ", 1) for line in lines)
    roll = rng.randrange(8)
    if roll == 0:
        depth = rng.choice((100, 1000, 20_000))
        text = rng.choice(
            ("x = " + "[" * depth, "x = " + "{a = " * depth, ".".join("a" * depth) + " = 1", "[" + "a." * depth + "b]")
        )
        text += rng.choice(("", "]" * depth, "1" + "}" * depth))
    elif roll == 1:
        text = rng.choice(
            (
                "seed = 1\nseed = 2",
                "seed = " + "9" * 5000,
                "[seed]\nx = 1",
                "[[probe]]\nfolds = 2",
                "[probe",
                "seed = 0x" + "f" * 5000,
                "[probe]\n[probe]",
            )
        )
    elif roll == 2:
        return mutate_bytes(rng, text.encode("utf-8", "replace"))
    elif roll == 3:
        return encode_oddly(rng, text)
    return text.encode("utf-8", "replace")


def _odd_option(rng: Random) -> list[str]:
    """Return an option with a value that names, paths or numbers may not have."""
    # Nothing that leads out of the folder: some of the options name what is written.
    texts = [text.replace("\x00", "") for text in EDGE_TEXTS if len(text) < 1000 and not text.startswith(("/", ".."))]
    text = rng.choice((*texts, LONG_NAME, "\udcff\udcfe", "a/" * 3000, ".", "[", "*", "?x"))
    option = rng.choice(
        (
            "--config", "--run", "--run", "--name", "--name", "--data", "--seed", "--device", "--group", "--label",
            "--id",
            "--split", "--modality", "--encoder", "--task", "--scores", "--subset", "--dominated", "--gmm", "--like",
            "--intersect", "--exclude", "--bins", "--size", "--tolerance", "--between", "--resplit", "--epoch",
            "--order",
            "--pacing", "--sampling", "--balancing", "--fusion", "--only", "--init", "--keep-posterior", "--epochs",
            "--batch-size", "--lr", "--report-to", "--num-workers", "--learn-from", "--repeats",
        )
    )  # fmt: skip
    if rng.random() < 0.3:
        text = str(
            rng.choice(
                (*EDGE_INTEGERS[:10], "1e400", "nan", "1/2", "a=b", "x:0.1", "x:nan", "50/50", "0/0/0", "random:0")
            )
        )
    if option in ("--epochs", "--repeats") and text.isdigit():
        text = str(int(text) % 4)
    return [f"{option}={text}"]


def odd_names(rng: Random, seeds: Seeds) -> list[str]:
    """Run a command on a path that is no such file: missing, of a wrong kind, too long, or not in UTF-8."""
    # A copy, for some commands write to the path that they are given; for the same reason no path leads out of here.
    shutil.copytree(seeds.path("run"), "run", ignore=shutil.ignore_patterns("figures", "features", "report.html"))
    Path("empty").mkdir()
    os.mkfifo("pipe.csv")
    for suffix in ("parquet", "csv", "jsonl", "tar"):
        Path(f"x.{suffix}").touch()
    path = rng.choice(
        (
            "missing", LONG_NAME, "a/" * 3000, "\udcff.parquet", ".", "~", "", " ", "*", "[", "**", "x.parquet",
            "x.csv", "x.jsonl", "x.tar", "pipe.csv", "empty", "a:b", "owner/name", "hf://owner/name", "file:///x",
            "\x1b[31m.csv", "a\nb", "run/run.json", "run/scores.parquet", "run/manifests", "run",
        )
    )  # fmt: skip
    return rng.choice(_commands_on(path, rng))


def _commands_on(path: str, rng: Random) -> tuple[list[str], ...]:
    """Return every command with the path in one of its places."""
    scores, manifest = "run/scores.parquet", "run/manifests/some.parquet"
    return (
        ["check", path, "--num-workers", "0"],
        ["score", path, "--num-workers", "0"],
        ["split", "--balanced", "--scores", path],
        ["split", "--balanced", "--run", path],
        ["split", "--balanced", "--scores", scores, "--run", path],
        ["split", "--balanced", "--scores", scores, f"--name={path}"],
        ["verify", path],
        ["diff", path, manifest],
        ["card", path],
        ["card", manifest, "--out", path],
        ["replay", path],
        ["order", path],
        ["export", path, "--format", "csv", "--out", "out"],
        ["export", manifest, "--format", rng.choice(("csv", "npy", "ogm")), "--out", path],
        ["finetune", "--manifest", path],
        ["evaluate", path],
        ["report", "--run", path],
        ["ingest", rng.choice(("cremad", "mosei", "image-text")), path],
        ["ingest", "cremad", "empty", "--list", path],
    )
