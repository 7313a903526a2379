"""ResNet-18 networks for sound, images and frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..dataset.labels import Target
from ..errors import ConfigError
from ..features.matrix import Inputs, Rows
from ..features.pretrained import require_transformers
from ..hashing import digest
from ..workers import prefetch_map

SIZES = (64, 128, 256, 512)  # feature maps of a ResNet-18's four stages, of two blocks each
READERS = 2  # threads that read ahead of a network
RATIO = 4 / 3  # of a crop's sides at most, as RandomResizedCrop has it

Floats = NDArray[np.floating]


class Trunk(nn.Module):
    """A ResNet-18 without a head: pictures (b, f, c, h, w) in, of levels or log power, features (b, d) out, float32.

    The features of a sample's f frames are averaged, as in OGM-GE's code. Channels are standardised; NaN, of
    a modality that is missing, is taken for the mean.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, resnet: nn.Module, *, num_channels: int, num_features: int) -> None:
        super().__init__()
        self.resnet = resnet
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_channels, 1, 1))
        self.register_buffer("scale", torch.ones(num_channels, 1, 1))

    def standardise_by(self, mean: Floats, scale: Floats) -> None:
        """Take the mean and the standard deviation of each channel (c,); a constant channel keeps scale 1."""
        scale = np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)  # less is rounding
        self.mean.copy_(torch.from_numpy(mean)[:, None, None])
        self.scale.copy_(torch.from_numpy(scale)[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        """Give the features (b, d) of a batch of pictures (b, f, c, h, w)."""
        standard = ((pictures.float() - self.mean) / self.scale).nan_to_num(nan=0.0)
        frames = standard.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = self.resnet(frames).pooler_output.flatten(1).float()
        mean: Tensor = features.view(*pictures.shape[:2], self.num_features).mean(dim=1)
        return mean


class Network(nn.Module):
    """A trunk and a linear head: pictures (b, f, c, h, w) in, raw outputs (b, k) out."""

    def __init__(self, trunk: Trunk, *, num_outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.num_features, num_outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        """Give the raw outputs (b, k) of a batch of pictures (b, f, c, h, w)."""
        features = self.trunk(pictures)
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 would leave logits of two or three digits
            outputs: Tensor = self.head(features)
        return outputs


def build_trunk(shape: tuple[int, ...], *, width: float) -> Trunk:
    """Give a ResNet-18 of fresh weights, `width` times as wide, for inputs of a shape of `encode.input_shape`.

    Raises ConfigError without transformers, whose ResNet it is: 11,176,512 weights at width 1 with three channels.
    """
    require_transformers()
    from transformers import ResNetConfig, ResNetModel

    sizes = [max(1, round(width * size)) for size in SIZES]
    num_channels = 1 if len(shape) == 2 else shape[-1]
    config = ResNetConfig(
        num_channels=num_channels, embedding_size=sizes[0], hidden_sizes=sizes, depths=[2] * 4, layer_type="basic"
    )
    resnet = ResNetModel(config)  # draws as torchvision does: normal, by what a filter sends out
    return Trunk(resnet, num_channels=num_channels, num_features=sizes[-1])


def build_network(shape: tuple[int, ...], *, num_outputs: int, width: float, seed: int) -> Network:
    """Give a trunk and a head of fresh weights that the seed alone decides about."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(build_trunk(shape, width=width), num_outputs=num_outputs)


def to_pictures(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """See rows (b, d) of inputs (mel, t), (h, w, c) or (f, h, w, c) as pictures (b, f, c, h, w), without a copy."""
    if len(shape) == 2:
        return rows.view(len(rows), 1, 1, *shape)
    return rows.view(len(rows), shape[0] if len(shape) == 4 else 1, *shape[-3:]).permute(0, 1, 4, 2, 3)


def check_shape(shape: tuple[int, ...], num_features: int) -> None:
    """Refuse a shape that no network here reads, or that does not hold the features of a row."""
    if len(shape) not in (2, 3, 4):
        raise ConfigError(f"a network reads (mel, t), (h, w, 3) or (f, h, w, 3), not inputs of shape {shape}")
    if math.prod(shape) != num_features:
        raise ConfigError(
            f"inputs of shape {shape} have {math.prod(shape)} numbers, but a row has {num_features}: they were "
            "encoded with other media settings; encode them anew"
        )


def augment_pictures(pictures: Tensor, rng: np.random.Generator, *, least_area: float, flip: bool) -> Tensor:
    """Crop each picture (b, f, c, h, w) at random, to its size again, and mirror one in two: float32.

    A crop has between `least_area` and 1 of the picture's area, and sides of ratio 3 / 4 to 4 / 3 relative to its own:
    torchvision's RandomResizedCrop, as in the papers, but that a side too long is cut to fit and not drawn again. Each
    frame has a crop of its own, as in OGM-GE's code.
    """
    frames = pictures.flatten(0, 1).float()
    draws = rng.random((len(frames), 5))
    area = least_area + (1 - least_area) * draws[:, 0]
    width = np.clip(np.sqrt(area * RATIO ** (2 * draws[:, 1] - 1)), area, 1)
    sides = np.stack([width, area / width], axis=1)
    theta = np.zeros((len(frames), 2, 3))
    theta[:, 0, 0] = sides[:, 0] * np.where(flip & (draws[:, 4] < 0.5), -1, 1)
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = (1 - sides) * (2 * draws[:, 2:4] - 1)
    grid = nn.functional.affine_grid(torch.from_numpy(theta).to(frames), list(frames.shape), align_corners=False)
    found = nn.functional.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    return found.view(pictures.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """What was seen of n rows before any training: mean and mean square of each channel (n, c), and all in a digest."""

    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    content: str

    @property
    def there(self) -> NDArray[np.bool_]:
        """Tell for each row (n,) whether it has this modality."""
        return np.asarray(~np.isnan(self.mean).any(axis=1))

    def levels(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the mean and the standard deviation of each channel (c,) over some rows."""
        mean = self.mean[rows].mean(axis=0)
        return mean, np.sqrt(np.maximum(self.square[rows].mean(axis=0) - mean**2, 0))


def input_statistics(inputs: Inputs, shape: tuple[int, ...], *, batch_size: int) -> InputStatistics:
    """Read all rows once, `batch_size` at a time."""

    def look(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
        found = np.require(inputs.read(rows), requirements=("C", "W"))
        pictures = to_pictures(torch.from_numpy(found), shape).float()
        square, mean = (each.double().numpy() for each in torch.var_mean(pictures, dim=(1, 3, 4), correction=0))
        return mean, square + mean**2, digest(str(found.dtype).encode(), found.tobytes())

    parts = list(prefetch_map(look, batch_slices(np.arange(inputs.num_rows), batch_size), num_threads=READERS))
    mean, square = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    return InputStatistics(mean=mean, square=square, content=digest(*(part[2].encode() for part in parts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTarget:
    """What the rows (n,) are to be recognised as, on the device; numbers are standardised by the training rows."""

    values: Tensor
    task: str
    centre: float
    scale: float

    @classmethod
    def of(cls, target: Target, train_mask: Rows, device: str) -> NetworkTarget:
        """Bring a target to the device."""
        if target.values is None:
            found = torch.from_numpy(target.label.astype(np.int64)).to(device)
            return cls(values=found, task=target.task, centre=0.0, scale=1.0)
        centre, scale = 0.0, 1.0
        if target.task == "regression":
            centre = float(target.values[train_mask].mean(dtype=np.float64))
            scale = float(target.values[train_mask].std(dtype=np.float64)) or 1.0
        found = torch.from_numpy(((target.values - centre) / scale).astype(np.float32)).to(device)
        return cls(values=found, task=target.task, centre=centre, scale=scale)

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Mean cross entropy, binary cross entropy over labels, or squared error, of raw outputs (b, k)."""
        if self.task == "classification":
            return nn.functional.cross_entropy(outputs, self.values[rows])
        if self.task == "multilabel":
            return nn.functional.binary_cross_entropy_with_logits(outputs, self.values[rows])
        return nn.functional.mse_loss(outputs, self.values[rows])

    def in_units(self, outputs: Tensor) -> NDArray[np.float32]:
        """Give outputs in the units of the target."""
        return np.asarray((outputs * self.scale + self.centre).cpu().numpy(), dtype=np.float32)


def batch_slices(rows: Rows, size: int) -> list[Rows]:
    """Cut rows into runs of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
