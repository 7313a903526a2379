"""Adapter of UCF-101: frames and optical flow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DatasetError
from .clips import Cell, Clip, Listing, list_clips, list_frame_folders, unexpected_folder
from .lists import Line, read_list, split_of
from .names import clip_stem, match_media

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
    lines = [line for path in list_paths for line in read_list(path, " ,\t")]
    names = [_parse_line(line, classes)[1].lower() for line in lines]
    streams = {stream: list_frame_folders(folder, stream) for stream in (_RGB, *_FLOW)}
    folders_of_name: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    matches = {stream: match_media(folders_of_name, paths, stem_of=_lower_stem) for stream, paths in streams.items()}
    folder_of_clip = {stream: match.paths for stream, match in matches.items()}
    return list_clips(
        [_clip(line, classes, folder_of_clip) for line in lines],
        media_files=[path for paths in streams.values() for path in paths],
        notes=[note for match in matches.values() for note in match.notes],
        spelling=f"folders of pictures v_CLASS_gNN_cNN in {_RGB}/, {_FLOW[0]}/ and {_FLOW[1]}/",
    )


def _not_frames(folder: Path, missing: Sequence[str]) -> DatasetError:
    has_videos = (folder / "UCF-101").is_dir() or next(folder.glob("*/*.avi"), None) is not None
    hint = "; the folder has the videos, from which frames and flow must be extracted first" if has_videos else ""
    return unexpected_folder(folder, "UCF-101 in frames and flow", missing=f"{', no '.join(missing)}{hint}")


def _read_classes(path: Path) -> dict[str, int]:
    classes: dict[str, int] = {}
    for line in read_list(path, " ,\t"):
        if len(line.fields) != 2:
            raise line.error_expecting("NUMBER CLASS such as 1 ApplyEyeMakeup")
        classes[line.fields[1]] = line.read_int(0, expected="NUMBER CLASS such as 1 ApplyEyeMakeup")
    return classes


def _lower_stem(path: str) -> str:
    """Return a folder's name in lower case: the lists have v_HandStandPushups, the frames v_Handstand..."""
    return clip_stem(path).lower()


def _parse_line(line: Line, classes: Mapping[str, int]) -> tuple[str, str, str]:
    """Return the class, the name of the clip and the video of a line."""
    match = _PATH.fullmatch(line.fields[0].replace("\\", "/"))
    if match is None or len(line.fields) > 2 or match[1] not in classes:
        raise line.error_expecting(_LINE)
    if len(line.fields) == 2 and line.read_int(1, expected=_LINE) != classes[match[1]]:
        raise line.error_expecting(f"the class {match[1]}, which is number {classes[match[1]]} in classInd.txt")
    return match[1], match[2], match[3]


def _clip(line: Line, classes: Mapping[str, int], folder_of_clip: Mapping[str, Mapping[str, str]]) -> Clip:
    label, name, video = _parse_line(line, classes)
    rgb, u, v = (folder_of_clip[stream].get(name.lower(), f"{stream}/{name}") for stream in (_RGB, *_FLOW))
    media: dict[str, Cell] = {"rgb_frames": rgb, "flow_frames": (u, v)}
    group, split = f"{label}_{video}", split_of(line.path)
    return Clip(id=name, label=label, group=group, split=split, media=media, where=line.where)
