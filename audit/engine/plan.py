"""The plan of parts of a dataset, `shards.json`.

A part is some consecutive shards of the source. The plan follows from the data and the largest number of rows of a part
alone: not from processes, nor from the order in which parts are worked on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..dataset.formats import Shard
from ..errors import ConfigError, RunError
from ..hashing import digest
from ..parsing import RequiredKeys, Shape, check_ranges
from ..remote.paths import is_url
from ..storage import file_stamp, read_json, write_json

PLAN_SCHEMA = "mmaudit.shards/1"
SINGLE = 4  # ours: data of up to so many times the rows of a part are one part, as all sets up to 10^6 rows are
_SHAPE: Shape = RequiredKeys(
    schema=str,
    num_rows=int,
    part_rows=int,
    config=str,
    parts=[RequiredKeys(first_shard=int, end_shard=int, first=int, num_rows=int)],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsConfig:
    """How large data are divided into parts, each scored by itself.

    Args:
        rows: Largest number of rows of a part, unless one shard has more; data of at most four times as many rows are
            one part. A part of 262,144 rows takes about 1 GB; fewer rows take less memory.

    Raises:
        ConfigError: A value is out of range.
    """

    rows: int = 1 << 18

    def __post_init__(self) -> None:
        check_ranges("parts", self, rows="[1, inf)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some consecutive shards, by number, and their rows, `num_rows` from row `first` of the dataset."""

    index: int
    first_shard: int
    end_shard: int
    first: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """The parts of a dataset. config: digest of all that the stages depend on, the data's files among it."""

    parts: tuple[Part, ...]
    num_rows: int
    part_rows: int
    config: str

    def to_json(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """Return the content of shards.json; `shards` are those of the dataset."""
        return {
            "schema": PLAN_SCHEMA,
            "num_rows": self.num_rows,
            "part_rows": self.part_rows,
            "config": self.config,
            "parts": [
                {
                    "first_shard": part.first_shard,
                    "end_shard": part.end_shard,
                    "first": part.first,
                    "num_rows": part.num_rows,
                    "files": _files(shards[part.first_shard : part.end_shard]),
                }
                for part in self.parts
            ],
        }

    def write(self, path: Path, shards: Sequence[Shard]) -> None:
        """Write shards.json; raise RunError if it exists and is the plan of other data, or with another config."""
        content = self.to_json(shards)
        if not path.exists():
            write_json(content, path)
        elif (written := read_json(path, error=RunError, shape=_SHAPE)) != content:
            what = next(key for key in content if written.get(key) != content[key])
            raise RunError(
                f"{path.parent} has parts of other data or of another config ({what} of {path.name} differs): pass "
                "another folder with --run, or --overwrite"
            )


def plan_parts(
    shards: Sequence[Shard], *, config: PartsConfig, depends_on: Sequence[str], own: Path | None = None
) -> ShardPlan:
    """Divide shards into parts.

    Args:
        shards: The shards of a dataset.
        config: Size of the parts.
        depends_on: Texts of all that the results depend on besides the files of the shards.
        own: Folder of the run, whose files are named by their content and have no stamps.
    """
    num_rows = sum(shard.num_rows for shard in shards)
    max_rows = num_rows if num_rows <= SINGLE * config.rows else config.rows
    starts, rows = [0], 0
    for number, shard in enumerate(shards):
        if rows and rows + shard.num_rows > max_rows:
            starts.append(number)
            rows = 0
        rows += shard.num_rows
    parts: list[Part] = []
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(shards)], strict=True)):
        part_rows = sum(shard.num_rows for shard in shards[start:end])
        first = parts[-1].first + parts[-1].num_rows if parts else 0
        parts.append(Part(index=index, first_shard=start, end_shard=end, first=first, num_rows=part_rows))
    texts = [*depends_on, *_stamps(shards, own=own)]
    config_digest = digest(*(text.encode("utf-8", "surrogatepass") for text in texts))
    return ShardPlan(parts=tuple(parts), num_rows=num_rows, part_rows=config.rows, config=config_digest)


def _stamps(shards: Sequence[Shard], *, own: Path | None) -> Iterator[str]:
    """Yield the files of shards with size and time of modification, and the positions of the shards."""
    located = [(shard.location, shard.num_rows) for shard in shards if shard.location is not None]
    names = {location[0]: _real_name(location[0]) for location, _ in located}
    for name in sorted(names):
        stamp = file_stamp(name)
        is_own = own is not None and not is_url(name) and Path(names[name]).is_relative_to(own.resolve())
        yield repr((names[name], stamp and (stamp[1], 0 if is_own else stamp[2])))
    yield repr([(names[location[0]], *location[1:], num_rows) for location, num_rows in located])


def part_stamp(shards: Sequence[Shard], *, own: Path) -> str:
    """Return a digest of the files of the shards of a part, with size and time; "" of rows that are in no file."""
    if any(shard.location is None for shard in shards):
        return ""
    return digest(*(text.encode("utf-8", "surrogatepass") for text in _stamps(shards, own=own)))


def _real_name(name: str) -> str:
    """Return the path of a file without links; a URL as it is."""
    return name if is_url(name) else os.path.realpath(name)


def _files(shards: Sequence[Shard]) -> list[list[str | int]]:
    """Return each file with the positions of its first and last shard; [] of rows in memory."""
    located = [shard.location for shard in shards if shard.location is not None]
    groups = [(name, list(group)) for name, group in groupby(located, key=lambda location: location[0])]
    return [[name, *group[0][1:], *group[-1][1:]] for name, group in groups]


def take_parts(text: str, parts: Sequence[Part]) -> list[Part]:
    """Return the parts of shard i of n, i/n with i from 1: every n-th, from the i-th.

    Raises:
        ConfigError: The text is not i/n with 1 <= i <= n.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {text}: not of the form i/n with i from 1 to n, such as 1/4")
    return list(parts[int(number) - 1 :: int(count)])
