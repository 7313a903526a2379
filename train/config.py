"""Config of fine-tuning: what decides about it; apart from the loop, which loads torch"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..audit.errors import ConfigError, choices
from .sampling import SAMPLERS

FUSIONS = ("concat", "late")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """How a fusion network is trained on cached features. All constants are mmaudit's defaults."""

    fusion: str = "concat"
    sampling: str = "uniform"
    keep_posterior: float | None = None  # train on samples with P(balanced) of at least this: GMM-filtered
    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-2
    hidden: int = 128
    dropout: float = 0.3
    validation_fraction: float = 0.1  # of the training samples, one at least, where the source has no validation split

    def __post_init__(self) -> None:
        for name, known in (("fusion", FUSIONS), ("sampling", SAMPLERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"--{name} {getattr(self, name)}: {choices(getattr(self, name), known)}")
        for name in ("epochs", "batch_size", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dropout", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ConfigError("finetune.lr must be a number above 0, and finetune.weight_decay one not below")
        if self.keep_posterior is not None and not 0 <= self.keep_posterior <= 1:
            raise ConfigError(f"--keep-posterior {self.keep_posterior}: a probability lies in [0, 1]")
