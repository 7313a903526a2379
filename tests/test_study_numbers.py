"""Numbers of a study: networks against probes, planted truth, and methods against shuffled labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

import mmaudit
from mmaudit.audit.errors import RunError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.cli.study.numbers import against_shuffled, network_agreements, recovery

N, TESTED = 200, 120


def make_scores(discrepancy: Any, **changes: Any) -> ScoreTable:
    ids = [f"s{row:03d}" for row in range(N)]
    made: dict[str, Any] = {
        "sample_id": np.array(ids, dtype=object),
        "label": np.zeros(N, dtype=np.int32),
        "label_name": np.array(["only"] * N, dtype=object),
        "modalities": ("audio", "image"),
        "confidence": np.stack([0.5 + discrepancy / 2, 0.5 - discrepancy / 2], axis=1).astype(np.float32),
    }
    return ScoreTable(**{**made, **changes})


def write_cells(folder: Path, discrepancies: list[Any], *, columns: tuple[str, ...] = ("audio", "image")) -> Any:
    """Write trainings of `joint` whose branches have these discrepancies (TESTED,), and return their comparison."""
    ids = [f"s{row:03d}" for row in range(TESTED)]
    for seed, values in enumerate(discrepancies):
        cell = folder / "cells" / "all" / "joint" / f"seed-{seed}"
        cell.mkdir(parents=True)
        branches = {"audio": 0.5 + values / 2, "image": 0.5 - values / 2}
        table = {"sample_id": ids, **{f"branch_{name}": branches[name] for name in columns}}
        pq.write_table(pa.table(table), cell / "predictions.parquet")
    seeds = {f"all/joint/{seed}": np.ones(TESTED, bool) for seed in range(len(discrepancies))}
    correct = {("all", "joint"): None, ("all", "shuffled labels"): None, ("balanced", "joint"): None}
    return SimpleNamespace(folder=folder, correct=correct, per_sample=pd.DataFrame({"sample_id": ids, **seeds}))


def test_networks_agree_with_probes_as_their_mean_over_seeds_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(-0.7, 0.7, N)
    branches = [truth[:TESTED] + 0.2 * rng.normal(size=TESTED) for _ in range(4)]
    scores = make_scores(np.clip(truth + 0.2 * rng.normal(size=N), -1, 1))
    rows = list(network_agreements(write_cells(tmp_path, branches), scores))
    assert [row["method"] for row in rows] == ["joint"]  # no control, and on all samples only
    expected = spearmanr(scores.discrepancy()[:TESTED], np.mean(branches, axis=0)).statistic
    assert rows[0]["rank"]["value"] == pytest.approx(expected)
    between = [spearmanr(branches[i], branches[j]).statistic for i in range(4) for j in range(i)]
    assert rows[0]["between_seeds"] == pytest.approx(np.mean(between))
    assert rows[0]["num_seeds"] == 4
    assert rows[0]["ceiling"] is None  # the probes state no deviation over repeats


def test_ceiling_is_the_root_of_the_reliabilities_over_folds_and_over_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(-0.7, 0.7, N)
    branches = [truth[:TESTED] + 0.3 * rng.normal(size=TESTED) for _ in range(2)]
    deviation = np.full((N, 1), 0.2, np.float32)
    provenance = {"config": {"probe": {"repeats": 2}}}
    scores = make_scores(truth, discrepancy_sd=deviation, provenance=provenance)
    row = next(network_agreements(write_cells(tmp_path, branches), scores))
    r = spearmanr(*branches).statistic
    of_probes = 1 - 0.04 / 2 / scores.discrepancy().var()
    assert row["ceiling"] == pytest.approx(np.sqrt(of_probes * 2 * r / (1 + r)), rel=1e-5)


def test_cells_without_branches_are_damaged(tmp_path: Path) -> None:
    comparison = write_cells(tmp_path, [np.zeros(TESTED)], columns=("audio",))
    with pytest.raises(RunError, match="columns are others"):
        list(network_agreements(comparison, make_scores(np.zeros(N))))


def test_recovery_is_spearman_with_the_planted_discrepancy_and_its_mean_by_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    planted = rng.choice([-1.0, -0.5, 0.0], N)
    estimated = np.clip(planted / 2 + 0.1 * rng.normal(size=N), -1, 1)
    ids = [f"s{row:03d}" for row in range(N)]
    table = {"sample_id": [*ids[::-1], "unknown"], "discrepancy": [*planted[::-1], 0.0]}
    pq.write_table(pa.table(table), tmp_path / "truth.parquet")
    numbers = recovery(tmp_path / "truth.parquet", make_scores(estimated))
    assert numbers is not None
    assert numbers["rank"]["value"] == pytest.approx(spearmanr(planted, estimated).statistic, abs=1e-6)
    assert [row["planted"] for row in numbers["levels"]] == [-1.0, -0.5, 0.0]
    means = [estimated[planted == level].mean() for level in (-1.0, -0.5, 0.0)]
    assert [row["mean"] for row in numbers["levels"]] == pytest.approx(means, abs=1e-6)
    assert recovery(None, make_scores(estimated)) is None


def test_many_planted_values_are_grouped_into_five_levels(tmp_path: Path) -> None:
    planted = np.linspace(-1, 1, N)
    table = {"sample_id": [f"s{row:03d}" for row in range(N)], "discrepancy": planted}
    pq.write_table(pa.table(table), tmp_path / "truth.parquet")
    numbers = recovery(tmp_path / "truth.parquet", make_scores(planted))
    assert numbers is not None
    assert [row["n"] for row in numbers["levels"]] == [40] * 5
    assert numbers["rank"]["value"] == pytest.approx(1)


def test_a_method_is_above_shuffled_labels_only_with_every_seed() -> None:
    correct = np.zeros((2, 100), dtype=bool)
    correct[:, :50], correct[0, :90] = True, True
    methods = mmaudit.compare_predictions({"joint": correct, "greedy": correct})
    chance = np.zeros((2, 1, 100), dtype=bool)
    chance[0, 0, :10], chance[1, 0, :60] = True, True
    shuffled = mmaudit.compare_predictions({"shuffled:joint": chance[0], "shuffled:greedy": chance[1]})
    rows = against_shuffled(methods, shuffled)
    assert [(row["method"], row["lowest"], row["shuffled"], row["above"]) for row in rows] == [
        ("joint", 0.5, 0.1, True),
        ("greedy", 0.5, 0.6, False),
    ]
