"""Balancers: changes of loss and gradients in favour of the weaker modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from ..batches import Batch, ModelReader
from ..network import FusionNet, Outputs, cross_entropy
from ..optimizer import Optimization
from .config import BALANCERS, BalancingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Validation results of an epoch: mean cross entropy and accuracy, of the fused prediction and of each modality."""

    loss: float
    accuracy: float
    unimodal_loss: tuple[float, ...]
    unimodal_accuracy: tuple[float, ...]


class Balancer(ABC):
    """One method: a loss and what is done to its gradients. Its state is saved in checkpoints.

    Order of calls: begin_epoch; for every step prepare and step; end_epoch. The same in all processes.
    """

    needs_unimodal_logits = True  # whether steps compute the unimodal logits, or the fused ones only

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        self.net, self.optimization, self.config, self.epochs = net, optimization, config, epochs
        self.distributed = optimization.distributed

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model before epoch 1, 2, ..., if the method needs it."""
        self.epoch = epoch

    def prepare(self, batch: Batch) -> Batch:
        """Change a batch before the forward pass."""
        return batch

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch; return the outputs and this process's part of the loss, detached."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present, unimodal=self.needs_unimodal_logits)
        loss = self.loss(outputs, batch)
        self.optimization.backward(loss)
        self.modulate(outputs, batch)
        self.optimization.apply()
        return outputs, loss.detach()

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the step's mean loss."""

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Change the gradients, already summed over processes, before the optimiser step."""

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Update the method's state from the validation results."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return the method's columns of history.jsonl at the end of an epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next epochs depend on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""

    # Shared by several methods.

    def fused_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the mean cross entropy of the fused logits, plus that of separate heads.

        The heads get detached features: unimodal logits are learned while only the fused loss trains the encoders.
        """
        loss = batch.mean_fused(cross_entropy(outputs.fused, batch.label))
        if self.net.has_own_heads:
            with self.optimization.autocast():
                logits = self.net.unimodal_logits([f.detach() for f in outputs.features])
            loss = loss + batch.mean_unimodal(cross_entropy(logits, batch.label)).sum()
        return loss

    def summed_losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute this process's part of the mean cross entropy of the fused logits plus that of every modality."""
        return (outputs.cross_entropy(batch.label) * batch.loss_weight).sum()

    def mean_confidence(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the step's mean probability of the true class (1 + m,) over all processes, fused first."""
        confidence = outputs.confidence(batch.label)
        mean = (confidence * batch.loss_weight).sum(dim=1)
        self.distributed.sum_([mean])
        return mean

    def scale_gradients(self, coefficients: Sequence[float] | Tensor) -> None:
        """Multiply the gradients of each modality's encoder by its coefficient (m,)."""
        for encoder, coefficient in zip(self.net.encoders, coefficients, strict=True):
            for parameter in encoder.parameters():
                if parameter.grad is not None:
                    parameter.grad *= coefficient


def build_balancer(
    name: str, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int
) -> Balancer:
    """Build the balancer of a name in BALANCERS."""
    module, _, class_name = BALANCERS[name].class_path.partition(":")
    balancer: Balancer = getattr(import_module(f".{module}", __package__), class_name)(
        net, optimization, config, epochs=epochs
    )
    return balancer


class Joint(Balancer):
    """L = mean_i CE(z_i^fused, y_i). Separate heads train on detached features: they do not train the encoders."""

    needs_unimodal_logits = False

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the fused logits."""
        return self.fused_loss(outputs, batch)


class Sum(Balancer):
    """L = mean_i CE(z_i^fused, y_i) + sum_j mean_i CE(z_i^j, y_i), each mean over the samples of its loss."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the mean cross entropies, with equal weights."""
        return self.summed_losses(outputs, batch)
