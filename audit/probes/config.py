"""Configs of probes and networks; importing them does not load torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, choices

PRECISIONS = ("auto", "float32", "bfloat16")
MAX_RECORDED_EPOCHS = 8  # whose logits are kept: training dynamics are the mean and spread over several epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How the cross-fitted probes are trained. All constants are mmaudit's defaults."""

    # "linear"; "auto": with few rows, quadratic boundaries where a probe finds them better; "mlp": one hidden layer
    kind: str = "auto"
    folds: int = 5
    repeats: int = 3  # repeats of cross-fitting with other folds; logits are averaged over them
    learn_from: str = "all"  # splits that probes train on: "all", or "train" for all but the test split
    joint: bool = True  # also fit a probe of the concatenated features of all modalities, for the Shapley values
    control: bool = True  # also fit a probe of each modality to shuffled labels, whose accuracy must be at chance
    max_rows: int = 200_000  # rows that all probes together train on; all rows are scored
    # L2 penalties to choose from: 1 / (C n) in scikit-learn's terms, see glm.py.
    l2_penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    gaussian: bool = True  # with few rows, mix a Gaussian model of the classes into the logistic one; not of an mlp
    choice_rows: int = 8_000  # rows on which l2 is chosen; the probe itself trains on max_rows
    max_steps: int = 300
    tolerance: float = 1e-4  # a fit ends when two consecutive steps lower its loss by less than this, relatively
    precision: str = "auto"  # of matrix products: "float32", "bfloat16", or "auto": bfloat16 where supported
    hidden: int = 64  # units of an mlp; the fields below are those of an mlp, too
    epochs: int = 40
    lr: float = 3e-3
    dropout: float = 0.2
    batch_size: int = 256
    decays: tuple[float, ...] = (1e-2, 1.0)  # weight decays to choose from, by each probe

    def __post_init__(self) -> None:
        for name, allowed in (("learn_from", ("all", "train")), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"probe.{name} is {getattr(self, name)!r}; {choices(getattr(self, name), allowed)}")
        for name in ("folds", "repeats", "max_rows", "choice_rows", "max_steps", "hidden", "epochs", "batch_size"):
            minimum = 2 if name == "folds" else 1
            if getattr(self, name) < minimum:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name in ("l2_penalties", "decays"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"probe.{name} is {list(getattr(self, name))}; it needs one or more values above 0")
        for name in ("tolerance", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"probe.dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How networks are trained as probes.

    epochs, batch_size, lr, lr_step and weight_decay are those of BSS for its two ResNet-18 trained from scratch (the
    code of OGM-GE has lr 1e-3 and 100 epochs, otherwise the same); crops and horizontal flips are those of OGM-GE. The
    fields from width on are ours.
    """

    epochs: int = 120
    batch_size: int = 64
    lr: float = 1e-2
    lr_step: int = 70  # epochs after which the learning rate falls to a tenth
    weight_decay: float = 1e-4
    min_crop: float = 0.08  # smallest part of an image's area in training crops; 1: no crops. Sound is not cropped
    flip: bool = True  # flip half of the training images horizontally; turn off where left and right define classes
    width: float = 1.0  # 1: a ResNet-18
    # False: all folds train for `epochs` epochs on all their rows, as in the papers, which however choose the epoch on
    # the test set. True: use the epoch with the lowest loss on a fifth of the training rows, held out of training.
    choose_epoch: bool = False
    precision: str = "auto"  # "float32", "bfloat16", or "auto": bfloat16 on CUDA only

    def __post_init__(self) -> None:
        # BatchNorm needs two rows per batch; with a batch_size of four or more, even batches have at least two.
        for name, minimum in (("epochs", 1), ("batch_size", 4), ("lr_step", 1)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"network.{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name in ("lr", "width"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"network.{name} is {getattr(self, name)}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"network.weight_decay is {self.weight_decay}; it must be at least 0")
        if not 0 < self.min_crop <= 1:
            raise ConfigError(f"network.min_crop is {self.min_crop}; it must be above 0 and at most 1")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"network.precision is {self.precision!r}; {choices(self.precision, PRECISIONS)}")

    @property
    def recorded_epochs(self) -> tuple[int, ...]:
        """Epochs, from 1, whose logits are kept: all, or eight evenly spaced ones that include the last."""
        spread = np.linspace(1, self.epochs, min(self.epochs, MAX_RECORDED_EPOCHS))
        return tuple(np.round(spread).astype(int).tolist())
