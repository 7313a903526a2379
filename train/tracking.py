"""Experiment trackers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from ..audit.errors import ConfigError
from . import TRACKERS

RecordLogger = Callable[[Mapping[str, float]], None]  # of a history record: numbers by name, with "epoch"


class Tracker(ABC):
    """One tracking package. module: what is imported of it."""

    module: ClassVar[str]

    @abstractmethod
    def open(self, package: Any, folder: Path, stack: ExitStack) -> RecordLogger:
        """Start the tracking of the fine-tuning in a folder, closed by `stack`; return what logs a record."""


class TensorBoard(Tracker):
    """Event files in the folder of the fine-tuning."""

    module = "torch.utils.tensorboard"

    def open(self, package: Any, folder: Path, stack: ExitStack) -> RecordLogger:
        """Write event files."""
        writer = package.SummaryWriter(str(folder / "tensorboard"))
        stack.callback(writer.close)

        def log_record(record: Mapping[str, float]) -> None:
            for name, value in record.items():
                writer.add_scalar(name, value, int(record["epoch"]))

        return log_record


class Wandb(Tracker):
    """Weights & Biases."""

    module = "wandb"

    def open(self, package: Any, folder: Path, stack: ExitStack) -> RecordLogger:
        """Start a run named after the folder."""
        folder.mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere
        run = package.init(project="mmaudit", name=folder.name, dir=str(folder))
        stack.callback(run.finish)
        return lambda record: run.log(dict(record), step=int(record["epoch"]))


class Mlflow(Tracker):
    """MLflow."""

    module = "mlflow"

    def open(self, package: Any, folder: Path, stack: ExitStack) -> RecordLogger:
        """Start a run named after the folder."""
        package.start_run(run_name=folder.name)
        stack.callback(package.end_run)
        return lambda record: package.log_metrics(dict(record), step=int(record["epoch"]))


def open_trackers(names: Sequence[str], folder: Path, *, stack: ExitStack) -> list[RecordLogger]:
    """Open the trackers of --report-to, closed by `stack`. ConfigError where one is not installed or fails."""
    loggers = []
    for name, (tracker, package) in zip(names, load_trackers(names), strict=True):
        try:
            loggers.append(tracker.open(package, folder, stack))
        except Exception as error:  # each package has its own types: no account, no server, no writable folder
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--report-to {name}: {name} cannot start, fix that or remove it: {reason}") from error
    return loggers


def load_trackers(names: Sequence[str]) -> list[tuple[Tracker, Any]]:
    """Import the packages of trackers; ConfigError for one that is not installed."""
    trackers = []
    for name in names:
        tracker: Tracker = TRACKERS.load(name)()
        try:
            trackers.append((tracker, import_module(tracker.module)))
        except ImportError as error:
            raise ConfigError(f"--report-to {name}: {name} is not installed: pip install {name}") from error
    return trackers
