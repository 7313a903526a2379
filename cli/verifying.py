"""The command that checks a manifest and its data: verify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..rebalance.manifest import read_provenance
from .progress import progress_bars
from .provenance import Origin, SourceOptions, open_source, origin_of
from .remote_run import with_run
from .run import Run

if TYPE_CHECKING:
    from ..audit.workers import Progress
    from ..rebalance.verify import Check, Verification
    from ..rebalance.verify_media import ContentComparison

_HASHED_AT_ONCE = 4_096  # samples whose content hashes are compared together


@with_run("features", "stages", writes=False)
def verify(
    manifest: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    media: bool = True,
    data: str | Path | None = None,
    allow_outside: bool = False,
    progress: bool = True,
) -> Verification:
    """Check that a manifest and its data are unchanged since they were written and scored; exit 3 on a change.

    Checked are schema, ids, digests, ranges, dropped rows and media. Nothing that the metadata name is imported. A
    manifest that was not made by this user on this machine needs `data` and `allow_outside`.

    Args:
        manifest: Manifest file, or its name in the run.
        run: Run folder, a path or a URL.
        media: Check the media files; --no-media skips them.
        data: The data; also if your own data moved.
        allow_outside: Allow paths outside the data folder.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The checks, and whether all passed.

    Raises:
        ManifestError: The manifest or its source was not found, or the source is named by an untrusted manifest only.

    Example:
        >>> mmaudit.verify("balanced").lines()
    """
    from ..rebalance.verify import verify_rows
    from ..rebalance.verify_media import check_media

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
        with progress_bars(progress) as report_progress:
            contents, fingerprint = _compare_source(path, origin, options, report_progress)
        checks += check_media(path, contents=contents, fingerprint=fingerprint)
    return replace(checked, checks=tuple(checks))


def _signature_check(origin: Origin) -> Check:
    """Check a manifest against this user's signature; without a signature the check has no result."""
    from ..rebalance.verify import Check

    if origin.is_own:
        return Check("signature", passed=True, detail="made by you on this machine")
    if origin.changed:
        return Check("signature", passed=False, detail=f"its {origin.changed} changed since it was made")
    return Check("signature", passed=None, detail=origin.doubt or "not made by you on this machine")


def _compare_source(
    path: Path, origin: Origin, options: SourceOptions, progress: Progress
) -> tuple[ContentComparison, str]:
    """Hash the media of a manifest's source; return the comparison with the manifest, and the fingerprint of the data.

    In memory are the labels, splits and groups of all rows as numbers, a hash of each id, and a shard.
    """
    from ..audit.dataset.columns import SPLITS
    from ..audit.engine.row_data import RowData, read_row_table
    from ..audit.features.encoded_samples import content_hashes, fingerprint_of
    from ..rebalance.verify_media import ContentComparison

    dataset, scored_config = open_source(origin, options, encoders=False)
    seed = scored_config.seed
    tables = [read_row_table(dataset, [shard], seed=seed, repeats=0) for shard in dataset.shards]
    samples = RowData.of(
        dataset,
        tables.__getitem__,
        num_parts=len(tables),
        seed=seed,
        test_fraction=scored_config.data.test_fraction,
    )
    tables.clear()  # the columns that the fingerprint needs are arrays now
    class_names, groups = (*samples.class_names, "", ""), samples.group_names or ("",)  # negative labels: the last two
    group = np.zeros(len(samples), np.int32) if samples.group is None else samples.group
    comparison = ContentComparison(path)

    def fingerprint_rows() -> Iterator[bytes]:
        hashes, first = content_hashes(dataset), 0
        while batch := list(islice(hashes, _HASHED_AT_ONCE)):
            comparison.add(batch)
            rows = slice(first, first := first + len(batch))
            codes = (samples.label[rows].tolist(), samples.split[rows].tolist(), group[rows].tolist())
            for row, label, split, code in zip(batch, *codes, strict=True):
                names = (row.sample_id, class_names[label], SPLITS[split], groups[code], row.content)
                yield "\0".join(names).encode()
            progress("hash", first, len(samples))

    return comparison, fingerprint_of(fingerprint_rows(), num_rows=len(samples))
