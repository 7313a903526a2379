"""Tests of rows that are found by their ids: what a plain reading of all samples states, whatever the shards are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.columns import SPLITS
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import DatasetError
from mmaudit.audit.features.encode import EncodeTask, encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded, digest_texts, missing_in_source
from mmaudit.audit.features.found_rows import find_rows
from mmaudit.audit.hashing import IdIndex, hash_ids
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

N = 90
LABELS: dict[str, Callable[[int], Any]] = {
    "classification": lambda row: [3, 5, None, 9][row % 4],
    "multilabel": lambda row: ["a|b", "b", "", None, "c"][row % 5],
    "regression": lambda row: None if row % 7 == 0 else row / 3 - 10,
}


def write(folder: Path, **changes: list[Any]) -> Path:
    rng = np.random.default_rng(0)
    audio: list[Any] = rng.standard_normal((N, 4)).tolist()
    audio[4], audio[7] = None, [float("nan")] * 4
    columns: dict[str, list[Any]] = {
        "id": [f"s{row:03d}" for row in range(N)],
        "label": [LABELS["classification"](row) for row in range(N)],
        "label_name": [None if row % 3 else f"name {row % 4}" for row in range(N)],
        "split": [("train", "validation", "test")[row % 3] for row in range(N)],
        "audio": audio,
        "visual": rng.standard_normal((N, 3)).tolist(),
    }
    pq.write_table(pa.table({**columns, **changes}), folder / "data.parquet", row_group_size=20)
    return folder / "data.parquet"


def encode(path: Path, **settings: Any) -> tuple[Dataset, list[EncodeTask]]:
    dataset = open_dataset(path, DataConfig(**settings))
    folder = path.parent / "features"
    return dataset, encode_dataset(dataset, folder, media=MediaConfig(), num_workers=0, progress=no_progress)


def index_of(*names: str) -> IdIndex:
    return IdIndex.of(pa.array(names, pa.large_string()))


@pytest.mark.parametrize("task", LABELS)
def test_rows_are_those_of_a_plain_reading(task: str, tmp_path: Path) -> None:
    path = write(tmp_path, label=[LABELS[task](row) for row in range(N)])
    dataset, tasks = encode(path, task=task)
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    encoded = collect_encoded(dataset, samples, tasks)
    rows = np.random.default_rng(1).permutation(N)[:50]
    found = find_rows(dataset, tasks, index_of(*samples.sample_id[rows]))
    assert found.row.tolist() == rows.tolist()
    assert found.labels.label.tolist() == samples.label[rows].tolist()
    assert (found.labels.names, found.labels.outputs) == (samples.class_names, samples.outputs)
    if samples.values is None:
        assert found.labels.values is None
    else:
        np.testing.assert_array_equal(found.labels.values, samples.values[rows])
    assert found.split is not None
    assert [SPLITS[code] for code in found.split] == samples.split[rows].tolist()
    assert digest_texts(found.content).astype(str).tolist() == encoded.content[rows].tolist()
    for column, (usable, status) in enumerate(zip(found.usable, encoded.statuses, strict=True)):
        assert usable.usable.tolist() == status.usable.tolist()
        damaged = ~(status.usable | missing_in_source(status))
        assert found.damaged[:, column].tolist() == damaged[rows].tolist()
    assert found.usable[1].usable.strides == (0,)  # no memory where every row has the modality


def test_absent_ids_have_no_row(tmp_path: Path) -> None:
    dataset, tasks = encode(write(tmp_path))
    assert find_rows(dataset, tasks, index_of("s004", "x", "s000")).row.tolist() == [4, -1, 0]


def test_repeated_and_null_ids_raise(tmp_path: Path) -> None:
    names: list[Any] = [f"s{row:03d}" for row in range(N)]
    names[50] = "s004"
    dataset, tasks = encode(write(tmp_path, id=names))
    assert find_rows(dataset, tasks, index_of("s005")).row.tolist() == [5]
    with pytest.raises(DatasetError, match=r"1 ids are repeated in id \(s004\)"):
        find_rows(dataset, tasks, index_of("s005", "s004"))
    names[50] = names[51] = None
    dataset, tasks = encode(write(tmp_path, id=names))
    with pytest.raises(DatasetError, match="column 'id' has 2 rows without an id"):
        find_rows(dataset, tasks, index_of("s005"))


def test_cache_of_other_data_raises(tmp_path: Path) -> None:
    _, tasks = encode(write(tmp_path))
    dataset = open_dataset(write(tmp_path, id=[f"t{row:03d}" for row in range(N)]))
    with pytest.raises(DatasetError, match="the data changed while they were read"):
        find_rows(dataset, tasks, index_of("t005"))


def test_index_finds_ids_whatever_their_hashes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of which two have the same hash are hashed with another seed, and equal hashes of other ids do not match."""

    def weak(ids: pa.Array, *, seed: int, purpose: str) -> Any:
        return hash_ids(ids, seed=seed, purpose=purpose) % np.uint64(64)

    monkeypatch.setattr("mmaudit.audit.hashing.hash_ids", weak)
    index = index_of(*(f"id {row}" for row in range(6)))
    names = pa.array([f"id {row}" for row in reversed(range(200))])
    positions, places = index.find(names)
    assert sorted(positions.tolist()) == list(range(6))
    assert [names[place].as_py() for place in places.tolist()] == [f"id {row}" for row in positions.tolist()]
    with pytest.raises(ValueError, match="1 ids are repeated"):
        index_of("a", "b", "a")
