"""Adapter of UCF-101: frames and optical flow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from .clips import Cell, Clip, Line, Listing, list_clips, list_subfolders, read_lines, split_of, unexpected_folder

_RGB, _FLOW = "jpegs_256", ("tvl1_flow/u", "tvl1_flow/v")
_LISTS = ("trainlist01.txt", "testlist01.txt")
_LINE = "CLASS/v_CLASS_gNN_cNN.avi, with the number of the class in a list of training clips"
_PATH = re.compile(r"(\w+)/(v_\w+_(g\d+)_c\d+)\.avi")


def read_ucf101(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read the frames and the optical flow of Feichtenhofer et al. (CVPR 2016) by the first official fold, or `lists`.

    The clips cut from one video are a group, CLASS_gNN. Frames are one folder per clip, the flow two, u and v.
    """
    list_folder = folder / "ucfTrainTestlist"
    list_paths = list(lists) or [list_folder / name for name in _LISTS]
    missing = [f"{path}/" for path in (_RGB, *_FLOW) if not (folder / path).is_dir()]
    required = (*list_paths, list_folder / "classInd.txt")
    missing += [f"ucfTrainTestlist/{path.name}" for path in required if not path.is_file()]
    if missing:
        raise _not_frames(folder, missing)
    classes = _read_classes(list_folder / "classInd.txt")
    clip_folders = {stream: list_subfolders(folder, stream) for stream in (_RGB, *_FLOW)}
    folder_of_clip = {stream: _index_by_name(paths) for stream, paths in clip_folders.items()}
    clips = [_clip(line, classes, folder_of_clip) for path in list_paths for line in read_lines(path, None)]
    return list_clips(clips, media_files=[path for paths in clip_folders.values() for path in paths])


def _not_frames(folder: Path, missing: Sequence[str]) -> DatasetError:
    has_videos = (folder / "UCF-101").is_dir() or next(folder.glob("*/*.avi"), None) is not None
    hint = "; the folder has the videos, from which frames and flow must be extracted first" if has_videos else ""
    return unexpected_folder(folder, "UCF-101 in frames and flow", missing=f"{', no '.join(missing)}{hint}")


def _read_classes(path: Path) -> dict[str, int]:
    classes: dict[str, int] = {}
    for line in read_lines(path, None):
        if len(line.fields) != 2:
            raise line.error_expecting("NUMBER CLASS such as 1 ApplyEyeMakeup")
        classes[line.fields[1]] = line.read_int(0, expected="NUMBER CLASS such as 1 ApplyEyeMakeup")
    return classes


def _index_by_name(paths: Iterable[str]) -> dict[str, str]:
    """Index folders by their lower-case name: the lists have v_HandStandPushups, the frames v_Handstand..."""
    return {PurePosixPath(path).name.lower(): path for path in paths}


def _clip(line: Line, classes: dict[str, int], folder_of_clip: dict[str, dict[str, str]]) -> Clip:
    match = _PATH.fullmatch(line.fields[0])
    if match is None or len(line.fields) > 2 or match[1] not in classes:
        raise line.error_expecting(_LINE)
    label, name, video = match.groups()
    if len(line.fields) == 2 and line.read_int(1, expected=_LINE) != classes[label]:
        raise line.error_expecting(f"the class {label}, which is number {classes[label]} in classInd.txt")
    rgb, u, v = (folder_of_clip[stream].get(name.lower(), f"{stream}/{name}") for stream in (_RGB, *_FLOW))
    media: dict[str, Cell] = {"rgb_frames": rgb, "flow_frames": (u, v)}
    group, split = f"{label}_{video}", split_of(line.path)
    return Clip(id=name, label=label, group=group, split=split, media=media, where=line.where)
