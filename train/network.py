"""The multimodal network: one encoder per modality, fusion, and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..audit.probes.network import build_trunk, to_pictures
from .fusion import FUSIONS


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that on a CPU draws 16 bits for each value: a third of the time of torch's own.

    There torch's, at 128 bits a value from one thread, takes 15% of a step of two encoders of 1024 x 512. The share is
    rounded to a multiple of 2^-16, and what is kept is scaled by what is left of that.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self._dropped = min(round(share * 2**16), 2**16 - 2)  # of 2^16 numbers that are drawn alike

    def forward(self, values: Tensor) -> Tensor:
        """Drop values of any shape, in training."""
        if not self.training or self._dropped == 0:
            return values
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(values, self.share)
        drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: values.numel()] >= self._dropped - 2**15
        scale = 2**16 / (2**16 - self._dropped)
        return values * kept.view(values.shape).to(values.dtype).mul_(scale)


class VectorEncoder(nn.Module):
    """Vectors (b, d) in, features (b, hidden) out. NaN counts as the training rows' mean."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_features = hidden
        self.reads_standard = False  # whether rows come standardised, as those of a store that holds them so
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), Dropout(dropout))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def standardise_by(self, mean: Tensor, scale: Tensor, *, largest: Tensor) -> None:
        """Take mean and standard deviation of each feature (d,); one that only rounding moves keeps scale 1."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(scale > 1e-6 * largest, scale, 1.0))

    def standard(self, rows: Tensor) -> Tensor:
        """Standardise rows; NaN becomes 0, the mean."""
        return ((rows - self.mean) / self.scale).nan_to_num(nan=0.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Give features of a batch."""
        found: Tensor = self.layers(rows if self.reads_standard else self.standard(rows))
        return found


