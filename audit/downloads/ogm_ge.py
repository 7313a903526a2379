"""Adapter of the lists of the OGM-GE code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

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
    list_subfolders,
    read_csv,
    split_of,
    unexpected_folder,
)
from .cremad import actor_of, parse_clip

_NAMES = tuple(f"{name}.{suffix}" for name in ("train", "val", "valid", "test") for suffix in ("csv", "txt"))
_SUBFOLDERS = ("", "annotations", "data")
_AUDIO_FOLDERS = ("AudioWAV", "audio")
_FRAMES_FOLDERS = ("Image-*-FPS", "visual/Image-*-FPS", "visual")
_LINE = "CLIP,LABEL, LABEL,CLIP next to a stat file of the classes, or CLIP,SECONDS,LABEL"
_YOUTUBE = re.compile(r"(.{11})_\d+")


def read_ogm_ge(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read train.csv, test.csv, val.csv (or my_train.txt ...) with the wav files and frame folders that they list.

    The code of Peng et al. (CVPR 2022) and its successors write CLIP,LABEL for CREMA-D, LABEL,CLIP for AVE and
    CLIP,10,LABEL for Kinetics-Sounds; stat.csv has one class per line. Clips with names as in CREMA-D are grouped by
    actor, those with YouTube names by video. A clip of AVE may contain several events: its ids include the event, and
    the clip is the group.
    """
    list_paths = list(lists) or _find_lists(folder)
    audio_folder = next((name for name in _AUDIO_FOLDERS if (folder / name).is_dir()), None)
    frames_paths = (path for pattern in _FRAMES_FOLDERS for path in sorted(folder.glob(pattern)))
    frames_folder = next((path for path in frames_paths if path.is_dir()), None)
    if not list_paths or audio_folder is None or frames_folder is None:
        raise _unexpected_folder(folder, list_paths)
    classes = _read_classes(folder, list_paths)
    lines = [line for path in list_paths for line in read_csv(path)]
    audio = list_media(folder, audio_folder, kind="audio")
    frames_path = frames_folder.relative_to(folder).as_posix()
    frames = list_subfolders(folder, frames_path)
    audio_of_clip = index_by_stem(audio)
    frames_of_clip = {PurePosixPath(path).name.removesuffix(".mp4"): path for path in frames}
    pairs = [_parse_line(line, classes) for line in lines]
    ids = event_ids([name for name, _ in pairs], [label for _, label in pairs])
    groups, clips = _groups([name for name, _ in pairs], ids), []
    for line, (name, label), id_, group in zip(lines, pairs, ids, groups, strict=True):
        media = {
            "audio_file_name": audio_of_clip.get(name, f"{audio_folder}/{name}.wav"),
            "visual_frames": frames_of_clip.get(name, f"{frames_path}/{name}"),
        }
        split = split_of(line.path)
        clips.append(Clip(id=id_, label=label, group=group, split=split, media=media, where=line.where))
    return list_clips(clips, media_files=[*audio, *frames])


def _find_lists(folder: Path) -> list[Path]:
    standard_lists = find_lists(folder, _NAMES, subfolders=_SUBFOLDERS)
    prefixed_lists = find_lists(folder, [f"my_{name}" for name in _NAMES], subfolders=_SUBFOLDERS)
    if standard_lists and prefixed_lists:
        names = f"{prefixed_lists[0].name} and {standard_lists[0].name}"
        raise DatasetError(f"{folder} contains both {names}: pass the lists to read with --list")
    return standard_lists or prefixed_lists


def _unexpected_folder(folder: Path, lists: Sequence[Path]) -> DatasetError:
    missing = "train.csv or my_train.txt" if not lists else "AudioWAV/ or audio/ next to Image-01-FPS/ or visual/"
    if lists and (folder / "audio_spec").is_dir():
        missing += " (audio_spec/ contains pickled spectrograms, which are never read)"
    return unexpected_folder(folder, "a folder of the OGM-GE code", missing=missing)


def _read_classes(folder: Path, lists: Sequence[Path]) -> set[str]:
    """Read the list of classes, if any, next to the lists or in the folder."""
    for list_folder in (lists[0].parent, folder):
        for path in find_lists(list_folder, ("stat.csv", "stat.txt")):
            return {line.fields[0].strip() for line in read_csv(path)}
    return set()


def _parse_line(line: Line, classes: set[str]) -> tuple[str, str]:
    """Return the clip and the label of a line, which may be in either order."""
    fields = [field.strip() for field in line.fields]
    if len(fields) not in (2, 3) or not all(fields) or (len(fields) == 3 and not fields[1].isdigit()):
        raise line.error_expecting(_LINE)
    name, label = fields[0], fields[-1]
    if len(fields) == 2 and label not in classes and name in classes:
        return label, name
    if len(fields) == 2 and classes and label not in classes:
        raise line.error_expecting(f"a clip with one of the {len(classes)} classes of the stat file")
    return name, label


def _groups(names: Sequence[str], ids: Sequence[str]) -> list[str] | list[None]:
    """Return groups by actor, by video, or by clip if one has several labels; None where there are none."""
    if all(parse_clip(name) for name in names):
        return [actor_of(name) for name in names]
    matches = [_YOUTUBE.fullmatch(name) for name in names]
    if all(matches):
        return [match[1] for match in matches if match]
    return list(names) if list(ids) != list(names) else [None] * len(names)
