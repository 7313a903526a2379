"""Probes: out-of-fold scores do not depend on the fold's labels and are close to known posteriors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.matrix import JointInputs, MatrixInputs
from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit, assign_folds
from mmaudit.audit.probes.probe_set import KINDS, fit_probe

Floats = NDArray[np.float32]
CONFIG = ProbeConfig()


def cross(label: NDArray[np.int32], *, fits: NDArray[np.bool_] | None = None, seed: int = 0) -> CrossFit:
    ids = np.array([f"s{number}" for number in range(len(label))], dtype=object)
    fits = np.ones(len(label), dtype=bool) if fits is None else fits
    fold, inner = (assign_folds(ids, label, None, fits, num_folds=5, seed=fold_seed) for fold_seed in (seed, seed + 99))
    return CrossFit(fold=fold, inner=inner, fits=fits, key=hash_rank(ids, seed=seed, purpose="rows"))


def gaussians(num_rows: int, num_classes: int, num_features: int, *, seed: int) -> tuple[Floats, NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    label = (np.arange(num_rows) % num_classes).astype(np.int32)
    means = 3.0 * rng.standard_normal((num_classes, num_features)) / np.sqrt(num_features)
    return (means[label] + rng.standard_normal((num_rows, num_features))).astype(np.float32), label


def classes(label: NDArray[np.int32]) -> Target:
    return Target(task="classification", label=label, num_outputs=int(label.max()) + 1)


def score_rounds(
    x: Floats, label: NDArray[np.int32], cross_fits: list[CrossFit], config: ProbeConfig = CONFIG
) -> Floats:
    probe = fit_probe(MatrixInputs(matrix=x), classes(label), cross_fits, config=config)
    return np.asarray(softmax(probe.logits(np.arange(len(x))), axis=2))


def score(x: Floats, label: NDArray[np.int32], cross_fit: CrossFit, config: ProbeConfig = CONFIG) -> Floats:
    return np.asarray(score_rounds(x, label, [cross_fit], config)[0])


@pytest.fixture(scope="module")
def drawn() -> tuple[Floats, NDArray[np.int32], CrossFit, Floats]:
    x, label = gaussians(150, 3, 8, seed=0)
    cross_fit = cross(label)
    return x, label, cross_fit, score(x, label, cross_fit)


Drawn = tuple[Floats, NDArray[np.int32], CrossFit, Floats]


def test_probabilities_are_distributions(drawn: Drawn) -> None:
    probabilities = drawn[3]
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (150, 3)
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("fold", range(5))
def test_scores_do_not_depend_on_labels_of_their_fold(drawn: Drawn, fold: int) -> None:
    """All labels of a fold are changed: its own rows get the same scores, all others do not.

    Up to rounding: probes are fitted together, and the number of active ones changes the last bit of products.
    """
    x, label, cross_fit, _ = drawn
    exact = replace(CONFIG, l2_penalties=(1e-3, 1e-2, 1e-1), tolerance=1e-6)  # weaker, the last bits grow step by step
    turned = np.where(cross_fit.fold == fold, (label + 1) % 3, label).astype(np.int32)
    before, after = (score(x, labels, cross_fit, exact) for labels in (label, turned))
    in_fold = cross_fit.fold == fold
    np.testing.assert_allclose(after[in_fold], before[in_fold], atol=2e-4)
    assert np.abs(after - before)[~in_fold].max(axis=1).mean() > 0.01
    assert np.abs(after - before)[~in_fold].max() > 0.1


@pytest.mark.parametrize("wild", [1.0, 1e3, 1e6])
def test_scores_do_not_depend_on_other_rows_of_their_fold(drawn: Drawn, wild: float) -> None:
    """Nor do they depend on the features of the fold's other rows, even if these are outliers."""
    x, label, cross_fit, _ = drawn
    exact = replace(CONFIG, l2_penalties=(1e-2,), tolerance=1e-9)  # where a fit stops does depend on the others
    row, *other_rows = np.flatnonzero(cross_fit.fold == 2)
    moved = x.copy()
    moved[other_rows[:5]] += wild * np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(
        score(moved, label, cross_fit, exact)[row], score(x, label, cross_fit, exact)[row], atol=5e-3
    )


def test_test_rows_do_not_change_the_probes() -> None:
    x, label = gaussians(150, 3, 6, seed=2)
    fits = np.arange(150) % 7 != 0
    cross_fit = cross(label, fits=fits)
    turned = np.where(fits, label, (label + 1) % 3).astype(np.int32)
    np.testing.assert_array_equal(score(x, turned, cross_fit), score(x, label, cross_fit))
    assert not np.array_equal(score(x, turned, cross(label)), score(x, label, cross(label)))


