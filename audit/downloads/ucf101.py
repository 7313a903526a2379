"""UCF-101: frames and optical flow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from .clips import Clip, Line, Listing, folders_in, list_clips, read_lines, split_of, wrong_folder

_RGB, _FLOW = "jpegs_256", ("tvl1_flow/u", "tvl1_flow/v")
_LISTS = ("trainlist01.txt", "testlist01.txt")
_LINE = "CLASS/v_CLASS_gNN_cNN.avi, with the number of the class in a list of training clips"
_PATH = re.compile(r"(\w+)/(v_\w+_(g\d+)_c\d+)\.avi")


def read_ucf101(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read the frames and the optical flow of Feichtenhofer et al. (CVPR 2016) by the first official fold, or `lists`.

    The clips cut from one video are a group, CLASS_gNN. Frames are a folder; the flow is a pair of them, u and v.
    """
    home = folder / "ucfTrainTestlist"
    found_lists = list(lists) or [home / name for name in _LISTS]
    absent = [f"{path}/" for path in (_RGB, *_FLOW) if not (folder / path).is_dir()]
    absent += [f"ucfTrainTestlist/{path.name}" for path in (*found_lists, home / "classInd.txt") if not path.is_file()]
    if absent:
        raise _not_frames(folder, absent)
    classes = _read_classes(home / "classInd.txt")
    found = {place: folders_in(folder, place) for place in (_RGB, *_FLOW)}
    known = {place: _by_name(paths) for place, paths in found.items()}
    clips = [_clip(line, classes, known) for path in found_lists for line in read_lines(path, None)]
    return list_clips(clips, found=[path for paths in found.values() for path in paths])


def _not_frames(folder: Path, absent: Sequence[str]) -> DatasetError:
    films = (folder / "UCF-101").is_dir() or next(folder.glob("*/*.avi"), None) is not None
    said = "; these are the films, of which frames and flow have to be made first" if films else ""
    return wrong_folder(folder, "UCF-101 in frames and flow", lacking=f"{', no '.join(absent)}{said}")


def _read_classes(path: Path) -> dict[str, int]:
    classes: dict[str, int] = {}
    for line in read_lines(path, None):
        if len(line.fields) != 2:
            raise line.wrong("NUMBER CLASS such as 1 ApplyEyeMakeup")
        classes[line.fields[1]] = line.number_at(0, expected="NUMBER CLASS such as 1 ApplyEyeMakeup")
    return classes


def _by_name(paths: Iterable[str]) -> dict[str, str]:
    """Index folders by their name in small letters: the lists write v_HandStandPushups, the frames v_Handstand..."""
    return {PurePosixPath(path).name.lower(): path for path in paths}


def _clip(line: Line, classes: dict[str, int], known: dict[str, dict[str, str]]) -> Clip:
    match = _PATH.fullmatch(line.fields[0])
    if match is None or len(line.fields) > 2 or match[1] not in classes:
        raise line.wrong(_LINE)
    label, name, video = match.groups()
    if len(line.fields) == 2 and line.number_at(1, expected=_LINE) != classes[label]:
        raise line.wrong(f"the class {label}, which is number {classes[label]} in classInd.txt")
    rgb, u, v = (known[place].get(name.lower(), f"{place}/{name}") for place in (_RGB, *_FLOW))
    return Clip(
        id=name,
        label=label,
        group=f"{label}_{video}",
        split=split_of(line.path),
        media={"rgb_frames": rgb, "flow_frames": (u, v)},
        where=line.where,
    )
