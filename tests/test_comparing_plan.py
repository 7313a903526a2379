"""Designs of comparisons: plans in files, options that override them, and settings of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.cli.comparison.plan import Grid, Plan, method_config, parse_grid, read_plan
from mmaudit.train.comparison.cells import parse_method

PLAN = 'manifests = ["all"]\nmethods = ["joint", "sum"]\nseeds = 3\nname = "mine"\ncontrols = false\n'


def plan_of(content: str | None, folder: Path, **options: Any) -> Plan:
    file = None if content is None else folder / "plan.toml"
    if file is not None:
        file.write_text(content or "")
    given: dict[str, Any] = {"manifests": (), "methods": (), "seeds": None, "name": None, "controls": True}
    return read_plan(file, **{**given, **options})


def test_options_override_the_file(tmp_path: Path) -> None:
    plan = plan_of(PLAN, tmp_path)
    assert (plan.manifests, plan.seeds, plan.name, plan.controls) == (("all",), 3, "mine", False)
    assert [method.name for method in plan.methods] == ["joint", "sum"]
    plan = plan_of(PLAN, tmp_path, manifests=["few"], methods=["ogm"], seeds=2, name="other")
    assert (plan.manifests, plan.seeds, plan.name) == (("few",), 2, "other")
    assert [method.name for method in plan.methods] == ["ogm"]


def test_name_is_made_of_the_manifests(tmp_path: Path) -> None:
    plan = plan_of(None, tmp_path, manifests=["balanced", "other/all.parquet"], methods=["joint"])
    assert (plan.name, plan.seeds, plan.controls) == ("balanced-all", 5, True)
    assert not plan_of(None, tmp_path, manifests=["all"], methods=["joint"], controls=False).controls


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("manifest = ['all']", "no key manifest; did you mean manifests"),
        ("seeds = 'two'", "seeds is 'two'; it must be a whole number"),
        ("seeds = true", "seeds is True; it must be a whole number"),
        ("methods = 'joint'", "it must be a list of texts"),
        ("methods = [1]", "it must be a list of texts"),
        ("controls = 1", "it must be true or false"),
        ("seeds = ", "is not TOML"),
        ("grid = [1, 2]", "grid is .*; it must be a table"),
        ("[grid]\noptim.lr = 0.1", r"--grid optim\.lr: its values are 0.1; they must be a list"),
        ("[grid]\noptim.lr = [0.1]", r"--grid optim\.lr has one value: a grid needs two"),
    ],
)
def test_wrong_plans_are_refused(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(content, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["joint", "joint"]}, "--method joint is passed twice"),
        ({"methods": []}, "pass at least one --method"),
        ({"manifests": []}, "pass at least one --manifest"),
        ({"manifests": ["all", "run/manifests/all.parquet"]}, "two manifests are named all"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(None, tmp_path, **{"manifests": ["all"], "methods": ["joint"], **options})


def test_config_of_a_method_is_the_common_one_with_its_own_settings() -> None:
    common = ["finetune.hidden=16", "optim.lr=0.1"]
    config, own = method_config(parse_method("late+ogm: balancing.ogm.alpha=0.5 optim.lr=0.2"), None, common, 7)
    finetune = config.finetune
    assert (finetune.fusion, finetune.balancing, finetune.sampling) == ("late", "ogm", "uniform")
    assert (finetune.hidden, config.optim.lr, config.seed) == (16, 0.2, 7)
    assert config.balancing["ogm"]["alpha"] == 0.5
    assert sorted(own) == ["balancing.ogm.alpha", "optim.lr"]


def test_preset_is_overridden_by_settings() -> None:
    config, _ = method_config(parse_method("preset:ogm-ge-cremad: optim.lr=0.2"), None, {"finetune.hidden": 16}, None)
    assert config.finetune.balancing == "ogm-ge"
    assert (config.finetune.hidden, config.optim.lr, config.optim.optimizer) == (16, 0.2, "sgd")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["optim.lr=1e-3,1e-2"], (("optim.lr", (0.001, 0.01)),)),
        ([" optim.optimizer = sgd, adamw "], (("optim.optimizer", ("sgd", "adamw")),)),
        (["optim.freeze=['a'],['b', 'c']"], (("optim.freeze", (["a"], ["b", "c"])),)),
        (["optim.lr=1,2", "finetune.hidden=8,16"], (("optim.lr", (1, 2)), ("finetune.hidden", (8, 16)))),
    ],
)
def test_grids_are_parsed(texts: list[str], expected: Grid) -> None:
    assert parse_grid(texts) == expected
    assert parse_grid({key: [*values] for key, values in expected}) == expected


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["optim.lr"], r"--grid optim\.lr: not of the form SECTION.KEY=VALUE,VALUE"),
        (["=1,2"], "not of the form"),
        (["optim.lr="], "not of the form"),
        (["optim.lr=fast,,slow"], "a value is empty"),
        (["optim.lr=1e-3"], r"--grid optim\.lr has one value: a grid needs two; for one, --set optim\.lr=VALUE"),
        (["optim.lr=1,2,1"], r"--grid optim\.lr has the value 1 twice"),
        (["optim.lr=1,2", "optim.lr=3,4"], r"--grid optim\.lr is passed twice"),
        (["seed=1,2"], "--grid seed: seeds are those of --seed and --seeds"),
        (["finetune.epochs=1,2"], "--grid finetune.epochs: all trainings read as many samples"),
        (["finetune.balancing=joint,ogm"], "it is a part of a method; pass another --method"),
    ],
)
def test_wrong_grids_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_grid(texts)


def test_grid_of_a_plan_is_overridden_by_options(tmp_path: Path) -> None:
    content = PLAN + '[grid]\noptim.lr = [0.1, 0.2]\n"finetune.hidden" = [8, 16]\n'
    grid = (("optim.lr", (0.1, 0.2)), ("finetune.hidden", (8, 16)))
    assert plan_of(content, tmp_path).grid == grid
    assert plan_of(content, tmp_path, grid=["optim.lr=1,2"]).grid == (("optim.lr", (1, 2)),)
    assert plan_of(PLAN, tmp_path).grid == ()


@pytest.mark.parametrize(
    "key", ["finetune.epochs=3", "finetune.validation_fraction=0.2", "seed=1", "finetune.only=audio"]
)
def test_settings_of_all_trainings_are_refused_for_one_method(key: str) -> None:
    with pytest.raises(ConfigError, match=f"--method joint: {key}: "):
        method_config(parse_method(f"joint: {key}"), None, (), None)
    if key.startswith("finetune.only"):
        with pytest.raises(ConfigError, match=r"--set finetune\.only: the controls train on one modality"):
            method_config(parse_method("joint"), None, [key], None)


def test_unknown_key_of_a_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no config key optim\.lrr; did you mean"):
        method_config(parse_method("joint: optim.lrr=1"), None, (), None)
