"""Tests of predictions by columns: in memory and in a file they are those of `predict`, and have the same metrics."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from training import build_training_data, make_examples

from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.evaluate import compute_metrics, evaluate_network, values_by_set
from mmaudit.train.examples import Examples
from mmaudit.train.network import FusionNet
from mmaudit.train.predictions import Predictions, class_predictions, predict
from mmaudit.train.store import Store
from mmaudit.train.training_data import NetworkReader


@pytest.fixture
def reader() -> NetworkReader:
    training_data, net = build_training_data(make_examples(400))
    return NetworkReader(training_data, net)


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_predictions_by_columns_are_those_of_predict(reader: NetworkReader, tmp_path: Path, max_bytes: int) -> None:
    examples = make_examples(400)
    rows = examples.rows("test")
    arrays = predict(reader, rows, examples.modalities)
    with class_predictions(reader, rows, examples.modalities, folder=tmp_path, max_bytes=max_bytes) as (columns, _):
        assert list(tmp_path.iterdir()) == []  # the file has no name
        check_equal(reader, rows, examples, arrays, columns)


def test_the_tested_prediction_is_correct_where_values_by_set_are_one(reader: NetworkReader, tmp_path: Path) -> None:
    rows = reader.training_data.test
    values = values_by_set(reader, rows, seed=0)
    with class_predictions(reader, rows, ("audio", "visual"), sets=list(values), folder=tmp_path) as (_, correct):
        assert list(correct) == list(values)
        for modality_set, mask in correct.items():
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, values[modality_set])
    assert 0 < values[frozenset({0, 1})].mean() < 1


def test_a_full_disk_is_named(reader: NetworkReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, content: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def rollover(self) -> None:
            """Do nothing."""

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda **options: Full())
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        class_predictions(
            reader, reader.training_data.test, ("audio", "visual"), folder=tmp_path, max_bytes=0
        ).__enter__()
    assert caught.value.filename == str(tmp_path)


def check_equal(
    reader: NetworkReader,
    rows: RowIndex,
    examples: Examples,
    arrays: dict[str, NDArray[np.float32]],
    files: dict[str, Predictions],
) -> None:
    assert arrays.keys() == files.keys()
    for name, scores in arrays.items():
        columns = np.stack([files[name].column(index) for index in range(files[name].num_classes)], axis=1)
        np.testing.assert_array_equal(columns, scores)
        np.testing.assert_array_equal(files[name].predicted, scores.argmax(axis=1))
        np.testing.assert_array_equal(files[name].confidence, scores.max(axis=1))
        assert compute_metrics(files[name], examples.label[rows]) == compute_metrics(scores, examples.label[rows])
    results = [
        evaluate_network(reader, rows, examples, between="audio:visual", seed=0, predictions=predictions)
        for predictions in (None, files)
    ]
    assert results[0] == results[1]


def test_selected_predictions_are_those_of_the_rows() -> None:
    probability = np.random.default_rng(0).dirichlet(np.ones(3), 20).astype(np.float32)
    rows = np.arange(20) % 3 == 0
    selected = Predictions.of(probability).select(rows)
    expected = Predictions.of(probability[rows])
    np.testing.assert_array_equal(selected.predicted, expected.predicted)
    for index in range(3):
        np.testing.assert_array_equal(selected.column(index), expected.column(index))


class Backwards(Store):
    """A store whose files hold the rows in the opposite order."""

    def reading_order(self, rows: RowIndex) -> RowIndex:
        return np.argsort(-rows, kind="stable")


def test_samples_that_are_read_in_another_order_keep_theirs(reader: NetworkReader) -> None:
    examples = make_examples(400)
    rows = examples.rows("train")
    values = predict(reader, rows, examples.modalities)
    object.__setattr__(
        reader.training_data, "store", Backwards(examples.inputs, device="cpu", max_bytes=0, read_ahead_bytes=1 << 20)
    )
    assert isinstance(reader.net, FusionNet)
    for name, scores in predict(reader, rows, examples.modalities).items():
        np.testing.assert_allclose(scores, values[name], atol=1e-6)
