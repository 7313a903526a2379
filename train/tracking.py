"""Experiment trackers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from ..audit.errors import ConfigError

RecordLogger = Callable[[Mapping[str, float]], None]  # of a history record: numbers by name, with "epoch"


def open_trackers(names: Sequence[str], folder: Path, *, stack: ExitStack) -> list[RecordLogger]:
    """Open the trackers of --report-to, closed by `stack`. ConfigError where one is not installed or fails."""
    loggers = []
    for name in names:
        try:
            loggers.append(_OPENERS[name](folder, stack))
        except ConfigError:
            raise
        except Exception as error:  # each package has its own types: no account, no server, no writable folder
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--report-to {name}: {name} cannot start, fix that or remove it: {reason}") from error
    return loggers


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed, before any data is read."""
    for name in names:
        _load(_MODULES[name], package=name)


def _load(module: str, *, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"--report-to {package}: {package} is not installed: pip install {package}") from error


def _tensorboard(folder: Path, stack: ExitStack) -> RecordLogger:
    writer = _load(_MODULES["tensorboard"], package="tensorboard").SummaryWriter(str(folder / "tensorboard"))
    stack.callback(writer.close)

    def log_record(record: Mapping[str, float]) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, int(record["epoch"]))

    return log_record


def _wandb(folder: Path, stack: ExitStack) -> RecordLogger:
    folder.mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere
    run = _load("wandb", package="wandb").init(project="mmaudit", name=folder.name, dir=str(folder))
    stack.callback(run.finish)
    return lambda record: run.log(dict(record), step=int(record["epoch"]))


def _mlflow(folder: Path, stack: ExitStack) -> RecordLogger:
    mlflow = _load("mlflow", package="mlflow")
    mlflow.start_run(run_name=folder.name)
    stack.callback(mlflow.end_run)
    return lambda record: mlflow.log_metrics(dict(record), step=int(record["epoch"]))


_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_OPENERS: dict[str, Callable[[Path, ExitStack], RecordLogger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
