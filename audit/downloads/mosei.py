"""Adapter of CMU-MOSEI and CMU-MOSI: features of utterances, pooled over time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..media.files import LFS_HINT, is_lfs_pointer_file
from .clips import Listing, unexpected_folder
from .lists import split_of, visible_files
from .names import parse_clip_name
from .unpickle import read_npz, read_pickle

MODALITIES = ("text", "audio", "vision")
_FIELDS = ("id", *MODALITIES)
_SENTIMENT = ("regression_labels", "labels")
_BLOCK = 256  # utterances summed at once: 256 x 500 steps x 74 features in float64 are 76 MB
_MAX_ID_ITEMS = 16
_SUFFIXES = (".npz", ".pkl")
_NUMBERED = re.compile(r"(\d+)_\d+")  # ids such as 209758_3 of videos that are not from YouTube
_MAX_SHOWN = 200  # characters of a message
_SIGNS = ("negative", "neutral", "positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The utterances of one split, with the fields as stored."""

    where: str
    split: str
    fields: Mapping[str, Any]


def read_mosei(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read the features of the MMSA and MulT files: a pickle {split: {field: array}}, or .npz files of such fields.

    A series (n, t, d) is pooled to the mean and standard deviation of its real steps, (n, 2 d); steps that are all zero
    or all NaN are padding, and the vector of an utterance without real steps is null. The label is the class if the
    file has classes, else the sign of the sentiment; the video is the group.
    """
    paths = lists or _find_files(folder)
    parts = [part for path in paths for part in _read_parts(path)]
    if not parts:
        raise DatasetError(f"{paths[0]} contains no utterance: all of its splits are empty")
    for part in parts:
        _check_fields(part)
    tables = [_table(part) for part in parts]
    if any(table.schema != tables[0].schema for table in tables):
        raise DatasetError(f"{parts[0].where} and the other splits differ in the length of features or kind of labels")
    # Not fixed-size lists in the file: pyarrow before 26 cannot read those with nulls back from Parquet.
    types = [pa.list_(pa.float32()) if field.name in MODALITIES else field.type for field in tables[0].schema]
    rows = pa.concat_tables(tables).cast(pa.schema(zip(tables[0].schema.names, types, strict=True)))
    _check_ids(rows["id"].to_pylist(), folder)
    labels_are_signs = "classification_labels" not in parts[0].fields
    notes = ("no classes in the file: the label is the sign of the sentiment",) if labels_are_signs else ()
    return Listing(rows=rows, media=MODALITIES, notes=notes)


def _find_files(folder: Path) -> list[Path]:
    for subfolder in (folder, folder / "Processed"):
        paths = visible_files(subfolder)
        feature_files = next((files for suffix in _SUFFIXES if (files := [p for p in paths if p.suffix == suffix])), [])
        if len(feature_files) > 1 and feature_files[0].suffix == ".pkl":
            names = ", ".join(path.name for path in feature_files)
            raise DatasetError(f"{subfolder} contains {len(feature_files)} pickles ({names}): select one with --list")
        if feature_files:
            return feature_files
    raise unexpected_folder(folder, "CMU-MOSEI", missing="unaligned_50.pkl, other .pkl, or .npz")


def _read_parts(path: Path) -> list[_Part]:
    if is_lfs_pointer_file(path):
        raise DatasetError(f"{path}: {LFS_HINT}")
    if path.suffix == ".npz":
        return _read_npz_parts(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or not content or not all(isinstance(part, dict) for part in content.values()):
        raise DatasetError(f"{path} is not a dictionary of splits, each a dictionary of {', '.join(_FIELDS)}")
    return [
        _Part(where=f"{path}, {name}", split=split_of(Path(str(name))), fields=fields)
        for name, fields in content.items()
        if len(fields)
    ]


def _read_npz_parts(path: Path) -> list[_Part]:
    """Read an .npz of one split, inferred from its name, or of several, given by its field `split`."""
    fields = read_npz(path)
    if "split" not in fields:
        return [_Part(where=str(path), split=split_of(path), fields=fields)]
    names = fields.pop("split").astype(str)
    if names.ndim != 1:
        raise DatasetError(f"{path}: split has the shape {names.shape}, expected (n,)")
    if mismatched := next((name for name, value in fields.items() if np.shape(value)[:1] != names.shape), None):
        num_rows = (np.shape(fields[mismatched]) or ("no",))[0]
        raise DatasetError(f"{path}: field {mismatched!r} has {num_rows} rows, split has {len(names)}")
    parts = []
    for name in sorted(set(names.tolist())):
        part_fields = {key: value[names == name] for key, value in fields.items()}
        parts.append(_Part(where=f"{path}, {name}", split=split_of(Path(name)), fields=part_fields))
    return parts


def _check_fields(part: _Part) -> None:
    missing = [name for name in _FIELDS if name not in part.fields]
    if not any(name in part.fields for name in ("classification_labels", *_SENTIMENT)):
        missing.append("classification_labels or regression_labels")
    if missing:
        raise DatasetError(f"{part.where}: no field {missing[0]}; available: {', '.join(map(str, part.fields))}")
    names = [*_FIELDS, *(name for name in ("classification_labels", *_SENTIMENT) if name in part.fields)]
    for name in names:
        value = part.fields[name]
        if not isinstance(value, (list, tuple, np.ndarray)) or (isinstance(value, np.ndarray) and not value.ndim):
            raise DatasetError(f"{part.where}: {name} is of type {type(value).__name__}, expected an array or list")
    lengths = {name: len(part.fields[name]) for name in names}
    if not lengths["id"]:
        raise DatasetError(f"{part.where}: it contains no utterance; leave the split out")
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"{part.where}: the fields differ in length: {lengths}")


def _check_ids(ids: Sequence[str], folder: Path) -> None:
    duplicates = [name for name, count in Counter(ids).items() if count > 1]
    if duplicates:
        raise DatasetError(
            f"{folder}: {len(duplicates)} duplicate ids, such as {duplicates[0]}: each utterance must be one row"
        )


def _table(part: _Part) -> pa.Table:
    try:
        ids = pa.array([_format_id(value, part.where) for value in part.fields["id"]], pa.string()).to_pylist()
    except ValueError as error:  # halves of surrogate pairs, integers of thousands of digits
        raise DatasetError(f"{part.where}: an id cannot be written as text: {error}") from error
    sentiment = next((_sentiment_scores(part, name) for name in _SENTIMENT if name in part.fields), None)
    columns: dict[str, Any] = {
        "id": pa.array(ids, pa.string()),
        "label": _labels(part, sentiment),
        "group": pa.array([_video(name) for name in ids], pa.string()),
        "split": pa.array([part.split] * len(ids), pa.string()),
    }
    if sentiment is not None:
        columns["sentiment"] = pa.array(sentiment, pa.float32())
    columns |= {name: _vectors(part, name) for name in MODALITIES}
    return pa.table(columns)


def _format_id(value: Any, where: str) -> str:
    """Return an id as one string; MulT's ids are rows (video, start, end), some of them in bytes."""
    items = value.ravel().tolist() if isinstance(value, np.ndarray) else value
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    if not 0 < len(items) <= _MAX_ID_ITEMS or not all(isinstance(item, (str, bytes, int, float)) for item in items):
        raise DatasetError(f"{where}: an id is of type {type(value).__name__}, expected a name or a row of names")
    parts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in items]
    return parts[0] if len(parts) == 1 else f"{parts[0]}[{','.join(parts[1:])}]"


