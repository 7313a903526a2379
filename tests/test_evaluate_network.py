"""Tests of the evaluation of a network: from its file, on given rows, and with matching samples only."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import QUICK, fine_tune, make_examples

from mmaudit.audit.errors import ManifestError
from mmaudit.train.checkpoint import load_model, read_model_config, save_model
from mmaudit.train.evaluate import compute_metrics, evaluate_file, evaluate_network, predict_probabilities
from mmaudit.train.examples import Examples
from mmaudit.train.network import FusionNet
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.training_data import NetworkReader, set_up

torch.set_num_threads(1)


def reader_of(examples: Examples, folder: Path) -> NetworkReader:
    path = folder / "model.safetensors"
    net = FusionNet(read_model_config(path))
    net.load_state_dict(load_model(path))
    return NetworkReader(set_up(examples, QUICK, seed=0, device="cpu", distributed=SINGLE_PROCESS), net)


def test_evaluate_file_repeats_the_metrics_of_training(tmp_path: Path) -> None:
    examples = make_examples(160, noise=2.0)
    metrics = fine_tune(examples, tmp_path).metrics
    result = evaluate_file(
        tmp_path / "model.safetensors",
        examples,
        split="test",
        between="audio:visual",
        config=QUICK,
        seed=0,
        device="cpu",
    )
    assert result.pop("n") == 40
    assert result == {name: metrics[name] for name in ("test", "test_by_class", "contribution")}


def test_metrics_are_of_the_given_rows(tmp_path: Path) -> None:
    examples = make_examples(160, noise=2.0)
    fine_tune(examples, tmp_path)
    reader, rows = reader_of(examples, tmp_path), np.array([5, 77, 31, 140])
    branch_probabilities = predict_probabilities(reader, rows, examples.modalities)
    all_probabilities = predict_probabilities(reader, np.arange(160), examples.modalities)
    for branch, probabilities in branch_probabilities.items():
        assert probabilities.shape == (4, 4)
        np.testing.assert_allclose(probabilities, all_probabilities[branch][rows], atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    metrics = evaluate_network(reader, rows, examples, between="audio:visual", seed=0)["test"]["all"]
    assert metrics["n"] == 4
    assert metrics["branches"]["fused"] == compute_metrics(branch_probabilities["fused"], examples.label[rows])


def test_complementary_modalities_share_the_contribution(tmp_path: Path) -> None:
    """Each modality has one bit of two: accuracy 1 together, about a half alone, and a quarter with neither."""
    examples = make_examples(400)
    config = replace(QUICK, finetune=replace(QUICK.finetune, epochs=30, hidden=16))
    contribution = fine_tune(examples, tmp_path, config).metrics["contribution"]["contribution"]
    assert contribution["all"] > 0.95
    shapley_means = [contribution["modalities"][name]["mean"] for name in ("audio", "visual")]
    assert sum(shapley_means) == pytest.approx(contribution["all"] - contribution["nobody"], abs=1e-6)
    assert min(shapley_means) > 0.25


@pytest.mark.parametrize("field_name", ["modalities", "inputs", "classes"])
def test_samples_of_other_modalities_inputs_or_classes_raise(tmp_path: Path, field_name: str) -> None:
    examples = make_examples()
    fine_tune(examples, tmp_path)
    path = tmp_path / "model.safetensors"
    config = read_model_config(path)
    changed = {
        "modalities": replace(config, modalities=("audio", "touch")),
        "inputs": replace(config, shapes=((3,), (4,))),
        "classes": replace(config, classes=("a", "b", "c", "e")),
    }
    save_model(load_model(path), path, about=asdict(changed[field_name]))
    with pytest.raises(ManifestError, match=f"was trained on other {field_name}"):
        evaluate_file(path, examples, split="test", between="audio:visual", config=QUICK, seed=0, device="cpu")
