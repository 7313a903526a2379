"""Tables of samples: odd cells, columns, types and encodings; damaged Parquet bytes; tars and saved datasets."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .mutate import EDGE_TEXTS, encode_oddly, mutate_bytes, mutate_json, mutate_text, nested, odd_value
from .seeds import Seeds, feature_rows

COMPRESSIONS = ("none", "snappy", "zstd", "gzip", "lz4", "brotli")


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
    suffix = rng.choice(("csv", "jsonl", "jsonl", "parquet", "parquet", "parquet", "tsv"))
    stem = rng.choice(("metadata", "train", "data", "x"))
    count = rng.choice((1, 1, 1, 2))
    for number in range(count):
        part = rows if count == 1 else _odd_rows(rng)
        _write_rows(rng, part, Path(f"{stem}{number or ''}.{suffix}"))
    if count > 1:
        return audit_command(rng, f"{stem}*.{suffix}")
    return audit_command(rng, "." if stem == "metadata" and rng.random() < 0.5 else f"{stem}.{suffix}")


def _odd_rows(rng: Random) -> list[dict[str, Any]]:
    """Return rows of a features table or of two texts, with 0 to 6 odd cells and 0 to 2 odd columns."""
    rows = feature_rows(rng, num_rows=rng.choice((0, 1, 2, 3, 6, 8, 12, 24, 24, 24))).to_pylist()
    if rng.random() < 0.4:
        for row in rows:
            row["text"], row["caption"] = f"some words {row['label']}", f"other words {row['audio'][0]:.1f}"
            if rng.random() < 0.95:
                del row["audio"], row["visual"]
    for _ in range(rng.choice((0, 1, 1, 2, 6)) if rows else 0):
        row = rng.choice(rows)
        row[rng.choice(list(row))] = _odd_cell(rng)
    for _ in range(rng.choice((0, 0, 1, 2)) if rows else 0):
        _odd_column(rng, rows)
    return rows


def _odd_cell(rng: Random) -> Any:
    choice = rng.randrange(4)
    if choice == 0:
        return [rng.choice((0.0, 1e300, float("nan"), None, "x", -1))] * rng.choice((0, 1, 6, 7, 500))
    if choice == 1:
        return rng.choice((nested(rng.choice((2, 60, 900))), {"bytes": None, "path": "x.wav"}, {"bytes": "x"}))
    return odd_value(rng)


def _odd_column(rng: Random, rows: list[dict[str, Any]]) -> None:
    """Give every row the same odd value in a column, drop a column, or rename it."""
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
        text = rng.choice((text, text, text + "\n", "null\n" * 9, text + "\n[]", "[" + text.replace("\n", ",") + "]"))
        if rng.random() < 0.08:
            text += "\n" + _deep_json(rng)
        path.write_text(text, encoding="utf-8")
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_csv_cell(row.get(name)) for name in names] for row in rows)
        path.write_text(file.getvalue(), encoding="utf-8", errors="surrogatepass")


def _csv_cell(cell: Any) -> str:
    try:
        return "" if cell is None else str(cell)
    except (ValueError, RecursionError):  # an integer of more digits than str() writes
        return "9" * 5000


def _deep_json(rng: Random) -> str:
    depth = rng.choice((50, 1000, 3000, 100_000))
    opening, closing = rng.choice((('{"a":', "}"), ("[", "]"), ('{"label":[', "]}")))
    return '{"id":"deep","label":' + opening * depth + "1" + closing * depth + "}"


def _write_parquet(rng: Random, rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows column by column; one that Arrow cannot build from its cells holds them as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_array([row.get(name) for row in rows]) for name in names]
    for _ in range(rng.choice((0, 1, 1, 2)) if arrays else 0):
        number = rng.randrange(len(arrays))
        arrays[number] = odd_type(rng, arrays[number])
    if names and rng.random() < 0.1:
        names[rng.randrange(len(names))] = rng.choice(names)
    if names and rng.random() < 0.05:
        names[rng.randrange(len(names))] = rng.choice(EDGE_TEXTS)
    table = pa.Table.from_arrays(arrays, names=names)
    write_table(rng, table, path)


def write_table(rng: Random, table: pa.Table, path: Path) -> None:
    """Write a table by one of the ways that Parquet allows; what a way cannot hold is written as text."""
    options: dict[str, Any] = {
        "compression": rng.choice(COMPRESSIONS),
        "use_dictionary": rng.random() < 0.6,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "row_group_size": rng.choice((1, 5, 1000, 1000)),
        "write_statistics": rng.random() < 0.7,
    }
    try:
        pq.write_table(table, path, **options)
    except (pa.ArrowException, NotImplementedError):
        columns = [column if pa.types.is_primitive(column.type) else as_text(column) for column in table.columns]
        pq.write_table(pa.Table.from_arrays(columns, names=table.column_names), path)


def as_text(column: Any) -> pa.Array:
    """Return the cells of a column as strings, null as null."""
    cells = column.to_pylist()
    return pa.array([None if cell is None else _csv_cell(cell).replace("\ud800", "?") for cell in cells], pa.string())


def _array(cells: list[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError):
        return pa.array([None if cell is None else _csv_cell(cell).encode("utf-8", "replace").decode() for cell in cells])


ODD_TYPES: tuple[pa.DataType, ...] = (
    pa.null(),
    pa.bool_(),
    pa.int8(),
    pa.uint64(),
    pa.float16(),
    pa.float64(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary(4),
    pa.decimal128(20, 3),
    pa.date32(),
    pa.timestamp("ns", "UTC"),
    pa.time64("us"),
    pa.duration("s"),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.int64()),
    pa.list_(pa.string()),
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.float32(), 3),
    pa.list_(pa.list_(pa.float32())),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    pa.struct([("a", pa.int32())]),
    pa.map_(pa.string(), pa.int32()),
)


def odd_type(rng: Random, array: Any) -> pa.Array:
    """Return an array of the same length in another type: cast where that can be done, else of made-up values."""
    wanted = rng.choice(ODD_TYPES)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    try:
        return array.cast(wanted)
    except (pa.ArrowException, NotImplementedError):
        pass
    cells: list[Any] = [_cell_of(rng, wanted) if rng.random() < 0.8 else None for _ in range(len(array))]
    return pa.array(cells, wanted)


def _cell_of(rng: Random, wanted: pa.DataType) -> Any:
    """Return a value that an array of the type can hold."""
    if pa.types.is_dictionary(wanted):
        return _cell_of(rng, wanted.value_type)
    if pa.types.is_map(wanted):
        return [("k", 1)]
    if pa.types.is_struct(wanted):
        return {field.name: _cell_of(rng, field.type) for field in wanted}
    if pa.types.is_fixed_size_list(wanted):
        return [rng.choice((0.0, 1.5, float("nan"))) for _ in range(wanted.list_size)]
    if pa.types.is_list(wanted) or pa.types.is_large_list(wanted):
        return [_cell_of(rng, wanted.value_type) for _ in range(rng.choice((0, 1, 3)))]
    if pa.types.is_fixed_size_binary(wanted) and not pa.types.is_decimal(wanted):
        return rng.randbytes(wanted.byte_width)
    if pa.types.is_binary(wanted) or pa.types.is_large_binary(wanted):
        return rng.choice((b"", b"\xff\xfe", b"RIFF", b"\x89PNG\r\n\x1a\n", b"x"))
    if pa.types.is_string(wanted) or pa.types.is_large_string(wanted) or pa.types.is_string_view(wanted):
        return rng.choice(EDGE_TEXTS)
    if pa.types.is_boolean(wanted):
        return rng.random() < 0.5
    if pa.types.is_floating(wanted):
        return rng.choice((0.0, 0.5, 1.0, 2.0, -1.0, float("nan"), float("inf")))
    return None if pa.types.is_null(wanted) else pa.scalar(rng.choice((0, 1, 2)), pa.int8()).cast(pa.int64()).as_py() if pa.types.is_integer(wanted) else None


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
        path.write_text(_json_text(content), encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return audit_command(rng, "saved")


def _json_text(content: Any) -> str:
    try:
        return json.dumps(content)
    except (ValueError, RecursionError):
        return "9" * 5000


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
