"""Tests of the report: a self-contained page whose numbers match the files of the run."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from PIL import Image
from runs import run_record
from scipy.stats import kstest

from mmaudit.audit.errors import Quarantined, Reason, RunError, quarantine_table
from mmaudit.audit.metrics import cross_entropy, discrepancy
from mmaudit.audit.probes.probe_set import Calibration
from mmaudit.audit.scores.gap_checks import fit_by_class
from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture
from mmaudit.audit.scores.probe_report import Control, Gain, ModalityMetric, ProbeReport
from mmaudit.audit.scores.table import ScoreTable, write_scores
from mmaudit.audit.storage import read_json, write_json, write_parquet, write_text
from mmaudit.cli.report.page import chance_levels, report_numbers, write_report
from mmaudit.cli.report.verdict import breakable, breakable_sentence
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.rebalance.balanced import CURVE_TOLERANCES, BalancedConfig
from mmaudit.rebalance.manifest import balance_path, dropped_path, read_dropped, read_manifest
from mmaudit.rebalance.recipe import Recipe, make_split
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.train.evaluate import evaluate, measure_contribution, subsets

EVIL = "<script>alert(1)</script>\"'&$x^2$ {{ 7 * 7 }}"


def planted(
    *,
    num_samples: int = 120,
    num_classes: int = 3,
    modalities: tuple[str, ...] = ("audio", "visual"),
    label: Callable[[int], str] = "class-{}".format,
    groups: int | None = None,
    seed: int = 0,
) -> ScoreTable:
    """Return scores with uniform confidences; the class of a sample is its index modulo the number of classes."""
    rng = np.random.default_rng(seed)
    codes = (np.arange(num_samples) % num_classes).astype(np.int32)
    confidence = rng.random((num_samples, len(modalities)), dtype=np.float32)
    names = [f"s{row:05d}" for row in range(num_samples)]
    return ScoreTable(
        sample_id=np.array(names, dtype=object),
        label=codes,
        label_name=np.array([label(int(code)) for code in codes], dtype=object),
        modalities=modalities,
        confidence=confidence,
        split=np.array(["test" if row % 5 == 0 else "train" for row in range(num_samples)], dtype=object),
        group=None if groups is None else np.array([f"g{row % groups}" for row in range(num_samples)], dtype=object),
        fold=(np.arange(num_samples) % 5).astype(np.int16),
        prediction=np.where(confidence > 0.5, codes[:, None], (codes[:, None] + 1) % num_classes).astype(np.int32),
        loss=cross_entropy(confidence),
        balance=rng.uniform(-1, 1, num_samples).astype(np.float32),
        paths=pa.table({"audio_path": [f"audio/{name}.wav" for name in names]}),
    )


def probe_report(names: tuple[str, ...], *, leaking: str | None = None) -> ProbeReport:
    """Return a probe report in which every probe has 0.5, and the control of `leaking` is above chance."""
    calibration = Calibration(num_rows=90, temperature=1.3, ece_before=0.12, ece_after=0.034, ece_floor=0.02)
    probe_metrics = [
        ModalityMetric(name=name, value=0.5, low=0.4, high=0.6, loss=1.0, beats_prior=True, calibration=calibration)
        for name in (*names, "fused", "joint")
    ]
    gains = [Gain(name=name, gain=0.1, low=0.05, high=0.15) for name in names]
    controls = [
        Control(name=name, num_rows=90, value=0.45 if name == leaking else 0.3, low=low, high=0.5, majority=0.33)
        for name in names
        for low in [0.4 if name == leaking else 0.2]
    ]
    return ProbeReport(
        metric="accuracy",
        chance={"uniform": 0.25, "majority": 0.3},
        probe_metrics=tuple(probe_metrics),
        gain_over_best=gains[0],
        gains=tuple(gains),
        controls=tuple(controls),
    )


def run_of(
    folder: Path, scores: ScoreTable, *, quarantined: tuple[Quarantined, ...] = (), source: str = "data.parquet"
) -> Run:
    """Write the files of `mmaudit score` for these scores."""
    run = Run(folder)
    fits = slice(None) if scores.split is None else scores.split != "test"
    mixture = fit_mixture(scores.gap[fits], config=MixtureConfig(), seed=0)
    check = fit_by_class(scores.gap[fits], scores.label[fits], config=MixtureConfig(), seed=0)
    write_scores(scores, run.scores_file)
    write_parquet(quarantine_table(quarantined), run.quarantine_file, provenance={})
    write_json(dict(mixture.to_json()), run.mixture_file)
    out = len({row.sample_id for row in quarantined})
    run.write_record(
        run_record(
            source=source,
            config={"probe": {"repeats": 1, "learn_from": "all"}},
            modalities=[
                {"name": name, "kind": "features", "column": name, "length": 4, "preprocessing": ""}
                for name in scores.modalities
            ],
            columns={"group": None if scores.group is None else "speaker"},
            counts={"input": len(scores) + out, "scored": len(scores), "quarantined": out},
            num_classes=len(set(scores.label.tolist())),
            num_groups=None if scores.group is None else len(set(scores.group)),
            probe_report=probe_report(scores.modalities).to_json(),
            class_check=check.to_json(),
            seconds={"probe": 1.0},
        )
    )
    return run


def split(run: Run, config: BalancedConfig | None = None, *, name: str | None = None) -> None:
    """Write a balanced manifest and one by a threshold of the discrepancy."""
    first = run.scores().modalities[0]
    write_manifest(run, Recipe(balanced=config or BalancedConfig(bins=10)), name=name)
    write_manifest(run, Recipe(dominated=f"{first}:0.2"))


def write_manifest(run: Run, recipe: Recipe, *, name: str | None = None, scores: Path | None = None) -> Path:
    """Write one manifest by a recipe."""
    shards = open_scores(scores or run.scores_file, seed=0)
    split = make_split(shards, recipe, run.manifest, scratch=run.folder, name=name)
    assert split.path is not None
    return split.path


def manifest_of(run: Run, name: str) -> dict[str, Any]:
    """Return the numbers of a manifest in report.json."""
    return next(row for row in report_numbers(run)["manifests"] if row["name"] == name)


def finetune(run: Run, name: str = "balanced-concat") -> None:
    """Write the files of a fine-tuning, with metrics of random probabilities and a diverged loss."""
    scores, rng = run.scores(), np.random.default_rng(1)
    first, second = scores.modalities[:2]
    probabilities = {
        branch: rng.dirichlet(np.ones(3), len(scores)).astype(np.float32) for branch in (first, second, "fused")
    }
    members = subsets(scores.discrepancy(), first=first, second=second) | {"in-manifest": np.zeros(len(scores), bool)}
    history = [{"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 2 / epoch} for epoch in (1, 2, 3)]
    history.append({"epoch": 4, "train_loss": float("nan"), "validation_loss": float("inf")})
    write_text("".join(json.dumps(line) + "\n" for line in history), run.finetune(name) / "history.jsonl")
    metrics = {
        "manifest": "balanced",
        "manifest_digest": "of another",
        "test_labels_in_scores": True,
        "config": {"seed": 0, "finetune": {"fusion": "concat", "sampling": "uniform"}},
        "counts": {"train": 40, "validation": 5, "test": len(scores)},
        "best_epoch": 2,
        "chance": {"majority": 0.34, "uniform": 0.33},
        "seconds": 1.5,
        "test": evaluate(probabilities, scores.label, members),
        "contribution": contribution_of(first, second, n=len(scores)),
    }
    write_json(metrics, run.finetune(name) / "metrics.json")


def contribution_of(first: str, second: str, *, n: int) -> dict[str, Any]:
    """Return the contribution of two modalities: correct on 4/5 of the samples together, each alone on one half."""
    index = np.arange(n)
    alone = np.stack([index % 2 == 0, index % 2 == 1], axis=1)
    is_correct = {frozenset[int](): index < 0, frozenset({0}): alone[:, 0], frozenset({1}): alone[:, 1]}
    return measure_contribution({**is_correct, frozenset({0, 1}): index % 5 > 0}, alone, (first, second))


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def words(path: Path) -> str:
    return re.sub(r"\s+", " ", Page(path).text)


@pytest.fixture
def full(tmp_path: Path) -> Run:
    """A writable run with everything that a report can show."""
    return full_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with its report; read-only."""
    run = full_run(tmp_path_factory.mktemp("reported"))
    assert write_report(run) == run.report_file
    return run


