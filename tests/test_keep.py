"""Tests of the predicate that keeps the samples of a manifest in a stream."""

from __future__ import annotations

import logging
import pickle

import pytest
from manifests import make_manifest

import mmaudit
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError
from mmaudit.rebalance.curriculum import split_rows
from mmaudit.train.config import FinetuneConfig


def test_only_training_samples_are_kept_unless_others_are_named() -> None:
    manifest = make_manifest()
    splits = dict(zip(manifest.strings("sample_id"), manifest.strings("split"), strict=True))
    for split in ("train", "validation", "test", ("train", "test")):
        predicate = mmaudit.keep(manifest, split=split)
        kept = {name for name in [*splits, "unknown"] if predicate({"sample_id": name})}
        assert kept == {name for name, value in splits.items() if value in split}
    assert mmaudit.keep(manifest) == mmaudit.keep(manifest, split="train")


@pytest.mark.parametrize(
    ("id_of", "sample"),
    [
        (None, {"sample_id": "s000"}),
        (None, {"__key__": "s000"}),
        ("clip", {"clip": "s000"}),
        (lambda s: s[1], (0, "s000")),
    ],
)
def test_the_id_is_read_from_a_field_or_by_a_function(id_of: object, sample: object) -> None:
    assert mmaudit.keep(make_manifest(), id_of=id_of)(sample)  # type: ignore[arg-type]


def test_a_sample_without_the_field_raises_and_names_the_fields() -> None:
    with pytest.raises(DatasetError, match=r"no field clip.*\(text, label\)"):
        mmaudit.keep(make_manifest(), id_of="clip")({"text": "", "label": 0})
    with pytest.raises(DatasetError, match="type tuple"):
        mmaudit.keep(make_manifest())((1, 2))


def test_a_predicate_is_equal_after_pickling() -> None:
    predicate = mmaudit.keep(make_manifest(), id_of="clip")
    assert pickle.loads(pickle.dumps(predicate)) == predicate


def test_the_validation_split_that_is_cut_is_that_of_finetune(caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_manifest(splits=("train", "train", "train", "test"))
    fraction = FinetuneConfig().validation_fraction
    with caplog.at_level(logging.WARNING, "mmaudit"):
        train, validation = (mmaudit.keep(manifest, split=name).ids for name in ("train", "validation"))
    assert "4 of its 45 training rows are cut" in caplog.text
    assert (len(train), len(validation), train & validation) == (41, 4, frozenset())
    assert train == mmaudit.keep(manifest, validation_fraction=fraction).ids
    assert len(mmaudit.keep(manifest, validation_fraction=0)) == 45


def test_wrong_splits_raise() -> None:
    manifest = make_manifest(splits=("train",))
    with pytest.raises(ConfigError, match=r"'val'.*validation"):
        mmaudit.keep(manifest, split="val")
    with pytest.raises(ManifestError, match="no rows of split test"):
        mmaudit.keep(manifest, split="test")
    with pytest.raises(ConfigError, match="validation_fraction"):
        split_rows(manifest.table, "train", validation_fraction=1.0, seed=0)
