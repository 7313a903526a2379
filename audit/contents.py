"""Contents: what is each sample of a source made of, now, without encoding anything?"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .encoding.encoders import encode_vectors
from .encoding.features import Status, load_cell_content
from .quality import UnusableError
from .source.dataset import Dataset
from .source.modality import Modality
from .stock import row_content
from .workers import ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a sample is made of: `content` as in Stock.content, and `problem` where a modality cannot be read."""

    sample_id: str
    content: str
    problem: str | None = None


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
    loaded, content = load_cell_content(dataset, modality, cell)
    return content, loaded.detail if isinstance(loaded, UnusableError) else None
