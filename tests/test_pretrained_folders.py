"""Folders of models: a local folder is identified by its content, a model of the hub by its commit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.pretrained import find_model_folder, folder_version

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, *, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_version_of_a_folder_depends_only_on_content(tmp_path: Path) -> None:
    original, same, changed = (
        model(tmp_path / "one"),
        model(tmp_path / "same"),
        model(tmp_path / "other", weights=b"weightz"),
    )
    (same / "README.md").write_text("no part of the model")
    os.utime(same / "config.json", (0, 0))
    assert folder_version(original) == folder_version(same)
    assert folder_version(original) != folder_version(changed)
    before = folder_version(original)
    (original / "config.json").write_text("{ }")
    assert folder_version(original) != before


def test_version_of_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--owner--name"
    folder = model(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/name", f"owner/name@{COMMIT}", "owner/name@main"):
        for with_weights in (False, True):
            assert find_model_folder(name, with_weights=with_weights) == folder
    assert folder_version(folder) == COMMIT
    with pytest.raises(ConfigError, match="no local folder 'owner/name@v2', and the hub has no such model"):
        find_model_folder("owner/name@v2", with_weights=False)


def test_local_folder_precedes_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_model_folder("owner/name", with_weights=True) == Path("owner/name")
    (tmp_path / "owner" / "name" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"folder owner/name has no config\.json"):
        find_model_folder("owner/name", with_weights=True)
