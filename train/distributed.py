"""Processes of a distributed training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from ..audit.errors import ConfigError

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
    if world_size == 1 or distributed.is_initialized():
        is_initialized = distributed.is_initialized()
        yield (
            DistributedContext(rank=distributed.get_rank(), world_size=distributed.get_world_size())
            if is_initialized
            else SINGLE_PROCESS
        )
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
