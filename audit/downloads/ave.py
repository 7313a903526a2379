"""AVE: events that are heard and seen in parts of videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from .clips import Clip, Line, Listing, by_stem, find_lists, list_clips, media_below, read_lines, split_of, wrong_folder

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


def read_ave(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read AVE/*.mp4 by trainSet.txt, valSet.txt and testSet.txt, or without a split by Annotations.txt alone.

    A video may hold several events (4,143 events stand in fewer videos): each has its row, the video is the group,
    and the id of such an event names the event too. Source: Tian et al., ECCV 2018.
    """
    base = "AVE_Dataset/" if (folder / "AVE_Dataset").is_dir() else ""
    home = folder / base
    sets = find_lists(home, _SETS)
    found_lists = list(lists) or sets or find_lists(home, [_ALL])
    if not (home / "AVE").is_dir() or not found_lists:
        lacking = "AVE/ with the clips" if found_lists else f"list, neither {', '.join(_SETS)} nor {_ALL}"
        raise wrong_folder(folder, "AVE", lacking=lacking)
    if not lists and sets and len(sets) < len(_SETS):
        absent = [name for name in _SETS if name not in {path.name for path in sets}]
        raise DatasetError(f"{home} holds {sets[0].name} but no {absent[0]}: name the lists you mean with --list")
    lines = [(line, _event(line)) for path in found_lists for line in read_lines(path, "&") if not _is_header(line)]
    files = media_below(folder, f"{base}AVE", kind="video")
    there = by_stem(files)
    count = Counter(event.video for event in {event for _, event in lines})
    clips = [
        _clip(line, event, path=there.get(event.video, f"{base}AVE/{event.video}.mp4"), alone=count[event.video] == 1)
        for line, event in lines
    ]
    return list_clips(clips, found=files, notes=_left_out(home, {event for _, event in lines}) if sets else ())


def _is_header(line: Line) -> bool:
    return line.number == 1 and line.fields == _HEADER


def _event(line: Line) -> _Event:
    if len(line.fields) != 5 or not all(field.strip() for field in line.fields):
        raise line.wrong(_LINE)
    category, video, quality = line.fields[:3]
    start, end = line.number_at(3, expected=_LINE), line.number_at(4, expected=_LINE)
    return _Event(category=category, video=video, quality=quality, start=start, end=end)


def _clip(line: Line, event: _Event, *, path: str, alone: bool) -> Clip:
    return Clip(
        id=event.video if alone else f"{event.video}:{event.category}:{event.start}-{event.end}",
        label=event.category,
        group=event.video,
        split=None if line.path.name == _ALL else split_of(line.path),
        more={"start_seconds": event.start, "end_seconds": event.end, "quality": event.quality},
        media={"video_file_name": path},
        where=line.where,
    )


def _left_out(home: Path, listed: set[_Event]) -> list[str]:
    """Count the events of Annotations.txt that no set names."""
    lines = [line for path in find_lists(home, [_ALL]) for line in read_lines(path, "&") if not _is_header(line)]
    left = {_event(line) for line in lines} - listed
    return [f"{len(left):,} events of {_ALL} are in none of the lists read, and have no row"] if left else []
