"""Files of a source: what a folder, a glob or a brace pattern stands for, and the splits in their names."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from pathlib import Path, PurePath

from ...errors import DatasetError
from ...media.files import LFS_HINT, is_hidden, is_lfs_pointer_file
from ...remote.paths import AnyPath, RemotePath, is_url, list_folders, match_remote, source_path
from ...remote.requests import forget, is_page
from ..columns import SPLIT_NAMES

log = logging.getLogger("mmaudit")

_WORD = re.compile(r"[^\W\d_]+")
_WHOLE_FOLDER = ("/**/*", "/**", "/*")  # patterns that match all of a folder
_BRACES = re.compile(r"\{([^{}]*(?:,|\d\.\.\d)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_PATTERNS = 100_000  # in one brace pattern; the largest public sets of tars have 10,000s
_MAX_SHOWN = 3


def split_of_name(name: str) -> str | None:
    """Return the split that a file's or folder's name states, None if it states none or several.

    As in `datasets`, the name states it by a word between characters that are not letters: `cc3m-train-0000.tar`.
    """
    splits = {SPLIT_NAMES[word] for word in _WORD.findall(name.lower()) if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else None


def split_of_path(path: PurePath) -> str | None:
    """Return the split of a path relative to its source: that of the innermost folder that states one, else its own."""
    folders = (split_of_name(folder) for folder in reversed(path.parts[:-1]))
    return next(filter(None, folders), None) or split_of_name(path.name)


def splits_of(paths: Sequence[AnyPath], *, root: AnyPath) -> list[str | None]:
    """Return the splits that paths below `root` state; None for all unless every path states one; see `divide`."""
    splits = [split_of_path(relative(path, root)) for path in paths]
    unnamed = [path.name for path, split in zip(paths, splits, strict=True) if split is None]
    if unnamed and len(set(splits)) > 2:
        log.warning(
            "%s: %d of %d files, such as %s, state no split in their names: splits are not read from the names",
            root,
            len(unnamed),
            len(paths),
            unnamed[0],
        )
    return divide(splits, source=f"{root}, by the names of the files")


def divide(splits: Sequence[str | None], *, source: str) -> list[str | None]:
    """Return the splits of the parts of a source; None for all unless each part has one and two of them differ.

    A single name divides nothing: `datasets` calls all rows train where no split is stated, and train.csv alone is the
    whole of its source. The samples are then read as those of a source without splits.
    """
    counts = Counter(splits)
    if None in counts or len(counts) < 2:
        if None not in counts and len(splits) > 1:
            log.info("%s: all is %s: no split is read, since one name divides nothing", source, splits[0])
        return [None] * len(splits)
    log.info("split, %s: %s", source, ", ".join(f"{number} {name}" for name, number in counts.items()))
    return list(splits)


def strip_wildcard(data: str) -> str:
    """Return the folder of a pattern that matches everything in it, such as data/*; any other text unchanged."""
    for suffix in _WHOLE_FOLDER:
        folder = data.removesuffix(suffix)
        if folder != data and source_path(folder).is_dir() and not source_path(data).exists():
            return folder
    return data


def match_files(data: str, suffixes: Collection[str]) -> list[AnyPath]:
    """Return the files with these suffixes that a glob or brace pattern matches, sorted; [] for any other text.

    A folder that it matches stands for its files, as in `find_files`. Matches of other kinds are logged.
    """
    matches = match_paths(data)
    files = [path for path in matches if path.suffix in suffixes and path.is_file()]
    folders = [path for path in matches if path.is_dir()]
    if not files:
        return sort_paths(path for folder in folders for path in find_files(folder, suffixes))
    if len(files) < len(matches):
        skipped = sort_paths(set(matches) - set(files))
        log.info("%s: skipped %d matches of other kinds, such as %s", data, len(skipped), skipped[0])
    return files


def find_files(folder: AnyPath, suffixes: Collection[str]) -> list[AnyPath]:
    """Return the files of a folder with these suffixes, sorted; hidden files are left out.

    They lie in the folder itself or in subfolders named after splits (train/0.tar), else one level deeper
    (default/train/0.parquet), else in the subfolder `data` of the hub's layout.
    """
    paths = _split_files(folder, suffixes)
    if not paths:
        list_ahead(subfolders(folder))
        by_folder = {inner: _split_files(inner, suffixes, direct=inner.name == "data") for inner in subfolders(folder)}
        configurations = [inner for inner, inner_paths in by_folder.items() if inner_paths]
        if len(configurations) > 1:
            names = ", ".join(inner.name for inner in configurations[:_MAX_SHOWN])
            raise DatasetError(f"{folder} holds {len(configurations)} sets of files ({names}): pass the folder of one")
        paths = [path for inner_paths in by_folder.values() for path in inner_paths]
    return sort_paths(paths)


def _split_files(folder: AnyPath, suffixes: Collection[str], *, direct: bool = True) -> list[AnyPath]:
    """Return the files of a folder, if `direct`, and of its subfolders that are named after splits."""
    folders = [folder] if direct else []
    folders += [inner for inner in subfolders(folder) if split_of_name(inner.name)]
    return [path for inner in folders for path in visible(inner) if path.suffix in suffixes and path.is_file()]


def subfolders(folder: AnyPath) -> list[AnyPath]:
    """Return the folders in a folder, sorted, without hidden ones."""
    if isinstance(folder, RemotePath):
        statuses = folder.entries().items()
        return [folder / name for name, status in statuses if status.is_folder and not is_hidden(name)]
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def visible(folder: AnyPath) -> list[AnyPath]:
    """Return the entries of a folder, sorted, without hidden ones and those of operating systems."""
    if isinstance(folder, RemotePath):
        return [folder / name for name in folder.entries() if not is_hidden(name)]
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not is_hidden(entry.name))


def sort_paths(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """Sort paths, which are all of this machine or all at URLs."""
    return sorted(paths)


def list_ahead(folders: Sequence[AnyPath]) -> None:
    """List folders at URLs concurrently, whose entries are then looked up one after the other."""
    list_folders([folder for folder in folders if isinstance(folder, RemotePath)])


def check_source(data: str, *, allow_outside: bool) -> None:
    """Check a URL before any request is made, and drop what is known of files at URLs.

    Raises:
        RemoteError: The URL has another scheme, or credentials in it.
        DatasetError: It is of https, whose host is outside by its nature, and `allow_outside` is False.
    """
    if not is_url(data):
        return
    path = source_path(data)
    forget()
    if isinstance(path, RemotePath) and is_page(path.url) and not allow_outside:
        raise DatasetError(f"{path} is on a host of the internet: pass --allow-outside if you trust it")


def common_folder(paths: Sequence[AnyPath]) -> AnyPath:
    """Return the innermost folder that contains all these files."""
    if isinstance(paths[0], RemotePath):
        levels = zip(*(path.parent.parts for path in paths), strict=False)
        shared = takewhile(lambda names: len(set(names)) == 1, levels)
        return RemotePath("/".join(names[0] for names in shared))
    if any(path.is_absolute() for path in paths):
        paths = [path.absolute() for path in paths]
    return Path(os.path.commonpath([str(path.parent) for path in paths]))


def relative(path: AnyPath, root: AnyPath) -> PurePath:
    """Return the path of a file or folder below a folder."""
    if isinstance(path, RemotePath):
        return path.relative_to(root)
    return path if root == Path() else path.absolute().relative_to(str(root.absolute()))


def check_fetched(paths: Sequence[AnyPath]) -> None:
    """Raise DatasetError if a file is a Git LFS pointer."""
    if pointers := [path for path in paths if is_lfs_pointer_file(path)]:
        raise DatasetError(f"{pointers[0]} cannot be read: {LFS_HINT} ({len(pointers)} of {len(paths)} files)")


def is_pattern(data: str) -> bool:
    """Return whether a text is a glob or a brace pattern, not the path of a file."""
    is_there = not is_url(data) and os.path.lexists(data)
    return not is_there and (glob.has_magic(data) or _BRACES.search(data) is not None)


def match_paths(data: str) -> list[AnyPath]:
    """Return what a glob or brace pattern matches, sorted; DatasetError if a part of a brace pattern has no match."""
    if not is_pattern(data):
        return []
    patterns = expand_braces(data)
    matches: set[AnyPath] = set()
    for pattern in patterns:
        parts = source_path(pattern).parts
        paths = match_remote(pattern) if is_url(pattern) else map(Path, glob.glob(pattern, recursive=True))
        visible_paths = {path for path in paths if not any(is_hidden(part) for part in path.parts if part not in parts)}
        if not visible_paths and len(patterns) > 1:
            raise DatasetError(f"no such folder or file: {pattern}, of {data}")
        matches |= visible_paths
    return sort_paths(matches)


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns that braces stand for, as in a shell: {a,b} for each, {000..012} for padded numbers."""
    complete, pending = [], [pattern]
    while pending:
        part = pending.pop()
        match = _BRACES.search(part)
        if match is None:
            complete.append(part)
            continue
        span = _RANGE.fullmatch(match[1])
        low, high = (int(bound) for bound in span.groups()) if span else (0, -1)
        num_options = high - low + 1 if span else match[1].count(",") + 1
        if len(complete) + len(pending) + num_options > _MAX_PATTERNS:
            raise DatasetError(f"{pattern} stands for more than {_MAX_PATTERNS:,} files")
        numbers = [str(number).zfill(len(span[1])) for number in range(low, high + 1)] if span else []
        options = numbers if span else match[1].split(",")
        pending += [f"{part[: match.start()]}{option}{part[match.end() :]}" for option in options]
    return sorted(set(complete))
