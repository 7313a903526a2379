"""Adapter of AVE: audio-visual events in parts of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from .clips import (
    Clip,
    Line,
    Listing,
    event_ids,
    find_lists,
    index_by_stem,
    list_clips,
    list_media,
    read_lines,
    split_of,
    unexpected_folder,
)

_SETS = ("trainSet.txt", "valSet.txt", "testSet.txt")
_ALL = "Annotations.txt"
_HEADER = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
_LINE = "Category&VideoID&Quality&StartTime&EndTime"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    category: str
    video: str
    quality: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """Category and time, by which the events of a video differ."""
        return f"{self.category}:{self.start}-{self.end}"


def read_ave(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read AVE/*.mp4 by trainSet.txt, valSet.txt and testSet.txt, or without a split by Annotations.txt alone.

    A video may contain several events (4,143 events in fewer videos): each event is a row, the video is the group, and
    the id of such an event includes the event. Source: Tian et al., ECCV 2018.
    """
    prefix = "AVE_Dataset/" if (folder / "AVE_Dataset").is_dir() else ""
    dataset_folder = folder / prefix
    split_lists = find_lists(dataset_folder, _SETS)
    list_paths = list(lists) or split_lists or find_lists(dataset_folder, [_ALL])
    if not (dataset_folder / "AVE").is_dir() or not list_paths:
        missing = "AVE/ with the clips" if list_paths else f"list, neither {', '.join(_SETS)} nor {_ALL}"
        raise unexpected_folder(folder, "AVE", missing=missing)
    if not lists and split_lists and len(split_lists) < len(_SETS):
        missing_lists = [name for name in _SETS if name not in {path.name for path in split_lists}]
        raise DatasetError(
            f"{dataset_folder} contains {split_lists[0].name} but no {missing_lists[0]}: "
            "pass the lists to read with --list"
        )
    lines = [(line, _event(line)) for path in list_paths for line in read_lines(path, "&") if not _is_header(line)]
    files = list_media(folder, f"{prefix}AVE", kind="video")
    path_of_video = index_by_stem(files)
    events = [event for _, event in lines]
    ids = event_ids([event.video for event in events], [event.text for event in events])
    clips = [
        Clip(
            id=id_,
            label=event.category,
            group=event.video,
            split=None if line.path.name == _ALL else split_of(line.path),
            extra_columns={"start_seconds": event.start, "end_seconds": event.end, "quality": event.quality},
            media={"video_file_name": path_of_video.get(event.video, f"{prefix}AVE/{event.video}.mp4")},
            where=line.where,
        )
        for (line, event), id_ in zip(lines, ids, strict=True)
    ]
    notes = _unlisted_notes(dataset_folder, set(events)) if split_lists else ()
    return list_clips(clips, media_files=files, notes=notes)


def _is_header(line: Line) -> bool:
    return line.number == 1 and line.fields == _HEADER


def _event(line: Line) -> _Event:
    if len(line.fields) != 5 or not all(field.strip() for field in line.fields):
        raise line.error_expecting(_LINE)
    category, video, quality = line.fields[:3]
    start, end = line.read_int(3, expected=_LINE), line.read_int(4, expected=_LINE)
    return _Event(category=category, video=video, quality=quality, start=start, end=end)


def _unlisted_notes(dataset_folder: Path, listed: set[_Event]) -> list[str]:
    """Return a note with the number of events of Annotations.txt that are in no split list, if any."""
    paths = find_lists(dataset_folder, [_ALL])
    unlisted = {_event(line) for path in paths for line in read_lines(path, "&") if not _is_header(line)} - listed
    return [f"{len(unlisted):,} events of {_ALL} are in none of the lists read and have no row"] if unlisted else []
