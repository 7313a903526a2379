"""Probes of texts: equal to scikit-learn's with the inverse document frequencies of their own training rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack
from scipy.special import expit, softmax
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler, normalize

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import Inputs, JointInputs, MatrixInputs, TermInputs, WindowInputs
from mmaudit.audit.features.vectors import count_terms, text_terms
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes import glm, linear
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.design import MEAN_SQUARE, MIN_FREQUENCY, TermUnits
from mmaudit.audit.probes.linear import LinearProbe
from mmaudit.audit.probes.probe_set import fit_probe

NUM_ROWS, NUM_FOLDS = 240, 3
ROWS = np.arange(NUM_ROWS)
L2 = 3e-2
CONFIG = ProbeConfig(l2_penalties=(L2,), tolerance=1e-9)
Floats = NDArray[np.float64]


def texts(num_rows: int = NUM_ROWS, *, seed: int = 0) -> tuple[list[str], NDArray[np.int32]]:
    """Draw texts of two scripts with common, rare and telling words, and one of three labels for each."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num_rows).astype(np.int32)
    telling = ("good fine 很好", "bad awful 太差", "so so 一般")
    rows = []
    for number, kind in enumerate(label):
        words = [f"w{rank}" for rank in rng.zipf(1.5, 8) if rank < 1_000]
        own = telling[kind].split() if rng.random() < 0.6 else []
        rows.append(" ".join([*words, *own, f"only{number}"]))
    return rows, label


def inputs_of(rows: list[str], *, missing: NDArray[np.bool_] | None = None) -> TermInputs:
    terms = [text_terms(text, MediaConfig()) for text in rows]
    if missing is not None:
        terms = [np.zeros(0, np.uint32) if gone else term for term, gone in zip(terms, missing, strict=True)]
    counts = count_terms(np.concatenate(terms), np.array([len(term) for term in terms]))
    present = np.ones(len(rows), bool) if missing is None else ~missing
    return TermInputs(counts=counts, present=present, num_buckets=64)


def cross_fit(num_rows: int = NUM_ROWS) -> CrossFit:
    rng = np.random.default_rng(1)
    fold, inner = (rng.permutation(num_rows) % NUM_FOLDS for _ in range(2))
    key = rng.permutation(num_rows).astype(np.uint64)
    fits = np.ones(num_rows, bool)
    return CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=fits, key=key)


def target(label: NDArray[np.int32], task: str = "classification") -> Target:
    values = {
        "classification": None,
        "multilabel": np.stack([label == 0, label < 2], axis=1).astype(np.float32),
        "regression": (100 + 50.0 * label[:, None]).astype(np.float32),
    }[task]
    num_outputs = 3 if values is None else values.shape[1]
    return Target(task=task, label=label, num_outputs=num_outputs, values=values)


def fit(inputs: Inputs, of_target: Target, config: ProbeConfig = CONFIG) -> LinearProbe:
    probe = fit_probe(inputs, of_target, [cross_fit(inputs.num_rows)], config=config)
    assert isinstance(probe, LinearProbe)
    return probe


def reference_rows(inputs: TermInputs, train_mask: NDArray[np.bool_]) -> csr_array:
    """Compute 1 + log(count), of norm 1, times scikit-learn's IDF of the training rows, with one scale and min_df 2."""
    # Not by counts[:, numbers], for which scipy makes an array of NUM_TERMS columns.
    numbers, column = np.unique(inputs.counts.indices, return_inverse=True)
    data, shape = inputs.counts.data.astype(np.float64), (inputs.num_rows, len(numbers))
    sublinear = csr_array((data, column, inputs.counts.indptr), shape=shape)
    sublinear.data = 1 + np.log(sublinear.data)
    sublinear = csr_array(normalize(sublinear))[:, (sublinear[train_mask] > 0).sum(axis=0) >= MIN_FREQUENCY]
    idf = TfidfTransformer(norm=None).fit(sublinear[train_mask]).idf_
    weighted = sublinear.multiply(idf[None]).tocsr()
    return weighted * np.sqrt(MEAN_SQUARE / weighted[train_mask].power(2).sum(axis=1).mean())


