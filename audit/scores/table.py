"""The score table: one row per sample, read and written as scores.parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.columns import SPLITS
from ..dataset.modalities import RESERVED
from ..errors import ScoreError
from ..metrics import Floats, discrepancy, discrepancy_between, dominant_modality, gap
from ..parsing import Shape
from ..storage import read_parquet, write_parquet

_MODALITY: Shape = {"name": str, "column": str, "kind": str, "encoder": str, "length": (int, type(None))}
_PROBES: dict[str, Shape] = {"probe": {"learn_from": str}, "network": {"width": float}}
PROVENANCE: Shape = {
    "schema": str,
    "version": str,
    "fingerprint": (str, type(None)),
    "config": {"seed": int, "data": {"allow_outside": bool}, **_PROBES, "media": {}, "mixture": {}},
    "modalities": [_MODALITY],
    "columns": {},
    "paths": [str],
    "ranges": {},
}
SCHEMA_VERSION = 1
STRING, FLOAT = pa.string(), pa.float32()


class Column(NamedTuple):
    """One column of scores.parquet: what it means, its range as text, its type, and bounds that are checked."""

    meaning: str
    range: str = ""
    type: pa.DataType = FLOAT
    bounds: tuple[float, float] | None = None


# All columns but the source's own of file names. M stands for a modality; of a discrepancy there is one per modality if
# there are more than two. Required are sample_id, label or label_name, and confidence_M of two modalities.
COLUMNS = {
    "sample_id": Column("id of the sample, unique", type=STRING),
    "label": Column("number of the class", type=pa.int32()),
    "label_name": Column("name of the class", type=STRING),
    "split": Column("train, validation or test", type=STRING),
    "group": Column("group that no probe both trains on and scores", type=STRING),
    "fold": Column("fold of the first repeat", type=pa.int16()),
    "confidence_M": Column(
        "probability of the true class by a probe not trained on the sample or its group", "[0, 1]", bounds=(0, 1)
    ),
    "prediction_M": Column(
        "class that the probe predicts; the number, of a regression; null for multilabel", "[0, k)", pa.int32()
    ),
    "loss_M": Column("-log confidence_M", "[0, 27.7]"),
    "entropy_M": Column(
        "entropy of the probe's class probabilities, in nats; 0 = certain, correct or not", "[0, log k]"
    ),
    "margin_M": Column(
        "difference of the two highest class probabilities; 0 = undecided; null for a regression", "[0, 1]"
    ),
    "training_confidence_M": Column("mean confidence over the probe's training, out of fold; high = easy", "[0, 1]"),
    "training_variability_M": Column("standard deviation of the same; high = ambiguous", "[0, 0.5]"),
    "half_a_M": Column(
        "confidence_M by a random half of M's features; null beyond 200,000 samples or where not measured", "[0, 1]"
    ),
    "half_b_M": Column("the same by the other half, with other folds", "[0, 1]"),
    "shapley_M": Column("contribution of M: SMV's Shapley value phi on the joint probe", "[(1 - m) / 2, (1 + m) / 2]"),
    "discrepancy": Column(
        "+1: only the first modality predicts the class, -1: the second, 0: both or neither", "[-1, 1]"
    ),
    "discrepancy_M": Column("more than two modalities: confidence_M minus the mean of the others", "[-1, 1]"),
    "discrepancy_sd": Column(
        "standard deviation over repeats with other folds and the same features, which does not show that a "
        "discrepancy is real; null for one repeat",
        "[0, 1.42]",
    ),
    "gap": Column("largest minus smallest confidence; 0 = balanced", "[0, 1]"),
    "dominant": Column("modality of the highest confidence; null if two are equal", type=STRING),
    "similarity": Column("cosine of the modalities' class probabilities; 1 = equal", "[0, 1]", bounds=(-1, 1)),
    "confidence_fused": Column("probability of the true class by all modalities together, out of fold", "[0, 1]"),
    "prediction_fused": Column("class that all modalities together predict", "[0, k)", pa.int32()),
    "loss_fused": Column("-log confidence_fused", "[0, 27.7]"),
    "balance": Column("BSS measure, high = balanced", "[-1, 1]", bounds=(-1, 1)),
    "p_balanced": Column(
        "posterior of the gap mixture's balanced component, or the threshold rule", "[0, 1]", bounds=(0, 1)
    ),
    "content": Column("digest of the sample's media", type=STRING),
}
# Range and meaning of the columns of numbers, written to the file's metadata.
RANGES = {name: (column.range, column.meaning) for name, column in COLUMNS.items() if column.range}
# Columns of which there is one per modality, besides confidence.
HALVES = ("half_a", "half_b")
BY_MODALITY = (
    *("prediction", "loss", "entropy", "margin", "training_confidence", "training_variability"),
    *("shapley", *HALVES),
)
_SCALARS = ("sample_id", "label", "label_name", "split", "group", "content")  # one string or number per row
_FUSED = ("confidence_fused", "prediction_fused", "loss_fused")
_CHECKED = ("similarity", "balance", "p_balanced")
_DISTINCT = ("sample_id", "content")  # columns of strings that hardly repeat


def check_score_schema(schema: pa.Schema, *, where: str, paths: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the modalities of a score table with this schema; `paths` are its columns of file names.

    Raises ScoreError if a required column is missing, or a column of ids, labels, groups or paths holds neither strings
    nor numbers.
    """
    modalities = score_modalities(schema.names, where=where)
    for name in (*_SCALARS, *paths):
        type_ = schema.field(name).type if name in schema.names else pa.null()
        dated = name == "label" and pa.types.is_temporal(type_)
        if dated or not _is_text_or_number(type_):
            raise ScoreError(f"{where}: column {name} holds {type_}; it must hold one string or number per row")
    return modalities


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
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    is_date = pa.types.is_date(type_) or pa.types.is_timestamp(type_)
    return bool(is_text or is_date or _is_number(type_) or pa.types.is_null(type_))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Scores of n samples with m modalities, the content of scores.parquet.

    Strings are object arrays; a column that is not available is None. In columns by modality, (n, m), a value is NaN
    where the sample lacks the modality. `RANGES` has the range and the meaning of each column.

    Args:
        sample_id: (n,) unique ids.
        label: (n,) class numbers.
        label_name: (n,) class names.
        modalities: m names, two or more.
        confidence: (n, m) out-of-fold probability of the true class, in [0, 1]; at least two values per row.
        split: (n,) train, validation, test, or None.
        group: (n,) groups that no probe both trains on and scores.
        fold: (n,) fold of the first repeat.
        prediction: (n, m) predicted class, -1 where the modality is missing; the number, of a regression.
        loss: (n, m) cross entropy, -log confidence.
        entropy: (n, m) entropy of the class probabilities, in nats.
        margin: (n, m) difference of the two highest class probabilities.
        training_confidence: (n, m) mean confidence over the training of the probe; high = easy.
        training_variability: (n, m) standard deviation of the same; high = ambiguous.
        shapley: (n, m) Shapley value of each modality on the joint probe.
        half_a: (n, m) confidence by probes of a random half of each modality's features.
        half_b: (n, m) the same by the other half of the features, with other folds.
        confidence_fused: (n,) probability of the true class by all modalities together.
        prediction_fused: (n,) class that all modalities together predict.
        loss_fused: (n,) -log confidence_fused.
        discrepancy_sd: (n, 1), or (n, m) where m > 2: standard deviation of the discrepancy over repeats with other
            folds and the same features; it does not show that a discrepancy is real.
        similarity: (n,) mean cosine of the modalities' class probabilities; 1 = equal.
        balance: (n,) balance score of BSS in [-1, 1]; high = balanced.
        p_balanced: (n,) probability of the balanced component of the gap mixture, or the threshold rule.
        content: (n,) digests of the media.
        paths: The source's columns of file names.
        provenance: Metadata of the file: config, fingerprint, versions.

    Raises:
        ScoreError: No rows, duplicate ids, fewer than two modalities or confidences per row, values out of range.

    Example:
        >>> import mmaudit, numpy as np
        >>> scores = mmaudit.ScoreTable(
        ...     sample_id=np.array(["a", "b"], dtype=object),
        ...     label=np.array([0, 1], dtype=np.int32),
        ...     label_name=np.array(["cat", "dog"], dtype=object),
        ...     modalities=("audio", "video"),
        ...     confidence=np.array([[0.75, 0.25], [0.5, 0.5]], dtype=np.float32),
        ... )
        >>> scores.discrepancy().tolist(), scores.gap.tolist()
        ([0.5, 0.0], [0.5, 0.0])
    """

    sample_id: NDArray[np.object_]
    label: NDArray[np.int32]
    label_name: NDArray[np.object_]
    modalities: tuple[str, ...]
    confidence: Floats
    split: NDArray[np.object_] | None = None
    group: NDArray[np.object_] | None = None
    fold: NDArray[np.int16] | None = None
    prediction: NDArray[np.int32] | Floats | None = None
    loss: Floats | None = None
    entropy: Floats | None = None
    margin: Floats | None = None
    training_confidence: Floats | None = None
    training_variability: Floats | None = None
    shapley: Floats | None = None
    half_a: Floats | None = None
    half_b: Floats | None = None
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
        if num_duplicates := n - len(set(self.sample_id)):
            raise ScoreError(f"the score table has {num_duplicates} duplicate sample ids: they must be unique")
        if self.confidence.shape != (n, len(self.modalities)) or len(self.modalities) < 2:
            raise ScoreError(
                f"the score table has {len(self.modalities)} columns confidence_M for {n} rows; two or more are needed"
            )
        present = self.present
        too_few = np.flatnonzero(present.sum(axis=1) < 2)
        if len(too_few):
            raise ScoreError(
                f"{len(too_few)} samples have fewer than two values of confidence (the first: "
                f"{self.sample_id[too_few[0]]}): a discrepancy needs two; rescore, or correct the table"
            )
        _check_values("confidence", self.confidence[present], COLUMNS["confidence_M"])
        for name in _CHECKED:
            if getattr(self, name) is not None:
                _check_values(name, getattr(self, name), COLUMNS[name])

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: NDArray[np.intp]) -> ScoreTable:
        """Return the table of these rows, in this order."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        columns: dict[str, Any] = {key: array[rows] for key, array in fields.items() if isinstance(array, np.ndarray)}
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
        """Mask (n,) of the rows that choices may depend on, all but the test split; all if there is no other split."""
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
        values: dict[str, Any] = {name: getattr(self, name) for name in (*_SCALARS[:-1], "fold")}
        for index, modality in enumerate(self.modalities):
            for kind in ("confidence", *BY_MODALITY):
                if (column := getattr(self, kind)) is not None:
                    values[f"{kind}_{modality}"] = column[:, index]
        values |= {name: column for name in _FUSED if (column := getattr(self, name)) is not None}
        signed = discrepancy(self.confidence).reshape(len(self), -1)
        deviation, suffixes = self.discrepancy_sd, discrepancy_suffixes(self.modalities)
        values |= {f"discrepancy{suffix}": signed[:, index] for index, suffix in enumerate(suffixes)}
        for index, suffix in enumerate(suffixes):
            values[f"discrepancy_sd{suffix}"] = None if deviation is None else deviation[:, index]
        names = np.array([*self.modalities, None], dtype=object)  # -1 where two are equal
        values |= {"gap": self.gap, "dominant": names[dominant_modality(self.confidence)]}
        values |= {name: getattr(self, name) for name in (*_CHECKED, "content")}
        columns = {name: _to_arrow(name, column, length=len(self)) for name, column in values.items()}
        if self.paths is not None:
            for name in self.paths.column_names:
                columns.setdefault(name, self.paths[name].combine_chunks())
        return pa.table(columns)


