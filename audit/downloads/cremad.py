"""Adapter of CREMA-D: emotions spoken by actors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .clips import Clip, Listing, list_clips, list_media, unexpected_folder
from .lists import Line, read_list, skip_header, split_of
from .names import clip_stem, match_media

EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
NUM_CLIPS = 7442  # Cao et al., 2014, doi 10.1109/TAFFC.2014.2336244
_NAME = re.compile(rf"(\d{{4}})_([A-Z]{{3}})_({'|'.join(EMOTIONS)})_(XX?|LO|MD|HI)")
_LINE = "CLIP,EMOTION such as 1001_DFA_ANG_XX,ANG"
_SPELLING = "AudioWAV/1001_DFA_ANG_XX.wav and VideoFlash/1001_DFA_ANG_XX.flv"


def read_cremad(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read AudioWAV/ and VideoFlash/. The emotion is the label, the actor the group.

    There is no official split. The lists that most papers use (train.csv 6,698, test.csv 744) share all 91 actors; if
    they are passed they define the split, and the group is still the actor, so that the leak is detected. Lines are
    CLIP,EMOTION or CLIP EMOTION, with or without a header and extensions; emotions are codes or words.
    """
    for name in ("AudioWAV", "VideoFlash"):
        if not (folder / name).is_dir():
            missing = f"{name}/ (AudioWAV/*.wav and VideoFlash/*.flv are read)"
            raise unexpected_folder(folder, "CREMA-D", missing=missing)
    audio = list_media(folder, "AudioWAV", kind="audio")
    video = list_media(folder, "VideoFlash", kind="video")
    lines = [line for path in lists for line in skip_header(read_list(path, ",\t; "))]
    listed: list[tuple[str, str, str | None]]
    listed = [(_parse_line(line), line.where, split_of(line.path)) for line in lines]
    if not lists:
        names = {clip for path in (*audio, *video) if (clip := clip_of_path(path)) is not None}
        listed = [(name, str(folder), None) for name in sorted(names)]
        if not listed:
            raise unexpected_folder(folder, "CREMA-D", missing="clip with a name like AudioWAV/1001_DFA_ANG_XX.wav")
    folders_of_name = {name: (split or "", name.split("_")[2]) for name, _, split in listed}
    audio_matches = match_media(folders_of_name, audio, stem_of=clip_of_path)
    video_matches = match_media(folders_of_name, video, stem_of=clip_of_path)
    clips = []
    for name, where, split in listed:
        media = {
            "audio_file_name": audio_matches.paths.get(name, f"AudioWAV/{name}.wav"),
            "video_file_name": video_matches.paths.get(name, f"VideoFlash/{name}.flv"),
        }
        clips.append(_clip(name, media, where=where, split=split))
    return list_clips(
        clips,
        media_files=[*audio, *video],
        official=None if lists else NUM_CLIPS,
        notes=(*audio_matches.notes, *video_matches.notes),
        spelling=_SPELLING,
    )


def parse_clip(name: str) -> str | None:
    """Return the clip of a file name, or None; 1040_ITH_SAD_X, a variant of one name, becomes ..._XX."""
    return (name + "X" if name.endswith("_X") else name) if _NAME.fullmatch(name) else None


def clip_of_path(path: str) -> str | None:
    """Return the clip of a path, with or without an extension; None if it is not named like a clip."""
    return parse_clip(clip_stem(path))


def actor_of(clip: str) -> str:
    """Return the actor of a clip."""
    return clip.split("_")[0]


def _parse_line(line: Line) -> str:
    clip = clip_of_path(line.fields[0]) if len(line.fields) == 2 else None
    if clip is None:
        raise line.error_expecting(_LINE)
    emotion, label = clip.split("_")[2], line.fields[1].strip()
    if label.upper() != emotion and label.lower() != EMOTIONS[emotion]:
        raise line.error_expecting(_LINE)
    return clip


def _clip(name: str, media: dict[str, str], *, where: str, split: str | None) -> Clip:
    actor, sentence, emotion, level = name.split("_")
    # A column named `sentence` would be read as a modality; these are codes, not text.
    codes = {"actor": actor, "sentence_code": sentence, "level": level}
    return Clip(id=name, label=emotion, group=actor, split=split, extra_columns=codes, media=media, where=where)
