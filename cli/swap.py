"""Atomic replacement of the files of a run folder.

A swap is a folder next to the files it replaces. One rename commits it: a swap interrupted before the rename is
discarded, one interrupted after it is completed by the next command that opens the run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..audit.errors import RunError
from ..audit.locks import Lock, find_holders, write_lock
from ..audit.storage import flush, read_json, write_json

_STAGED, _COMMITTED, _CLEARED = ".overwrite-new", ".overwrite-committed", ".overwrite-cleared"
_JOURNAL = "swap.json"
_WAIT_SECONDS = 60.0


@contextmanager
def replacing(folder: Path, names: Sequence[str], *, lock: Lock, key: str = "") -> Iterator[Path]:
    """Yield an empty folder for new files; at the end they replace the files of these names in `folder`.

    Names without a new file are removed. The first name is removed first and restored last: the others are not read
    without it. Swaps of different keys (parts of a file name) can run concurrently. The caller holds the lock.
    """
    discard(folder, key)
    staged = folder / f"{_STAGED}{key}"
    for part in ("new", "old"):
        (staged / part).mkdir(parents=True)
    try:
        yield staged / "new"
        write_json({"names": list(names)}, staged / _JOURNAL)
        lock.check()
        flush(staged)
        staged.replace(folder / f"{_COMMITTED}{key}")
    except BaseException:
        discard(folder, key)
        raise
    flush(folder)
    _complete(folder, key)


def discard(folder: Path, key: str = "") -> None:
    """Remove staged files that were not committed."""
    shutil.rmtree(folder / f"{_STAGED}{key}", ignore_errors=True)


@contextmanager
def replacing_manifest(folder: Path, name: str, *, lock: Lock) -> Iterator[Path]:
    """Yield an empty folder for the files of a manifest; at the end they replace those of its name in a run.

    The caller holds the lock on its name. Files of other manifests staged by killed processes are removed.
    """
    manifests = folder / "manifests"
    for path in manifests.glob(f"{_STAGED}-*"):
        if not find_holders(folder, f"manifests/{path.name.removeprefix(f'{_STAGED}-')}"):
            shutil.rmtree(path, ignore_errors=True)
    names = [f"{name}{end}" for end in (".parquet", ".dropped.parquet", ".balance.json")]
    with replacing(manifests, names, lock=lock, key=f"-{name}") as staged:
        yield staged


def complete_swaps(folder: Path) -> None:
    """Complete swaps of a run that were committed and then interrupted; wait for a process that is completing them.

    Raises RunError if a swap cannot be completed: the folder then holds neither the old run nor the new one.
    """
    _complete_pending(folder, folder, "", scope="")
    manifests = folder / "manifests"
    for prefix in (f"{_COMMITTED}-", f"{_CLEARED}-"):
        for name in sorted(path.name.removeprefix(prefix) for path in manifests.glob(f"{prefix}*")):
            _complete_pending(folder, manifests, f"-{name}", scope=f"manifests/{name}")
    finished = [path.parent.name for path in folder.glob("finetune/.new/*/metrics.json")]
    for name in sorted({*finished, *(path.name for path in folder.glob("finetune/.old/*"))}):
        with suppress(RunError, OSError), write_lock(folder, f"finetune/{name}", command="mmaudit"):
            swap_finetune(folder, name)


def new_finetune(folder: Path, name: str) -> Path:
    """Return the folder in which the replacement of a fine-tuning is trained."""
    return folder / "finetune" / ".new" / name


def swap_finetune(folder: Path, name: str) -> None:
    """Replace a fine-tuning by the new one if that is finished, that is, if it has metrics.json.

    The caller holds the lock on its name.
    """
    new, target = new_finetune(folder, name), folder / "finetune" / name
    old = folder / "finetune" / ".old" / name
    if (new / "metrics.json").exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(exist_ok=True)
            target.replace(old)
        new.replace(target)
        flush(target.parent)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    for parent in (new.parent, old.parent):
        with suppress(OSError):
            parent.rmdir()


def _complete_pending(run: Path, folder: Path, key: str, *, scope: str) -> None:
    """Complete a committed swap in `folder`, holding the lock on the files that it replaces in the run."""
    end = time.monotonic() + _WAIT_SECONDS
    while (folder / f"{_COMMITTED}{key}").exists() or (folder / f"{_CLEARED}{key}").exists():
        try:
            with write_lock(run, scope, command="mmaudit"):
                _complete(folder, key)
        except RunError:
            if time.monotonic() > end:
                raise
        except OSError as error:
            raise RunError(
                f"{folder}: a command was interrupted while it replaced {scope or 'the run'}, and that cannot be "
                f"completed ({error.strerror}): run any mmaudit command with permission to write there"
            ) from error


def _complete(folder: Path, key: str) -> None:
    """Move the old files away, then the new ones to their paths; either step can be interrupted."""
    committed, cleared = folder / f"{_COMMITTED}{key}", folder / f"{_CLEARED}{key}"
    if committed.exists():
        for name in _names_in(committed):
            if (folder / name).exists():
                (folder / name).replace(committed / "old" / name)
        flush(folder)
        committed.replace(cleared)
    if cleared.exists():
        for name in reversed(_names_in(cleared)):
            if (cleared / "new" / name).exists():
                (cleared / "new" / name).replace(folder / name)
                flush(folder)
        shutil.rmtree(cleared)


def _names_in(swap: Path) -> list[str]:
    """Read the names that a swap replaces; none if only the removal of the swap itself is left."""
    journal = swap / _JOURNAL
    return [str(name) for name in read_json(journal, error=RunError)["names"]] if journal.exists() else []
