"""Verification of a manifest and of the media that it names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.dataset.dataset import Dataset
from ..audit.errors import ManifestError
from ..audit.features.encoded_samples import ContentHashes, content_hashes
from .checks import Check, CheckedFile, non_null_ids, section
from .external_sort import ExternalSort
from .manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    Digests,
    batches_of,
    check_columns,
    dropped_path,
    provenance_of,
    read_manifest_schema,
)
from .recipe import balance_path
from .score_tables import hash_keys
from .split_stats import read_numbers

_STATUS = {True: "held", False: "FAILED", None: "not looked at"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found of a manifest, one check after another; `digests` are those of what it holds now."""

    manifest: Path
    checks: tuple[Check, ...]
    digests: Digests

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
        return [f"{_STATUS[check.held]:<14}{check.name}: {check.detail}" for check in self.checks]


def verify(
    manifest: Path,
    *,
    dataset: Dataset | None = None,
    contents: Mapping[str, ContentHashes] | None = None,
    fingerprint: str | None = None,
    scratch: Path | None = None,
    num_threads: int = 0,
) -> Verification:
    """Look at all that a manifest and its dropped rows say of themselves, a batch at a time.

    `dataset` is its source, whose media are then hashed; or `contents` gives them by id where they are known already.
    The ids and contents of the kept samples are then held in memory. `fingerprint` is the source's, Stock.fingerprint.
    `scratch` is a folder for 16 bytes a row of more than 262,144, by default the system's.
    Drift is in what is given back; ManifestError is raised where there is no manifest that could be read.
    """
    rows = verify_rows(manifest, scratch=scratch)
    media = check_media(manifest, dataset=dataset, contents=contents, fingerprint=fingerprint, num_threads=num_threads)
    return replace(rows, checks=(*rows.checks, *media))


def verify_rows(manifest: Path, *, scratch: Path | None = None) -> Verification:
    """Check a manifest and its dropped rows as `verify` does, without the data that they were made from."""
    provenance = provenance_of(manifest)
    check_columns(read_manifest_schema(manifest), where=str(manifest))
    beside = dropped_path(manifest)
    files = [CheckedFile(manifest, COLUMNS, provenance)]
    if beside.exists():
        files.append(CheckedFile(beside, DROPPED_COLUMNS, provenance))
    whole = [file for file in files if not file.missing]
    with ExternalSort(sum(file.num_rows for file in whole), scratch or Path(tempfile.gettempdir())) as ids:
        for number, file in enumerate(whole):
            file.read_all(ids, number)
        repeated = ids.repeated()
    checks = [
        *files[0].checks(""),
        *_check_unique_ids(whole, repeated),
        _check_labels(whole),
        _check_subset(whole, provenance),
    ]
    checks += _check_dropped(files, beside)
    numbers = balance_path(manifest)
    checks += _check_complete(whole, read_numbers(numbers, error=ManifestError) if numbers.exists() else None)
    return Verification(manifest=manifest, checks=tuple(checks), digests=files[0].digests)


def check_media(
    manifest: Path,
    *,
    dataset: Dataset | None = None,
    contents: Mapping[str, ContentHashes] | None = None,
    fingerprint: str | None = None,
    num_threads: int = 0,
    unopened: str = "the data were not opened",
) -> list[Check]:
    """Compare the media and the fingerprint of a manifest's source with those that were scored.

    Arguments as of `verify`; `unopened` says why there are neither a dataset nor contents.
    """
    provenance = provenance_of(manifest)
    media = Check(name="media", held=None, detail=unopened)
    if dataset is not None or contents is not None:
        media = _check_contents(manifest, provenance, dataset=dataset, contents=contents, num_threads=num_threads)
    return [media, _check_fingerprint(provenance, fingerprint, unopened=unopened)]


def _check_unique_ids(files: Sequence[CheckedFile], repeated: NDArray[np.uint64]) -> list[Check]:
    """Check that ids are unique, and that none is both kept and dropped."""
    times = _count_by_file(files, repeated)
    found = []
    for number, name in enumerate(("ids", "dropped ids")[: len(files)]):
        twice = sorted(each for each, counts in times.items() if counts[number] > 1)
        more = f"{len(twice):,} ids occur more than once (the first: {twice[0]})" if twice else "no id stands twice"
        found.append(Check(name=name, held=not twice, detail=more))
    if len(files) > 1:
        both = sorted(each for each, counts in times.items() if all(counts))
        more = f"{len(both):,} samples are both kept and dropped (the first: {both[0]})" if both else "no id is in both"
        found.append(Check(name="disjoint", held=not both, detail=more))
    return found


