"""Search for the pictures that a list names by path, by name, or by name without extension."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Set
from pathlib import Path, PurePosixPath

from ..errors import DatasetError
from ..media.files import kind_of_path
from ..parsing import fold_text
from .names import folder_split, is_in_folder, plain_name

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
