"""Rows of a manifest by split, and the predicate that keeps them in a stream of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ConfigError, DatasetError, ManifestError
from .curriculum import RowIndex, split_rows
from .manifest import Manifest, is_text, read_manifest

ID_FIELDS = ("sample_id", "__key__")  # of a sample, in this order: of mmaudit's own exports, and of WebDataset
_NUM_SHOWN = 3  # ids in a message

Identify = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Predicate that is true for the samples of a manifest; built by `keep`.

    It can be pickled, for the workers of a loader, and two of the same manifest are equal.

    Args:
        ids: The sample ids that are kept.
        id_of: Name of the field that holds a sample's id, or a function of the sample; None: `sample_id` or `__key__`.

    Raises:
        DatasetError: A sample has no such field.

    Example:
        >>> keep = Keep(ids=frozenset({"clip-1"}), id_of="clip")
        >>> keep({"clip": "clip-1"}), keep({"clip": "clip-2"})
        (True, False)
    """

    ids: frozenset[str]
    id_of: str | Identify | None = None

    def __call__(self, sample: Any) -> bool:
        """Return whether a sample is kept."""
        return str(sample_id(sample, self.id_of)) in self.ids

    def __len__(self) -> int:
        return len(self.ids)


def keep(
    manifest: Manifest | str | Path,
    *,
    split: str | Sequence[str] = "train",
    id_of: str | Identify | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Keep:
    """Return a predicate that is true for the samples of a manifest, for pipelines that filter a stream by sample.

    It works as `pipeline.select(keep)` of WebDataset and `dataset.filter(keep)` of datasets. The ids of a manifest of a
    million rows take about 100 MB in each worker.

    Args:
        manifest: The manifest, or its file.
        split: Splits whose rows are kept: train, validation, test, or several.
        id_of: Name of the field that holds a sample's id, or a function of the sample; by default the field
            `sample_id`, else `__key__`.
        validation_fraction: Share of the training rows that is the validation split where the manifest has none, as in
            `finetune` and `order`; 0 cuts none.
        seed: Seed of that cut.

    Returns:
        The predicate. Calling it raises DatasetError for a sample without the field.

    Raises:
        ConfigError: There is no such split.
        ManifestError: The file is not a manifest, or has no rows of the split.

    Example:
        >>> keep = mmaudit.keep("mmaudit-run/manifests/balanced.parquet")
        >>> pipeline = webdataset.WebDataset("clips-{000..009}.tar").select(keep)
    """
    opened = open_manifest(manifest)
    rows = split_rows(opened.table, split, validation_fraction=validation_fraction, seed=seed)
    return Keep(ids=frozenset(opened.table["sample_id"].take(rows).to_pylist()), id_of=id_of)


def open_manifest(manifest: Manifest | str | Path) -> Manifest:
    """Return the manifest, read from its file where it is a path."""
    return manifest if isinstance(manifest, Manifest) else read_manifest(manifest)


def sample_id(sample: Any, id_of: str | Identify | None) -> Any:
    """Return the id of a sample; DatasetError where it has no such field."""
    if callable(id_of):
        return id_of(sample)
    if not isinstance(sample, Mapping):
        raise DatasetError(
            f"a sample of type {type(sample).__name__} has no fields: pass id_of, a function of the sample"
        )
    fields = ID_FIELDS if id_of is None else (id_of,)
    for field in fields:
        if field in sample:
            return sample[field]
    names = ", ".join(map(str, list(sample)[:20]))
    raise DatasetError(
        f"a sample has no field {' or '.join(fields)}: name the one that holds its id with id_of ({names})"
    )


def dataset_ids(dataset: Any, ids: Any, id_of: str | Identify | None) -> pa.Array:
    """Return the ids of a dataset as strings (n,); DatasetError where they are null or repeated."""
    if (ids is None) == (id_of is None):
        raise ConfigError("pass either ids, the id of each sample of the dataset in its order, or dataset and id_of")
    if ids is None:
        if dataset is None:
            raise ConfigError("id_of reads the ids from the samples: pass the dataset too")
        has_columns = isinstance(id_of, str) and id_of in (getattr(dataset, "column_names", None) or ())
        ids = dataset[id_of] if has_columns else [sample_id(dataset[row], id_of) for row in range(len(dataset))]
    elif dataset is not None and len(ids) != len(dataset):
        raise DatasetError(f"{len(ids)} ids for a dataset of {len(dataset)} samples: pass one for each, in its order")
    strings = _strings(ids)
    if strings.null_count:
        raise DatasetError(f"{strings.null_count} of {len(strings)} ids of the dataset are null")
    if num_repeated := len(strings) - pc.count_distinct(strings).as_py():
        counts = pc.value_counts(strings)
        names = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise DatasetError(
            f"{len(names)} ids of the dataset occur more than once, {num_repeated} rows too many "
            f"({_examples(names.to_pylist()[:3])}): ids must be unique"
        )
    return strings


def _strings(ids: Any) -> pa.Array:
    """Return ids of any sequence as one array of strings; integers as decimals."""
    if not isinstance(ids, (pa.Array, pa.ChunkedArray)):
        try:
            ids = pa.array(ids.tolist() if isinstance(ids, np.ndarray) else list(ids))
        except pa.ArrowException as error:
            raise DatasetError(f"the ids of the dataset must be strings or integers: {error}") from error
    type_ = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    if not (is_text(type_) or pa.types.is_integer(type_)):
        raise DatasetError(f"the ids of the dataset must be strings or integers, not {ids.type}")
    strings = ids.cast(type_).cast(pa.large_string())  # large: more than 2 GiB of text
    return strings.combine_chunks() if isinstance(strings, pa.ChunkedArray) else strings


def join_ids(
    manifest_ids: pa.ChunkedArray, rows: RowIndex, ids: pa.Array, *, allow_missing: bool
) -> tuple[RowIndex, RowIndex]:
    """Return the manifest's rows that the dataset has, and the dataset's index of each."""
    names = manifest_ids.take(pa.array(rows)).cast(pa.large_string()).combine_chunks()
    index = pc.index_in(names, value_set=ids)
    if num_missing := index.null_count:
        missing = names.filter(index.is_null())
        if num_missing == len(names):
            raise ManifestError(
                f"none of the manifest's {len(names)} rows is in the dataset: its ids are {_examples(names[:3])}, "
                f"the dataset's {_examples(ids[:3])}; pass the ids that were scored, the column sample_id"
            )
        if not allow_missing:
            raise ManifestError(
                f"the dataset lacks {num_missing} of the manifest's {len(names)} rows "
                f"({_examples(missing[:3])}): add them, or draw without them with allow_missing=True"
            )
        rows, index = rows[index.is_valid().to_numpy(zero_copy_only=False)], index.drop_null()
    return rows, index.to_numpy(zero_copy_only=False).astype(np.int64)


def _examples(ids: Iterable[Any]) -> str:
    """Return the first few ids for a message."""
    return ", ".join(str(name) for _, name in zip(range(_NUM_SHOWN), ids, strict=False))