def _count_by_file(files: Sequence[CheckedFile], repeated: NDArray[np.uint64]) -> dict[str, list[int]]:
    """Count the rows of each id in each file; of those alone whose keys stand twice, which two ids may share."""
    times: dict[str, list[int]] = {}
    for number, file in enumerate(files if len(repeated) else ()):
        for table in batches_of(file.path, columns=["sample_id"]):
            ids = non_null_ids(table["sample_id"])
            mask = np.isin(hash_keys(ids, seed=0), repeated)
            for name in ids.filter(pa.array(mask)).to_pylist():
                times.setdefault(str(name), [0] * len(files))[number] += 1
    return times


def _check_labels(files: Sequence[CheckedFile]) -> Check:
    names: dict[Any, set[Any]] = {}
    for label, called in chain.from_iterable(file.names.items() for file in files):
        names.setdefault(label, set()).update(called)
    twice = [label for label, called in names.items() if len(called) > 1]
    if not twice:
        return Check(name="labels", held=True, detail=f"{len(names):,} labels, each with one name")
    some = ", ".join(sorted(repr(each) for each in names[twice[0]])[:3])
    detail = f"{len(twice):,} labels have more than one name (the first: {twice[0]} is {some})"
    return Check(name="labels", held=False, detail=detail)


def _check_subset(files: Sequence[CheckedFile], provenance: dict[str, Any]) -> Check:
    stated = provenance.get("subset")
    other = sorted({str(each) for file in files for each in file.subsets} - {str(stated)})
    detail = f"the rows are of {other[0]!r}, the metadata of {stated!r}" if other else repr(stated)
    return Check(name="subset", held=not other, detail=detail)


def _check_dropped(files: Sequence[CheckedFile], beside: Path) -> list[Check]:
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


def _check_complete(files: Sequence[CheckedFile], numbers: dict[str, Any] | None) -> list[Check]:
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


def _check_contents(
    manifest: Path,
    provenance: dict[str, Any],
    *,
    dataset: Dataset | None,
    contents: Mapping[str, ContentHashes] | None,
    num_threads: int,
) -> Check:
    """Check that the kept samples are made of what they were made of when they were scored."""
    if dataset is not None and (odd := _modality_mismatch(provenance, dataset)):
        return Check(name="media", held=False, detail=odd)
    expected: dict[str, str] = {}
    for table in batches_of(manifest, columns=["sample_id", "content"]):
        told = table.filter(pc.and_(table["content"].is_valid(), table["sample_id"].is_valid()))
        expected.update(zip(told["sample_id"].to_pylist(), told["content"].to_pylist(), strict=True))
    if not expected:
        return Check(name="media", held=None, detail="the scores do not tell what the samples were made of")
    number = len(expected)
    now: Iterable[ContentHashes] = (contents or {}).values()
    if contents is None and dataset is not None:
        now = content_hashes(dataset, only=frozenset(expected), num_threads=num_threads)
    changed: dict[str, str | None] = {}
    for each in now:
        if expected.pop(each.sample_id, each.content) != each.content:
            changed[each.sample_id] = each.problem
    if not changed and not expected:
        return Check(name="media", held=True, detail=f"{number:,} samples are what they were when they were scored")
    return Check(name="media", held=False, detail=_describe_changed(manifest, changed, lost=expected, of=number))


def _describe_changed(manifest: Path, changed: dict[str, str | None], *, lost: Iterable[str], of: int) -> str:
    said, lost = [], sorted(lost)
    if changed:
        name = min(changed)
        files = changed[name] or ", ".join(_media_paths(manifest, name))
        more = f"{name}, {files}" if files else name
        said.append(f"{len(changed):,} of {of:,} samples' media have changed since they were scored, the first: {more}")
    if lost:
        said.append(f"{len(lost):,} of {of:,} samples are no longer in the source, the first: {lost[0]}")
    return "; ".join(said)


def _media_paths(manifest: Path, name: str) -> list[str]:
    """Give the files that the manifest names for a sample."""
    columns = [column for column in read_manifest_schema(manifest).names if column not in COLUMNS]
    for table in batches_of(manifest, columns=["sample_id", *columns]) if columns else ():
        for row in table.filter(pc.equal(table["sample_id"], name)).to_pylist():
            return [str(row[column]) for column in columns if row[column] is not None]
    return []


def _modality_mismatch(provenance: dict[str, Any], dataset: Dataset) -> str:
    """Say if the data were opened with other modalities than were scored: every content differs then."""
    told = section(provenance, "scores").get("modalities")
    then = [each.get("name") for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    now = [modality.name for modality in dataset.modalities]
    if not then or then == now:
        return ""
    return f"the data were opened as {', '.join(now)}, and scored as {', '.join(map(str, then))}: name them so"


def _check_fingerprint(provenance: dict[str, Any], now: str | None, *, unopened: str) -> Check:
    then = section(provenance, "scores").get("fingerprint")
    if now is None or then is None:
        why = unopened if now is None else "the scores do not tell it"
        return Check(name="fingerprint", held=None, detail=why)
    detail = str(now) if then == now else f"the scores were made from {then}, and here is {now}: rescore the data"
    return Check(name="fingerprint", held=then == now, detail=detail)
