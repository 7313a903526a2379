"""What a score table looks like: the types of its columns, and the metadata that it carries."""

from __future__ import annotations

import pyarrow as pa

from .errors import ScoreError
from .json_text import Shape

_MODALITY: Shape = {"name": str, "column": str, "kind": str, "encoder": str, "length": (int, type(None))}
PROVENANCE: Shape = {
    "schema": str,
    "version": str,
    "fingerprint": (str, type(None)),
    "config": {
        "seed": int,
        "data": {"allow_outside": bool},
        "media": {},
        "probe": {"learn_from": str},
        "network": {"width": float},
        "mixture": {},
    },
    "modalities": [_MODALITY],
    "columns": {},
    "paths": [str],
    "ranges": {},
}
_NAMING = ("sample_id", "label", "label_name", "split", "group", "content")  # a text or a number a row


def check_score_schema(schema: pa.Schema, *, where: str, paths: tuple[str, ...] = ()) -> None:
    """Raise ScoreError for names, ids, labels and paths that are neither texts nor numbers."""
    for name in (*_NAMING, *paths):
        type_ = schema.field(name).type if name in schema.names else pa.null()
        dated = name == "label" and pa.types.is_temporal(type_)
        if dated or not _is_text_or_number(type_):
            raise ScoreError(f"{where}: column {name} holds {type_}; it takes one text or number a row")


def _is_text_or_number(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text_or_number(type_.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_date,
        pa.types.is_timestamp,
        pa.types.is_null,
    )
    return any(test(type_) for test in tests)
