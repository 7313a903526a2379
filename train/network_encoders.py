"""Encoders of vectors and of pictures, which start at random, and their initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..audit.probes.crops import to_pictures
from ..audit.probes.network import build_trunk
from .backbones import PretrainedEncoder


class VectorStandardization(nn.Module):
    """Standardisation of vectors (b, d) by the training rows. NaN counts as their mean."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs_standardized = False  # whether rows arrive standardised, as from a store that was
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def standardise_by(self, mean: Tensor, scale: Tensor, *, largest: Tensor) -> None:
        """Set mean and standard deviation of each feature (d,); one that varies only by rounding keeps scale 1."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6 * largest, scale, 1.0))

    def standardize(self, rows: Tensor) -> Tensor:
        """Standardise rows; NaN becomes 0, the mean."""
        return ((rows - self.mean) / self.scale).nan_to_num(nan=0.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Standardise rows that are not yet."""
        return rows if self.inputs_standardized else self.standardize(rows)


class VectorEncoder(VectorStandardization):
    """Encoder of vectors (b, d) into features (b, hidden)."""

    def __init__(self, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__(dim)
        self.num_features = hidden
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the features of a batch."""
        features: Tensor = self.layers(super().forward(rows))
        return features


class PictureEncoder(nn.Module):
    """ResNet-18 on flattened network inputs (b, d), or pictures (b, f, c, h, w); features (b, 512 width)."""

    def __init__(self, shape: tuple[int, ...], *, width: float, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.trunk = build_trunk(shape, width=width)
        self.num_features = self.trunk.num_features
        self.dropout = nn.Dropout(dropout)

    def standardise_by(self, mean: Tensor, scale: Tensor) -> None:
        """Set mean and standard deviation of each channel (c,)."""
        self.trunk.standardise_by(np.asarray(mean.double().cpu()), np.asarray(scale.double().cpu()))

    def pictures(self, rows: Tensor) -> Tensor:
        """Return rows as pictures (b, f, c, h, w)."""
        return rows if rows.ndim == 5 else to_pictures(rows, self.shape)

    def lacks_variance(self, pictures: Tensor) -> bool:
        """Whether training has fewer than two pictures, which have no variance: the running means are used."""
        return self.trunk.training and pictures.shape[0] * pictures.shape[1] < 2

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the features of a batch."""
        pictures = self.pictures(rows)
        features = self._by_running_means(pictures) if self.lacks_variance(pictures) else self.trunk(pictures)
        output: Tensor = self.dropout(features)
        return output

    def _by_running_means(self, pictures: Tensor) -> Tensor:
        self.trunk.eval()
        features: Tensor = self.trunk(pictures)
        self.trunk.train()
        return features


Encoder = VectorEncoder | PictureEncoder | PretrainedEncoder


def build_encoder(shape: Sequence[int], *, hidden: int, dropout: float, width: float) -> Encoder:
    """Build the encoder for rows of a shape: (d,) vectors; (mel, t), (h, w, c) or (f, h, w, c) for a ResNet-18."""
    if len(shape) == 1:
        return VectorEncoder(shape[0], hidden=hidden, dropout=dropout)
    return PictureEncoder(tuple(shape), width=width, dropout=dropout)


def apply_outside_pretrained(module: nn.Module, function: Callable[[nn.Module], None]) -> None:
    """Call a function on a module and all modules in it, as nn.Module.apply does, but not on pretrained encoders."""
    if isinstance(module, PretrainedEncoder):
        return
    for child in module.children():
        apply_outside_pretrained(child, function)
    function(module)


def initialise_xavier(module: nn.Module) -> None:
    """Draw new weights for a layer, as the code of OGM-GE and BSS does; see `apply_outside_pretrained`.

    Linear layers: normal by Xavier's rule, biases 0. Convolutions: normal by He's rule, fan out. Batch normalisation:
    scale 1 and shift 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
    if isinstance(module, (nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
