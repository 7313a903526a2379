"""Laws of the target: some rows of it are those rows, and what is asked for stays the same."""

from __future__ import annotations

import numpy as np
import pytest

from mmaudit.audit.dataset.labels import TASKS, Target

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_rows_are_rows(task: str) -> None:
    k = {"classification": 4, "multilabel": 3, "regression": 1}[task]
    values = None if task == "classification" else RNG.random((20, k)).astype(np.float32)
    target = Target(task=task, label=RNG.integers(0, 4, 20).astype(np.int32), num_outputs=k, values=values)
    some, fewer = np.array([7, 3, 3, 19]), np.array([2, 0])
    found = target.take(some).take(fewer)
    assert (len(target), len(target.take(some)), len(found)) == (20, 4, 2)
    assert (found.task, found.num_outputs) == (task, k)
    np.testing.assert_array_equal(found.label, target.label[[3, 7]])
    if values is None:
        assert found.values is None
    else:
        np.testing.assert_array_equal(np.asarray(found.values), values[[3, 7]])
