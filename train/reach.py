"""The reach: what do settings ask for that training ends too soon for? No error, and seldom what was meant"""

from __future__ import annotations

import math

from .config import TrainConfig
from .sampling.config import CURRICULA


def out_of_reach(config: TrainConfig) -> list[str]:
    """Tell what never begins, or never ends, in so few epochs: one sentence for each."""
    chosen, optim, balancing = config.finetune, config.optim, config.balancing
    epochs, found = chosen.epochs, []
    if chosen.sampling in CURRICULA and (share := config.order.share(epochs)) < 1:
        found.append(
            f"--sampling {chosen.sampling} sees {math.floor(1000 * share) / 10:g}% of the training samples in the last "
            f"one, and never the others; it sees all from epoch {config.order.grow_epochs} on (order.grow_epochs)"
        )
    begins = {
        "smv": (chosen.sampling, config.sampling.smv.warmup_epochs + 1, "sampling.smv.warmup_epochs", "uniform"),
        "gmm": (chosen.balancing, balancing.gmm.warmup_epochs + 1, "balancing.gmm.warmup_epochs", "sum"),
        "ogm": (chosen.balancing, balancing.ogm.first_epoch, "balancing.ogm.first_epoch", "joint"),
        "ogm-ge": (chosen.balancing, balancing.ogm.first_epoch, "balancing.ogm.first_epoch", "joint"),
    }
    for name, (taken, first, setting, instead) in begins.items():
        if taken == name and epochs < first:
            found.append(f"{name} begins in epoch {first} ({setting}), and until then it is {instead}")
    if epochs <= optim.warmup_epochs:
        found.append(f"the learning rate is whole in epoch {optim.warmup_epochs + 1} only (optim.warmup_epochs)")
    elif optim.schedule == "step" and epochs <= optim.lr_step:
        found.append(f"the learning rate falls after epoch {optim.lr_step} only (optim.lr_step), and so is constant")
    return [f"{epochs} epochs are too few: {each}" for each in found]
