"""Balancers: changes of loss and gradients for the weaker modality."""

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
    """How an epoch ended on validation: mean cross entropy and accuracy, the fused answer's and each modality's."""

    loss: float
    accuracy: float
    own_loss: tuple[float, ...]
    own_accuracy: tuple[float, ...]


class Balancer(ABC):
    """One method: a loss, and what is done to its gradients. Its state goes into checkpoints.

    The order of calls: begin_epoch; for every step prepare and step; end_epoch. In all processes alike.
    """

    needs_unimodal_logits = (
        True  # whether steps ask the network for what each modality says alone, or for the fused answer only
    )

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        self.net, self.optimization, self.config, self.epochs = net, optimization, config, epochs
        self.distributed = optimization.distributed

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Look at the model before epoch 1, 2, ..., if need be."""
        self.epoch = epoch

    def prepare(self, batch: Batch) -> Batch:
        """Change a batch before the network sees it."""
        return batch

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Learn from one batch, and give what the network said and this process's share of the loss, detached."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present, each=self.needs_unimodal_logits)
        loss = self.loss(outputs, batch)
        self.optimization.backward(loss)
        self.modulate(outputs, batch)
        self.optimization.apply()
        return outputs, loss.detach()

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give this process's share of the step's mean loss."""

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Change the gradients, which are those of the whole step already, before they are applied."""

    def end_epoch(self, epoch: int, found: Validation) -> None:
        """Draw conclusions from the validation samples."""

    def numbers(self) -> dict[str, float]:
        """Give what is worth a column of history.jsonl, as it stands after an epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next epochs depend on: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""

    # What several methods share.

    def fused_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean cross entropy of the fused answer, of this process's share; and heads of their own learn to listen.

        Those get the cross entropy of features that are detached: so that each modality can be heard alone while
        nothing but the fused answer moves the encoders.
        """
        loss = batch.mean_fused(cross_entropy(outputs.fused, batch.label))
        if self.net.has_own_heads:
            with self.optimization.autocast():
                logits = self.net.alone([f.detach() for f in outputs.features])
            loss = loss + batch.mean_own(cross_entropy(logits, batch.label)).sum()
        return loss

    def summed_losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean cross entropy of the fused answer plus that of every modality, of this process's share."""
        return (outputs.cross_entropy(batch.label) * batch.loss_weight).sum()

    def mean_confidence(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the step's mean probability of the true class (1 + m,), over all processes: the fused answer's first."""
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
    """Make the balancer of that name, one of BALANCERS."""
    module, _, found = BALANCERS[name].home.partition(":")
    made: Balancer = getattr(import_module(f".{module}", __package__), found)(net, optimization, config, epochs=epochs)
    return made
