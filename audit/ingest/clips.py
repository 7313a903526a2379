"""Clips: what do a download's lists say of each, and which stand there twice?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ..errors import DatasetError

PATH_SUFFIXES = ("_file_name", "_frames")  # of the columns that hold paths
Cell = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One row to be. `media` gives a path from the download's folder, several, or a text, for each media column.

    `more` holds columns that are no modality; `where` says which line named the clip.
    """

    id: str
    label: str | None
    media: Mapping[str, Cell]
    where: str
    group: str | None = None
    split: str | None = None
    more: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What an adapter found: a row for each clip that is listed, whether or not its media are there.

    Columns of `rows`: id, label, group and split where there are any, then the columns named by `media`: X_file_name
    holds a path, X_frames a folder or a list of folders, any other the medium itself. Paths start from the download's
    folder. `found` are the media that lie there; `official` is the number of clips in the dataset, where no list says.
    """

    rows: pa.Table
    media: tuple[str, ...]
    found: frozenset[str] = frozenset()
    official: int | None = None
    notes: tuple[str, ...] = ()


def list_clips(
    clips: Iterable[Clip], *, found: Iterable[str], official: int | None = None, notes: Sequence[str] = ()
) -> Listing:
    """Make rows of clips. A clip listed twice in the same words counts once; DatasetError where the words differ."""
    kept: dict[str, Clip] = {}
    repeated = 0
    for clip in clips:
        _check_inside(clip)
        first = kept.setdefault(clip.id, clip)
        if first is clip:
            continue
        if replace(clip, where=first.where) != first:
            raise DatasetError(
                f"clip {clip.id!r} is listed twice, differently: {first.where} and {clip.where}: keep one"
            )
        repeated += 1
    rows = list(kept.values())
    said = [f"{repeated:,} repeated lines count once"] if repeated else []
    return Listing(
        rows=_table(rows),
        media=tuple(rows[0].media) if rows else (),
        found=frozenset(found),
        official=official,
        notes=(*notes, *said),
    )


def _check_inside(clip: Clip) -> None:
    """Refuse a name in a list that would lead out of the download's folder."""
    for column, cell in clip.media.items():
        paths = [cell] if isinstance(cell, str) else cell or ()
        if column.endswith(PATH_SUFFIXES) and any(path.startswith("/") or ".." in path.split("/") for path in paths):
            raise DatasetError(f"{clip.where}: {paths[0]!r} leads out of the folder: mend the name there")


def _table(clips: Sequence[Clip]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "id": pa.array([clip.id for clip in clips], pa.string()),
        "label": pa.array([clip.label for clip in clips], pa.string()),
    }
    for name, values in (("group", [clip.group for clip in clips]), ("split", [clip.split for clip in clips])):
        if any(value is not None for value in values):
            columns[name] = pa.array(values, pa.string())
    if clips:
        columns |= {name: pa.array([clip.more[name] for clip in clips]) for name in clips[0].more}
        columns |= {name: pa.array([clip.media[name] for clip in clips]) for name in clips[0].media}
    return pa.table(columns)
