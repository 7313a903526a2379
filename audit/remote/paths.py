"""Paths at URLs, with the part of the interface of pathlib.Path that the readers of sources need."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..errors import RemoteError, choices, printable
from .ranged_file import RangedFile
from .requests import PACKAGES, FileStatus, find, is_page, list_folder, read_ranges, status_of, thread_pool

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile("[\x00-\x1f\x7f]")


def is_url(text: object) -> bool:
    """Return whether a text is a URL, whatever its scheme."""
    return isinstance(text, str) and _URL.match(text) is not None


def shown_url(text: str) -> str:
    """Return a URL for messages: without user, password, query and fragment."""
    parts = urlsplit(text)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """A file or folder at a URL; `url` ends without a slash. Opening and listing make requests, all else does not."""

    url: str

    @classmethod
    def parse(cls, text: str) -> RemotePath:
        """Check and normalise a URL.

        Raises:
            RemoteError: Another scheme, a URL with credentials, or one with .. in it. The message shows neither
                credentials nor query.
        """
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise RemoteError(f"not a URL: {printable(text.rpartition('@')[2])}") from error
        scheme = {"s3a": "s3", "gcs": "gs"}.get(parts.scheme, parts.scheme)
        if scheme not in PACKAGES:
            raise RemoteError(f"{shown_url(text)}: no scheme {printable(scheme)}://; {choices(scheme, PACKAGES)}")
        if "@" in parts.netloc or (is_page(f"{scheme}://") and (parts.query or parts.fragment)):
            raise RemoteError(
                f"{shown_url(text)}: the URL holds credentials, a query or a fragment, which would be stored with the "
                "results: put credentials into the environment or the files of the provider, and leave the rest out; "
                "download what a presigned URL names, or name it by s3:// or gs://"
            )
        path = text[len(parts.scheme) + 3 :].strip("/")
        if ".." in unquote(path).split("/") or "::" in text:
            raise RemoteError(f"{shown_url(text)}: a URL may not hold .. or ::")
        _check_characters(path)
        return cls(f"{scheme}://{re.sub('/+', '/', path)}")

    def __str__(self) -> str:
        return self.url

    @property
    def parts(self) -> tuple[str, ...]:
        """The scheme with the host or bucket, and the names of the path."""
        root, *names = self.url.partition("://")[2].split("/")
        return f"{urlsplit(self.url).scheme}://{root}", *names

    @property
    def name(self) -> str:
        """The last name of the path; "" of a bucket or host."""
        return self.url.rpartition("/")[2] if len(self.parts) > 1 else ""

    @property
    def suffix(self) -> str:
        """The extension of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder of the path; a bucket or host is its own."""
        return RemotePath("/".join(self.parts[:-1])) if len(self.parts) > 1 else self

    def __truediv__(self, name: str) -> RemotePath:
        """Join a relative path. Of https, ? and # in it belong to the path."""
        if is_page(self.url):
            name = name.replace("?", "%3F").replace("#", "%23")
        names = [part for part in name.split("/") if part not in ("", ".")]
        return RemotePath("/".join([self.url.rstrip("/"), *names]))

    def is_absolute(self) -> bool:
        """Return True."""
        return True

    def absolute(self) -> RemotePath:
        """Return the path itself."""
        return self

    def relative_to(self, other: RemotePath | Path) -> PurePosixPath:
        """Return the path below another; ValueError if it lies elsewhere."""
        own, names = self.parts, getattr(other, "parts", ())
        if own[: len(names)] != names:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(*own[len(names) :])

    def status(self) -> FileStatus | None:
        """Return size and tag; None if there is nothing."""
        if is_page(self.url) and not self.suffix:  # a page is a file as well: the name decides
            return FileStatus(size=0, tag="", is_folder=True) if list_folder(self.url) else None
        return status_of(self.url)

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self.status() is not None

    def is_file(self) -> bool:
        """Return whether there is a file."""
        status = self.status()
        return status is not None and not status.is_folder

    def is_dir(self) -> bool:
        """Return whether there is a folder, that is, anything below the path."""
        status = self.status()
        return status is not None and status.is_folder

    def entries(self) -> dict[str, FileStatus]:
        """Return the entries of a folder by name, sorted."""
        return list_folder(self.url)

    def find(self) -> dict[str, FileStatus]:
        """Return all files below a folder by their relative paths."""
        return find(self.url)

    def file_status(self) -> FileStatus:
        """Return size and tag of a file; raise FileNotFoundError, or IsADirectoryError for a folder."""
        status = self.status()
        if status is None:
            raise FileNotFoundError(2, "No such file or directory", self.url)
        if status.is_folder:
            raise IsADirectoryError(21, "it is a folder, not a regular file", self.url)
        return status

    def open(self) -> RangedFile:
        """Open a file to read ranges of its bytes."""
        return RangedFile(self.url, self.file_status())

    def read_bytes(self) -> bytes:
        """Read all bytes of a file, in concurrent ranges."""
        size = self.file_status().size
        return b"".join(data for _, data in read_ranges(self.url, [(0, size)], size=size)) if size else b""


def _check_characters(path: str) -> None:
    """Raise RemoteError for a control character in the path of a URL, written out or as %00."""
    if _CONTROL.search(unquote(path)):
        raise RemoteError(f"{printable(path)}: a URL may not hold control characters")


AnyPath = Path | RemotePath


def source_path(text: str | Path) -> AnyPath:
    """Return the path of a source: a URL, or a path on this machine; file:// is the latter."""
    if not is_url(text):
        return Path(text)
    text = str(text)
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise RemoteError(f"{shown_url(text)}: file:// needs an absolute path, as in file:///data/clips")
        _check_characters(parts.path)
        return Path(unquote(parts.path))
    return RemotePath.parse(text)


def match_remote(pattern: str) -> Iterator[RemotePath]:
    """Yield the files and folders that a glob at a URL matches; * and ? match within a name, ** any names."""
    root = RemotePath.parse(pattern)
    names = root.parts
    first = next((index for index, name in enumerate(names) if set(name) & set("*?[")), len(names))
    yield from _match(RemotePath("/".join(names[:first])), names[first:])


def _match(folder: RemotePath, names: tuple[str, ...]) -> Iterator[RemotePath]:
    if not names:
        if folder.exists():
            yield folder
        return
    if names[0] == "**":
        rest = names[1:] or ("*",)
        yield from _match(folder, rest)
        for name, status in folder.entries().items():
            if status.is_folder:
                yield from _match(folder / name, names)
        return
    for name, status in folder.entries().items():
        if fnmatch.fnmatchcase(name, names[0]) and (status.is_folder or len(names) == 1):
            yield from _match(folder / name, names[1:])


def list_folders(folders: list[RemotePath]) -> None:
    """List folders concurrently, so that what follows finds their entries."""
    list(thread_pool().map(lambda folder: folder.entries(), folders))
