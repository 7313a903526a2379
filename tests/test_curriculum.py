"""Laws of the curriculum: pacing by the published formula, and orders that depend on seed and epoch alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.rebalance.curriculum import most_balanced, root_pacing, shuffled

START = st.floats(0.01, 1)
GROW = st.integers(1, 200)


@pytest.mark.parametrize(
    ("epoch", "share"),
    # lambda0 = 0.1, T_grow = 40: lambda(t)^2 = 0.99 t / 40 + 0.01, by hand
    [(0, 0.1), (1, math.sqrt(0.03475)), (10, math.sqrt(0.2575)), (20, math.sqrt(0.505)), (40, 1.0), (41, 1.0)],
)
def test_the_paper_s_pacing(epoch: int, share: float) -> None:
    assert root_pacing(epoch, start=0.1, grow_epochs=40) == pytest.approx(share, rel=1e-12)


def test_the_first_epoch_of_the_paper_sees_a_fifth() -> None:
    assert root_pacing(1, start=0.1, grow_epochs=40) == pytest.approx(0.1864, abs=1e-4)


@given(START, GROW)
def test_pacing_grows_and_ends_at_everything(start: float, grow_epochs: int) -> None:
    shares = [root_pacing(epoch, start=start, grow_epochs=grow_epochs) for epoch in range(grow_epochs + 3)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(start)
    assert shares[grow_epochs:] == [1.0, 1.0, 1.0]  # exactly: 0.9999 of n samples would be n - 1


@given(START, GROW, st.integers(1, 100))
def test_at_the_end_of_pacing_every_row_is_seen(start: float, grow_epochs: int, n: int) -> None:
    rank = np.random.default_rng(n).permutation(n)
    rows = most_balanced(rank, root_pacing(grow_epochs, start=start, grow_epochs=grow_epochs))
    assert sorted(rows) == list(range(n))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True), st.floats(0.001, 1))
def test_the_most_balanced_share_has_the_least_ranks(rank: list[int], share: float) -> None:
    rows = most_balanced(np.array(rank), share)
    assert len(rows) == max(1, math.floor(len(rank) * share))
    assert [rank[row] for row in rows] == sorted(rank)[: len(rows)]


@given(st.lists(st.integers(0, 10**6), max_size=60, unique=True), st.integers(0, 99), st.integers(1, 99))
def test_an_order_is_a_permutation_and_pure(rows: list[int], seed: int, epoch: int) -> None:
    given_rows = np.array(rows, dtype=np.intp)
    order = shuffled(given_rows, seed=seed, epoch=epoch)
    assert sorted(order) == sorted(rows)
    assert given_rows.tolist() == rows
    assert shuffled(given_rows, seed=seed, epoch=epoch).tolist() == order.tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = np.arange(50)
    orders = {tuple(shuffled(rows, seed=seed, epoch=epoch)) for seed in range(12) for epoch in range(1, 13)}
    assert len(orders) == 144  # seed 1, epoch 12 is not seed 12, epoch 1, nor 112
