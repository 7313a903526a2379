"""Names of clips and pictures: spellings, and the media that belong to listed names."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from ..media.files import kind_of_path
from ..parsing import fold_text

_TIME = r"[_-](\d+(?:\.\d+)?)"
_NAME = re.compile(rf"([\w-]{{11}})(?:{_TIME}(?:{_TIME})?)?", re.ASCII)
# Factors of the times of a listed clip and of a file: equal units, a file in milliseconds, a list in milliseconds.
_UNITS = ((1, 1), (1000, 1), (1, 1000))
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPELLINGS = "ID_START or ID_START_END, joined by _ or -, in seconds (zero-padded or not) or milliseconds, or ID alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipName:
    """A name made of the 11 characters of a YouTube id, and the start and end of the clip if the name has them."""

    video: str
    start: float | None = None
    end: float | None = None
    is_padded: bool = False

    def fits(self, file: ClipName, units: tuple[int, int]) -> bool:
        """Return whether a file's name has these times, each in its unit; the ends are compared if both have one."""
        if self.start is None or file.start is None:
            return False
        if (units[0] > units[1] and file.is_padded) or (units[1] > units[0] and self.is_padded):
            return False  # zero-padded times are in seconds
        ends_fit = self.end is None or file.end is None or self.end * units[0] == file.end * units[1]
        return self.start * units[0] == file.start * units[1] and ends_fit


def parse_clip_name(name: str) -> ClipName | None:
    """Return the parts of a name in one of SPELLINGS, None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    start, end = (None if text is None else float(text) for text in match.groups()[1:])
    is_padded = match[2] is not None and len(match[2]) > 1 and match[2].startswith("0")
    return ClipName(video=match[1], start=start, end=end, is_padded=is_padded)


def video_of(name: str) -> str:
    """Return the YouTube id of a clip's name in any spelling; the name itself if it has none."""
    clip = parse_clip_name(name)
    return name if clip is None else clip.video


def clip_stem(path: str) -> str:
    """Return the last part of a path without the extension of a medium."""
    name = PurePosixPath(path.strip()).name
    return name if kind_of_path(name) is None else PurePosixPath(name).stem


