"""Laws of the reach: what training ends too soon for is told, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train.balancing.config import BalancingConfig, OgmConfig
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig, check_schedule


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"epochs": 10, "sampling": "bss-h"},
            r"uses 50\.7% .* last one and never the rest; it uses all of them from epoch 40",
        ),
        ({"epochs": 39, "sampling": "anti-curriculum"}, r"uses 98\.7% "),
        (
            {"epochs": 5, "sampling": "smv", "balancing": "sum"},
            "smv starts in epoch 6 .*; until then it is uniform",
        ),
        ({"epochs": 10, "balancing": "gmm"}, r"gmm starts in epoch 11 \(balancing.gmm.warmup_epochs\); .* it is sum"),
        ({"epochs": 2, "balancing": "ogm"}, "ogm starts in epoch 3 .* it is joint"),
        ({"epochs": 2, "balancing": "ogm-ge"}, "ogm-ge starts in epoch 3"),
        ({"epochs": 5, "optim": OptimConfig(warmup_epochs=5)}, "is at its full value only from epoch 6 on"),
        ({"epochs": 70, "optim": OptimConfig(schedule="step")}, "falls only after epoch 70 .*constant"),
    ],
)
def test_what_training_ends_too_soon_for_is_told(options: dict[str, Any], words: str) -> None:
    optim, finetune = options.pop("optim", OptimConfig()), FinetuneConfig(**options)
    balancing = BalancingConfig(ogm=OgmConfig(first_epoch=3))
    config = TrainConfig(finetune=finetune, optim=optim, balancing=balancing)
    (found,) = check_schedule(config)
    assert re.search(f"^{finetune.epochs} epochs are too few: .*{words}", found)
    enough = {**options, "epochs": finetune.epochs + 1}
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(**enough), optim=optim, balancing=balancing)) == [] or (
        finetune.sampling == "bss-h"  # which wants 30 more
    )


def test_nearly_all_is_not_all() -> None:
    config = TrainConfig(finetune=FinetuneConfig(epochs=999, sampling="bss-h"), order=OrderConfig(grow_epochs=1000))
    (found,) = check_schedule(config)
    assert "uses 99.9% of" in found


def test_nothing_is_told_of_what_is_not_asked_for() -> None:
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(epochs=1))) == []
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(sampling="bss-h", balancing="gmm"))) == []  # the defaults