def sklearn_outputs(x: Any, of_target: Target, train_mask: NDArray[np.bool_]) -> Floats:
    size, held_out = int(train_mask.sum()), x[~train_mask]
    if of_target.values is None:
        model = LogisticRegression(C=1 / (L2 * size), tol=1e-8, max_iter=5_000)
        return np.asarray(model.fit(x[train_mask], of_target.label[train_mask]).predict_proba(held_out))
    if of_target.task == "regression":
        ridge = Ridge(alpha=L2 * size, tol=1e-10, solver="lsqr", max_iter=5_000)
        return np.asarray(ridge.fit(x[train_mask], of_target.values[train_mask]).predict(held_out)).reshape(-1, 1)
    models = [LogisticRegression(C=1 / (L2 * size), tol=1e-8, max_iter=5_000) for _ in of_target.values.T]
    columns = zip(models, of_target.values.T, strict=True)
    return np.stack([m.fit(x[train_mask], y[train_mask]).predict_proba(held_out)[:, 1] for m, y in columns], axis=1)


def outputs_of(probe: LinearProbe, task: str) -> Floats:
    logits = probe.logits(np.arange(probe.inputs.num_rows))[0].astype(np.float64)
    if task == "classification":
        return np.asarray(softmax(logits, axis=1))
    return np.asarray(expit(logits)) if task == "multilabel" else logits


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_out_of_fold_outputs_equal_sklearn_with_idf_of_the_training_rows(task: str) -> None:
    rows, label = texts()
    inputs, of_target, fold = inputs_of(rows), target(label, task), cross_fit().fold
    outputs = outputs_of(fit(inputs, of_target), task)
    for own in range(NUM_FOLDS):
        train_mask = fold != own
        expected = sklearn_outputs(reference_rows(inputs, train_mask), of_target, train_mask)
        np.testing.assert_allclose(outputs[~train_mask], expected, atol=2e-3 if task != "regression" else 0.2)


def test_joint_probe_of_text_and_numbers_equals_sklearn() -> None:
    rows, label = texts()
    numbers = (np.random.default_rng(2).standard_normal((NUM_ROWS, 3)) + label[:, None]).astype(np.float32)
    inputs, of_target, fold = inputs_of(rows), target(label), cross_fit().fold
    parts = JointInputs(parts=(inputs, MatrixInputs(matrix=numbers * [1, 10, 100] + 5)))
    outputs = outputs_of(fit(parts, of_target), "classification")
    for own in range(NUM_FOLDS):
        train_mask = fold != own
        scaled = StandardScaler().fit(numbers[train_mask]).transform(numbers)
        x = hstack([reference_rows(inputs, train_mask), csr_array(scaled)], format="csr")
        expected = sklearn_outputs(x, of_target, train_mask)
        np.testing.assert_allclose(outputs[~train_mask], expected, atol=5e-3)


def test_terms_have_a_lower_loss_than_their_dense_projection() -> None:
    rows, label = texts(600)
    losses = []
    for inputs in (inputs_of(rows), MatrixInputs(matrix=inputs_of(rows).read(np.arange(600)))):
        probability = outputs_of(fit(inputs, target(label), ProbeConfig(gaussian=False)), "classification")
        losses.append(-np.log(probability[np.arange(600), label]).mean())
    assert losses[0] < losses[1] - 0.03


def test_texts_of_the_own_fold_do_not_change_a_probe() -> None:
    rows, label = texts()
    fold = cross_fit().fold
    changed = [f"{text} good good 很好 w1" if own == 0 else text for text, own in zip(rows, fold, strict=True)]
    before, after = (fit(inputs_of(version), target(label)) for version in (rows, changed))
    unchanged = inputs_of(rows)
    same_rows = np.flatnonzero(fold == 0)
    np.testing.assert_allclose(
        softmax(after.logits(same_rows, inputs=unchanged), axis=2), softmax(before.logits(same_rows), axis=2), atol=2e-3
    )


def test_rows_without_text_get_the_bias() -> None:
    rows, label = texts()
    missing = ROWS % 7 == 0
    probe = fit(inputs_of(rows, missing=missing), target(label))
    logits, fold = probe.logits(ROWS)[0], cross_fit().fold
    for own in range(NUM_FOLDS):
        at = missing & (fold == own)
        np.testing.assert_array_equal(logits[at], np.tile(probe.theta[own, -1].numpy(), (at.sum(), 1)))
    joint = JointInputs(parts=(inputs_of(rows), MatrixInputs(matrix=np.ones((NUM_ROWS, 1), np.float32))))
    fitted = fit(joint, target(label))
    masked = fitted.logits(ROWS, inputs=joint.mask(frozenset({0})))[0]
    expected = np.tile(fitted.theta[1, -1].numpy(), ((fold == 1).sum(), 1))
    np.testing.assert_allclose(masked[fold == 1], expected, atol=1e-5)


