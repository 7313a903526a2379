"""Distances to uniform by halves: noise is far from uniform by the other half, equal halves are as near as selected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance import recipe as half_distances
from mmaudit.rebalance.balanced import BalancedConfig
from mmaudit.rebalance.recipe import Recipe, make_split

N = 2_000


def confidences(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw confidences (n, 2) whose difference is far from uniform: most are near 0."""
    return rng.beta(4, 4, (N, 2)).astype(np.float32)


def table(half_a: NDArray[np.float32] | None, half_b: NDArray[np.float32] | None) -> ScoreTable:
    label = (np.arange(N) % 3).astype(np.int32)
    return ScoreTable(
        sample_id=np.array([f"s{row:05d}" for row in range(N)], dtype=object),
        label=label,
        label_name=label.astype(str).astype(object),
        modalities=("audio", "image"),
        split=np.where(np.arange(N) % 5 == 0, "test", "train").astype(object),
        confidence=confidences(np.random.default_rng(9)),
        half_a=half_a,
        half_b=half_b,
    )


def halves_of(scores: ScoreTable, folder: Path, **settings: object) -> dict[str, float] | None:
    from mmaudit.rebalance.score_tables import open_scores

    recipe = Recipe(balanced=BalancedConfig(**settings))  # type: ignore[arg-type]
    files = open_scores(scores, seed=0)
    result = make_split(files, recipe, lambda name: folder / f"{name}.parquet", scratch=folder, dry_run=True)
    halves = result.numbers["halves"]
    assert halves is None or isinstance(halves, dict)
    return halves


def test_noise_is_as_far_from_uniform_as_before_by_the_other_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    halves = halves_of(table(confidences(rng), confidences(rng)), tmp_path)
    assert halves is not None
    assert halves["num_rows"] == N
    assert halves["selected"] <= 0.06  # each split by itself is within 0.05
    assert halves["measured"] > 0.3
    assert halves["chance"] < 0.15


def test_equal_halves_agree(tmp_path: Path) -> None:
    half = confidences(np.random.default_rng(0))
    halves = halves_of(table(half, half), tmp_path)
    assert halves is not None
    assert halves["measured"] == halves["selected"]


@pytest.mark.parametrize(
    "settings", [{}, {"size": 300}, {"by": "weight"}, {"grid": True, "bins": 5}, {"per_class": True}]
)
def test_row_order_does_not_matter(tmp_path: Path, settings: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    scores = table(confidences(rng), confidences(rng))
    halves = halves_of(scores, tmp_path, **settings)
    assert halves is not None
    assert halves == halves_of(scores.take(rng.permutation(N)), tmp_path, **settings)
    if "size" in settings:
        assert halves["kept"] == 300
    if "by" in settings:
        assert halves["kept"] == N


def test_only_rows_with_both_halves_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = confidences(rng), confidences(rng)
    first[:500], second[1_500:] = np.nan, np.nan
    halves = halves_of(table(first, second), tmp_path, size=400)
    assert halves is not None
    assert (halves["num_rows"], halves["kept"]) == (1_000, 200)  # half of the rows, half of the size
    monkeypatch.setattr(half_distances, "MAX_ROWS", 200)
    sampled = halves_of(table(first, second), tmp_path)
    assert sampled is not None
    assert sampled["num_rows"] == 200


def test_tables_without_halves_have_no_such_distance(tmp_path: Path) -> None:
    assert halves_of(table(None, None), tmp_path) is None
    empty = np.full((N, 2), np.nan, np.float32)
    assert halves_of(replace(table(None, None), half_a=empty, half_b=empty), tmp_path) is None
