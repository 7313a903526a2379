"""Tests of the set-up of a training: checks of its settings, and its identity for a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import QUICK, make_examples, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.checkpoint import run_identity
from mmaudit.train.config import TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext
from mmaudit.train.training_data import build_model_config, set_up

torch.set_num_threads(1)


def identity_of(examples: Examples, config: TrainConfig = QUICK, *, seed: int = 0, **options: Any) -> str:
    distributed = options.pop("distributed", SINGLE_PROCESS)
    training_data = set_up(examples, config, seed=seed, device="cpu", distributed=distributed)
    return run_identity(examples, training_data, init=options.pop("init", None))


@pytest.mark.parametrize(
    "options",
    [{"report_to": ("wandb",)}, {"save_steps": 5}],
)
def test_reporting_and_saving_do_not_change_the_identity(options: dict[str, Any]) -> None:
    assert identity_of(make_examples(), with_options(**options)) == identity_of(make_examples())


def test_number_of_processes_does_not_change_the_identity() -> None:
    assert identity_of(make_examples(), distributed=DistributedContext(rank=1, world_size=4)) == identity_of(
        make_examples()
    )


@pytest.mark.parametrize("name", ["content", "balance", "p_balanced", "weight", "rank"])
def test_training_samples_change_the_identity(name: str) -> None:
    examples = make_examples()
    values = getattr(examples, name).copy()
    values[examples.rows("train")[0]] = "other" if name == "content" else 0.123
    if name == "rank":
        values[examples.rows("train")[0]] = 10**6
    assert identity_of(replace(examples, **{name: values})) != identity_of(examples)


def test_initial_weights_change_the_identity(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    identities = {identity_of(make_examples(), init=init) for init in (None, tmp_path / "a", tmp_path / "b")}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ("audo",)}, "no modality audo; the modalities are audio, visual"),
        ({"modality_lr": ("text=0.1",)}, "no modality text; the modalities are audio, visual"),
    ],
)
def test_unknown_modality_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_up(make_examples(), with_options(**options), seed=0, device="cpu", distributed=SINGLE_PROCESS)


def test_pool_has_the_training_rows() -> None:
    examples = make_examples()
    training_data = set_up(examples, QUICK, seed=0, device="cpu", distributed=SINGLE_PROCESS)
    train = examples.rows("train")
    np.testing.assert_array_equal(training_data.train, train)
    for name in ("rank", "balance", "p_balanced", "label"):
        np.testing.assert_array_equal(getattr(training_data.pool, name), getattr(examples, name)[train])
    assert (training_data.pool.num_classes, training_data.pool.num_modalities, len(training_data.pool)) == (
        4,
        2,
        len(train),
    )


@pytest.mark.parametrize(
    ("balancing", "fusion", "own_heads"),
    [("joint", "concat", False), ("mmpareto", "concat", True), ("greedy", "mmtm", False), ("mla", "shared", False)],
)
def test_method_gets_the_network_it_needs(balancing: str, fusion: str, own_heads: bool) -> None:
    config = build_model_config(make_examples(), with_options(balancing=balancing))
    assert (config.fusion, config.own_heads) == (fusion, own_heads)