def test_noise_is_overfitted_in_sample_only() -> None:
    rng = np.random.default_rng(3)
    x, label = rng.standard_normal((120, 60)).astype(np.float32), (np.arange(120) % 2).astype(np.int32)
    cross_fit = cross(label)
    weak = ProbeConfig(l2_penalties=(1e-5,))
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1e5 / 120, max_iter=5_000))
    in_sample = float(model.fit(x, label).score(x, label))
    out_of_fold = float((score(x, label, cross_fit, weak).argmax(axis=1) == label).mean())
    assert in_sample > 0.95
    assert abs(out_of_fold - 0.5) < 0.15  # three standard deviations of a coin thrown 120 times


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_fixed_l2_equals_sklearn_cross_validation(l2: float) -> None:
    x, label = gaussians(600, 5, 12, seed=4)
    cross_fit = cross(label)
    # 480 rows in each training part
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * 480), tol=1e-8, max_iter=10_000))
    reference = cross_val_predict(model, x, label, cv=PredefinedSplit(cross_fit.fold), method="predict_proba")
    probabilities = score(x, label, cross_fit, ProbeConfig(l2_penalties=(l2,), tolerance=1e-9))
    np.testing.assert_allclose(probabilities, reference, atol=2e-3)
    assert (probabilities.argmax(axis=1) == reference.argmax(axis=1)).mean() > 0.995


def test_chosen_l2_is_close_to_the_best() -> None:
    """Noise needs a large l2, a clear signal a small one: the choice is close to the best in hindsight."""
    for x, label in (gaussians(200, 2, 150, seed=5), gaussians(400, 3, 4, seed=6)):
        cross_fit = cross(label)
        losses = {
            l2: log_loss(score(x, label, cross_fit, replace(CONFIG, l2_penalties=(l2,))), label)
            for l2 in CONFIG.l2_penalties
        }
        chosen_loss = log_loss(score(x, label, cross_fit), label)
        assert chosen_loss < min(losses.values()) + 0.2 * (max(losses.values()) - min(losses.values()))


def planted_discrepancy(rows: int) -> tuple[list[Floats], NDArray[np.int32], Floats]:
    """Draw two modalities of unit Gaussians around known means: features, label, and the true discrepancy."""
    rng = np.random.default_rng(7)
    label = (np.arange(rows) % 3).astype(np.int32)
    features, truth = [], []
    for spread in (1.5, 2.0):
        means = spread * np.eye(3, 40)
        x = means[label] + rng.standard_normal((rows, 40))
        posterior = softmax(x @ means.T - (means**2).sum(axis=1) / 2, axis=1)
        truth.append(posterior[np.arange(rows), label])
        features.append(x.astype(np.float32))
    return features, label, np.asarray(truth[0] - truth[1])


def test_discrepancy_is_recovered_where_the_posterior_is_known() -> None:
    """The true posterior is p(label | x) of the mixture."""
    features, label, truth = planted_discrepancy(20_000)
    cross_fit = cross(label)
    confidence = [score(x, label, cross_fit)[np.arange(20_000), label] for x in features]
    assert spearmanr(truth, confidence[0] - confidence[1]).statistic > 0.98
    assert np.abs(truth - (confidence[0] - confidence[1])).mean() < 0.03


def test_in_sample_probes_recover_the_discrepancy_worse() -> None:
    """They memorise the labels of 240 samples with 40 features, so that their discrepancy is spurious."""
    features, label, truth = planted_discrepancy(240)
    cross_fit, weak = cross(label), replace(CONFIG, l2_penalties=(1e-5,))
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=1e5 / 240, max_iter=5_000))
    in_sample = [model.fit(x, label).predict_proba(x)[np.arange(240), label] for x in features]
    with_chosen_l2, same = (
        [score(x, label, cross_fit, config)[np.arange(240), label] for x in features] for config in (CONFIG, weak)
    )
    recovered = [spearmanr(truth, scores[0] - scores[1]).statistic for scores in (in_sample, same, with_chosen_l2)]
    assert recovered[0] < recovered[2] - 0.1
    assert recovered[1] < recovered[2]
    assert recovered[2] > 0.7


def test_two_runs_are_bit_equal(drawn: Drawn) -> None:
    x, label, cross_fit, before = drawn
    np.testing.assert_array_equal(score(x, label, cross_fit), before)


def test_repeats_fitted_together_equal_separate_fits(drawn: Drawn) -> None:
    x, label, first, _ = drawn
    second = cross(label, seed=1)
    together = score_rounds(x, label, [first, second])
    assert together.shape == (2, 150, 3)
    for cross_fit, logits in zip((first, second), together, strict=True):
        np.testing.assert_allclose(logits, score(x, label, cross_fit), atol=5e-3)