class PictureEncoder(nn.Module):
    """Flattened inputs of a network (b, d), or pictures (b, f, c, h, w), in; ResNet-18 features (b, 512 width) out."""

    def __init__(self, shape: tuple[int, ...], *, width: float, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.trunk = build_trunk(shape, width=width)
        self.num_features = self.trunk.num_features
        self.dropout = Dropout(dropout)

    def standardise_by(self, mean: Tensor, scale: Tensor) -> None:
        """Take mean and standard deviation of each channel (c,)."""
        self.trunk.standardise_by(np.asarray(mean.double().cpu()), np.asarray(scale.double().cpu()))

    def forward(self, rows: Tensor) -> Tensor:
        """Give features of a batch. One picture alone, or none, has no spread: the running means stand for its own."""
        pictures = rows if rows.ndim == 5 else to_pictures(rows, self.shape)
        by_batch = self.trunk.training and pictures.shape[0] * pictures.shape[1] > 1
        features = self.trunk(pictures) if by_batch == self.trunk.training else self._by_running_means(pictures)
        found: Tensor = self.dropout(features)
        return found

    def _by_running_means(self, pictures: Tensor) -> Tensor:
        self.trunk.eval()
        features: Tensor = self.trunk(pictures)
        self.trunk.train()
        return features


Encoder = VectorEncoder | PictureEncoder


def build_encoder(shape: Sequence[int], *, hidden: int, dropout: float, width: float) -> Encoder:
    """Give the encoder for rows of a shape: (d,) vectors; (mel, t), (h, w, c) or (f, h, w, c) for a ResNet-18."""
    if len(shape) == 1:
        return VectorEncoder(shape[0], hidden=hidden, dropout=dropout)
    return PictureEncoder(tuple(shape), width=width, dropout=dropout)


@dataclass(slots=True)
class Outputs:
    """Of one batch: fused logits (b, k), unimodal logits (m, b, k), and the features f_j behind them, m of (b, d_j).

    The unimodal logits are None where nobody asked for them.
    """

    fused: Tensor
    _unimodal: Tensor | None
    features: tuple[Tensor, ...]
    _cross_entropy: Tensor | None = None  # once asked for: the loss wants it, and so does who watches confidences

    @property
    def unimodal(self) -> Tensor:
        """The unimodal logits; RuntimeError where the network was not asked for them."""
        if self._unimodal is None:
            raise RuntimeError("the network was asked for its fused answer alone: see Balancer.asks_each")
        return self._unimodal

    def cross_entropy(self, label: Tensor) -> Tensor:
        """Give the cross entropy of each sample (1 + m, b), in float32, fused first: of one label alone."""
        if self._cross_entropy is None:
            self._cross_entropy = cross_entropy(torch.cat([self.fused[None], self.unimodal]), label)
        return self._cross_entropy

    def confidence(self, label: Tensor) -> Tensor:
        """Give the probability of the true class (1 + m, b), detached: the fused answer's first."""
        if self._cross_entropy is not None:
            return self._cross_entropy.detach().neg().exp()
        with torch.no_grad():
            logits = torch.cat([self.fused[None], self.unimodal]).float()
            at = label[None, :, None].expand(len(logits), -1, 1)
            return logits.softmax(dim=2).gather(2, at).squeeze(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """All that decides about the shape of a network; stands in the metadata of its file.

    shapes: of a row's input by modality, (d,) or that of a network's input.
    """

    modalities: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    fusion: str = "concat"
    own_heads: bool = False  # a head of its own for each modality, where the fusion has a say of each too
    hidden: int = 128
    dropout: float = 0.3
    width: float = 1.0

    @classmethod
    def of(cls, found: dict[str, Any]) -> ModelConfig:
        """Read one back from plain values; KeyError or TypeError where something is missing."""
        named = {name: found[name] for name in cls.__dataclass_fields__}
        for name in ("modalities", "classes"):
            named[name] = tuple(named[name])
        return cls(**{**named, "shapes": tuple(tuple(shape) for shape in named["shapes"])})


class FusionNet(nn.Module):
    """m inputs in, class logits out, fused and of each modality alone."""

    def __init__(self, plan: ModelConfig) -> None:
        super().__init__()
        self.plan = plan
        self.encoders = nn.ModuleList(
            build_encoder(shape, hidden=plan.hidden, dropout=plan.dropout, width=plan.width) for shape in plan.shapes
        )
        sizes = [int(encoder.num_features) for encoder in self.encoders]  # type: ignore[arg-type]
        self.fusion = FUSIONS[plan.fusion](sizes, num_classes=len(plan.classes), hidden=plan.hidden)
        # A say of its own for each modality: heads beside a fusion that gives it none.
        self.has_own_heads = plan.own_heads or not self.fusion.decomposes
        own = sizes if self.has_own_heads else []
        self.heads = nn.ModuleList(nn.Linear(size, len(plan.classes)) for size in own)
        self._fixed: frozenset[int] = frozenset()

    def fix_encoders(self, modalities: Sequence[int]) -> None:
        """Keep some encoders as they are: no gradients, and eval mode always, so that no running mean moves either."""
        self._fixed = frozenset(modalities)
        for j in self._fixed:
            self.encoders[j].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FusionNet:
        """Go into training mode, or out of it."""
        super().train(mode)
        for j in self._fixed:
            self.encoders[j].eval()
        return self

    @property
    def num_modalities(self) -> int:
        """Count the modalities, m."""
        return len(self.encoders)

    def encode(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> tuple[Tensor, ...]:
        """Give features f_j (b, d_j) of m inputs.

        Inputs have b rows; with `present` (b, m), those b_j <= b that are present: the others have features of 0.
        """
        if present is None:
            return tuple(encoder(rows) for encoder, rows in zip(self.encoders, inputs, strict=True))
        return tuple(
            self._encode_some(index, rows, present[:, index].nonzero().squeeze(1), size=len(present))
            for index, rows in enumerate(inputs)
        )

    def _encode_some(self, index: int, rows: Tensor, some: Tensor, *, size: int) -> Tensor:
        encoder = self.encoders[index]
        if len(some) == 0:
            return rows.new_zeros(size, int(encoder.num_features), dtype=torch.float32)  # type: ignore[arg-type]
        found: Tensor = encoder(rows)
        if len(some) == size:
            return found
        return found.new_zeros(size, found.shape[1]).index_copy(0, some, found)

    def answer(self, features: Sequence[Tensor], *, each: bool = True) -> Outputs:
        """Give the logits that follow from features, in float32: in half of it they would have two or three digits.

        each: those of each modality alone as well.
        """
        features = tuple(f.float() for f in features)
        with torch.autocast(features[0].device.type, enabled=False):
            if not each:
                return Outputs(self.fusion(features), None, features)
            if self.has_own_heads:
                return Outputs(self.fusion(features), self.alone(features), features)
            return Outputs(*self.fusion.both(features), features)

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """Give the logits (m, b, k) of each modality alone, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            if not self.has_own_heads:
                return self.fusion.alone(features)
            return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])

    def fused_of(self, features: Sequence[Tensor], heard: Sequence[bool]) -> Tensor:
        """Give the fused logits (b, k) if only some modalities were there, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            return self.fusion([f if h else torch.zeros_like(f) for f, h in zip(features, heard, strict=True)])  # type: ignore[no-any-return]

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None, *, each: bool = True) -> Outputs:
        """Give the logits of a batch of m inputs, see `encode` and `answer`."""
        return self.answer(self.encode(inputs, present), each=each)

    def parameters_of(self, modality: int) -> Iterator[nn.Parameter]:
        """Give the trainable parameters that modality j alone uses: its encoder's, and those of a head of its own."""
        yield from (each for each in self.encoders[modality].parameters() if each.requires_grad)
        if self.has_own_heads:
            yield from self.heads[modality].parameters()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Give the cross entropy (..., b) of each sample in float32, of logits (..., b, k) and one label (b,) for all.

    By the log chances themselves: on a CPU, torch's own for each sample takes three times as long.
    """
    log_p = logits.float().log_softmax(dim=-1)
    return -log_p.gather(-1, label.expand(logits.shape[:-1])[..., None]).squeeze(-1)


def cross_entropies(outputs: Outputs, label: Tensor) -> tuple[Tensor, Tensor]:
    """Give each sample's cross entropy, of the fused logits (b,) and of each modality's (m, b), in float32.

    Apart, unlike those of `Outputs.cross_entropy`: no gradient of one, not even of 0, reaches what only the other uses.
    """
    return cross_entropy(outputs.fused, label), cross_entropy(outputs.unimodal, label)