def discrepancy_suffixes(modalities: Sequence[str]) -> list[str]:
    """Return what follows `discrepancy` in column names: nothing for two modalities, else one suffix for each."""
    return [""] if len(modalities) == 2 else [f"_{name}" for name in modalities]


def write_scores(scores: ScoreTable, path: str | Path) -> None:
    """Write a score table as Parquet, atomically; an older file is replaced.

    Args:
        scores: The table.
        path: The file to write; its folder is created.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import mmaudit
        >>> probabilities = {"audio": [[0.9, 0.1], [0.2, 0.8]], "video": [[0.6, 0.4], [0.7, 0.3]]}
        >>> scores = mmaudit.score_probabilities(probabilities, [0, 1])
        >>> mmaudit.write_scores(scores, "scores.parquet")
    """
    paths = [] if scores.paths is None else scores.paths.column_names
    write_parquet(scores.to_arrow(), Path(path), provenance={**scores.provenance, "paths": paths})


def read_scores(path: str | Path) -> ScoreTable:
    """Read a score table, of mmaudit or any other with sample_id, a label and two or more columns confidence_M.

    Args:
        path: A Parquet file, or a folder with the parts of a table.

    Returns:
        The table, with `provenance` from the file's metadata.

    Raises:
        ScoreError: Missing columns, duplicate ids, or values that are null or out of range.

    Example:
        >>> import mmaudit
        >>> scores = mmaudit.read_scores("mmaudit-run/scores.parquet")  # doctest: +SKIP
        >>> scores.modalities  # doctest: +SKIP
        ('audio', 'video')
    """
    table, provenance = _read_table(Path(path))
    return scores_of_table(table, provenance, where=str(path))


