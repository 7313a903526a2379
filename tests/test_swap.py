"""Tests of swaps: an interrupted replacement leaves the old or the new run, never a mixture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmaudit.audit.errors import RunError
from mmaudit.audit.locks import write_lock
from mmaudit.cli import swap
from mmaudit.cli.run import MADE_FROM_SCORES, REPORT_FILES, SCORE_FILES, Run
from mmaudit.cli.swap import complete_swaps, new_finetune, replacing, replacing_manifest, swap_finetune

OLD = {
    **{name: "old" for name in (*SCORE_FILES, "report.html", "report.json", "recovery.json")},
    "figures/gap.png": "old",
    "manifests/a.parquet": "old",
    "finetune/a/metrics.json": "old",
    "features/audio/0.arrow": "kept",
    "notes.txt": "kept",
}
NEW = dict.fromkeys(SCORE_FILES, "new")
ALL = (*SCORE_FILES, *REPORT_FILES, *MADE_FROM_SCORES)


class Killed(BaseException):
    """A kill, after which nothing is cleaned up."""


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def visible(folder: Path) -> dict[str, str]:
    return {name: text for name, text in content(folder).items() if not any(p[0] == "." for p in Path(name).parts)}


def replace_run(folder: Path) -> None:
    with write_lock(folder, command="mmaudit score") as lock, replacing(folder, ALL, lock=lock) as new:
        fill(new, NEW)


EXPECTED = {**{name: text for name, text in OLD.items() if text == "kept"}, **NEW}


def record_calls(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None) -> list[str]:
    """Record every rename and removal, and raise Killed in place of number `stop_after`."""
    names: list[str] = []
    rename, remove = Path.replace, shutil.rmtree

    def count(name: str) -> None:
        if stop_after is not None and len(names) >= stop_after:
            raise Killed
        names.append(name)

    def replace(path: Path, target: Path) -> Path:
        count(path.name)
        return rename(path, target)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        count(path.name)
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return names


def interruptions(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> Iterator[int]:
    """Kill `work` at each of its renames and removals in turn; yield after each kill, until `work` finishes."""
    for stop_after in range(100):
        with monkeypatch.context() as patch:
            record_calls(patch, stop_after=stop_after)
            try:
                work()
            except Killed:
                pass
            else:
                return
        yield stop_after
    raise AssertionError("work did not finish after 100 kills")


def test_swap_replaces_only_the_files_of_the_run(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    replace_run(tmp_path)
    assert content(tmp_path) == EXPECTED
    complete_swaps(tmp_path)
    assert content(tmp_path) == EXPECTED


def test_failed_swap_keeps_the_old_run(tmp_path: Path) -> None:
    fill(tmp_path, OLD)

    def fail() -> None:
        with write_lock(tmp_path, command="mmaudit score") as lock, replacing(tmp_path, ALL, lock=lock) as new:
            fill(new, NEW)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert content(tmp_path) == OLD


def test_killed_swap_leaves_the_old_or_the_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(1_000))
    folder = tmp_path / "first"

    def work() -> None:
        nonlocal folder
        folder = tmp_path / str(next(numbers))
        fill(folder, OLD)
        replace_run(folder)

    states = set()
    for _ in interruptions(monkeypatch, work):
        run = Run(folder)
        if run.is_scored():  # as read by code that ignores swaps
            assert visible(folder) in (OLD, EXPECTED)
        complete_swaps(folder)
        assert visible(folder) in (OLD, EXPECTED)
        states.add(visible(folder)["run.json"])
        replace_run(folder)  # the same command again
        assert content(folder) == EXPECTED
    assert states == {"old", "new"}
    assert content(folder) == EXPECTED


def test_completion_of_a_swap_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, OLD)
    with monkeypatch.context() as patch:
        for number in range(100):
            record_calls(patch, stop_after=number)
            with pytest.raises(Killed):
                replace_run(tmp_path)
            patch.undo()
            if (tmp_path / ".overwrite-committed").exists():
                break
    assert visible(tmp_path) == OLD
    for _ in interruptions(monkeypatch, lambda: complete_swaps(tmp_path)):
        assert not Run(tmp_path).is_scored() or visible(tmp_path) in (OLD, EXPECTED)
    assert content(tmp_path) == EXPECTED


def test_swap_that_cannot_be_completed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {**OLD, ".overwrite-committed/swap.json": '{"names": []}'})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(swap, "write_lock", refuse)
    with pytest.raises(RunError, match=r"was interrupted while it replaced the run, .*\(Read-only file system\)"):
        Run.open(tmp_path)


MANIFEST = ("manifests/a.parquet", "manifests/a.dropped.parquet", "manifests/a.balance.json")


def replace_manifest(folder: Path, name: str = "a") -> None:
    scope = f"manifests/{name}"
    with (
        write_lock(folder, scope, command="mmaudit split") as lock,
        replacing_manifest(folder, name, lock=lock) as new,
    ):
        fill(new, {Path(file).name.replace("a", name, 1): "new" for file in MANIFEST})


def test_killed_swap_leaves_the_old_or_the_new_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(1_000))
    folder = tmp_path / "first"
    old = {**OLD, **dict.fromkeys(MANIFEST, "old"), "manifests/b.parquet": "kept"}
    expected = {**old, **dict.fromkeys(MANIFEST, "new")}

    def work() -> None:
        nonlocal folder
        folder = tmp_path / str(next(numbers))
        fill(folder, old)
        replace_manifest(folder)

    states = set()
    for _ in interruptions(monkeypatch, work):
        if (folder / MANIFEST[0]).exists():
            assert visible(folder) in (old, expected)
        complete_swaps(folder)
        assert visible(folder) in (old, expected)
        states.add(visible(folder)[MANIFEST[0]])
        replace_manifest(folder)
        assert content(folder) == expected
    assert states == {"old", "new"}
    assert content(folder) == expected


def test_staged_files_of_killed_splits_are_removed(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {**OLD, "manifests/.overwrite-new-b/new/b.parquet": "half", "manifests/.overwrite-new-c/new/c.parquet": "half"},
    )
    with write_lock(tmp_path, "manifests/c", command="mmaudit split"):
        replace_manifest(tmp_path)
        assert {path.name for path in (tmp_path / "manifests").glob(".overwrite*")} == {".overwrite-new-c"}


OLD_TUNING = {"finetune/a/metrics.json": "old", "finetune/a/extra.json": "old", "finetune/b/metrics.json": "kept"}
NEW_TUNING = {"metrics.json": "new", "model.safetensors": "new"}


@pytest.mark.parametrize("before", [OLD_TUNING, {"finetune/b/metrics.json": "kept"}])
def test_finetune_is_replaced_when_the_new_one_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    numbers = iter(range(1_000))
    folder = tmp_path / "first"
    expected = {"finetune/b/metrics.json": "kept", **{f"finetune/a/{name}": "new" for name in NEW_TUNING}}

    def work() -> None:
        nonlocal folder
        folder = tmp_path / str(next(numbers))
        fill(folder, before)
        fill(new_finetune(folder, "a"), {"model.safetensors": "new"})
        swap_finetune(folder, "a")
        assert visible(folder) == before  # not yet
        fill(new_finetune(folder, "a"), NEW_TUNING)
        swap_finetune(folder, "a")

    for _ in interruptions(monkeypatch, work):
        files = visible(folder)
        assert files.get("finetune/a/metrics.json") != "new" or "finetune/a/extra.json" not in files
        finished = (new_finetune(folder, "a") / "metrics.json").exists()
        complete_swaps(folder)
        if finished or "finetune/a/model.safetensors" in files:
            assert content(folder) == expected
        else:
            assert visible(folder) == before
    assert content(folder) == expected


def test_locked_finetune_is_not_swapped(tmp_path: Path) -> None:
    fill(tmp_path, OLD_TUNING)
    fill(new_finetune(tmp_path, "a"), NEW_TUNING)
    with write_lock(tmp_path, "finetune/a", command="mmaudit finetune"):
        complete_swaps(tmp_path)
        assert visible(tmp_path) == OLD_TUNING
