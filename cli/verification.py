"""Python interface of verify, which implements the command of the same name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.dataset.samples import read_samples
from ..audit.features.encoded_samples import ContentHashes, content_hashes, dataset_fingerprint
from ..audit.workers import Progress, no_progress
from ..rebalance.manifest import read_provenance
from ..rebalance.verify import Check, check_media, verify_rows
from .provenance import Origin, SourceOptions, open_source, origin_of
from .run import Run


def verify(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    data: str | Path | None = None,
    allow_outside: bool = False,
    media: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Check a manifest: schema, ids, digests, ranges, dropped rows, media.

    Nothing that the metadata name is imported. A manifest that was not made by this user on this machine needs `data`
    and `allow_outside`.

    Args:
        manifest: a manifest's file, or its name in the run.
        run: the run folder.
        data: the data, if the manifest's source moved.
        allow_outside: whether media paths may lead outside the data folder.
        media: hash the media of the source.
        progress: progress callback.

    Returns:
        The checks, whether none failed (`passed`), and the same as text in `lines`.

    Raises:
        ManifestError: the manifest or its source was not found, or the source is named by an untrusted manifest only.
    """
    path = Run.open(run).find_manifest(str(manifest))
    checked, provenance = verify_rows(path), read_provenance(path)
    origin = origin_of(path, provenance, checked.digests)
    checks = [*checked.checks, _signature_check(origin)]
    has_failed = not checked.passed or bool(origin.changed)
    if not media or (data is None and "modalities" not in origin.scores):
        checks += check_media(path)
    elif has_failed and data is None and origin.record is None:  # the failed checks are more useful than an error
        checks += check_media(path, unopened=f"data not opened, since {origin.doubt}: pass them with --data")
    else:
        options = SourceOptions(data=data, allow_outside=allow_outside)
        contents, fingerprint = _contents_of_source(origin, options, progress)
        checks += check_media(path, contents=contents, fingerprint=fingerprint)
    checked = replace(checked, checks=tuple(checks))
    return {**checked.to_dict(), "lines": checked.lines()}


def _signature_check(origin: Origin) -> Check:
    """Check a manifest against this user's signature; without a signature the check has no result."""
    if origin.is_own:
        return Check("signature", passed=True, detail="made by you on this machine")
    if origin.changed:
        return Check("signature", passed=False, detail=f"its {origin.changed} changed since it was made")
    return Check("signature", passed=None, detail=origin.doubt or "not made by you on this machine")


def _contents_of_source(
    origin: Origin, options: SourceOptions, progress: Progress
) -> tuple[dict[str, ContentHashes], str]:
    """Hash the media of a manifest's source; return the hashes by sample id, and the dataset's fingerprint."""
    dataset, scored_config = open_source(origin, options, encoders=False)
    samples = read_samples(dataset, seed=scored_config.seed, test_fraction=scored_config.data.test_fraction)
    contents = {}
    for number, content in enumerate(content_hashes(dataset), start=1):
        contents[content.sample_id] = content
        progress("hash", number, len(samples))
    digests = [contents[name].content for name in samples.sample_id]
    return contents, dataset_fingerprint(samples, np.array(digests, dtype=object))