def blank() -> bytes:
    """Return a blank figure as PNG."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace figures by blank ones, for tests of the page's text."""

    def draw(numbers: dict[str, Any]) -> dict[str, bytes]:
        manifests = [f"manifest-{row['name']}" for row in numbers["manifests"] if row["balance"]]
        return dict.fromkeys(("discrepancy", "classes", "gap", "maps", *manifests), blank())

    monkeypatch.setattr("mmaudit.cli.report.figures.draw", draw)


def full_run(folder: Path) -> Run:
    lost = Quarantined(sample_id="lost", modality="audio", reason=Reason.MISSING, detail="no file a/b.wav")
    run = run_of(folder / "run", planted(groups=12), quarantined=(lost,))
    split(run)
    finetune(run)
    write_json({"spearman": 0.9, "interval": [0.88, 0.92], "right_signs": 0.95, "num_samples": 120}, run.recovery_file)
    return run


def test_page_loads_no_external_resource(reported: Run) -> None:
    page = Page(reported.report_file)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a", "base", "form"}
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(list(reported.figures.glob("*.png"))) == 7
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "href"]
    assert "url(" not in reported.report_file.read_text()
    assert "@import" not in reported.report_file.read_text()


@pytest.mark.usefixtures("blank_figures")
def test_page_after_score_has_no_later_sections(tmp_path: Path) -> None:
    run = run_of(tmp_path, planted())
    text = words(write_report(run))
    assert "Modality discrepancy" in text
    assert "Every sample could be scored." in text
    assert "Fine-tunings" not in text
    assert "Manifests" not in text
    assert not (run.figures / "manifest-balanced.png").exists()


