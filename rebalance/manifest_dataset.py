"""Map-style dataset of PyTorch of the samples of a manifest: decoded media, or vectors of the feature cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data
from numpy.typing import NDArray

from ..audit.dataset.dataset import DataConfig, Dataset, open_dataset
from ..audit.dataset.formats import READERS
from ..audit.dataset.modalities import Modality
from ..audit.errors import ConfigError, DatasetError, ManifestError, UnusableError, printable
from ..audit.features.encode import column_of, content_of, read_arrow
from ..audit.features.encoded_samples import row_content
from ..audit.features.encoders import decode_cell, input_shape, is_network
from ..audit.features.vectors import count_terms, holds_terms, project_terms
from ..audit.media.files import MediaConfig
from ..audit.parsing import build_config

_OWN_KEYS = ("sample_id", "label", "weight")
_NUM_CACHED = 2  # shards of a source whose rows hold media, kept in each process

Transform = Callable[[dict[str, Any]], Any]


class RowSource(Protocol):
    """Inputs of the rows of a manifest by modality."""

    def read(self, row: int) -> dict[str, Any]:
        """Read the modalities of a row: arrays, texts, or None where the sample lacks one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestDataset(torch.utils.data.Dataset[Any]):
    """Map-style dataset of PyTorch; returned by `Manifest.to_torch`.

    A sample is a dictionary: `sample_id`, a string; `label`, the manifest's class number; `weight`, its weight in the
    loss; and each modality by name. Media are audio, a waveform (t,) float32 in [-1, 1]; image, pixels (h, w, 3) uint8;
    video and frames (f, h, w, 3) uint8; text, a string; vectors (d,) float32. From the feature cache come vectors (d,)
    float32, or inputs of `resnet18` in their shape. A modality that a sample lacks is None, or NaN from the cache. It
    can be pickled for the workers of a loader.

    Args:
        ids: Id of each sample (n,), in the order of the manifest.
        label: Class number of each sample (n,).
        weight: Weight of each sample in the loss (n,).
        class_names: Name of each class number that occurs.
        transform: Function of a sample whose result is returned in its place; None: none.
        source: Where the modalities are read.

    Example:
        >>> dataset = mmaudit.read_manifest("balanced.parquet").to_torch(features="mmaudit-run/features")
        >>> sampler = mmaudit.ManifestSampler("balanced.parquet", ids=dataset.ids, sampling="bss-h")
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler)
    """

    ids: pa.Array
    label: NDArray[np.int64]
    weight: NDArray[np.float32]
    class_names: dict[int, str]
    source: RowSource = field(repr=False)
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        """Read a sample. Raises DatasetError where one of its media is missing or damaged."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        sample_id = self.ids[index].as_py()
        try:
            inputs = self.source.read(index)
        except UnusableError as error:
            raise DatasetError(f"sample {sample_id}: {error.reason.value}, {error.detail}") from error
        sample = {
            "sample_id": sample_id,
            "label": int(self.label[index]),
            "weight": float(self.weight[index]),
            **{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()},
        }
        return sample if self.transform is None else self.transform(sample)


def open_rows(
    table: pa.Table,
    scores: dict[str, Any],
    *,
    data: str | Path | None,
    features: str | Path | None,
    transform: Transform | None,
    allow_outside: bool,
) -> ManifestDataset:
    """Open the samples of rows of a manifest; `scores` is the section of its provenance. See Manifest.to_torch."""
    if (data is None) == (features is None):
        raise ConfigError("pass either data, to decode media, or features, the folder of a run's feature cache")
    modalities = _modalities(scores)
    media = build_config(MediaConfig, scores.get("config", {}).get("media", {}), where="media.")
    ids = table["sample_id"].combine_chunks()
    source: RowSource
    if data is not None:
        dataset = open_dataset(data, _data_config(scores, modalities, allow_outside=allow_outside))
        source = MediaRows.of(dataset, media, ids)
    else:
        versions = [str(entry.get("preprocessing")) for entry in scores["modalities"]]
        source = FeatureRows.of(_cache_folders(Path(str(features)), modalities, versions), modalities, media, table)
    return ManifestDataset(
        ids=ids,
        label=table["label"].to_numpy().astype(np.int64),
        weight=np.array(table["weight"].to_pandas().fillna(1.0), dtype=np.float32),
        class_names=dict(zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True)),
        source=source,
        transform=transform,
    )


def _modalities(scores: dict[str, Any]) -> list[Modality]:
    """Return the modalities that the samples were scored in; ManifestError where the metadata hold none."""
    names = Modality.__dataclass_fields__
    try:
        modalities = [Modality(**{name: entry[name] for name in names}) for entry in scores["modalities"]]
    except (KeyError, TypeError) as error:
        raise ManifestError(
            "the manifest does not record the modalities of its samples: score the data with mmaudit score, and split "
            "that run"
        ) from error
    for modality in modalities:
        if modality.name in _OWN_KEYS:
            raise ManifestError(
                f"a modality is called {modality.name}, as the sample's own: rename it, and score again"
            )
    return modalities


def _cache_folders(features: Path, modalities: Sequence[Modality], versions: Sequence[str]) -> list[Path]:
    """Return the folder of each modality's vectors; ManifestError where the metadata lead out of the feature cache."""
    folders = [features / f"{modality.name}-{version}" for modality, version in zip(modalities, versions, strict=True)]
    for folder in folders:
        if folder.resolve().parent != features.resolve():
            raise ManifestError(f"the manifest names {printable(folder.name)}, which is not in {features}")
        if not any(folder.glob("*.arrow")):
            raise ManifestError(f"no vectors in {folder}: pass the folder features of the run that was scored")
    return folders


