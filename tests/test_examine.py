"""Laws of the examination: it measures what the network says, on the rows it is told, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import QUICK, examples_of, tune

from mmaudit.audit.errors import ManifestError
from mmaudit.train.checkpoint import load_model, read_model_config, save_model
from mmaudit.train.distributed import SINGLE_PROCESS
from mmaudit.train.evaluate import compute_metrics, evaluate_file, evaluate_network, predict_probabilities
from mmaudit.train.examples import Examples
from mmaudit.train.network import FusionNet
from mmaudit.train.setup import set_up
from mmaudit.train.training_data import NetworkReader

torch.set_num_threads(1)


def reader_of(examples: Examples, folder: Path) -> NetworkReader:
    path = folder / "model.safetensors"
    net = FusionNet(read_model_config(path))
    net.load_state_dict(load_model(path))
    return NetworkReader(set_up(examples, QUICK, seed=0, device="cpu", distributed=SINGLE_PROCESS), net)


def test_a_file_gives_the_figures_of_its_training_again(tmp_path: Path) -> None:
    examples = examples_of(160, noise=2.0)
    metrics = tune(examples, tmp_path).metrics
    found = evaluate_file(
        tmp_path / "model.safetensors",
        examples,
        split="test",
        between="audio:visual",
        config=QUICK,
        seed=0,
        device="cpu",
    )
    assert found.pop("n") == 40
    assert found == {name: metrics[name] for name in ("test", "test_by_class", "contribution")}


def test_rows_are_measured_by_themselves(tmp_path: Path) -> None:
    examples = examples_of(160, noise=2.0)
    tune(examples, tmp_path)
    reader, rows = reader_of(examples, tmp_path), np.array([5, 77, 31, 140])
    answers = predict_probabilities(reader, rows, examples.modalities)
    whole = predict_probabilities(reader, np.arange(160), examples.modalities)
    for branch, found in answers.items():
        assert found.shape == (4, 4)
        np.testing.assert_allclose(found, whole[branch][rows], atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    measured = evaluate_network(reader, rows, examples, between="audio:visual", seed=0)["test"]["all"]
    assert measured["n"] == 4
    assert measured["branches"]["fused"] == compute_metrics(answers["fused"], examples.label[rows])


def test_the_contribution_is_of_two_modalities_that_need_each_other(tmp_path: Path) -> None:
    """Each tells one bit of two: together all, alone about half, and nothing gives a quarter."""
    examples = examples_of(400)
    config = replace(QUICK, finetune=replace(QUICK.finetune, epochs=30, hidden=16))
    shares = tune(examples, tmp_path, config).metrics["contribution"]["contribution"]
    assert shares["all"] > 0.95
    each = [shares["modalities"][name]["mean"] for name in ("audio", "visual")]
    assert sum(each) == pytest.approx(shares["all"] - shares["nobody"], abs=1e-6)
    assert min(each) > 0.25


@pytest.mark.parametrize("what", ["modalities", "inputs", "classes"])
def test_samples_of_something_else_are_refused(tmp_path: Path, what: str) -> None:
    examples = examples_of()
    tune(examples, tmp_path)
    path = tmp_path / "model.safetensors"
    plan = read_model_config(path)
    others = {
        "modalities": replace(plan, modalities=("audio", "touch")),
        "inputs": replace(plan, shapes=((3,), (4,))),
        "classes": replace(plan, classes=("a", "b", "c", "e")),
    }
    save_model(load_model(path), path, about=asdict(others[what]))
    with pytest.raises(ManifestError, match=f"was trained on other {what}"):
        evaluate_file(path, examples, split="test", between="audio:visual", config=QUICK, seed=0, device="cpu")
