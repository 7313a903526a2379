"""Tests of the package: installed modules, public names, and the wheel outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mmaudit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("audit", "rebalance", "train", "cli")


def test_packages_match_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent for name in SOURCE for path in (ROOT / name).rglob("__init__.py")]
    expected = ["mmaudit", *(f"mmaudit.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders)]
    assert sorted(settings["packages"]) == sorted(expected)


def test_version_matches_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == mmaudit.__version__


def test_oldest_constraints_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = versions([line for line in lines if not line.startswith("#")])
    bounds = versions(project["dependencies"])
    assert bounds.keys() <= pins.keys()
    bounds |= versions(project["optional-dependencies"]["dev"])
    bounds["torch"] = pins["torch"]  # older releases bring gigabytes of CUDA
    assert pins.items() <= bounds.items()


def versions(requirements: list[str]) -> dict[str, Version | None]:
    """Return the version that each requirement names, by package."""
    parsed = map(Requirement, requirements)
    return {line.name: next((Version(bound.version) for bound in line.specifier), None) for line in parsed}


@pytest.mark.parametrize("name", mmaudit.__all__)
def test_public_names_are_importable(name: str) -> None:
    assert getattr(mmaudit, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="scor"):
        _ = mmaudit.scor


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys, mmaudit.cli.main, mmaudit.cli.console; "
        "print([n for n in ('torch', 'sklearn', 'pandas', 'pyarrow', 'numpy', 'scipy') if n in sys.modules])"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "[]"


@pytest.mark.slow  # its quicker twin: test_packages_match_the_folders
def test_wheel_runs_the_demo_outside_the_checkout(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "mmaudit-*")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
    ]
    subprocess.run(build, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, capture_output=True, check=True)
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == ["bin", "mmaudit"]

    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    locate = [sys.executable, "-c", "import mmaudit; print(mmaudit.__file__)"]
    imported = subprocess.run(locate, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(imported.stdout.strip()).is_relative_to(site)
    demo = [sys.executable, "-m", "mmaudit", "demo", "planted", "--num-samples", "100", "--json"]
    done = subprocess.run(demo, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["recovery"]["spearman"] > 0.4  # 100 samples; 400 must reach 0.8 in test_end_to_end
    assert (tmp_path / result["report"]).stat().st_size > 10_000
