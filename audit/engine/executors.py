"""Executors: which parts of a stage a process works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError, choices
from ..parsing import check_ranges
from .plan import Part, take_parts

if TYPE_CHECKING:
    from .stages import ScoringJob

ENGINES = ("local", "ray")
_MEMORY_GB = 2.0  # of a worker whose memory is not known beforehand


class Stage(Protocol):
    """A stage that works on each part by itself: a function of a module, so that other processes can import it."""

    def __call__(self, job: ScoringJob, parts: Sequence[Part], /) -> None:
        """Do what is missing of these parts, in any order and in any process."""


class Executor(Protocol):
    """Runs a stage on parts; the results do not depend on the executor."""

    def run(self, stage: Stage, job: ScoringJob, parts: Sequence[Part]) -> None:
        """Run a stage on these parts, or on those of them that are this process's own."""


class RunFolder(Protocol):
    """A run that machines do not see as a folder: each has a working copy. It can be pickled."""

    def open(self) -> Path:
        """Return the working copy of this machine."""

    def fetch(self, folder: Path, parts: Sequence[int], files: Sequence[Path]) -> None:
        """Fetch the tables of some parts, those of all parts together, and these files, as far as they exist."""

    def publish(self, folder: Path) -> None:
        """Publish the files that have changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalExecutor:
    """All parts in this process, whose stages start processes and threads of their own."""

    def run(self, stage: Stage, job: ScoringJob, parts: Sequence[Part]) -> None:
        """Run a stage on all parts in order."""
        stage(job, parts)


@dataclass(frozen=True, slots=True)
class ShardExecutor:
    """The parts of shard i of n, as --shard states it: one task of an array of processes or machines."""

    shard: str

    def run(self, stage: Stage, job: ScoringJob, parts: Sequence[Part]) -> None:
        """Run a stage on the parts of this shard in order."""
        stage(job, take_parts(self.shard, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """What a worker of `--engine ray` reserves with Ray, and how often work is repeated.

    Args:
        cpus: CPUs of a worker, which are also its threads.
        gpus: GPUs of a worker, such as 0.5 where two share one; with 0 encoders, probes and networks run on CPUs.
        memory_gb: Memory of a worker in 10^9 bytes: a machine runs as many workers as fit. By default what a worker of
            `score` takes by its rows and features, and 2 in training. Ray reserves it and measures
            nothing; workers that took more are named with their figure.
        retries: How often a part, or a training, is repeated on another worker after its own has ended or failed.
        start_seconds: How long to wait for a worker before the command fails, such as for machines that have to start.

    Raises:
        ConfigError: A value is out of range.
    """

    cpus: int = 1
    gpus: float = 0.0
    memory_gb: float | None = None
    retries: int = 3
    start_seconds: float = 300.0

    def __post_init__(self) -> None:
        ranges = {"cpus": "[1, inf)", "gpus": "[0, inf)", "memory_gb": "[0, inf)", "retries": "[0, inf)"}
        check_ranges("ray", self, **ranges, start_seconds="(0, inf)")

    @property
    def reserved_gb(self) -> float:
        """Memory that a worker reserves, in 10^9 bytes."""
        return _MEMORY_GB if self.memory_gb is None else self.memory_gb

    @property
    def resources(self) -> dict[str, float]:
        """What a worker reserves, by Ray's names, memory in bytes; without what it does not need."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": int(self.reserved_gb * 1e9)}
        return {name: amount for name, amount in amounts.items() if amount}

    @property
    def device(self) -> str:
        """Device of the workers."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How a command uses Ray: its config, the address of a cluster, and the number of workers; see open_pool."""

    config: RayConfig
    address: str | None
    num_workers: int | None


def choose_engine(
    engine: str, config: RayConfig, *, address: str | None = None, num_workers: int | None = None, device: str = "auto"
) -> RayOptions | None:
    """Return how to use Ray, None for the engine `local`.

    Raises:
        ConfigError: The engine does not exist, or options contradict it.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: {choices(engine, ENGINES)}")
    if engine == "local":
        if address is not None:
            raise ConfigError(f"--ray-address {address}: only with --engine ray")
        return None
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--num-workers {num_workers}: with --engine ray at least one worker is needed")
    if device not in ("auto", config.device):
        setting = "ray.gpus=1" if device.startswith("cuda") else "ray.gpus=0"
        raise ConfigError(
            f"--device {device}: with --engine ray the workers have {config.gpus:g} GPUs each; pass --set {setting}"
        )
    return RayOptions(config=config, address=address, num_workers=num_workers)
