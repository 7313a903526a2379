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
from .checks import Check, CheckedFile, non_null_ids, provenance_section
from .manifest import (
    COLUMNS,
    DROPPED_COLUMNS,
    Digests,
    check_columns,
    dropped_path,
    manifest_schema,
    read_batches_of_manifest,
    read_provenance,
)
from .recipe import balance_path
from .score_tables import hash_keys
from .selection import ExternalSort
from .split_stats import read_numbers

_STATUS = {True: "passed", False: "FAILED", None: "skipped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Results of all checks of a manifest; `digests` are those of its current content."""

    manifest: Path
    checks: tuple[Check, ...]
    digests: Digests

    @property
    def held(self) -> bool:
        """Whether no check failed; skipped checks do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.held is False)

    @property
    def failed_gate(self) -> str:
        """Why the verification failed, "" if no check failed."""
        if not self.failed:
            return ""
        return f"{self.manifest} or its data have changed since it was written: see the checks above"

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {"manifest": str(self.manifest), "held": self.held, "checks": [asdict(check) for check in self.checks]}

    def lines(self) -> list[str]:
        """Return one line of text per check."""
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
    """Verify a manifest, its dropped rows and the media of its source, in batches.

    Args:
        manifest: path of the manifest.
        dataset: source, whose media are hashed; ids and hashes of the kept samples are then in memory.
        contents: hashes of the media by id, instead of a dataset.
        fingerprint: fingerprint of the source, as EncodedSamples.fingerprint.
        scratch: folder for files of 16 bytes per row, used above a million rows; None is the system's.
        num_threads: threads that hash media.

    Returns:
        One result per check; differences are failed checks, not errors.

    Raises:
        ManifestError: the file cannot be read as a manifest.
    """
    verification = verify_rows(manifest, scratch=scratch)
    media = check_media(manifest, dataset=dataset, contents=contents, fingerprint=fingerprint, num_threads=num_threads)
    return replace(verification, checks=(*verification.checks, *media))


def verify_rows(manifest: Path, *, scratch: Path | None = None) -> Verification:
    """Check a manifest and its dropped rows as `verify` does, without their source."""
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

    Arguments are those of `verify`; `unopened` is the reason given if there are neither a dataset nor contents.
    """
    provenance = read_provenance(manifest)
    media = Check(name="media", held=None, detail=unopened)
    if dataset is not None or contents is not None:
        media = _check_contents(manifest, provenance, dataset=dataset, contents=contents, num_threads=num_threads)
    return [media, _check_fingerprint(provenance, fingerprint, unopened=unopened)]


def _check_unique_ids(files: Sequence[CheckedFile], repeated: NDArray[np.uint64]) -> list[Check]:
    """Check that ids are unique, and that none is both kept and dropped."""
    counts_of_id = _count_by_file(files, repeated)
    checks = []
    for file_index, name in enumerate(("ids", "dropped ids")[: len(files)]):
        repeats = sorted(sample_id for sample_id, counts in counts_of_id.items() if counts[file_index] > 1)
        detail = (
            f"{len(repeats):,} ids occur more than once (the first: {repeats[0]})" if repeats else "all ids are unique"
        )
        checks.append(Check(name=name, held=not repeats, detail=detail))
    if len(files) > 1:
        shared = sorted(sample_id for sample_id, counts in counts_of_id.items() if all(counts))
        detail = (
            f"{len(shared):,} samples are both kept and dropped (the first: {shared[0]})"
            if shared
            else "no id is in both"
        )
        checks.append(Check(name="disjoint", held=not shared, detail=detail))
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
    if not ambiguous:
        return Check(name="labels", held=True, detail=f"{len(names_of_label):,} labels, each with one name")
    examples = ", ".join(sorted(repr(name) for name in names_of_label[ambiguous[0]])[:3])
    detail = f"{len(ambiguous):,} labels have more than one name (the first: {ambiguous[0]} is {examples})"
    return Check(name="labels", held=False, detail=detail)


def _check_subset(files: Sequence[CheckedFile], provenance: dict[str, Any]) -> Check:
    stated = provenance.get("subset")
    foreign = sorted({str(subset) for file in files for subset in file.subsets} - {str(stated)})
    detail = f"rows have subset {foreign[0]!r}, the metadata {stated!r}" if foreign else repr(stated)
    return Check(name="subset", held=not foreign, detail=detail)


def _check_dropped(files: Sequence[CheckedFile], dropped_file: Path) -> list[Check]:
    """Check the dropped rows, and that they belong to this manifest."""
    if len(files) < 2:
        return [Check(name="dropped", held=None, detail=f"{dropped_file.name} not found")]
    kept, dropped = files
    digest, stated_digest = kept.stated.get("digest", kept.digest.hexdigest()), dropped.stated.get("dropped_from")
    detail = "the dropped rows belong to this manifest"
    if digest != stated_digest:
        detail = f"{dropped_file.name} holds the rows dropped from another manifest: run mmaudit split again"
    elif kept.provenance != dropped.provenance:
        detail = f"the metadata of {dropped_file.name} and {kept.path.name} differ: one of them was changed"
    same = digest == stated_digest and kept.provenance == dropped.provenance
    return [*dropped.checks("dropped "), Check(name="dropped from", held=same, detail=detail)]


def _check_complete(files: Sequence[CheckedFile], numbers: dict[str, Any] | None) -> list[Check]:
    """Check that NAME.balance.json belongs to the manifest, and that no scored row is missing."""
    if numbers is None:
        return [Check(name="complete", held=None, detail="NAME.balance.json not found")]
    digest, stated_digest = files[0].stated.get("digest", files[0].digest.hexdigest()), numbers.get("digest")
    file_name = balance_path(files[0].path).name
    belongs = digest == stated_digest
    detail = f"{file_name} belongs to this manifest"
    if not belongs:
        detail = f"{file_name} belongs to another manifest: run mmaudit split again"
    checks = [Check(name="numbers", held=belongs, detail=detail)]
    if not belongs or len(files) < 2:
        return [
            *checks,
            Check(name="complete", held=None, detail="numbers or dropped rows of this manifest missing"),
        ]
    (kept, dropped), scored = (file.num_rows for file in files), numbers.get("scored")
    detail = f"{kept:,} kept and {dropped:,} dropped of {scored} scored"
    return [*checks, Check(name="complete", held=kept + dropped == scored, detail=detail)]


def _check_contents(
    manifest: Path,
    provenance: dict[str, Any],
    *,
    dataset: Dataset | None,
    contents: Mapping[str, ContentHashes] | None,
    num_threads: int,
) -> Check:
    """Check that the media of the kept samples are those that were scored."""
    if dataset is not None and (mismatch := _modality_mismatch(provenance, dataset)):
        return Check(name="media", held=False, detail=mismatch)
    expected: dict[str, str] = {}
    for table in read_batches_of_manifest(manifest, columns=["sample_id", "content"]):
        recorded = table.filter(pc.and_(table["content"].is_valid(), table["sample_id"].is_valid()))
        expected.update(zip(recorded["sample_id"].to_pylist(), recorded["content"].to_pylist(), strict=True))
    if not expected:
        return Check(name="media", held=None, detail="the scores have no content hashes")
    total = len(expected)
    current: Iterable[ContentHashes] = (contents or {}).values()
    if contents is None and dataset is not None:
        current = content_hashes(dataset, only=frozenset(expected), num_threads=num_threads)
    changed: dict[str, str | None] = {}
    for hashes in current:
        if expected.pop(hashes.sample_id, hashes.content) != hashes.content:
            changed[hashes.sample_id] = hashes.problem
    if not changed and not expected:
        return Check(name="media", held=True, detail=f"{total:,} samples are unchanged since they were scored")
    return Check(name="media", held=False, detail=_describe_changed(manifest, changed, lost=expected, total=total))


def _describe_changed(manifest: Path, changed: dict[str, str | None], *, lost: Iterable[str], total: int) -> str:
    sentences, lost = [], sorted(lost)
    if changed:
        sample_id = min(changed)
        files = changed[sample_id] or ", ".join(_media_paths(manifest, sample_id))
        example = f"{sample_id}, {files}" if files else sample_id
        sentences.append(
            f"{len(changed):,} of {total:,} samples' media changed since they were scored, the first: {example}"
        )
    if lost:
        sentences.append(f"{len(lost):,} of {total:,} samples are no longer in the source, the first: {lost[0]}")
    return "; ".join(sentences)


def _media_paths(manifest: Path, sample_id: str) -> list[str]:
    """Return the media paths of a sample in the manifest."""
    columns = [column for column in manifest_schema(manifest).names if column not in COLUMNS]
    for table in read_batches_of_manifest(manifest, columns=["sample_id", *columns]) if columns else ():
        for row in table.filter(pc.equal(table["sample_id"], sample_id)).to_pylist():
            return [str(row[column]) for column in columns if row[column] is not None]
    return []


def _modality_mismatch(provenance: dict[str, Any], dataset: Dataset) -> str:
    """Return an error text if the data were opened with other modalities than were scored, where all hashes differ."""
    recorded = provenance_section(provenance, "scores").get("modalities")
    scored = (
        [modality.get("name") for modality in recorded if isinstance(modality, dict)]
        if isinstance(recorded, list)
        else []
    )
    opened = [modality.name for modality in dataset.modalities]
    if not scored or scored == opened:
        return ""
    names = ", ".join(map(str, scored))
    return f"the data were opened as {', '.join(opened)}, but scored as {names}: use those modalities"


def _check_fingerprint(provenance: dict[str, Any], current: str | None, *, unopened: str) -> Check:
    scored = provenance_section(provenance, "scores").get("fingerprint")
    if current is None or scored is None:
        detail = unopened if current is None else "the scores have no fingerprint"
        return Check(name="fingerprint", held=None, detail=detail)
    detail = str(current) if scored == current else f"expected {scored} as scored, found {current}: rescore the data"
    return Check(name="fingerprint", held=scored == current, detail=detail)
