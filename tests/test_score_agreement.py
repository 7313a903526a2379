"""Agreement of two score tables: joined by id, ceilings from halves and repeats, refused where nothing is shared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

import mmaudit
from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.scores.table import ScoreTable, write_scores
from mmaudit.cli.main import app
from mmaudit.rebalance.score_agreement import compare_scores

N = 300


def make_scores(
    *, noise: float = 0.0, seed: int = 0, names: tuple[str, ...] = ("audio", "image"), **changes: Any
) -> Any:
    """Make a table of confidences c = truth + noise, whose halves and repeats have the same noise."""
    truth = np.random.default_rng(7).uniform(0.2, 0.8, size=(N, len(names)))
    rng = np.random.default_rng(seed)

    def measured() -> Any:
        return np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1).astype(np.float32)

    table = ScoreTable(
        sample_id=np.array([f"s{row:03d}" for row in range(N)], dtype=object),
        label=(np.arange(N) % 3).astype(np.int32),
        label_name=np.array([f"class-{row % 3}" for row in range(N)], dtype=object),
        modalities=names,
        confidence=measured(),
        half_a=measured(),
        half_b=measured(),
        provenance={"fingerprint": "same", "config": {"seed": seed, "probe": {"repeats": 3, "learn_from": "train"}}},
    )
    return replace(table, **changes)


def test_the_same_table_agrees_with_itself_in_any_order_of_rows() -> None:
    scores = make_scores()
    shuffled = scores.take(np.random.default_rng(0).permutation(N))
    agreement = compare_scores(scores, shuffled)
    assert [row.measure for row in agreement.measures] == ["discrepancy", "gap"]
    assert all(row.rank.value == pytest.approx(1) for row in agreement.measures)
    assert all(row.kappa.value == pytest.approx(1) for row in agreement.sides)
    assert agreement.both == N
    assert agreement.same_dataset is True


def test_rank_agreement_is_spearman_within_classes_and_near_the_ceiling_of_the_halves() -> None:
    """Full scores have half of the noise variance of each half, as Spearman-Brown assumes."""
    halves = [make_scores(noise=0.15, seed=seed) for seed in (1, 2)]
    full = [replace(table, confidence=(table.half_a + table.half_b) / 2) for table in halves]
    row = compare_scores(*full).measures[0]
    signed = [table.discrepancy("audio:image") for table in full]
    within = [spearmanr(*(values[full[0].label == label] for values in signed)).statistic for label in range(3)]
    assert row.rank.value == pytest.approx(np.mean(within))
    assert row.ceiling_features is not None
    assert row.rank.value == pytest.approx(row.ceiling_features, abs=0.06)
    assert 0.6 < row.ceiling_features < 0.9


def test_ceiling_of_folds_follows_from_the_deviation_over_repeats() -> None:
    scores = make_scores(discrepancy_sd=np.full((N, 1), 0.1, np.float32))
    row = compare_scores(scores, scores).measures[0]
    values = scores.discrepancy("audio:image").astype(float)
    variance = np.mean([values[scores.label == label].var() for label in range(3)])
    assert row.ceiling_folds == pytest.approx(1 - 0.01 / 3 / variance, abs=1e-6)
    assert compare_scores(make_scores(), make_scores()).measures[0].ceiling_folds is None
    bare = make_scores(half_a=None, half_b=None)
    assert "ceiling not measured" in compare_scores(bare, bare).lines()[1]


def test_order_of_modalities_does_not_turn_the_sign() -> None:
    scores = make_scores()
    turned = replace(
        scores,
        modalities=("image", "audio"),
        **{name: getattr(scores, name)[:, ::-1] for name in ("confidence", "half_a", "half_b")},
    )
    assert compare_scores(scores, turned).measures[0].rank.value == pytest.approx(1)


def test_each_pair_of_three_modalities_is_compared() -> None:
    scores = make_scores(names=("audio", "image", "text"))
    agreement = compare_scores(scores, scores)
    pairs = ["audio:image", "audio:text", "image:text"]
    assert [row.between for row in agreement.measures] == [pair for pair in pairs for _ in range(2)]
    two = compare_scores(scores, make_scores())
    assert two.modalities == ("audio", "image")
    assert {row.between for row in two.measures} == {"audio:image"}


def test_only_common_samples_count_and_other_labels_and_datasets_are_named() -> None:
    scores = make_scores()
    fewer = scores.take(np.arange(100))
    fewer = replace(
        fewer,
        label_name=np.where(np.arange(100) < 5, "other", fewer.label_name).astype(object),
        provenance={**scores.provenance, "fingerprint": "another"},
    )
    agreement = compare_scores(scores, fewer)
    assert (agreement.rows_a, agreement.rows_b, agreement.both) == (N, 100, 100)
    assert agreement.measures[0].rank.num_samples == 100
    text = "\n".join(agreement.lines())
    assert "300 samples" in text
    assert "100 in both are compared" in text
    assert "the fingerprints differ" in text
    assert "5 samples are of another class" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_id": np.array([f"t{row}" for row in range(N)], dtype=object)}, "0 samples in common"),
        ({"modalities": ("voice", "image")}, "voice, image: a discrepancy needs two in common"),
    ],
)
def test_tables_with_nothing_in_common_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        compare_scores(make_scores(), make_scores(**changes))


def test_settings_that_differ_are_listed() -> None:
    lines = compare_scores(make_scores(seed=1), make_scores(seed=2)).lines()
    assert "config.seed: 1 in A, 2 in B" in lines


def test_diff_of_two_score_tables_prints_agreement_and_json(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_scores(make_scores(noise=0.1, seed=seed), tmp_path / f"{name}.parquet")
    words = ["diff", str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0
    assert "discrepancy audio:image: rank agreement within classes 0." in printed.stdout
    content = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    result = mmaudit.diff(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert isinstance(result, mmaudit.ScoreAgreement)
    assert content["measures"][0]["rank"]["value"] == pytest.approx(result.measures[0].rank.value)
    assert content == json.loads(json.dumps(result.to_dict()))


def test_a_score_table_and_a_manifest_are_not_compared(tmp_path: Path) -> None:
    write_scores(make_scores(), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet is a run or a score table, balanced is neither"):
        mmaudit.diff("balanced", tmp_path / "a.parquet", run=tmp_path / "run")
