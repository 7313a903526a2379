"""Tests of the distributed context: sums and gathers are equal in all processes, and slices join to the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from torch import distributed

from mmaudit.audit.errors import ConfigError
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext, local_device, open_distributed

torch.set_num_threads(1)

# The tensors of each process follow from its rank, so that the sums are known.
SCRIPT = """
import json, torch
from mmaudit.train.distributed import open_distributed

with open_distributed("cpu") as context:
    r = context.rank
    weight = torch.arange(6.0).view(2, 3) * (r + 1)
    count = torch.tensor([r, 10 * r])
    wide = torch.full((2, 1, 2, 3), float(r)).contiguous(memory_format=torch.channels_last)
    halves = torch.tensor([0.5 * r], dtype=torch.float64)
    scalar = torch.tensor(float(r))
    context.sum_([weight, count, wide, halves, scalar])
    context.sum_([])
    rows = torch.arange(5)[context.slice(5)]
    whole = torch.stack([rows, -rows])
    few = torch.arange(2)[context.slice(2)]  # of three processes one has none
    found = {
        "rank": [context.rank, context.world_size, context.is_first],
        "sums": [each.tolist() for each in (weight, count, wide, halves, scalar)],
        "kinds": [str(each.dtype) for each in (weight, count, halves)],
        "joined": context.gather(whole).tolist(),
        "yes": context.gather(rows % 2 == 1).tolist(),
        "few": context.gather(few.float()).tolist(),
        "none": list(context.gather(torch.zeros(3, 0)).shape),
        "uneven": context.gather(torch.full((r * r,), r)).tolist(),
    }
    context.wait()
print(json.dumps({**found, "open": torch.distributed.is_initialized()}))
"""


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = run_in_processes(SCRIPT, size=request.param)
    return outputs


def test_processes_have_their_rank_and_world_size(results: list[dict[str, Any]]) -> None:
    size = len(results)
    assert [result["rank"] for result in results] == [[rank, size, rank == 0] for rank in range(size)]
    assert not any(result["open"] for result in results)


def test_sums_are_over_all_processes_and_equal_in_all(results: list[dict[str, Any]]) -> None:
    total, size = sum(range(len(results))), len(results)
    for result in results:
        weight, count, wide, halves, scalar = result["sums"]
        assert weight == (np.arange(6.0).reshape(2, 3) * (total + size)).tolist()
        assert count == [total, 10 * total]
        assert wide == np.full((2, 1, 2, 3), float(total)).tolist()
        assert halves == [total / 2]
        assert scalar == total
        assert result["kinds"] == ["torch.float32", "torch.int64", "torch.float64"]


def test_gathered_tensors_are_in_the_order_of_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["joined"] == [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]]
        assert result["yes"] == [False, True, False, True, False]
        assert result["few"] == [0.0, 1.0]
        assert result["none"] == [3, 0]
        assert result["uneven"] == [rank for rank in range(len(results)) for _ in range(rank * rank)]


def test_single_process_communicates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_distributed("cpu") as context:
        assert context == SINGLE_PROCESS
        assert (context.rank, context.world_size, context.is_first) == (0, 1, True)
        tensor = torch.arange(3.0)
        context.sum_([tensor])
        context.wait()
        assert tensor.tolist() == context.gather(tensor).tolist() == [0, 1, 2]
        assert not distributed.is_initialized()


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 9))
def test_slices_of_all_ranks_join_to_the_whole(length: int, size: int) -> None:
    elements = list(range(length))
    slices = [elements[DistributedContext(rank=rank, world_size=size).slice(length)] for rank in range(size)]
    assert [element for part in slices for element in part] == elements
    lengths = [len(part) for part in slices]
    assert max(lengths) - min(lengths) <= 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("device", "rank", "expected"),
    [("cuda", "1", "cuda:1"), ("cuda", None, "cuda"), ("cuda:0", None, "cuda:0"), ("cpu", "5", "cpu")],
)
def test_process_uses_the_device_of_its_local_rank(
    device: str, rank: str | None, expected: str, two_gpus: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        two_gpus.setenv("LOCAL_RANK", rank)
    assert local_device(device) == expected


@pytest.mark.parametrize(
    ("device", "rank", "line"),
    [
        ("cuda:0", "1", "--device cuda:0 would be shared by all processes: use --device cuda"),
        ("cuda", "2", "process 2 has no GPU: 2 available, set --nproc-per-node to at most 2"),
    ],
)
def test_two_processes_on_one_gpu_raise(device: str, rank: str, line: str, two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setenv("LOCAL_RANK", rank)
    with pytest.raises(ConfigError, match=line):
        local_device(device)
