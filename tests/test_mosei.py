"""Tests of the CMU-MOSEI adapter: mean and standard deviation of real steps, for every padding and file format."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.downloads.ingest import Ingested, ingest
from mmaudit.audit.downloads.mosei import pool_series
from mmaudit.audit.errors import DatasetError

SHAPES = {"text": (5, 4), "audio": (7, 2), "vision": (3, 3)}


def make_split(ids: list[str], *, seed: int = 0, **fields: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    features = {name: rng.standard_normal((len(ids), *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return {"id": ids, **features, "regression_labels": np.linspace(-3, 3, len(ids), dtype=np.float32), **fields}


def write_pickle(root: Path, **parts: dict[str, Any]) -> Path:
    (root / "unaligned_50.pkl").write_bytes(pickle.dumps(parts))
    return root


def rows_of(ingested: Ingested) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(ingested.path).to_pylist()}


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    padding=st.sampled_from([0.0, np.nan]),
    pad_front=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_pooling_ignores_padding(lengths: list[int], padding: float, pad_front: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = np.full((len(lengths), 9, 2), padding)
    steps = [rng.standard_normal((length, 2)) + 5 for length in lengths]
    for row, real_steps in zip(series, steps, strict=True):
        row[9 - len(real_steps) :] = real_steps if pad_front else row[9 - len(real_steps) :]
        row[: len(real_steps)] = row[: len(real_steps)] if pad_front else real_steps
    vectors, empty = pool_series(series)
    assert empty.tolist() == [length == 0 for length in lengths]
    for vector, real_steps in zip(vectors, steps, strict=True):
        expected = [*real_steps.mean(axis=0), *real_steps.std(axis=0)] if len(real_steps) else [0.0] * 4
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


def test_pickle_gives_expected_rows(tmp_path: Path) -> None:
    train = make_split(["a$_$0", "a$_$1"], classification_labels=np.array([0.0, 2.0]))
    test = make_split(["c[3]"], seed=1, classification_labels=np.array([1.0]))
    ingested = ingest("mosei", write_pickle(tmp_path, train=train, valid={}, test=test))
    rows = rows_of(ingested)
    assert {name: (row["label"], row["group"], row["split"]) for name, row in rows.items()} == {
        "a$_$0": (0, "a", "train"),
        "a$_$1": (2, "a", "train"),
        "c[3]": (1, "c", "test"),
    }
    assert [rows[name]["sentiment"] for name in ("a$_$0", "a$_$1")] == [-3.0, 3.0]
    np.testing.assert_allclose(rows["a$_$1"]["audio"][:2], train["audio"][1].mean(axis=0), rtol=1e-5)
    assert ingested.message == "you have 3 of 3"
    dataset = open_dataset(ingested.path)
    modalities = [(modality.name, modality.kind, modality.length) for modality in dataset.modalities]
    assert modalities == [("text", "features", 8), ("audio", "features", 4), ("vision", "features", 6)]


def test_label_is_sign_of_sentiment_without_classes(tmp_path: Path) -> None:
    scores = np.array([[[-0.2]], [[0.0]], [[2.6]], [[np.nan]]])
    mult = make_split(["a[0]", "a[1]", "b[0]", "b[1]"])
    del mult["regression_labels"]
    ingested = ingest("mosei", write_pickle(tmp_path, train={**mult, "labels": scores}))
    assert [row["label"] for row in rows_of(ingested).values()] == ["negative", "neutral", "positive", None]
    assert "no classes in the file: the label is the sign of the sentiment" in ingested.notes


def test_ids_given_as_rows_become_one_string(tmp_path: Path) -> None:
    ids: Any = np.array([[b"xyz", b"0.5", b"7.25"], [b"xyz", b"8.0", b"9.5"]])
    rows = rows_of(ingest("mosei", write_pickle(tmp_path, test=make_split(ids))))
    assert {name: row["group"] for name, row in rows.items()} == {"xyz[0.5,7.25]": "xyz", "xyz[8.0,9.5]": "xyz"}


def test_utterance_without_steps_is_missing_and_nan_is_kept(tmp_path: Path) -> None:
    train = make_split(["a$_$0", "a$_$1", "b$_$0"])
    train["vision"][0] = 0
    train["audio"][2, 1, 0] = np.nan
    train["audio"][2, 2, 1] = -np.inf
    ingested = ingest("mosei", write_pickle(tmp_path, train=train))
    rows = rows_of(ingested)
    assert rows["a$_$0"]["vision"] is None
    assert np.isnan(rows["b$_$0"]["audio"][0])
    assert not np.isfinite(rows["b$_$0"]["audio"][1])
    assert np.isfinite(rows["b$_$0"]["vision"]).all()
    assert ingested.message.startswith("you have 2 of 3; missing: vision 1 (such as a$_$0)")


@pytest.mark.parametrize("split_field", [True, False])
def test_npz_gives_same_table_as_pickle(tmp_path: Path, split_field: bool) -> None:
    train, test = make_split(["a$_$0", "a$_$1"]), make_split(["c$_$0"], seed=1)
    (tmp_path / "pickle").mkdir()
    expected = ingest("mosei", write_pickle(tmp_path / "pickle", train=train, test=test)).path.read_bytes()
    folder = tmp_path / "npz"
    folder.mkdir()
    if split_field:
        fields: dict[str, Any] = {name: np.concatenate([train[name], test[name]]) for name in train}
        np.savez(folder / "all.npz", split=np.array(["train", "train", "test"]), **fields)
    else:
        np.savez(folder / "train.npz", **train)
        np.savez(folder / "test.npz", **test)
    assert ingest("mosei", folder).path.read_bytes() == expected


def test_two_pickles_require_selection(tmp_path: Path) -> None:
    write_pickle(tmp_path, train=make_split(["a$_$0"]))
    aligned = (tmp_path / "unaligned_50.pkl").rename(tmp_path / "aligned_50.pkl")
    write_pickle(tmp_path, train=make_split(["b$_$0"]))
    with pytest.raises(DatasetError, match=r"contains 2 pickles \(aligned_50\.pkl, unaligned_50\.pkl\): select one"):
        ingest("mosei", tmp_path)
    assert list(rows_of(ingest("mosei", tmp_path, lists=[aligned]))) == ["a$_$0"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"audio": np.zeros((1, 7, 2))}, r"the fields differ in length: .*'audio': 1"),
        ({"audio": np.zeros(2)}, r"audio has the shape \(2,\), expected \(n, t, d\) or \(n, d\)"),
        ({"audio": [["loud"], ["low"]]}, "audio is not an array of numbers"),
        ({"id": ["a$_$0", "a$_$0"]}, r"1 duplicate ids, such as a\$_\$0"),
        ({"regression_labels": np.zeros((2, 6))}, r"regression_labels has the shape \(2, 6\)"),
        ({"classification_labels": np.array([0.5, 1])}, "classification_labels must be one integer per row"),
    ],
)
def test_invalid_fields_raise_error(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        ingest("mosei", write_pickle(tmp_path, train=make_split(["a$_$0", "a$_$1"], **fields)))


def test_missing_fields_raise_error(tmp_path: Path) -> None:
    for name in ("audio", "regression_labels"):
        incomplete = make_split(["a$_$0"])
        del incomplete[name]
        with pytest.raises(DatasetError, match=rf"unaligned_50\.pkl, train: no field .*{name}; available: id, "):
            ingest("mosei", write_pickle(tmp_path, train=incomplete))


def test_splits_with_different_feature_lengths_raise_error(tmp_path: Path) -> None:
    test = make_split(["c$_$0"], audio=np.ones((1, 7, 3), dtype=np.float32))
    with pytest.raises(DatasetError, match="the other splits differ in the length of features"):
        ingest("mosei", write_pickle(tmp_path, train=make_split(["a$_$0"]), test=test))


def test_other_content_raises_error(tmp_path: Path) -> None:
    path = tmp_path / "one.pkl"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DatasetError, match=r"one\.pkl is not a dictionary of splits, each a dictionary of id, text"):
        ingest("mosei", tmp_path)
    path.unlink()
    np.savez(tmp_path / "train.npz", id=np.array([{}], dtype=object))
    with pytest.raises(DatasetError, match=r"train\.npz cannot be read as \.npz of plain arrays"):
        ingest("mosei", tmp_path)
