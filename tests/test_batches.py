"""Laws of batches: steps one after another are the order, shares are the step, and parts of a step sum to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.train.batches import Batch, Step, split_order, to_batch
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext

torch.set_num_threads(1)

WEIGHT = np.array([1.0, 3.0, 0.5, 2.0, 0.0], np.float32)  # of the training samples
STEPS = st.integers(1, 20).flatmap(
    lambda b: st.builds(
        lambda rows, present, fused: Step(rows=np.array(rows), present=present, fused=fused),
        st.lists(st.integers(0, 4), min_size=b, max_size=b),
        st.none() | st.lists(st.tuples(st.booleans(), st.booleans()), min_size=b, max_size=b).map(np.array),
        st.none() | st.lists(st.booleans(), min_size=b, max_size=b).map(np.array),
    )
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=50), st.integers(1, 60))
def test_steps_cut_the_order_and_lose_nothing(order: list[int], batch_size: int) -> None:
    steps = [step.rows.tolist() for step in split_order(np.array(order, dtype=np.int64), batch_size=batch_size)]
    assert [row for step in steps for row in step] == order
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(0 < len(step) <= batch_size for step in steps)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 60))
def test_an_interrupted_order_goes_on_with_the_steps_that_were_left(number: int, batch_size: int, after: int) -> None:
    order = np.random.default_rng(0).permutation(number)
    every, rest = (split_order(order, batch_size=batch_size, after=start) for start in (0, after))
    assert [step.rows.tolist() for step in rest] == [step.rows.tolist() for step in every[after:]]


def test_parts_by_hand() -> None:
    """Row 1 weighs 3, 0 weighs 1, 3 weighs 2; the fused loss hears the first two, audio all, visual the last two."""
    step = Step(
        rows=np.array([1, 0, 3]),
        present=np.array([[True, False], [True, True], [True, True]]),
        fused=np.array([True, True, False]),
    )
    found = step.loss_weights(WEIGHT, num_modalities=2)
    assert found.dtype == np.float32
    expected = np.array([[3 / 4, 1 / 4, 0], [3 / 6, 1 / 6, 2 / 6], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_row_that_stands_twice_counts_twice() -> None:
    found = Step(rows=np.array([2, 2, 0])).loss_weights(WEIGHT, num_modalities=1)
    np.testing.assert_allclose(found, [[0.25, 0.25, 0.5]] * 2, rtol=1e-6)


@settings(deadline=None)
@given(STEPS)
def test_parts_sum_to_1_or_nothing_counts(step: Step) -> None:
    parts = step.loss_weights(WEIGHT, num_modalities=2)
    assert parts.shape == (3, len(step.rows))
    assert (parts >= 0).all()
    heard = [step.fused, *((None, None) if step.present is None else step.present.T)]
    for part, mask in zip(parts, heard, strict=True):
        counts = WEIGHT[step.rows] * (1 if mask is None else mask)
        assert part.sum() == pytest.approx(1.0 if counts.any() else 0.0, abs=1e-5)
        assert ((part > 0) == (counts > 0)).all()


@settings(deadline=None)
@given(STEPS, st.integers(1, 5))
def test_shares_one_after_another_are_the_step(step: Step, size: int) -> None:
    shares = [step.shard(DistributedContext(rank=rank, world_size=size)) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate([share.rows for share in shares]), step.rows)
    for name in ("present", "fused"):
        whole = getattr(step, name)
        each = [getattr(share, name) for share in shares]
        if whole is None:
            assert each == [None] * size
        else:
            np.testing.assert_array_equal(np.concatenate(each), whole)


def batches_of(step: Step, size: int) -> list[Batch]:
    label = torch.tensor([3, 1, 4, 1, 5])
    found = []
    for rank in range(size):
        distributed = DistributedContext(rank=rank, world_size=size) if size > 1 else SINGLE_PROCESS
        mine = torch.from_numpy(step.shard(distributed).rows)
        inputs = (torch.stack([mine, mine], dim=1).float(), -mine[:, None].float())
        found.append(to_batch(step, inputs, label=label, weight=WEIGHT, distributed=distributed))
    return found


@settings(deadline=None)
@given(STEPS, st.integers(1, 4))
def test_what_processes_have_is_what_one_alone_would(step: Step, size: int) -> None:
    """Also the means: shares of them add up, whatever the number of processes."""
    (alone,), several = batches_of(step, 1), batches_of(step, size)
    for name in ("rows", "label"):
        assert torch.equal(torch.cat([getattr(each, name) for each in several]), getattr(alone, name))
    assert torch.equal(torch.cat([each.loss_weight for each in several], dim=1), alone.loss_weight)
    assert [each.size for each in several] == [len(step.rows)] * size
    assert all(len(each.rows) == len(each.inputs[0]) == each.loss_weight.shape[1] for each in several)
    if step.present is None:
        assert all(each.present is None for each in (alone, *several))
    else:
        present = [each.present for each in several if each.present is not None]
        assert torch.equal(torch.cat(present), torch.from_numpy(step.present))
    values = torch.randn(3, len(step.rows), generator=torch.Generator().manual_seed(0))
    cut = [values[:, DistributedContext(rank=rank, world_size=size).slice(len(step.rows))] for rank in range(size)]
    fused = torch.stack([each.mean_fused(some[0]) for each, some in zip(several, cut, strict=True)]).sum()
    own = torch.stack([each.mean_unimodal(some[1:]) for each, some in zip(several, cut, strict=True)]).sum(dim=0)
    torch.testing.assert_close(fused, alone.mean_fused(values[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, alone.mean_unimodal(values[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heard", [None, "some"])
def test_means_are_weighted_over_what_is_heard(heard: str | None) -> None:
    rows = np.array([0, 1, 2, 3])
    present: NDArray[np.bool_] | None = None
    options: dict[str, Any] = {}
    if heard:
        present = np.array([[True, False], [True, True], [False, True], [True, True]])
        options = {"present": present, "fused": present.all(axis=1)}
    (batch,) = batches_of(Step(rows=rows, **options), 1)
    assert torch.equal(batch.label, torch.tensor([3, 1, 4, 1]))
    values, weight = torch.tensor([[1.0, -2.0, 4.0, 8.0]] * 3), WEIGHT[:4]
    masks = np.ones((3, 4), bool) if present is None else np.vstack([present.all(axis=1), present.T])
    expected = [float(np.average(values[0].numpy(), weights=weight * mask)) for mask in masks]
    assert batch.mean_fused(values[0]).item() == pytest.approx(expected[0], rel=1e-5)
    assert batch.mean_unimodal(values[1:]).tolist() == pytest.approx(expected[1:], rel=1e-5)


def test_what_nobody_hears_has_a_mean_of_0() -> None:
    present = np.array([[True, False], [True, False]])
    (batch,) = batches_of(Step(rows=np.array([0, 1]), present=present, fused=np.zeros(2, bool)), 1)
    values = torch.ones(2, 2)
    assert batch.mean_fused(values[0]).item() == 0
    assert batch.mean_unimodal(values).tolist() == [1, 0]
