"""Tests of Diagnosing & Re-learning: purity and re-initialisation by hand, when it diagnoses, and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info
from torch import Tensor
from training import QUICK, fine_tune, make_examples, model_bytes, stop_after, with_options

from mmaudit.train.balancing.relearning import Relearning, RelearningConfig, cluster_purity, purity
from mmaudit.train.batches import ModelReader, OutputFunction
from mmaudit.train.config import OptimConfig
from mmaudit.train.methods import check_schedule, resolve
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

LABEL = np.array([0, 0, 1, 1])
# k-means finds the two groups of each: (0, 1), (2, 3) or (0, 2), (1, 3); purities 1 and 1/2.
APART = np.array([[1.0, 0], [1.1, 0], [9, 0], [9.1, 0]], np.float32)
CROSSED = APART[[0, 2, 1, 3]]


class FixedReader:
    """Model reader of given features on training and validation samples, two modalities of two features each."""

    def __init__(self, train: list[np.ndarray[Any, Any]], validation: list[np.ndarray[Any, Any]]) -> None:
        self.features, self.num_train, self.num_reads = (train, validation), len(LABEL), 0

    def _read(self, function: OutputFunction, features: list[np.ndarray[Any, Any]]) -> Tensor:
        self.num_reads += 1
        outputs = Outputs(torch.zeros(4, 2), None, tuple(torch.from_numpy(f) for f in features))
        return function(outputs, torch.from_numpy(LABEL)).float()

    def read(self, function: OutputFunction, *, rows: Any) -> Tensor:
        assert rows.tolist() == [0, 1, 2, 3]
        return self._read(function, self.features[0])

    def read_validation(self, function: OutputFunction) -> Tensor:
        return self._read(function, self.features[1])


def build_method(**changes: Any) -> Relearning:
    torch.manual_seed(0)
    shapes, classes = ((3,), (4,)), ("a", "b")
    net = FusionNet(ModelConfig(modalities=("audio", "visual"), shapes=shapes, classes=classes, hidden=2))
    optimization = Optimization(net, OptimConfig(), device="cpu", distributed=SINGLE_PROCESS)
    return Relearning(net, optimization, RelearningConfig(**changes), epochs=100)


def begin_epoch(method: Relearning, epoch: int, reader: FixedReader) -> None:
    method.begin_epoch(epoch, cast(ModelReader, reader))


def test_purity_by_hand() -> None:
    # Cluster 0 has classes 0, 0, 1, cluster 1 has 1, 1, 2: two of three each are of the most frequent class.
    assert purity(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 2])) == pytest.approx(4 / 6)
    assert purity(np.array([1, 0, 1, 0]), np.array([0, 1, 0, 1])) == 1.0
    assert purity(np.zeros(4, np.int64), np.array([0, 1, 2, 2])) == 0.5


def test_cluster_purity_of_separate_crossed_and_equal_features() -> None:
    assert cluster_purity(APART, LABEL, num_classes=2) == 1.0
    assert cluster_purity(CROSSED, LABEL, num_classes=2) == 0.5
    assert cluster_purity(np.zeros((4, 2), np.float32), LABEL, num_classes=2) == 0.5  # one cluster
    assert cluster_purity(APART[:1], LABEL[:1], num_classes=2) == 1.0
    assert cluster_purity(APART[:0], LABEL[:0], num_classes=2) == 1.0
    # Features are scaled to the same range: without that, the second would decide.
    features = np.array([[0, 0], [0, 9e3], [1, 0], [1, 9e3]], np.float32)
    shifted = np.concatenate([features, features + np.array([0.01, 1.0], np.float32)])
    assert cluster_purity(shifted, np.array([0, 1, 2, 3] * 2), num_classes=4) == 1.0


def test_clusters_are_computed_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads: list[int] = []

    def fit_predict(self: KMeans, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        num_threads.extend(library["num_threads"] for library in threadpool_info())
        return LABEL

    monkeypatch.setattr(KMeans, "fit_predict", fit_predict)
    assert cluster_purity(APART, LABEL, num_classes=2) == 1.0
    assert set(num_threads) == {1}


def test_gap_and_reinitialisation_by_hand() -> None:
    method = build_method(strength=3.0, every_epochs=1)
    initial = [[p.detach().clone() for p in encoder.parameters()] for encoder in method.net.encoders]
    with torch.no_grad():
        for parameter in method.net.encoders.parameters():
            parameter.add_(1.0)
    classifier = [p.detach().clone() for p in method.net.fusion.parameters()]
    begin_epoch(method, 3, FixedReader([APART, APART], [CROSSED, APART]))
    # Audio: purities 1 and 1/2, a gap of 1/2; visual: no gap.
    share = math.tanh(1.5)
    assert method.epoch_metrics() == pytest.approx(
        {"purity_gap_audio": 0.5, "purity_gap_visual": 0, "reinitialized_audio": share, "reinitialized_visual": 0}
    )
    assert share == pytest.approx(0.905148)
    for encoder, values, moved in zip(method.net.encoders, initial, (share, 0.0), strict=True):
        for parameter, value in zip(encoder.parameters(), values, strict=True):
            torch.testing.assert_close(parameter.detach(), (1 - moved) * (value + 1) + moved * value)
    assert all(torch.equal(*pair) for pair in zip(classifier, method.net.fusion.parameters(), strict=True))


def test_gap_has_no_sign_and_absent_samples_are_left_out() -> None:
    method = build_method(every_epochs=1)
    absent = APART.copy()
    absent[3] = 0.0  # features of 0: the sample lacks the modality
    begin_epoch(method, 3, FixedReader([CROSSED, absent], [APART, APART]))
    assert method.epoch_metrics()["purity_gap_audio"] == 0.5
    assert method.epoch_metrics()["purity_gap_visual"] == 0.0


def test_it_diagnoses_after_every_20_epochs_and_one_three_times() -> None:
    method, epochs = build_method(), []
    for epoch in range(1, 100):
        reader = FixedReader([APART, APART], [APART, APART])
        begin_epoch(method, epoch, reader)
        epochs += [epoch] * (reader.num_reads > 0)
    assert epochs == [22, 42, 62]
    assert method.state_dict()["initial"] == []  # not needed any more


def test_frozen_encoders_do_not_change() -> None:
    method = build_method(every_epochs=1)
    with torch.no_grad():
        for parameter in method.net.encoders.parameters():
            parameter.add_(1.0)
    method.net.freeze_encoders([0])
    before = [p.detach().clone() for p in method.net.encoders[0].parameters()]
    begin_epoch(method, 3, FixedReader([APART, APART], [CROSSED, CROSSED]))
    assert all(torch.equal(*pair) for pair in zip(before, method.net.encoders[0].parameters(), strict=True))


def test_run_interrupted_before_a_diagnosis_resumes_exactly(tmp_path: Path) -> None:
    config = replace(
        with_options(QUICK, balancing="relearning", epochs=5), balancing={"relearning": {"every_epochs": 1, "times": 2}}
    )
    examples = make_examples()
    whole = fine_tune(examples, tmp_path / "whole", config)
    assert any(record["reinitialized_audio"] > 0 for record in whole.history)
    for epochs in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            fine_tune(examples, tmp_path / f"{epochs}", config, progress=stop_after(epochs))
        assert fine_tune(examples, tmp_path / f"{epochs}", config).history == whole.history
        assert model_bytes(tmp_path / f"{epochs}") == model_bytes(tmp_path / "whole")


def test_too_few_epochs_give_a_warning() -> None:
    config = with_options(QUICK, balancing="relearning", epochs=21)
    (warning,) = check_schedule(resolve(config))
    assert "relearning starts in epoch 22 (balancing.relearning.every_epochs); until then it is joint" in warning
    assert check_schedule(resolve(with_options(config, epochs=22))) == []
