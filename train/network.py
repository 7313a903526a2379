"""The multimodal network: one encoder per modality, fusion, and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..audit.features.backbone_inputs import Backbone
from ..audit.metrics import Floats, shapley
from . import FUSIONS
from .backbones import PretrainedEncoder
from .config import REGRESSION_LOSSES, LoraConfig
from .fusion import Fusion
from .network_encoders import Encoder, build_encoder

LossFunction = Callable[[Tensor, Tensor], Tensor]
ModalitySet = frozenset[int]  # of indices; a modality outside the set is absent: its features are 0
NO_MODALITY: ModalitySet = frozenset()


@dataclass(slots=True)
class Outputs:
    """Outputs for one batch: fused logits (b, k), unimodal logits (m, b, k), and features f_j, m of (b, d_j).

    The unimodal logits are None where they were not requested. loss_of: loss of each sample (..., b), of logits
    (..., b, k) and one target for all, see `FusionNet.loss_of`; by default the cross entropy.
    """

    fused: Tensor
    _unimodal: Tensor | None
    features: tuple[Tensor, ...]
    loss_of: LossFunction = field(default_factory=lambda: cross_entropy)
    _losses: Tensor | None = None  # computed once: the loss and the confidences use them

    def detached(self) -> Outputs:
        """Return the same outputs without their graph."""
        unimodal = None if self._unimodal is None else self._unimodal.detach()
        return Outputs(self.fused.detach(), unimodal, tuple(f.detach() for f in self.features), self.loss_of)

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Return the outputs for a batch from those for its parts."""
        if len(parts) == 1:
            return parts[0]
        unimodal = [part._unimodal for part in parts if part._unimodal is not None]
        return cls(
            torch.cat([part.fused for part in parts]),
            torch.cat(unimodal, dim=1) if unimodal else None,
            tuple(torch.cat(features) for features in zip(*(part.features for part in parts), strict=True)),
            parts[0].loss_of,
        )

    @property
    def is_fused_only(self) -> bool:
        """Whether the unimodal logits were not computed."""
        return self._unimodal is None

    @property
    def unimodal(self) -> Tensor:
        """The unimodal logits; RuntimeError where they were not computed."""
        if self._unimodal is None:
            raise RuntimeError("the network computed fused logits only: see Balancer.needs_unimodal_logits")
        return self._unimodal

    def losses(self, target: Tensor) -> Tensor:
        """Return the loss of each sample (1 + m, b) in float32, fused first; cached for the first target."""
        if self._losses is None:
            self._losses = self.loss_of(torch.cat([self.fused[None], self.unimodal]), target)
        return self._losses

    def confidence(self, target: Tensor) -> Tensor:
        """Return exp(-loss) in [0, 1] (1 + m, b), detached, fused first: of classes the probability of the true one.

        Of several labels it is the geometric mean of the labels' likelihoods, as in the scores; of a regression, which
        has no probability, this form is ours.
        """
        if self._losses is not None or target.is_floating_point():
            with torch.no_grad():
                return self.losses(target).detach().neg().exp()
        with torch.no_grad():
            logits = torch.cat([self.fused[None], self.unimodal]).float()
            index = target[None, :, None].expand(len(logits), -1, 1)
            return logits.softmax(dim=2).gather(2, index).squeeze(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture of a network, stored in the metadata of its file.

    shapes: shape of a row's input per modality, (d,) or that of a network's input. own_heads: a separate head per
    modality even where the fusion decomposes. answer: the logits that are the prediction of all modalities, one of
    config.ANSWERS. classes: names of the k outputs, of labels or of the number where the task is multilabel or
    regression. regression_loss: one of REGRESSION_LOSSES. model: name of the factory of a network of the user's, None
    for mmaudit's own. backbones: pretrained model of each modality that is trained end to end, with adapters `lora`;
    () or None: it has an encoder of mmaudit's.
    """

    modalities: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    task: str = "classification"
    regression_loss: str = REGRESSION_LOSSES[0]
    fusion: str = "concat"
    own_heads: bool = False
    answer: str = "fused"
    hidden: int = 128
    dropout: float = 0.3
    width: float = 1.0
    model: str | None = None
    backbones: tuple[Backbone | None, ...] = ()
    lora: LoraConfig = field(default_factory=LoraConfig)

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelConfig:
        """Build the config from plain values; KeyError or TypeError where a field is missing."""
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        for name in ("modalities", "classes"):
            fields[name] = tuple(fields[name])
        fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
        fields["backbones"] = tuple(entry and Backbone.from_values(entry) for entry in fields["backbones"])
        lora = {**fields["lora"], "target_modules": tuple(fields["lora"]["target_modules"])}
        return cls(**{**fields, "lora": LoraConfig(**lora)})


def _build_encoders(config: ModelConfig) -> list[Encoder]:
    """Build the encoder of each modality; a pretrained model for the rows that are its inputs."""
    backbones = config.backbones or (None,) * len(config.shapes)
    return [
        build_encoder(shape, hidden=config.hidden, dropout=config.dropout, width=config.width)
        if backbone is None
        else PretrainedEncoder(backbone, lora=config.lora, dropout=config.dropout)
        for shape, backbone in zip(config.shapes, backbones, strict=True)
    ]


class FusionNet(nn.Module):
    """Network of m inputs with fused and unimodal logits. fusion: class of a fusion that is not in FUSIONS.

    Logits of a regression are in standard deviations of the target from its mean, over the training samples.
    """

    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, config: ModelConfig, *, fusion: type[Fusion] | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(_build_encoders(config))
        fusion_type: type[Fusion] = fusion or FUSIONS.load(config.fusion)
        self.fusion = fusion_type.of(list(self.encoders), num_classes=len(config.classes), hidden=config.hidden)
        # A fusion that does not decompose needs separate heads for unimodal logits.
        self.has_own_heads = config.own_heads or not self.fusion.decomposes
        head_sizes = self.fusion.num_features if self.has_own_heads else ()
        self.heads = nn.ModuleList(nn.Linear(size, len(config.classes)) for size in head_sizes)
        self._frozen: frozenset[int] = frozenset()
        self._register_target_moments()

    def _register_target_moments(self, device: torch.device | None = None) -> None:
        """Register mean 0 and scale 1 of a regression's target, and nothing for other tasks."""
        if self.config.task == "regression":
            self.register_buffer("target_mean", torch.zeros(len(self.config.classes), device=device))
            self.register_buffer("target_scale", torch.ones(len(self.config.classes), device=device))

    def standardise_target(self, values: Tensor) -> None:
        """Set mean and scale of a regression's target from the training samples' values (n, 1)."""
        values = values.double()
        scale = values.std(dim=0, correction=0)
        largest = values.abs().amax(dim=0)
        self.target_mean.copy_(values.mean(dim=0))
        self.target_scale.copy_(torch.where(scale > 1e-6 * largest, scale, 1.0))  # a constant target keeps scale 1

    def loss_of(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each sample (..., b) in float32, of logits (..., b, k) and one target for all.

        classification: cross entropy, target int64 (b,). multilabel: mean binary cross entropy of the k labels, target
        (b, k) of 0 and 1. regression: absolute or squared error in standard deviations, target (b, 1) in data units.
        """
        if self.config.task == "classification":
            return cross_entropy(logits, target)
        logits = logits.float()
        if self.config.task == "multilabel":
            return functional.binary_cross_entropy_with_logits(
                logits, target.expand(logits.shape), reduction="none"
            ).mean(dim=-1)
        error = logits - (target - self.target_mean) / self.target_scale
        return (error.abs() if self.config.regression_loss == "l1" else error.square()).mean(dim=-1)

    def predict(self, logits: Tensor) -> Tensor:
        """Compute predictions of logits (..., b, k): probabilities of classes or labels; numbers in data units."""
        logits = logits.float()
        if self.config.task == "regression":
            return logits * self.target_scale + self.target_mean
        return logits.softmax(dim=-1) if self.config.task == "classification" else logits.sigmoid()

    def freeze_encoders(self, modalities: Sequence[int]) -> None:
        """Freeze some encoders: no gradients, and always eval mode, so that no running mean changes either."""
        self._frozen = frozenset(modalities)
        for j in self._frozen:
            self.encoders[j].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FusionNet:
        """Set training mode, or eval mode; frozen encoders stay in eval mode."""
        super().train(mode)
        for j in self._frozen:
            self.encoders[j].eval()
        return self

    @property
    def num_modalities(self) -> int:
        """Number of modalities, m."""
        return len(self.encoders)

    def standardizations(self) -> list[nn.Module]:
        """Return the module that standardises the inputs of each modality."""
        return list(self.encoders)

    def encode(self, inputs: Sequence[Tensor], modality_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute features f_j (b, d_j) of m inputs.

        Inputs have b rows; with `modality_mask` (b, m) the b_j <= b rows that use modality j: the others have features
        of 0.
        """
        if self.fusion.encodes_jointly:
            return self.fusion.encode(list(self.encoders), inputs, modality_mask)
        if modality_mask is None:
            return tuple(encoder(rows) for encoder, rows in zip(self.encoders, inputs, strict=True))
        return tuple(
            self._encode_subset(index, rows, modality_mask[:, index].nonzero().squeeze(1), size=len(modality_mask))
            for index, rows in enumerate(inputs)
        )

    def _encode_subset(self, index: int, rows: Tensor, row_index: Tensor, *, size: int) -> Tensor:
        encoder = self.encoders[index]
        if len(row_index) == 0:
            return rows.new_zeros(size, int(encoder.num_features), dtype=torch.float32)  # type: ignore[arg-type]
        features: Tensor = encoder(rows)
        if len(row_index) == size:
            return features
        return features.new_zeros(size, features.shape[1]).index_copy(0, row_index, features)

    def classify(self, features: Sequence[Tensor], *, unimodal: bool = True) -> Outputs:
        """Compute the logits of features in float32: in half precision they would have two or three digits.

        unimodal: compute the unimodal logits too.
        """
        features = tuple(f.float() for f in features)
        with torch.autocast(features[0].device.type, enabled=False):
            if not unimodal:
                return Outputs(self.fusion(features), None, features, self.loss_of)
            if self.has_own_heads:
                return Outputs(self.fusion(features), self.unimodal_logits(features), features, self.loss_of)
            return Outputs(*self.fusion.fused_and_unimodal_logits(features), features, self.loss_of)

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits (m, b, k) of each modality alone, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            if not self.has_own_heads:
                return self.fusion.unimodal_logits(features)
            return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])

    def fused_logits(self, features: Sequence[Tensor], used: Sequence[bool]) -> Tensor:
        """Compute the fused logits (b, k) with only the `used` modalities (m,) present, in float32."""
        with torch.autocast(features[0].device.type, enabled=False):
            masked = [f if is_used else torch.zeros_like(f) for f, is_used in zip(features, used, strict=True)]
            return self.fusion(masked)  # type: ignore[no-any-return]

    def tested_logits(self, outputs: Outputs) -> Tensor:
        """Return the logits (b, k) that are the prediction of all modalities, by the config's `answer`."""
        if self.config.answer == "fused":
            return outputs.fused
        heads = outputs.unimodal.sum(dim=0)
        return heads if self.config.answer == "heads" else outputs.fused + heads

    def tested_logits_of(self, features: Sequence[Tensor], used: Sequence[bool]) -> Tensor:
        """Compute the tested logits (b, k) with only the `used` modalities (m,) present, in float32."""
        if self.config.answer == "fused":
            return self.fused_logits(features, used)
        masked = [f if is_used else torch.zeros_like(f) for f, is_used in zip(features, used, strict=True)]
        return self.tested_logits(self.classify(masked))

    def forward(
        self, inputs: Sequence[Tensor], modality_mask: Tensor | None = None, *, unimodal: bool = True
    ) -> Outputs:
        """Compute the logits of a batch of m inputs, see `encode` and `classify`."""
        return self.classify(self.encode(inputs, modality_mask), unimodal=unimodal)

    def parameters_of(self, modality: int) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters that only modality j uses: of its encoder and of its separate head."""
        yield from (parameter for parameter in self.encoders[modality].parameters() if parameter.requires_grad)
        if self.has_own_heads:
            yield from self.heads[modality].parameters()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Compute the cross entropy (..., b) of each sample in float32, of logits (..., b, k) and one label (b,) for all.

    Of logits (m, b, k) from the log probabilities: torch's function needs the label m times.
    """
    if logits.ndim == 2:
        return functional.cross_entropy(logits.float(), label, reduction="none")
    log_p = logits.float().log_softmax(dim=-1)
    return -log_p.gather(-1, label.expand(logits.shape[:-1])[..., None]).squeeze(-1)


