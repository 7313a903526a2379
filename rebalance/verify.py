"""Verification of a manifest: schema, digests, ids, ranges and dropped rows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from ..audit.parsing import provenance_section
from .manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    RANGES,
    SCHEMA_VERSION,
    Digests,
    RowDigest,
    balance_path,
    check_columns,
    dropped_path,
    is_number,
    is_text,
    manifest_schema,
    metadata_digest,
    read_batches_of_manifest,
    read_num_rows,
    read_provenance,
    read_stated_digests,
    regroup,
)
from .score_files import prefetch
from .score_tables import hash_keys
from .selection import ExternalSort
from .split_stats import read_numbers

REQUIRED = ("sample_id", "label", "subset", "rank", "weight", "gap", "reason")  # columns without nulls, if present
_SLACK = 2e-6  # a confidence may be 1e-6 outside [0, 1], and a discrepancy is a difference of two


_STATUS = {True: "passed", False: "FAILED", None: "skipped"}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check. passed: True if passed, False if failed, None if skipped; `detail` has the reason."""

    name: str
    _: KW_ONLY
    passed: bool | None
    detail: str

    @classmethod
    def of(cls, name: str, problem: str, *, passed: str) -> Check:
        """Return a check that failed if there is a problem; `passed` is its detail if there is none."""
        return cls(name, passed=not problem, detail=problem or passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Results of all checks of a manifest.

    Attributes:
        manifest: The manifest.
        checks: Name, result and detail of each check.
        digests: Digests of the current content.
    """

    manifest: Path
    checks: tuple[Check, ...]
    digests: Digests

    @property
    def passed(self) -> bool:
        """Whether no check failed; skipped checks do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def failed_gate(self) -> str:
        """Why the verification failed, "" if no check failed."""
        if not self.failed:
            return ""
        return f"{self.manifest} or its data have changed since it was written: see the checks above"

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "manifest": str(self.manifest),
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }

    def lines(self) -> list[str]:
        """Return one line of text per check."""
        return [f"{_STATUS[check.passed]:<14}{check.name}: {check.detail}" for check in self.checks]


def verify_rows(manifest: Path, *, scratch: Path | None = None) -> Verification:
    """Check a manifest and its dropped rows in batches, without their source.

    Args:
        manifest: path of the manifest.
        scratch: folder for files of 16 bytes per row, used above a million rows; None is the system's.

    Returns:
        One result per check; differences are failed checks, not errors.

    Raises:
        ManifestError: the file cannot be read as a manifest.
    """
    provenance = read_provenance(manifest)
    check_columns(manifest_schema(manifest), where=str(manifest))
    dropped_file = dropped_path(manifest)
    files = [CheckedFile(manifest, COLUMNS, provenance)]
    if dropped_file.exists():
        files.append(CheckedFile(dropped_file, DROPPED_COLUMNS, provenance))
    readable = [file for file in files if not file.missing]
    with ExternalSort(sum(file.num_rows for file in readable), scratch or Path(tempfile.gettempdir())) as ids:
        for file_index, file in enumerate(readable):
            file.read_all(ids, file_index)
        repeated = ids.repeated()
    checks = [*files[0].checks(""), *_check_unique_ids(readable, repeated), _check_labels(readable)]
    checks += [_check_subset(readable, provenance), *_check_dropped(files, dropped_file)]
    numbers_file = balance_path(manifest)
    checks += _check_complete(
        readable, read_numbers(numbers_file, error=ManifestError) if numbers_file.exists() else None
    )
    return Verification(manifest=manifest, checks=tuple(checks), digests=files[0].digests)


def _check_unique_ids(files: Sequence[CheckedFile], repeated: NDArray[np.uint64]) -> list[Check]:
    """Check that ids are unique, and that none is both kept and dropped."""
    counts_of_id = _count_by_file(files, repeated)
    checks = []
    for file_index, name in enumerate(("ids", "dropped ids")[: len(files)]):
        repeats = sorted(sample_id for sample_id, counts in counts_of_id.items() if counts[file_index] > 1)
        problem = f"{len(repeats):,} ids occur more than once (the first: {repeats[0]})" if repeats else ""
        checks.append(Check.of(name, problem, passed="all ids are unique"))
    if len(files) > 1:
        shared = sorted(sample_id for sample_id, counts in counts_of_id.items() if all(counts))
        problem = f"{len(shared):,} samples are both kept and dropped (the first: {shared[0]})" if shared else ""
        checks.append(Check.of("disjoint", problem, passed="no id is in both"))
    return checks


def _count_by_file(files: Sequence[CheckedFile], repeated: NDArray[np.uint64]) -> dict[str, list[int]]:
    """Count the rows of each id per file, for ids with repeated keys only, since different ids may share a key."""
    counts_of_id: dict[str, list[int]] = {}
    for file_index, file in enumerate(files if len(repeated) else ()):
        for table in read_batches_of_manifest(file.path, columns=["sample_id"]):
            ids = non_null_ids(table["sample_id"])
            mask = np.isin(hash_keys(ids, seed=0), repeated)
            for sample_id in ids.filter(pa.array(mask)).to_pylist():
                counts_of_id.setdefault(str(sample_id), [0] * len(files))[file_index] += 1
    return counts_of_id


