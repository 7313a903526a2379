"""Balancers: changes of loss and gradients in favour of the weaker modality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...audit.errors import ConfigError
from ...audit.parsing import check_ranges
from ..batches import Batch, Method, ModelReader
from ..fusion import Fusion
from ..network import FusionNet, Outputs, separate_losses
from ..optimizer import Optimization


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Validation results of an epoch: mean loss and metric, of the tested answer and of each modality.

    The metric is the accuracy of classes, the MAP of label sets, and the mean absolute error of numbers.
    """

    loss: float
    metric: float
    unimodal_loss: tuple[float, ...]
    unimodal_metric: tuple[float, ...]


def check_window(section: str, config: Any) -> None:
    """Raise ConfigError where no epoch lies between a config's `first_epoch` and `last_epoch`, counted from 1."""
    check_ranges(section, config, first_epoch="[1, 1e9]", last_epoch="[1, 1e9]")
    if config.last_epoch < config.first_epoch:
        raise ConfigError(
            f"{section}.first_epoch is {config.first_epoch}, after last_epoch {config.last_epoch}: "
            "no epoch would be modulated"
        )


class Balancer(Method):
    """One method: a loss and what is done to its gradients. Its state is saved in checkpoints.

    Order of calls: begin_epoch; for every step prepare and step; end_epoch. The same in all processes. The hooks of a
    method change the loss, the batch, the step or the gradients, or follow the validation results.

    A method that changes the network brings a fusion of its own, in its file: the fusion's logits are those of training
    and of inference, and its parameters and buffers, such as a constant that the balancer sets, are saved with the
    model. The fusion's name is that of the balancer.

    Attributes:
        fusions: Names of the fusions that it works with, the usual one first.
        own_fusion: Fusion that it brings; the usual one where it is set.
        fusion_reason: Why it works with no other fusion, for the message that refuses one.
        has_unimodal_loss: It has one loss per modality, which trains on samples that only that modality has.
        own_heads: Its unimodal losses need heads that the fused prediction does not share.
        sets_rates: It sets one learning rate per modality.
        needs_unimodal_logits: Its steps compute the unimodal logits, not the fused ones only.
        accumulation_reason: Why it does not train with gradients accumulated over the parts of a step; "" where it
            does. `step` and `modulate` get the whole batch, `forward` its parts one after another.
        evaluates: What it evaluates between epochs: "train" or "validation" samples, or "copies" that it trains. A loop
            of the user's has these only where they are passed.

    Example:
        >>> class Twice(Balancer):
        ...     has_unimodal_loss = True
        ...
        ...     def loss(self, outputs, batch):
        ...         return self.fused_loss(outputs, batch) + 2 * self.summed_losses(outputs, batch)
    """

    min_modalities: ClassVar[int] = 2
    fusions: ClassVar[tuple[str, ...]] = ("concat", "late", "gated", "gated-unit", "film", "film-projected", "mmtm")
    own_fusion: ClassVar[type[Fusion] | None] = None
    fusion_reason: ClassVar[str] = ""
    has_unimodal_loss: ClassVar[bool] = False
    own_heads: ClassVar[bool] = False
    sets_rates: ClassVar[bool] = False
    needs_unimodal_logits: bool = True
    accumulation_reason: ClassVar[str] = ""
    evaluates: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: FusionNet, optimization: Optimization, config: Any = None, *, epochs: int) -> None:
        self.net, self.optimization, self.epochs = net, optimization, epochs
        self.config = self.default_config() if config is None else config
        self.distributed, self.device = optimization.distributed, optimization.generator.device
        self.initialize()

    def initialize(self) -> None:
        """Set up the state."""

    @classmethod
    def reads_validation(cls, config: Any) -> bool:
        """Return whether the method needs validation samples; without them `end_epoch` is not called."""
        return False

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Return what the method needs of data and settings, in words."""
        fusion = () if cls.fusions == Balancer.fusions else (f"--fusion {' or '.join(cls.fusions)}",)
        own_fusion = () if cls.own_fusion is None else ("a fusion of its own",)
        own_heads = ("a separate head per modality",) if cls.own_heads else ()
        return (*super().needs(), *own_fusion, *(fusion if cls.fusions else ()), *own_heads)

    @classmethod
    def needs_own_heads(cls, config: Any) -> bool:
        """Whether the network gets separate heads, with these constants."""
        return cls.own_heads

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model before epoch 1, 2, ..., if the method needs it."""
        self.epoch = epoch

    def prepare(self, batch: Batch) -> Batch:
        """Change a batch before the forward pass."""
        return batch

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch; return the outputs and this process's part of the loss, detached."""
        outputs, loss = self.backward(batch)
        self.modulate(outputs, batch)
        self.optimization.apply()
        return outputs, loss

    def backward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Compute the gradients of the batch's loss, part by part; return outputs and loss of the batch, detached."""
        parts = batch.parts(self.optimization.part_size, world_size=self.distributed.world_size)
        outputs: list[Outputs] = []
        losses: list[Tensor] = []

        def iter_losses() -> Iterator[Tensor]:
            for part in parts:
                part_outputs, loss = self.forward(part)
                outputs.append(part_outputs if len(parts) == 1 else part_outputs.detached())
                losses.append(loss.detach())
                yield loss

        self.optimization.backward(iter_losses())
        return Outputs.joined(outputs), losses[0] if len(parts) == 1 else torch.stack(losses).sum()

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return the outputs for a batch, or for a part of one, and this process's part of the loss."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present, unimodal=self.needs_unimodal_logits)
        return outputs, self.loss(outputs, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the step's mean loss; by default the cross entropy of the fused logits."""
        return self.fused_loss(outputs, batch)

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Change the gradients, already summed over processes, before the optimiser step."""

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Update the method's state from the validation results."""

    # Shared by several methods.

    def fused_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the mean cross entropy of the fused logits, plus that of separate heads.

        The heads get detached features: unimodal logits are learned while only the fused loss trains the encoders.
        """
        return batch.mean_fused(self.net.loss_of(outputs.fused, batch.label)) + self.head_loss(outputs, batch)

    def head_loss(self, outputs: Outputs, batch: Batch) -> Tensor | float:
        """Compute this process's part of the mean cross entropies of separate heads on detached features; 0 without."""
        if not self.net.has_own_heads:
            return 0.0
        with self.optimization.autocast():
            logits = self.net.unimodal_logits([f.detach() for f in outputs.features])
        return batch.mean_unimodal(self.net.loss_of(logits, batch.label)).sum()

    def summed_losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the mean cross entropy of the fused logits plus that of every modality."""
        return (outputs.losses(batch.label) * batch.loss_weight).sum()

    def mean_confidence(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the step's mean probability of the true class (1 + m,) over all processes, fused first."""
        confidence = outputs.confidence(batch.label)
        mean = (confidence * batch.loss_weight).sum(dim=1)
        self.distributed.sum_([mean])
        return mean

    def by_modality(self, prefix: str, values: Tensor | Iterable[float]) -> dict[str, float]:
        """Return columns of history.jsonl, one for each modality, from values (m,)."""
        numbers = values.tolist() if isinstance(values, Tensor) else values
        names = self.net.config.modalities
        return {f"{prefix}_{name}": float(value) for name, value in zip(names, numbers, strict=True)}

    def scale_gradients(
        self, coefficients: Sequence[float] | Tensor, groups: Sequence[Sequence[nn.Parameter]] | None = None
    ) -> None:
        """Multiply the gradients of each modality's parameters, by default its encoder's, by its coefficient (m,)."""
        groups = [list(encoder.parameters()) for encoder in self.net.encoders] if groups is None else groups
        for parameters, coefficient in zip(groups, coefficients, strict=True):
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)


