"""Tests of storage: files and folders are written completely or not at all, also by concurrent or killed writers."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmaudit.audit import storage
from mmaudit.audit.errors import RunError
from mmaudit.audit.storage import (
    atomic_folder,
    atomic_write,
    read_json,
    remove_leftovers,
    replace_folder,
    scratch_folder,
    write_json,
    write_text,
)
from mmaudit.audit.workers import ProcessId, this_process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def temporary_name(writer: object) -> str:
    return f".mmaudit-{writer}-{secrets.token_hex(4)}.tmp"


def ended_process() -> ProcessId:
    """Return the identity of an ended process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pass
    return ProcessId(machine=this_process().machine, pid=process.pid, start="0")


@pytest.mark.parametrize("durable", [True, False])
def test_file_appears_only_when_complete(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_write(path, durable=durable) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_file_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text("text", path)
    assert path.read_text() == "text"
    with pytest.raises(OSError, match="too long") as caught:
        write_text("text", tmp_path / ("n" * 256))
    assert caught.value.filename == str(tmp_path / ("n" * 256))


def test_concurrent_writers_leave_one_complete_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    texts = [str(number) * 100_000 for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda text: write_text(text, path), texts))
    assert path.read_text() in texts
    assert names(tmp_path) == ["file.txt"]


def test_leftovers_of_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = (
        "import sys, time; from pathlib import Path; from mmaudit.audit.storage import atomic_write, scratch_folder\n"
        "with atomic_write(Path(sys.argv[1])) as file, scratch_folder(file.parent) as folder:\n"
        "    file.write_text('half'); (folder / 'part').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 3  # its writer is running
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3
    write_text("new", path)
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "new"


def test_only_leftovers_of_ended_writers_are_removed(tmp_path: Path) -> None:
    own_process = this_process()
    other_machine = ProcessId(machine="00000000", pid=own_process.pid, start=own_process.start)
    later_process = ProcessId(machine=own_process.machine, pid=own_process.pid, start="1")
    remaining = [temporary_name(own_process), temporary_name(other_machine), "notes.txt", ".mmaudit-notes.tmp"]
    removed = [temporary_name(ended_process()), temporary_name(later_process)]
    for name in (*remaining, *removed):
        (tmp_path / name).write_text("")
    old = [temporary_name(other_machine), temporary_name("unknown")]
    for name in old:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
        os.utime(tmp_path / name, (0, time.time() - 2 * 86_400))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(remaining)


def test_folder_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    for index, exchange in enumerate((storage._exchange, storage._exchange, lambda first, second: False)):
        monkeypatch.setattr(storage, "_exchange", exchange)
        with atomic_folder(path) as temporary:
            (temporary / f"{index}.txt").write_text("text")
        assert names(path) == [f"{index}.txt"]
        assert names(tmp_path) == ["folder"]

    def fail() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "half.txt").write_text("text")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert names(path) == ["2.txt"]
    assert names(tmp_path) == ["folder"]


def test_folders_are_exchanged_by_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    monkeypatch.setattr(Path, "replace", None)  # one system call, not two renames
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"]


def test_errors_name_the_target_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(error: OSError) -> None:
        with atomic_write(path):
            raise error

    for error in (OSError(28, "No space left on device"), OSError(28, "full", str(tmp_path / temporary_name("x")))):
        with pytest.raises(OSError, match="28") as caught:
            write(error)
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="other") as caught:
        write(FileNotFoundError(2, "no such file", "other"))
    assert caught.value.filename == "other"


def test_json_round_trips(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"name": "b\udcff.wav"}}
    write_json(content, tmp_path / "file.json")
    assert read_json(tmp_path / "file.json", error=RunError) == content
    write_text("b\udcff", tmp_path / "file.json")
    with pytest.raises(RunError, match="damaged"):
        read_json(tmp_path / "file.json", error=RunError)


def test_scratch_folders_are_removed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "deep") as first, scratch_folder(tmp_path / "deep") as second:
        (first / "part").write_text("")
        assert first != second
    assert names(tmp_path / "deep") == []
