"""Steps of a study: its plan, and a whole study of a small made dataset, which a second call does not repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from typer.testing import CliRunner

import mmaudit
from mmaudit.audit.errors import ConfigError
from mmaudit.cli.main import app
from mmaudit.cli.study import steps
from mmaudit.cli.study.steps import Execution, StudyPlan, StudySet, default_methods
from mmaudit.cli.study.study import study_sets
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.comparison.cells import parse_method
from mmaudit.train.sampling import SAMPLERS

QUICK = {
    "finetune.epochs": 1,
    "finetune.hidden": 8,
    "probe.repeats": 1,
    "probe.kind": "linear",
    "split.tolerance": 0.5,
}


def test_default_methods_are_all_of_them_with_the_baseline_first() -> None:
    specs = [parse_method(text) for text in default_methods()]
    assert default_methods()[0] == "joint"
    assert {spec.balancing for spec in specs} == set(BALANCERS)
    assert {spec.sampling for spec in specs} == {None, *SAMPLERS} - {"uniform", "anti-curriculum"}


def test_plan_parses_methods_probes_and_settings() -> None:
    plan = StudyPlan.of(
        ["sum", "ogm-ge"], seeds=2, probes=["wide: probe.kind=mlp probe.hidden=256"], config=None, settings=()
    )
    assert plan.baseline == "sum"
    assert set(plan.probes) == {"wide"}
    assert set(plan.probes["wide"]) == {"probe.kind", "probe.hidden"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["joit"]}, "joint"),
        ({"seeds": 0}, "at least 1"),
        ({"probes": ["mlp"]}, "NAME: SECTION.KEY=VALUE"),
    ],
)
def test_plan_refuses_what_does_not_exist(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyPlan.of(**{"methods": ["joint"], "seeds": 1, "probes": (), "config": None, "settings": (), **changes})


def test_two_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pq.write_table(gaussian_table(num_samples=20), tmp_path / folder / "data.parquet")
    words = ["study", str(tmp_path / "a" / "data.parquet"), str(tmp_path / "b" / "data.parquet")]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--seeds", "1"])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_writes_its_page_and_a_second_call_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed of two methods on 240 samples, of which the planted discrepancy is made up."""
    pq.write_table(gaussian_table(num_samples=240), tmp_path / "data.parquet")
    ids = pq.read_table(tmp_path / "data.parquet")["id"].to_pylist()
    planted = np.random.default_rng(0).uniform(-1, 1, len(ids))
    pq.write_table(pa.table({"sample_id": ids, "discrepancy": planted}), tmp_path / "truth.parquet")
    data, truth = tmp_path / "data.parquet", tmp_path / "truth.parquet"
    entry = StudySet(name="made", data=data, settings={}, truth=truth, truth_text="Made up.")
    plan = StudyPlan.of(["joint", "ogm-ge"], seeds=1, probes=(), config=None, settings=QUICK)
    execution = Execution(jobs=1, seed=0, device="cpu", num_workers=0, progress=False)
    result = study_sets([entry], plan, tmp_path / "out", execution)
    numbers = result.numbers["sets"]["made"]
    assert [row["method"] for row in numbers["shuffled"]] == ["joint", "ogm-ge"]
    assert [row["method"] for row in numbers["networks"]] == ["joint", "ogm-ge"]
    assert [row["name"] for row in numbers["probes"]] == ["another seed", "mlp"]
    assert abs(numbers["truth"]["rank"]["value"]) < 0.3
    assert {"all", "balanced", "imbalanced"} <= set(numbers["manifests"])
    page = result.page.read_text(encoding="utf-8")
    assert "Made up." in page
    assert all((tmp_path / "out" / "study" / f"made-{kind}.svg").exists() for kind in ("methods", "agreement", "truth"))
    written = {path: path.read_bytes() for path in (tmp_path / "out").glob("study*") if path.is_file()}
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("cell.json")}
    assert len(cells) > 10

    monkeypatch.setattr(steps, "split", None)  # a subset that exists is not made again
    study_sets([entry], plan, tmp_path / "out", execution)
    assert {path: path.read_bytes() for path in written} == written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("cell.json")} == cells


@pytest.mark.slow
def test_the_command_studies_a_dataset(tmp_path: Path) -> None:
    pq.write_table(gaussian_table(num_samples=160), tmp_path / "data.parquet")
    words = [
        "study",
        str(tmp_path / "data.parquet"),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--num-workers",
        "0",
    ]
    words += ["--method", "joint", "--method", "sum", "--device", "cpu"]
    for key, value in QUICK.items():
        words += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert set(content["sets"]) == {"data"}
    assert Path(content["page"]).exists()
    assert mmaudit.diff(tmp_path / "out/data/run", tmp_path / "out/data/probes/mlp").to_dict()["both"] == 160


def test_settings_of_balancers_that_are_not_trained_are_left_out() -> None:
    settings = {"balancing.pmr.last_epoch": 3, "balancing.ogm.last_epoch": 3, "finetune.epochs": 2, "probe.folds": 3}
    plan = StudyPlan.of(["joint", "ogm-ge"], seeds=1, probes=(), config=None, settings=settings)
    used = steps._training_settings(plan, plan.methods)
    assert used == {"balancing.ogm.last_epoch": 3, "finetune.epochs": 2}
    assert steps._training_settings(plan, ["joint"]) == {"finetune.epochs": 2}
