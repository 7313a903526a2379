"""Tests of check_schedule: a warning for every setting that never takes effect, and no other."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train.balancing.config import BalancingConfig, OgmConfig
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig, check_schedule


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_setting_that_never_starts_gives_a_warning(options: dict[str, Any], message: str) -> None:
    optim, finetune = options.pop("optim", OptimConfig()), FinetuneConfig(**options)
    balancing = BalancingConfig(ogm=OgmConfig(first_epoch=3))
    config = TrainConfig(finetune=finetune, optim=optim, balancing=balancing)
    (warning,) = check_schedule(config)
    assert re.search(f"^{finetune.epochs} epochs are too few: .*{message}", warning)
    longer = {**options, "epochs": finetune.epochs + 1}
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(**longer), optim=optim, balancing=balancing)) == [] or (
        finetune.sampling == "bss-h"  # it needs 30 more
    )


def test_share_just_below_1_gives_a_warning() -> None:
    config = TrainConfig(finetune=FinetuneConfig(epochs=999, sampling="bss-h"), order=OrderConfig(grow_epochs=1000))
    (warning,) = check_schedule(config)
    assert "uses 99.9% of" in warning


def test_unused_settings_give_no_warning() -> None:
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(epochs=1))) == []
    assert check_schedule(TrainConfig(finetune=FinetuneConfig(sampling="bss-h", balancing="gmm"))) == []  # the defaults
