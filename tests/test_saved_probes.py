"""Tests of saved probes: read again, they predict the same bits, for all samples and for a part of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.errors import RunError
from mmaudit.audit.features.matrix import Inputs, MatrixInputs
from mmaudit.audit.probes import saved_probes
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.folds import assign_folds
from mmaudit.audit.probes.network_weights import NetworkProbe
from mmaudit.audit.probes.probe_set import ProbeSet, fit_calibrated_probe, fit_joint_probe, fit_probe
from mmaudit.audit.probes.saved_probes import load_probes, read_calibrations, save_probes
from mmaudit.audit.scores.sample_scores import compute_sample_scores
from mmaudit.audit.workers import no_progress

N, K = 150, 3
IDS = np.array([f"s{row}" for row in range(N)], dtype=object)
LABEL = (np.arange(N) % K).astype(np.int32)
KINDS = {
    "auto": ProbeConfig(kind="auto"),
    "mlp": ProbeConfig(kind="mlp", epochs=3),
    "linear": ProbeConfig(kind="linear"),
}


def target_of(task: str) -> Target:
    values = np.random.default_rng(1).random((N, 1 if task == "regression" else K)).astype(np.float32)
    if task == "classification":
        return Target(task=task, label=LABEL, num_outputs=K)
    values = values if task == "regression" else np.round(values)
    return Target(task=task, label=LABEL, num_outputs=values.shape[1], values=values)


def cross_fits_of(num: int) -> list[CrossFit]:
    everyone, key = np.ones(N, bool), np.random.default_rng(2).integers(0, 2**60, N).astype(np.uint64)
    folds = [assign_folds(IDS, LABEL, None, everyone, num_folds=3, seed=seed) for seed in range(2 * num)]
    return [CrossFit(fold=folds[2 * k], inner=folds[2 * k + 1], fits=everyone, key=key) for k in range(num)]


def fitted(kind: str, target: Target, cross_fits: list[CrossFit], inputs: list[Inputs]) -> ProbeSet:
    def fit(inputs: Inputs, target: Target, cross_fits: list[CrossFit], *, parts: object = ()) -> object:
        return fit_probe(inputs, target, cross_fits, config=KINDS[kind], parts=parts)  # type: ignore[arg-type]

    present = np.ones(N, bool)
    probes = [
        fit_calibrated_probe(f"m{index}", matrix, target, cross_fits, present=present, fit=fit)  # type: ignore[arg-type]
        for index, matrix in enumerate(inputs)
    ]
    joint = fit_joint_probe(probes, target, cross_fits, fit=fit)  # type: ignore[arg-type]
    return ProbeSet(probes=tuple(probes), joint=joint, target=target)


def features() -> list[Inputs]:
    rng = np.random.default_rng(0)
    centres = np.eye(K, 5)[LABEL]
    return [MatrixInputs(matrix=(centres + rng.standard_normal((N, 5))).astype(np.float32)) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("auto", "classification"),
        pytest.param("mlp", "classification", marks=pytest.mark.slow),
        ("linear", "multilabel"),
        ("linear", "regression"),
    ],
)
def test_read_probes_score_the_same(kind: str, task: str, tmp_path: Path) -> None:
    target, cross_fits, inputs = target_of(task), cross_fits_of(2), features()
    probe_set = fitted(kind, target, cross_fits, inputs)
    save_probes(probe_set, cross_fits[0], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.safetensors" for name in ("joint", "m0", "m1")]
    samples = np.arange(N)
    loaded = load_probes(
        tmp_path,
        ["m0", "m1"],
        inputs=inputs,
        present=np.ones((N, 2), bool),
        target=target,
        cross_fits=cross_fits,
        samples=samples,
        device="cpu",
    )
    expected = compute_sample_scores(probe_set, seed=0, progress=no_progress)
    scores = compute_sample_scores(loaded, seed=0, progress=no_progress)
    for name in expected.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name), err_msg=name)
    assert probe_set.joint is not None
    calibrations = {probe.name: probe.calibration for probe in (*probe_set.probes, probe_set.joint)}
    assert read_calibrations(tmp_path, ["m0", "m1"]) == calibrations


def test_read_tensors_are_aligned_as_fitted_ones(tmp_path: Path) -> None:
    """Products with one output have other last digits where a matrix does not begin at a multiple of 64 bytes."""
    target, cross_fits, inputs = target_of("regression"), cross_fits_of(1), features()
    save_probes(fitted("linear", target, cross_fits, inputs), cross_fits[0], tmp_path)
    for name in ("m0", "m1", "joint"):
        tensors, _ = saved_probes._read(tmp_path / f"{name}.safetensors", "cpu")
        assert not [name for name, tensor in tensors.items() if tensor.data_ptr() % 64]


def test_probes_of_a_part_score_it_as_those_of_all() -> None:
    target, cross_fits, inputs = target_of("regression"), cross_fits_of(2), features()
    probe_set = fitted("linear", target, cross_fits, inputs)
    part = np.arange(5, 90, 3)
    taken = probe_set.take(part, [MatrixInputs(matrix=matrix.read(part)) for matrix in inputs])
    expected = compute_sample_scores(probe_set, seed=0, progress=no_progress)
    scores = compute_sample_scores(taken, seed=0, progress=no_progress)
    for name in expected.__dataclass_fields__:
        np.testing.assert_allclose(getattr(scores, name), getattr(expected, name)[part], atol=1e-6, err_msg=name)


def test_outputs_of_networks_are_saved(tmp_path: Path) -> None:
    target, cross_fits, inputs = target_of("classification"), cross_fits_of(1), features()
    probe_set = replace(fitted("linear", target, cross_fits, inputs), joint=None)
    outputs = np.random.default_rng(0).standard_normal((1, N, K)).astype(np.float32)
    network = replace(probe_set.probes[0], probe=NetworkProbe(by_repeat=outputs, by_epoch=outputs))
    save_probes(replace(probe_set, probes=(network, probe_set.probes[1])), cross_fits[0], tmp_path)
    part = np.arange(10, 30)
    loaded = load_probes(
        tmp_path,
        ["m0", "m1"],
        inputs=[MatrixInputs(matrix=matrix.read(part)) for matrix in inputs],
        present=np.ones((len(part), 2), bool),
        target=target.take(part),
        cross_fits=[cross_fits[0].take(part)],
        samples=part,
        device="cpu",
    )
    assert loaded.joint is None
    np.testing.assert_array_equal(loaded.probes[0].probe.logits(np.arange(20)), outputs[:, part])


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunError, match=r"m0\.safetensors cannot be read"):
        read_calibrations(tmp_path, ["m0"])
