"""The score table: one row per sample, read and written as scores.parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.modalities import RESERVED
from ..errors import ConfigError, ScoreError, choices
from ..metrics import Floats, discrepancy, dominant_modality, gap
from ..parsing import Shape
from ..storage import read_parquet, write_parquet

_MODALITY: Shape = {"name": str, "column": str, "kind": str, "encoder": str, "length": (int, type(None))}
PROVENANCE: Shape = {
    "schema": str,
    "version": str,
    "fingerprint": (str, type(None)),
    "config": {
        "seed": int,
        "data": {"allow_outside": bool},
        "media": {},
        "probe": {"learn_from": str},
        "network": {"width": float},
        "mixture": {},
    },
    "modalities": [_MODALITY],
    "columns": {},
    "paths": [str],
    "ranges": {},
}
_SCALAR_COLUMNS = ("sample_id", "label", "label_name", "split", "group", "content")  # one string or number per row


def check_score_schema(schema: pa.Schema, *, where: str, paths: tuple[str, ...] = ()) -> None:
    """Raise ScoreError for names, ids, labels and paths that are neither strings nor numbers."""
    for name in (*_SCALAR_COLUMNS, *paths):
        type_ = schema.field(name).type if name in schema.names else pa.null()
        dated = name == "label" and pa.types.is_temporal(type_)
        if dated or not _is_text_or_number(type_):
            raise ScoreError(f"{where}: column {name} holds {type_}; it must hold one string or number per row")


def check_splits(names: Iterable[object]) -> None:
    """Raise ScoreError for a split other than train, validation and test; null is a row without a split."""
    unknown = sorted({str(name) for name in names if name is not None} - set(SPLITS))
    if unknown:
        raise ScoreError(
            f"column split holds {', '.join(map(repr, unknown[:3]))}: must be one of train, validation, test; "
            "rename them, or drop the column"
        )


def _is_text_or_number(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text_or_number(type_.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_date,
        pa.types.is_timestamp,
        pa.types.is_null,
    )
    return any(test(type_) for test in tests)


SCHEMA_VERSION = 1

# Columns of scores.parquet as {name: (range, meaning)}, written to the file's metadata.
RANGES = {
    "confidence_M": ("[0, 1]", "probability of the true class by a probe not trained on the sample or its group"),
    "prediction_M": ("[0, k)", "class that the probe predicts; the number, of a regression; null for multilabel"),
    "loss_M": ("[0, 27.7]", "-log confidence_M"),
    "entropy_M": ("[0, log k]", "entropy of the probe's class probabilities, in nats; 0 = certain, correct or not"),
    "margin_M": ("[0, 1]", "difference of the two highest class probabilities; 0 = undecided; null for a regression"),
    "training_confidence_M": ("[0, 1]", "mean confidence over the probe's training, out of fold; high = easy"),
    "training_variability_M": ("[0, 0.5]", "standard deviation of the same; high = ambiguous"),
    "shapley_M": ("[(1 - m) / 2, (1 + m) / 2]", "contribution of M: SMV's Shapley value phi on the joint probe"),
    "discrepancy": ("[-1, 1]", "+1: only the first modality predicts the class, -1: the second, 0: both or neither"),
    "discrepancy_M": ("[-1, 1]", "more than two modalities: confidence_M minus the mean of the others"),
    "discrepancy_sd": ("[0, 1.42]", "standard deviation over repeats; null for one repeat"),
    "gap": ("[0, 1]", "largest minus smallest confidence; 0 = balanced"),
    "similarity": ("[0, 1]", "cosine of the modalities' class probabilities; 1 = equal"),
    "confidence_fused": ("[0, 1]", "probability of the true class by all modalities together, out of fold"),
    "prediction_fused": ("[0, k)", "class that all modalities together predict"),
    "loss_fused": ("[0, 27.7]", "-log confidence_fused"),
    "balance": ("[-1, 1]", "BSS measure, high = balanced"),
    "p_balanced": ("[0, 1]", "posterior of the gap mixture's balanced component, or the threshold rule"),
}


# Columns of which there is one per modality, besides confidence.
BY_MODALITY = ("prediction", "loss", "entropy", "margin", "training_confidence", "training_variability", "shapley")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Scores of n samples with m modalities. Strings are numpy object arrays; columns that are not available are None.

    confidence (n, m) is required, with NaN where a sample lacks a modality and at least two values per row. Columns by
    modality are (n, m), discrepancy_sd is (n, 1), or (n, m) where m > 2. `paths` holds the source's columns of file
    names, `provenance` the file's metadata.
    """

    sample_id: NDArray[np.object_]
    label: NDArray[np.int32]
    label_name: NDArray[np.object_]
    modalities: tuple[str, ...]
    confidence: Floats
    split: NDArray[np.object_] | None = None
    group: NDArray[np.object_] | None = None
    fold: NDArray[np.int16] | None = None
    prediction: NDArray[np.int32] | Floats | None = None  # -1, or NaN, where the modality is missing
    loss: Floats | None = None
    entropy: Floats | None = None
    margin: Floats | None = None
    training_confidence: Floats | None = None
    training_variability: Floats | None = None
    shapley: Floats | None = None
    confidence_fused: Floats | None = None
    prediction_fused: NDArray[np.int32] | Floats | None = None
    loss_fused: Floats | None = None
    discrepancy_sd: Floats | None = None
    similarity: Floats | None = None
    balance: Floats | None = None
    p_balanced: Floats | None = None
    content: NDArray[np.object_] | None = None
    paths: pa.Table | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.sample_id)
        if n == 0:
            raise ScoreError("the score table has no rows")
        if len(set(self.sample_id)) < n:
            raise ScoreError(
                f"the score table has {n - len(set(self.sample_id))} duplicate sample ids: they must be unique"
            )
        if self.confidence.shape != (n, len(self.modalities)) or len(self.modalities) < 2:
            raise ScoreError(
                f"the score table has {len(self.modalities)} columns confidence_M for {n} rows; two or more are needed"
            )
        present = ~np.isnan(self.confidence)
        if (present.sum(axis=1) < 2).any():
            row = int(np.argmax(present.sum(axis=1) < 2))
            raise ScoreError(
                f"{int((present.sum(axis=1) < 2).sum())} samples have fewer than two values of confidence "
                f"(the first: {self.sample_id[row]}): a discrepancy needs two; rescore, or correct the table"
            )
        _check_range("confidence", self.confidence[present], 0, 1)
        for name, low in (("similarity", -1), ("balance", -1), ("p_balanced", 0)):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low, 1)

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: NDArray[np.intp]) -> ScoreTable:
        """Return the table of these rows, in this order."""
        columns: dict[str, Any] = {
            name: values[rows]
            for name in self.__dataclass_fields__
            if isinstance(values := getattr(self, name), np.ndarray)
        }
        return replace(self, **columns, paths=None if self.paths is None else self.paths.take(pa.array(rows)))

    @property
    def present(self) -> NDArray[np.bool_]:
        """Mask (n, m) of the modalities that each sample has."""
        return ~np.isnan(self.confidence)

    @property
    def gap(self) -> Floats:
        """Modality gap (n,) in [0, 1]; 0 = balanced."""
        return gap(self.confidence)

    @property
    def not_test(self) -> NDArray[np.bool_]:
        """Mask (n,) of the rows that choices may depend on: all but the test split; all if there is no other split."""
        not_test = np.ones(len(self), dtype=bool) if self.split is None else self.split != "test"
        return not_test if not_test.any() else ~not_test

    def discrepancy(self, between: str | None = None) -> Floats:
        """Compute the signed discrepancy (n,) in [-1, 1]: `A:B` is c^A - c^B, `A` is A minus the mean of the others.

        None is the first minus the second of two modalities; of more, that of `default_between`.
        """
        return discrepancy_between(self.confidence, self.modalities, between or self.default_between())

    def default_between(self) -> str:
        """Return `A:B` for two modalities; of more, the most confident one, which is compared with the others."""
        if len(self.modalities) == 2:
            return ":".join(self.modalities)
        return self.modalities[int(np.nanmean(self.confidence[self.not_test], axis=0).argmax())]

    def to_arrow(self) -> pa.Table:
        """Return the columns of scores.parquet."""
        columns: dict[str, pa.Array] = {
            "sample_id": pa.array(self.sample_id, pa.string()),
            "label": pa.array(self.label, pa.int32()),
            "label_name": pa.array(self.label_name, pa.string()),
            "split": _array(self.split, pa.string(), len(self)),
            "group": _array(self.group, pa.string(), len(self)),
            "fold": _array(self.fold, pa.int16(), len(self)),
        }
        for column, name in enumerate(self.modalities):
            for kind in ("confidence", *BY_MODALITY):
                if (values := getattr(self, kind)) is not None:
                    columns[f"{kind}_{name}"] = _nullable(values[:, column])
        for kind in ("confidence", "prediction", "loss"):
            if (values := getattr(self, f"{kind}_fused")) is not None:
                columns[f"{kind}_fused"] = _nullable(values)
        columns |= self._discrepancy_columns()
        dominant_index = dominant_modality(self.confidence)
        columns["gap"] = pa.array(self.gap)
        columns["dominant"] = pa.array(
            [self.modalities[index] if index >= 0 else None for index in dominant_index], pa.string()
        )
        for name in ("similarity", "balance", "p_balanced"):
            columns[name] = _array(getattr(self, name), pa.float32(), len(self))
        columns["content"] = _array(self.content, pa.string(), len(self))
        if self.paths is not None:
            for name in self.paths.column_names:
                columns.setdefault(name, self.paths[name].combine_chunks())
        return pa.table(columns)

    def _discrepancy_columns(self) -> dict[str, pa.Array]:
        values = discrepancy(self.confidence).reshape(len(self), -1)
        suffixes = [""] if values.shape[1] == 1 else [f"_{name}" for name in self.modalities]
        columns = {f"discrepancy{suffix}": _nullable(values[:, index]) for index, suffix in enumerate(suffixes)}
        deviation = self.discrepancy_sd
        for index, suffix in enumerate(suffixes):
            column = None if deviation is None else deviation[:, index]
            columns[f"discrepancy_sd{suffix}"] = (
                pa.nulls(len(self), pa.float32()) if column is None else _nullable(column)
            )
        return columns


