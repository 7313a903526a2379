"""Scoring: every sample is accounted for, row order does not matter, and no probe scores its training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_memory import Scored, score_in_memory
from scipy.special import softmax
from scipy.stats import spearmanr

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.engine.fitting import NetworkSettings
from mmaudit.audit.errors import Reason, ScoreError
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes.config import NetworkConfig, ProbeConfig
from mmaudit.audit.scores.table import BY_MODALITY, ScoreTable

# One l2 and one repeat unless a test needs more: most tests are about which rows are scored, not how well.
QUICK = ProbeConfig(folds=3, repeats=1, l2_penalties=(1e-2,), joint=False, control=False, halves=False)
WHOLE = replace(QUICK, repeats=2, joint=True, control=True)
EXACT = replace(WHOLE, halves=True, tolerance=1e-9)  # where the last digits count, and not where a fit stops


MEDIA = MediaConfig(image_size=16, network_size=16)


def audit(
    data: Path, cache: Path, *, config: DataConfig | None = None, probe: ProbeConfig = QUICK, **rest: Any
) -> Scored:
    networks = NetworkSettings(config=NetworkConfig(), media=MEDIA, folder=cache / "networks")
    options: dict[str, Any] = {"networks": networks, **rest}
    return score_in_memory(open_dataset(data, config), features=cache, probe=probe, **options)


def rows_of(path: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(path).to_pydict())


def rewrite(path: Path, columns: dict[str, list[Any]], order: Sequence[int] | None = None) -> Path:
    """Write rows, in the given order if any, with vectors of any length."""
    order = range(len(columns["id"])) if order is None else order
    table = pa.table({name: [values[row] for row in order] for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=16)
    return path


def by_id(result: Scored) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in result.scores.to_arrow().to_pylist()}


Planted = Callable[..., Path]


def test_clips_with_an_informative_feature_are_predicted(clip_source: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = audit(
        clip_source,
        tmp_path,
        config=DataConfig(group="speaker"),
        probe=WHOLE,
        progress=lambda *step, detail="": steps.append(step),
    )
    scores = result.scores
    assert len(scores) == 24
    assert result.quarantined == ()
    assert scores.modalities == ("audio", "image")
    assert scores.confidence.min() > 1 / 3
    assert scores.prediction is not None
    assert (scores.prediction == scores.label[:, None]).all()
    assert scores.prediction_fused is not None
    assert (scores.prediction_fused == scores.label).all()
    assert scores.label_name.tolist()[:3] == ["class-0", "class-1", "class-2"]
    assert scores.paths is not None
    assert scores.paths["image_file_name"].to_pylist()[:2] == ["0.png", "1.png"]
    steps = list(dict.fromkeys(steps))  # a fit reports its beginning and its end
    assert steps[0] == ("encode", 1, 1)
    assert steps[1:-1] == [("probe", step, 5) for step in range(6)]  # both, the joint probe, the controls
    assert steps[-1] == ("score", 24, 24)
    assert not any(control.leaks for control in result.probe_report.controls)


def test_network_has_a_control_if_configured(clip_source: Path, tmp_path: Path) -> None:
    """It needs two networks besides the three folds of two repeats; they are stored, too."""
    config = DataConfig(group="speaker", encoder=("image=resnet18",))
    quick = NetworkConfig(epochs=2, batch_size=8, width=1 / 16)
    networks = NetworkSettings(config=quick, media=MEDIA, folder=tmp_path / "networks")
    steps: list[tuple[str, int, int]] = []

    def go(probe: ProbeConfig) -> Scored:
        return audit(
            clip_source,
            tmp_path,
            config=config,
            probe=probe,
            networks=networks,
            progress=lambda *step, detail="": steps.append(step),
        )

    without = go(replace(WHOLE, control=False))
    assert without.probe_report.controls == ()
    assert len(list(networks.folder.glob("*.npy"))) == 6
    steps.clear()
    result = go(WHOLE)
    assert [control.name for control in result.probe_report.controls] == ["audio", "image"]
    assert not any(control.leaks for control in result.probe_report.controls)
    assert result.scores.to_arrow().equals(without.scores.to_arrow())
    assert [step[1:] for step in steps if step[0] == "probe"] == [(done, 4) for done in (0, 1, 1, 2, 2, 3, 3, 4)]
    assert {step[0] for step in steps} >= {"probe", "control image"}  # the others are stored
    assert len(list(networks.folder.glob("*.npy"))) == 8
    assert go(WHOLE).probe_report.controls == result.probe_report.controls
    assert len(list(networks.folder.glob("*.npy"))) == 8


def test_planted_clarity_is_recovered(tmp_path: Path) -> None:
    """One random modality per sample is informative, the other noise: the discrepancy shows which."""
    rng = np.random.default_rng(0)
    label, first = np.arange(600) % 3, rng.random(600) < 0.5
    columns: dict[str, list[Any]] = {"id": [f"s{number}" for number in range(600)], "label": label.tolist()}
    for name, clear in (("a", first), ("b", ~first)):
        shift = 4.0 * clear[:, None] * np.eye(3)[label]
        columns[name] = (shift + rng.standard_normal((600, 3))).tolist()
    scores = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path, probe=ProbeConfig()).scores
    assert spearmanr(scores.discrepancy(), first).statistic > 0.75  # 0.87 is the most that ties of a coin allow
    assert ((scores.discrepancy() > 0) == first).mean() > 0.9


DEFECTS: dict[str, tuple[str, Any, Reason]] = {
    "no label": ("label", None, Reason.NO_LABEL),
    "no vector": ("audio", None, Reason.MISSING),
    "NaN": ("visual", [0.0, float("nan"), 1.0], Reason.NOT_FINITE),
    "infinite": ("audio", [0.0, float("inf"), 1.0], Reason.NOT_FINITE),
    "short": ("visual", [0.0], Reason.WRONG_LENGTH),
    "empty": ("audio", [], Reason.WRONG_LENGTH),
    "rare": ("label", 77, Reason.RARE_CLASS),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grouped", [False, True])
def test_every_sample_is_scored_or_quarantined(planted: Planted, tmp_path: Path, seed: int, grouped: bool) -> None:
    """Defects are random; a sample may have several, and some defects make a class rare."""
    rng = np.random.default_rng(seed)
    columns = rows_of(planted(num_samples=60, seed=seed))
    if grouped:
        columns["group"] = [f"g{rng.integers(8)}" for _ in range(60)]
    expected: Counter[tuple[str, Reason]] = Counter()
    last: dict[tuple[int, str], Reason] = {}
    for name in DEFECTS:
        column, value, reason = DEFECTS[name]
        # A single sample of the rare class: a class of two is not rare.
        for row in rng.choice(60, 1 if name == "rare" else 3, replace=False):
            columns[column][row] = value
            last[row, column] = reason
    for (row, _), reason in last.items():
        expected[columns["id"][row], reason] += 1
    result = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache")
    scored, left_out = set(result.scores.sample_id), {record.sample_id for record in result.quarantined}
    assert scored | left_out == set(columns["id"])
    assert scored & left_out == set()
    defects = {
        (record.sample_id, record.reason) for record in result.quarantined if record.reason is not Reason.RARE_CLASS
    }
    assert defects == {pair for pair in expected if pair[1] is not Reason.RARE_CLASS}
    rare = {record.sample_id for record in result.quarantined if record.reason is Reason.RARE_CLASS}
    assert rare.isdisjoint(name for name, _ in defects)
    assert rare == {name for name, reason in expected if reason is Reason.RARE_CLASS} - {name for name, _ in defects}
    for record in result.quarantined:
        assert (record.modality is None) == (record.reason in (Reason.NO_LABEL, Reason.RARE_CLASS))
        assert record.detail


def test_class_that_becomes_rare_is_quarantined(planted: Planted, tmp_path: Path) -> None:
    """The rest gets new folds, which may put another class into a single fold, as with seed 1097."""
    rng = np.random.default_rng(1097)
    columns = rows_of(planted(num_samples=60))
    columns["group"] = [f"g{number}" for number in rng.integers(0, 6, 60)]
    for index, row in enumerate(rng.choice(60, 8, replace=False)):
        columns["label"][row] = 3 + index // 2  # four classes of two samples
    result = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache")
    left_out = [record.sample_id for record in result.quarantined]
    assert len(set(left_out)) == len(left_out) == 4
    assert sorted([*left_out, *result.scores.sample_id]) == sorted(columns["id"])


def test_class_of_the_test_split_is_rare_when_training_on_train(planted: Planted, tmp_path: Path) -> None:
    columns = rows_of(planted())
    for row in (4, 5, 6, 7):
        columns["label"][row], columns["split"][row] = 9, "test"
    data = rewrite(tmp_path / "d.parquet", columns)
    all_splits = audit(data, tmp_path / "cache")
    assert all_splits.quarantined == ()
    train = audit(data, tmp_path / "cache", probe=replace(QUICK, learn_from="train"))
    assert {record.sample_id for record in train.quarantined} == {columns["id"][row] for row in (4, 5, 6, 7)}


def test_test_labels_do_not_change_training_scores(planted: Planted, tmp_path: Path) -> None:
    """Neither through probes, unimodal or joint, nor temperatures, Shapley values, balance or the mixture."""
    columns = rows_of(planted(num_samples=120))
    train = replace(WHOLE, learn_from="train")
    before = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "one", probe=train)
    turned = {**columns, "label": list(columns["label"])}
    for row, split in enumerate(columns["split"]):
        if split == "test":
            turned["label"][row] = (columns["label"][row] + 1) % 3
    after = audit(rewrite(tmp_path / "d.parquet", turned), tmp_path / "two", probe=train)
    learned = pa.array(before.scores.split != "test")
    rows_before, rows_after = (result.scores.to_arrow().filter(learned) for result in (before, after))
    assert "shapley_audio" in rows_before.column_names
    assert rows_before.equals(rows_after)
    assert after.mixture == before.mixture
    assert after.probe_report.controls == before.probe_report.controls
    all_splits = audit(rewrite(tmp_path / "d.parquet", turned), tmp_path / "two", probe=WHOLE).scores.to_arrow()
    assert not all_splits.filter(learned)["confidence_audio"].equals(rows_before["confidence_audio"])


def test_test_samples_do_not_change_training_scores(planted: Planted, tmp_path: Path) -> None:
    columns = rows_of(planted())
    train = replace(QUICK, learn_from="train", tolerance=1e-9)
    before = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "one", probe=train)
    tests = [row for row, split in enumerate(columns["split"]) if split == "test"]
    for row in tests[:4]:
        columns["audio"][row] = [1e3, -1e3, 1e3]
    after = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "two", probe=train)
    learned = before.scores.split != "test"
    np.testing.assert_allclose(after.scores.confidence[learned], before.scores.confidence[learned], atol=5e-3)
    assert after.scores.balance is not None
    assert before.scores.balance is not None
    np.testing.assert_allclose(after.scores.balance[learned], before.scores.balance[learned], atol=2e-2)
    assert len(tests) > 4


def test_shuffling_rows_shuffles_the_result(planted: Planted, tmp_path: Path) -> None:
    columns = rows_of(planted())
    columns["audio"][3] = columns["label"][8] = None
    order = np.random.default_rng(0).permutation(90).tolist()
    original = audit(rewrite(tmp_path / "one.parquet", columns), tmp_path / "one", probe=EXACT)
    shuffled = audit(rewrite(tmp_path / "two.parquet", columns, order), tmp_path / "two", probe=EXACT)
    assert shuffled.fingerprint == original.fingerprint
    assert sorted(map(str, shuffled.quarantined)) == sorted(map(str, original.quarantined))
    assert shuffled.scores.sample_id.tolist() != original.scores.sample_id.tolist()
    original_rows, shuffled_rows = by_id(original), by_id(shuffled)
    assert original_rows.keys() == shuffled_rows.keys()
    for name, row in original_rows.items():
        for column, value in row.items():
            if isinstance(value, float):
                # Sums in another order; a fit that stops a step later has one more snapshot.
                near = 3e-2 if column.startswith("training") else 5e-3
                assert shuffled_rows[name][column] == pytest.approx(value, abs=near), column
            elif column != "dominant" and not column.startswith("prediction"):
                assert shuffled_rows[name][column] == value, column


def test_two_runs_are_bit_equal(planted: Planted, tmp_path: Path) -> None:
    data = planted()
    first, second = (audit(data, tmp_path / name, probe=ProbeConfig(repeats=2)) for name in ("one", "two"))
    assert first.scores.to_arrow().equals(second.scores.to_arrow())
    assert (first.mixture, first.probe_report, first.class_check) == (
        second.mixture,
        second.probe_report,
        second.class_check,
    )
    other_seed = audit(data, tmp_path / "one", seed=1)
    assert other_seed.scores.fold is not None
    assert first.scores.fold is not None
    assert not np.array_equal(other_seed.scores.fold, first.scores.fold)
    assert other_seed.fingerprint == first.fingerprint


def test_single_class_raises(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"only one class is left to score \('0'\); probes need two"):
        audit(planted(num_classes=1), tmp_path / "cache")


def test_single_sample_raises(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="needs at least 2 usable samples, found 1"):
        audit(planted(num_samples=1, num_classes=1), tmp_path / "cache")


@pytest.mark.parametrize("grouped", [True, False])
def test_modality_of_a_single_sample_raises(planted: Planted, tmp_path: Path, grouped: bool) -> None:
    columns = rows_of(planted(modalities=("audio", "visual", "touch")))
    columns["split"] = ["train"] * 90
    if grouped:
        columns["group"] = [f"g{row // 9}" for row in range(90)]
    columns["touch"][(9 if grouped else 1) :] = [None] * (81 if grouped else 89)
    data = rewrite(tmp_path / "one.parquet", columns)
    unit = "groups of samples" if grouped else "samples"
    with pytest.raises(ScoreError, match=f"modality touch has 1 usable {unit} that probes can train on, 2 needed"):
        audit(data, tmp_path / "cache", config=DataConfig(group="group") if grouped else None)


def test_no_usable_sample_raises(planted: Planted, tmp_path: Path) -> None:
    columns = rows_of(planted())
    for row in range(90):
        columns["audio" if row % 2 else "visual"][row] = None
    with pytest.raises(ScoreError, match=r"no sample has a label, at least two usable .*; the first problem"):
        audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache")


@pytest.mark.parametrize("learn_from", ["all", "train"])
def test_test_split_only_raises(planted: Planted, tmp_path: Path, learn_from: str) -> None:
    columns = rows_of(planted())
    columns["split"] = ["test"] * 90
    data = rewrite(tmp_path / "d.parquet", columns)
    probe = replace(QUICK, learn_from=learn_from)
    with pytest.raises(ScoreError, match=r"every usable sample is in the test split: .* pass --split none"):
        audit(data, tmp_path / "cache", probe=probe)
    assert len(audit(data, tmp_path / "cache", config=DataConfig(split="none"), probe=probe).scores) == 90


@pytest.mark.parametrize("m", [3, 6])
def test_more_than_two_modalities(planted: Planted, tmp_path: Path, m: int) -> None:
    names = ("a", "b", "c", "d", "e", "f")[:m]
    result = audit(planted(modalities=names), tmp_path / "cache", probe=replace(QUICK, repeats=2))
    scores = result.scores
    assert scores.modalities == names
    assert scores.confidence.shape == (90, m)
    assert scores.discrepancy_sd is not None
    assert scores.discrepancy_sd.shape == (90, m)
    table = scores.to_arrow()
    total = np.sum([table[f"discrepancy_{name}"].to_numpy() for name in names], axis=0)
    np.testing.assert_allclose(total, 0, atol=1e-5)


def test_discrepancy_sd_is_over_repeats(planted: Planted, tmp_path: Path) -> None:
    data = planted()
    first = audit(data, tmp_path / "cache").scores
    two_repeats = audit(data, tmp_path / "cache", probe=replace(QUICK, repeats=2)).scores
    assert first.discrepancy_sd is None
    np.testing.assert_array_equal(first.fold, two_repeats.fold)  # that of the first round
    assert two_repeats.discrepancy_sd is not None
    assert two_repeats.discrepancy_sd.shape == (90, 1)
    assert 0 < two_repeats.discrepancy_sd.mean() < 0.5


def test_columns_are_consistent(planted: Planted, tmp_path: Path) -> None:
    result = audit(planted(), tmp_path / "cache", probe=replace(QUICK, learn_from="train"))
    scores = result.scores
    assert scores.loss is not None
    assert scores.prediction is not None
    np.testing.assert_allclose(scores.loss, -np.log(scores.confidence), rtol=1e-4, atol=1e-6)
    sure = scores.confidence > 0.5
    np.testing.assert_array_equal((scores.prediction == scores.label[:, None])[sure], True)
    np.testing.assert_array_equal((scores.prediction == scores.label[:, None])[scores.confidence < 1 / 3 - 1e-6], False)
    assert scores.p_balanced is not None
    np.testing.assert_array_equal(scores.p_balanced, result.mixture.posterior(scores.gap))
    assert result.mixture.num_samples == int(np.sum(scores.split != "test"))
    assert scores.prediction_fused is not None
    assert set(scores.prediction_fused.tolist()) <= set(scores.label.tolist())


def test_predictions_use_the_labels_of_the_source(planted: Planted, tmp_path: Path) -> None:
    """With one class dropped, predictions still use the labels of the source."""
    columns = rows_of(planted())
    columns["label"][0] = -5  # sorted first, and left out as rare
    result = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache")
    assert result.scores.prediction is not None
    assert set(result.scores.label.tolist()) == {1, 2, 3}
    assert set(result.scores.prediction.ravel().tolist()) <= {1, 2, 3}
    assert result.scores.prediction_fused is not None
    assert set(result.scores.prediction_fused.tolist()) <= {1, 2, 3}
    assert (result.scores.prediction_fused == result.scores.label).mean() > 0.5
    assert set(result.scores.label_name) == {"0", "1", "2"}


THREE = ("a", "b", "c")


def holed(columns: dict[str, list[Any]], names: Sequence[str] = THREE, *, every: int = 4) -> dict[str, list[Any]]:
    """Drop one modality, a different one each time, of every fourth sample."""
    with_missing = {name: list(values) for name, values in columns.items()}
    for number, row in enumerate(range(0, len(columns["id"]), every)):
        with_missing[names[number % len(names)]][row] = None
    return with_missing


def test_missing_modalities_are_null_and_discrepancy_is_over_the_others(planted: Planted, tmp_path: Path) -> None:
    columns = holed(rows_of(planted(modalities=THREE)))
    result = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache", probe=replace(WHOLE, halves=True))
    assert result.quarantined == ()
    rows = by_id(result)
    kinds = ("confidence", *BY_MODALITY, "discrepancy", "discrepancy_sd")
    for number, name in enumerate(columns["id"]):
        row = rows[name]
        has = [modality for modality in THREE if columns[modality][number] is not None]
        assert len(has) == (2 if number % 4 == 0 else 3)
        for modality in THREE:
            nulls = {kind for kind in kinds if row[f"{kind}_{modality}"] is None}
            assert nulls == (set() if modality in has else set(kinds)), (name, modality)
        c = {modality: row[f"confidence_{modality}"] for modality in has}
        for modality in has:
            mean_of_others = np.mean([c[name] for name in has if name != modality])
            assert row[f"discrepancy_{modality}"] == pytest.approx(c[modality] - mean_of_others, abs=1e-6)
        assert row["gap"] == pytest.approx(max(c.values()) - min(c.values()), abs=1e-6)
        assert row["dominant"] in has
        for column in ("similarity", "balance", "p_balanced", "confidence_fused", "prediction_fused", "loss_fused"):
            assert row[column] is not None


def test_missing_modalities_do_not_change_other_modalities(planted: Planted, tmp_path: Path) -> None:
    """Modality c is complete: its scores are bitwise equal, whichever rows lack a or b."""
    columns = rows_of(planted(modalities=THREE))
    full = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "one", probe=WHOLE)
    less = audit(rewrite(tmp_path / "d.parquet", holed(columns, ("a", "b"))), tmp_path / "two", probe=WHOLE)
    complete_rows, missing_rows = full.scores.to_arrow(), less.scores.to_arrow()
    for kind in ("confidence", "prediction", "loss", "entropy", "margin", "training_confidence"):
        assert complete_rows[f"{kind}_c"].equals(missing_rows[f"{kind}_c"]), kind
        assert not complete_rows[f"{kind}_a"].equals(missing_rows[f"{kind}_a"]), kind
    complete = less.scores.present.all(axis=1)
    assert spearmanr(full.scores.confidence[complete, 0], less.scores.confidence[complete, 0]).statistic > 0.9
    assert less.probe_report.probe_metrics[2] == full.probe_report.probe_metrics[2]


def test_probes_do_not_train_on_rows_without_their_modality(tmp_path: Path) -> None:
    """Folds are stratified by tenths of the numbers: moved within a tenth, they change training targets only."""
    columns, y = numbers_planted(200, names=THREE)
    columns = holed(columns, ("a",))
    config = DataConfig(task="regression")
    moved = {**columns, "label": list(columns["label"])}
    ranks = y.argsort().argsort()
    for row in range(0, 200, 4):
        if 2 < ranks[row] % 20 < 17:  # well inside its tenth, whose bounds stay where they are
            moved["label"][row] = float(np.sort(y)[ranks[row] // 20 * 20 + 10] + 1e-3 * row / 200)
    assert moved["label"] != columns["label"]
    before, after = (
        audit(rewrite(tmp_path / "d.parquet", variant), tmp_path / name, config=config, probe=WHOLE).scores.to_arrow()
        for name, variant in (("one", columns), ("two", moved))
    )
    assert before["fold"].equals(after["fold"])
    for kind in ("prediction", "entropy"):  # confidence is in units of the best modality, which may have moved
        assert before[f"{kind}_a"].equals(after[f"{kind}_a"])
        assert not before[f"{kind}_b"].equals(after[f"{kind}_b"])


def numbers_planted(n: int, *, names: Sequence[str] = ("signal", "noise")) -> tuple[dict[str, list[Any]], Any]:
    """Draw numbers that the first modality predicts up to an error of a fifth; the last is noise."""
    rng = np.random.default_rng(0)
    y = rng.normal(5, 2, n)
    columns: dict[str, list[Any]] = {"id": [f"s{row:03d}" for row in range(n)], "label": y.tolist()}
    for name in names:
        clear = 0.0 if name == names[-1] else 1.0
        columns[name] = (clear * y[:, None] + 0.4 * rng.standard_normal((n, 3))).tolist()
    return columns, y


def test_regression_is_predicted_by_the_informative_modality(tmp_path: Path) -> None:
    columns, y = numbers_planted(300)
    data = rewrite(tmp_path / "d.parquet", columns)
    result = audit(data, tmp_path / "cache", config=DataConfig(task="regression"), probe=WHOLE)
    assert (result.probe_report.metric, result.probe_report.chance["majority"]) == ("R^2", 0)
    signal, noise, fused, _ = result.probe_report.probe_metrics
    assert signal.value > 0.95
    assert -0.1 < noise.value < 0.05
    assert fused.value > 0.95
    gain, none = result.probe_report.gains
    assert gain.low > 0.5
    assert none.high < 0.02
    assert not any(control.leaks for control in result.probe_report.controls)
    scores = result.scores
    assert scores.prediction is not None
    assert scores.entropy is not None
    assert (scores.margin, scores.shapley) == (None, None)
    # Of a Gaussian the entropy is log(sigma sqrt(2 pi e)): it tells the sigma that each confidence was made with.
    sigma = np.exp(scores.entropy.astype(np.float64)) / np.sqrt(2 * np.pi * np.e)
    min_sigma = sigma.mean(axis=0).min()
    error = y[:, None] - scores.prediction
    expected = np.minimum(1, min_sigma / sigma * np.exp(-np.square(error) / (2 * sigma**2)))
    np.testing.assert_allclose(scores.confidence, expected, atol=1e-4)
    assert sigma[:, 0].mean() == pytest.approx(error[:, 0].std(), rel=0.05)
    assert scores.discrepancy().mean() > 0.3


def test_multilabel_is_predicted_by_the_informative_modality(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    has = rng.random((300, 3)) < 0.5
    columns: dict[str, list[Any]] = {
        "id": [f"s{row:03d}" for row in range(300)],
        "label": [[name for name, present in zip(("cat", "dog", "owl"), row, strict=True) if present] for row in has],
        "signal": (3.0 * has + 0.5 * rng.standard_normal((300, 3))).tolist(),
        "noise": rng.standard_normal((300, 3)).tolist(),
    }
    data = rewrite(tmp_path / "d.parquet", columns)
    result = audit(data, tmp_path / "cache", config=DataConfig(task="multilabel"), probe=WHOLE)
    assert result.quarantined == ()  # who has none of the labels has a set of labels
    assert result.probe_report.metric == "label accuracy"
    signal, noise, fused, _ = result.probe_report.probe_metrics
    assert signal.value > 0.98
    assert fused.value > 0.98
    assert noise.low <= result.probe_report.chance["majority"]
    assert abs(noise.value - 0.5) < 0.06
    assert not any(control.leaks for control in result.probe_report.controls)
    scores = result.scores
    assert (scores.prediction, scores.prediction_fused) == (None, None)
    assert scores.confidence[:, 0].mean() > 0.9
    assert scores.confidence[:, 1].mean() == pytest.approx(0.5, abs=0.05)  # the mean over labels, not their product
    assert scores.shapley is not None
    np.testing.assert_allclose(scores.shapley[:, 0].mean(), 1.25, atol=0.1)  # (V1 + V12 - V2) / 2 = (1 + 2 - 1/2) / 2
    np.testing.assert_allclose(scores.shapley[:, 1].mean(), 0.75, atol=0.1)


def spans(scores: ScoreTable, k: int) -> dict[str, tuple[float, float]]:
    """Return the range of each column by modality, as RANGES documents it."""
    m = len(scores.modalities)
    return {
        "confidence": (0, 1),
        "loss": (0, 27.7),
        "entropy": (0, float(np.log(k)) + 1e-6),
        "margin": (0, 1),
        "training_confidence": (0, 1),
        "training_variability": (0, 0.5),
        "shapley": ((1 - m) / 2, (1 + m) / 2),
        "discrepancy_sd": (0, 1.42),
        "confidence_fused": (0, 1),
        "loss_fused": (0, 27.7),
        "similarity": (0, 1),
        "balance": (-1, 1),
        "p_balanced": (0, 1),
    }


@pytest.mark.parametrize("names", [THREE[:2], THREE])
def test_every_score_is_in_its_range(planted: Planted, tmp_path: Path, names: tuple[str, ...]) -> None:
    columns = rows_of(planted(modalities=names))
    if len(names) > 2:
        columns = holed(columns)
    scores = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache", probe=WHOLE).scores
    for name, (low, high) in spans(scores, 3).items():
        values = getattr(scores, name)
        assert low <= np.nanmin(values) <= np.nanmax(values) <= high, name
        assert np.nanmin(values) < np.nanmax(values), name
    assert scores.shapley is not None
    if len(names) == 2:  # the sum is 2 where the joint probe is right, else 0
        total = scores.shapley.sum(axis=1)
        np.testing.assert_allclose(total * (total - 2), 0, atol=1e-5)
        assert {0, 2} == set(np.round(total).tolist())


@pytest.mark.slow  # its quicker twin is the test of planted clarity
def test_discrepancy_is_recovered_where_the_posterior_is_known(tmp_path: Path) -> None:
    """The true posterior is p(label | x) of the mixture that each modality is drawn from."""
    rng = np.random.default_rng(7)
    label = np.arange(4_000) % 3
    columns: dict[str, list[Any]] = {"id": [f"s{row:04d}" for row in range(4_000)], "label": label.tolist()}
    truth = []
    for name, spread in (("a", 1.5), ("b", 2.0)):
        means = spread * np.eye(3, 8)
        x = means[label] + rng.standard_normal((4_000, 8))
        posterior = softmax(x @ means.T - (means**2).sum(axis=1) / 2, axis=1)
        truth.append(posterior[np.arange(4_000), label])
        columns[name] = x.tolist()
    probe = ProbeConfig(repeats=1, joint=False, control=False)
    scores = audit(rewrite(tmp_path / "d.parquet", columns), tmp_path / "cache", probe=probe).scores
    assert spearmanr(scores.discrepancy(), truth[0] - truth[1]).statistic > 0.95
    np.testing.assert_allclose(scores.confidence.mean(axis=0), np.mean(truth, axis=1), atol=0.02)


def test_duplicates_inflate_confidence(tmp_path: Path) -> None:
    """Noise of 120 samples and 80 features, each sample twice: with duplicates kept, scores are partly in sample."""
    rng = np.random.default_rng(0)
    features = {name: rng.standard_normal((120, 80)) for name in ("a", "b")}
    columns: dict[str, list[Any]] = {
        "id": [f"s{row:03d}" for row in range(240)],
        "label": [row % 120 % 2 for row in range(240)],
        **{name: [*matrix.tolist(), *matrix.tolist()] for name, matrix in features.items()},
    }
    data, weak = rewrite(tmp_path / "d.parquet", columns), replace(QUICK, l2_penalties=(1e-4,), folds=5)
    out_of_fold = audit(data, tmp_path / "cache", probe=weak)
    by_heart = audit(data, tmp_path / "cache", probe=weak, keep_duplicates=True)
    assert [matrix.reason for matrix in out_of_fold.quarantined] == [Reason.DUPLICATE] * 120
    assert (len(out_of_fold.scores), len(by_heart.scores)) == (120, 240)
    assert out_of_fold.scores.confidence.mean() == pytest.approx(0.5, abs=0.05)
    assert by_heart.scores.confidence.mean() > 0.62  # the fifth whose twin is in the same fold lowers the temperature
    assert by_heart.scores.prediction is not None
    assert (by_heart.scores.prediction == by_heart.scores.label[:, None]).mean() > 0.8
