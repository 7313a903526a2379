"""MLP probes learn nonlinear boundaries, stay at chance on noise, and are deterministic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.probe_set import fit_probe

Floats = NDArray[np.float32]
CONFIG = ProbeConfig(kind="mlp", hidden=32, epochs=25, lr=1e-2, batch_size=64)
NUM_ROWS = 600
ROWS = np.arange(NUM_ROWS)


def cross_fit(seed: int = 0) -> CrossFit:
    rng = np.random.default_rng(seed)
    fold, inner = (rng.permutation(NUM_ROWS) % 3 for _ in range(2))
    key = np.random.default_rng(9).permutation(NUM_ROWS).astype(np.uint64)
    return CrossFit(fold=fold.astype(np.int16), inner=inner.astype(np.int16), fits=np.ones(NUM_ROWS, bool), key=key)


def exclusive_or() -> tuple[Floats, NDArray[np.int32]]:
    x = np.random.default_rng(1).standard_normal((NUM_ROWS, 5)).astype(np.float32)
    return x * np.float32(30) - 7, (x[:, 0] * x[:, 1] > 0).astype(np.int32)


def target(label: NDArray[np.int32], task: str = "classification") -> Target:
    values = {
        "classification": None,
        "multilabel": np.stack([label, 1 - label], axis=1).astype(np.float32),
        "regression": (1_000 + 50 * label[:, None]).astype(np.float32),
    }[task]
    num_outputs = 2 if values is None else values.shape[1]
    return Target(task=task, label=label, num_outputs=num_outputs, values=values)


def asked(x: Floats, of_target: Target, config: ProbeConfig = CONFIG, *, rounds: int = 1) -> Floats:
    cross_fits = [cross_fit(seed) for seed in range(rounds)]
    return fit_probe(MatrixInputs(matrix=x), of_target, cross_fits, config=config).logits(ROWS)


def test_mlp_learns_exclusive_or() -> None:
    x, label = exclusive_or()
    bent, straight = (asked(x, target(label), replace(CONFIG, kind=kind))[0] for kind in ("mlp", "linear"))
    assert (bent.argmax(axis=1) == label).mean() > 0.85
    assert (straight.argmax(axis=1) == label).mean() < 0.6


def test_mlp_learns_multilabel_and_regression() -> None:
    x, label = exclusive_or()
    several = asked(x, target(label, "multilabel"))[0]
    assert ((several[:, 0] > 0) == label).mean() > 0.85
    assert ((several[:, 1] > 0) == 1 - label).mean() > 0.85
    number = asked(x, target(label, "regression"))[0, :, 0]
    assert np.corrcoef(number, label)[0, 1] > 0.7
    assert abs(number.mean() - (1_000 + 50 * label.mean())) < 5  # in the units of the target


def test_mlp_is_at_chance_on_shuffled_labels() -> None:
    x, label = exclusive_or()
    shuffled = np.random.default_rng(2).permutation(label)
    logits = asked(x, target(shuffled))[0]
    assert abs((logits.argmax(axis=1) == shuffled).mean() - 0.5) < 0.08  # four standard deviations


def test_mlp_is_deterministic_and_independent_of_the_batch() -> None:
    x, label = exclusive_or()
    few = replace(CONFIG, epochs=4)
    alone, repeated, together = (asked(x, target(label), few, rounds=rounds) for rounds in (1, 1, 2))
    np.testing.assert_array_equal(alone, repeated)
    np.testing.assert_allclose(together[0], alone[0], atol=2e-3)


@pytest.mark.parametrize("fold", [0, 2])
def test_scores_do_not_depend_on_labels_of_their_fold(fold: int) -> None:
    x, label = exclusive_or()
    few, own = replace(CONFIG, epochs=4), cross_fit().fold == fold
    turned = np.where(own, 1 - label, label).astype(np.int32)
    before, after = (asked(x, target(labels), few)[0] for labels in (label, turned))
    np.testing.assert_allclose(after[own], before[own], atol=1e-5)
    assert np.abs(after - before)[~own].max() > 1e-3


def test_each_probe_stops_at_the_best_holdout_epoch() -> None:
    """Noise is memorised without early stopping: out of fold, the best epoch is less confident than the last."""
    rng = np.random.default_rng(3)
    x, label = rng.standard_normal((NUM_ROWS, 40)).astype(np.float32), rng.integers(0, 2, NUM_ROWS).astype(np.int32)
    probe = fit_probe(MatrixInputs(matrix=x), target(label), [cross_fit()], config=replace(CONFIG, decays=(1e-2,)))
    stopped, last = probe.logits(ROWS)[0], probe.logits_by_epoch(ROWS)[-1]
    assert np.abs(stopped).mean() < 0.7 * np.abs(last).mean()
