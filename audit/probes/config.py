"""Configs of probes and networks; importing them does not load torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..parsing import check_choices, check_ranges

PRECISIONS = ("auto", "float32", "bfloat16")
Floats = NDArray[np.float64]
# Mean and standard deviation of red, green and blue by name, in [0, 1]; those of ImageNet are torchvision's.
PICTURE_MOMENTS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def fixed_moments(shape: tuple[int, ...], *, pictures: str, sound: str) -> tuple[Floats, Floats] | None:
    """Return mean and standard deviation of each channel (c,) by the names of NetworkConfig; None: those of the data.

    They are those of pixels from 0 to 255, or of spectrograms, of inputs of shape (bins, t).
    """
    if len(shape) == 2:
        return None if sound == "data" else (np.zeros(1), np.ones(1))
    if pictures == "data":
        return None
    mean, scale = PICTURE_MOMENTS[pictures]
    return 255 * np.array(mean), 255 * np.array(scale)


MAX_RECORDED_EPOCHS = 8  # whose logits are kept: training dynamics are the mean and spread over several epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How the cross-fitted probes are trained. All constants are mmaudit's defaults.

    Args:
        kind: "linear"; "auto": with few rows, quadratic boundaries where a probe finds them better; "mlp": one hidden
            layer.
        folds: Folds of cross-fitting; fewer if there are fewer groups.
        repeats: Repeats of cross-fitting with other folds; logits are averaged over them.
        learn_from: Splits that probes train on: "all", or "train" for all but the test split.
        joint: Also fit a probe of the concatenated features of all modalities, for the Shapley values.
        control: Also fit a probe of each modality to shuffled labels, whose accuracy must be at chance.
        halves: Also fit probes of two random halves of each modality's features, one repeat each, which show whether
            the discrepancies of single samples are real.
        thorough: Also audit both halves of six random bisections of the samples, one repeat each, for an interval of
            the headline that holds for other samples; about as long as all the rest.
        max_rows: Rows that all probes together train on; all rows are scored.
        l2_penalties: L2 penalties to choose from: 1 / (C n) in scikit-learn's terms for n rows. The largest leaves no
            feature at all: the probe then predicts the class frequencies.
        gaussian: With few rows, mix a Gaussian model of the classes into the logistic one; not of an mlp.
        choice_rows: Rows on which l2 is chosen; the probe itself trains on max_rows.
        max_steps: Largest number of L-BFGS steps of a fit.
        tolerance: A fit ends when two consecutive steps lower its loss by less than this, relatively.
        precision: Of matrix products: "float32", "bfloat16", or "auto": bfloat16 where supported.
        hidden: Units of the hidden layer of an mlp.
        epochs: Epochs of an mlp.
        lr: Initial learning rate of an mlp; it falls to 0 along a cosine.
        dropout: Share of hidden units of an mlp that are left out of a training step.
        batch_size: Rows per training step of an mlp.
        decays: Weight decays of an mlp to choose from, by each probe.

    Raises:
        ConfigError: A value is out of range.
    """

    kind: str = "auto"
    folds: int = 5
    repeats: int = 3
    learn_from: str = "all"
    joint: bool = True
    control: bool = True
    halves: bool = True
    thorough: bool = False
    max_rows: int = 200_000
    l2_penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0, 1e4)
    gaussian: bool = True
    choice_rows: int = 8_000
    max_steps: int = 300
    tolerance: float = 1e-4
    precision: str = "auto"
    hidden: int = 64
    epochs: int = 40
    lr: float = 3e-3
    dropout: float = 0.2
    batch_size: int = 256
    decays: tuple[float, ...] = (1e-2, 1.0)

    def __post_init__(self) -> None:
        check_choices("probe", self, learn_from=("all", "train"), precision=PRECISIONS)
        counts = ("repeats", "max_rows", "choice_rows", "max_steps", "hidden", "epochs", "batch_size")
        check_ranges("probe", self, folds="[2, inf)", **dict.fromkeys(counts, "[1, inf)"))
        check_ranges("probe", self, **dict.fromkeys(("l2_penalties", "decays", "tolerance", "lr"), "(0, inf)"))
        check_ranges("probe", self, dropout="[0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How networks are trained as probes.

    epochs, batch_size, lr, lr_step and weight_decay are those of BSS for its two ResNet-18 trained from scratch (the
    code of OGM-GE has lr 1e-3 and 100 epochs, otherwise the same); crops and horizontal flips are those of OGM-GE. The
    fields from width on are ours.

    Args:
        epochs: Epochs of training.
        batch_size: Largest number of rows per step; 4 or more, since BatchNorm needs two rows in every batch.
        lr: Learning rate of SGD with momentum 0.9.
        lr_step: Epochs after which the learning rate falls to a tenth.
        weight_decay: L2 penalty of SGD.
        min_crop: Smallest part of an image's area in training crops; 1: no crops. Sound is not cropped.
        flip: Flip half of the training images horizontally; turn off where left and right define classes.
        width: Factor of the number of channels; 1: a ResNet-18.
        normalise_pictures: "data": by mean and standard deviation of each channel over the training rows; "imagenet":
            by those of ImageNet, as in OGM-GE's code; "none": pixels are divided by 255 only.
        normalise_sound: "data": by mean and standard deviation of the training rows' spectrograms; "none": not at all,
            as in OGM-GE's code.
        choose_epoch: False: all folds train for `epochs` epochs on all their rows, as in the papers, which however
            choose the epoch on the test set. True: use the epoch with the lowest loss on a fifth of the training rows,
            held out of training.
        precision: "float32", "bfloat16", or "auto": bfloat16 on CUDA only.

    Raises:
        ConfigError: A value is out of range.
    """

    epochs: int = 120
    batch_size: int = 64
    lr: float = 1e-2
    lr_step: int = 70
    weight_decay: float = 1e-4
    min_crop: float = 0.08
    flip: bool = True
    width: float = 1.0
    normalise_pictures: str = "data"
    normalise_sound: str = "data"
    choose_epoch: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_ranges("network", self, epochs="[1, inf)", batch_size="[4, inf)", lr_step="[1, inf)", lr="(0, inf)")
        check_ranges("network", self, width="(0, inf)", weight_decay="[0, inf)", min_crop="(0, 1]")
        check_choices("network", self, precision=PRECISIONS)
        check_choices("network", self, normalise_pictures=("data", *PICTURE_MOMENTS), normalise_sound=("data", "none"))

    def fixed_moments(self, shape: tuple[int, ...]) -> tuple[Floats, Floats] | None:
        """Return mean and standard deviation of each channel (c,) of inputs of a shape; None: those of the data."""
        return fixed_moments(shape, pictures=self.normalise_pictures, sound=self.normalise_sound)

    def to_fingerprint(self) -> list[tuple[str, Any]]:
        """Return the sorted names and values of the fields; those added later only where they are not the default."""
        later = {field.name: field.default for field in fields(self) if field.name.startswith("normalise_")}
        return sorted((name, value) for name, value in asdict(self).items() if later.get(name, ...) != value)

    @property
    def recorded_epochs(self) -> tuple[int, ...]:
        """Epochs, from 1, whose logits are kept: all, or eight evenly spaced ones that include the last."""
        spread = np.linspace(1, self.epochs, min(self.epochs, MAX_RECORDED_EPOCHS))
        return tuple(np.round(spread).astype(int).tolist())