def listed_name(text: str) -> str:
    """Return the clip's name of a path in a list; a path that leads out of its folder is returned as it is."""
    path = text.strip().replace("\\", "/")
    return path if path.startswith("/") or ".." in path.split("/") else clip_stem(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """The path of the medium of each clip, by the clip's name, and notes on how ambiguities were resolved."""

    paths: Mapping[str, str]
    notes: tuple[str, ...]


def match_media(
    folders_of_name: Mapping[str, Sequence[str]],
    paths: Iterable[str],
    *,
    stem_of: Callable[[str], str | None] = clip_stem,
) -> Matches:
    """Match the names of clips with media by file name.

    A name matches a file of that very name, else one of the same video and the same times in seconds, else in
    milliseconds, else the only file of that video. A file belongs to one clip.

    Args:
        folders_of_name: For each clip's name, the split and class that a folder above its medium may be named after;
            they decide between files of the same name.
        paths: Media, relative to the download's folder.
        stem_of: Function that returns the clip's name of a path, None for a path without one.

    Raises:
        DatasetError: Files with different times fit one clip.
    """
    paths_of_stem: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        if (stem := stem_of(path)) is not None:
            paths_of_stem[stem].append(path)
    stems_of_name = {name: [name] for name in folders_of_name if name in paths_of_stem}
    respelled, notes = _match_spellings(folders_of_name, paths_of_stem)
    matched, ambiguous = {}, []
    for name, stems in (stems_of_name | respelled).items():
        candidates = _prefer([path for stem in stems for path in paths_of_stem[stem]], folders_of_name[name])
        matched[name] = candidates[0]
        if len(candidates) > 1:
            ambiguous.append(f"{candidates[0]} and {candidates[1]}")
    if ambiguous:
        notes.append(f"{len(ambiguous):,} clips have several files, such as {ambiguous[0]}: the first is read")
    return Matches(paths=matched, notes=tuple(notes))


def _match_spellings(
    names: Iterable[str], paths_of_stem: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Match names without a file of that very name; return stems by name, and notes on matches to be checked."""
    listed = {name: clip for name in names if (clip := parse_clip_name(name)) is not None}
    num_clips = Counter(clip.video for clip in listed.values())
    stems_of_video: defaultdict[str, dict[str, ClipName]] = defaultdict(dict)
    for stem in paths_of_stem:
        if stem not in listed and (clip := parse_clip_name(stem)) is not None:
            stems_of_video[clip.video][stem] = clip
    unmatched = {name: clip for name, clip in listed.items() if name not in paths_of_stem}
    stems_of_name: dict[str, list[str]] = {}
    notes = []
    for units in (*_UNITS, None):
        matched = {}
        for name, clip in unmatched.items():
            files = stems_of_video[clip.video].items()
            if units is not None:
                stems = [stem for stem, file in files if clip.fits(file, units)]
            else:
                is_only = num_clips[clip.video] == 1
                stems = [stem for stem, file in files if is_only and None in (clip.start, file.start)]
            if stems:
                matched[name] = stems
        _check_unique(matched, paths_of_stem)
        for name, stems in matched.items():
            video = unmatched.pop(name).video
            stems_of_video[video] = {stem: file for stem, file in stems_of_video[video].items() if stem not in stems}
        if matched and units != (1, 1):
            name, (stem, *_) = next(iter(matched.items()))
            rule = "by the video alone" if units is None else "in milliseconds"
            notes.append(f"{len(matched):,} clips are matched {rule}, such as {name} with {paths_of_stem[stem][0]}")
        stems_of_name |= matched
    return stems_of_name, notes


def _check_unique(stems_of_name: Mapping[str, Sequence[str]], paths_of_stem: Mapping[str, Sequence[str]]) -> None:
    """Raise DatasetError if files with different times fit one clip, or one file fits two clips."""
    name_of_stem: dict[str, str] = {}
    for name, stems in stems_of_name.items():
        clips = [clip for stem in stems if (clip := parse_clip_name(stem)) is not None]
        starts, ends = {clip.start for clip in clips} - {None}, {clip.end for clip in clips} - {None}
        if len(starts) > 1 or len(ends) > 1:
            first, second = (paths_of_stem[stem][0] for stem in sorted(stems)[:2])
            raise DatasetError(f"two files with different times fit the clip {name}: {first} and {second}: keep one")
        for stem in stems:
            if name_of_stem.setdefault(stem, name) != name:
                names = f"{name_of_stem[stem]} and {name}"
                raise DatasetError(f"{paths_of_stem[stem][0]} fits two clips, {names}: name it after one")


def _prefer(paths: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return the paths whose folders are named after most of the split and class of the clip."""
    if len(paths) == 1:
        return list(paths)
    scores = [sum(is_in_folder(path, folder) for folder in folders) for path in paths]
    return [path for path, score in zip(paths, scores, strict=True) if score == max(scores)]


def is_in_folder(path: str, name: str) -> bool:
    """Return whether a folder of the path has the name of a class or split; blanks and underscores are the same."""
    parts = PurePosixPath(path).parts[:-1]
    return any(plain_name(part) == plain_name(name) or folder_split(part) == name for part in parts)


def plain_name(name: str) -> str:
    """Return the name of a class or folder in lower case, with blanks for underscores."""
    return name.lower().replace("_", " ")


def folder_split(part: str) -> str | None:
    """Return the split that a folder is named after, None for any other folder."""
    return _SPLIT_FOLDERS.get(part.lower())


_SUBFOLDERS = ("images", "image", "img", "imgs", "data")


class PictureIndex:
    """The pictures of a download by path and by name."""

    def __init__(self, folder: Path, files: Iterable[str], *, labels: Set[str] = frozenset()) -> None:
        """Index `files`, paths relative to the folder; `labels` are the classes that folders may be named after."""
        self._folder, self._root = folder, folder.resolve()
        self._labels = {plain_name(label) for label in labels}
        self._files = frozenset(files)
        self._paths_of_name: defaultdict[str, list[str]] = defaultdict(list)
        for path in sorted(self._files):
            name = fold_text(PurePosixPath(path).name)
            self._paths_of_name[name].append(path)
            self._paths_of_name[PurePosixPath(name).stem].append(path)

    def is_picture(self, cell: str) -> bool:
        """Return whether a cell of a list has the name of a picture."""
        name = fold_text(PurePosixPath(cell.strip().replace("\\", "/")).name)
        return kind_of_path(name) == "image" or name in self._paths_of_name

    def find(self, name: str, *, list_path: Path, where: str, split: str | None, label: str | None) -> str:
        """Return the path of a picture relative to the folder, whether or not it exists.

        A path is relative to its list, to the folder or to one of its usual subfolders. Else the end of a path, a name
        alone, or a name without extension is searched for below the folder, but not in a folder of another split or
        class.

        Raises:
            DatasetError: The path leads outside the folder, or several pictures match.
        """
        name = name.strip()
        base_folders = [list_path.parent.resolve(), self._root]
        if ".." not in Path(name).parts:
            base_folders += [self._root / subfolder for subfolder in _SUBFOLDERS]
        candidates = [Path(os.path.normpath(base_folder / name)) for base_folder in base_folders]
        relative_paths = [path.relative_to(self._root).as_posix() for path in candidates if self._is_inside(path)]
        if "://" in name or not relative_paths:
            raise DatasetError(
                f"{where}: {name!r} leads outside {self._folder}: copy the pictures there and use paths relative to it"
            )
        exact = next((path for path in relative_paths if path in self._files), None)
        if exact is not None:
            return exact
        paths = self._search(PurePosixPath(name.replace("\\", "/")), split, label)
        if len(paths) > 1:
            raise DatasetError(
                f"{where}: {name!r} matches {len(paths)} pictures, such as {paths[0]} and {paths[1]}: "
                "write the path into the list"
            )
        return paths[0] if paths else relative_paths[0]

    def _is_inside(self, path: Path) -> bool:
        return path.is_relative_to(self._root)

    def _search(self, name: PurePosixPath, split: str | None, label: str | None) -> list[str]:
        """Return the pictures of this name whose folders agree with those of the name, the split and the class."""
        folders = [part for part in name.parts[:-1] if part != "."]
        paths = [
            path
            for path in self._paths_of_name.get(fold_text(name.name), ())
            if _agree(list(PurePosixPath(path).parts[:-1]), folders) and not self._is_of_other(path, split, label)
        ]
        in_class = [path for path in paths if label is not None and is_in_folder(path, label)]
        return in_class or paths

    def _is_of_other(self, path: str, split: str | None, label: str | None) -> bool:
        """Return whether a folder of the path is named after another split or another class."""
        splits = {folder_split(part) for part in PurePosixPath(path).parts[:-1]} - {None}
        if split is not None and splits and split not in splits:
            return True
        labels = self._labels.intersection(map(plain_name, PurePosixPath(path).parts[:-1]))
        return bool(labels) and label is not None and plain_name(label) not in labels


def _agree(folders: list[str], listed: list[str]) -> bool:
    """Return whether the folders of a file and those of a listed path are the same, as far as both go."""
    length = min(len(folders), len(listed))
    ends = (fold_text("/".join(parts[len(parts) - length :])) for parts in (folders, listed))
    return not listed or (length > 0 and len(set(ends)) == 1)
