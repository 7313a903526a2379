"""Laws of the opening: what a training begins with is checked at the door, and known again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import QUICK, examples_of, setting

from mmaudit.audit.errors import ConfigError
from mmaudit.train.config import TrainConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.examples import Examples
from mmaudit.train.setup import build_model_config, run_identity, set_up

torch.set_num_threads(1)


def identity(examples: Examples, config: TrainConfig = QUICK, *, seed: int = 0, **options: Any) -> str:
    distributed = options.pop("world", SINGLE_PROCESS)
    training_data = set_up(examples, config, seed=seed, device="cpu", distributed=distributed)
    return run_identity(examples, training_data, init=options.pop("init", None))


@pytest.mark.parametrize(
    "same",
    [{"report_to": ("wandb",)}, {"save_steps": 5}],
)
def test_who_is_told_and_how_often_is_saved_makes_no_other_training(same: dict[str, Any]) -> None:
    assert identity(examples_of(), setting(**same)) == identity(examples_of())


def test_the_number_of_processes_makes_no_other_training() -> None:
    assert identity(examples_of(), distributed=DistributedContext(rank=1, world_size=4)) == identity(examples_of())


@pytest.mark.parametrize("name", ["content", "balance", "p_balanced", "weight", "rank"])
def test_other_training_samples_make_another(name: str) -> None:
    examples = examples_of()
    values = getattr(examples, name).copy()
    values[examples.rows("train")[0]] = "other" if name == "content" else 0.123
    if name == "rank":
        values[examples.rows("train")[0]] = 10**6
    assert identity(replace(examples, **{name: values})) != identity(examples)


def test_other_weights_to_begin_with_make_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    found = {identity(examples_of(), init=init) for init in (None, tmp_path / "a", tmp_path / "b")}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze": ("audo",)}, "no modality audo; the modalities are audio, visual"),
        ({"modality_lr": ("text=0.1",)}, "no modality text; the modalities are audio, visual"),
    ],
)
def test_a_modality_that_is_not_there_is_missed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        set_up(examples_of(), setting(**options), seed=0, device="cpu", distributed=SINGLE_PROCESS)


def test_the_pool_is_of_the_training_rows() -> None:
    examples = examples_of()
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
def test_a_method_has_the_network_it_needs(balancing: str, fusion: str, own_heads: bool) -> None:
    plan = build_model_config(examples_of(), setting(balancing=balancing))
    assert (plan.fusion, plan.own_heads) == (fusion, own_heads)
