"""Connections to Ray: a cluster of this machine for one command, or a running one; what its machines have in common."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, RunError
from ..workers import default_workers
from .executors import RayConfig, RayOptions

log = logging.getLogger("mmaudit")

_CHECKED_FILES = 64  # of the data, whose sizes every worker compares
_SAME_VERSIONS = ("mmaudit", "numpy", "pyarrow", "scipy", "scikit-learn", "torch")  # results depend on them
_CONNECT_SECONDS = 10.0  # for the address of a cluster; Ray itself tries for minutes
_OBJECT_STORE_BYTES = 100 << 20  # of the job alone: media, features and tables never enter it
_MAX_FOLDER = 40  # characters of a temporary folder: Ray adds 62, and paths of sockets have at most 107
# By default Ray lowers the priority of workers by 15, and starts others where a worker takes over 60 s to begin: with a
# load of 14 on two cores none began within 7 minutes.
_SYSTEM = {"worker_niceness": 0, "worker_register_timeout_seconds": 300}
_LOCAL = "local"  # without it, ray.init joins any cluster whose address an earlier command has left in /tmp


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a worker has to have as the driver has it: packages, working folder, run folder and data.

    marker: a file in the run folder, and its content; None of a run at a URL. files: paths of the data with their
    sizes. cwd: None where no path depends on it.
    """

    versions: dict[str, str]
    cwd: str | None
    marker: tuple[str, str] | None
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, *, marker: tuple[str, str] | None, files: Sequence[str | Path]) -> Site:
        """Describe this process's own machine; of many files some are compared."""
        sizes = [(str(path), _size_of(str(path))) for path in files[:: max(1, len(files) // _CHECKED_FILES)]]
        present = tuple((path, size) for path, size in sizes if size is not None)
        cwd = None if marker is None and not present else os.getcwd()
        return cls(versions=installed_versions(), cwd=cwd, marker=marker, files=present)

    def enter(self) -> None:
        """Change to the working folder; raise RunError where something is missing or differs."""
        host, own = socket.gethostname(), installed_versions()
        for name in self.versions:
            if own.get(name) != self.versions[name]:
                raise RunError(f"{host} has {name} {own.get(name)}, the driver {self.versions[name]}: install the same")
        advice = "with --engine ray, data and run folder lie on a file system that all machines see, or at URLs"
        if self.cwd is not None:
            if not os.path.isdir(self.cwd):
                raise RunError(f"the working folder {self.cwd} is not visible on {host}: {advice}")
            os.chdir(self.cwd)
        if self.marker is not None:
            path, token = self.marker
            if not os.path.exists(path) or Path(path).read_text(encoding="utf-8") != token:
                raise RunError(f"the run folder {os.path.dirname(path)} is not visible on {host}: {advice}")
        for path, size in self.files:
            if _size_of(path) != size:
                raise RunError(f"{path} is not the same on {host} (size {_size_of(path)}, here {size}): {advice}")


def installed_versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {name: version(name) for name in _SAME_VERSIONS} | {"python": sys.version.split()[0]}


def _size_of(path: str) -> int | None:
    return os.path.getsize(path) if os.path.exists(path) else None


@contextmanager
def open_ray(options: RayOptions) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine, and yield the module `ray`; a connection of before is kept.

    The address is that of the options, else RAY_ADDRESS; without either, a cluster of this machine is started.

    Ray prints to stdout what happens to workers: it is logged with --verbose instead, as results are printed there.

    Raises:
        RunError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = options.address or os.environ.get("RAY_ADDRESS") or _LOCAL
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = _temporary_folder() if address == _LOCAL else None
    try:
        with redirect_stdout(_DebugLog()):
            try:
                if folder is None:
                    _join(ray, address)
                else:
                    _start(ray, options, folder=folder)
                _restore(signals)
                yield ray
            finally:
                ray.shutdown()
    finally:
        _restore(signals)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def import_ray() -> Any:
    """Import Ray; raise RunError if it is not installed."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default since 2.51
    try:
        import ray
    except ImportError as error:
        raise RunError('--engine ray needs Ray: pip install "mmaudit[ray]"') from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _start(ray: Any, options: RayOptions, *, folder: str) -> None:
    """Start a cluster of this machine alone, at the address of the loopback interface."""
    config = options.config
    num_cpus = max(default_workers(), (options.num_workers or 1) * config.cpus)
    with _loopback():
        ray.init(
            address=_LOCAL,
            num_cpus=num_cpus,
            num_gpus=torch.cuda.device_count() if config.gpus else 0,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace="mmaudit",
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            _system_config=_SYSTEM,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    if not num_slots(ray, config):
        resources = ray.cluster_resources()
        raise RunError(
            f"this machine has no room for a worker of {config.cpus} CPU, {config.gpus:g} GPU and "
            f"{config.reserved_gb:g} GB: it has {resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU and "
            f"{resources.get('memory', 0) / 1e9:.1f} GB; lower ray.cpus, ray.gpus or ray.memory_gb"
        )


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray use 127.0.0.1, as it does on systems that it supports for single machines only."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(ray: Any, address: str) -> None:
    """Connect to a running cluster, within a bounded time where nothing answers."""
    if "://" in address:
        raise ConfigError(
            f"--ray-address {address}: the Ray client is not supported; run the command on a machine of the cluster, "
            "with --ray-address auto"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise RunError(f"no Ray cluster answers at {address} ({error.strerror or error})") from error
    elif address != "auto":
        raise ConfigError(f"--ray-address {address}: not of the form HOST:PORT, nor auto")
    try:
        ray.init(address=address, namespace="mmaudit", log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"no Ray cluster answers at {address} ({reason})") from error


def num_slots(ray: Any, config: RayConfig) -> int:
    """Return the number of workers that the machines of the cluster have room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // need) for name, need in config.resources.items()) for node in nodes)


def _temporary_folder() -> str:
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="mmaudit-ray-", dir=parent if len(parent) <= _MAX_FOLDER - 20 else "/tmp")


def _restore(signals: dict[signal.Signals, Any]) -> None:
    """Restore handlers of signals that Ray has replaced by its own."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in signals.items():
            with suppress(TypeError):  # of a handler that was not set by Python
                signal.signal(number, handler)


class _DebugLog(io.TextIOBase):
    """A stream whose lines are logged for --verbose."""

    def write(self, text: str) -> int:
        """Log a line."""
        if text.strip():
            log.debug("%s", text.strip())
        return len(text)
