"""Declared features: what `datasets` writes about its columns is read from the schema."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from datasets import Audio, ClassLabel, Features, Image, Sequence, Value, Video

from mmaudit.audit.dataset.labels import declared_classes, declared_kind

FEATURES = Features(
    {
        "sound": Audio(sampling_rate=16_000, decode=False),
        "sight": Image(),
        "film": Video(),
        "label": ClassLabel(names=["cat", "dog"]),
        "labels": Sequence(ClassLabel(names=["a", "b", "c"])),  # from datasets 4 on this is a List
        "text": Value("string"),
    }
)


def test_features_written_by_datasets_are_read() -> None:
    schema = FEATURES.arrow_schema
    assert [declared_kind(schema, name) for name in FEATURES] == ["audio", "image", "video", None, None, None]
    assert declared_classes(schema, "label") == ("cat", "dog")
    assert declared_classes(schema, "labels") == ("a", "b", "c")
    assert declared_classes(schema, "text") == ()
    assert declared_classes(schema, "none") == ()


def schema_saying(features: object) -> pa.Schema:
    return pa.schema([("x", pa.int64())], metadata={"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize(
    "entry",
    [
        {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a"]}},
        [{"_type": "ClassLabel", "names": ["a"]}],
        {"_type": "ClassLabel", "names": ["a"]},
    ],
)
def test_features_of_older_versions_are_read(entry: object) -> None:
    assert declared_classes(schema_saying({"x": entry}), "x") == ("a",)


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([("x", pa.int64())]),
        pa.schema([("x", pa.int64())], metadata={"huggingface": "{no json"}),
        pa.schema([("x", pa.int64())], metadata={"huggingface": "[1]"}),
        schema_saying([]),
        schema_saying({"x": 3}),
        schema_saying({"x": []}),
        schema_saying({"x": {"_type": "ClassLabel", "num_classes": 3}}),
    ],
)
def test_malformed_metadata_declares_nothing(schema: pa.Schema) -> None:
    assert declared_kind(schema, "x") is None
    assert declared_classes(schema, "x") == ()
