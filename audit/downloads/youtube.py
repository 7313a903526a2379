"""VGGSound and Kinetics-Sounds: clips of YouTube videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DatasetError
from .clips import Clip, Line, Listing, by_stem, list_clips, media_below, read_csv, split_of, wrong_folder

# The 31 classes that the literature on modality imbalance trains on: of the 34 in Arandjelovic and Zisserman, "Look,
# Listen and Learn", ICCV 2017, those that the later releases of Kinetics still give.
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
    """Read vggsound.csv and the clips ID_SSSSSS.mp4 or ID_S.mp4 anywhere below; the video is the group."""
    found_lists = list(lists) or [path for path in [folder / "vggsound.csv"] if path.is_file()]
    if not found_lists:
        raise wrong_folder(folder, "VGGSound", lacking="vggsound.csv (YouTube id, start in seconds, label, split)")
    files = media_below(folder, "", kind="video")
    there = by_stem(files)
    lines = [line for path in found_lists for line in read_csv(path) if not line.fields[0].startswith("#")]
    return list_clips([_vgg_clip(line, there) for line in lines], found=files)


def read_kinetics_sounds(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read Kinetics lists and the clips ID_SSSSSS_EEEEEE.mp4 anywhere below; the video is the group.

    Of lists with other classes the 31 of KINETICS_SOUNDS are kept, which is said in the notes.
    """
    candidates = list(lists) or sorted([*folder.glob("*.csv"), *folder.glob("annotations/*.csv")])
    tables = [lines for path in candidates if (lines := read_csv(path)) and _is_kinetics(lines[0])]
    if not tables or (lists and len(tables) < len(lists)):
        lacking = f"csv with the columns label, {', '.join(_KINETICS)}, here or in annotations/"
        raise wrong_folder(folder, "Kinetics", lacking=lacking)
    labelled = [lines for lines in tables if "label" in lines[0].fields]
    if not labelled:
        raise DatasetError(f"{tables[0][0].path} has no column label: the labels of that split are not public")
    files = media_below(folder, "", kind="video")
    there = by_stem(files)
    clips = [_kinetics_clip(line, lines[0].fields, there) for lines in labelled for line in lines[1:]]
    kept = [clip for clip in clips if clip.label in KINETICS_SOUNDS]
    notes = [f"{lines[0].path.name} has no labels: not read" for lines in tables if "label" not in lines[0].fields]
    if len(kept) < len(clips):
        classes = len({clip.label for clip in clips})
        notes.append(
            f"of {classes} listed classes the {len({clip.label for clip in kept})} of the 31 of Kinetics-Sounds are "
            f"kept: {len(kept):,} of {len(clips):,} clips"
        )
    if not kept:
        raise DatasetError(f"{candidates[0]} names none of the 31 classes of Kinetics-Sounds, such as bowling")
    return list_clips(kept, found=files, notes=notes)


def _vgg_clip(line: Line, there: dict[str, str]) -> Clip:
    if len(line.fields) != 4 or not line.fields[0] or not line.fields[2] or line.fields[3] not in ("train", "test"):
        raise line.wrong(_VGG_LINE)
    video, _, label, split = line.fields
    start = line.number_at(1, expected=_VGG_LINE)
    name = f"{video}_{start:06d}"
    path = there.get(name) or there.get(f"{video}_{start}") or f"video/{name}.mp4"
    media = {"video_file_name": path}
    return Clip(id=name, label=label, group=video, split=split, media=media, where=line.where)


def _is_kinetics(header: Line) -> bool:
    return set(_KINETICS) <= set(header.fields)


def _kinetics_clip(line: Line, header: tuple[str, ...], there: dict[str, str]) -> Clip:
    if len(line.fields) != len(header):
        raise line.wrong(_KINETICS_LINE)
    place = {name: header.index(name) for name in ("label", *_KINETICS)}
    label, video = line.fields[place["label"]].replace("_", " "), line.fields[place["youtube_id"]]
    start, end = (line.number_at(place[name], expected=_KINETICS_LINE) for name in ("time_start", "time_end"))
    if not label or not video:
        raise line.wrong(_KINETICS_LINE)
    name = f"{video}_{start:06d}_{end:06d}"
    split = _split(line, line.fields[place["split"]])
    media = {"video_file_name": there.get(name, f"{split}/{label}/{name}.mp4")}
    return Clip(id=name, label=label, group=video, split=split, media=media, where=line.where)


def _split(line: Line, name: str) -> str:
    try:
        return split_of(Path(name))  # validate, val and validation are all in use
    except DatasetError as error:
        raise line.wrong(_KINETICS_LINE) from error
