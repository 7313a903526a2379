"""Replacement of a run, a manifest or a fine-tuning as a whole.

A swap is a folder beside what it replaces. One rename commits it: what is interrupted before is discarded, what is
interrupted after is completed by the next command that opens the run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..audit.errors import RunError
from ..audit.locks import Lock, holders_of, write_lock
from ..audit.storage import flush, read_json, write_json

_STAGED, _COMMITTED, _CLEARED = ".overwrite-new", ".overwrite-committed", ".overwrite-cleared"
_JOURNAL = "swap.json"
_WAIT_SECONDS = 60.0


@contextmanager
def replacing(folder: Path, names: Sequence[str], *, lock: Lock, key: str = "") -> Iterator[Path]:
    """Yield an empty folder for new files; at the end they take the place of what has these names in `folder`.

    Names of which there is no new file are removed. The first name leaves first and comes back last: without it the
    others are not read. Swaps of different keys, parts of a file name, go side by side. The caller holds the lock.
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
    """Remove what was written aside and not committed."""
    shutil.rmtree(folder / f"{_STAGED}{key}", ignore_errors=True)


@contextmanager
def replacing_manifest(folder: Path, name: str, *, lock: Lock) -> Iterator[Path]:
    """Yield an empty folder for the files of a manifest, which replace those of its name in a run at the end.

    The caller holds the lock on its name. What killed processes wrote aside of other manifests is removed.
    """
    manifests = folder / "manifests"
    for path in manifests.glob(f"{_STAGED}-*"):
        if not holders_of(folder, f"manifests/{path.name.removeprefix(f'{_STAGED}-')}"):
            shutil.rmtree(path, ignore_errors=True)
    names = [f"{name}{end}" for end in (".parquet", ".dropped.parquet", ".balance.json")]
    with replacing(manifests, names, lock=lock, key=f"-{name}") as staged:
        yield staged


def complete_swaps(folder: Path) -> None:
    """Complete what was committed in a run and then interrupted; wait for a writer that does so.

    Raises RunError where that cannot be done: what lies there then is neither the old run nor the new one.
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
    """Return the folder in which a fine-tuning is trained that replaces another one."""
    return folder / "finetune" / ".new" / name


def swap_finetune(folder: Path, name: str) -> None:
    """Put a fine-tuning that was trained aside in the place of the old one, if it is finished: if it has metrics.json.

    The caller holds the lock on its name.
    """
    new, place = new_finetune(folder, name), folder / "finetune" / name
    old = folder / "finetune" / ".old" / name
    if (new / "metrics.json").exists():
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(exist_ok=True)
            place.replace(old)
        new.replace(place)
        flush(place.parent)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
    for parent in (new.parent, old.parent):
        with suppress(OSError):
            parent.rmdir()


def _complete_pending(run: Path, folder: Path, key: str, *, scope: str) -> None:
    """Complete a committed swap in `folder`, under the lock on what it replaces in the run."""
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
                f"completed here ({error.strerror}): run any mmaudit command that may write there"
            ) from error


def _complete(folder: Path, key: str) -> None:
    """Move the old files out of the way, then the new ones into their place; either step can be interrupted."""
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
    """Read which names a swap replaces; none where all is done but the removal of the swap itself."""
    journal = swap / _JOURNAL
    return [str(name) for name in read_json(journal, error=RunError)["names"]] if journal.exists() else []
