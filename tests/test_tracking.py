"""Laws of trackers: nobody is told unless asked for, and what is told is the history."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from training import examples_of, setting, tune

from mmaudit.audit.errors import ConfigError
from mmaudit.train.tracking import open_trackers


class Told:
    """What a tracking package was told, under any of the three packages' names for it."""

    def __init__(self) -> None:
        self.records: dict[int, dict[str, float]] = {}
        self.closed = 0

    def scalar(self, name: str, value: float, step: int) -> None:
        self.records.setdefault(step, {})[name] = value

    def record(self, record: dict[str, float], step: int) -> None:
        self.records[step] = record

    def close(self, *ignored: Any) -> None:
        self.closed += 1


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Packages of the three names that take down what they are told."""
    found = Told()
    writer = SimpleNamespace(add_scalar=found.scalar, close=found.close)
    run = SimpleNamespace(log=found.record, finish=found.close)
    packages: dict[str, dict[str, Any]] = {
        "torch.utils.tensorboard": {"SummaryWriter": lambda folder: writer},
        "wandb": {"init": lambda **options: run},
        "mlflow": {
            "start_run": lambda run_name: None,
            "end_run": found.close,
            "log_metrics": found.record,
        },
    }
    for name, content in packages.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_is_told_the_history(tmp_path: Path, told: Told, name: str) -> None:
    history = tune(examples_of(), tmp_path, setting(report_to=(name,))).history
    assert told.records == {int(record["epoch"]): record for record in history}
    assert told.closed == 1


def test_nobody_is_told_unasked(tmp_path: Path, told: Told) -> None:
    tune(examples_of(), tmp_path)
    assert not told.records
    assert not told.closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_there_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with ExitStack() as stack, pytest.raises(ConfigError, match=f"{name} is not installed: pip install {name}"):
        open_trackers([name], tmp_path, stack=stack)


def test_a_tracker_that_cannot_begin_says_why(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no account:\nlog in first")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(
        ConfigError,
        match=r"^--report-to wandb: wandb cannot start, fix that or remove it: no account: log in first$",
    ):
        tune(examples_of(), tmp_path, setting(report_to=("tensorboard", "wandb")))
    assert told.closed == 1  # the one that had begun