class Joint(Balancer):
    """L = mean_i CE(z_i^fused, y_i). Separate heads train on detached features: they do not train the encoders."""

    min_modalities = 1
    needs_unimodal_logits = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SumConfig:
    """Weights of the summed losses. BSS has 0.1 and 0.9 on CREMA-D, with finetune.answer = "heads" and own heads.

    Args:
        fused_weight: Weight of the cross entropy of the fused logits.
        unimodal_weight: Weight of the cross entropy of each modality.
    """

    section: ClassVar[str] = "balancing.sum"
    fused_weight: float = 1.0
    unimodal_weight: float = 1.0

    def __post_init__(self) -> None:
        check_loss_weights(self.section, fused=self.fused_weight, unimodal=self.unimodal_weight)


def check_loss_weights(section: str, *, fused: float, unimodal: float) -> None:
    """Raise ConfigError for weights of the fused loss and the unimodal ones that are negative, or both 0."""
    for name, value in (("fused_weight", fused), ("unimodal_weight", unimodal)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{section}.{name} is {value}; it must lie in [0, inf)")
    if not fused and not unimodal:
        raise ConfigError(f"{section}.fused_weight and {section}.unimodal_weight are both 0: nothing would be trained")


class Sum(Balancer):
    """L = w_f mean_i CE(z_i^fused, y_i) + w_u sum_j mean_i CE(z_i^j, y_i), each mean over the samples of its loss.

    Both weights are 1 by default: `fused_weight` and `unimodal_weight` of the config. With w_u = 0 separate heads train
    on detached features, as those of joint.
    """

    config_type: ClassVar[type[Any] | None] = SumConfig
    min_modalities = 1
    has_unimodal_loss = True

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the weighted sum of the mean cross entropies."""
        return self.weighted_losses(outputs, batch)

    def weighted_losses(self, outputs: Outputs, batch: Batch, *, loss_mask: Tensor | None = None) -> Tensor:
        """Compute the weighted sum, only of the unimodal losses whose mask (m,) is 1."""
        fused_weight, unimodal_weight = self.config.fused_weight, self.config.unimodal_weight
        loss: Tensor
        if not unimodal_weight:
            loss = fused_weight * batch.mean_fused(self.net.loss_of(outputs.fused, batch.label))
            return loss + self.head_loss(outputs, batch)
        if loss_mask is None and fused_weight == unimodal_weight == 1:
            return self.summed_losses(outputs, batch)
        fused, unimodal = separate_losses(outputs, batch.label)
        means = batch.mean_unimodal(unimodal)
        loss = unimodal_weight * (means.sum() if loss_mask is None else means @ loss_mask)
        return loss + fused_weight * batch.mean_fused(fused) if fused_weight else loss
