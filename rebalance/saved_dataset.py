"""Export as a dataset of Hugging Face `datasets`, saved to disk."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..audit.hashing import digest
from ..audit.storage import scratch_folder
from .export import Exporter, ExportJob, split_name
from .manifest import read_batches_of_manifest, read_stated_digests


class SavedDataset(Exporter):
    """A folder as of Dataset.save_to_disk, or of DatasetDict for several splits."""

    files = re.compile(r"dataset_dict\.json|state\.json|dataset_info\.json|data-\d{5}-of-\d{5}\.arrow|\w+")
    marks = ("dataset_dict.json", "state.json")

    def write(self, job: ExportJob, out: Path) -> dict[str, Any]:
        """Write as Dataset.save_to_disk does, a DatasetDict for several splits, from Arrow files on disk."""
        import datasets

        manifest_digest = str(read_stated_digests(job.manifest).get("digest", "")) or digest(job.manifest.read_bytes())
        bars_enabled = not datasets.are_progress_bars_disabled()
        try:
            with scratch_folder(out.parent) as scratch:
                paths_by_split = _arrow_by_split(job, scratch)
                sets = {
                    split: datasets.Dataset(
                        datasets.table.MemoryMappedTable.from_file(str(path)),
                        info=datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(job.schema)),
                        # The default fingerprint of `datasets` differs by run.
                        fingerprint=digest(manifest_digest.encode(), split.encode())[:16],
                    )
                    for split, path in paths_by_split.items()
                }
                datasets.disable_progress_bars()
                whole_set = datasets.DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))
                whole_set.save_to_disk(str(out))
        finally:
            if bars_enabled:
                datasets.enable_progress_bars()
        return {}


def _arrow_by_split(job: ExportJob, folder: Path) -> dict[str, Path]:
    """Write an Arrow stream of the rows of each split, in row order."""
    with ExitStack() as stack:
        writers: dict[str, Any] = {}
        for table in read_batches_of_manifest(job.manifest):
            for split in pc.unique(table["split"]).to_pylist():
                name = split_name(split)
                if name not in writers:
                    writers[name] = stack.enter_context(pa.ipc.new_stream(str(folder / f"{name}.arrow"), job.schema))
                mask = pc.is_null(table["split"]) if split is None else pc.equal(table["split"], split)
                writers[name].write_table(table.filter(mask).cast(job.schema))
    return {name: folder / f"{name}.arrow" for name in sorted(writers)}
