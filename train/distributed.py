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

_PATIENCE = timedelta(hours=24)  # the first process may be encoding a whole dataset while the others wait


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedContext:
    """`world_size` processes, of which this is number `rank`. All are given the same tensors, and so stay alike."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes: one message for each device and dtype."""
        if self.world_size == 1 or not tensors:
            return
        kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
        for kind in sorted(kinds, key=str):
            some = [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            distributed.all_reduce(flat)
            end = 0
            for tensor in some:
                start, end = end, end + tensor.numel()
                tensor.copy_(flat[start:end].view_as(tensor))

    def gather(self, part: Tensor) -> Tensor:
        """Join what every process has along the last dimension, in the order of their ranks; all get the whole."""
        if self.world_size == 1:
            return part
        width = torch.zeros(self.world_size, dtype=torch.int64, device=part.device)
        width[self.rank] = part.shape[-1]
        distributed.all_reduce(width)
        most = int(width.max())
        padded = part.new_zeros(*part.shape[:-1], most)
        padded[..., : part.shape[-1]] = part
        found = [torch.empty_like(padded) for _ in range(self.world_size)]
        distributed.all_gather(found, padded)
        return torch.cat([part[..., :size] for part, size in zip(found, width.tolist(), strict=True)], dim=-1)

    def slice(self, number: int) -> slice:
        """Give this process's run of `number` things: runs one after another are the whole, one apart at most in size.

        The same cut as `rebalance.curriculum.batch_of` makes.
        """
        return slice(self.rank * number // self.world_size, (self.rank + 1) * number // self.world_size)

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.world_size > 1:
            distributed.barrier()


SINGLE_PROCESS = DistributedContext()


@contextmanager
def open_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the processes that torchrun has started, if any: nccl on CUDA, gloo on a CPU."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or distributed.is_initialized():
        already = distributed.is_initialized()
        yield (
            DistributedContext(rank=distributed.get_rank(), world_size=distributed.get_world_size())
            if already
            else SINGLE_PROCESS
        )
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    context = DistributedContext(rank=distributed.get_rank(), world_size=world_size)
    try:
        yield context
        context.wait()  # one that is gone while another still talks to it brings that one down
    finally:
        distributed.destroy_process_group()


def local_device(device: str) -> str:
    """Give the device of this process: under torchrun, the CUDA device of its number on this machine.

    Raises ConfigError where several processes would share one.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ConfigError(f"--device {device} is one for all processes: under torchrun say --device cuda, or auto")
    if int(rank) >= (number := torch.cuda.device_count()):
        raise ConfigError(f"process {rank} has no GPU of its own: --nproc-per-node {number} at most")
    return f"cuda:{rank}"
