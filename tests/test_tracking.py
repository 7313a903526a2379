"""Tests of trackers: they are off by default, and get the history."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from training import fine_tune, make_examples, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.train.tracking import open_trackers


class FakeTracker:
    """Records of a tracking package, under any of the three packages' names for them."""

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
def tracker(monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    """Install fake packages under the three names."""
    fake = FakeTracker()
    writer = SimpleNamespace(add_scalar=fake.scalar, close=fake.close)
    run = SimpleNamespace(log=fake.record, finish=fake.close)
    packages: dict[str, dict[str, Any]] = {
        "torch.utils.tensorboard": {"SummaryWriter": lambda folder: writer},
        "wandb": {"init": lambda **options: run},
        "mlflow": {
            "start_run": lambda run_name: None,
            "end_run": fake.close,
            "log_metrics": fake.record,
        },
    }
    for name, content in packages.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_tracker_gets_the_history(tmp_path: Path, tracker: FakeTracker, name: str) -> None:
    history = fine_tune(make_examples(), tmp_path, with_options(report_to=(name,))).history
    assert tracker.records == {int(record["epoch"]): record for record in history}
    assert tracker.closed == 1


def test_trackers_are_off_by_default(tmp_path: Path, tracker: FakeTracker) -> None:
    fine_tune(make_examples(), tmp_path)
    assert not tracker.records
    assert not tracker.closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with ExitStack() as stack, pytest.raises(ConfigError, match=f"{name} is not installed: pip install {name}"):
        open_trackers([name], tmp_path, stack=stack)


def test_tracker_that_cannot_start_raises_with_its_reason(
    tmp_path: Path, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no account:\nlog in first")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(
        ConfigError,
        match=r"^--report-to wandb: wandb cannot start, fix that or remove it: no account: log in first$",
    ):
        fine_tune(make_examples(), tmp_path, with_options(report_to=("tensorboard", "wandb")))
    assert tracker.closed == 1  # the tracker that had started
