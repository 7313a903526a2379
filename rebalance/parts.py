"""The parts of a score table: which files are there, what columns have they, and how are they read in batches?"""

from __future__ import annotations

import glob
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa

from ..audit.errors import ScoreError
from ..audit.parquet import read_batches, read_schema
from ..audit.regular_file import check_regular

BATCH_ROWS = 131_072

Part: TypeAlias = "Path | pa.Table"
Item = TypeVar("Item")


def files_of(source: str | Path | Sequence[str | Path]) -> list[Part]:
    """Give the files that are named, each once; ScoreError where a name leads to none."""
    named = [source] if isinstance(source, (str, Path)) else list(source)
    found: list[Part] = []
    for each in named:
        path = Path(each)
        if path.is_dir():
            some = sorted(one for one in path.glob("*.parquet") if one.name[0] != ".")
        else:
            some = [path] if path.exists() else sorted(Path(one) for one in glob.glob(str(each), recursive=True))
        if not some:
            raise ScoreError(f"no score table {each}: name a Parquet file, a folder of them or a glob")
        for path in some:
            _check_regular(path)
        found += some
    return list(dict.fromkeys(found))


def _check_regular(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise ScoreError(f"the score table {path} cannot be read: {error.strerror}") from error


def schema_of(part: Part) -> pa.Schema:
    """Read the schema of a part; ScoreError where it is no Parquet."""
    return part.schema if isinstance(part, pa.Table) else read_schema(part, error=ScoreError)


def name_of(part: Part) -> str:
    """Say what an error calls a part."""
    return str(part) if isinstance(part, Path) else "the score table"


def check_schema(schema: pa.Schema, part: Part) -> None:
    """Raise ScoreError for columns that stand twice."""
    where = name_of(part)
    for name in schema.names:
        if len(places := schema.get_all_field_indices(name)) > 1:
            raise ScoreError(f"{where} has {len(places)} columns {name}: name each once")


def batches_of_part(part: Part, columns: Iterable[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Read a part in batches; of a file no more than that is held."""
    names = list(columns)
    if isinstance(part, pa.Table):
        for first in range(0, len(part), BATCH_ROWS):
            yield part.select(names).slice(first, BATCH_ROWS)
        return
    coded = [name for name in dictionary if name in names]
    for table in read_batches(part, error=ScoreError, rows=BATCH_ROWS, columns=names, dictionary=coded):
        yield table.select(names)


def in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Order the parts by the first id of each, and leave out those without rows."""
    first = {}
    for place, part in enumerate(parts):
        if isinstance(part, pa.Table):
            return tuple(parts)
        with closing(read_batches(part, error=ScoreError, rows=1, columns=["sample_id"])) as batches:
            batch = next(batches, None)
        if batch is not None and len(batch):
            first[place] = str(batch["sample_id"][0].as_py())
    return tuple(parts[place] for place in sorted(first, key=lambda place: (first[place], str(parts[place]))))


def prefetched(*sources: Iterable[Item], depth: int = 1) -> Iterator[Item]:
    """Let a thread for each source work ahead: reading then goes on while what was read is worked on.

    The items of one source come in its order; those of several as they are ready.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth * len(sources))
    stopped = threading.Event()

    def offer(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work(items: Iterable[Item]) -> None:
        try:
            for item in items:
                offer((True, item))
                if stopped.is_set():
                    return
            offer((False, None))
        except BaseException as error:
            offer((False, error))

    for source in sources:
        threading.Thread(target=work, args=(source,), daemon=True).start()
    going = len(sources)
    try:
        while going:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                going -= 1
            else:
                raise item
    finally:
        stopped.set()
