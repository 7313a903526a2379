"""Adapter of AVE: audio-visual events in parts of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from .clips import Clip, Listing, event_ids, list_clips, list_media, unexpected_folder
from .lists import Line, find_lists, read_list, skip_header, split_of
from .names import SPELLINGS, listed_name, match_media, video_of

_SETS = ("trainSet.txt", "valSet.txt", "testSet.txt")
_ALL = "Annotations.txt"
_LINE = "Category&VideoID&Quality&StartTime&EndTime"
_SEPARATORS = "&\t;,"  # some categories contain commas, some lists are csv


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of the lists: category and quality of an event, the video and its seconds there."""

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
    lines = [line for path in list_paths for line in _read_events(path)]
    files = list_media(folder, f"{prefix}AVE", kind="video")
    events = [parse_event(line) for line in lines]
    splits = [None if line.path.name == _ALL else split_of(line.path) for line in lines]
    labels_of_video = {event.video: (split or "", event.category) for event, split in zip(events, splits, strict=True)}
    matches = match_media(labels_of_video, files)
    ids = event_ids([event.video for event in events], [event.text for event in events])
    clips = [
        Clip(
            id=id_,
            label=event.category,
            group=video_of(event.video),
            split=split,
            extra_columns={"start_seconds": event.start, "end_seconds": event.end, "quality": event.quality},
            media={"video_file_name": matches.paths.get(event.video, f"{prefix}AVE/{event.video}.mp4")},
            where=line.where,
        )
        for line, event, split, id_ in zip(lines, events, splits, ids, strict=True)
    ]
    notes = _unlisted_notes(dataset_folder, set(events)) if split_lists else []
    spelling = f"files below {prefix}AVE/ called by VideoID ({SPELLINGS})"
    return list_clips(clips, media_files=files, notes=(*notes, *matches.notes), spelling=spelling)


def _read_events(path: Path) -> list[Line]:
    return skip_header(read_list(path, _SEPARATORS))


def parse_event(line: Line) -> Event:
    """Parse a line of the official lists; the video is called with or without an extension."""
    if len(line.fields) != 5 or not all(field.strip() for field in line.fields):
        raise line.error_expecting(_LINE)
    category, video, quality = (field.strip() for field in line.fields[:3])
    start, end = line.read_int(3, expected=_LINE), line.read_int(4, expected=_LINE)
    return Event(category=category, video=listed_name(video), quality=quality, start=start, end=end)


def _unlisted_notes(dataset_folder: Path, listed: set[Event]) -> list[str]:
    """Return a note with the number of events of Annotations.txt that are in no split list, if any."""
    paths = find_lists(dataset_folder, [_ALL])
    unlisted = {parse_event(line) for path in paths for line in _read_events(path)} - listed
    return [f"{len(unlisted):,} events of {_ALL} are in none of the lists read and have no row"] if unlisted else []
