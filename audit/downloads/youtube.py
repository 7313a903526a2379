"""Adapters of VGGSound and Kinetics-Sounds: clips of YouTube videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DatasetError
from .clips import Clip, Line, Listing, index_by_stem, list_clips, list_media, read_csv, split_of, unexpected_folder

# The 31 classes that the literature on modality imbalance trains on: of the 34 in Arandjelovic and Zisserman, "Look,
# Listen and Learn", ICCV 2017, those that later releases of Kinetics still contain.
KINETICS_SOUNDS = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing",
    "mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet", "playing drums",
    "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano", "playing saxophone",
    "playing trombone", "playing trumpet", "playing violin", "playing xylophone", "ripping paper", "shoveling snow",
    "shuffling cards", "singing", "stomping grapes", "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip
_VGG_LINE = "YOUTUBE_ID,START,LABEL,SPLIT such as ---g-f_I2yQ,1,people marching,test"
_KINETICS = ("youtube_id", "time_start", "time_end", "split")
_KINETICS_LINE = "a line of label, youtube_id, time_start, time_end, split"


def read_vggsound(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read vggsound.csv and the clips ID_SSSSSS.mp4 or ID_S.mp4 in any subfolder; the video is the group."""
    list_paths = list(lists) or [path for path in [folder / "vggsound.csv"] if path.is_file()]
    if not list_paths:
        raise unexpected_folder(folder, "VGGSound", missing="vggsound.csv (YouTube id, start in seconds, label, split)")
    files = list_media(folder, "", kind="video")
    path_of_clip = index_by_stem(files)
    lines = [line for path in list_paths for line in read_csv(path) if not line.fields[0].startswith("#")]
    return list_clips([_vgg_clip(line, path_of_clip) for line in lines], media_files=files)


def read_kinetics_sounds(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read Kinetics lists and the clips ID_SSSSSS_EEEEEE.mp4 in any subfolder; the video is the group.

    Only the 31 classes of KINETICS_SOUNDS are kept; a note states how many clips of other classes are left out.
    """
    candidates = list(lists) or sorted([*folder.glob("*.csv"), *folder.glob("annotations/*.csv")])
    tables = [lines for path in candidates if (lines := read_csv(path)) and _is_kinetics(lines[0])]
    if not tables or (lists and len(tables) < len(lists)):
        missing = f"csv with the columns label, {', '.join(_KINETICS)} in the folder or in annotations/"
        raise unexpected_folder(folder, "Kinetics", missing=missing)
    labelled = [lines for lines in tables if "label" in lines[0].fields]
    if not labelled:
        raise DatasetError(f"{tables[0][0].path} has no column label: the labels of that split are not public")
    files = list_media(folder, "", kind="video")
    path_of_clip = index_by_stem(files)
    clips = [_kinetics_clip(line, lines[0].fields, path_of_clip) for lines in labelled for line in lines[1:]]
    selected = [clip for clip in clips if clip.label in KINETICS_SOUNDS]
    notes = [f"{lines[0].path.name} has no labels: skipped" for lines in tables if "label" not in lines[0].fields]
    if len(selected) < len(clips):
        classes = len({clip.label for clip in clips})
        num_selected = len({clip.label for clip in selected})
        notes.append(
            f"kept {num_selected} of {classes} listed classes, those among the 31 of Kinetics-Sounds: "
            f"{len(selected):,} of {len(clips):,} clips"
        )
    if not selected:
        raise DatasetError(f"{candidates[0]} contains none of the 31 classes of Kinetics-Sounds, such as bowling")
    return list_clips(selected, media_files=files, notes=notes)


def _vgg_clip(line: Line, path_of_clip: dict[str, str]) -> Clip:
    if len(line.fields) != 4 or not line.fields[0] or not line.fields[2] or line.fields[3] not in ("train", "test"):
        raise line.error_expecting(_VGG_LINE)
    video, _, label, split = line.fields
    start = line.read_int(1, expected=_VGG_LINE)
    name = f"{video}_{start:06d}"
    path = path_of_clip.get(name) or path_of_clip.get(f"{video}_{start}") or f"video/{name}.mp4"
    media = {"video_file_name": path}
    return Clip(id=name, label=label, group=video, split=split, media=media, where=line.where)


def _is_kinetics(header: Line) -> bool:
    return set(_KINETICS) <= set(header.fields)


def _kinetics_clip(line: Line, header: tuple[str, ...], path_of_clip: dict[str, str]) -> Clip:
    if len(line.fields) != len(header):
        raise line.error_expecting(_KINETICS_LINE)
    index_of_column = {name: header.index(name) for name in ("label", *_KINETICS)}
    label, video = line.fields[index_of_column["label"]].replace("_", " "), line.fields[index_of_column["youtube_id"]]
    start, end = (line.read_int(index_of_column[name], expected=_KINETICS_LINE) for name in ("time_start", "time_end"))
    if not label or not video:
        raise line.error_expecting(_KINETICS_LINE)
    name = f"{video}_{start:06d}_{end:06d}"
    split = _split(line, line.fields[index_of_column["split"]])
    media = {"video_file_name": path_of_clip.get(name, f"{split}/{label}/{name}.mp4")}
    return Clip(id=name, label=label, group=video, split=split, media=media, where=line.where)


def _split(line: Line, name: str) -> str:
    try:
        return split_of(Path(name))  # validate, val and validation are all in use
    except DatasetError as error:
        raise line.error_expecting(_KINETICS_LINE) from error
