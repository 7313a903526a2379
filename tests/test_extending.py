"""The recipes of docs/extending.md: installed as a package as they stand, and used through the public functions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mmaudit
from mmaudit.audit.dataset.formats import READERS
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError, RunError
from mmaudit.audit.features.encoders import ENCODERS, load_installed
from mmaudit.rebalance import EXPORTERS
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.sampling import SAMPLERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.usefixtures("quick_scores")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"```python\n# my_package/(\w+\.py)\n(.*?)```", PAGE, flags=re.DOTALL))
ENTRY_POINTS: dict[str, dict[str, str]] = {}
for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL):
    ENTRY_POINTS |= tomllib.loads(block)["project"]["entry-points"]
QUICK: dict[str, Any] = {"num_workers": 0, "progress": False}
USE = """
import json, sys
import mmaudit

quick = {"run": "run", "num_workers": 0, "progress": False}
scored = mmaudit.score(sys.argv[1], encoder={"text": "style"}, repeats=1, settings={"probe.folds": 2}, **quick)
mmaudit.split(run="run", subset="most-balanced:100%", name="all")
tuned = mmaudit.finetune("all", sampling="small-discrepancy", balancing="lagging", epochs=1, **quick)
mmaudit.export("all", run="run", format="ids", out="ids.txt")
config, encoders = tuned.metrics["config"], sorted(entry["encoder"] for entry in scored.record["modalities"])
used = {"scored": scored.num_scored, "encoders": encoders, "exported": len(open("ids.txt").readlines())}
print(json.dumps({**used, "sampling": [*config["sampling"]], "balancing": [*config["balancing"]]}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install the modules of the page as my_package 1.0, with its entry points; nothing is imported."""
    site = tmp_path_factory.mktemp("site")
    (site / "my_package").mkdir()
    (site / "my_package" / "__init__.py").touch()
    for name, code in MODULES.items():
        (site / "my_package" / name).write_text(code, encoding="utf-8")
    info = site / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    sections = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items())
        for group, names in ENTRY_POINTS.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections), encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(site))
        yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]
    load_installed.cache_clear()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON array of 96 samples: the class is in the style of the text, and for most in the vector as well."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(96):
        label = number % 2
        word = "ABC" if label else "abcdefg"
        measured = label if rng.random() < 0.7 else 1 - label
        rows.append(
            {
                "id": f"s{number:03d}",
                "label": label,
                "split": "test" if number % 6 == 5 else "train",
                "text": " ".join([word] * int(rng.integers(2, 9))),
                "sensor": [float(measured + 0.4 * rng.standard_normal()) for _ in range(3)],
            }
        )
    path = tmp_path_factory.mktemp("data") / "samples.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def scored(package: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> mmaudit.ScoreResult:
    result = mmaudit.score(
        samples,
        run=tmp_path_factory.mktemp("scored") / "run",
        encoder={"text": "style"},
        repeats=1,
        settings={"data.reader": "json-array", "probe.folds": 2},
        **QUICK,
    )
    assert isinstance(result, mmaudit.ScoreResult)
    return result


@pytest.fixture(scope="module")
def tuned(scored: mmaudit.ScoreResult) -> mmaudit.FinetuneResult:
    mmaudit.split(run=scored.run, subset="most-balanced:100%", name="all")
    settings = {"sampling.small-discrepancy.limit": 0.4, "balancing.lagging.power": 2.0, "finetune.hidden": 4}
    return mmaudit.finetune(
        "all", run=scored.run, sampling="small-discrepancy", balancing="lagging", epochs=2, settings=settings, **QUICK
    )


def test_page_has_a_module_for_every_entry_point() -> None:
    groups = (registry.group for registry in (SAMPLERS, BALANCERS, ENCODERS, READERS, EXPORTERS))
    assert ENTRY_POINTS.keys() == {*groups}
    values = [value for names in ENTRY_POINTS.values() for value in names.values()]
    assert sorted(MODULES) == sorted(value.partition(":")[0].removeprefix("my_package.") + ".py" for value in values)


def test_methods_lists_every_name_without_importing_it(package: Path) -> None:
    names = {row.name for row in mmaudit.methods().rows}
    assert {name for names_of_group in ENTRY_POINTS.values() for name in names_of_group} <= names
    assert "my_package" not in sys.modules


@pytest.mark.slow  # quicker twins: the tests of the same code in an installed package
def test_a_file_and_a_line_add_each_to_mmaudit_itself(samples: Path, tmp_path: Path) -> None:
    """The same code in a copy of the source, without a package."""
    for folder in ("audit", "rebalance", "train", "cli"):
        shutil.copytree(ROOT / folder, tmp_path / "mmaudit" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, tmp_path / "mmaudit" / name)
    recipes = re.findall(r"the file is `([^`]+)`, the line in `([^`]+)` is\n\n```\n(.*)\n```", PAGE)
    assert sorted(Path(file).name for file, _, _ in recipes) == sorted(MODULES)
    for file, registry, line in recipes:
        (tmp_path / "mmaudit" / file).write_text(MODULES[Path(file).name], encoding="utf-8")
        text = (tmp_path / "mmaudit" / registry).read_text(encoding="utf-8")
        head, opening, entries = re.split(r"(= Registry\(\n    \{.*\n)", text, maxsplit=1)
        (tmp_path / "mmaudit" / registry).write_text(f"{head}{opening}        {line}\n{entries}", encoding="utf-8")
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "use.py", str(samples)]
    used = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(used.stdout) == {
        "scored": 96,
        "encoders": ["statistics", "style"],
        "sampling": ["small-discrepancy"],
        "balancing": ["lagging"],
        "exported": 96,
    }


def test_table_of_contracts_names_what_exists() -> None:
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)` in `([\w/.]+)` \| `(\w+)` in `([\w/.]+)` \| `([\w.]+)` \|$", PAGE, re.M)
    assert len(rows) == len(ENTRY_POINTS) + 1  # and downloads
    for contract, file, registry, registry_file, group in rows:
        assert re.search(rf"^class {contract}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        text = (ROOT / registry_file).read_text(encoding="utf-8")
        assert f"{registry} = Registry(" in text
        assert f'"{group}"' in text


def test_reader_plans_the_rows(scored: mmaudit.ScoreResult, samples: Path) -> None:
    assert scored.num_scored == scored.num_samples == 96
    assert scored.record["source"] == str(samples)
    assert scored.record["config"]["data"]["reader"] == "json-array"
    assert sorted(scored.scores.sample_id) == [f"s{number:03d}" for number in range(96)]


def test_reader_reports_other_files(package: Path, samples: Path, tmp_path: Path) -> None:
    settings = {"data.reader": "json-array"}
    with pytest.raises(DatasetError, match=r"is neither a folder nor a \.parquet"):
        mmaudit.check(samples, progress=False)
    with pytest.raises(DatasetError, match=r"is not of the format that data\.reader = 'json-array' reads"):
        mmaudit.check(samples.parent, settings=settings, progress=False)
    (tmp_path / "damaged.json").write_text("[1,")
    with pytest.raises(DatasetError, match=r"damaged\.json cannot be read as a JSON array of objects"):
        mmaudit.check(tmp_path / "damaged.json", settings=settings, progress=False)


def test_encoder_makes_the_vectors(scored: mmaudit.ScoreResult, package: Path) -> None:
    assert {entry["name"]: entry["encoder"] for entry in scored.record["modalities"]}["text"] == "style"
    assert scored.record["code"]["style"] == str((package / "my_package" / "style.py").resolve())
    module = sys.modules["my_package.style"]
    assert module.STYLE["text"].encode("Two words.", None).dtype == np.float32  # what mmaudit's own must return
    metrics = {metric["name"]: metric["value"] for metric in scored.record["probe_report"]["probe_metrics"]}
    assert metrics["text"] > 0.95  # capitals give the class away


def test_sampler_draws_the_samples(scored: mmaudit.ScoreResult, tuned: mmaudit.FinetuneResult) -> None:
    assert tuned.metrics["config"]["sampling"] == {"small-discrepancy": {"limit": 0.4}}
    rows = pd.read_parquet(scored.run / "manifests" / "all.parquet").query("split == 'train'")
    num_train, num_used = tuned.metrics["counts"]["train"], tuned.metrics["samples_seen"] / 2
    assert 0 < num_used < num_train
    assert num_used <= (rows["discrepancy"].abs() <= 0.4).sum()


def test_balancer_weighs_the_losses(tuned: mmaudit.FinetuneResult) -> None:
    assert tuned.metrics["config"]["balancing"] == {"lagging": {"power": 2.0}}
    history = [json.loads(line) for line in (tuned.folder / "history.jsonl").read_text().splitlines()]
    weights = [epoch[f"weight_{name}"] for epoch in history for name in ("text", "sensor")]
    assert len(weights) == 4
    assert all(0 < weight < 1 for weight in weights)


def test_constants_out_of_range_are_refused(scored: mmaudit.ScoreResult, tuned: mmaudit.FinetuneResult) -> None:
    for settings, error, message in (
        (
            {"sampling.small-discrepancy.limit": 2.0},
            ConfigError,
            r"sampling\.small-discrepancy\.limit is 2\.0; it must lie in \(0, 1\]",
        ),
        (
            {"sampling.small-discrepancy.limit": 1e-9},
            ManifestError,
            "no training sample has a discrepancy within 1e-09",
        ),
        ({"balancing.lagging.power": -1.0}, ConfigError, r"balancing\.lagging\.power is -1\.0; it must lie in"),
    ):
        with pytest.raises(error, match=message):
            mmaudit.finetune(
                "all",
                run=scored.run,
                name="refused",
                sampling="small-discrepancy",
                balancing="lagging",
                settings=settings,
                **QUICK,
            )


def test_exporter_writes_the_file(scored: mmaudit.ScoreResult, tuned: mmaudit.FinetuneResult, tmp_path: Path) -> None:
    out = tmp_path / "ids.txt"
    assert mmaudit.export("all", run=scored.run, format="ids", out=out).files == (str(out),)
    manifest = mmaudit.read_manifest(scored.run / "manifests" / "all.parquet")
    assert out.read_text().splitlines() == [f"{name} 1.0" for name in manifest.strings("sample_id")]
    with pytest.raises(RunError, match="pass --overwrite"):
        mmaudit.export("all", run=scored.run, format="ids", out=out)
