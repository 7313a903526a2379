"""Tests of what a run keeps beside its probes: folds by hash, and the files they are written to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmaudit.audit.engine.run_state import Folds, RunState
from mmaudit.audit.engine.scoring import Whole
from mmaudit.audit.errors import RunError
from mmaudit.audit.scores.mixture import fit_mixture


def folds(hashes: list[int], fold: list[int], split: list[int] | None = None) -> Folds:
    return Folds.of(
        np.array(hashes, np.uint64),
        np.array([fold, fold], np.int16),
        None if split is None else np.array(split, np.int8),
    )


def test_entries_are_found_by_hash() -> None:
    entries = folds([7, 3, 2**64 - 1, 3], [0, 1, 2, 4])
    assert entries.hash.tolist() == [3, 7, 2**64 - 1]
    assert entries.fold[0].tolist() == [1, 0, 2]  # of equal hashes the first stays
    assert entries.find(np.array([7, 0, 2**64 - 1, 8], np.uint64)).tolist() == [1, -1, 2, -1]
    assert folds([], []).find(np.array([1], np.uint64)).tolist() == [-1]


def test_merge_keeps_earlier_entries() -> None:
    earlier, added = folds([2, 4, 6], [0, -1, 1], [0, 2, 0]), folds([4, 5, 6], [1, 2, 2], [0, 0, 2])
    merged = earlier.merge(added)
    assert merged.hash.tolist() == [2, 4, 5, 6]
    assert merged.fold[1].tolist() == [0, 1, 2, 1]  # a fold that was missing is filled in
    assert merged.split is not None
    assert merged.split.tolist() == [0, 2, 0, 0]
    assert earlier.fold[0].tolist() == [0, -1, 1]


def test_merge_of_two_steps_is_that_of_one() -> None:
    first, second, third = folds([1, 9], [0, 1]), folds([3, 9], [2, 0]), folds([2, 3], [1, 1])
    once, twice = first.merge(second.merge(third)), first.merge(second).merge(third)
    assert once.to_table().equals(twice.to_table())


def state() -> RunState:
    mixture = fit_mixture(np.linspace(0, 1, 99) ** 3)
    return RunState(
        task="classification",
        num_outputs=2,
        num_folds=(3, 3),
        num_features=(4, 5),
        classes=np.array([0, 2], np.int32),
        class_names=("cat", "cow", "dog"),
        labels={"texts": ["0", "1", "2"], "edges": [], "outputs": ["cat", "cow", "dog"]},
        whole=Whole(similarity=(float(np.float32(0.1)), 0.9), total_loss=(0.0, 3.5), mixture=mixture),
        by_group=False,
        keys=folds([7, 3], [0, 2], [0, 2]),
        contents=folds([9], [1]),
    )


def test_written_state_is_read(tmp_path: Path) -> None:
    written = state()
    written.write(tmp_path)
    again = RunState.read(tmp_path)
    assert again.whole == written.whole
    assert again.keys.to_table().equals(written.keys.to_table())
    assert again.contents.split is None
    assert again.classes.tolist() == [0, 2]
    assert (again.num_folds, again.labels, again.num_groups) == ((3, 3), written.labels, None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_or_damaged_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"keeps no probes that can score other rows: .* --overwrite"):
        RunState.read(tmp_path / "probes")
    with pytest.raises(RunError, match="folds kept beside the probes are damaged"):
        replace(state(), num_folds=(2, 2))
    with pytest.raises(RunError, match="ranges kept beside the probes are damaged"):
        replace(state(), whole=replace(state().whole, similarity=(0.1,)))  # type: ignore[arg-type]
    state().write(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"state\.json cannot be read"):
        RunState.read(tmp_path)
