"""Adapter of MVSA-Single and MVSA-Multiple: tweets with a picture, and the sentiment of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import DatasetError
from ..parsing import decode_text
from .clips import Clip, Listing, list_clips, list_media, unexpected_folder
from .lists import Line, find_lists, read_list
from .names import match_media

LABELS_FILE = "labelResultAll.txt"
_SENTIMENTS = ("negative", "neutral", "positive")
_LINE = "ID and TEXT_LABEL,IMAGE_LABEL of one or three annotators, separated by tabs, such as 1<tab>positive,neutral"
_DATA = "data"


def read_mvsa(folder: Path, lists: Sequence[Path]) -> Listing:
    """Read labelResultAll.txt and data/ID.jpg, data/ID.txt. The label is that of the pair; there is no official split.

    Of three annotators the majority decides, for the text and the picture apart. A pair has their common sentiment, or
    the other one if one of them is neutral; positive with negative, or three annotators of three minds, leave no label.
    Source: Niu et al., MMM 2016; the rule for pairs is that of Xu and Mao, CIKM 2017.
    """
    list_paths = list(lists) or find_lists(folder, [LABELS_FILE])
    if not list_paths or not (folder / _DATA).is_dir():
        missing = f"{_DATA}/ with the texts and pictures" if list_paths else LABELS_FILE
        raise unexpected_folder(folder, "MVSA", missing=missing)
    lines = [line for path in list_paths for line in read_list(path, "\t ;")]
    listed = [_parse_line(line) for line in lines if line.fields[0].strip().upper() != "ID"]
    files = list_media(folder, _DATA, kind="image")
    matches = match_media(dict.fromkeys((name for _, name, _ in listed), ()), files)
    texts = {name: _read_text(folder / _DATA / f"{name}.txt") for _, name, _ in listed}
    clips = [
        Clip(
            id=name,
            label=label,
            media={
                "image_file_name": matches.paths.get(name, f"{_DATA}/{name}.jpg"),
                "text": texts[name][0],
            },
            where=line.where,
        )
        for line, name, label in listed
    ]
    notes = [*matches.notes]
    if num_unlabelled := sum(clip.label is None for clip in clips):
        notes.append(f"{num_unlabelled:,} pairs have no label, since text and picture or the annotators contradict")
    if num_latin := sum(is_latin for _, is_latin in texts.values()):
        notes.append(f"{num_latin:,} texts are not UTF-8 and were read as Latin-1")
    return list_clips(clips, media_files=files, notes=notes, spelling=f"{_DATA}/ID.jpg and {_DATA}/ID.txt")


def _parse_line(line: Line) -> tuple[Line, str, str | None]:
    """Return the line, the id and the label of a pair."""
    name, *votes = (field.strip() for field in line.fields)
    pairs = [tuple(part.strip().lower() for part in vote.split(",")) for vote in votes if vote]
    if not name or not pairs or any(len(pair) != 2 or not set(pair) <= set(_SENTIMENTS) for pair in pairs):
        raise line.error_expecting(_LINE)
    if "/" in name or "\\" in name:
        raise DatasetError(f"{line.where}: {name!r} leads outside the folder: correct the id in the list")
    text, image = (_majority([pair[index] for pair in pairs]) for index in (0, 1))
    return line, name, _combine(text, image)


def _majority(votes: Sequence[str]) -> str | None:
    vote, count = Counter(votes).most_common(1)[0]
    return vote if 2 * count > len(votes) else None


def _combine(text: str | None, image: str | None) -> str | None:
    """Return the sentiment of a pair from those of its text and its picture; None if they contradict."""
    if text is None or image is None or {text, image} == {"negative", "positive"}:
        return None
    return image if text == "neutral" else text


def _read_text(path: Path) -> tuple[str | None, bool]:
    """Return the text of a file, None without one, and whether it is Latin-1, as some tweets of MVSA are."""
    if not path.is_file():
        return None, False
    data = path.read_bytes()
    try:
        return decode_text(data).strip(), False
    except ValueError:
        return data.decode("latin-1").strip(), True