def _check_labels(files: Sequence[CheckedFile]) -> Check:
    names_of_label: dict[Any, set[Any]] = {}
    for label, label_names in chain.from_iterable(file.names_of_label.items() for file in files):
        names_of_label.setdefault(label, set()).update(label_names)
    ambiguous = [label for label, label_names in names_of_label.items() if len(label_names) > 1]
    problem = ""
    if ambiguous:
        examples = ", ".join(sorted(repr(name) for name in names_of_label[ambiguous[0]])[:3])
        problem = f"{len(ambiguous):,} labels have more than one name (the first: {ambiguous[0]} is {examples})"
    return Check.of("labels", problem, passed=f"{len(names_of_label):,} labels, each with one name")


def _check_subset(files: Sequence[CheckedFile], provenance: dict[str, Any]) -> Check:
    stated = provenance.get("subset")
    foreign = sorted({str(subset) for file in files for subset in file.subsets} - {str(stated)})
    problem = f"rows have subset {foreign[0]!r}, the metadata {stated!r}" if foreign else ""
    return Check.of("subset", problem, passed=repr(stated))


def _check_dropped(files: Sequence[CheckedFile], dropped_file: Path) -> list[Check]:
    """Check the dropped rows, and that they belong to this manifest."""
    if len(files) < 2:
        return [Check("dropped", passed=None, detail=f"{dropped_file.name} not found")]
    kept, dropped = files
    problem = ""
    if dropped.stated.get("dropped_from") != kept.stated_digest:
        problem = f"{dropped_file.name} holds the rows dropped from another manifest: run mmaudit split again"
    elif kept.provenance != dropped.provenance:
        problem = f"the metadata of {dropped_file.name} and {kept.path.name} differ: one of them was changed"
    belongs = Check.of("dropped from", problem, passed="the dropped rows belong to this manifest")
    return [*dropped.checks("dropped "), belongs]


def _check_complete(files: Sequence[CheckedFile], numbers: dict[str, Any] | None) -> list[Check]:
    """Check that NAME.balance.json belongs to the manifest, and that no scored row is missing."""
    if numbers is None:
        return [Check("complete", passed=None, detail="NAME.balance.json not found")]
    file_name = balance_path(files[0].path).name
    belongs = numbers.get("digest") == files[0].stated_digest
    problem = "" if belongs else f"{file_name} belongs to another manifest: run mmaudit split again"
    checks = [Check.of("numbers", problem, passed=f"{file_name} belongs to this manifest")]
    if not belongs or len(files) < 2:
        return [*checks, Check("complete", passed=None, detail="numbers or dropped rows of this manifest missing")]
    (kept, dropped), scored = (file.num_rows for file in files), numbers.get("scored")
    total = f"{scored:,}" if isinstance(scored, int) else scored
    detail = f"{kept:,} kept and {dropped:,} dropped of {total} scored"
    return [*checks, Check("complete", passed=kept + dropped == scored, detail=detail)]


