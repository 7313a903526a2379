"""Fine-tuning on label sets and numbers: every sampler and balancer trains them or refuses with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_methods import ACTIVE
from training import (
    fine_tune,
    make_label_sets,
    make_numbers,
    metrics_without_seconds,
    model_bytes,
    stop_after,
    with_options,
)

from mmaudit.audit.errors import ConfigError
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.config import TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.methods import check_task, resolve
from mmaudit.train.sampling import SAMPLERS

torch.set_num_threads(1)

TASKS: dict[str, Callable[..., Examples]] = {"multilabel": make_label_sets, "regression": make_numbers}
NEED_CLASSES = {
    "sampler": {"bss-l", "smv", "remix", "class-balanced"},
    "balancer": {"gmm", "ogm", "ogm-ge", "pmr", "mmcosine", "lfm", "reconboost", "relearning", "inforeg", "mla"},
}


def config_of(sampling: str, balancing: str) -> TrainConfig:
    rates = ("audio=0.5",) if balancing == "mslr" else ()
    return with_options(ACTIVE, sampling=sampling, balancing=balancing, modality_lr=rates)


def refusal(config: TrainConfig, task: str) -> str:
    try:
        check_task(resolve(config), task)
    except ConfigError as error:
        return str(error)
    return ""


METHODS = [("sampler", name, (name, "auto")) for name in SAMPLERS] + [
    ("balancer", name, ("uniform", name)) for name in BALANCERS
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("kind", "name", "pair"), METHODS, ids=[name for _, name, _ in METHODS])
def test_method_trains_or_refuses_with_a_reason(
    tmp_path: Path, task: str, kind: str, name: str, pair: tuple[str, str]
) -> None:
    config, examples = config_of(*pair), TASKS[task](80)
    message = refusal(config, task)
    assert bool(message) == (name in NEED_CLASSES[kind])
    if message:
        option = "sampling" if kind == "sampler" else "balancing"
        assert message.startswith(f"--{option} {name} needs classes, and the task is {task}: ")
        with pytest.raises(ConfigError, match="needs classes"):
            fine_tune(examples, tmp_path / "whole", config)
        return
    whole = fine_tune(examples, tmp_path / "whole", config)
    assert all(math.isfinite(value) for record in whole.history for value in record.values())
    with pytest.raises(KeyboardInterrupt):
        fine_tune(examples, tmp_path / "part", config, progress=stop_after(1))
    resumed = fine_tune(examples, tmp_path / "part", config)
    assert resumed.history == whole.history
    assert metrics_without_seconds(resumed) == metrics_without_seconds(whole)
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")