def test_page_shows_all_sections(reported: Run) -> None:
    text = words(reported.report_file)
    for part in ("Manifests", "bin-full", "Fine-tunings", "Recovery", "0.900 [0.880, 0.920]", "no file a/b.wav"):
        assert part in text
    assert "were fitted on test labels too" in text
    assert "12 groups (speaker)" in text


def test_report_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        write_report(Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("drawn_figures")
def test_same_run_gives_same_bytes(full: Run) -> None:
    def written() -> dict[str, bytes]:
        write_report(full)
        files = [full.report_file, full.report_file.with_suffix(".json"), *full.figures.iterdir()]
        return {path.name: path.read_bytes() for path in files}

    once = written()
    record = full.record()
    full.write_record({**record, "seconds": {"probe": 99.0}})  # seconds must not affect the report
    assert written() == once


@pytest.mark.usefixtures("blank_figures")
def test_stale_figures_are_removed(full: Run) -> None:
    full.figures.mkdir()
    (full.figures / "manifest-gone.png").write_bytes(b"")
    write_report(full)
    names = {path.stem for path in full.figures.iterdir()}
    assert names == {"classes", "discrepancy", "gap", "maps", "manifest-balanced", "manifest-audio-dominated-0.2"}


def test_histograms_match_the_score_table(reported: Run) -> None:
    numbers = json.loads(reported.report_file.with_suffix(".json").read_text())
    scores = reported.scores()
    signed, gap = scores.confidence[:, 0] - scores.confidence[:, 1], np.ptp(scores.confidence, axis=1)
    pair = numbers["discrepancy"][0]
    assert pair["counts"] == np.histogram(signed.astype(float), bins=40, range=(-1, 1))[0].tolist()
    assert pair["share_ahead"]["n"] == int((signed > 0.2).sum())
    assert pair["share_behind"]["n"] == int((signed < -0.2).sum())
    assert pair["mean"]["mean"] == pytest.approx(signed.mean(), abs=1e-6)
    assert numbers["gap"]["counts"] == np.histogram(gap.astype(float), bins=50, range=(0, 1))[0].tolist()
    assert sum(numbers["gap"]["fitted"]) == int((scores.split != "test").sum()) if scores.split is not None else False
    assert sum(map(sum, numbers["maps"][0]["counts"])) == len(scores)
    assert sum(sum(row["counts"]) for row in numbers["classes"]["rows"]) == len(scores)
    assert sum(row["n"] for row in numbers["agreement"]) == len(scores)


def test_map_has_rows_of_the_second_modality(tmp_path: Path) -> None:
    scores = planted(num_samples=50)
    scores.confidence[:] = [0.95, 0.05]
    counts = np.array(report_numbers(run_of(tmp_path, scores))["maps"][0]["counts"])
    assert counts[0, -1] == 50  # y, the second, is low; x, the first, is high


@pytest.mark.parametrize("name", ["balanced", "audio-dominated-0.2"])
def test_manifest_numbers_match_its_files(reported: Run, name: str) -> None:
    manifest = manifest_of(reported, name)
    balance, path = manifest["balance"], reported.manifest(name)
    opened = read_manifest(path)
    dropped = read_dropped(path, opened)
    assert dropped is not None
    after, removed = opened.numbers("discrepancy"), np.array(dropped["discrepancy"], dtype=float)
    before, edges = np.concatenate([after, removed]), balance["edges"]
    assert balance["after"] == np.histogram(after, bins=edges)[0].tolist()
    assert balance["before"] == np.histogram(before, bins=edges)[0].tolist()
    filled = np.array(balance["before"]) > 0
    distance = np.abs(np.array(balance["after"])[filled] / len(after) - 1 / filled.sum()).sum() / 2
    assert balance["distance_after"] == pytest.approx(distance)
    for when, values in (("before", before), ("after", after)):
        assert balance[f"ks_{when}"] == pytest.approx(kstest(values, "uniform", (-1, 2)).statistic, abs=0.002)
        assert balance[f"positive_{when}"] == pytest.approx((values > 0).mean())
    assert (manifest["kept"], manifest["dropped"]) == (len(after), len(removed))
    assert manifest["kept_gap"] == pytest.approx(opened.numbers("gap").mean())
    assert [row["n"] for row in manifest["reasons"]] == [len(removed)]
    assert manifest["reasons"][0]["gap"] == pytest.approx(np.mean(dropped["gap"]))
    assert {row["split"]: row["kept"] for row in balance["distances"]} == manifest["splits"]


def test_larger_tolerance_is_read_from_the_curve(reported: Run) -> None:
    manifest = manifest_of(reported, "balanced")
    curve = {point["tolerance"]: point["size"] for point in manifest["balance"]["curve"]}
    assert tuple(curve) == CURVE_TOLERANCES
    assert curve[0.05] == manifest["kept"]
    next_point = manifest["balance"]["next_point"]
    assert next_point["size"] == min(size for size in curve.values() if size > manifest["kept"])
    tolerance, size = next_point["tolerance"], next_point["size"]
    sentence = f"A tolerance of {tolerance:g} would keep {size} samples in place of {manifest['kept']}"
    assert sentence in words(reported.report_file)


def test_subset_has_histograms_but_no_uniformity_target(reported: Run) -> None:
    balance = manifest_of(reported, "audio-dominated-0.2")["balance"]
    assert len(balance["before"]) == len(balance["after"]) == 20
    assert (balance["target"], balance["curve"], balance["classes"], balance["shortages"]) == (None, [], None, [])
    assert (reported.figures / "manifest-audio-dominated-0.2.png").exists()


@pytest.mark.usefixtures("blank_figures")
def test_missing_or_foreign_balance_json_is_reported(full: Run) -> None:
    expected = manifest_of(full, "balanced")
    own_file, other_file = (balance_path(full.manifest(name)) for name in ("balanced", "audio-dominated-0.2"))
    own_file.unlink()
    assert "not available for balanced: NAME.balance.json not found." in words(write_report(full))
    own_file.write_bytes(other_file.read_bytes())
    assert "not available for balanced: NAME.balance.json belongs to another manifest" in words(write_report(full))
    manifest = manifest_of(full, "balanced")
    assert (manifest["balance_problem"], manifest["balance"]) == ("another", None)
    assert {
        **manifest,
        "balance_problem": None,
        "balance": expected["balance"],
    } == expected  # the counts come from the manifest's own files
    other_file.unlink()
    own_file.unlink()
    text = words(write_report(full))
    assert "not available for audio-dominated-0.2, balanced: NAME.balance.json not found." in text
    dropped_path(full.manifest("balanced")).unlink()
    assert manifest_of(full, "balanced")["dropped"] is None
    assert "unknown" in words(write_report(full))
    assert not list(full.figures.glob("manifest-*.png"))


def test_dropped_rows_of_another_manifest_are_not_counted(full: Run) -> None:
    own_file, other_file = (dropped_path(full.manifest(name)) for name in ("balanced", "audio-dominated-0.2"))
    own_file.write_bytes(other_file.read_bytes())
    balance_path(full.manifest("balanced")).unlink()
    manifest = manifest_of(full, "balanced")
    assert (manifest["dropped"], manifest["reasons"]) == (None, [])


@pytest.mark.usefixtures("drawn_figures")
def test_report_without_test_samples(full: Run) -> None:
    metrics = read_json(full.finetune("balanced-concat") / "metrics.json", error=RunError)
    write_json({**metrics, "test": {"all": {"n": 0}}}, full.finetune("balanced-concat") / "metrics.json")
    assert "Fine-tunings" in words(write_report(full))


def test_contribution_is_shown_only_if_measured(full: Run) -> None:
    sentence = "is reached without any modality; the rest is divided by Shapley value"
    assert sentence in words(write_report(full))
    # Two halves: v = 0, 1/2, 1/2, 4/5 of the samples, so that each modality's share is 2/5, give or take a row.
    assert re.search(r"\+0\.(39|40|41)\d* \[", words(full.report_file))
    file = full.finetune("balanced-concat") / "metrics.json"
    metrics = read_json(file, error=RunError)
    write_json({key: value for key, value in metrics.items() if key != "contribution"}, file)
    assert sentence not in words(write_report(full))


def test_finetune_is_current_if_its_manifest_is_unchanged(full: Run) -> None:
    file = full.finetune("balanced-concat") / "metrics.json"
    metrics = read_json(file, error=RunError)
    path = full.manifest("balanced")
    assert not report_numbers(full)["finetunes"][0]["manifest_is_unchanged"]
    write_json({**metrics, "manifest_digest": read_manifest(path).digest()}, file)
    assert report_numbers(full)["finetunes"][0]["manifest_is_unchanged"]
    rows = pq.read_table(path)
    # Rewritten by another tool, without the recorded digest.
    pq.write_table(rows.replace_schema_metadata({b"mmaudit": b"{}"}), path)
    assert report_numbers(full)["finetunes"][0]["manifest_is_unchanged"]
    pq.write_table(rows.slice(1), path)  # keeps the recorded digest of the old rows
    assert not report_numbers(full)["finetunes"][0]["manifest_is_unchanged"]


@pytest.mark.usefixtures("blank_figures")
def test_shortages_and_empty_bins_are_shown(tmp_path: Path) -> None:
    scores = planted(num_samples=600)
    scores.confidence[:] = np.random.default_rng(0).random((600, 1)) < 0.5  # D = 0 ...
    is_positive = np.arange(600) < 300
    scores.confidence[is_positive] = [0.95, 0.1]  # ... or 0.85
    rare = np.flatnonzero(is_positive & (scores.label == 2))
    scores.confidence[rare[3:]] = [0.4, 0.4]
    run = run_of(tmp_path, replace(scores, split=None))
    split(run)
    shortage = manifest_of(run, "balanced")["balance"]["shortages"][0]
    assert (shortage["class"], shortage["bin"], shortage["has"]) == ("class-2", 9, 3)
    text = words(write_report(run))
    assert f"class class-2 has 3 samples in bin 9, [0.8, 1]; an even share is {shortage['even']:.0f}." in text
    assert "8 of 10 bins are empty before the split: [−1, 0), [0.2, 0.8)." in text
    assert "A tolerance holds for each split over its own bins" not in text


@pytest.mark.usefixtures("blank_figures")
def test_why_a_curve_is_farther_from_uniform_than_its_tolerances_is_explained(tmp_path: Path) -> None:
    scores = planted(num_samples=600)
    is_test = np.array(scores.split == "test")
    scores.confidence[is_test] = np.clip(scores.confidence[is_test], 0.3, 0.7)  # has bins near 0 only
    run = run_of(tmp_path, scores)
    split(run)
    curve = manifest_of(run, "balanced")["balance"]["curve"]
    assert curve[0]["distance"] > curve[0]["tolerance"] + 0.01
    assert "A tolerance holds for each split over its own bins" in words(write_report(run))


@pytest.mark.usefixtures("blank_figures")
def test_each_balancing_mode_is_described(tmp_path: Path) -> None:
    run = run_of(tmp_path, planted(num_samples=300))
    modes = {
        "grid": (
            BalancedConfig(grid=True, bins=3),
            "uniform over the grid of 3 × 3 bins of the confidences of audio",
        ),
        "weighted": (BalancedConfig(by="weight", bins=10), "The effective size of the weighted set (Kish) is"),
        "sized": (BalancedConfig(size=40, bins=5), "40 samples were requested"),
        "perclass": (BalancedConfig(per_class=True, bins=5), "for each class separately"),
    }
    for name, (config, _) in modes.items():
        write_manifest(run, Recipe(balanced=config), name=name)
    text = words(write_report(run))
    assert [name for name, (_, sentence) in modes.items() if sentence not in text] == []
    assert manifest_of(run, "weighted")["balance"]["effective_size"] < 300
    assert manifest_of(run, "sized")["balance"]["effective_size"] == 40


@pytest.mark.usefixtures("blank_figures")
def test_classes_without_kept_rows_come_first_without_distance(tmp_path: Path) -> None:
    run = run_of(tmp_path, replace(planted(num_samples=90, num_classes=5), split=None))
    write_manifest(run, Recipe(balanced=BalancedConfig(bins=4, size=3)))
    classes_kept = set(read_manifest(run.manifest("balanced")).strings("label_name"))
    classes = manifest_of(run, "balanced")["balance"]["classes"]
    num_lost = 5 - len(classes_kept)
    assert (classes["num_classes"], classes["num_without_rows"]) == (5, num_lost)
    assert {row["name"] for row in classes["least_uniform"][num_lost:]} == classes_kept
    assert [row["distance_after"] for row in classes["least_uniform"][:num_lost]] == [None] * num_lost
    distances = [row["distance_after"] for row in classes["least_uniform"][num_lost:]]
    assert distances == sorted(distances, reverse=True)
    changes = [row["distance_after"] - row["distance_before"] for row in classes["least_uniform"][num_lost:]]
    assert (classes["more_uniform"], classes["less_uniform"]) == (
        sum(x < 0 for x in changes),
        sum(x > 0 for x in changes),
    )
    assert f"{num_lost} have no samples left" in words(write_report(run))


def test_uniform_manifests_are_shown_first(full: Run) -> None:
    for number in range(9):
        write_manifest(full, Recipe(subset=f"random:{20 + number}"), name=f"a{number}")
    text = words(write_report(full))
    assert "8 of 11 manifests are shown in detail" in text
    assert len(list(full.figures.glob("manifest-*.png"))) == 8
    assert (full.figures / "manifest-balanced.png").exists()


def test_manifest_of_other_data_is_marked(full: Run) -> None:
    scores = replace(planted(), provenance={"fingerprint": full.record()["fingerprint"]})
    write_scores(scores, full.folder / "other.parquet")
    write_manifest(full, Recipe(subset="audio-preferred"), name="same", scores=full.folder / "other.parquet")
    of_this_run = {row["name"]: row["of_this_run"] for row in report_numbers(full)["manifests"]}
    assert of_this_run == {"audio-dominated-0.2": False, "balanced": False, "same": True}


@pytest.mark.usefixtures("blank_figures")
def test_finetune_on_other_data_is_marked_and_branches_have_the_order_of_the_run(full: Run) -> None:
    file = full.finetune("balanced-concat") / "metrics.json"
    metrics = read_json(file, error=RunError)
    numbers = report_numbers(full)["finetunes"][0]
    assert (numbers["branches"], numbers["of_this_run"]) == (["audio", "visual", "fused"], True)
    for subset in filter(lambda subset: subset["n"], metrics["test"].values()):
        subset["branches"] = {"zeta" if name == "audio" else name: row for name, row in subset["branches"].items()}
    write_json({**metrics, "made_from": {"scores": {"fingerprint": "other"}}}, file)
    numbers = report_numbers(full)["finetunes"][0]
    assert (numbers["branches"], numbers["of_this_run"]) == (["visual", "zeta", "fused"], False)
    assert "balanced (made from other data than this run)" in words(write_report(full))


@pytest.mark.usefixtures("blank_figures")
def test_huge_integers_in_history_are_drawn_or_omitted(full: Run) -> None:
    line = json.dumps({"epoch": 10**30, "train_loss": 10**400})
    write_text(f"{line}\n", full.finetune("balanced-concat") / "history.jsonl")
    (history,) = [row["history"] for row in report_numbers(full)["finetunes"] if row["name"] == "balanced-concat"]
    assert (history["epoch"], history["train_loss"]) == ([1e30], [None])
    write_report(full)


@pytest.mark.parametrize("key", ["epoch", "train_loss", "validation_loss", "validation_accuracy"])
def test_invalid_history_is_refused(full: Run, key: str) -> None:
    write_text(json.dumps({key: "1"}) + "\n", full.finetune("balanced-concat") / "history.jsonl")
    with pytest.raises(RunError, match=f"history.jsonl, line 1 cannot be read: {key} is .*; it must be a number"):
        write_report(full)


def test_sample_lists_are_sorted_with_ties_by_id(tmp_path: Path) -> None:
    scores = planted(num_samples=60)
    scores.confidence[:30] = [1.0, 0.0]
    lists = {row["side"]: row["rows"] for row in report_numbers(run_of(tmp_path, scores))["samples"]}
    assert [row["sample_id"] for row in lists["audio"]] == [f"s{row:05d}" for row in range(20)]
    assert lists["audio"][0]["paths"] == ["audio/s00000.wav"]
    values = [row["discrepancy"] for row in lists["visual"]]
    assert values == sorted(values)
    assert max(values) < 0


@pytest.mark.usefixtures("blank_figures")
def test_user_text_is_escaped(tmp_path: Path) -> None:
    bad = Quarantined(sample_id=EVIL, modality="audio", reason=Reason.CORRUPT, detail=EVIL)
    scores = planted(label=lambda code: f"{EVIL}{code}")
    scores.sample_id[0] = EVIL
    scores.confidence[0] = [1, 0]
    run = run_of(tmp_path, scores, quarantined=(bad,), source=f"/data/{EVIL}")
    split(run)
    page = Page(write_report(run))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") > 5
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.usefixtures("blank_figures")
def test_not_bimodal_gap_is_described_with_reasons(tmp_path: Path) -> None:
    text = words(write_report(run_of(tmp_path, planted(num_samples=300))))
    assert "The gap is not bimodal" in text
    assert "p of the dip" in text
    assert "a gap of at most 0.2" in text


@pytest.mark.usefixtures("blank_figures")
def test_bimodal_gap_is_described(tmp_path: Path) -> None:
    scores, rng = planted(num_samples=600), np.random.default_rng(0)
    near = rng.random(600) < 0.5
    scores.confidence[:, 0] = 0.97
    scores.confidence[:, 1] = np.where(near, 0.95, 0.25) + 0.01 * rng.standard_normal(600)
    run = run_of(tmp_path, scores)
    text = words(write_report(run))
    assert "The gap has two or more modes" in text
    assert "not bimodal" not in text
    assert 0.05 < report_numbers(run)["gap"]["border"] < 0.7


@pytest.mark.usefixtures("drawn_figures")
def test_constant_gap_draws_without_components(tmp_path: Path) -> None:
    scores = planted()
    scores.confidence[:] = 0.5
    text = words(write_report(run_of(tmp_path, scores)))
    assert "No mixture could be fitted: the gap is constant" in text
    assert "For these probes, on this sample: no clear lean between audio and visual" in text


@pytest.mark.usefixtures("drawn_figures")
def test_report_of_few_scored_samples(tmp_path: Path) -> None:
    lost = tuple(
        Quarantined(sample_id=f"q{row}", modality=name, reason=Reason.CORRUPT, detail="bad")
        for row in range(50)
        for name in ("audio", "visual")
    )
    run = run_of(tmp_path, planted(num_samples=4, num_classes=2), quarantined=lost)
    text = words(write_report(run))
    assert "50 of 54 samples could not be scored" in text
    assert "a mixture needs 10 samples, available 3" in text
    assert [row["count"] for row in report_numbers(run)["quarantine"]] == [50, 50]


def test_many_classes_are_cut_and_counted(tmp_path: Path) -> None:
    scores = planted(num_samples=3000, num_classes=300, label="a class of long name {}".format)
    scores.confidence[scores.label == 7] = [0.95, 0.05]
    scores.confidence[scores.label == 8] = [0.05, 0.95]
    run = run_of(tmp_path, scores)
    page = write_report(run)
    assert page.stat().st_size < 2_000_000
    assert "40 of 300 classes" in words(page)
    assert "260 are omitted" in words(page)
    rows = report_numbers(run)["classes"]["rows"]
    assert rows[0]["name"].endswith("name 7")
    assert rows[-1]["name"].endswith("name 8")


@pytest.mark.usefixtures("drawn_figures")
def test_report_of_three_modalities(tmp_path: Path) -> None:
    scores = planted(modalities=("audio", "visual", "text"), num_samples=400)
    scores.confidence[:, 2] = 1
    run = run_of(tmp_path, scores)
    split(run)
    numbers = report_numbers(run)
    expected = discrepancy(scores.confidence)
    assert [row["positive_side"] for row in numbers["discrepancy"]] == ["audio", "visual", "text"]
    assert [sum(row["counts"]) for row in numbers["discrepancy"]] == [400, 400, 400]
    assert numbers["share_without_leader"]["n"] == int((expected <= 0.2).all(axis=1).sum())
    assert len(numbers["maps"]) == 3
    page = words(write_report(run))
    assert "text stands out most often" in page
    assert "All 3 pairs are shown." in page


def test_groups_widen_intervals(tmp_path: Path) -> None:
    scores = planted(num_samples=200, groups=8)
    assert scores.group is not None
    # Confidence depends on the group only.
    scores.confidence[:] = np.where(scores.group == "g0", 0.9, 0.1)[:, None] * [
        1.0,
        0.5,
    ]
    alone = {**{name: getattr(scores, name) for name in ScoreTable.__slots__}, "group": None}
    wide = report_numbers(run_of(tmp_path / "a", scores))["discrepancy"][0]["share_ahead"]
    narrow = report_numbers(run_of(tmp_path / "b", ScoreTable(**alone)))["discrepancy"][0]["share_ahead"]
    assert wide["low"] < narrow["low"] < narrow["share"] == wide["share"] < narrow["high"] < wide["high"]


def test_numbers_do_not_depend_on_row_order(tmp_path: Path) -> None:
    scores = planted(num_samples=200, groups=10)
    order = np.random.default_rng(3).permutation(200)
    columns: dict[str, Any] = {}
    for name in ScoreTable.__slots__:
        value = getattr(scores, name)
        rows = value.take(order) if isinstance(value, pa.Table) else value
        columns[name] = rows[order] if isinstance(value, np.ndarray) else rows
    first, second = (
        json.dumps(report_numbers(run_of(tmp_path / name, table)), default=str)
        for name, table in (("a", scores), ("b", ScoreTable(**columns)))
    )
    numbers = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    assert numbers.sub("", first) == numbers.sub("", second)
    assert np.allclose(
        [float(x) for x in numbers.findall(first)], [float(x) for x in numbers.findall(second)], atol=1e-9
    )


def test_samples_without_a_modality_are_listed(tmp_path: Path) -> None:
    scores = planted(num_samples=60, modalities=("audio", "visual", "text"))
    holes = scores.confidence.copy()
    holes[::4, 0] = np.nan  # among them the most balanced sample
    balance = np.where(np.arange(60) == 4, 1.0, 0.0).astype(np.float32)
    page = write_report(run_of(tmp_path, replace(scores, confidence=holes, balance=balance, loss=None)))
    listed = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["samples"][-1]["rows"]
    assert listed[0]["sample_id"] == "s00004"
    assert listed[0]["confidence"][0] is None
    assert "missing" in words(page)


@pytest.mark.usefixtures("blank_figures")
def test_samples_without_the_discrepancy_are_counted(tmp_path: Path) -> None:
    scores = planted(num_samples=60, modalities=("audio", "visual", "text"))
    holes = scores.confidence.copy()
    holes[::4, 0] = np.nan
    run = run_of(tmp_path, replace(scores, confidence=holes, balance=None, loss=None))
    write_manifest(run, Recipe(balanced=BalancedConfig(bins=4), between="audio:visual"))
    manifest = manifest_of(run, "balanced")
    assert sum(manifest["balance"]["before"]) == 45
    assert next(row["n"] for row in manifest["reasons"] if row["name"] == "missing-modality") == 15
    assert "15 samples have no audio or no visual" in words(write_report(run))


def test_words_break_only_where_names_are_long() -> None:
    assert str(breakable("balanced")) == "balanced"
    assert str(breakable("<b>&")) == "&lt;b&gt;&amp;"
    long = {
        "a class of several words": "a class of several words",
        "audio/speaker_01/clip.wav": "audio/<wbr>speaker_<wbr>01/<wbr>clip.<wbr>wav",
        "audio-dominated-0.2": "audio-<wbr>dominated-<wbr>0.2",
        "x" * 60: "<wbr>".join(["x" * 24, "x" * 24, "x" * 12]),
    }
    for name, text in long.items():
        assert str(breakable(name)) == f'<span class="long">{text}</span>'
    assert breakable("-_/." * 9).striptags() == "-_/." * 9
    sentence = "The samples lean towards log_mel_spectrogram"
    assert str(breakable_sentence(sentence)) == "The samples lean towards log_<wbr>mel_<wbr>spectrogram"


def test_tables_and_figures_scroll_in_their_own_box_and_never_break_words(reported: Run) -> None:
    page = reported.report_file.read_text(encoding="utf-8")
    style = page[page.index("<style>") : page.index("</style>")]
    for rule in re.findall(r"[^{}]+\{[^{}]*\}", style):
        selector = rule.partition("{")[0]
        if re.search(r"\b(td|th|table)\b", selector):
            assert "overflow-wrap" not in rule
            assert "word-break" not in rule
    assert ".scroll { max-width: 100%; overflow-x: auto; }" in style
    for selector in ("p", "figcaption", "h1", "h3"):  # text that does not scroll: long names wrap
        assert re.search(rf"^{selector} \{{[^}}]*overflow-wrap: anywhere", style, flags=re.MULTILINE), selector
    assert page.count("<table") == page.count('<div class="scroll"><table') > 5
    assert page.count("<img") == page.count('<div class="scroll"><img') > 4


def test_both_levels_of_guessing_are_named(reported: Run) -> None:
    numbers = read_json(reported.report_file.with_suffix(".json"), error=RunError)
    assert numbers["chance"] == {"uniform": 0.25, "majority": 0.3}
    page = reported.report_file.read_text(encoding="utf-8")
    assert '<tr><td>uniform</td><td class="n">25.0</td>' in page
    assert '<tr><td>majority</td><td class="n">30.0</td>' in page
    assert "chance" not in re.sub(r"by chance", "", page[page.index("</style>") :])


@pytest.mark.parametrize(
    ("task", "levels"),
    [("classification", {"uniform": 0.25, "majority": 0.6}), ("multilabel", {"uniform": 0.5, "majority": 0.6})],
)
def test_guessing_of_each_task(task: str, levels: dict[str, float]) -> None:
    record = run_record(config={"data": {"task": task}}, num_classes=4)
    record["probe_report"]["chance"] = {"uniform": levels["uniform"], "majority": 0.6}
    assert chance_levels(record) == levels
    assert chance_levels(
        run_record(config={"data": {"task": "regression"}})
        | {"probe_report": {"chance": {"uniform": 0.0, "majority": 0.0}}}
    ) == {"mean": 0.0}


def test_a_weak_joint_probe_has_the_name_of_the_table(tmp_path: Path) -> None:
    run = run_of(tmp_path, planted(modalities=("audio", "visual", "text")))
    record = read_json(run.record_file, error=RunError)
    for probe in record["probe_report"]["probe_metrics"]:
        probe["beats_prior"] = probe["name"] not in ("joint", "text")
    run.write_record(record)
    weak = [text for text in report_numbers(run)["verdict"]["warnings"] if "not shown to be better" in text]
    assert [text.partition(" is not")[0] for text in weak] == [
        "The probe on text",
        "The joint probe, on the features of all modalities,",
    ]


def test_split_report_and_verify_need_no_torch(tmp_path: Path) -> None:
    """It takes 180 MB and seconds; checked in a separate process."""
    pq.write_table(gaussian_table(num_samples=200), tmp_path / "data.parquet")
    run = tmp_path / "run"
    score(tmp_path / "data.parquet", run=run, repeats=1, num_workers=0, progress=False)
    program = f"""
import sys
from mmaudit.cli.reporting import report
from mmaudit.cli.splitting import split
from mmaudit.cli.verifying import verify
split(balanced=True, run={str(run)!r})
report(run={str(run)!r})
assert verify("balanced", run={str(run)!r}).passed
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
