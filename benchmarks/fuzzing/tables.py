"""Tables of samples with odd cells, columns, types and encodings, and very small ones."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .arrow import array_of, odd_type, text_of, write_table
from .mutate import EDGE_TEXTS, encode_oddly, mutate_text, nested, odd_value
from .seeds import SPLITS, Seeds, feature_rows


def audit_command(rng: Random, data: str, *, share_scored: float = 0.06) -> list[str]:
    """Return `check DATA`, or sometimes `score DATA`, with a few options."""
    argv = ["check", data, "--num-workers", "0"]
    if rng.random() < share_scored:
        argv = ["score", data, "--num-workers", "0", "--repeats", "1", "--set", "probe.folds=2"]
    if rng.random() < 0.15:
        argv += ["--group", rng.choice(("group", "none", "label", "id", "audio"))]
    if rng.random() < 0.1:
        argv += ["--split", rng.choice(("split", "none", "label", "audio"))]
    if rng.random() < 0.1:
        argv += ["--label", rng.choice(("label", "id", "split", "audio", "text"))]
    if rng.random() < 0.1:
        argv += ["--task", rng.choice(("multilabel", "regression"))]
    if rng.random() < 0.1:
        argv += ["--modality", rng.choice(("a=audio", "a=audio:features", "a=visual:text", "t=text:text", "x=label"))]
        argv += ["--modality", rng.choice(("b=visual", "b=audio", "b=caption"))]
    return argv + (["--json"] if rng.random() < 0.3 else [])


def odd_tables(rng: Random, seeds: Seeds) -> list[str]:
    """Write rows with odd cells as csv, tsv, jsonl or Parquet, in one file or several, and audit them."""
    rows = _odd_rows(rng)
    suffix = rng.choice(("csv", "jsonl", "parquet", "parquet") * 5 + ("tsv",))
    stem = rng.choice(("metadata", "train", "data", "x"))
    if rng.random() < 0.2:
        half = len(rows) // 2
        _write_rows(rng, rows[:half], Path(f"{stem}.{suffix}"))
        _write_rows(rng, rows[half:], Path(f"{stem}1.{suffix}"))
        return audit_command(rng, f"{stem}*.{suffix}")
    _write_rows(rng, rows, Path(f"{stem}.{suffix}"))
    return audit_command(rng, "." if stem == "metadata" and rng.random() < 0.5 else f"{stem}.{suffix}")


def _odd_rows(rng: Random) -> list[dict[str, Any]]:
    """Return rows of a features table or of two texts, with up to six odd cells and up to two odd columns."""
    rows: list[dict[str, Any]] = feature_rows(rng, num_rows=rng.choice((0, 1, 3, 8, 12, 24, 24, 24, 24))).to_pylist()
    if rng.random() < 0.4:
        for row in rows:
            row["text"], row["caption"] = f"some words {row['label']}", f"other words {row['audio'][0]:.1f}"
            if rng.random() < 0.95:
                del row["audio"], row["visual"]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 6)) if rows else 0):
        row = rng.choice(rows)
        row[rng.choice(list(row))] = _odd_cell(rng)
    for _ in range(rng.choice((0, 0, 0, 1, 2)) if rows else 0):
        _odd_column(rng, rows)
    return rows


def _odd_cell(rng: Random) -> Any:
    choice = rng.randrange(4)
    if choice == 0:
        return [rng.choice((0.0, 1e300, float("nan"), None, "x", -1))] * rng.choice((0, 1, 6, 7, 500))
    if choice == 1:
        return rng.choice((nested(rng.choice((2, 60, 150))), {"bytes": None, "path": "x.wav"}, {"bytes": "x"}))
    return odd_value(rng)


def _odd_column(rng: Random, rows: list[dict[str, Any]]) -> None:
    """Set a column to one odd value, drop it, or rename it."""
    name = rng.choice([*rows[0], "label_name", "file_name", "x_path", "x_frames", "class", "__key__", ""])
    change, value = rng.randrange(4), _odd_cell(rng)
    for number, row in enumerate(rows):
        if change == 0:
            row.pop(name, None)
        elif change == 1:
            row[rng.choice(EDGE_TEXTS[:12])] = row.pop(name, None)
        else:
            row[name] = value if change == 2 else f"{name}{number % 3}"


def _write_rows(rng: Random, rows: list[dict[str, Any]], path: Path) -> None:
    if path.suffix == ".parquet":
        _write_parquet(rng, rows, path)
    elif path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, default=str) for row in rows)
        text = rng.choice(
            (text,) * 12 + (text + "\n\n", "null\n" * 9, text + "\n[]", f"[{text.replace(chr(10), ',')}]")
        )
        if rng.random() < 0.05:
            text += "\n" + _deep_json(rng)
        path.write_text(text, encoding="utf-8")
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(names)
        writer.writerows([text_of(row.get(name)) for name in names] for row in rows)
        path.write_text(file.getvalue(), encoding="utf-8", errors="surrogatepass")


def _deep_json(rng: Random) -> str:
    depth = rng.choice((50, 1000, 3000, 100_000))
    opening, closing = rng.choice((('{"a":', "}"), ("[", "]"), ('{"label":[', "]}")))
    return '{"id":"deep","label":' + opening * depth + "1" + closing * depth + "}"


def _write_parquet(rng: Random, rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows column by column; one that Arrow cannot build from its cells holds them as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [array_of([row.get(name) for row in rows]) for name in names]
    for _ in range(rng.choice((0, 1, 1, 2)) if arrays else 0):
        number = rng.randrange(len(arrays))
        arrays[number] = odd_type(rng, arrays[number])
    if names and rng.random() < 0.1:
        names[rng.randrange(len(names))] = rng.choice(names)
    if names and rng.random() < 0.05:
        names[rng.randrange(len(names))] = rng.choice(EDGE_TEXTS)
    table = pa.Table.from_arrays(arrays, names=names)
    write_table(rng, table, path)


def small_tables(rng: Random, seeds: Seeds) -> list[str]:
    """Write few samples, classes or groups, or features that are constant, equal, very large or small; score."""
    num_rows = rng.choice((4, 6, 8, 9, 10, 12, 16, 30))
    num_classes, width = rng.choice((1, 2, 3, 4, num_rows)), rng.choice((1, 2, 6, 40))
    scale = rng.choice((1.0, 1.0, 1.0, 1e-30, 1e18, 1e38))
    audio = [[rng.gauss(0, 1) * scale for _ in range(width)] for _ in range(num_rows)]
    visual = [rng.choice((row, [1.0] * width, [rng.gauss(0, 1) for _ in row])) for row in audio]
    if rng.random() < 0.2:
        visual = audio
    columns: dict[str, Any] = {
        "id": [f"s{row}" for row in range(num_rows)],
        "label": [row % num_classes for row in range(num_rows)],
        "group": [f"g{row % rng.choice((1, 2, 3, num_rows))}" for row in range(num_rows)],
        "audio": pa.array(audio, pa.list_(pa.float32())),
        "visual": pa.array(visual, pa.list_(pa.float32())),
    }
    if rng.random() < 0.5:
        columns["split"] = [rng.choice(rng.choice((("train",), ("train", "test"), SPLITS))) for _ in range(num_rows)]
    pq.write_table(pa.table(columns), "small.parquet")
    argv = ["score", "small.parquet", "--repeats", "1", "--num-workers", "0"]
    if rng.random() < 0.3:
        argv += ["--set", rng.choice(("probe.kind=linear", "probe.kind=mlp", "probe.folds=2", "probe.folds=20"))]
    if rng.random() < 0.3:
        argv += ["--group", "group"]
    if rng.random() < 0.3:
        argv += ["--task", rng.choice(("regression", "multilabel"))]
    return argv + (["--learn-from", "train"] if rng.random() < 0.2 else [])


def odd_encodings(rng: Random, seeds: Seeds) -> list[str]:
    """Write a valid csv or jsonl in another encoding, or with odd line ends, separators and quotes, and audit it."""
    if rng.random() < 0.5:
        text = seeds.data("media/metadata.csv").decode()
        name = "metadata.csv"
    else:
        rows = feature_rows(rng, num_rows=12).to_pylist()
        for row in rows:
            row["text"], row["caption"] = f"words {row['label']}", "éàü ß 漢字"
        text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.3) for row in rows)
        name = "metadata.jsonl"
    if rng.random() < 0.3:
        text = mutate_text(rng, text)
    Path(name).write_bytes(encode_oddly(rng, text))
    return audit_command(rng, name)
