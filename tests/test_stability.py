"""Stability of an audit: reliability by halves of the features, and the lean over bisections of the samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_memory import Scored, score_in_memory
from numpy.typing import NDArray
from scipy.stats import t

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.engine.fitting import NetworkSettings
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes.config import NetworkConfig, ProbeConfig
from mmaudit.audit.scores import stability
from mmaudit.audit.scores.stability import intervals_of_sets, reliability_within_classes

Floats = NDArray[np.float64]
QUICK = ProbeConfig(kind="linear", folds=3, repeats=1, l2_penalties=(1e-2,), joint=False, control=False)


def write_features(path: Path, *, rows: int = 300, num_features: int = 8, quality: Floats | None = None) -> Path:
    """Write two modalities of features around class means, whose distance varies by sample with `quality` (n, 2)."""
    rng = np.random.default_rng(0)
    label = np.arange(rows) % 3
    centres = rng.standard_normal((2, 3, num_features))
    columns: dict[str, Any] = {"id": [f"s{row:04d}" for row in range(rows)], "label": label.tolist()}
    columns["speaker"] = [f"g{row % 12}" for row in range(rows)]
    for index, name in enumerate(("audio", "image")):
        strength = np.full(rows, 0.5) if quality is None else quality[:, index]
        features = strength[:, None] * centres[index][label] + rng.standard_normal((rows, num_features))
        columns[name] = features.astype(np.float32).tolist()
    pq.write_table(pa.table(columns), path)
    return path


def audit(data: Path, folder: Path, probe: ProbeConfig, *, group: str | None = None) -> Scored:
    dataset = open_dataset(data, DataConfig(group=group, modality=("audio=audio", "image=image")))
    networks = NetworkSettings(config=NetworkConfig(), media=MediaConfig(), folder=folder / "n")
    return score_in_memory(dataset, features=folder / "f", probe=probe, networks=networks)


def test_z_is_in_units_of_permutations_within_classes() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    shared = rng.standard_normal(200)
    first, second = (label + shared + rng.standard_normal(200) for _ in range(2))
    measured = reliability_within_classes(first.astype(np.float32), second.astype(np.float32), label)
    assert measured is not None
    centred = [values - np.array([values[label == k].mean() for k in range(4)])[label] for values in (first, second)]
    assert measured[0] == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-6)
    drawn = []
    for _ in range(2_000):
        permuted = np.empty(200)
        for k in range(4):
            permuted[label == k] = rng.permutation(centred[1][label == k])
        drawn.append(np.corrcoef(centred[0], permuted)[0, 1])
    assert measured[1] == pytest.approx(measured[0] / np.std(drawn), rel=0.06)


def test_class_means_and_missing_values_have_no_reliability() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(3_000) % 3
    first, second = ((5 * label + rng.standard_normal(3_000)).astype(np.float32) for _ in range(2))
    first[:100] = np.nan
    measured = reliability_within_classes(first, second, label)
    assert measured is not None
    assert abs(measured[0]) < 0.05
    assert abs(measured[1]) < 3
    assert reliability_within_classes(label.astype(np.float32), second, label) is None


def test_discrepancies_are_reliable_where_quality_differs_and_not_in_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first = rng.random(300) < 0.5
    quality = np.stack([np.where(first, 2.0, 0.0), np.where(first, 0.0, 2.0)], axis=1)
    for name, planted, lowest, highest in (("planted", quality, 0.4, 1.0), ("noise", None, -0.2, 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        result = audit(write_features(folder / "d.parquet", quality=planted), folder, QUICK)
        assert result.halves is not None
        assert result.halves.reason == ""
        (reliability,) = result.halves.reliability
        assert reliability.modality == "audio"
        assert lowest < reliability.r < highest
        assert (reliability.z > 5) == (name == "planted")
        assert result.scores.half_a is not None
        assert result.scores.half_b is not None
        assert not np.isnan(result.scores.half_a).any()
        assert (result.scores.half_a != result.scores.half_b).mean() > 0.9
        assert result.bisections is None


def test_more_samples_than_the_limit_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "AUDIT_ROWS", 120)
    result = audit(write_features(tmp_path / "d.parquet"), tmp_path, QUICK)
    assert result.halves is not None
    assert result.halves.num_rows == 120
    assert result.scores.half_a is not None
    assert np.isnan(result.scores.half_a).all(axis=1).sum() == 180


def test_one_feature_cannot_be_halved(tmp_path: Path) -> None:
    result = audit(write_features(tmp_path / "d.parquet", num_features=1), tmp_path, QUICK)
    assert result.halves is not None
    assert (result.halves.reason, result.halves.reliability) == ("audio has one feature, which cannot be halved", ())
    assert result.scores.half_a is None


@pytest.mark.parametrize("group", [None, "speaker"])
def test_bisections_give_wider_intervals_than_one_sample(tmp_path: Path, group: str | None) -> None:
    quality = np.stack([np.full(300, 0.9), np.full(300, 0.3)], axis=1)
    data = write_features(tmp_path / "d.parquet", quality=quality)
    result = audit(data, tmp_path, replace(QUICK, halves=False, thorough=True), group=group)
    assert result.halves is None
    assert result.bisections is not None
    (error,) = result.bisections.errors
    assert (error.modality, result.bisections.reason, result.bisections.num_rows) == ("audio", "", 300)
    assert 0.005 < error.lean < 0.2
    assert max(error.ahead, error.behind) < error.lean < error.ahead + error.behind + 0.01
    lean = intervals_of_sets(result.bisections.to_json()["errors"][0], share_ahead=0.4, share_behind=0.3)["lean"]
    assert lean["high"] - lean["mean"] == pytest.approx(t.ppf(0.975, 6) * error.lean)


def test_bisections_need_four_groups(tmp_path: Path) -> None:
    data = write_features(tmp_path / "d.parquet", rows=60)
    table = pq.read_table(data).to_pydict()
    pq.write_table(pa.table({**table, "speaker": [f"g{row // 3 % 3}" for row in range(60)]}), data)
    result = audit(data, tmp_path, replace(QUICK, halves=False, thorough=True), group="speaker")
    assert result.bisections is not None
    assert "of one group" in result.bisections.reason
    assert result.bisections.errors == ()


def test_results_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    data = write_features(tmp_path / "d.parquet", rows=150)
    table = pq.read_table(data)
    (tmp_path / "shuffled").mkdir()
    pq.write_table(table.take(np.random.default_rng(0).permutation(150)), tmp_path / "shuffled" / "d.parquet")
    probe = replace(QUICK, thorough=True)
    first = audit(data, tmp_path, probe, group="speaker")
    second = audit(tmp_path / "shuffled" / "d.parquet", tmp_path / "shuffled", probe, group="speaker")
    assert first.halves is not None
    assert second.halves is not None
    assert first.halves.to_json() == second.halves.to_json()
    assert first.bisections == second.bisections
    assert first.margin_check == second.margin_check
    assert first.balanced_side == second.balanced_side
    assert first.probe_report == second.probe_report
