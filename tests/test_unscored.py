"""Tests of training without scores: the same samples in any order, and refusals of methods that read scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table

from mmaudit.audit import row_arrays
from mmaudit.audit.dataset.columns import SPLITS
from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.engine import row_data
from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.audit.engine.row_data import EncodedData, read_encoded
from mmaudit.audit.engine.selection import fingerprint
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded, select_usable
from mmaudit.audit.hashing import canonical_order
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress
from mmaudit.rebalance.manifest import COLUMNS
from mmaudit.train.config import FinetuneConfig, TrainConfig
from mmaudit.train.methods import resolve
from mmaudit.train.sampling import SAMPLERS
from mmaudit.train.unscored import check_without_scores, unscored_manifest

COMMANDS = ("mmaudit score data", "mmaudit split --name all")


def encoded(path: Path, folder: Path, config: DataConfig | None = None) -> EncodedData:
    dataset = open_dataset(path, config)
    tasks = encode_dataset(dataset, folder, media=MediaConfig(), num_workers=0, progress=no_progress)
    return read_encoded(dataset, tasks, seed=0, test_fraction=0.2)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classes": ({}, {}),
    "groups": ({"speaker": [None if row % 9 == 0 else f"g{row % 7}" for row in range(40)]}, {"group": "speaker"}),
    "splits": ({"split": [SPLITS[row % 3] for row in range(40)]}, {}),
    "numbers": ({"label": [None if row == 3 else row / 7 for row in range(40)]}, {"task": "regression"}),
    "label sets": ({"label": [["x"], ["x", "y"], [], ["y"]] * 10}, {"task": "multilabel"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_manifest_has_the_rows_of_plain_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several parts and slices; one row repeats another's content."""
    columns, settings = CASES[name]
    table = pa.table(gaussian_table(num_samples=40).to_pydict() | columns)
    table = pa.concat_tables([table, table.slice(5, 1).set_column(0, "id", pa.array(["copy"]))])
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=6)
    monkeypatch.setattr(row_arrays, "CHUNK_ROWS", 7)
    monkeypatch.setattr(row_data, "PartsConfig", lambda: PartsConfig(rows=10))
    config = DataConfig(**settings)
    columnar = encoded(tmp_path / "data.parquet", tmp_path / "f", config)
    manifest, quarantined = unscored_manifest(columnar, keep_duplicates=False)
    dataset = open_dataset(tmp_path / "data.parquet", config)
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    plain = collect_encoded(dataset, samples, list(columnar.tasks))
    rows, left_out = select_usable(plain, keep_duplicates=False)
    rows = rows[canonical_order(samples.sample_id[rows])]
    expected = {
        "sample_id": samples.sample_id[rows],
        "label": samples.label[rows],
        "label_name": np.array(samples.class_names, dtype=object)[samples.label[rows]],
        "split": samples.split[rows],
        "content": plain.content[rows],
        "group": [None] * len(rows) if samples.group is None else samples.group[rows],
    }
    for column, values in expected.items():
        assert manifest.table[column].to_pylist() == list(values), column
    assert {name: manifest.table[name].type for name in manifest.table.column_names} == COLUMNS
    assert sorted(quarantined, key=str) == sorted(left_out, key=str)
    assert fingerprint(columnar) == plain.fingerprint


def test_row_order_does_not_change_the_samples(tmp_path: Path) -> None:
    table = gaussian_table(num_samples=40)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(40)), tmp_path / "b.parquet")
    first, second = (
        unscored_manifest(encoded(tmp_path / f"{name}.parquet", tmp_path / name), keep_duplicates=False)[0]
        for name in "ab"
    )
    assert first.table.equals(second.table)
    assert first.digest() == second.digest()
    assert set(first.strings("sample_id")) == set(table["id"].to_pylist())
    assert np.isnan(first.numbers("discrepancy")).all()


def test_every_sample_is_used_or_quarantined(tmp_path: Path) -> None:
    table = gaussian_table(num_samples=40)
    label = table["label"].to_pylist()
    label[3] = None
    pq.write_table(table.set_column(1, "label", [label]), tmp_path / "data.parquet")
    manifest, quarantined = unscored_manifest(encoded(tmp_path / "data.parquet", tmp_path / "f"), keep_duplicates=False)
    assert [row.sample_id for row in quarantined] == ["s0003"]
    assert len(manifest) == 39


def test_labels_splits_and_contents_change_the_digest(tmp_path: Path, planted: Callable[..., Path]) -> None:
    samples = encoded(planted(num_samples=40), tmp_path / "f")
    digests = {unscored_manifest(samples, keep_duplicates=False)[0].digest()}
    swapped = samples.samples.split.copy()
    swapped[0] = SPLITS.index("validation")
    changed = replace(samples, samples=replace(samples.samples, split=swapped))
    digests.add(unscored_manifest(changed, keep_duplicates=False)[0].digest())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("options", "sections", "reason"),
    [
        ({"sampling": "bss-h"}, {}, "--sampling bss-h orders samples by their scores"),
        ({"sampling": "anti-curriculum"}, {}, "--sampling anti-curriculum orders"),
        ({"sampling": "balanced-first"}, {}, "--sampling balanced-first orders"),
        ({"sampling": "posterior"}, {}, "--sampling posterior orders"),
        ({"sampling": "bss-l"}, {"bss": {"score_source": "manifest"}}, "--sampling bss-l orders"),
        ({"keep_posterior": 0.5}, {}, r"--keep-posterior 0.5 selects samples by P\(balanced\)"),
    ],
)
def test_methods_that_read_scores_are_refused_with_the_commands(
    options: dict[str, Any], sections: dict[str, Any], reason: str
) -> None:
    config = TrainConfig(finetune=FinetuneConfig(**options), sampling=sections)
    with pytest.raises(ConfigError, match=rf"{reason}.*mmaudit score data && mmaudit split --name all.*--manifest all"):
        check_without_scores(config, commands=COMMANDS)


def test_all_other_samplers_train_without_scores() -> None:
    allowed = []
    for name in SAMPLERS:
        config = TrainConfig(finetune=FinetuneConfig(sampling=name))
        try:
            check_without_scores(config, commands=COMMANDS)
        except ConfigError:
            continue
        allowed.append(name)
        assert not resolve(config).sampler.reads_scores(resolve(config).sampler_config)
    assert set(allowed) >= {"uniform", "bss-l", "dus-h", "dus-rl", "smv", "class-balanced"}
