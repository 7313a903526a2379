"""Verify: does a manifest still hold what was written into it, and are the media it names those that were scored?"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..audit.encoding.encoders import encode_vectors
from ..audit.encoding.features import Status
from ..audit.errors import ManifestError
from ..audit.files import read_json
from ..audit.hashing import digest
from ..audit.quality import UnusableError
from ..audit.source.dataset import Dataset
from ..audit.source.modality import Modality
from ..audit.stock import row_content
from ..audit.workers import ahead
from .manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    SCHEMA_VERSION,
    RowDigest,
    batches_of,
    check_columns,
    dropped_path,
    provenance_of,
    regrouped,
    rows_of,
)
from .recipe import balance_path
from .shards import keys_of, prefetched
from .spill import Spill

BOUNDS: dict[
    str, tuple[float, float]
] = {  # both ends are within; the last bin and the last rank are the manifest's own
    "bin": (0.0, np.inf),
    "rank": (0.0, np.inf),
    "weight": (5e-324, float(np.finfo(np.float32).max)),
    "discrepancy": (-1.0, 1.0),
    "gap": (0.0, 1.0),
    "balance": (-1.0, 1.0),
    "p_balanced": (0.0, 1.0),
}
REQUIRED = ("sample_id", "label", "subset", "rank", "weight", "gap", "reason")  # those of them that a file has
_SLACK = 2e-6  # a confidence may lie 1e-6 outside [0, 1], and a discrepancy has two of them
_MARKS = {True: "held", False: "FAILED", None: "not looked at"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. held: None where it was not, and `detail` says why."""

    name: str
    held: bool | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of a manifest, one check after another."""

    manifest: Path
    checks: tuple[Check, ...]

    @property
    def held(self) -> bool:
        """Whether no check failed; those that were not looked at do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.held is False)

    def to_dict(self) -> dict[str, Any]:
        """Give it in plain values."""
        return {"manifest": str(self.manifest), "held": self.held, "checks": [asdict(check) for check in self.checks]}

    def lines(self) -> list[str]:
        """Give one line for each check."""
        return [f"{_MARKS[check.held]:<14}{check.name}: {check.detail}" for check in self.checks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a sample is made of: `content` as in Stock.content, and `problem` where a modality cannot be read."""

    sample_id: str
    content: str
    problem: str | None = None


def verify(
    manifest: Path,
    *,
    dataset: Dataset | None = None,
    contents: Mapping[str, Content] | None = None,
    fingerprint: str | None = None,
    scratch: Path | None = None,
    num_threads: int = 0,
) -> Verified:
    """Look at all that a manifest and its dropped rows say of themselves, a batch at a time.

    `dataset` is its source, whose media are then hashed; or `contents` gives them by id where they are known already.
    The ids and contents of the kept samples are then held in memory. `fingerprint` is the source's, Stock.fingerprint.
    `scratch` is a folder for 16 bytes a row of more than 262,144, by default the system's.
    Drift is in what is given back; ManifestError is raised where there is no manifest that could be read.
    """
    try:
        checks = _checks(
            manifest, dataset=dataset, contents=contents, fingerprint=fingerprint, scratch=scratch, threads=num_threads
        )
    except UnicodeDecodeError as cause:
        raise ManifestError(f"{manifest} or its dropped rows are damaged: {cause}") from cause
    return Verified(manifest=manifest, checks=tuple(checks))


def _checks(
    manifest: Path,
    *,
    dataset: Dataset | None,
    contents: Mapping[str, Content] | None,
    fingerprint: str | None,
    scratch: Path | None,
    threads: int,
) -> list[Check]:
    provenance = provenance_of(manifest)
    check_columns(pq.read_schema(manifest), where=str(manifest))
    beside = dropped_path(manifest)
    files = [_Survey(manifest, COLUMNS, provenance)]
    if beside.exists():
        files.append(_Survey(beside, DROPPED_COLUMNS, provenance))
    whole = [file for file in files if not file.missing]
    with Spill(sum(file.num_rows for file in whole), scratch or Path(tempfile.gettempdir())) as ids:
        for number, file in enumerate(whole):
            file.read_all(ids, number)
        repeated = ids.repeated()
    checks = [*files[0].checks(""), *_ids(whole, repeated), _labels(whole), _subset(whole, provenance)]
    checks += _dropped(files, beside)
    numbers = balance_path(manifest)
    checks += _complete(whole, read_json(numbers, error=ManifestError) if numbers.exists() else None)
    checks.append(_media(manifest, provenance, dataset=dataset, contents=contents, num_threads=threads))
    checks.append(_fingerprint(provenance, fingerprint))
    return checks


def contents_of(dataset: Dataset, *, only: Container[str] | None = None, num_threads: int = 0) -> Iterator[Content]:
    """Hash what every sample is made of, or those whose ids are in `only`, in the dataset's order; nothing is encoded.

    Threads read ahead. Raises DatasetError for a path that leads outside, unless the dataset allows that.
    """
    for shard in dataset.shards:
        ids = dataset.sample_ids(dataset.read(shard, modalities=False), shard)
        places = [place for place, name in enumerate(ids) if only is None or name in only]
        if not places:
            continue
        rows = dataset.read(shard)
        problems: dict[int, str] = {}
        seen: dict[tuple[str, str], NDArray[np.bytes_]] = {}  # a film's sound and sight are one file
        statuses = []
        for modality in dataset.modalities:
            form = "file" if modality.kind in ("audio", "image", "video") else modality.kind
            key = (modality.column, form)
            if key not in seen:
                seen[key] = _hash(dataset, modality, rows[modality.column], places, problems, num_threads=num_threads)
            usable = np.ones(len(places), dtype=bool)
            statuses.append(Status(modality=modality, usable=usable, content=seen[key], problem=()))
        for row, content in enumerate(row_content(statuses)):
            yield Content(sample_id=ids[places[row]], content=content, problem=problems.get(row))


def _hash(
    dataset: Dataset,
    modality: Modality,
    cells: pa.ChunkedArray,
    places: Sequence[int],
    problems: dict[int, str],
    *,
    num_threads: int,
) -> NDArray[np.bytes_]:
    """Give the digests of these cells, as encoding notes them, and note what cannot be read."""
    if modality.kind == "features":
        return encode_vectors(cells.take(pa.array(places)), modality).content
    found = []
    some = (cells[place] for place in places)
    for row, (content, problem) in enumerate(
        ahead(partial(_hash_cell, dataset, modality), some, num_threads=num_threads)
    ):
        found.append(content)
        if problem is not None:
            problems.setdefault(row, problem)
    return np.array(found, dtype="S32")


def _hash_cell(dataset: Dataset, modality: Modality, cell: pa.Scalar) -> tuple[bytes, str | None]:
    try:
        loaded = dataset.load(cell.as_py(), modality)
    except UnusableError as error:
        return digest(str(error).encode()).encode(), error.detail
    if isinstance(loaded, str):
        return digest(loaded.encode("utf-8", "surrogatepass")).encode(), None
    if isinstance(loaded, bytes):
        return digest(loaded).encode(), None
    return digest(*(digest(*folder).encode() for folder in loaded)).encode(), None


class _Survey:
    """What one file says of its rows, and what they are."""

    def __init__(self, path: Path, columns: dict[str, pa.DataType], provenance: dict[str, Any]) -> None:
        self.path = path
        self.about, self.provenance = rows_of(path), provenance_of(path)
        self.schema = pq.read_schema(path)
        _check_ids(self.schema, path)
        self.num_rows = int(pq.read_metadata(path).num_rows)
        self.missing = [name for name in columns if name not in self.schema.names]
        self.columns = columns
        self.bounds: dict[str, tuple[float, float]] = {
            **BOUNDS,
            "bin": (0.0, _num_bins(provenance) - 1.0),
            "rank": (0.0, max(self.num_rows - 1.0, 0.0)),
        }
        self.digest = RowDigest()
        self.nulls: Counter[str] = Counter()
        self.beyond: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.names: dict[Any, set[Any]] = {}
        self.subsets: set[Any] = set()

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read the rows; ManifestError where the file is damaged."""
        try:
            yield from batches_of(self.path, columns=columns)
        except (pa.ArrowException, OSError) as cause:
            raise ManifestError(f"{self.path} is damaged: {str(cause).splitlines()[0]}") from cause

    def read_all(self, ids: Spill, number: int) -> None:
        """Look at every row once."""
        for table in prefetched(regrouped(self.tables())):
            self.digest.add(table)
            self._note_nulls(table)
            self._note_ranges(table)
            self.subsets |= set(pc.unique(table["subset"]).to_pylist())
            pairs = table.select(["label", "label_name"]).group_by(["label", "label_name"]).aggregate([])
            for pair in pairs.to_pylist():
                self.names.setdefault(pair["label"], set()).add(pair["label_name"])
            key = keys_of(_named(table["sample_id"]), seed=0)
            ids.add(key, np.full(len(key), number, np.int32), np.zeros(len(key), np.uint32))

    def _note_nulls(self, table: pa.Table) -> None:
        for name in REQUIRED:
            if name in table.column_names and table[name].null_count:
                self.nulls[name] += table[name].null_count

    def _note_ranges(self, table: pa.Table) -> None:
        for name, (low, high) in self.bounds.items():
            if name not in table.column_names or not _is_number(table[name].type):
                continue
            there = table[name].is_valid().to_numpy()
            values = table[name].cast(pa.float64(), safe=False).fill_null(0).to_numpy()
            slack = _SLACK if low == -1 or high == 1 else 0.0
            wrong = there & ~((values >= low - slack) & (values <= high + slack))
            if wrong.any():
                place = int(np.argmax(wrong))
                self.beyond[name] += int(wrong.sum())
                self.first.setdefault(name, f"{values[place]:g} of sample {table['sample_id'][place]}")

    def checks(self, prefix: str) -> list[Check]:
        """Give the checks of this file alone; `prefix` tells the dropped rows'."""
        schema = self._schema()
        if self.missing:
            return [Check(name=f"{prefix}schema", held=False, detail=schema)]
        expected = f"{self.path.name} is mmaudit.manifest/{SCHEMA_VERSION}, {len(self.columns)} columns"
        found = self.digest.hexdigest()
        nulls = ", ".join(f"{number:,} of {name}" for name, number in self.nulls.items())
        ranges = "; ".join(
            f"{number:,} of {name} outside {_span(*self.bounds[name])} (the first: {self.first[name]})"
            for name, number in self.beyond.items()
        )
        return [
            Check(name=f"{prefix}schema", held=not schema, detail=schema or expected),
            _stated(f"{prefix}rows", self.about.get("rows"), self.num_rows),
            _stated(f"{prefix}digest", self.about.get("digest"), found),
            Check(name=f"{prefix}nulls", held=not nulls, detail=nulls or "none where a value must be"),
            Check(name=f"{prefix}ranges", held=not ranges, detail=ranges or "every value lies within its range"),
        ]

    def _schema(self) -> str:
        """Say what is wrong with the schema; nothing: ""."""
        if self.missing:
            return f"{self.path.name} lacks {', '.join(self.missing)}: run mmaudit split again"
        stated, right = self.provenance.get("schema"), f"mmaudit.manifest/{SCHEMA_VERSION}"
        if stated is None:
            return f"{self.path.name} has no metadata under the key mmaudit: another tool has written it since"
        if stated != right:
            return f"{self.path.name} is {stated}, and this mmaudit reads {right}: run mmaudit split again"
        types = {name: (self.schema.field(name).type, type_) for name, type_ in self.columns.items()}
        return ", ".join(f"{name} is {type_}, not {right}" for name, (type_, right) in types.items() if type_ != right)


def _stated(name: str, stated: object, found: object) -> Check:
    if stated is None:
        detail = f"the metadata do not state it; found {found}: another tool has written the file since"
        return Check(name=name, held=False, detail=detail)
    same = stated == found
    return Check(name=name, held=same, detail=str(found) if same else f"{stated} when written, {found} now")


def _ids(files: Sequence[_Survey], repeated: NDArray[np.uint64]) -> list[Check]:
    """Check that ids are unique, and that none is both kept and dropped."""
    times = _times(files, repeated)
    found = []
    for number, name in enumerate(("ids", "dropped ids")[: len(files)]):
        twice = sorted(each for each, counts in times.items() if counts[number] > 1)
        more = f"{len(twice):,} ids stand more than once (the first: {twice[0]})" if twice else "no id stands twice"
        found.append(Check(name=name, held=not twice, detail=more))
    if len(files) > 1:
        both = sorted(each for each, counts in times.items() if all(counts))
        more = f"{len(both):,} samples are both kept and dropped (the first: {both[0]})" if both else "no id is in both"
        found.append(Check(name="disjoint", held=not both, detail=more))
    return found


def _times(files: Sequence[_Survey], repeated: NDArray[np.uint64]) -> dict[str, list[int]]:
    """Count the rows of each id in each file; of those alone whose keys stand twice, which two ids may share."""
    times: dict[str, list[int]] = {}
    for number, file in enumerate(files if len(repeated) else ()):
        for table in file.tables(["sample_id"]):
            ids = _named(table["sample_id"])
            mask = np.isin(keys_of(ids, seed=0), repeated)
            for name in ids.filter(pa.array(mask)).to_pylist():
                times.setdefault(str(name), [0] * len(files))[number] += 1
    return times


def _labels(files: Sequence[_Survey]) -> Check:
    names: dict[Any, set[Any]] = {}
    for label, called in chain.from_iterable(file.names.items() for file in files):
        names.setdefault(label, set()).update(called)
    twice = [label for label, called in names.items() if len(called) > 1]
    if not twice:
        return Check(name="labels", held=True, detail=f"{len(names):,} labels, each with one name")
    some = ", ".join(sorted(repr(each) for each in names[twice[0]])[:3])
    detail = f"{len(twice):,} labels have more than one name (the first: {twice[0]} is {some})"
    return Check(name="labels", held=False, detail=detail)


def _subset(files: Sequence[_Survey], provenance: dict[str, Any]) -> Check:
    stated = provenance.get("subset")
    other = sorted({str(each) for file in files for each in file.subsets} - {str(stated)})
    detail = f"the rows are of {other[0]!r}, the metadata of {stated!r}" if other else repr(stated)
    return Check(name="subset", held=not other, detail=detail)


def _dropped(files: Sequence[_Survey], beside: Path) -> list[Check]:
    """Check the dropped rows by themselves, and that they are this manifest's."""
    if len(files) < 2:
        return [Check(name="dropped", held=None, detail=f"there is no {beside.name} beside it")]
    kept, dropped = files
    mine, theirs = kept.about.get("digest", kept.digest.hexdigest()), dropped.about.get("dropped_from")
    detail = "they were dropped from this manifest"
    if mine != theirs:
        detail = f"{beside.name} holds the rows dropped from another manifest: run mmaudit split again"
    elif kept.provenance != dropped.provenance:
        detail = f"the metadata of {beside.name} are not those of {kept.path.name}: one of them was changed"
    same = mine == theirs and kept.provenance == dropped.provenance
    return [*dropped.checks("dropped "), Check(name="dropped from", held=same, detail=detail)]


def _complete(files: Sequence[_Survey], numbers: dict[str, Any] | None) -> list[Check]:
    """Check that the numbers beside a manifest are its own, and that kept and dropped are all that were scored."""
    if numbers is None:
        return [Check(name="complete", held=None, detail="no file of numbers beside it tells how many were scored")]
    mine, theirs = files[0].about.get("digest", files[0].digest.hexdigest()), numbers.get("digest")
    beside = balance_path(files[0].path).name
    said = f"{beside} is this manifest's" if mine == theirs else f"{beside} tells of another manifest: split again"
    checks = [Check(name="numbers", held=mine == theirs, detail=said)]
    if mine != theirs or len(files) < 2:
        return [*checks, Check(name="complete", held=None, detail="there is nothing of its own to count by")]
    (kept, dropped), scored = (file.num_rows for file in files), numbers.get("scored")
    said = f"{kept:,} kept and {dropped:,} dropped of {scored} scored"
    return [*checks, Check(name="complete", held=kept + dropped == scored, detail=said)]


def _media(
    manifest: Path,
    provenance: dict[str, Any],
    *,
    dataset: Dataset | None,
    contents: Mapping[str, Content] | None,
    num_threads: int,
) -> Check:
    """Check that the kept samples are made of what they were made of when they were scored."""
    if dataset is None and contents is None:
        return Check(name="media", held=None, detail="the data were not opened")
    if dataset is not None and (odd := _other_modalities(provenance, dataset)):
        return Check(name="media", held=False, detail=odd)
    expected: dict[str, str] = {}
    for table in batches_of(manifest, columns=["sample_id", "content"]):
        told = table.filter(pc.and_(table["content"].is_valid(), table["sample_id"].is_valid()))
        expected.update(zip(told["sample_id"].to_pylist(), told["content"].to_pylist(), strict=True))
    if not expected:
        return Check(name="media", held=None, detail="the scores do not tell what the samples were made of")
    number = len(expected)
    now: Iterable[Content] = (contents or {}).values()
    if contents is None and dataset is not None:
        now = contents_of(dataset, only=frozenset(expected), num_threads=num_threads)
    changed: dict[str, str | None] = {}
    for each in now:
        if expected.pop(each.sample_id, each.content) != each.content:
            changed[each.sample_id] = each.problem
    if not changed and not expected:
        return Check(name="media", held=True, detail=f"{number:,} samples are what they were when they were scored")
    return Check(name="media", held=False, detail=_say_changed(manifest, changed, lost=expected, of=number))


def _say_changed(manifest: Path, changed: dict[str, str | None], *, lost: Iterable[str], of: int) -> str:
    said, lost = [], sorted(lost)
    if changed:
        name = min(changed)
        files = changed[name] or ", ".join(_files_of(manifest, name))
        more = f"{name}, {files}" if files else name
        said.append(f"{len(changed):,} of {of:,} samples' media have changed since they were scored, the first: {more}")
    if lost:
        said.append(f"{len(lost):,} of {of:,} samples are no longer in the source, the first: {lost[0]}")
    return "; ".join(said)


def _files_of(manifest: Path, name: str) -> list[str]:
    """Give the files that the manifest names for a sample."""
    columns = [column for column in pq.read_schema(manifest).names if column not in COLUMNS]
    for table in batches_of(manifest, columns=["sample_id", *columns]) if columns else ():
        for row in table.filter(pc.equal(table["sample_id"], name)).to_pylist():
            return [str(row[column]) for column in columns if row[column] is not None]
    return []


def _other_modalities(provenance: dict[str, Any], dataset: Dataset) -> str:
    """Say if the data were opened with other modalities than were scored: every content differs then."""
    told = _dict(provenance, "scores").get("modalities")
    then = [each.get("name") for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    now = [modality.name for modality in dataset.modalities]
    if not then or then == now:
        return ""
    return f"the data were opened as {', '.join(now)}, and scored as {', '.join(map(str, then))}: name them so"


def _fingerprint(provenance: dict[str, Any], now: str | None) -> Check:
    then = _dict(provenance, "scores").get("fingerprint")
    if now is None or then is None:
        why = "the data were not opened" if now is None else "the scores do not tell it"
        return Check(name="fingerprint", held=None, detail=why)
    detail = str(now) if then == now else f"the scores were made from {then}, and here is {now}: rescore the data"
    return Check(name="fingerprint", held=then == now, detail=detail)


def _num_bins(provenance: dict[str, Any]) -> float:
    """Give how many bins the rule has, of a grid those of both axes; infinity where it does not tell."""
    rule = _dict(_dict(provenance, "rule"), "balanced")
    bins = rule.get("bins")
    if not isinstance(bins, int) or bins < 1:
        return np.inf
    return float(bins**2 if rule.get("grid") else bins)


def _dict(provenance: dict[str, Any], name: str) -> dict[str, Any]:
    found = provenance.get(name)
    return found if isinstance(found, dict) else {}


def _check_ids(schema: pa.Schema, path: Path) -> None:
    """Raise ManifestError for columns that no manifest could have."""
    type_ = schema.field("sample_id").type if "sample_id" in schema.names else pa.string()
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        raise ManifestError(f"{path} is not a manifest: its sample_id is {type_}, not string")
    nested = [name for name in schema.names if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise ManifestError(f"{path} is not a manifest: its {nested[0]} is {schema.field(nested[0]).type}")


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def _named(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return ids.drop_null().cast(pa.large_string())


def _span(low: float, high: float) -> str:
    if low > 0:
        return "(0, inf)"
    return f"[{low:g}, inf)" if np.isinf(high) else f"[{low:g}, {high:g}]"
