"""Repeats of cross-fitting: rare classes are dropped, groups stay together, and repeats differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.samples import Samples
from mmaudit.audit.errors import Reason, ScoreError
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.scores.score_dataset import plan_cross_fits

CONFIG = ProbeConfig(folds=5, repeats=3)


def samples_of(label: Any, *, group: Any = None, split: Any = None, ids: Any = None, **rest: Any) -> Samples:
    label = np.asarray(label, dtype=np.int32)
    n = len(label)
    return Samples(
        sample_id=np.array([f"s{row}" for row in range(n)] if ids is None else ids, dtype=object),
        label=label,
        class_names=tuple(f"class {number}" for number in range(int(label.max()) + 1)),
        split=np.array(["train"] * n if split is None else split, dtype=object),
        group=None if group is None else np.array(group, dtype=object),
        paths=pa.table({}),
        **rest,
    )


def every(samples: Samples) -> Any:
    return np.arange(len(samples))


@st.composite
def crowds(draw: st.DrawFn) -> Samples:
    """Draw samples of large and small classes, with or without groups, partly in the test split."""
    n = draw(st.integers(8, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    label = np.minimum(rng.poisson(1.0, n), 5)
    group = [f"g{number}" for number in rng.integers(0, draw(st.integers(4, 12)), n)] if draw(st.booleans()) else None
    split = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.3])), "test", "train")
    split[:4] = "train"
    return samples_of(label, group=group, split=split)


@settings(deadline=None)
@given(crowds(), st.sampled_from(["all", "train"]), st.integers(0, 99))
def test_remaining_classes_are_cross_fitted_in_every_repeat(samples: Samples, learn_from: str, seed: int) -> None:
    config = replace(CONFIG, learn_from=learn_from)
    try:
        rows, cross_fits, left_out = plan_cross_fits(samples, every(samples), config, seed=seed)
    except ScoreError:
        return  # too few groups, or no class large enough: said elsewhere
    names = {record.sample_id for record in left_out}
    assert names | set(samples.sample_id[rows]) == set(samples.sample_id)
    assert len(names) + len(rows) == len(samples)
    assert {record.reason for record in left_out} <= {Reason.RARE_CLASS}
    assert {samples.label[samples.sample_id == name][0] for name in names}.isdisjoint(samples.label[rows])
    for cross_fit in cross_fits:
        assert len(cross_fit.fold) == len(rows)
        np.testing.assert_array_equal(cross_fit.fits, (samples.split[rows] != "test") | (learn_from == "all"))
        for class_label in set(samples.label[rows].tolist()):
            of_class = (samples.label[rows] == class_label) & cross_fit.fits
            assert len(set(cross_fit.fold[of_class].tolist())) > 1
        if samples.group is not None:
            for deal in (cross_fit.fold, cross_fit.inner):
                pairs = set(zip(samples.group[rows], deal.tolist(), strict=True))
                assert len(pairs) == len({name for name, _ in pairs})


def test_repeats_and_seeds_differ() -> None:
    """Random assignments to five folds agree on a fifth of the rows."""
    samples = samples_of(np.arange(400) % 2)
    _, cross_fits, _ = plan_cross_fits(samples, every(samples), CONFIG, seed=5)
    _, other_seed, _ = plan_cross_fits(samples, every(samples), CONFIG, seed=6)
    assignments = [
        assignment for cross_fit in [*cross_fits, *other_seed] for assignment in (cross_fit.fold, cross_fit.inner)
    ]
    for index, first in enumerate(assignments):
        for second in assignments[:index]:
            assert (first == second).mean() < 0.4
    _, single_repeat, _ = plan_cross_fits(samples, every(samples), replace(CONFIG, repeats=1), seed=5)
    # A repeat more does not change those before.
    np.testing.assert_array_equal(single_repeat[0].fold, cross_fits[0].fold)


def test_folds_follow_the_ids() -> None:
    samples = samples_of(np.arange(80) % 3)
    order = np.random.default_rng(0).permutation(80)
    moved = samples_of(samples.label[order], ids=samples.sample_id[order])
    _, (first, *_), _ = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    _, (second, *_), _ = plan_cross_fits(moved, every(moved), CONFIG, seed=0)
    for name in ("fold", "inner", "key"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name)[order])


def test_labels_do_not_change_training_folds() -> None:
    split = np.where(np.arange(80) % 4 == 0, "test", "train")
    label = np.arange(80) % 3
    config = replace(CONFIG, learn_from="train")
    assignments = []
    for labels in (label, np.where(split == "test", 0, label)):
        samples = samples_of(labels, split=split)
        _, cross_fits, _ = plan_cross_fits(samples, every(samples), config, seed=0)
        assignments.append(
            [
                (cross_fit.fold[split == "train"].tolist(), cross_fit.inner[split == "train"].tolist())
                for cross_fit in cross_fits
            ]
        )
    assert assignments[0] == assignments[1]


def test_rare_class_is_reported_with_its_size() -> None:
    samples = samples_of([0, 1] * 10 + [2])
    rows, _, left_out = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    assert rows.tolist() == list(range(20))
    assert [(record.sample_id, record.modality, record.reason, record.detail) for record in left_out] == [
        ("s20", None, Reason.RARE_CLASS, "class 'class 2' has 1 usable samples, all in one fold")
    ]
    grouped = samples_of([0, 1] * 10 + [2, 2, 2], group=[f"g{row // 2 % 5}" for row in range(20)] + ["g0"] * 3)
    _, _, left_out = plan_cross_fits(grouped, every(grouped), CONFIG, seed=0)
    assert {record.detail for record in left_out} == {
        "class 'class 2' has 3 usable samples, of 1 groups, all in one fold"
    }
    assert len(left_out) == 3


def test_only_selected_rows_count() -> None:
    samples = samples_of([0, 1] * 10 + [2, 2])
    rows, _, left_out = plan_cross_fits(samples, np.arange(21), CONFIG, seed=0)
    assert rows.tolist() == list(range(20))
    assert [record.sample_id for record in left_out] == ["s20"]


def test_strata_of_a_regression_are_never_too_rare() -> None:
    label = np.array([0, 1] * 10 + [2])
    samples = samples_of(label, task="regression", values=label[:, None].astype(np.float32), outputs=("y",))
    rows, _, left_out = plan_cross_fits(samples, every(samples), CONFIG, seed=0)
    assert (len(rows), left_out) == (21, [])


def test_data_that_cannot_be_cross_fitted_raises() -> None:
    tests = samples_of([0, 1] * 5, split=["test"] * 10)
    for learn_from in ("all", "train"):
        with pytest.raises(ScoreError, match=r"every usable sample is in the test split: .* pass --split none"):
            plan_cross_fits(tests, every(tests), replace(CONFIG, learn_from=learn_from), seed=0)
    alone = samples_of([0, 1, 2, 3])
    with pytest.raises(ScoreError, match="no class can be cross-fitted; the first of them: class 'class 0' has 1"):
        plan_cross_fits(alone, every(alone), CONFIG, seed=0)
    together = samples_of([0, 1] * 5, group=["g"] * 10)
    with pytest.raises(ScoreError, match="all usable samples are of one group"):
        plan_cross_fits(together, every(together), CONFIG, seed=0)
