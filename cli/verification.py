"""The Python function verify.

`verify` is what the command of its name calls, and what a notebook calls.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audit.dataset.samples import read_samples
from ..audit.features.encoded_samples import ContentHashes, content_hashes, dataset_fingerprint
from ..audit.workers import Progress, no_progress
from ..rebalance.checks import Check
from ..rebalance.manifest import provenance_of
from ..rebalance.verify import check_media, verify_rows
from .provenance import Named, open_source
from .run import Run
from .trust import Origin, origin_of


def verify(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    data: str | Path | None = None,
    allow_outside: bool = False,
    media: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Check a manifest, by file or by its name in the run: schema, ids, digests, ranges, dropped rows, media.

    The media of its source, or of `data` if they moved, are hashed unless `media` is False; nothing is imported that
    the metadata name. `data` and `allow_outside` (paths may lead outside the data's folder) must be given for a
    manifest that was not made by this user on this machine.

    Returns:
        The checks, whether all `held`, and the same in `lines`.

    Raises:
        ManifestError: there is no manifest, its source is gone, or nobody but the manifest names the source.
    """
    path = Run.open(run).find_manifest(str(manifest))
    checked, provenance = verify_rows(path), provenance_of(path)
    origin = origin_of(path, provenance, checked.digests)
    checks = [*checked.checks, _signature_check(origin)]
    has_failed = not checked.held or bool(origin.changed)
    if not media or (data is None and "modalities" not in origin.scores):
        checks += check_media(path)
    elif has_failed and data is None and origin.record is None:  # what has failed is of more use than an error
        checks += check_media(path, unopened=f"the data were not opened, since {origin.doubt}: name them with --data")
    else:
        named = Named(data=data, allow_outside=allow_outside)
        contents, fingerprint = _contents_of_source(origin, named, progress)
        checks += check_media(path, contents=contents, fingerprint=fingerprint)
    checked = replace(checked, checks=tuple(checks))
    return {"file": str(path), **checked.to_dict(), "lines": checked.lines()}


def _signature_check(origin: Origin) -> Check:
    """Check that a manifest is what this user signed; one without a signature is not held to any."""
    if origin.is_own:
        return Check(name="signature", held=True, detail="you made it on this machine")
    if origin.changed:
        return Check(name="signature", held=False, detail=f"its {origin.changed} changed since you made it")
    return Check(name="signature", held=None, detail=origin.doubt or "you did not make it on this machine")


def _contents_of_source(origin: Origin, named: Named, progress: Progress) -> tuple[dict[str, ContentHashes], str]:
    """Hash the media of a manifest's source: the content of each sample by id, and the fingerprint of all."""
    dataset, made = open_source(origin, named, encoders=False)
    samples = read_samples(dataset, seed=made.seed, test_fraction=made.data.test_fraction)
    contents = {}
    for number, content in enumerate(content_hashes(dataset), start=1):
        contents[content.sample_id] = content
        progress("hash", number, len(samples))
    digests = [contents[name].content for name in samples.sample_id]
    return contents, dataset_fingerprint(samples, np.array(digests, dtype=object))
