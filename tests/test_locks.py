"""Tests of locks: one writer at a time, locks of ended processes expire, and errors name the other writer."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mmaudit.audit import locks
from mmaudit.audit.errors import RunError
from mmaudit.audit.locks import LOCK_FOLDER, find_holders, write_lock
from mmaudit.audit.storage import write_json
from mmaudit.audit.workers import ProcessId, this_process

_HOLD = """
import sys, time; from pathlib import Path; from mmaudit.audit.locks import write_lock
with write_lock(Path(sys.argv[1]), sys.argv[2], command="mmaudit score"):
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def locking_process(folder: Path, scope: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that holds a lock until it is killed."""
    command = [sys.executable, "-c", _HOLD, str(folder), scope]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def write_foreign_lock(folder: Path, *, process: ProcessId, age_seconds: float = 0.0, scope: str = "") -> Path:
    """Write a lock file that no process of this test removes."""
    file = folder / LOCK_FOLDER / "0123456789abcdef.lock"
    file.parent.mkdir(parents=True)
    content = {"scope": scope, "command": "mmaudit score", "host": "node7", "process": str(process), "started": "today"}
    file.write_text(json.dumps(content))
    current_time = time.time()
    os.utime(file, (current_time, current_time - age_seconds))
    return file


def is_free(folder: Path, scope: str = "") -> bool:
    try:
        with write_lock(folder, scope, command="mmaudit split"):
            return True
    except RunError:
        return False


@pytest.mark.parametrize("exists", [True, False])
def test_lock_removes_its_files_and_folders(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    with write_lock(folder, command="mmaudit score"):
        assert [str(holder).split(" (")[0] for holder in find_holders(folder)] == ["mmaudit score"]
    assert folder.exists() == folder.parent.exists() == exists
    assert not exists or not any(folder.iterdir())


def test_written_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with write_lock(folder, command="mmaudit score"):
        (folder / "run.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("", "", True),
        ("", "finetune/a", True),
        ("finetune/a", "", True),
        ("finetune/a", "finetune/a/evaluation.json", True),
        ("finetune/a", "finetune/b", False),
        ("finetune/a", "finetune/ab", False),
        ("manifests/a", "finetune/a", False),
        ("features", "report.html", False),
    ],
)
def test_scopes_overlap_where_one_contains_the_other(tmp_path: Path, first: str, second: str, overlap: bool) -> None:
    with write_lock(tmp_path, first, command="mmaudit score"):
        assert is_free(tmp_path, second) == (not overlap)
    assert is_free(tmp_path, second)


def test_second_writer_gets_error_naming_the_first(tmp_path: Path) -> None:
    with locking_process(tmp_path) as process:
        start = time.monotonic()
        with pytest.raises(RunError) as caught, write_lock(tmp_path, command="mmaudit score"):
            pass
        assert time.monotonic() - start < 5
        line = str(caught.value)
        assert f"{tmp_path} is being written by mmaudit score (process {process.pid} on " in line
        assert ", since 20" in line
        assert "\n" not in line
        process.kill()
        process.wait()
        assert is_free(tmp_path)  # the lock of a killed process is taken over


def test_waiting_writer_logs_and_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    with locking_process(tmp_path) as process:
        threading.Timer(1.6, process.kill).start()
        with write_lock(tmp_path, command="mmaudit split", wait_seconds=30):
            assert process.wait() != 0
    assert caplog.text.count(f"waiting for mmaudit score (process {process.pid} on ") == 1


def test_lock_of_ended_process_is_taken_over(tmp_path: Path) -> None:
    own_process = this_process()
    for index, process in enumerate((replace(own_process, start="1"), replace(own_process, pid=2**22 + 1))):
        folder = tmp_path / str(index)
        file = write_foreign_lock(folder, process=process)
        assert is_free(folder)
        assert not file.exists()
    write_foreign_lock(tmp_path / "running", process=own_process, age_seconds=3_600)
    assert not is_free(tmp_path / "running")


@pytest.mark.parametrize(("age_seconds", "free"), [(0, False), (30, False), (120, True)])
def test_lock_of_another_machine_expires_without_heartbeats(tmp_path: Path, age_seconds: float, free: bool) -> None:
    """Also if its process has the pid of a local process, and the clocks of both machines differ."""
    file = write_foreign_lock(tmp_path, process=replace(this_process(), machine="00000000"), age_seconds=age_seconds)
    assert is_free(tmp_path) == free
    assert file.exists() == (not free)


def test_damaged_lock_counts_until_it_is_stale(tmp_path: Path) -> None:
    file = write_foreign_lock(tmp_path, process=this_process())
    file.write_text("{")
    assert not is_free(tmp_path, "finetune/a")
    os.utime(file, (0, time.time() - 120))
    assert is_free(tmp_path, "finetune/a")


def test_heartbeats_update_the_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_HEARTBEAT_SECONDS", 0.02)
    with write_lock(tmp_path, command="mmaudit score") as lock:
        os.utime(lock.file, (0, 0))
        end = time.monotonic() + 10
        while lock.file.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - lock.file.stat().st_mtime < 60


def test_removed_lock_raises_error(tmp_path: Path) -> None:
    with write_lock(tmp_path, command="mmaudit score") as lock:
        lock.check()
        lock.file.unlink()
        with pytest.raises(RunError, match=r"the lock on .* was lost"):
            lock.check()


def test_lock_of_ended_process_is_removed_for_any_scope(tmp_path: Path) -> None:
    write_foreign_lock(tmp_path, process=replace(this_process(), start="1"), scope="manifests/.1a2b")
    with write_lock(tmp_path, "manifests/a", command="mmaudit split") as lock:
        assert [path.name for path in lock.file.parent.iterdir()] == [lock.file.name]


def test_many_writers_write_one_at_a_time(tmp_path: Path) -> None:
    """There is a stale lock, too: all writers find it, and none removes the lock of another in its place."""
    write_foreign_lock(tmp_path, process=replace(this_process(), start="1"))
    active: list[int] = []
    num_active: list[int] = []

    def write(number: int) -> None:
        with write_lock(tmp_path, command="mmaudit split", wait_seconds=60):
            active.append(number)
            num_active.append(len(active))
            time.sleep(0.005)
            active.remove(number)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(write, range(24)))
    assert num_active == [1] * 24


def test_one_of_two_simultaneous_writers_gets_the_lock(tmp_path: Path) -> None:
    for _ in range(10):
        start = threading.Barrier(2)
        end = threading.Barrier(2)

        def write(start: threading.Barrier = start, end: threading.Barrier = end) -> bool:
            start.wait()
            try:
                with write_lock(tmp_path, command="mmaudit score"):
                    end.wait(timeout=20)
                    return True
            except RunError:
                end.wait(timeout=20)
                return False

        with ThreadPoolExecutor(2) as pool:
            assert sorted(task.result() for task in [pool.submit(write), pool.submit(write)]) == [False, True]


def test_exit_of_forked_child_keeps_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from mmaudit.audit.locks import write_lock, find_holders\n"
        "folder = Path(sys.argv[1])\n"
        "with write_lock(folder, command='mmaudit score'):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        os.waitpid(child, 0); print(len(find_holders(folder)), flush=True)\n"
    )
    output = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "1"


def test_failed_lock_removes_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(content: object, path: Path) -> None:
        path.parent.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locks, "write_json", fail)
    with pytest.raises(OSError, match="No space"), write_lock(tmp_path / "deep" / "run", command="mmaudit score"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_removal_of_the_lock_folder_by_another_writer_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    calls: list[Path] = []

    def fail_once(content: dict[str, object], path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise error
        write_json(content, path)

    monkeypatch.setattr(locks, "write_json", fail_once)
    assert is_free(tmp_path)
    assert len(calls) == 2


def test_interrupt_during_release_removes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    withdraw, calls = locks._withdraw, []

    def interrupt_once(file: Path, created: list[Path]) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise KeyboardInterrupt
        withdraw(file, created)

    monkeypatch.setattr(locks, "_withdraw", interrupt_once)
    with pytest.raises(KeyboardInterrupt), write_lock(tmp_path, command="mmaudit score"):
        assert list((tmp_path / LOCK_FOLDER).iterdir())
    assert not list(tmp_path.iterdir())
    assert len(calls) == 2
