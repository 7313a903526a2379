"""Laws of batches: one after another they are the order, and all but the last are full."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.train.batches import batches


@given(st.lists(st.integers(0, 10**6), max_size=50), st.integers(1, 60))
def test_batches_cut_the_order_and_lose_nothing(order: list[int], batch_size: int) -> None:
    steps = [step.tolist() for step in batches(np.array(order, dtype=np.intp), batch_size=batch_size)]
    assert [row for step in steps for row in step] == order
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(0 < len(step) <= batch_size for step in steps)