def test_rows_in_memory_equal_the_rows() -> None:
    rows, label = texts()
    numbers = MatrixInputs(matrix=np.random.default_rng(3).standard_normal((NUM_ROWS, 2)).astype(np.float32))
    joint = JointInputs(parts=(inputs_of(rows), numbers))
    probe = fit(joint, target(label))
    some = ROWS[50:90]
    window = replace(joint, parts=tuple(WindowInputs.of(part, some) for part in joint.parts))
    np.testing.assert_array_equal(probe.logits(some[3:9], inputs=window), probe.logits(some[3:9]))
    np.testing.assert_array_equal(WindowInputs.of(joint, some).read(some), joint.read(some))
    np.testing.assert_array_equal(probe.logits(some, inputs=WindowInputs.of(joint, some)), probe.logits(some))


def test_batches_of_probes_change_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, label = texts()
    config = ProbeConfig()
    together = fit(inputs_of(rows), target(label), config)
    monkeypatch.setattr(glm, "_MAX_STACKED", 1)
    alone = fit(inputs_of(rows), target(label), config)
    np.testing.assert_allclose(alone.logits(ROWS), together.logits(ROWS), atol=2e-2)
    np.testing.assert_array_equal(alone.logits_by_epoch(ROWS)[-1], alone.logits(ROWS)[0])


def test_rare_terms_are_left_out_of_large_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, label = texts()
    monkeypatch.setattr(linear, "_MAX_TERMS", 40)
    probe = fit(inputs_of(rows), target(label))
    assert probe.theta.shape[1] == 41
    assert probe.term_units is not None
    terms, counts = np.unique(inputs_of(rows).counts.indices, return_counts=True)
    chosen = np.isin(terms, probe.term_units.terms)
    assert counts[chosen].min() >= counts[~chosen].max()
    assert np.isfinite(probe.logits(ROWS)).all()


def test_two_runs_are_bit_equal() -> None:
    rows, label = texts()
    first, second = (fit(inputs_of(rows), target(label), ProbeConfig()).logits(ROWS) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_standardised_rows_have_one_mean_square() -> None:
    dense = np.array([[0.0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0.6, 0.8, 0], [0.8, 0.6, 0, 0], [0, 0, 0, 0]])
    weights = csr_array(dense.astype(np.float32))
    units = TermUnits.of(weights, max_terms=9)
    assert units.terms.tolist() == [0, 1]  # the third is in one row only
    rows = units.standardise(weights)
    assert rows.power(2).sum() / 4 == pytest.approx(MEAN_SQUARE, rel=1e-5)  # of the four rows with terms
    assert units.gain[0] > units.gain[1]  # rarer
    masks = np.ones((5, 3), bool)
    masks[3, 1] = False
    masks[:4, 2] = False
    penalty = units.penalty(rows, masks)
    np.testing.assert_allclose(penalty[0], 1, rtol=1e-5)
    assert penalty[1, 0] > 1e5  # in one row of this mask
    assert np.isfinite(penalty).all()


def test_terms_that_are_not_in_use_are_dropped() -> None:
    weights = csr_array(np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 3]])
    units = TermUnits.of(weights, max_terms=1)
    assert units.terms.tolist() == [0]
    assert units.standardise(weights).toarray()[:, 0].astype(bool).tolist() == [True, True, False, False, False]
    assert TermUnits.of(weights[[4]], max_terms=9).standardise(weights).shape == (5, 0)


def test_texts_without_a_common_term_give_the_class_frequencies() -> None:
    label = texts()[1]
    probe = fit(inputs_of([f"only{row}" for row in ROWS]), target(label), ProbeConfig())
    probability, fold = outputs_of(probe, "classification"), cross_fit().fold
    for own in range(NUM_FOLDS):
        expected = np.bincount(label[fold != own]) / (fold != own).sum()
        np.testing.assert_allclose(probability[fold == own], np.tile(expected, ((fold == own).sum(), 1)), atol=1e-4)


def test_number_of_threads_does_not_change_the_bytes() -> None:
    rows, label = texts()
    logits = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            logits.append(fit(inputs_of(rows), target(label), ProbeConfig()).logits(ROWS))
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(logits[0], logits[1])
