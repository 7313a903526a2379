"""Tests of steps and batches: cuts of an order, shards of a step, and loss weights that sum to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.train.batches import Batch, Step, split_order, to_batch, whole_batches
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext

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
def test_steps_cut_the_order_without_losing_a_row(order: list[int], batch_size: int) -> None:
    steps = [step.rows.tolist() for step in split_order(np.array(order, dtype=np.int64), batch_size=batch_size)]
    assert [row for step in steps for row in step] == order
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(0 < len(step) <= batch_size for step in steps)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 10))
def test_only_a_last_smaller_batch_is_left_out_also_when_resumed(size: int, batch_size: int, after: int) -> None:
    order = np.arange(size)
    whole = [
        step.rows.tolist() for step in whole_batches(split_order(order, batch_size=batch_size), batch_size=batch_size)
    ]
    assert all(len(rows) == batch_size for rows in whole) or len(whole) == 1
    assert sum(map(len, whole)) == (size if size < batch_size else size - size % batch_size)
    if after <= len(whole):
        rest = split_order(order, batch_size=batch_size, after=after)
        resumed = whole_batches(rest, batch_size=batch_size, num_done=after)
        assert [step.rows.tolist() for step in resumed] == whole[after:]


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 60))
def test_interrupted_order_continues_with_the_remaining_steps(num_rows: int, batch_size: int, after: int) -> None:
    order = np.random.default_rng(0).permutation(num_rows)
    all_steps, remaining = (split_order(order, batch_size=batch_size, after=start) for start in (0, after))
    assert [step.rows.tolist() for step in remaining] == [step.rows.tolist() for step in all_steps[after:]]


def test_loss_weights_by_hand() -> None:
    """Rows 1, 0, 3 have weights 3, 1, 2; the fused loss uses the first two, audio all, visual the last two."""
    step = Step(
        rows=np.array([1, 0, 3]),
        present=np.array([[True, False], [True, True], [True, True]]),
        fused=np.array([True, True, False]),
    )
    weights = step.loss_weights(WEIGHT, num_modalities=2)
    assert weights.dtype == np.float32
    expected = np.array([[3 / 4, 1 / 4, 0], [3 / 6, 1 / 6, 2 / 6], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_repeated_row_counts_twice() -> None:
    weights = Step(rows=np.array([2, 2, 0])).loss_weights(WEIGHT, num_modalities=1)
    np.testing.assert_allclose(weights, [[0.25, 0.25, 0.5]] * 2, rtol=1e-6)


@settings(deadline=None)
@given(STEPS)
def test_loss_weights_sum_to_1_or_are_0(step: Step) -> None:
    weights = step.loss_weights(WEIGHT, num_modalities=2)
    assert weights.shape == (3, len(step.rows))
    assert (weights >= 0).all()
    masks = [step.fused, *((None, None) if step.present is None else step.present.T)]
    for row, mask in zip(weights, masks, strict=True):
        counts = WEIGHT[step.rows] * (1 if mask is None else mask)
        assert row.sum() == pytest.approx(1.0 if counts.any() else 0.0, abs=1e-5)
        assert ((row > 0) == (counts > 0)).all()


@settings(deadline=None)
@given(STEPS, st.integers(1, 5))
def test_concatenated_shards_are_the_step(step: Step, size: int) -> None:
    shards = [step.shard(DistributedContext(rank=rank, world_size=size)) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate([shard.rows for shard in shards]), step.rows)
    for name in ("present", "fused"):
        full = getattr(step, name)
        values = [getattr(shard, name) for shard in shards]
        if full is None:
            assert values == [None] * size
        else:
            np.testing.assert_array_equal(np.concatenate(values), full)


def batches_of(step: Step, size: int) -> list[Batch]:
    label = torch.tensor([3, 1, 4, 1, 5])
    batches = []
    for rank in range(size):
        distributed = DistributedContext(rank=rank, world_size=size) if size > 1 else SINGLE_PROCESS
        rows = torch.from_numpy(step.shard(distributed).rows)
        inputs = (torch.stack([rows, rows], dim=1).float(), -rows[:, None].float())
        batches.append(to_batch(step, inputs, label=label, weight=WEIGHT, distributed=distributed))
    return batches


@settings(deadline=None)
@given(STEPS, st.integers(1, 4))
def test_batches_of_several_processes_join_to_that_of_one(step: Step, size: int) -> None:
    """The parts of the means sum to the mean, for any number of processes."""
    (single,), several = batches_of(step, 1), batches_of(step, size)
    for name in ("rows", "label"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in several]), getattr(single, name))
    assert torch.equal(torch.cat([batch.loss_weight for batch in several], dim=1), single.loss_weight)
    assert [batch.size for batch in several] == [len(step.rows)] * size
    assert all(len(batch.rows) == len(batch.inputs[0]) == batch.loss_weight.shape[1] for batch in several)
    if step.present is None:
        assert all(batch.present is None for batch in (single, *several))
    else:
        masks = [batch.present for batch in several if batch.present is not None]
        assert torch.equal(torch.cat(masks), torch.from_numpy(step.present))
    values = torch.randn(3, len(step.rows), generator=torch.Generator().manual_seed(0))
    values_of_rank = [
        values[:, DistributedContext(rank=rank, world_size=size).slice(len(step.rows))] for rank in range(size)
    ]
    fused = torch.stack(
        [batch.mean_fused(values_of_shard[0]) for batch, values_of_shard in zip(several, values_of_rank, strict=True)]
    ).sum()
    unimodal = torch.stack(
        [
            batch.mean_unimodal(values_of_shard[1:])
            for batch, values_of_shard in zip(several, values_of_rank, strict=True)
        ]
    ).sum(dim=0)
    torch.testing.assert_close(fused, single.mean_fused(values[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unimodal, single.mean_unimodal(values[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_means_are_weighted_over_used_rows(masked: bool) -> None:
    rows = np.array([0, 1, 2, 3])
    modality_mask: NDArray[np.bool_] | None = None
    options: dict[str, Any] = {}
    if masked:
        modality_mask = np.array([[True, False], [True, True], [False, True], [True, True]])
        options = {"present": modality_mask, "fused": modality_mask.all(axis=1)}
    (batch,) = batches_of(Step(rows=rows, **options), 1)
    assert torch.equal(batch.label, torch.tensor([3, 1, 4, 1]))
    values, weight = torch.tensor([[1.0, -2.0, 4.0, 8.0]] * 3), WEIGHT[:4]
    masks = np.ones((3, 4), bool) if modality_mask is None else np.vstack([modality_mask.all(axis=1), modality_mask.T])
    expected = [float(np.average(values[0].numpy(), weights=weight * mask)) for mask in masks]
    assert batch.mean_fused(values[0]).item() == pytest.approx(expected[0], rel=1e-5)
    assert batch.mean_unimodal(values[1:]).tolist() == pytest.approx(expected[1:], rel=1e-5)


def test_modality_without_rows_has_a_mean_of_0() -> None:
    modality_mask = np.array([[True, False], [True, False]])
    (batch,) = batches_of(Step(rows=np.array([0, 1]), present=modality_mask, fused=np.zeros(2, bool)), 1)
    values = torch.ones(2, 2)
    assert batch.mean_fused(values[0]).item() == 0
    assert batch.mean_unimodal(values).tolist() == [1, 0]
