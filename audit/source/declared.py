"""What does a schema itself say of its columns? The `huggingface` features, as `datasets` writes them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ..json_text import parse_data_json

_KINDS = {"Audio": "audio", "Image": "image", "Video": "video"}


def declared_kind(schema: pa.Schema, column: str) -> str | None:
    """Give the kind of medium that a column is declared to hold: audio, image, video, or None."""
    return _KINDS.get(str(_feature(schema, column).get("_type")))


def declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Give the names of the classes that a column numbers from 0, or that its lists do; () where it has none."""
    feature = _feature(schema, column)
    while isinstance(feature.get("feature"), dict):  # a list or sequence of labels
        feature = feature["feature"]
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _feature(schema: pa.Schema, column: str) -> dict[str, Any]:
    """Give the entry of a column; {} where the schema has none, or one that cannot be read."""
    try:
        about = parse_data_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = about["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return {}
    if isinstance(found, list):  # as older versions write a list of one feature
        found = {"feature": found[0]} if found else {}
    return found if isinstance(found, dict) else {}
