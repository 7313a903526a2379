"""Schedules of comparisons: shards, devices, numbers of processes, estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmaudit.audit.errors import ConfigError
from mmaudit.cli.comparison import schedule
from mmaudit.cli.comparison.cells import Cell, Loading
from mmaudit.cli.comparison.schedule import Shard, assign_devices, default_jobs, estimate_seconds
from mmaudit.cli.config import RunConfig
from mmaudit.cli.provenance import SourceOptions
from mmaudit.train.comparison.cells import parse_method

LOADING = Loading(run=Path(), manifests=(), options=SourceOptions(), config=RunConfig(), num_workers=0)


def cells(*methods: str, seeds: int = 5) -> list[Cell]:
    return [
        Cell(manifest="a", method=parse_method(name), seed=seed, config=RunConfig(), budget=100, is_first=False)
        for seed in range(seeds)
        for name in methods
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_share_the_cells_evenly_whatever_their_order(count: int) -> None:
    items = cells("joint", "sum", "ogm", "agm")
    shards = [Shard(number=number, count=count) for number in range(1, count + 1)]
    parts = [[cell.key for cell in shard.select(items, key=lambda cell: cell.key)] for shard in shards]
    assert sorted(key for part in parts for key in part) == sorted(cell.key for cell in items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    backwards = [shard.select(items[::-1], key=lambda cell: cell.key) for shard in shards]
    assert [{cell.key for cell in part} for part in backwards] == [{*part} for part in parts]


def test_shards_are_parsed() -> None:
    assert Shard.parse(" 2/3 ") == Shard(number=2, count=3)
    assert (str(Shard.parse("2/3")), Shard.parse("2/3").scope) == ("2/3", "shard-2-of-3")


@pytest.mark.parametrize("text", ["3/2", "0/2", "x", "1", "1/", "-1/2", "1/0", "1/2/3", ""])
def test_wrong_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard {text}: not of the form i/n with i from 1 to n, such as 1/4"):
        Shard.parse(text)


def test_several_cards_take_cells_in_turn() -> None:
    items = cells("joint", seeds=5)
    devices = [device for _, device in assign_devices(items, "cuda", num_cards=3)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert [cell for cell, _ in assign_devices(items, "cuda", num_cards=3)] == items
    for device, num_cards in (("cuda", 1), ("cpu", 0), ("cuda:1", 3)):
        assert {device for _, device in assign_devices(items, device, num_cards=num_cards)} == {device}


def test_short_comparisons_need_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_jobs("cpu", LOADING, seconds=29) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [default_jobs(device, LOADING, seconds=31) for device in ("cuda", "cuda:1")] == [4, 1]


def test_time_is_estimated_by_finished_cells_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = cells("joint", "sum", "ogm", seeds=2)
    finished = {"joint": [1.0, 3.0], "sum": [10.0]}
    assert estimate_seconds(missing, finished, loading=LOADING, device="cpu") == pytest.approx(2 * (2 + 10 + 14 / 3))
    times: dict[int, float] = {1: 0.5, 100: 2.5}

    def time_training(cell: Cell, max_samples: int, **options: Any) -> float:
        return times[max_samples] * (2 if cell.method.name == "ogm" else 1)

    monkeypatch.setattr(schedule, "_time_training", time_training)
    assert estimate_seconds(missing, {}, loading=LOADING, device="cpu") == pytest.approx(2 * (2.5 + 2.5 + 5))
