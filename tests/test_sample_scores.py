"""Sample scores: missing modalities stay missing, and Shapley values are those of the joint probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from probes import StoredProbe
from scipy.special import log_softmax, softmax
from scipy.stats import norm

from mmaudit.audit import metrics as measures
from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import Inputs, JointInputs, MatrixInputs, RowIndex
from mmaudit.audit.probes.probe_set import CalibratedProbe, Calibration, Probe, ProbeSet
from mmaudit.audit.scores.sample_scores import SampleScores, compute_sample_scores
from mmaudit.audit.workers import no_progress

Floats = NDArray[np.float32]
N, K, ROUNDS = 40, 3, 2
CALIBRATION = Calibration(num_rows=N, temperature=1.0, ece_before=None, ece_after=None, ece_floor=None)
RNG = np.random.default_rng(0)
LABEL = (np.arange(N) % K).astype(np.int32)
CLASSES = Target(task="classification", label=LABEL, num_outputs=K)
NUMBERS = Target(task="regression", label=LABEL, num_outputs=1, values=RNG.normal(0, 1, (N, 1)).astype(np.float32))
LABELS = Target(task="multilabel", label=LABEL, num_outputs=K, values=(RNG.random((N, K)) < 0.5).astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class JointProbe:
    """A joint probe whose correctness (n,) depends on which modalities are unmasked."""

    correct: Mapping[frozenset[int], NDArray[np.bool_]]
    label: NDArray[np.int32]
    num_outputs: int

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> Floats:
        masked = inputs.masked if isinstance(inputs, JointInputs) else frozenset()
        all_modalities = max(self.correct, key=len)
        predicted = np.where(self.correct[all_modalities - masked], self.label, (self.label + 1) % self.num_outputs)
        return np.asarray(3 * np.eye(self.num_outputs, dtype=np.float32)[predicted][None, rows])

    def logits_by_epoch(self, rows: RowIndex) -> Floats:
        raise AssertionError("the training of the joint probe is not used")

    def take(self, samples: RowIndex, inputs: Inputs) -> JointProbe:
        raise AssertionError("all samples are scored")


def calibrated(
    name: str, probe: Probe, *, present: NDArray[np.bool_] | None = None, scale: float = 1.0, width: int = 1
) -> CalibratedProbe:
    return CalibratedProbe(
        name=name,
        inputs=MatrixInputs(matrix=np.zeros((N, width), np.float32)),
        present=np.ones(N, bool) if present is None else present,
        probe=probe,
        fold_scale=np.full(1, scale, np.float32),
        fold=np.zeros(N, np.int8),
        calibration=CALIBRATION,
    )


def random_probe(seed: int, k: int = K) -> StoredProbe:
    rng = np.random.default_rng(seed)
    draw = rng.normal(0, 2, (ROUNDS + 4, N, k)).astype(np.float32)
    return StoredProbe(by_repeat=draw[:ROUNDS], by_epoch=draw[ROUNDS:])


def probe_set_of(m: int, target: Target = CLASSES, *, present: Any = None, **rest: Any) -> ProbeSet:
    present = np.ones((N, m), bool) if present is None else present
    probes = [
        calibrated(str(j), random_probe(j, target.num_outputs), present=present[:, j], scale=1.0 + 0.5 * j)
        for j in range(m)
    ]
    return ProbeSet(probes=tuple(probes), target=target, **{"joint": None, **rest})


def scores_of(probe_set: ProbeSet, seed: int = 0) -> SampleScores:
    return compute_sample_scores(probe_set, seed=seed, progress=no_progress)


def some_missing(m: int) -> NDArray[np.bool_]:
    """Build a mask (n, m) in which each row lacks another modality, and some rows none."""
    return np.stack([np.arange(N) % (m + 1) != j for j in range(m)], axis=1)


@pytest.mark.parametrize("target", [CLASSES, LABELS, NUMBERS], ids=lambda target: target.task)
def test_missing_modalities_are_nan_and_other_scores_are_unchanged(target: Target) -> None:
    present = some_missing(3)
    without_missing, with_missing = (
        scores_of(probe_set_of(3, target)),
        scores_of(probe_set_of(3, target, present=present)),
    )
    complete = present.all(axis=1)
    for field in fields(SampleScores):
        expected, values = getattr(without_missing, field.name), getattr(with_missing, field.name)
        assert expected.shape == values.shape, field.name
        np.testing.assert_array_equal(values[complete], expected[complete], err_msg=field.name)
        if expected.ndim == 1:
            assert np.isnan(expected).all() == np.isnan(values).any(), field.name
        elif field.name not in ("spread", "without_correct"):  # which are by the modalities there are
            np.testing.assert_array_equal(values, np.where(present, expected, np.nan), err_msg=field.name)
    np.testing.assert_array_equal(np.isnan(with_missing.spread), ~present)


def test_confidence_is_of_the_mean_and_spread_over_repeats() -> None:
    probe_set = probe_set_of(2)
    sample_scores = scores_of(probe_set)
    by_repeat = []
    for member in probe_set.probes:
        probe = member.probe
        assert isinstance(probe, StoredProbe)
        assert probe.by_epoch is not None
        logs = log_softmax(probe.by_repeat.astype(np.float64), axis=2)
        mean = softmax(logs.mean(axis=0) / member.scale[0], axis=1)
        np.testing.assert_allclose(sample_scores.confidence[:, int(member.name)], mean[np.arange(N), LABEL], atol=1e-5)
        by_repeat.append(softmax(logs / member.scale[0], axis=2)[:, np.arange(N), LABEL])
        epochs = softmax(probe.by_epoch.astype(np.float64) / member.scale[0], axis=2)[:, np.arange(N), LABEL]
        np.testing.assert_allclose(
            sample_scores.training_confidence[:, int(member.name)], epochs.mean(axis=0), atol=1e-5
        )
        np.testing.assert_allclose(
            sample_scores.training_variability[:, int(member.name)], epochs.std(axis=0), atol=1e-5
        )
    discrepancy = by_repeat[0] - by_repeat[1]
    np.testing.assert_allclose(sample_scores.spread[:, 0], discrepancy.std(axis=0, ddof=1), atol=1e-5)
    assert sample_scores.spread.shape == (N, 1)


def test_spread_of_one_repeat_is_nan() -> None:
    probes = tuple(
        calibrated(name, StoredProbe(by_repeat=random_probe(seed).by_repeat[:1], by_epoch=random_probe(seed).by_epoch))
        for seed, name in enumerate(("a", "b"))
    )
    sample_scores = scores_of(ProbeSet(probes=probes, joint=None, target=CLASSES))
    assert sample_scores.spread.shape == (N, 1)
    assert np.isnan(sample_scores.spread).all()


def test_without_joint_probe_shapley_values_are_nan() -> None:
    probe_set = probe_set_of(2)
    sample_scores = scores_of(probe_set)
    shares = [member.predict(np.arange(N), CLASSES).probability for member in probe_set.probes]
    fused = measures.fuse_probabilities(shares)
    np.testing.assert_allclose(sample_scores.fused_confidence, fused[np.arange(N), LABEL], atol=1e-5)
    np.testing.assert_array_equal(sample_scores.fused_predicted, fused.argmax(axis=1))
    np.testing.assert_array_equal(sample_scores.fused_correct, fused.argmax(axis=1) == LABEL)
    np.testing.assert_allclose(sample_scores.similarity, measures.similarity(shares), atol=1e-6)
    assert np.isnan(sample_scores.shapley).all()


def test_regression_confidence_is_relative_to_the_best_modality() -> None:
    probe_set = probe_set_of(2, NUMBERS)
    sample_scores = scores_of(probe_set)
    assert NUMBERS.values is not None
    for index, member in enumerate(probe_set.probes):
        probe, sigma = member.probe, float(member.scale[0])
        assert isinstance(probe, StoredProbe)
        mean = probe.by_repeat.mean(axis=0)[:, 0]
        density = norm.pdf(NUMBERS.values[:, 0], loc=mean, scale=sigma)
        np.testing.assert_allclose(sample_scores.confidence[:, index], density / norm.pdf(0, scale=1.0), atol=1e-5)
        np.testing.assert_allclose(sample_scores.predicted[:, index], mean, atol=1e-6)
    assert np.isnan(sample_scores.margin).all()
    assert np.isnan(sample_scores.shapley).all()


def test_without_correct_is_the_fusion_of_the_others() -> None:
    present = some_missing(3)
    probe_set = probe_set_of(3, present=present)
    sample_scores = scores_of(probe_set)
    for index in range(3):
        reduced = replace(
            probe_set, probes=tuple(member for position, member in enumerate(probe_set.probes) if position != index)
        )
        fused_correct, has_modality = scores_of(reduced).fused_correct, present[:, index]
        np.testing.assert_array_equal(sample_scores.without_correct[has_modality, index], fused_correct[has_modality])
        assert np.isnan(sample_scores.without_correct[~has_modality, index]).all()


def game(m: int, *, seed: int) -> dict[frozenset[int], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    sets = [frozenset(j for j in range(m) if number >> j & 1) for number in range(1, 2**m)]
    return {subset: rng.random(N) < 0.5 for subset in sets}


def shapley_of(
    correct_by_set: Mapping[frozenset[int], NDArray[np.bool_]], *, present: Any = None, seed: int = 0
) -> Floats:
    m = len(max(correct_by_set, key=len))
    probe = JointProbe(correct=correct_by_set, label=LABEL, num_outputs=K)
    return scores_of(probe_set_of(m, present=present, joint=calibrated("joint", probe, width=m)), seed).shapley


def test_shapley_values_of_two_modalities_equal_smv() -> None:
    """phi^1 = (V1 - 0 + V12 - V2) / 2, where V is the number of modalities if they predict the class, else 0."""
    correct_by_set = game(2, seed=0)
    first, second, joint = (correct_by_set[frozenset(subset)].astype(float) for subset in ({0}, {1}, {0, 1}))
    shapley = shapley_of(correct_by_set)
    np.testing.assert_allclose(shapley[:, 0], (first + 2 * joint - second) / 2, atol=1e-6)
    np.testing.assert_allclose(shapley[:, 1], (second + 2 * joint - first) / 2, atol=1e-6)
    assert len({tuple(row) for row in shapley.tolist()}) > 4  # of eight cases


@pytest.mark.parametrize("m", [2, 3, 5, 7])
def test_shapley_values_sum_to_the_value_of_all(m: int) -> None:
    correct_by_set = game(m, seed=m)
    shapley = shapley_of(correct_by_set)
    np.testing.assert_allclose(shapley.sum(axis=1), m * correct_by_set[frozenset(range(m))], atol=1e-4)
    if m <= 6:  # of all orders; in sampled ones a modality may come last more often
        assert shapley.max() <= (m + 1) / 2 + 1e-5
        assert shapley.min() >= -(m - 1) / 2 - 1e-5


def test_sampled_orders_follow_the_seed() -> None:
    correct_by_set = game(7, seed=1)
    first, repeated, other_seed = (shapley_of(correct_by_set, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(first - other_seed).max() > 0.01


@pytest.mark.parametrize("m", [2, 4])
def test_sufficient_modalities_have_shapley_value_one(m: int) -> None:
    correct_by_set = {subset: np.ones(N, bool) for subset in game(m, seed=0)}
    np.testing.assert_allclose(shapley_of(correct_by_set), 1, atol=1e-6)


def test_needed_modality_has_the_largest_shapley_value() -> None:
    correct_by_set = {subset: np.full(N, 0 in subset) for subset in game(3, seed=0)}
    shapley = shapley_of(correct_by_set)
    assert shapley[:, 0].min() > 1 > shapley[:, 1:].max()
    np.testing.assert_allclose(shapley[:, 1], shapley[:, 2], atol=1e-6)


def test_missing_modalities_are_left_out_of_shapley_values() -> None:
    """The value of two of three modalities is split between those two; the missing one gets none."""
    present = np.ones((N, 3), bool)
    present[::2, 2] = False
    correct_by_set = game(3, seed=4)
    for subset in [subset for subset in correct_by_set if 2 in subset]:  # masking a missing modality changes nothing
        alone = correct_by_set.get(subset - {2}, np.zeros(N, bool))
        correct_by_set[subset] = np.where(present[:, 2], correct_by_set[subset], alone)
    shapley = shapley_of(correct_by_set, present=present)
    np.testing.assert_array_equal(np.isnan(shapley), ~present)
    two = shapley_of({subset: values for subset, values in correct_by_set.items() if 2 not in subset})
    np.testing.assert_allclose(shapley[1::2], shapley_of(correct_by_set)[1::2], atol=1e-6)
    np.testing.assert_allclose(shapley[::2, :2], two[::2], atol=1e-6)


@pytest.mark.parametrize("num_outputs_at_once", [1, 100 * K])
def test_chunk_size_does_not_change_scores(num_outputs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_set = probe_set_of(3, present=some_missing(3))
    unchunked = scores_of(probe_set)
    monkeypatch.setattr("mmaudit.audit.scores.sample_scores._CHUNK_LOGITS", num_outputs_at_once)
    chunked = scores_of(probe_set)
    for field in fields(SampleScores):
        np.testing.assert_array_equal(getattr(chunked, field.name), getattr(unchunked, field.name), err_msg=field.name)