def scores_of_table(table: pa.Table, provenance: dict[str, Any], *, where: str) -> ScoreTable:
    """Return the score table with these columns; `provenance` is the metadata of its file."""
    provenance = {**provenance}
    path_columns = [name for name in provenance.pop("paths", []) if name in table.column_names]
    modalities = check_score_schema(table.schema, where=where, paths=path_columns)
    label, label_name = _labels(table)
    split = _strings(table, "split")
    check_splits(() if split is None else set(split))
    names = [f"confidence_{name}" for name in modalities]
    stack = partial(_stack, table, may_be_null=any(table[name].null_count == len(table) for name in names))
    return ScoreTable(
        sample_id=_required(_strings(table, "sample_id")),
        label=label,
        label_name=label_name,
        modalities=modalities,
        confidence=_required(stack(names)),
        split=split,
        group=_strings(table, "group"),
        fold=_numbers(table, "fold", np.int16),
        **{kind: stack([f"{kind}_{name}" for name in modalities]) for kind in BY_MODALITY},
        **{name: _numbers(table, name) for name in (*_FUSED, *_CHECKED)},
        discrepancy_sd=stack([f"discrepancy_sd{suffix}" for suffix in discrepancy_suffixes(modalities)]),
        content=_strings(table, "content"),
        paths=table.select(path_columns) if path_columns else None,
        provenance=provenance,
    )