def test_arguments_are_not_modified(drawn: Drawn) -> None:
    x, label, cross_fit, _ = drawn
    copies = x.copy(), label.copy(), cross_fit.fold.copy()
    x.setflags(write=False)  # as a memory map is
    score(x, label, cross_fit)
    for argument, copy in zip((x, label, cross_fit.fold), copies, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_l2_is_chosen_on_choice_rows(drawn: Drawn) -> None:
    x, label, cross_fit, before = drawn
    few = score(x, label, cross_fit, replace(CONFIG, choice_rows=40))
    np.testing.assert_array_equal(score(x, label, cross_fit, replace(CONFIG, choice_rows=150)), before)
    assert (few.argmax(axis=1) == before.argmax(axis=1)).mean() > 0.9


def test_l2_without_holdout_rows_is_the_middle(drawn: Drawn) -> None:
    x, label, cross_fit, _ = drawn
    no_choice = replace(cross_fit, inner=np.ones_like(cross_fit.inner))
    middle = replace(CONFIG, l2_penalties=CONFIG.l2_penalties[3:4])
    np.testing.assert_array_equal(score(x, label, no_choice), score(x, label, cross_fit, middle))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"folds": 1}, r"probe\.folds is 1; it must be at least 2"),
        ({"repeats": 0}, r"probe\.repeats is 0; it must be at least 1"),
        ({"max_steps": 0}, r"probe\.max_steps"),
        ({"choice_rows": 0}, r"probe\.choice_rows"),
        ({"max_rows": 0}, r"probe\.max_rows"),
        ({"tolerance": 0.0}, r"probe\.tolerance is 0.0; it must be above 0"),
        ({"dropout": 1.0}, r"probe\.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"precision": "bfloat"}, "did you mean bfloat16"),
        ({"l2_penalties": ()}, r"probe\.l2_penalties is \[\]"),
        ({"l2_penalties": (0.1, 0.0)}, r"probe\.l2_penalties"),
        ({"learn_from": "tain"}, "did you mean train"),
    ],
)
def test_invalid_config_raises(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ProbeConfig(**settings)


def test_unknown_kind_raises(drawn: Drawn) -> None:
    with pytest.raises(ConfigError, match=r"probe\.kind is 'linaer'; did you mean linear\?"):
        score(drawn[0], drawn[1], drawn[2], replace(CONFIG, kind="linaer"))


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_get_the_same_logits_as_all_rows(drawn: Drawn, kind: str) -> None:
    x, label, cross_fit, _ = drawn
    config = replace(CONFIG, kind=kind, epochs=2, hidden=8)
    probe = fit_probe(MatrixInputs(matrix=x), classes(label), [cross_fit, cross(label, seed=1)], config=config)
    rows = np.array([140, 3, 3, 77])
    np.testing.assert_allclose(probe.logits(rows), probe.logits(np.arange(150))[:, rows], atol=1e-5)
    by_epoch = probe.logits_by_epoch(rows)
    assert by_epoch.shape[1:] == (4, 3)
    assert 2 <= len(by_epoch) <= 8
    if kind != "mlp":
        np.testing.assert_array_equal(by_epoch[-1], probe.logits(rows)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_inputs_are_scored_by_the_same_probes(drawn: Drawn, kind: str) -> None:
    """A masked modality is set to the centre of its features: logits then depend on the other one only."""
    x, label, cross_fit, _ = drawn
    parts = (MatrixInputs(matrix=x[:, :5]), MatrixInputs(matrix=x[:, 5:]))
    joint = JointInputs(parts=parts)
    probe = fit_probe(joint, classes(label), [cross_fit], config=replace(CONFIG, kind=kind, epochs=3, hidden=8))
    rows = np.arange(150)
    masked = probe.logits(rows, inputs=joint.mask(frozenset({1})))
    other_inputs = JointInputs(parts=(parts[0], MatrixInputs(matrix=x[::-1, 5:])))
    assert not np.allclose(masked, probe.logits(rows))
    np.testing.assert_array_equal(probe.logits(rows, inputs=other_inputs.mask(frozenset({1}))), masked)
    np.testing.assert_array_equal(probe.logits(rows, inputs=joint), probe.logits(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_fits_are_scored_and_change_nothing(drawn: Drawn, kind: str) -> None:
    x, label, cross_fit, _ = drawn
    config = replace(CONFIG, kind=kind, max_rows=80, epochs=3, hidden=8)
    out = np.argsort(cross_fit.key)[80:]
    turned = label.copy()
    turned[out] = (label[out] + 1) % 3
    probabilities = score(x, label, cross_fit, config)
    np.testing.assert_array_equal(score(x, turned, cross_fit, config), probabilities)
    assert (probabilities.argmax(axis=1) == label)[out].mean() > 0.4


def log_loss(shares: Floats, label: NDArray[np.int32]) -> float:
    return float(-np.log(shares[np.arange(len(label)), label]).mean())
