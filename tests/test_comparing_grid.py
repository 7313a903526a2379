"""Grids of comparisons: what is tried for each method, and a choice that test labels have no part in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from manifests import make_manifest
from training import QUICK, make_examples

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.workers import no_progress
from mmaudit.cli.comparison import cells as cells_module
from mmaudit.cli.comparison.cells import Cell, CellResult, LoadedManifests, Loading
from mmaudit.cli.comparison.grid import (
    TUNING_SEED,
    Search,
    Setting,
    Tuning,
    check_grid,
    choose,
    combinations,
    design_tuning,
    search_grid,
    setting_text,
)
from mmaudit.cli.comparison.plan import Design, Grid, Plan, method_config, parse_grid, read_plan
from mmaudit.cli.comparison.schedule import Schedule, Shard
from mmaudit.cli.config import RunConfig, load_settings
from mmaudit.cli.provenance import SourceOptions
from mmaudit.cli.run import Run
from mmaudit.cli.training_source import ManifestSource
from mmaudit.train.comparison.cells import MethodSpec, parse_method
from mmaudit.train.examples import Examples

GRID = parse_grid(["optim.lr=1e-5,1e-2,3e-2"])
OWN = ("a", "joint: optim.lr=0.5")


def load(examples: Examples, folder: Path) -> Loading:
    """Return what loads these examples as the manifest a."""
    path, options = folder / "a.parquet", SourceOptions()
    source = ManifestSource(path=path, manifest=make_manifest(), run_dir=Run(folder), options=options)
    loading = Loading(run=folder, manifests=(path,), options=options, config=RunConfig(), num_workers=0)
    cells_module._loaded[loading] = LoadedManifests(
        examples={"a": examples},
        sources={"a": source},
        between="audio:visual",
        subsets={"all": np.ones(len(examples.rows("test")), dtype=bool)},
        test_ids=examples.ids(examples.rows("test")),
        group=None,
        saw_test_labels=(),
    )
    return loading


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    """Forget the loaded examples after a test."""
    yield
    cells_module.clear_loaded()


def config_of(text: str) -> tuple[RunConfig, tuple[str, ...]]:
    base = RunConfig(finetune=QUICK.finetune, optim=QUICK.optim, order=QUICK.order)
    config, own = method_config(parse_method(text), base, (), None)
    return config, tuple(own)


def design_of(*methods: str) -> Design:
    """Return a design of methods on a, two seeds each, and audio alone as a control of the first."""
    specs = [*map(parse_method, methods), MethodSpec(name="audio alone", only="audio")]
    cells = [
        Cell(
            manifest="a",
            method=spec,
            seed=seed,
            config=config_of("joint" if spec.only else spec.name)[0],
            budget=120,
            is_first=seed == 0,
        )
        for seed in (0, 1)
        for spec in specs
    ]
    conditions = frozenset(cell.condition for cell in cells)
    return Design(cells=tuple(cells), controls={("a", "audio alone"): ("a", methods[0])}, tuned=conditions)


def schedule_of(loading: Loading, folder: Path) -> Schedule:
    return Schedule(folder=folder / "compared", loading=loading, device="cpu", jobs=1, progress=no_progress)


def search(examples: Examples, folder: Path, *methods: str, grid: Grid = GRID, shard: Shard | None = None) -> Search:
    schedule, design = schedule_of(load(examples, folder), folder), design_of(*methods)
    return search_grid(design, grid, {name: config_of(name)[1] for name in methods}, schedule, shard)


def test_choice_is_the_best_on_validation_and_the_same_with_other_test_labels(tmp_path: Path) -> None:
    examples = make_examples()
    label, test = examples.label.copy(), examples.rows("test")
    label[test] = (label[test] + 1) % 4
    tables = []
    for name, entry in (("first", examples), ("second", replace(examples, label=label))):
        chosen = search(entry, tmp_path / name, "joint").chosen
        tables.append(pd.read_parquet(tmp_path / name / "compared" / "grid.parquet"))
        best = tables[-1][tables[-1]["method"] == "joint"].sort_values("validation_accuracy").iloc[-1]
        assert best["chosen"]
        assert setting_text(chosen["a", "joint"]) == best["setting"] != "optim.lr=1e-05"
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0]["validation_accuracy"].nunique() > 1
    assert not list(tmp_path.rglob("predictions.parquet"))


def test_every_method_has_the_same_budget_unless_its_text_sets_the_key(tmp_path: Path) -> None:
    loading = load(make_examples(), tmp_path)
    own_keys = {name: config_of(name)[1] for name in ("sum", OWN[1])}
    tuning = design_tuning(design_of("sum", OWN[1]), GRID, own_keys, cells_module.load_manifests(loading))
    assert {condition: len(cells) for condition, cells in tuning.cells.items()} == {
        ("a", "sum"): 3,
        OWN: 1,
        ("a", "audio alone"): 3,
    }
    cells = [cell for by_setting in tuning.cells.values() for cell in by_setting.values()]
    assert {(cell.seed, cell.budget) for cell in cells} == {(TUNING_SEED, 120)}
    assert len({cell.folder(tmp_path) for cell in cells}) == 7
    assert tuning.warnings == (
        f"the grid of {OWN[1]} is smaller, optim.lr is set by its text: fewer settings were tried",
    )


def test_key_without_effect_is_left_out_of_a_methods_grid(tmp_path: Path) -> None:
    loaded = cells_module.load_manifests(load(make_examples(), tmp_path))
    design = design_of("joint", "ogm")
    tuning = design_tuning(design, parse_grid(["balancing.ogm.alpha=0.2,0.5"]), {}, loaded)
    assert [len(tuning.cells["a", name]) for name in ("joint", "ogm", "audio alone")] == [1, 2, 1]
    assert "the grid of joint is smaller, balancing.ogm.alpha has no effect" in tuning.warnings[0]
    with pytest.raises(ConfigError, match=r"--grid optim\.momentum has no effect on any method"):
        design_tuning(design, parse_grid(["optim.momentum=0.5,0.9"]), {}, loaded)
    grid = parse_grid(["optim.momentum=0.5,0.9", "optim.optimizer=sgd,adamw"])
    assert len(design_tuning(design, grid, {}, loaded).cells["a", "joint"]) == 4


def test_data_without_validation_samples_are_refused(tmp_path: Path) -> None:
    examples = make_examples()
    split = np.where(examples.split == "validation", "train", examples.split)
    with pytest.raises(ConfigError, match="--grid chooses on validation samples, and a has none"):
        search(replace(examples, split=split), tmp_path, "joint")


def results_of(values: dict[float, tuple[float, float] | None]) -> dict[Setting, CellResult]:
    return {
        (("optim.lr", lr),): CellResult(
            about={"validation": {} if pair is None else dict(zip(("accuracy", "loss"), pair, strict=True))},
            correct=None,
            without={},
            folder=Path(),
        )
        for lr, pair in values.items()
    }


@pytest.mark.parametrize(
    ("values", "expected", "warning"),
    [
        ({0.1: (0.5, 1.0), 0.2: (0.6, 2.0), 0.3: None}, 0.2, None),
        ({0.1: (0.5, 1.0), 0.2: (0.5, 0.9), 0.3: (0.4, 0.1)}, 0.2, None),
        ({0.1: (0.4, 1.0), 0.2: (0.5, 1.0), 0.3: (0.5, 1.0)}, 0.2, None),
        ({0.1: (0.4, 1.0), 0.2: (0.5, 1.0), 0.3: (0.6, 1.0)}, 0.3, "optim.lr was chosen at the edge .*joint on a"),
        ({0.2: None, 0.1: None, 0.3: None}, 0.2, "joint on a diverged with every setting"),
    ],
)
def test_best_accuracy_then_loss_then_the_first(
    values: dict[float, tuple[float, float] | None], expected: float, warning: str | None
) -> None:
    results = {("a", "joint"): results_of(values)}
    cell = design_of("joint").cells[0]
    tuning = Tuning(cells={condition: dict.fromkeys(tried, cell) for condition, tried in results.items()}, warnings=())
    chosen, warnings = choose(tuning, results)
    assert chosen == {("a", "joint"): (("optim.lr", expected),)}
    assert len(warnings) == (warning is not None)
    assert all(re.match(warning or "", text) for text in warnings)


def test_shards_train_all_settings_of_a_condition_and_the_last_one_writes_the_choice(tmp_path: Path) -> None:
    examples = make_examples()
    first = search(examples, tmp_path, "joint", "sum", shard=Shard(number=1, count=2))
    assert first.own == {*first.chosen}
    assert not (tmp_path / "compared" / "grid.parquet").exists()
    second = search(examples, tmp_path, "joint", "sum", shard=Shard(number=2, count=2))
    assert second.own.isdisjoint(first.own)
    assert len(second.chosen) == 3
    whole = search(examples, tmp_path / "whole", "joint", "sum")
    assert whole.chosen == second.chosen
    files = [folder / "compared" / "grid.parquet" for folder in (tmp_path, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_controls_take_the_choice_of_what_they_control(tmp_path: Path) -> None:
    loading = load(make_examples(), tmp_path)
    design = design_of("joint")
    shuffled = replace(design.cells[0], method=MethodSpec(name="shuffled labels", shuffled=True))
    design = replace(
        design,
        cells=(*design.cells, shuffled),
        controls={**design.controls, shuffled.condition: ("a", "joint")},
    )
    chosen = {("a", "joint"): (("optim.lr", 0.5),), ("a", "audio alone"): (("optim.lr", 0.25),)}
    applied = Search(chosen=chosen, own=frozenset(chosen), warnings=()).apply(design, schedule_of(loading, tmp_path))
    assert {(cell.method.name, cell.config.optim.lr) for cell in applied} == {
        ("joint", 0.5),
        ("audio alone", 0.25),
        ("shuffled labels", 0.5),
    }


def test_combinations_are_a_product() -> None:
    grid = parse_grid(["optim.lr=0.1,0.2", "optim.optimizer=sgd,adam"])
    texts = [setting_text(setting) for setting in combinations(grid)]
    assert texts[:2] == ["optim.lr=0.1 optim.optimizer=sgd", "optim.lr=0.1 optim.optimizer=adam"]
    assert len(texts) == 4


def plan_of(*grid: str, **options: Any) -> Plan:
    given: dict[str, Any] = {"manifests": ["a"], "methods": ["joint"], "seeds": 2, "name": None, "controls": True}
    return read_plan(None, **{**given, "grid": grid, **options})


@pytest.mark.parametrize(
    ("plan", "settings", "words"),
    [
        (plan_of("optim.lrr=1,2"), {}, r"no config key optim\.lrr; did you mean optim\.lr"),
        (plan_of("balancing.ogmm.alpha=1,2"), {}, r"no config key balancing\.ogmm; did you mean"),
        (plan_of("optim.lr=0.1,fast"), {}, r"optim\.lr"),
        (plan_of("optim.lr=-1,1"), {}, r"optim\.lr is -1"),
        (plan_of("optim.lr=0.1,0.2"), {"optim.lr": 0.3}, r"--grid optim\.lr and optim\.lr \(--set\): pass one"),
        (plan_of("optim.lr=0.1,0.2", seeds=1001), {}, "--seeds 1001: at most 1000 with --grid"),
    ],
)
def test_wrong_grids_are_refused_before_data_are_read(plan: Plan, settings: dict[str, Any], words: str) -> None:
    given = load_settings(None, settings)[1]
    with pytest.raises(ConfigError, match=words):
        check_grid(plan, given, {"joint": method_config(parse_method("joint"), None, settings, None)})
