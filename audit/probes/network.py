"""Networks as probes: ResNet-18 and its inputs, and an estimate of their training time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..dataset.labels import Target
from ..errors import ConfigError
from ..features.matrix import Inputs, RowIndex
from ..features.pretrained import require_transformers
from ..hashing import digest
from ..workers import NETWORK_THREADS, fixed_threads, format_duration, prefetch_map
from .config import NetworkConfig
from .crops import PictureView
from .cross_fit import CrossFit

SIZES = (64, 128, 256, 512)  # feature maps of a ResNet-18's four stages, of two blocks each
READERS = 2  # threads that read batches ahead
# With fewer channels last, the gradient of a convolution of 1 x 1 pixels and stride 2 by oneDNN in torch 2.13 writes
# past its memory on a CPU with AVX2 and without AVX-512: 3 to 7 channels of 16 x 16 pixels ended the process.
MIN_CHANNELS_LAST = 8

Floats = NDArray[np.floating]


class Trunk(nn.Module):
    """A ResNet-18 without a head: pictures (b, f, c, h, w), of pixels or log power, to features (b, d), float32.

    The features of a sample's f frames are averaged, as in OGM-GE's code. Channels are standardised; NaN, of a missing
    modality, is replaced by the mean.
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
        """Set the mean and the standard deviation of each channel (c,); the scale of a constant channel is 1."""
        scale = np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)  # smaller is rounding
        self.mean.copy_(torch.from_numpy(mean)[:, None, None])
        self.scale.copy_(torch.from_numpy(scale)[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute the features (b, d) of a batch of pictures (b, f, c, h, w)."""
        features = self.resnet(self._frames(pictures)).pooler_output.flatten(1).float()
        mean: Tensor = features.view(*pictures.shape[:2], self.num_features).mean(dim=1)
        return mean

    def _frames(self, pictures: Tensor) -> Tensor:
        """Standardise pictures (b, f, c, h, w) into frames (b f, c, h, w)."""
        standardised = ((pictures.float() - self.mean) / self.scale).nan_to_num(nan=0.0)
        return standardised.flatten(0, 1).contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the feature maps: channels last, unless the first stage has fewer than MIN_CHANNELS_LAST."""
        return torch.channels_last if self.num_maps[0] >= MIN_CHANNELS_LAST else torch.contiguous_format

    @property
    def num_maps(self) -> list[int]:
        """Number of feature maps after each of the four stages."""
        return list(self.resnet.config.hidden_sizes)  # type: ignore[union-attr, arg-type]

    def first_maps(self, pictures: Tensor, *, stages: int) -> Tensor:
        """Compute the feature maps (b f, c', h', w') of pictures (b, f, c, h, w) after the first `stages` stages."""
        maps: Tensor = self.resnet.embedder(self._frames(pictures))  # type: ignore[operator]
        for index in range(stages):
            maps = self.next_maps(maps, stage=index)
        return maps

    def next_maps(self, maps: Tensor, *, stage: int) -> Tensor:
        """Compute the feature maps after a stage, 0 to 3, from those before it."""
        next_maps: Tensor = self.resnet.encoder.stages[stage](maps)  # type: ignore[union-attr, index, operator]
        return next_maps


class Network(nn.Module):
    """A trunk and a linear head: pictures (b, f, c, h, w) in, raw outputs (b, k) out."""

    def __init__(self, trunk: Trunk, *, num_outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.num_features, num_outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute the raw outputs (b, k) of a batch of pictures (b, f, c, h, w)."""
        features = self.trunk(pictures)
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 logits have two or three digits
            outputs: Tensor = self.head(features)
        return outputs


def build_trunk(shape: tuple[int, ...], *, width: float) -> Trunk:
    """Build a randomly initialised ResNet-18, `width` times as wide, for inputs of a shape of `encode.input_shape`.

    It has 11,176,512 weights at width 1 with three channels. Raises ConfigError if transformers, which implements it,
    is not installed.
    """
    require_transformers()
    from transformers import ResNetConfig, ResNetModel

    sizes = [max(1, round(width * size)) for size in SIZES]
    num_channels = 1 if len(shape) == 2 else shape[-1]
    config = ResNetConfig(
        num_channels=num_channels, embedding_size=sizes[0], hidden_sizes=sizes, depths=[2] * 4, layer_type="basic"
    )
    resnet = ResNetModel(config)  # initialises as torchvision does: normal, by fan-out
    return Trunk(resnet, num_channels=num_channels, num_features=sizes[-1])


def build_network(shape: tuple[int, ...], *, num_outputs: int, width: float, seed: int) -> Network:
    """Build a trunk and a head with random weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(build_trunk(shape, width=width), num_outputs=num_outputs)


def check_view(view: PictureView, num_features: int) -> None:
    """Raise ConfigError for a shape that the network does not support or that does not match the number of features."""
    shape = view.shape
    if len(shape) not in (2, 3, 4):
        raise ConfigError(f"a network reads (mel, t), (h, w, 3) or (f, h, w, 3), not inputs of shape {shape}")
    if view.num_features != num_features:
        raise ConfigError(
            f"inputs of shape {shape} have {view.num_features} numbers, but a row has {num_features}: they were "
            "encoded with other media settings; encode them again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Statistics of n rows before training: mean and mean square of each channel (n, c), and a digest of all inputs."""

    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    content: str

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which rows (n,) have this modality."""
        return np.asarray(~np.isnan(self.mean).any(axis=1))

    def channel_moments(self, rows: RowIndex) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute the mean and the standard deviation of each channel (c,) over these rows."""
        mean = self.mean[rows].mean(axis=0)
        return mean, np.sqrt(np.maximum(self.square[rows].mean(axis=0) - mean**2, 0))


def input_statistics(inputs: Inputs, view: PictureView, *, batch_size: int) -> InputStatistics:
    """Compute the statistics of all rows in one pass, `batch_size` rows at a time."""

    def read_batch(rows: RowIndex) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
        values = np.require(inputs.read(rows), requirements=("C", "W"))
        pictures = view.whole(torch.from_numpy(values)).float()
        square, mean = (moment.double().numpy() for moment in torch.var_mean(pictures, dim=(1, 3, 4), correction=0))
        return mean, square + mean**2, digest(str(values.dtype).encode(), values.tobytes())

    batches = list(prefetch_map(read_batch, batch_slices(np.arange(inputs.num_rows), batch_size), num_threads=READERS))
    mean, square = (np.concatenate([batch[index] for batch in batches]) for index in (0, 1))
    return InputStatistics(mean=mean, square=square, content=digest(*(batch[2].encode() for batch in batches)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTarget:
    """Target of n rows on the device; that of a regression is standardised by the training rows."""

    values: Tensor
    task: str
    centre: float
    scale: float

    @classmethod
    def of(cls, target: Target, train_rows: RowIndex, device: str) -> NetworkTarget:
        """Build the tensor of a target on the device."""
        if target.values is None:
            values = torch.from_numpy(target.label.astype(np.int64)).to(device)
            return cls(values=values, task=target.task, centre=0.0, scale=1.0)
        centre, scale = 0.0, 1.0
        if target.task == "regression":
            centre = float(target.values[train_rows].mean(dtype=np.float64))
            scale = float(target.values[train_rows].std(dtype=np.float64)) or 1.0
        values = torch.from_numpy(((target.values - centre) / scale).astype(np.float32)).to(device)
        return cls(values=values, task=target.task, centre=centre, scale=scale)

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Compute mean cross entropy, binary cross entropy over labels, or squared error of raw outputs (b, k)."""
        if self.task == "classification":
            return nn.functional.cross_entropy(outputs, self.values[rows])
        if self.task == "multilabel":
            return nn.functional.binary_cross_entropy_with_logits(outputs, self.values[rows])
        return nn.functional.mse_loss(outputs, self.values[rows])

    def in_units(self, outputs: Tensor) -> NDArray[np.float32]:
        """Return outputs in the units of the target."""
        return np.asarray((outputs * self.scale + self.centre).cpu().numpy(), dtype=np.float32)


def batch_slices(rows: RowIndex, size: int) -> list[RowIndex]:
    """Split rows into batches of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# Rows of the longer timed step; one of 64 takes 6 s for video on a CPU core. Its difference to a step of a quarter of
# the rows is the cost of rows; the rest is the cost of a step, which updates 11 million weights. For images of 112
# pixels a row took 110 ms in steps of 8, 62 ms in steps of 32, 48 ms in steps of 64.
_TIMED_ROWS = 32
_LONG = 300.0  # seconds above which a shorter setting is suggested; ours
SHORTER = {"repeats": 1, "epochs": 20}


@fixed_threads(NETWORK_THREADS)
def seconds_per_row(inputs: Inputs, view: PictureView, target: Target, *, config: NetworkConfig, device: str) -> float:
    """Measure the time of a training step per row, in steps of the first rows, with a network that is then discarded.

    No state of a random number generator changes. Raises ConfigError without transformers.
    """
    kind = torch.device(device).type
    network = build_network(view.shape, num_outputs=target.num_outputs, width=config.width, seed=0).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=config.lr)
    default = "bfloat16" if kind == "cuda" else "float32"
    enabled = (default if config.precision == "auto" else config.precision) == "bfloat16"

    def step(num_rows: int) -> float:
        started, rows = _clock(kind), np.arange(num_rows, dtype=np.intp) % inputs.num_rows
        values = torch.from_numpy(np.require(inputs.read(rows), requirements=("C", "W")))
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            outputs = network(view.whole(values.to(device)))
        optimiser.zero_grad()
        loss = NetworkTarget.of(target, rows, device).loss(outputs, torch.from_numpy(rows).to(device))
        torch.autograd.backward(loss)
        optimiser.step()
        return _clock(kind) - started

    longer = max(min(config.batch_size, _TIMED_ROWS, inputs.num_rows), 2)  # BatchNorm needs two rows
    shorter = max(longer // 4, 2)
    step(shorter)  # allocates memory
    times = step(shorter), step(longer)
    by_row = max(times[1] - times[0], 0.0) / max(longer - shorter, 1)
    return (times[1] + by_row * (config.batch_size - longer)) / config.batch_size


def _clock(kind: str) -> float:
    """Return the time after all computations on the device."""
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def row_passes(cross_fits: Sequence[CrossFit], *, config: NetworkConfig, control_rows: int) -> float:
    """Count the rows that all networks of a modality train on, over all epochs.

    The networks of a fold train on the rows of the other folds; those of a control, each on half of its rows.
    """
    num_rows = [sum(int((fit.fits & (fit.fold != fold)).sum()) for fold in range(fit.num_folds)) for fit in cross_fits]
    return config.epochs * float(sum(num_rows) + control_rows)


def describe_cost(
    seconds_by_row: Sequence[float],
    cross_fits: Sequence[Sequence[CrossFit]],
    *,
    config: NetworkConfig,
    control_rows: Sequence[int],
    device: str,
) -> str:
    """Return how long the networks of some modalities will train, and if it is long, how long with fewer repeats.

    Args:
        seconds_by_row: Seconds of a training step per row, by modality.
        cross_fits: Cross-fits of each modality, one per repeat.
        config: Settings of the networks.
        control_rows: Rows of the control of each modality; 0 without a control.
        device: Device of the training.

    Returns:
        For example "about 3 h on this CPU (3 repeats of 5 folds, 120 epochs); with --repeats 1 --set
        network.epochs=20 about 10 min".
    """

    def total(repeats: int, epochs: int) -> float:
        shorter = replace(config, epochs=epochs)
        return sum(
            seconds * row_passes(fits[:repeats], config=shorter, control_rows=rows)
            for seconds, fits, rows in zip(seconds_by_row, cross_fits, control_rows, strict=True)
        )

    first, repeats = cross_fits[0][0], len(cross_fits[0])
    seconds = total(repeats, config.epochs)
    name = "CPU" if torch.device(device).type == "cpu" else "GPU"
    plan = f"{repeats} repeat{'s' * (repeats > 1)} of {first.num_folds} folds, {config.epochs} epochs"
    text = f"about {format_duration(seconds)} on this {name} ({plan})"
    fewer = min(SHORTER["repeats"], repeats), min(SHORTER["epochs"], config.epochs)
    shorter = total(*fewer)
    if seconds < _LONG or shorter > seconds / 2 or math.isnan(seconds):
        return text
    return (
        f"{text}; with --repeats {fewer[0]} --set network.epochs={fewer[1]} about {format_duration(shorter)}; finished "
        "folds are stored, so that it can be interrupted and resumed"
    )
