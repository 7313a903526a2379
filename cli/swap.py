"""Replacement of a run, or of a fine-tuning, as a whole: it is written aside, and swapped in at the end.

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
from ..audit.locks import Lock, write_lock
from ..audit.storage import flush, read_json, write_json

_STAGED, _COMMITTED, _CLEARED = ".overwrite", ".overwrite-committed", ".overwrite-cleared"
_JOURNAL = "swap.json"
_RECORD = "run.json"  # removed first and put back last: without it nothing else of a run is read
_WAIT_SECONDS = 60.0


@contextmanager
def replacing(folder: Path, names: Sequence[str], *, lock: Lock) -> Iterator[Path]:
    """Yield an empty folder for the new files of a run; at the end they take the place of what has these names.

    Names of which there is no new file are removed. The caller holds the lock on the whole run.
    """
    discard(folder)
    staged = folder / _STAGED
    for part in ("new", "old"):
        (staged / part).mkdir(parents=True)
    try:
        yield staged / "new"
        write_json({"names": [_RECORD, *(name for name in names if name != _RECORD)]}, staged / _JOURNAL)
        lock.check()
        flush(staged)
        staged.replace(folder / _COMMITTED)
    except BaseException:
        discard(folder)
        raise
    flush(folder)
    _complete(folder)


def discard(folder: Path) -> None:
    """Remove what was written aside and not committed."""
    shutil.rmtree(folder / _STAGED, ignore_errors=True)


def complete_swaps(folder: Path) -> None:
    """Complete what was committed in a run and then interrupted; wait for a writer that does so.

    Raises RunError where that cannot be done: what lies there then is neither the old run nor the new one.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while _is_pending(folder):
        try:
            with write_lock(folder, command="mmaudit"):
                _complete(folder)
        except RunError:
            if time.monotonic() > end:
                raise
        except OSError as error:
            raise RunError(
                f"{folder}: a score --overwrite was interrupted while it replaced the run, and that cannot be "
                f"completed here ({error.strerror}): run any mmaudit command that may write there"
            ) from error
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


def _is_pending(folder: Path) -> bool:
    return (folder / _COMMITTED).exists() or (folder / _CLEARED).exists()


def _complete(folder: Path) -> None:
    """Move the old files out of the way, then the new ones into their place; either step can be interrupted."""
    committed, cleared = folder / _COMMITTED, folder / _CLEARED
    if committed.exists():
        for name in read_json(committed / _JOURNAL, error=RunError)["names"]:
            if (folder / name).exists():
                (folder / name).replace(committed / "old" / name)
        flush(folder)
        committed.replace(cleared)
    new = cleared / "new"
    for path in sorted(new.iterdir(), key=lambda path: path.name == _RECORD) if new.exists() else ():
        path.replace(folder / path.name)
        flush(folder)
    shutil.rmtree(cleared)