class CheckedFile:
    """Contents of one manifest file, and what its metadata state; `read_all` collects them in one pass."""

    def __init__(self, path: Path, columns: dict[str, pa.DataType], provenance: dict[str, Any]) -> None:
        self.path = path
        self.stated, self.provenance = read_stated_digests(path), read_provenance(path)
        self.schema = manifest_schema(path)
        _check_ids(self.schema, path)
        self.num_rows = read_num_rows(path)
        self.missing = [name for name in columns if name not in self.schema.names]
        self.columns = columns
        self.bounds: dict[str, tuple[float, float]] = {
            **{name: (entry.low, entry.high) for name, entry in RANGES.items()},
            "bin": (0.0, _recipe_num_bins(provenance) - 1.0),
            "rank": (0.0, max(self.num_rows - 1.0, 0.0)),
        }
        self.digest = RowDigest()
        self.metadata = metadata_digest(self.schema.metadata or {})
        self.nulls: Counter[str] = Counter()
        self.out_of_range: Counter[str] = Counter()
        self.first_out_of_range: dict[str, str] = {}
        self.names_of_label: dict[Any, set[Any]] = {}
        self.subsets: set[Any] = set()

    @property
    def digests(self) -> Digests:
        """Digests of the rows and metadata read; call read_all first."""
        return Digests(rows=self.digest.hexdigest(), metadata=self.metadata)

    @property
    def stated_digest(self) -> object:
        """Digest of the rows that the metadata state; if they state none, that of the rows read."""
        return self.stated.get("digest", self.digests.rows)

    def read_all(self, ids: ExternalSort, file_index: int) -> None:
        """Read every row once and add its id's hash to `ids`, with `file_index` as cell."""
        for table in prefetch(regroup(read_batches_of_manifest(self.path, as_stored=True))):
            self.digest.add(table)
            self._note_nulls(table)
            self._note_ranges(table)
            self.subsets |= set(pc.unique(table["subset"]).to_pylist())
            pairs = table.select(["label", "label_name"]).group_by(["label", "label_name"]).aggregate([])
            for pair in pairs.to_pylist():
                self.names_of_label.setdefault(pair["label"], set()).add(pair["label_name"])
            keys = hash_keys(non_null_ids(table["sample_id"]), seed=0)
            ids.add(keys, np.full(len(keys), file_index, np.int32), np.zeros(len(keys), np.uint32))

    def _note_nulls(self, table: pa.Table) -> None:
        for name in REQUIRED:
            if name in table.column_names and table[name].null_count:
                self.nulls[name] += table[name].null_count

    def _note_ranges(self, table: pa.Table) -> None:
        for name, (low, high) in self.bounds.items():
            if name not in table.column_names or not is_number(table[name].type):
                continue
            valid = table[name].is_valid().to_numpy()
            values = table[name].cast(pa.float64(), safe=False).fill_null(0).to_numpy()
            slack = _SLACK if low == -1 or high == 1 else 0.0
            out_of_range = valid & ~((values >= low - slack) & (values <= high + slack))
            if out_of_range.any():
                first_row = int(np.argmax(out_of_range))
                self.out_of_range[name] += int(out_of_range.sum())
                self.first_out_of_range.setdefault(
                    name, f"{values[first_row]:g} of sample {table['sample_id'][first_row]}"
                )

    def checks(self, prefix: str) -> list[Check]:
        """Return the checks of this file alone; `prefix` marks those of the dropped rows."""
        schema = self._schema()
        if self.missing:
            return [Check(f"{prefix}schema", passed=False, detail=schema)]
        expected = f"{self.path.name} is mmaudit.manifest/{SCHEMA_VERSION}, {len(self.columns)} columns"
        nulls = ", ".join(f"{count:,} of {name}" for name, count in self.nulls.items())
        ranges = "; ".join(
            f"{count:,} of {name} outside {_format_range(*self.bounds[name])} "
            f"(the first: {self.first_out_of_range[name]})"
            for name, count in self.out_of_range.items()
        )
        return [
            Check.of(f"{prefix}schema", schema, passed=expected),
            _compare_stated(f"{prefix}rows", self.stated.get("rows"), self.num_rows),
            _compare_stated(f"{prefix}digest", self.stated.get("digest"), self.digests.rows, changed_part="rows"),
            _compare_stated(
                f"{prefix}metadata", self.stated.get("metadata"), self.digests.metadata, changed_part="metadata"
            ),
            Check.of(f"{prefix}nulls", nulls, passed="no nulls in required columns"),
            Check.of(f"{prefix}ranges", ranges, passed="all values are in range"),
        ]

    def _schema(self) -> str:
        """Return a description of what is wrong with the schema, or ""."""
        if self.missing:
            return f"{self.path.name} lacks {', '.join(self.missing)}: run mmaudit split again"
        stated, expected = self.provenance.get("schema"), f"mmaudit.manifest/{SCHEMA_VERSION}"
        if stated is None:
            return f"{self.path.name} has no metadata under the key mmaudit: it was rewritten by another tool"
        if stated != expected:
            return f"{self.path.name} is {stated}, but this mmaudit reads {expected}: run mmaudit split again"
        types = {name: (self.schema.field(name).type, type_) for name, type_ in self.columns.items()}
        return ", ".join(
            f"{name} is {stored}, not {type_}" for name, (stored, type_) in types.items() if stored != type_
        )


def _compare_stated(name: str, stated: object, actual: object, *, changed_part: str = "") -> Check:
    """Compare a stated value with the actual one; `changed_part` names what changed if they differ."""
    problem = ""
    if stated is None:
        problem = f"not stated in the metadata; found {actual}: the file was rewritten by another tool"
    elif stated != actual:
        problem = (f"{changed_part} changed: " if changed_part else "") + f"{stated} when written, {actual} now"
    return Check.of(name, problem, passed=str(actual))


def _recipe_num_bins(provenance: dict[str, Any]) -> float:
    """Return the number of bins of the recorded recipe (of a grid, over both axes); infinity if not recorded."""
    recipe = provenance_section(provenance_section(provenance, "recipe"), "balanced")
    bins = recipe.get("bins")
    if not isinstance(bins, int) or bins < 1:
        return np.inf
    return float(bins**2 if recipe.get("grid") else bins)


def _check_ids(schema: pa.Schema, path: Path) -> None:
    """Raise ManifestError if the ids are not strings or a column is nested."""
    type_ = schema.field("sample_id").type if "sample_id" in schema.names else pa.string()
    if not is_text(type_):
        raise ManifestError(f"{path} is not a manifest: its sample_id is {type_}, not string")
    nested = [name for name in schema.names if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise ManifestError(f"{path} is not a manifest: its {nested[0]} is {schema.field(nested[0]).type}")


def non_null_ids(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the non-null ids as large strings, whose column size is not limited."""
    return ids.drop_null().cast(pa.large_string())


def _format_range(low: float, high: float) -> str:
    if low > 0:
        return "(0, inf)"
    return f"[{low:g}, inf)" if np.isinf(high) else f"[{low:g}, {high:g}]"
