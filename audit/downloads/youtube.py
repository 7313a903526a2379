"""Adapters of VGGSound and Kinetics-Sounds: clips of YouTube videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DatasetError
from .clips import Clip, Listing, list_clips, list_media, unexpected_folder
from .lists import Line, find_lists, normalize_name, read_list, skip_header, split_of, visible_files
from .names import SPELLINGS, listed_name, match_media, parse_clip_name, video_of

# The 31 classes that the literature on modality imbalance trains on: of the 34 in Arandjelovic and Zisserman, "Look,
# Listen and Learn", ICCV 2017, those that later releases of Kinetics still contain.
KINETICS_SOUNDS = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing",
    "mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet", "playing drums",
    "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano", "playing saxophone",
    "playing trombone", "playing trumpet", "playing violin", "playing xylophone", "ripping paper", "shoveling snow",
    "shuffling cards", "singing", "stomping grapes", "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip
_VGG_LINE = "YOUTUBE_ID,START,LABEL,SPLIT such as ---g-f_I2yQ,1,people marching,test or YOUTUBE_ID_SSSSSS.mp4,LABEL"
_VGG_LISTS = ("train.csv", "test.csv")
_VGG_FOLDERS = ("", "data", "annotations")
_VGG_SPELLING = f"VIDEO.mp4 anywhere below, where VIDEO is {SPELLINGS}"
_KINETICS = ("youtube_id", "time_start", "time_end", "split")
_KINETICS_LINE = "a line of label, youtube_id, time_start, time_end, split"
_SEPARATORS = ",\t;"


def read_vggsound(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read vggsound.csv, or train.csv and test.csv, and the clips in any subfolder; the video is the group.

    Clips are called ID_SSSSSS.mp4, or otherwise as in names.SPELLINGS. A list of two columns has its split in its name.
    """
    list_paths = list(lists)
    for names in (("vggsound.csv",), _VGG_LISTS):
        list_paths = list_paths or find_lists(folder, names, subfolders=_VGG_FOLDERS)
    if not list_paths:
        missing = "vggsound.csv (YouTube id, start in seconds, label, split), or train.csv and test.csv (clip, label)"
        raise unexpected_folder(folder, "VGGSound", missing=missing)
    files = list_media(folder, "", kind="video")
    lines = [line for path in list_paths for line in read_list(path, _SEPARATORS)]
    listed = [_parse_vgg(line) for line in _without_header(lines)]
    matches = match_media({name: (split, label) for _, name, label, split in listed}, files)
    clips = []
    for line, name, label, split in listed:
        media = {"video_file_name": matches.paths.get(name, f"video/{name}.mp4")}
        clips.append(Clip(id=name, label=label, group=video_of(name), split=split, media=media, where=line.where))
    return list_clips(clips, media_files=files, notes=matches.notes, spelling=_VGG_SPELLING)


def _without_header(lines: Sequence[Line]) -> list[Line]:
    """Return the lines without comments, and without those that name columns."""
    return [line for line in lines if not line.fields[0].startswith("#") and skip_header([line])]


def _parse_vgg(line: Line) -> tuple[Line, str, str, str]:
    """Return the line, and the name ID_SSSSSS, label and split of its clip."""
    fields = [field.strip() for field in line.fields]
    clip = parse_clip_name(listed_name(fields[0])) if len(fields) == 2 else None
    if clip is not None and clip.start is not None and fields[1]:
        return line, f"{clip.video}_{int(clip.start):06d}", fields[1], split_of(line.path)
    if len(fields) != 4 or not fields[0] or not fields[2] or fields[3] not in ("train", "test"):
        raise line.error_expecting(_VGG_LINE)
    start = line.read_int(1, expected=_VGG_LINE)
    return line, f"{fields[0]}_{start:06d}", fields[2], fields[3]


def read_kinetics_sounds(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read Kinetics lists and the clips ID_SSSSSS_EEEEEE.mp4 in any subfolder; the video is the group.

    Only the 31 classes of KINETICS_SOUNDS are kept; a note states how many clips of other classes are left out.
    """
    candidates = list(lists) or _kinetics_candidates(folder)
    tables = [lines for path in candidates if (lines := read_list(path, _SEPARATORS)) and _is_kinetics(lines[0])]
    if not tables or (lists and len(tables) < len(lists)):
        missing = f"csv with the columns label, {', '.join(_KINETICS)} in the folder or in annotations/"
        raise unexpected_folder(folder, "Kinetics", missing=missing)
    labelled = [lines for lines in tables if "label" in _column_names(lines[0])]
    if not labelled:
        raise DatasetError(f"{tables[0][0].path} has no column label: the labels of that split are not public")
    listed = [_parse_kinetics(line, lines[0]) for lines in labelled for line in lines[1:]]
    selected = [clip for clip in listed if clip.label in KINETICS_SOUNDS]
    notes = [f"{lines[0].path.name} has no labels: skipped" for lines in tables if lines not in labelled]
    if len(selected) < len(listed):
        classes = len({clip.label for clip in listed})
        num_selected = len({clip.label for clip in selected})
        notes.append(
            f"kept {num_selected} of {classes} listed classes, those among the 31 of Kinetics-Sounds: "
            f"{len(selected):,} of {len(listed):,} clips"
        )
    if not selected:
        raise DatasetError(f"{candidates[0]} contains none of the 31 classes of Kinetics-Sounds, such as bowling")
    files = list_media(folder, "", kind="video")
    matches = match_media({clip.id: (clip.split or "", clip.label or "") for clip in selected}, files)
    clips = [_with_path(clip, matches.paths) for clip in selected]
    return list_clips(clips, media_files=files, notes=(*notes, *matches.notes), spelling=_VGG_SPELLING)


def _kinetics_candidates(folder: Path) -> list[Path]:
    paths = [*visible_files(folder), *visible_files(folder / "annotations")]
    return sorted(path for path in paths if path.suffix.lower() in (".csv", ".tsv"))


def _column_names(header: Line) -> list[str]:
    return [normalize_name(name) for name in header.fields]


def _is_kinetics(header: Line) -> bool:
    return set(_KINETICS) <= set(_column_names(header))


def _parse_kinetics(line: Line, header: Line) -> Clip:
    """Return the clip of a line, without the path of its medium."""
    if len(line.fields) != len(header.fields):
        raise line.error_expecting(_KINETICS_LINE)
    names = _column_names(header)
    index_of_column = {name: names.index(name) for name in ("label", *_KINETICS)}
    label, video, _, _, split = (line.fields[index].strip() for index in index_of_column.values())
    start, end = (line.read_int(index_of_column[name], expected=_KINETICS_LINE) for name in ("time_start", "time_end"))
    if not label or not video:
        raise line.error_expecting(_KINETICS_LINE)
    name, label = f"{video}_{start:06d}_{end:06d}", label.replace("_", " ")
    return Clip(id=name, label=label, group=video, split=_split(line, split), media={}, where=line.where)


def _with_path(clip: Clip, paths: Mapping[str, str]) -> Clip:
    path = paths.get(clip.id, f"{clip.split}/{clip.label}/{clip.id}.mp4")
    return replace(clip, media={"video_file_name": path})


def _split(line: Line, name: str) -> str:
    try:
        return split_of(Path(name))  # validate, val and validation are all in use
    except DatasetError as error:
        raise line.error_expecting(_KINETICS_LINE) from error