def discrepancy_between(confidence: Floats, modalities: Sequence[str], between: str) -> Floats:
    """Compute the signed discrepancy (n,) in [-1, 1] of confidence (n, m): `A:B` is c^A - c^B, `A` is A minus the mean.

    The mean is that of the other modalities. Raises ConfigError for an unknown modality.
    """
    first, _, second = between.partition(":")
    for name in [first, second] if second else [first]:
        if name not in modalities:
            raise ConfigError(f"--between {between}: no modality {name!r}; {choices(name, modalities)}")
    if first == second:
        raise ConfigError(f"--between {between}: the two modalities must differ; pass two names, or one")
    if not second and len(modalities) == 2:
        second = next(name for name in modalities if name != first)
    if second:
        return discrepancy(confidence[:, [modalities.index(first), modalities.index(second)]])
    return np.asarray(discrepancy(confidence)[:, modalities.index(first)])


def score_modalities(names: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the modalities of a score table with these columns; raise ScoreError if it is not a score table."""
    scored = [name.removeprefix("confidence_") for name in names if name.startswith("confidence_")]
    modalities = tuple(name for name in scored if name not in RESERVED)
    if "sample_id" not in names or not {"label", "label_name"} & set(names) or len(modalities) < 2:
        raise ScoreError(
            f"{where} is not a score table: it needs sample_id, label (or label_name) and two or more confidence_M; "
            f"it has {', '.join(names)}"
        )
    return modalities


def write_scores(scores: ScoreTable, path: str | Path) -> None:
    """Write a score table as Parquet, whole or not at all; an older file is replaced."""
    paths = [] if scores.paths is None else scores.paths.column_names
    write_parquet(scores.to_arrow(), Path(path), provenance={**scores.provenance, "paths": paths})


def read_scores(path: str | Path) -> ScoreTable:
    """Read a score table, of mmaudit or any other with sample_id, a label and two or more columns confidence_M.

    Args:
        path: a parquet file.

    Returns:
        The table, with `provenance` from the file's metadata.

    Raises:
        ScoreError: missing columns, duplicate ids, or values that are null or out of range.
    """
    table, provenance = read_parquet(Path(path), error=ScoreError, shape=PROVENANCE)
    path_columns = [name for name in provenance.pop("paths", []) if name in table.column_names]
    check_score_schema(table.schema, where=str(path), paths=tuple(path_columns))
    names = table.column_names
    modalities = score_modalities(names, where=str(path))
    label, label_name = _labels(table)
    suffixes = [""] if len(modalities) == 2 else [f"_{name}" for name in modalities]
    return ScoreTable(
        sample_id=_required(_strings(table, "sample_id")),
        label=label,
        label_name=label_name,
        modalities=modalities,
        confidence=_required(_stack(table, [f"confidence_{name}" for name in modalities], np.float32)),
        split=_splits(table),
        group=_strings(table, "group"),
        fold=_numbers(table, "fold", np.int16),
        prediction=_predictions(table, modalities),
        confidence_fused=_numbers(table, "confidence_fused", np.float32),
        prediction_fused=_prediction(table, "prediction_fused"),
        loss_fused=_numbers(table, "loss_fused", np.float32),
        **{
            kind: _stack(table, [f"{kind}_{name}" for name in modalities], np.float32)
            for kind in BY_MODALITY
            if kind != "prediction"
        },
        discrepancy_sd=_stack(table, [f"discrepancy_sd{suffix}" for suffix in suffixes], np.float32),
        similarity=_numbers(table, "similarity", np.float32),
        balance=_numbers(table, "balance", np.float32),
        p_balanced=_numbers(table, "p_balanced", np.float32),
        content=_strings(table, "content"),
        paths=table.select(path_columns) if path_columns else None,
        provenance=provenance,
    )


def _check_range(name: str, values: NDArray[np.generic], low: float, high: float) -> None:
    numbers = np.asarray(values, dtype=np.float64)
    invalid = ~((numbers >= low - 1e-6) & (numbers <= high + 1e-6))  # also catches NaN
    if invalid.any():
        raise ScoreError(
            f"{int(invalid.sum())} values of {name} are null or outside [{low}, {high}]: rescore, or correct the table"
        )


def _labels(table: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.object_]]:
    """Read label and label_name; a missing one is derived from the other."""
    for name in ("label", "label_name"):
        if name in table.column_names and table[name].null_count:
            raise ScoreError(f"column {name} holds {table[name].null_count} nulls: every sample needs a label")
    names = _strings(table, "label_name")
    if "label" not in table.column_names or not _is_number(table["label"].type):
        names = _required(_strings(table, "label") if names is None else names)
        return np.unique(names.astype(str), return_inverse=True)[1].astype(np.int32), names
    label = _required(_numbers(table, "label", np.int32))
    return label, np.array([str(value) for value in label], dtype=object) if names is None else names


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def _array(values: Any, type_: pa.DataType, length: int) -> pa.Array:
    return pa.nulls(length, type_) if values is None else pa.array(values, type_)


def _strings(table: pa.Table, name: str) -> NDArray[np.object_] | None:
    """Read a column as strings; None if it is missing or all null."""
    if name not in table.column_names or table[name].null_count == len(table):
        return None
    return np.array([None if value is None else str(value) for value in table[name].to_pylist()], dtype=object)


def _splits(table: pa.Table) -> NDArray[np.object_] | None:
    split = _strings(table, "split")
    check_splits(() if split is None else set(split))
    return split


def _numbers(table: pa.Table, name: str, dtype: type[np.generic]) -> NDArray[Any] | None:
    """Read a column as numbers, nulls as NaN; None if it is missing or all null."""
    if name not in table.column_names or table[name].null_count == len(table):
        return None
    try:
        column = table[name].cast(pa.from_numpy_dtype(dtype))  # fails for fractions as labels, and for words
    except pa.ArrowException as cause:
        raise ScoreError(f"column {name} cannot be read as {dtype.__name__}: {str(cause).splitlines()[0]}") from cause
    if column.null_count and pa.types.is_integer(column.type):
        raise ScoreError(f"column {name} holds {column.null_count} nulls: fill or drop the column")
    return np.array(column.to_numpy(), dtype=dtype)


def _predictions(table: pa.Table, modalities: Sequence[str]) -> NDArray[Any] | None:
    columns = [_prediction(table, f"prediction_{name}") for name in modalities]
    if any(column is None for column in columns):
        return None
    return np.stack([column for column in columns if column is not None], axis=1)


def _prediction(table: pa.Table, name: str) -> NDArray[Any] | None:
    """Read classes, null as -1, or the numbers of a regression, null as NaN."""
    if name not in table.column_names or table[name].null_count == len(table):
        return None
    if pa.types.is_floating(table[name].type):
        return _numbers(table, name, np.float32)
    try:
        return np.array(table[name].cast(pa.int32()).fill_null(-1).to_numpy(), dtype=np.int32)
    except pa.ArrowException as cause:
        raise ScoreError(f"column {name} does not hold classes: {str(cause).splitlines()[0]}") from cause


def _nullable(values: NDArray[Any]) -> pa.Array:
    """Return a column with nulls for missing values: NaN, or a class of -1."""
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return pa.array(values, mask=missing) if missing.any() else pa.array(values)


def _stack(table: pa.Table, names: Sequence[str], dtype: type[np.generic]) -> NDArray[Any] | None:
    columns = [_numbers(table, name, dtype) for name in names]
    return (
        None if any(column is None for column in columns) else np.stack([c for c in columns if c is not None], axis=1)
    )


def _required(values: NDArray[Any] | None) -> NDArray[Any]:
    if values is None or (values.dtype == object and None in values.tolist()):
        raise ScoreError("sample_id, a label or a column confidence_M is null: rescore, or correct the table")
    return values