def separate_losses(outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each sample's loss, of the fused logits (b,) and of each modality's (m, b), in float32.

    Computed separately, unlike `Outputs.losses`: no gradient of one, not even of 0, reaches parameters that only the
    other uses.
    """
    return outputs.loss_of(outputs.fused, target), outputs.loss_of(outputs.unimodal, target)


def shapley_sets(num_modalities: int, *, seed: int = 0) -> list[ModalitySet]:
    """Return the sets of modalities that `contribution` needs, smallest first, from the empty set to all modalities.

    All 2^m up to six modalities; beyond that those of the orders that `shapley` draws with the seed.
    """
    sets = {NO_MODALITY}

    def record(modality_set: ModalitySet) -> Floats:
        sets.add(modality_set)
        return np.zeros(1, np.float32)

    shapley(record, num_modalities, seed=seed)
    return sorted(sets, key=lambda modality_set: (len(modality_set), sorted(modality_set)))


def correct_by_set(net: FusionNet, sets: Sequence[ModalitySet]) -> Callable[[Outputs, Tensor], Tensor]:
    """Return a function of outputs and target: the value of the tested prediction with only a set present, (s, b).

    Whether the class is correct; the share of labels that are; minus the absolute error of a regression, in data units.
    """

    def value(logits: Tensor, target: Tensor) -> Tensor:
        if net.config.task == "classification":
            return logits.argmax(dim=1) == target
        if net.config.task == "multilabel":
            return ((logits > 0) == (target > 0.5)).float().mean(dim=1)
        return -(net.predict(logits) - target).abs().mean(dim=1)

    def read(outputs: Outputs, target: Tensor) -> Tensor:
        used_modalities = [[index in modality_set for index in range(net.num_modalities)] for modality_set in sets]
        return torch.stack([value(net.tested_logits_of(outputs.features, used), target) for used in used_modalities])

    return read
