"""Source formats: what a reader returns, the registry of readers, and the choice of one for a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from ...errors import DatasetError
from ...registry import Entry, Registry
from ...remote.paths import AnyPath
from ..not_read import NotRead


class Shard(Protocol):
    """Some consecutive rows of a source, the unit that is encoded at once.

    A shard is pickled and sent to worker processes: it holds the location of its rows, or few rows in memory, and no
    open file. `read` may be called in any process and any order, more than once, with the same result.
    """

    @property
    def index(self) -> int:
        """Position among the shards of the source, from 0."""

    @property
    def first(self) -> int:
        """Index of the first row in the source, the sum of `num_rows` of the shards before this one."""

    @property
    def num_rows(self) -> int:
        """Number of rows, at least 1."""

    @property
    def location(self) -> tuple[str, int, int] | None:
        """The file that `read` opens, and two numbers for the position of the rows in it; None for rows in memory."""

    def read(self, columns: list[str]) -> pa.Table:
        """Read these columns of the rows, in this order, with the types of `Plan.sample`.

        Raises:
            DatasetError: The rows cannot be read; one line that names the file and the reason.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the rows of a source are read.

    Columns are named as in a metadata file: `label`, and if there are any `id`, `group` and `split`, are found by these
    names. All other columns are modalities where their type or content allows it: paths of media relative to `root`,
    bytes (or structs of `bytes` and `path`) of media, vectors of numbers, or texts.

    Args:
        root: Folder that relative paths start from, and that paths may not leave; a path, or a RemotePath of a URL.
        sample: Some 64 rows spread over the source, from which modalities are inferred; its schema is that of all rows.
            A column with values is not null in all of them.
        shards: All rows, in order.
        folders: The folders that contain the files of rows, if there can be several.
        not_read: Files that belong to the source, but to no column.
    """

    root: AnyPath
    sample: pa.Table
    shards: tuple[Shard, ...]
    folders: tuple[AnyPath, ...] = ()
    not_read: tuple[NotRead, ...] = ()


class Reader(Protocol):
    """A function that plans the rows of a source, or returns None if the source does not have the reader's format.

    The formats are asked in turn, so that a reader recognises its own by names and existence of files alone.

    Args:
        data: Path, URL, glob or name as the user wrote it.
        shard_rows: Most rows of a shard whose columns hold media; 256 by default.
        allow_outside: Whether links may lead outside the source's folder.

    Returns:
        The plan, or None for a source of another format.

    Raises:
        DatasetError: The source has the format, but cannot be read.

    Example:
        A package adds files of one JSON array by a function and an entry point in its pyproject.toml, and
        `--set data.reader=json-array` selects it:

        >>> from mmaudit.audit.dataset.formats.tables import plan_rows
        >>> def plan_json_array(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
        ...     if not data.endswith(".json"):
        ...         return None
        ...     rows = pa.Table.from_pylist(json.loads(Path(data).read_text()))
        ...     return plan_rows(Path(data).parent, rows, shard_rows=shard_rows)

        [project.entry-points."mmaudit.readers"]
        json-array = "my_package.json_array:plan_json_array"
    """

    def __call__(self, data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
        """Plan the rows of `data`."""


# In the order in which they are asked: a folder of several formats is read by the first.
READERS = Registry(
    {
        "tables": Entry(
            "tables:plan_tables",
            "csv, tsv, jsonl or Parquet: a file, a glob, a folder with metadata or with tables named after splits",
        ),
        "saved": Entry("saved:plan_saved", "a folder written by save_to_disk of `datasets`"),
        "tars": Entry("tars:plan_tars", "WebDataset tars: a file, a glob, a folder, or one folder per split"),
        "parquet-folder": Entry("tables:plan_parquet_folder", "a folder of Parquet files, also in the hub's layout"),
        "folders": Entry("folders:plan_folders", "media in folders named by class: ROOT[/split]/class/file"),
        "hub": Entry("saved:plan_hub", "a name on the Hugging Face hub: user/name or name, with an optional :config"),
    },
    package=__name__,
    group="mmaudit.readers",
    option="data.reader",
)


def plan_source(data: str, *, reader: str = "auto", shard_rows: int, allow_outside: bool) -> Plan:
    """Plan the rows of a source by the named reader, or by the first built-in one that recognises it for "auto".

    Raises:
        ConfigError: There is no such reader, or its package cannot be imported.
        DatasetError: The source has no known format, or not that of the named reader, or cannot be read.
    """
    from .sources import check_source, strip_wildcard
    from .tables import source_error

    check_source(data, allow_outside=allow_outside)
    for name in READERS if reader == "auto" else (reader,):
        plan_rows: Reader = READERS.load(name)
        plan = plan_rows(strip_wildcard(data), shard_rows=shard_rows, allow_outside=allow_outside)
        if plan is not None:
            return plan
    if reader == "auto":
        raise source_error(data)
    raise DatasetError(f"{data} is not of the format that data.reader = {reader!r} reads: correct or omit it")