def _read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read a file, or the parts of a table in a folder, with the metadata of the last part, which an append writes."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ScoreError(f"{path} has no Parquet files")
    parts = [read_parquet(file, error=ScoreError, shape=PROVENANCE) for file in files]
    try:
        return pa.concat_tables([table for table, _ in parts]), parts[-1][1]
    except pa.ArrowException as cause:
        raise ScoreError(f"the files of {path} have different columns: {str(cause).splitlines()[0]}") from cause


def _check_values(name: str, values: NDArray[np.generic], column: Column) -> None:
    """Raise ScoreError for values that are null or out of the bounds of their column."""
    assert column.bounds is not None
    low, high = column.bounds
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


def _to_arrow(name: str, values: NDArray[Any] | None, *, length: int) -> pa.Array:
    """Return a column of the file: null where values are NaN, or a predicted class is -1; all null without values."""
    is_class = name.startswith("prediction_")
    type_ = None if is_class else COLUMNS[name].type if name in COLUMNS else FLOAT
    if values is None:
        return pa.nulls(length, type_)
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0 if is_class else None
    return pa.array(values, type_, mask=missing if missing is not None and missing.any() else None)


def to_null(name: str, values: NDArray[Any]) -> pa.Array:
    """Return values (n,) as a column of the file, null where they are NaN."""
    return _to_arrow(name, values, length=len(values))


def float_column(table: pa.Table, name: str) -> Floats:
    """Return a column of a score table as float32 (n,), null as NaN."""
    return np.asarray(table[name].to_numpy(), dtype=np.float32)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    """Return a column; None if it is missing or all null."""
    return table[name] if name in table.column_names and table[name].null_count < len(table) else None


def _strings(table: pa.Table, name: str) -> NDArray[np.object_] | None:
    """Read a column as strings; None if it is missing or all null. Rows of a repeating column share the strings."""
    if (column := _column(table, name)) is None:
        return None
    if name in _DISTINCT:
        return _objects(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    coded = column.dictionary_encode().combine_chunks()
    values = np.array([*_objects(coded.dictionary), None], dtype=object)
    return np.asarray(values[coded.indices.fill_null(len(values) - 1).to_numpy()])


def _objects(values: pa.Array | pa.ChunkedArray) -> NDArray[np.object_]:
    """Return values as strings, null as None."""
    return np.array([None if value is None else str(value) for value in values.to_pylist()], dtype=object)


def _numbers(table: pa.Table, name: str, dtype: type[np.generic] = np.float32) -> NDArray[Any] | None:
    """Read numbers, nulls as NaN, or predicted classes, nulls as -1; None if the column is missing or all null."""
    if (column := _column(table, name)) is None:
        return None
    is_class = name.startswith("prediction_") and not pa.types.is_floating(column.type)
    dtype = np.int32 if is_class else dtype
    try:
        column = column.cast(pa.from_numpy_dtype(dtype))  # fails for fractions as labels, and for words
    except pa.ArrowException as cause:
        problem = "does not hold classes" if is_class else f"cannot be read as {dtype.__name__}"
        raise ScoreError(f"column {name} {problem}: {str(cause).splitlines()[0]}") from cause
    column = column.fill_null(-1) if is_class else column
    if column.null_count and pa.types.is_integer(column.type):
        raise ScoreError(f"column {name} holds {column.null_count} nulls: fill or drop the column")
    return np.array(column.to_numpy(), dtype=dtype)


def _stack(table: pa.Table, names: Sequence[str], *, may_be_null: bool = False) -> NDArray[Any] | None:
    """Read columns of numbers or predicted classes as (n, m); None if one of them is missing or all null.

    may_be_null: Whether some of them may be all null, since no row has a modality.
    """
    columns = [_numbers(table, name) for name in names]
    known = [column for column in columns if column is not None]
    if may_be_null and known and all(name in table.column_names for name in names):
        null = np.full_like(known[0], np.nan if known[0].dtype.kind == "f" else -1)
        known = [null if column is None else column for column in columns]
    return np.stack(known, axis=1) if len(known) == len(names) else None


def _required(values: NDArray[Any] | None) -> NDArray[Any]:
    if values is None or (values.dtype == object and None in values.tolist()):
        raise ScoreError("sample_id, a label or a column confidence_M is null: rescore, or correct the table")
    return values
