"""Tests of the comparison of score distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp, ttest_ind

from mmaudit.audit.scores.drift import compare_distributions
from mmaudit.audit.scores.table import ScoreTable


def scores(confidence: np.ndarray, *, groups: int = 0) -> ScoreTable:
    n = len(confidence)
    names = np.array([f"s{row}" for row in range(n)], dtype=object)
    return ScoreTable(
        sample_id=names,
        label=np.zeros(n, np.int32),
        label_name=np.full(n, "x", dtype=object),
        modalities=("audio", "video"),
        confidence=confidence.astype(np.float32),
        group=np.array([f"g{row % groups}" for row in range(n)], dtype=object) if groups else None,
        p_balanced=(np.abs(confidence[:, 0] - confidence[:, 1]) <= 0.2).astype(np.float32),
    )


def test_same_scores_do_not_differ() -> None:
    table = scores(np.random.default_rng(0).random((50, 2)))
    compared = compare_distributions(table, table)
    assert compared["num_samples"] == {"run": 50, "data": 50}
    for column in (compared["gap"], compared["discrepancy"], *compared["confidence"].values()):
        assert column["difference"]["mean"] == 0
        assert column["difference"]["low"] < 0 < column["difference"]["high"]
        assert (column["ks"], column["p"]) == (0, 1)
    assert compared["balanced"]["run"] == compared["balanced"]["data"]


def test_numbers_are_those_of_scipy() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random((80, 2)), rng.random((60, 2)) ** 2
    compared = compare_distributions(scores(first), scores(second))
    audio = compared["confidence"]["audio"]
    expected = ttest_ind(second[:, 0].astype(np.float32), first[:, 0].astype(np.float32), equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert audio["difference"]["low"] == pytest.approx(interval.low, abs=1e-6)
    assert audio["difference"]["high"] == pytest.approx(interval.high, abs=1e-6)
    test = ks_2samp(first[:, 0].astype(np.float32), second[:, 0].astype(np.float32), method="asymp")
    assert (audio["ks"], audio["p"]) == (test.statistic, test.pvalue)


def test_groups_widen_the_interval_and_have_no_p() -> None:
    rng = np.random.default_rng(2)
    shift = np.tile(rng.normal(0, 0.2, 5), 20)[:, None]
    first = np.clip(0.5 + shift + rng.normal(0, 0.02, (100, 2)), 0, 1)
    alone, grouped = (
        compare_distributions(scores(first, groups=groups), scores(first[::-1], groups=groups)) for groups in (0, 5)
    )
    widths = [item["confidence"]["audio"]["difference"] for item in (alone, grouped)]
    assert widths[1]["high"] - widths[1]["low"] > 2 * (widths[0]["high"] - widths[0]["low"])
    assert grouped["gap"]["p"] is None
    one_group = compare_distributions(scores(first, groups=1), scores(first))
    assert (one_group["gap"]["difference"]["low"], one_group["gap"]["difference"]["high"]) == (-1, 1)


def with_text(values: list[float]) -> ScoreTable:
    confidence = np.array([[0.5, 0.2, value] for value in values], np.float32)
    return ScoreTable(
        sample_id=np.array(["a", "b"], dtype=object),
        label=np.zeros(2, np.int32),
        label_name=np.array(["x", "x"], dtype=object),
        modalities=("audio", "video", "text"),
        confidence=confidence,
    )


def test_missing_modality_has_no_numbers() -> None:
    compared = compare_distributions(with_text([0.1, 0.2]), with_text([np.nan, np.nan]))
    assert compared["confidence"]["text"]["ks"] is None
    assert compared["confidence"]["audio"]["ks"] == 0
    assert "balanced" not in compared
