"""CREMA-D: emotions, sentences and actors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from .clips import Clip, Line, Listing, list_clips, media_below, read_csv, split_of, wrong_folder

EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
NUM_CLIPS = 7442  # Cao et al., 2014, doi 10.1109/TAFFC.2014.2336244
_NAME = re.compile(rf"(\d{{4}})_([A-Z]{{3}})_({'|'.join(EMOTIONS)})_(XX?|LO|MD|HI)")
_LINE = "CLIP,EMOTION such as 1001_DFA_ANG_XX,ANG"


def read_cremad(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read AudioWAV/ and VideoFlash/. The emotion is the label, the actor the group.

    There is no official split. The lists that most papers use (train.csv 6,698, test.csv 744) share all 91 actors;
    where they are given the split is theirs, and the group stays the actor, so that the leak shows.
    """
    for name in ("AudioWAV", "VideoFlash"):
        if not (folder / name).is_dir():
            raise wrong_folder(folder, "CREMA-D", lacking=f"{name}/ (AudioWAV/*.wav and VideoFlash/*.flv are read)")
    audio = media_below(folder, "AudioWAV", kind="audio")
    video = media_below(folder, "VideoFlash", kind="video")
    heard, seen = _by_clip(audio), _by_clip(video)
    if lists:
        places = [(_listed(line), line.where, split_of(path)) for path in lists for line in read_csv(path)]
        clips = [_clip(name, heard, seen, where=where, split=split) for name, where, split in places]
        return list_clips(clips, found=[*audio, *video])
    clips = [_clip(name, heard, seen, where=str(folder)) for name in sorted({*heard, *seen})]
    if not clips:
        raise wrong_folder(folder, "CREMA-D", lacking="clip called like AudioWAV/1001_DFA_ANG_XX.wav")
    return list_clips(clips, found=[*audio, *video], official=NUM_CLIPS)


def clip_of(name: str) -> str | None:
    """Give the clip that a name stands for, or None; 1040_ITH_SAD_X, as one is called in places, is ..._XX."""
    return (name + "X" if name.endswith("_X") else name) if _NAME.fullmatch(name) else None


def actor_of(clip: str) -> str:
    """Give the actor of a clip."""
    return clip.split("_")[0]


def _by_clip(paths: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        clip = clip_of(PurePosixPath(path).stem)
        if clip is not None:
            found.setdefault(clip, path)
    return found


def _listed(line: Line) -> str:
    clip = clip_of(line.fields[0].strip()) if len(line.fields) == 2 else None
    if clip is None or line.fields[1].strip() != clip.split("_")[2]:
        raise line.wrong(_LINE)
    return clip


def _clip(name: str, heard: dict[str, str], seen: dict[str, str], *, where: str, split: str | None = None) -> Clip:
    actor, sentence, emotion, level = name.split("_")
    return Clip(
        id=name,
        label=emotion,
        group=actor,
        split=split,
        # A column called `sentence` would be read as a modality: these are codes, not words.
        more={"actor": actor, "sentence_code": sentence, "level": level},
        media={
            "audio_file_name": heard.get(name, f"AudioWAV/{name}.wav"),
            "video_file_name": seen.get(name, f"VideoFlash/{name}.flv"),
        },
        where=where,
    )
