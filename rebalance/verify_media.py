"""Verification of the media and the source of a manifest: content hashes and fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.features.encoded_samples import ContentHashes
from ..audit.hashing import hash_ids
from ..audit.parsing import provenance_section
from .manifest import COLUMNS, manifest_schema, read_batches_of_manifest, read_provenance
from .verify import Check

_Keys = NDArray[np.uint64]


class ContentComparison:
    """Content hashes of a source, added in batches, compared with those of a manifest: 17 bytes a kept sample.

    Ids and hashes are compared by 64 bits of each, which two of 10^7 ids share in one of 370,000 manifests.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        batches = [(np.empty(0, np.uint64),) * 2, *((_hash(ids), _hash(texts)) for ids, texts in _recorded(manifest))]
        ids, contents = (np.concatenate(columns) for columns in zip(*batches, strict=True))
        self._ids, last = np.unique(ids[::-1], return_index=True)  # of a repeated id its last row
        self._contents: _Keys = contents[::-1][last]
        self._is_found = np.zeros(len(self._ids), dtype=bool)
        self._changed: dict[str, str | None] = {}

    def add(self, hashes: Iterable[ContentHashes]) -> None:
        """Compare content hashes of samples of the source; those of samples that the manifest lacks are ignored."""
        rows = list(hashes)
        if not len(self._ids) or not rows:
            return
        ids = _hash(pa.array([row.sample_id for row in rows], pa.string()))
        contents = _hash(pa.array([row.content for row in rows], pa.string()))
        position = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        is_kept = self._ids[position] == ids
        self._is_found[position[is_kept]] = True
        for row in np.flatnonzero(is_kept & (self._contents[position] != contents)).tolist():
            self._changed[rows[row].sample_id] = rows[row].problem

    def check(self) -> Check:
        """Return the check of the media of the kept samples, after all content hashes were added."""
        total = len(self._ids)
        if not total:
            return Check("media", passed=None, detail="the scores have no content hashes")
        problem = _describe_changed(self.manifest, self._changed, lost=self._lost(), total=total)
        return Check.of("media", problem, passed=f"{total:,} samples are unchanged since they were scored")

    def _lost(self) -> list[str]:
        """Return the sorted ids of the samples that no content hash was added of."""
        if self._is_found.all():
            return []
        lost: set[str] = set()
        for ids, _ in _recorded(self.manifest):
            is_lost = ~self._is_found[np.searchsorted(self._ids, _hash(ids))]
            lost.update(ids.filter(pa.array(is_lost)).to_pylist())
        return sorted(lost)


def _recorded(manifest: Path) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield ids and content hashes of the samples of a manifest that have both, in batches."""
    for table in read_batches_of_manifest(manifest, columns=["sample_id", "content"]):
        recorded = table.filter(pc.and_(table["content"].is_valid(), table["sample_id"].is_valid()))
        yield recorded["sample_id"].combine_chunks(), recorded["content"].combine_chunks()


def _hash(strings: pa.Array) -> _Keys:
    return hash_ids(strings, seed=0, purpose="verify")


def check_media(
    manifest: Path,
    *,
    contents: ContentComparison | None = None,
    fingerprint: str | None = None,
    unopened: str = "the data were not opened",
) -> list[Check]:
    """Compare the media and the fingerprint of a manifest's source with those that were scored.

    Args:
        manifest: path of the manifest.
        contents: comparison with the source, all of whose content hashes were added; None if it was not opened.
        fingerprint: fingerprint of the source, see `dataset_fingerprint`.
        unopened: why the source was not opened.
    """
    media = Check("media", passed=None, detail=unopened) if contents is None else contents.check()
    return [media, _check_fingerprint(read_provenance(manifest), fingerprint, unopened=unopened)]


def _describe_changed(manifest: Path, changed: dict[str, str | None], *, lost: list[str], total: int) -> str:
    sentences = []
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


def _check_fingerprint(provenance: dict[str, Any], current: str | None, *, unopened: str) -> Check:
    scored = provenance_section(provenance, "scores").get("fingerprint")
    if current is None or scored is None:
        detail = unopened if current is None else "the scores have no fingerprint"
        return Check("fingerprint", passed=None, detail=detail)
    problem = "" if scored == current else f"expected {scored} as scored, found {current}: rescore the data"
    return Check.of("fingerprint", problem, passed=current)