def _data_config(scores: dict[str, Any], modalities: Sequence[Modality], *, allow_outside: bool) -> DataConfig:
    """Return how the data were read at scoring; no encoder, and no reader of an installed package."""
    stated = dict(scores.get("config", {}).get("data", {}))
    if (reader := stated.get("reader", "auto")) not in ("auto", *READERS):
        raise ManifestError(f"the manifest names the reader {printable(reader)} of an installed package: use features")
    changed = {"modality": [str(modality) for modality in modalities], "encoder": [], "allow_outside": allow_outside}
    values = {name: value for name, value in {**stated, **changed}.items() if value is not None}
    return build_config(DataConfig, values, where="data.")


def _positions(ids: pa.Array, available: pa.Array, *, where: str) -> NDArray[np.int64]:
    """Return the position of each id (n,) among those available; ManifestError where some are missing."""
    index = pc.index_in(ids, value_set=available)
    if index.null_count:
        missing = ids.filter(index.is_null())
        raise ManifestError(f"{len(missing)} of {len(ids)} samples of the manifest are not in {where} ({missing[0]})")
    return np.asarray(index.to_numpy(), dtype=np.int64)


@dataclass(slots=True)
class _Cache:
    """The last few tables by key, not pickled."""

    tables: dict[Any, pa.Table] = field(default_factory=dict)

    def get(self, key: Any, read: Callable[[], pa.Table], *, size: int | None) -> pa.Table:
        """Return the table of a key, read where it is not cached."""
        if key not in self.tables:
            while size is not None and len(self.tables) >= size:
                del self.tables[next(iter(self.tables))]
            self.tables[key] = read()
        return self.tables[key]

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return (_Cache, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRows:
    """Media of n rows, loaded and decoded when they are read.

    cells: paths and texts of the rows, by column. shard, row_of_shard: place of each row (n,) in the source, for
    columns whose cells are media or vectors themselves.
    """

    dataset: Dataset
    media: MediaConfig
    cells: pa.Table
    shard: NDArray[np.int64]
    row_of_shard: NDArray[np.int64]
    cache: _Cache = field(default_factory=_Cache)

    @classmethod
    def of(cls, dataset: Dataset, media: MediaConfig, ids: pa.Array) -> MediaRows:
        """Find the rows of these ids in a dataset."""
        tables = [dataset.read(shard, data=False) for shard in dataset.shards]
        names = [dataset.sample_ids(table, shard) for table, shard in zip(tables, dataset.shards, strict=True)]
        available = pa.array([name for part in names for name in part], pa.string())
        rows = _positions(ids, available, where=dataset.source)
        columns = [modality.column for modality in dataset.modalities if not dataset.holds_data(modality.column)]
        sizes = np.array([len(part) for part in names])
        shard = np.repeat(np.arange(len(sizes)), sizes)
        row_of_shard = np.arange(len(available)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        cells = pa.concat_tables(tables).select(list(dict.fromkeys(columns))).take(pa.array(rows)).combine_chunks()
        return cls(dataset=dataset, media=media, cells=cells, shard=shard[rows], row_of_shard=row_of_shard[rows])

    def read(self, row: int) -> dict[str, Any]:
        """Load and decode the modalities of a row."""
        inputs: dict[str, Any] = {}
        for modality in self.dataset.modalities:
            if (cell := self._cell(modality.column, row)) is None:
                inputs[modality.name] = None
                continue
            decoded = decode_cell(self.dataset.load(cell, modality), modality, self.media)
            inputs[modality.name] = np.array(decoded) if isinstance(decoded, np.ndarray) else decoded
        return inputs

    def _cell(self, column: str, row: int) -> Any:
        if column in self.cells.column_names:
            return self.cells[column][row].as_py()
        shard = int(self.shard[row])
        table = self.cache.get(shard, lambda: self.dataset.read(self.dataset.shards[shard]), size=_NUM_CACHED)
        return table[column][int(self.row_of_shard[row])].as_py()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRows:
    """Vectors of n rows from the feature cache of a run.

    files: cache files of each modality; file, row_of_file: place of each row (m, n); num_features: length of the
    vectors of each modality, for rows that lack it.
    """

    modalities: tuple[Modality, ...]
    media: MediaConfig
    files: tuple[tuple[Path, ...], ...]
    file: NDArray[np.int64]
    row_of_file: NDArray[np.int64]
    num_features: tuple[int, ...]
    cache: _Cache = field(default_factory=_Cache)

    @classmethod
    def of(
        cls, folders: Sequence[Path], modalities: Sequence[Modality], media: MediaConfig, table: pa.Table
    ) -> FeatureRows:
        """Find the rows of a manifest in the cache. Raises ManifestError where they are not there or have changed."""
        files, places, contents, num_features = [], [], [], []
        for folder, modality in zip(folders, modalities, strict=True):
            paths = tuple(sorted(folder.glob("*.arrow")))
            tables = [read_arrow(path) for path in paths]
            ids = pa.concat_arrays([column_of(part, "sample_id") for part in tables])
            rows = _positions(table["sample_id"].combine_chunks(), ids, where=str(folder))
            starts = np.cumsum([0, *(len(part) for part in tables)])
            file = np.searchsorted(starts, rows, side="right") - 1
            places.append((file, rows - starts[file]))
            contents.append(np.concatenate([content_of(part) for part in tables])[rows])
            lengths = (int(pc.max(pc.list_value_length(part["vector"])).as_py() or 0) for part in tables)
            num_features.append(media.text_buckets if holds_terms(modality) else max(lengths))
            files.append(paths)
        stated = np.array(table["content"].to_pylist(), dtype=object)
        if num_changed := int(((row_content(contents) != stated) & (stated != None)).sum()):  # noqa: E711
            raise ManifestError(f"{num_changed} of {len(stated)} samples have changed since the manifest was made")
        return cls(
            modalities=tuple(modalities),
            media=media,
            files=tuple(files),
            file=np.stack([file for file, _ in places]),
            row_of_file=np.stack([row for _, row in places]),
            num_features=tuple(num_features),
        )

    def read(self, row: int) -> dict[str, Any]:
        """Read the vectors of a row."""
        return dict(self._vectors(row))

    def _vectors(self, row: int) -> Iterator[tuple[str, NDArray[Any]]]:
        for index, modality in enumerate(self.modalities):
            path = self.files[index][self.file[index, row]]
            table = self.cache.get(path, lambda path=path: read_arrow(path), size=None)  # type: ignore[misc]
            cell = column_of(table, "vector")[int(self.row_of_file[index, row])]
            if not cell.is_valid:
                vector = np.full(self.num_features[index], np.nan, np.float32)
            elif holds_terms(modality):
                codes = cell.values.to_numpy()
                vector = project_terms(count_terms(codes, np.array([len(codes)])), self.media.text_buckets)[0]
            else:
                vector = np.array(cell.values.to_numpy())
            yield modality.name, vector.reshape(input_shape(modality, self.media)) if is_network(modality) else vector
