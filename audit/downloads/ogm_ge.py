"""Lists of the OGM-GE code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from .clips import (
    Clip,
    Line,
    Listing,
    by_stem,
    find_lists,
    folders_in,
    list_clips,
    media_below,
    read_csv,
    split_of,
    wrong_folder,
)
from .cremad import actor_of, clip_of

_NAMES = tuple(f"{name}.{suffix}" for name in ("train", "val", "valid", "test") for suffix in ("csv", "txt"))
_PLACES = ("", "annotations", "data")
_SOUND = ("AudioWAV", "audio")
_SIGHT = ("Image-*-FPS", "visual/Image-*-FPS", "visual")
_LINE = "CLIP,LABEL, LABEL,CLIP beside a stat file of the classes, or CLIP,SECONDS,LABEL"
_YOUTUBE = re.compile(r"(.{11})_\d+")


def read_ogm_ge(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read train.csv, test.csv, val.csv (or my_train.txt ...) with the wav files and folders of frames they name.

    The code family of Peng et al. (CVPR 2022) writes CLIP,LABEL for CREMA-D, LABEL,CLIP for AVE and CLIP,10,LABEL for
    Kinetics-Sounds; stat.csv has one class on a line. Clips called as in CREMA-D are grouped by actor, those called
    as from YouTube by video. A clip of AVE may hold several events: its ids name them, and the clip is the group.
    """
    found_lists = list(lists) or _find(folder)
    sound = next((name for name in _SOUND if (folder / name).is_dir()), None)
    sight = next((path for pattern in _SIGHT for path in sorted(folder.glob(pattern)) if path.is_dir()), None)
    if not found_lists or sound is None or sight is None:
        raise _wrong(folder, found_lists)
    classes = _classes(folder, found_lists)
    lines = [line for path in found_lists for line in read_csv(path)]
    audio = media_below(folder, sound, kind="audio")
    frames = folders_in(folder, sight.relative_to(folder).as_posix())
    heard, seen = by_stem(audio), {PurePosixPath(path).name.removesuffix(".mp4"): path for path in frames}
    pairs = [_pair(line, classes) for line in lines]
    ids, groups = _name(pairs)
    clips = [
        Clip(
            id=id_,
            label=label,
            group=group,
            split=split_of(line.path),
            media={
                "audio_file_name": heard.get(name, f"{sound}/{name}.wav"),
                "visual_frames": seen.get(name, f"{sight.relative_to(folder).as_posix()}/{name}"),
            },
            where=line.where,
        )
        for line, (name, label), id_, group in zip(lines, pairs, ids, groups, strict=True)
    ]
    return list_clips(clips, found=[*audio, *frames])


def _find(folder: Path) -> list[Path]:
    plain, own = (find_lists(folder, names, below=_PLACES) for names in (_NAMES, [f"my_{name}" for name in _NAMES]))
    if plain and own:
        raise DatasetError(f"{folder} holds both {own[0].name} and {plain[0].name}: name those you mean with --list")
    return plain or own


def _wrong(folder: Path, lists: Sequence[Path]) -> DatasetError:
    lacking = "train.csv or my_train.txt" if not lists else "AudioWAV/ or audio/ beside Image-01-FPS/ or visual/"
    if lists and (folder / "audio_spec").is_dir():
        lacking += " (audio_spec/ holds pickled spectrograms, which are never read)"
    return wrong_folder(folder, "a folder of the OGM-GE code", lacking=lacking)


def _classes(folder: Path, lists: Sequence[Path]) -> set[str]:
    """Read the list of classes, where there is one, beside the lists or in the folder."""
    for home in (lists[0].parent, folder):
        for path in find_lists(home, ("stat.csv", "stat.txt")):
            return {line.fields[0].strip() for line in read_csv(path)}
    return set()


def _pair(line: Line, classes: set[str]) -> tuple[str, str]:
    """Give the clip and the label of a line, whichever comes first."""
    fields = [field.strip() for field in line.fields]
    if len(fields) not in (2, 3) or not all(fields) or (len(fields) == 3 and not fields[1].isdigit()):
        raise line.wrong(_LINE)
    name, label = fields[0], fields[-1]
    if len(fields) == 2 and label not in classes and name in classes:
        return label, name
    if len(fields) == 2 and classes and label not in classes:
        raise line.wrong(f"a clip with one of the {len(classes)} classes of the stat file")
    return name, label


def _name(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str] | list[None]]:
    """Give ids, and groups where the names tell them: by actor, by video, or by clip where one has several labels."""
    count = Counter(name for name, _ in set(pairs))
    ids = [name if count[name] == 1 else f"{name}:{label}" for name, label in pairs]
    names = [name for name, _ in pairs]
    if all(clip_of(name) for name in names):
        return ids, [actor_of(name) for name in names]
    matches = [_YOUTUBE.fullmatch(name) for name in names]
    if all(matches):
        return ids, [match[1] for match in matches if match]
    return ids, (names if max(count.values(), default=0) > 1 else [None] * len(names))
