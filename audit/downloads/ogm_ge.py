"""Adapter of the lists of the OGM-GE code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from .ave import parse_event
from .clips import Clip, Listing, event_ids, list_clips, list_frame_folders, list_media, unexpected_folder
from .cremad import actor_of, parse_clip
from .lists import Line, find_lists, read_list, skip_header, split_of
from .names import SPELLINGS, listed_name, match_media, video_of

_NAMES = (
    *(f"{name}.{suffix}" for name in ("train", "val", "valid", "test") for suffix in ("csv", "txt", "tsv")),
    *(f"{name}Set.txt" for name in ("train", "val", "test")),
)
_SUBFOLDERS = ("", "annotations", "data")
_AUDIO_FOLDERS = ("AudioWAV", "audio")
_FRAMES_FOLDERS = ("Image-*-FPS*", "visual/Image-*-FPS*", "visual")
_SPLIT_FOLDERS = ("train", "val", "valid", "test")
_SEPARATORS = "&,\t; "
_LINE = (
    "CLIP,LABEL, LABEL,CLIP next to a stat file of the classes, CLIP,SECONDS,LABEL, or "
    "CATEGORY&VIDEO&QUALITY&START&END (separated by one of , & ; tab or blank; by blanks only if no class contains one)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folders:
    """Folders of sound and of frames, relative to the download's folder, and notes on those that are left out."""

    audio: tuple[str, ...]
    frames: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_ogm_ge(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read train.csv, test.csv, val.csv (or my_train.txt ...) with the wav files and frame folders that they list.

    The code of Peng et al. (CVPR 2022) and its successors write CLIP,LABEL for CREMA-D, LABEL,CLIP for AVE and
    CLIP,10,LABEL for Kinetics-Sounds, or keep the lists of AVE; stat.csv has one class per line. Clips with names as in
    CREMA-D are grouped by actor, those with YouTube names by video. A clip of AVE may contain several events: its ids
    include the event, and the clip is the group.
    """
    list_paths = list(lists) or _find_lists(folder)
    folders = _find_folders(folder)
    if not list_paths or folders is None:
        raise _unexpected_folder(folder, list_paths)
    classes = _read_classes(folder, list_paths)
    lines = [line for path in list_paths for line in skip_header(read_list(path, _SEPARATORS))]
    audio = [path for name in folders.audio for path in list_media(folder, name, kind="audio")]
    frames = [path for name in folders.frames for path in list_frame_folders(folder, name)]
    pairs = [_parse_line(line, classes) for line in lines]
    ids = event_ids([name for name, _ in pairs], [label for _, label in pairs])
    splits = [split_of(line.path) for line in lines]
    folders_of_name = {name: (split, label) for (name, label), split in zip(pairs, splits, strict=True)}
    audio_matches = match_media(folders_of_name, audio)
    frames_matches = match_media(folders_of_name, frames)
    groups, clips = _groups([name for name, _ in pairs], ids), []
    for line, (name, label), id_, group, split in zip(lines, pairs, ids, groups, splits, strict=True):
        media = {
            "audio_file_name": audio_matches.paths.get(name, f"{folders.audio[0]}/{name}.wav"),
            "visual_frames": frames_matches.paths.get(name, f"{folders.frames[0]}/{name}"),
        }
        clips.append(Clip(id=id_, label=label, group=group, split=split, media=media, where=line.where))
    return list_clips(
        clips,
        media_files=[*audio, *frames],
        notes=(*folders.notes, *audio_matches.notes, *frames_matches.notes),
        spelling=f"{folders.audio[0]}/CLIP.wav and a folder {folders.frames[0]}/CLIP, where CLIP is as in the list, "
        f"or for clips of YouTube {SPELLINGS}",
    )


def _find_lists(folder: Path) -> list[Path]:
    standard_lists = find_lists(folder, _NAMES, subfolders=_SUBFOLDERS)
    prefixed_lists = find_lists(folder, [f"my_{name}" for name in _NAMES], subfolders=_SUBFOLDERS)
    if standard_lists and prefixed_lists:
        names = f"{prefixed_lists[0].name} and {standard_lists[0].name}"
        raise DatasetError(f"{folder} contains both {names}: pass the lists to read with --list")
    return standard_lists or prefixed_lists


def _find_folders(folder: Path) -> _Folders | None:
    """Return the folders of sound and frames, or those of splits with both; None if there are neither."""
    audio = [name for name in _AUDIO_FOLDERS if (folder / name).is_dir()]
    paths = [path for pattern in _FRAMES_FOLDERS for path in sorted(folder.glob(pattern)) if path.is_dir()]
    frames = [path.relative_to(folder).as_posix() for path in paths]
    if audio and frames:
        left_out = [*audio[1:], *(name for name in frames[1:] if not frames[0].startswith(f"{name}/"))]
        notes = [f"{', '.join(left_out)} left out: {audio[0]} and {frames[0]} are read"] if left_out else []
        return _Folders(audio=(audio[0],), frames=(frames[0],), notes=tuple(notes))
    splits = tuple(name for name in _SPLIT_FOLDERS if list_media(folder, name, kind="audio"))
    return _Folders(audio=splits, frames=splits) if splits else None


def _unexpected_folder(folder: Path, lists: Sequence[Path]) -> DatasetError:
    missing = "train.csv or my_train.txt" if not lists else "AudioWAV/ or audio/ next to Image-01-FPS/ or visual/"
    if lists and (folder / "audio_spec").is_dir():
        missing += " (audio_spec/ contains pickled spectrograms, which are never read)"
    return unexpected_folder(folder, "a folder of the OGM-GE code", missing=missing)


def _read_classes(folder: Path, lists: Sequence[Path]) -> set[str]:
    """Read the list of classes, if any, next to the lists or in the folder."""
    for list_folder in (lists[0].parent, folder):
        for path in find_lists(list_folder, ("stat.csv", "stat.txt")):
            return {name.strip() for line in read_list(path, ",\t;") for name in (line.fields[0], line.text)}
    return set()


def _parse_line(line: Line, classes: set[str]) -> tuple[str, str]:
    """Return the clip and the label of a line, which may be in either order."""
    fields = [field.strip() for field in line.fields]
    if len(fields) == 5:
        event = parse_event(line)
        return event.video, event.category
    if len(fields) not in (2, 3) or not all(fields) or (len(fields) == 3 and not fields[1].isdigit()):
        raise line.error_expecting(_LINE)
    name, label = fields[0], fields[-1]
    if len(fields) == 2 and label not in classes and name in classes:
        name, label = label, name
    elif len(fields) == 2 and classes and label not in classes:
        raise line.error_expecting(f"a clip with one of the {len(classes)} classes of the stat file")
    return listed_name(name), label


def _groups(names: Sequence[str], ids: Sequence[str]) -> list[str] | list[None]:
    """Return groups by actor or by video, or by clip if one has several labels; None where each clip is its own."""
    groups = [actor_of(clip) if (clip := parse_clip(name)) else video_of(name) for name in names]
    return groups if groups != list(names) or list(ids) != list(names) else [None] * len(names)
