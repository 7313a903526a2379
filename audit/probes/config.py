"""Configs of probes and networks; importing them does not load torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, choices

PRECISIONS = ("auto", "float32", "bfloat16")
MOST_EPOCHS_KEPT = 8  # whose logits are kept: training dynamics want the mean and spread over some


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How the cross-fitted probes are trained. All constants are mmaudit's defaults."""

    kind: str = "auto"  # "linear"; "auto", of few rows curved where a probe finds that better; "mlp", one hidden layer
    folds: int = 5
    repeats: int = 3  # rounds of cross-fitting with other folds; probabilities are averaged over them
    learn_from: str = "all"  # splits that probes learn from: "all", or "train" for all but the test split
    joint: bool = True  # fit a probe of all modalities' features side by side as well: for the Shapley values
    control: bool = True  # fit a probe of each modality to shuffled labels as well, which must be at chance
    most_rows: int = 200_000  # rows that all probes together learn from; all rows are scored
    # What a strength means stands in glm.py: 1 / (C n) in scikit-learn's terms.
    l2_penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    gaussian: bool = True  # of few rows, mix a Gaussian model of the classes into the logistic one, unless of an mlp
    choice_rows: int = 8_000  # rows on which the strength is chosen; the probe itself learns from most_rows
    max_steps: int = 300
    tolerance: float = 1e-4  # a fit ends when two steps running lower its loss by less, relatively
    precision: str = "auto"  # of matrix products: "float32", "bfloat16", or the latter where the machine has it
    hidden: int = 64  # of an mlp, as all that follow
    epochs: int = 40
    lr: float = 3e-3
    dropout: float = 0.2
    batch_size: int = 256
    decays: tuple[float, ...] = (1e-2, 1.0)  # weight decays that are tried, each probe choosing its own

    def __post_init__(self) -> None:
        for name, right in (("learn_from", ("all", "train")), ("precision", PRECISIONS)):
            if getattr(self, name) not in right:
                raise ConfigError(f"probe.{name} is {getattr(self, name)!r}; {choices(getattr(self, name), right)}")
        for name in ("folds", "repeats", "most_rows", "choice_rows", "max_steps", "hidden", "epochs", "batch_size"):
            least = 2 if name == "folds" else 1
            if getattr(self, name) < least:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("l2_penalties", "decays"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"probe.{name} is {list(getattr(self, name))}; give one or more, all above 0")
        for name in ("tolerance", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"probe.dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How networks are trained as probes.

    epochs, batch_size, lr, lr_step and weight_decay are BSS's, for its two ResNet-18 from scratch (OGM-GE's code has
    lr 1e-3 and 100 epochs, and else the same); the crops and mirrored pictures are OGM-GE's. What follows is ours.
    """

    epochs: int = 120
    batch_size: int = 64
    lr: float = 1e-2
    lr_step: int = 70  # epochs after which the rate falls to a tenth
    weight_decay: float = 1e-4
    least_crop: float = 0.08  # of a picture's area, in training; 1: it is never cropped. Sound is left as it is
    flip: bool = True  # mirror one picture in two, in training; not where left and right tell classes apart
    width: float = 1.0  # 1: a ResNet-18
    # Off: all folds train for as long, on all their rows, as in the papers but for their look at the test set. On: the
    # epoch with the least loss on a fifth of the training rows, set aside, at the price of not learning from them.
    choose_epoch: bool = False
    precision: str = "auto"  # "float32", "bfloat16" where it will do, or the latter on CUDA alone

    def __post_init__(self) -> None:
        # A batch of one has no variance for BatchNorm; from four up, even batches have two rows at least.
        for name, least in (("epochs", 1), ("batch_size", 4), ("lr_step", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"network.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "width"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"network.{name} is {getattr(self, name)}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"network.weight_decay is {self.weight_decay}; it must be at least 0")
        if not 0 < self.least_crop <= 1:
            raise ConfigError(f"network.least_crop is {self.least_crop}; it must be above 0 and at most 1")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"network.precision is {self.precision!r}; {choices(self.precision, PRECISIONS)}")

    @property
    def epochs_kept(self) -> tuple[int, ...]:
        """The epochs, from 1, whose logits are kept: all, or eight spread evenly, the last among them."""
        spread = np.linspace(1, self.epochs, min(self.epochs, MOST_EPOCHS_KEPT))
        return tuple(np.round(spread).astype(int).tolist())