def _video(name: str) -> str:
    """Return the video of an utterance: VIDEO$_$3, VIDEO[3], or VIDEO_3 where VIDEO is a YouTube id or a number."""
    video = name.split("$_$")[0].split("[")[0]
    if (clip := parse_clip_name(video)) is not None:
        return clip.video
    match = _NUMBERED.fullmatch(video)
    return match[1] if match else video


def _sentiment_scores(part: _Part, name: str) -> NDArray[np.float32]:
    scores = _numbers(part, name)
    if scores.size != len(scores):
        raise DatasetError(f"{part.where}: {name} has the shape {scores.shape}, expected one sentiment per row")
    return scores.reshape(-1).astype(np.float32)


def _labels(part: _Part, sentiment: NDArray[np.float32] | None) -> pa.Array:
    """Return the classes as integers, or the sign of the sentiment in words, null where that is NaN."""
    if "classification_labels" not in part.fields:
        assert sentiment is not None  # checked by _check_fields
        signs = np.sign(sentiment)
        return pa.array([None if np.isnan(sign) else _SIGNS[int(sign) + 1] for sign in signs], pa.string())
    classes = _numbers(part, "classification_labels").reshape(-1)
    if len(classes) != len(part.fields["id"]) or not np.array_equal(classes, np.round(classes)):
        raise DatasetError(f"{part.where}: classification_labels must be one integer per row")
    return pa.array(classes.astype(np.int64), pa.int64())


def _numbers(part: _Part, name: str) -> NDArray[Any]:
    values = part.fields[name]
    try:
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            return values
        return np.asarray(values, dtype=np.float64)  # without dtype, numpy would first build a wide array of texts
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error)[:_MAX_SHOWN]
        raise DatasetError(f"{part.where}: {name} is not an array of numbers: {reason}") from error


def _vectors(part: _Part, name: str) -> pa.Array:
    values = _numbers(part, name)
    if values.ndim not in (2, 3) or 0 in values.shape[1:]:
        raise DatasetError(f"{part.where}: {name} has the shape {values.shape}, expected (n, t, d) or (n, d)")
    if values.ndim == 2:
        vectors, empty = values.astype(np.float32), np.zeros(len(values), dtype=bool)
    else:
        blocks = [pool_series(values[start : start + _BLOCK]) for start in range(0, len(values), _BLOCK)]
        vectors, empty = (np.concatenate(column) for column in zip(*blocks, strict=True))
    length = vectors.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), length, mask=pa.array(empty))


def pool_series(series: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Compute mean and standard deviation (n, 2 d) over the real steps of a series (n, t, d), and a mask (n,) of none.

    A step of all zeros or all NaN is padding; NaN or infinity within a real step propagates to the result.
    """
    series = series.astype(np.float64)
    is_real = ~((series == 0).all(axis=2) | np.isnan(series).all(axis=2))
    count = np.maximum(is_real.sum(axis=1), 1)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.where(is_real[:, :, None], series, 0).sum(axis=1) / count
        square = np.where(is_real[:, :, None], (series - mean[:, None]) ** 2, 0).sum(axis=1) / count
        return np.concatenate([mean, np.sqrt(square)], axis=1).astype(np.float32), ~is_real.any(axis=1)
