"""Optimiser steps over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig
from .distributed import DistributedContext
from .network import FusionNet


class Optimization:
    """Optimiser of a network with precision, gradient sums over processes, clipping, and learning rates per modality.

    A loss passed to it is this process's part of the step's mean loss; gradients are sums over all processes, unscaled.
    `generator` is reseeded for every step with the same seed in all processes, for random numbers that all must share.
    by_modality: whether a method sets `lr_factors`. Where none does and no factor is configured, the optimiser has one
    parameter group instead of 1 + m, which saves 3% of a small step.
    """

    def __init__(
        self,
        net: FusionNet,
        config: OptimConfig,
        *,
        device: str,
        distributed: DistributedContext,
        by_modality: bool = True,
    ) -> None:
        self.net, self.config, self.distributed = net, config, distributed
        self.device_type = torch.device(device).type
        self.generator = torch.Generator(device=device)
        self._cuda_index = torch.device(device).index or 0
        self.lr_factors = [1.0] * net.num_modalities  # set by a method, on each modality's learning rate
        self.frozen = [False] * net.num_modalities  # set by a method
        self._configured_factors = [config.modality_lr_factors().get(name, 1.0) for name in net.config.modalities]
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device_type == "cuda" else "float32"
        self.dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        self._scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")
        self.optimizer = self._build(by_modality=by_modality or bool(config.modality_lr))
        self.grad_norm: Tensor | None = None

    def _build(self, *, by_modality: bool) -> torch.optim.Optimizer:
        modality_indices = range(self.net.num_modalities if by_modality else 0)
        modality_parameters: list[list[nn.Parameter]] = [list(self.net.parameters_of(j)) for j in modality_indices]
        assigned = {id(parameter) for group in modality_parameters for parameter in group}
        shared_parameters = [parameter for parameter in self.net.parameters() if id(parameter) not in assigned]
        groups = [
            {"params": group, "modality": j}
            for j, group in zip([*modality_indices, None], [*modality_parameters, shared_parameters], strict=True)
        ]
        config = self.config
        # A fused SGD whose first step the scaler skips starts with uninitialised memory as its momentum.
        fused = not self._scaler.is_enabled()
        if config.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
            )
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)

    def begin_epoch(self, epoch: int, *, epochs: int) -> float:
        """Set the learning rates of epoch 1, 2, ... and return the base rate."""
        base_lr = self.config.lr * self.config.lr_multiplier(epoch, epochs=epochs)
        assert len(self.optimizer.param_groups) > 1 or set(self.lr_factors) == {1.0}, (
            "a method that sets factors must declare sets_rates"
        )
        for group in self.optimizer.param_groups:
            j = group["modality"]
            group["lr"] = base_lr * (1.0 if j is None else self._configured_factors[j] * self.lr_factors[j])
        return base_lr

    def begin_step(self, seed: int) -> None:
        """Reseed the random numbers of a step: those shared by all processes, and each process's own (dropout)."""
        self.generator.manual_seed(seed)
        # Not torch.manual_seed: where CUDA is not initialised it records the call stack, a tenth of a small step.
        device_generator = (
            torch.cuda.default_generators[self._cuda_index] if self.device_type == "cuda" else torch.default_generator
        )
        device_generator.manual_seed(seed + self.distributed.rank)

    def autocast(self) -> Any:
        """Return the autocast context of the configured precision."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Replace all gradients by those of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        self._clear_frozen_gradients()
        self._sum_gradients()  # before the scaler looks for inf and NaN: all processes must find the same
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of a loss by some parameters, 0 where it does not depend on one; the graph is kept."""
        scaled = self._scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        unscaled = [
            torch.zeros_like(p) if g is None else g / scale if scale != 1.0 else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        self.distributed.sum_(unscaled)
        return unscaled

    def apply(self) -> None:
        """Clip the gradients and step."""
        if self.config.clip_norm > 0:
            self.grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _sum_gradients(self) -> None:
        """Sum the gradients over all processes. One that no process has stays None: the parameter is not updated."""
        if self.distributed.world_size == 1:
            return
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        has_gradient = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device
        )
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.distributed.sum_([has_gradient, *grads])
        for p, grad, any_gradient in zip(parameters, grads, has_gradient.tolist(), strict=True):
            p.grad = grad if any_gradient else None

    def _clear_frozen_gradients(self) -> None:
        """Set the gradients of frozen modalities to None, so that their parameters are neither updated nor decayed."""
        for j, frozen in enumerate(self.frozen):
            if frozen:
                for parameter in self.net.parameters_of(j):
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step depends on: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "rate": list(self.lr_factors),
            "frozen": list(self.frozen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.lr_factors, self.frozen = list(state["rate"]), list(state["frozen"])
