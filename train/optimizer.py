"""Optimiser steps, and the processes that train together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..audit.errors import ConfigError
from .config import OptimConfig
from .network import FusionNet

_TIMEOUT = timedelta(hours=24)  # the first process may encode a whole dataset while the others wait


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedContext:
    """`world_size` processes, of which this is number `rank`. All get the same tensors and therefore stay equal."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, with one all-reduce per device and dtype."""
        if self.world_size == 1 or not tensors:
            return
        kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
        for kind in sorted(kinds, key=str):
            group = [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            distributed.all_reduce(flat)
            end = 0
            for tensor in group:
                start, end = end, end + tensor.numel()
                tensor.copy_(flat[start:end].view_as(tensor))

    def gather(self, local: Tensor) -> Tensor:
        """Concatenate every process's tensor along the last dimension, in the order of ranks; all get the result."""
        if self.world_size == 1:
            return local
        width = torch.zeros(self.world_size, dtype=torch.int64, device=local.device)
        width[self.rank] = local.shape[-1]
        distributed.all_reduce(width)
        max_width = int(width.max())
        padded = local.new_zeros(*local.shape[:-1], max_width)
        padded[..., : local.shape[-1]] = local
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        distributed.all_gather(gathered, padded)
        return torch.cat([local[..., :size] for local, size in zip(gathered, width.tolist(), strict=True)], dim=-1)

    def slice(self, length: int) -> slice:
        """Return this process's slice of `length` elements: adjacent slices, at most one apart in length."""
        return slice(self.rank * length // self.world_size, (self.rank + 1) * length // self.world_size)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            distributed.barrier()


SINGLE_PROCESS = DistributedContext()


@contextmanager
def open_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group that torchrun has started, if any: nccl on CUDA, gloo on a CPU."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed.is_initialized():
        yield DistributedContext(rank=distributed.get_rank(), world_size=distributed.get_world_size())
        return
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    context = DistributedContext(rank=distributed.get_rank(), world_size=world_size)
    try:
        yield context
        context.wait()  # a process that exits early makes those that still communicate with it fail
    finally:
        distributed.destroy_process_group()


def local_device(device: str) -> str:
    """Return the device of this process: under torchrun, the CUDA device of its local rank.

    Raises ConfigError where several processes would share a device.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ConfigError(
            f"--device {device} would be shared by all processes: use --device cuda or auto under torchrun"
        )
    if int(rank) >= (num_devices := torch.cuda.device_count()):
        raise ConfigError(
            f"process {rank} has no GPU: {num_devices} available, set --nproc-per-node to at most {num_devices}"
        )
    return f"cuda:{rank}"


class Optimization:
    """Optimiser of a network with precision, gradient sums over processes, clipping, and learning rates per modality.

    A loss passed to it is this process's part of the step's mean loss; gradients are sums over all processes, unscaled.
    `generator` is reseeded for every step with the same seed in all processes, for random numbers that all must share.
    part_size: samples over all processes of the parts of a step whose gradients are accumulated; None: steps are whole.
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
        part_size: int | None = None,
    ) -> None:
        self.net, self.config, self.distributed = net, config, distributed
        self.part_size = part_size
        self.device_type = torch.device(device).type
        self.generator = torch.Generator(device=device)
        self._cuda_index = torch.device(device).index or 0
        self.lr_factors = [1.0] * net.num_modalities  # set by a method, on each modality's learning rate
        self.frozen = [False] * net.num_modalities  # set by a method
        self._configured_factors = [config.modality_lr_factors().get(name, 1.0) for name in net.config.modalities]
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device_type == "cuda" else "float32"
        self._parameters = list(net.parameters())
        self.dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        self._scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")
        self.optimizer = self._build(by_modality=by_modality or bool(config.modality_lr))
        self.grad_norm: Tensor | None = None

    def _build(self, *, by_modality: bool) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": list(self.net.parameters_of(j)), "modality": j}
            for j in range(self.net.num_modalities if by_modality else 0)
        ]
        assigned = {id(parameter) for group in groups for parameter in group["params"]}
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        shared_parameters = [parameter for parameter in trained if id(parameter) not in assigned]
        groups.append({"params": shared_parameters, "modality": None})
        config = self.config
        # A fused SGD whose first step the scaler skips starts with uninitialised memory as its momentum.
        fused = not self._scaler.is_enabled()
        if config.optimizer == "sgd":
            sgd = torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
            )
            self._set_momentum_to_zero(sgd)
            return sgd
        adam = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return adam(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)

    def _set_momentum_to_zero(self, sgd: torch.optim.SGD) -> None:
        """Create the momentum of all parameters, 0, from which torch's first step follows exactly: 0 m + g = g.

        Otherwise torch creates that of the parameters with a gradient, and its fused step fails when another parameter
        gets its first gradient later, as in alternating training, after unfreezing, or when no sample of the first step
        has a modality.
        """
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in trained if self.config.momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

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

    def backward(self, loss: Tensor | Iterator[Tensor]) -> None:
        """Replace all gradients by those of the loss, or of the sum of several losses.

        Of several each is computed, by the iterator, when the graph of the one before is freed; processes communicate
        and the scaler looks for infinities after the last.
        """
        for parameter in self._parameters:  # not zero_grad, whose profiling hook takes 3% of a small step
            parameter.grad = None
        for part in (loss,) if isinstance(loss, Tensor) else loss:
            torch.autograd.backward(self._scaler.scale(part))
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
            self.grad_norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _sum_gradients(self) -> None:
        """Sum the gradients over all processes. One that no process has stays None: the parameter is not updated."""
        if self.distributed.world_size == 1:
            return
        parameters = [p for p in self._parameters if p.requires_grad]
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
