"""Tests of what passes between stages: a table is complete, with its record, or absent."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from mmaudit.audit.engine.part_store import FolderStore, MemoryStore, Store
from mmaudit.audit.errors import RunError

TABLE = pa.table({"row": [1, 2, 3]})


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else FolderStore(folder=tmp_path, config="c")


def test_written_table_is_read(store: Store) -> None:
    assert not store.has("rows", 1)
    store.write("rows", TABLE, part=1, counts={"scored": 2})
    assert store.has("rows", 1)
    assert not store.has("rows", 0)
    assert store.read("rows", 1).equals(TABLE)
    assert store.counts("rows", 1) == {"scored": 2}


def written(folder: Path) -> tuple[FolderStore, Path]:
    store = FolderStore(folder=folder, config="c")
    store.write("scores", TABLE, part=2)
    return FolderStore(folder=folder, config="c"), store.file("scores", 2)


def test_table_without_its_record_is_absent(tmp_path: Path) -> None:
    store, file = written(tmp_path)
    file.with_suffix(".json").unlink()
    assert not store.has("scores", 2)


def test_record_without_its_table_is_absent(tmp_path: Path) -> None:
    store, file = written(tmp_path)
    file.unlink()
    assert not store.has("scores", 2)
    with pytest.raises(RunError, match="is missing or damaged: run the stage that writes it again, --stage score"):
        store.read("scores", 2)


@pytest.mark.parametrize("change", ["truncated", "one byte"])
def test_damaged_table_is_absent(change: str, tmp_path: Path) -> None:
    store, file = written(tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content[:-8] if change == "truncated" else content))
    assert not store.has("scores", 2)


def test_table_with_a_damaged_record_is_absent(tmp_path: Path) -> None:
    store, file = written(tmp_path)
    file.with_suffix(".json").write_text('{"config": "c", "rows"')
    assert not store.has("scores", 2)
    store.write("scores", TABLE, part=2)
    assert store.has("scores", 2)


def test_table_of_another_config_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(RunError, match="of other data or of another config"):
        FolderStore(folder=tmp_path, config="other").has("scores", 2)


def test_record_is_written_after_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = written(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmaudit.audit.engine.part_store.write_json", die)
    with pytest.raises(KeyboardInterrupt):
        store.write("scores", pa.table({"row": [4]}), part=2)
    assert file.exists()
    assert not FolderStore(folder=tmp_path, config="c").has("scores", 2)
