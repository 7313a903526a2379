"""Adapter of CREMA-D: emotions spoken by actors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from .clips import Clip, Line, Listing, list_clips, list_media, read_csv, split_of, unexpected_folder

EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
NUM_CLIPS = 7442  # Cao et al., 2014, doi 10.1109/TAFFC.2014.2336244
_NAME = re.compile(rf"(\d{{4}})_([A-Z]{{3}})_({'|'.join(EMOTIONS)})_(XX?|LO|MD|HI)")
_LINE = "CLIP,EMOTION such as 1001_DFA_ANG_XX,ANG"


def read_cremad(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read AudioWAV/ and VideoFlash/. The emotion is the label, the actor the group.

    There is no official split. The lists that most papers use (train.csv 6,698, test.csv 744) share all 91 actors; if
    they are passed they define the split, and the group is still the actor, so that the leak is detected.
    """
    for name in ("AudioWAV", "VideoFlash"):
        if not (folder / name).is_dir():
            missing = f"{name}/ (AudioWAV/*.wav and VideoFlash/*.flv are read)"
            raise unexpected_folder(folder, "CREMA-D", missing=missing)
    audio = list_media(folder, "AudioWAV", kind="audio")
    video = list_media(folder, "VideoFlash", kind="video")
    audio_of_clip, video_of_clip = _index_by_clip(audio), _index_by_clip(video)
    if lists:
        listed = [(_parse_line(line), line.where, split_of(path)) for path in lists for line in read_csv(path)]
        clips = [_clip(name, audio_of_clip, video_of_clip, where=where, split=split) for name, where, split in listed]
        return list_clips(clips, media_files=[*audio, *video])
    names = sorted({*audio_of_clip, *video_of_clip})
    clips = [_clip(name, audio_of_clip, video_of_clip, where=str(folder)) for name in names]
    if not clips:
        raise unexpected_folder(folder, "CREMA-D", missing="clip with a name like AudioWAV/1001_DFA_ANG_XX.wav")
    return list_clips(clips, media_files=[*audio, *video], official=NUM_CLIPS)


def parse_clip(name: str) -> str | None:
    """Return the clip of a file name, or None; 1040_ITH_SAD_X, a variant of one name, becomes ..._XX."""
    return (name + "X" if name.endswith("_X") else name) if _NAME.fullmatch(name) else None


def actor_of(clip: str) -> str:
    """Return the actor of a clip."""
    return clip.split("_")[0]


def _index_by_clip(paths: Iterable[str]) -> dict[str, str]:
    path_of_clip: dict[str, str] = {}
    for path in paths:
        clip = parse_clip(PurePosixPath(path).stem)
        if clip is not None:
            path_of_clip.setdefault(clip, path)
    return path_of_clip


def _parse_line(line: Line) -> str:
    clip = parse_clip(line.fields[0].strip()) if len(line.fields) == 2 else None
    if clip is None or line.fields[1].strip() != clip.split("_")[2]:
        raise line.error_expecting(_LINE)
    return clip


def _clip(
    name: str, audio_of_clip: dict[str, str], video_of_clip: dict[str, str], *, where: str, split: str | None = None
) -> Clip:
    actor, sentence, emotion, level = name.split("_")
    media = {
        "audio_file_name": audio_of_clip.get(name, f"AudioWAV/{name}.wav"),
        "video_file_name": video_of_clip.get(name, f"VideoFlash/{name}.flv"),
    }
    # A column named `sentence` would be read as a modality; these are codes, not text.
    codes = {"actor": actor, "sentence_code": sentence, "level": level}
    return Clip(id=name, label=emotion, group=actor, split=split, extra_columns=codes, media=media, where=where)
