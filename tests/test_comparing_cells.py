"""Cells of comparisons: one common test set, and what a finished cell depends on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import make_manifest
from training import make_examples

from mmaudit.audit.errors import ManifestError, RunError
from mmaudit.audit.features.encoders import function_version
from mmaudit.audit.registry import Registry
from mmaudit.cli.comparison.cells import Cell, LoadedManifests, _with_common_test, made_by, read_cell
from mmaudit.cli.config import RunConfig
from mmaudit.cli.provenance import SourceOptions
from mmaudit.cli.run import Run
from mmaudit.cli.training_source import ManifestSource
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.comparison.cells import parse_method
from mmaudit.train.sampling import SAMPLERS


def test_test_samples_are_those_of_all_manifests(caplog: pytest.LogCaptureFixture) -> None:
    examples = make_examples()
    test = examples.rows("test")
    split = examples.split.copy()
    split[test[:5]] = "unused"
    with caplog.at_level(logging.WARNING):
        restricted, test_ids = _with_common_test({"a": examples, "b": replace(examples, split=split)})
    assert test_ids.tolist() == examples.ids(test[5:]).tolist()
    for entry in restricted.values():
        assert entry.ids(entry.rows("test")).tolist() == test_ids.tolist()
        assert entry.rows("train").tolist() == examples.rows("train").tolist()
    assert "5 test samples of a are not in all manifests" in caplog.text


def test_other_test_samples_classes_or_none_are_refused() -> None:
    examples = make_examples()
    split = examples.split.copy()
    split[examples.rows("test")[0]] = "train"
    with pytest.raises(ManifestError, match="b trains on test samples of another manifest"):
        _with_common_test({"a": examples, "b": replace(examples, split=split)})
    with pytest.raises(ManifestError, match="b has other classes or modalities than a"):
        _with_common_test({"a": examples, "b": replace(examples, class_names=("a", "b", "c", "e"))})
    split = np.where(examples.split == "test", "unused", examples.split)
    with pytest.raises(ManifestError, match="no common test samples"):
        _with_common_test({"a": examples, "b": replace(examples, split=split)})


def loaded_examples(tmp_path: Path, **changes: Any) -> LoadedManifests:
    examples = replace(make_examples(), **changes)
    source = ManifestSource(
        path=tmp_path / "a.parquet", manifest=make_manifest(), run_dir=Run(tmp_path), options=SourceOptions()
    )
    return LoadedManifests(
        examples={"a": examples},
        sources={"a": source},
        between="audio:visual",
        subsets={},
        test_ids=examples.ids(examples.rows("test")),
        group=None,
        saw_test_labels=(),
    )


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {"manifest": "a", "method": parse_method("joint"), "seed": 0, "budget": 100}
    config = RunConfig(finetune=replace(RunConfig().finetune, balancing="joint"))
    return Cell(**{**values, "config": config, "is_first": True, **changes})


def test_digests_of_a_cell_follow_what_it_depends_on(tmp_path: Path) -> None:
    def differing(other: dict[str, str]) -> list[str]:
        return [name for name, value in made_by(cell(), loaded_examples(tmp_path)).items() if other[name] != value]

    assert not differing(made_by(cell(is_first=False), loaded_examples(tmp_path)))
    quick = RunConfig(finetune=replace(cell().config.finetune, epochs=3))
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"budget": 99}, {"config": quick})
    for change in changes:
        assert differing(made_by(cell(**change), loaded_examples(tmp_path))) == ["settings"]
    resident = RunConfig(finetune=replace(cell().config.finetune, resident_mib=1))
    assert not differing(made_by(cell(config=resident), loaded_examples(tmp_path)))
    content = np.array([f"other {number}" for number in range(120)], dtype=object)
    assert differing(made_by(cell(), loaded_examples(tmp_path, content=content))) == ["data"]


def test_digests_follow_the_source_of_a_network_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = RunConfig(finetune=replace(cell().config.finetune, model="compared_net:factory"))
    made = []
    for source in ("def factory(*shapes): ...\n", "def factory(*shapes): return None\n"):
        (tmp_path / "compared_net.py").write_text(source)
        function_version.cache_clear()
        made.append(made_by(cell(config=own), loaded_examples(tmp_path)))
    assert made[0]["code"] != made[1]["code"]
    assert made[0]["settings"] == made[1]["settings"]


@pytest.mark.parametrize(("axis", "registry"), [("sampling", SAMPLERS), ("balancing", BALANCERS)])
def test_digests_follow_the_package_of_an_installed_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str, registry: Registry
) -> None:
    info = tmp_path / "t_method-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: t-method\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{registry.group}]\nextra = t_method:Extra\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changes: dict[str, Any] = {"balancing": "joint", axis: "extra"}
    installed = RunConfig(finetune=replace(RunConfig().finetune, **changes))
    made = []
    for source in ("class Extra: ...\n", "class Extra:\n    a = 1\n"):
        (tmp_path / "t_method.py").write_text(source)
        made.append(made_by(cell(config=installed), loaded_examples(tmp_path)))
    assert made[0]["code"] != made[1]["code"]
    assert {**made[0], "code": ""} == {**made[1], "code": ""}


def test_damaged_cell_is_refused(tmp_path: Path) -> None:
    loaded = loaded_examples(tmp_path)
    folder = cell().folder(tmp_path)
    assert read_cell(folder, cell(), loaded) is None
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text("{}")
    with pytest.raises(RunError, match=r"cell\.json cannot be read"):
        read_cell(folder, cell(), loaded)
