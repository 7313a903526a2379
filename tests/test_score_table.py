"""The score table: write then read is equality, foreign tables are read, and invalid ones raise."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.errors import ConfigError, ScoreError
from mmaudit.audit.hashing import hash_ids
from mmaudit.audit.scores.report_scores import read_report_scores
from mmaudit.audit.scores.table import BY_MODALITY, RANGES, ScoreTable, read_scores, write_scores

NAMES = ("audio", "visual", "text")


def strings(*values: str | None) -> Any:
    return np.array(values, dtype=object)


def scores(num_modalities: int = 2, *, num_rows: int = 6, seed: int = 0) -> ScoreTable:
    """Build a table in which every field is filled."""
    rng = np.random.default_rng(seed)
    numbers = range(num_rows)
    m = num_modalities

    def shares(*shape: int) -> Any:
        return rng.random(shape).astype(np.float32)

    return ScoreTable(
        sample_id=strings(*(f"s{number}" for number in numbers)),
        label=np.arange(num_rows, dtype=np.int32) % 3,
        label_name=strings(*(f"class {number % 3}" for number in numbers)),
        modalities=NAMES[:m],
        confidence=shares(num_rows, m),
        split=strings(*("test" if number % 4 == 0 else "train" for number in numbers)),
        group=strings(*(f"g{number // 2}" for number in numbers)),
        fold=np.arange(num_rows, dtype=np.int16) % 5,
        prediction=rng.integers(0, 3, (num_rows, m), dtype=np.int32),
        loss=shares(num_rows, m),
        entropy=shares(num_rows, m),
        margin=shares(num_rows, m),
        training_confidence=shares(num_rows, m),
        training_variability=shares(num_rows, m) / 2,
        shapley=2 * shares(num_rows, m) - 1,
        half_a=shares(num_rows, m),
        half_b=shares(num_rows, m),
        confidence_fused=shares(num_rows),
        prediction_fused=rng.integers(0, 3, num_rows, dtype=np.int32),
        loss_fused=shares(num_rows),
        discrepancy_sd=shares(num_rows, 1 if m == 2 else m),
        similarity=shares(num_rows),
        balance=2 * shares(num_rows) - 1,
        p_balanced=shares(num_rows),
        content=strings(*(f"{number:032x}" for number in numbers)),
        paths=pa.table({"audio_file_name": [f"{number}.wav" for number in numbers]}),
        provenance={"seed": 3, "config": {"folds": 5}},
    )


def holed(table: ScoreTable) -> ScoreTable:
    """Return the table without the last modality in every third row, and another one in the next row."""
    n, m = table.confidence.shape
    missing = np.zeros((n, m), dtype=bool)
    missing[::3, -1] = missing[1::3, 0] = True
    values: dict[str, Any] = {
        kind: np.where(missing, np.float32(np.nan), getattr(table, kind))
        for kind in ("confidence", "discrepancy_sd", *BY_MODALITY)
        if kind != "prediction"
    }
    assert table.prediction is not None
    return replace(table, prediction=np.where(missing, np.int32(-1), table.prediction), **values)


def foreign(path: Path, **columns: Any) -> Path:
    """Write a foreign table; columns given as None are left out."""
    required = {"sample_id": ["a", "b"], "label": [0, 1], "confidence_x": [0.9, 0.2], "confidence_y": [0.5, 0.6]}
    pq.write_table(
        pa.table({name: values for name, values in {**required, **columns}.items() if values is not None}), path
    )
    return path


def assert_equal(expected: ScoreTable, actual: ScoreTable) -> None:
    for field in fields(ScoreTable):
        expected_values, actual_values = getattr(expected, field.name), getattr(actual, field.name)
        if isinstance(expected_values, np.ndarray):
            assert expected_values.dtype == actual_values.dtype, field.name
            np.testing.assert_array_equal(expected_values, actual_values, err_msg=field.name)
        else:
            assert expected_values == actual_values, field.name


REQUIRED = {"sample_id", "label", "label_name", "modalities", "confidence", "provenance"}
EMPTY: dict[str, Any] = {field.name: None for field in fields(ScoreTable) if field.name not in REQUIRED}


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("rest", [{}, EMPTY, {"group": None}, {"discrepancy_sd": None}])
def test_write_then_read_is_equality(tmp_path: Path, m: int, rest: dict[str, Any]) -> None:
    table = replace(scores(m), **rest)
    write_scores(table, tmp_path / "scores.parquet")
    assert_equal(read_scores(tmp_path / "scores.parquet"), table)


def test_missing_values_are_null_on_disk_and_nan_when_read(tmp_path: Path) -> None:
    scored = holed(scores(3, num_rows=12))
    write_scores(scored, tmp_path / "scores.parquet")
    assert_equal(read_scores(tmp_path / "scores.parquet"), scored)
    table = pq.read_table(tmp_path / "scores.parquet")
    for kind in ("confidence", *BY_MODALITY, "discrepancy", "discrepancy_sd"):
        for column, name in enumerate(NAMES):
            nulls = table[f"{kind}_{name}"].is_null().to_pylist()
            assert nulls == (~scored.present[:, column]).tolist(), f"{kind}_{name}"
    assert table["gap"].null_count == 0
    assert not any(np.isnan(table[name].drop_null().to_numpy()).any() for name in table.column_names
                   if pa.types.is_floating(table[name].type))  # fmt: skip


def test_regression_predictions_are_numbers(tmp_path: Path) -> None:
    table = holed(scores(3))
    predicted = np.where(table.present, 2.5 * np.ones((6, 3), np.float32), np.float32(np.nan))
    regression = replace(table, prediction=predicted, prediction_fused=np.full(6, -1.5, np.float32))
    write_scores(regression, tmp_path / "scores.parquet")
    assert_equal(read_scores(tmp_path / "scores.parquet"), regression)


@pytest.mark.parametrize("m", [2, 3])
def test_fused_columns_are_not_a_modality(tmp_path: Path, m: int) -> None:
    write_scores(scores(m), tmp_path / "scores.parquet")
    assert read_scores(tmp_path / "scores.parquet").modalities == NAMES[:m]
    with_fused = foreign(tmp_path / "t.parquet", confidence_y=None, confidence_fused=[0.5, 0.6])
    with pytest.raises(ScoreError, match="is not a score table: it needs sample_id"):
        read_scores(with_fused)


@pytest.mark.parametrize("m", [2, 3])
def test_the_columns_are_the_documented_ones(m: int) -> None:
    by_modality = {f"{kind}_{name}": "int32" if kind == "prediction" else "float"
            for name in NAMES[:m] for kind in ("confidence", *BY_MODALITY)}  # fmt: skip
    by_modality |= {"confidence_fused": "float", "prediction_fused": "int32", "loss_fused": "float"}
    ends = [""] if m == 2 else [f"_{name}" for name in NAMES]
    expected = {
        "sample_id": "string", "label": "int32", "label_name": "string", "split": "string", "group": "string",
        "fold": "int16", **by_modality,
        **{f"discrepancy{end}": "float" for end in ends}, **{f"discrepancy_sd{end}": "float" for end in ends},
        "gap": "float", "dominant": "string", "similarity": "float", "balance": "float", "p_balanced": "float",
        "content": "string", "audio_file_name": "string",
    }  # fmt: skip
    schema = scores(m).to_arrow().schema
    assert {field.name: str(field.type) for field in schema} == expected
    types = {field.name: str(field.type) for field in replace(scores(m), **EMPTY).to_arrow().schema}
    optional = {*by_modality, "audio_file_name"} - {f"confidence_{name}" for name in NAMES}
    assert types == {name: type_ for name, type_ in expected.items() if name not in optional}


def test_every_number_has_a_documented_range() -> None:
    numbers = set(RANGES)
    assert {f"{kind}_M" for kind in BY_MODALITY} <= numbers
    for m in (2, 3):
        for name in (field.name for field in scores(m).to_arrow().schema if str(field.type) == "float"):
            general = name
            for modality in NAMES:
                general = general.replace(f"_{modality}", "_M")
            assert {general, general.removesuffix("_M")} & numbers, name


def test_the_columns_follow_from_the_confidence() -> None:
    table = replace(
        scores(num_rows=3), confidence=np.array([[0.9, 0.2], [0.1, 0.5], [0.3, 0.3]], dtype=np.float32)
    ).to_arrow()
    np.testing.assert_allclose(table["discrepancy"], [0.7, -0.4, 0.0], atol=1e-6)
    np.testing.assert_allclose(table["gap"], [0.7, 0.4, 0.0], atol=1e-6)
    assert table["dominant"].to_pylist() == ["audio", "visual", None]


def test_discrepancy_is_between_the_named_modalities() -> None:
    two, three = scores(2), scores(3)
    c = three.confidence
    np.testing.assert_array_equal(two.discrepancy(), two.discrepancy("audio:visual"))
    np.testing.assert_array_equal(two.discrepancy("visual"), -two.discrepancy())
    np.testing.assert_array_equal(three.discrepancy("text:audio"), c[:, 2] - c[:, 0])
    np.testing.assert_allclose(three.discrepancy("visual"), c[:, 1] - (c[:, 0] + c[:, 2]) / 2, atol=1e-6)
    strongest = replace(three, confidence=np.clip(c + np.array([0, 0.9, 0], dtype=np.float32), 0, 1))
    assert strongest.default_between() == "visual"
    np.testing.assert_array_equal(strongest.discrepancy(), strongest.discrepancy("visual"))
    for between in ("visuel", "audio:visuel", "visuel:audio"):
        with pytest.raises(ConfigError, match=rf"--between {between}: no modality 'visuel'; did you mean visual\?"):
            three.discrepancy(between)


def test_foreign_table_is_read(tmp_path: Path) -> None:
    table = read_scores(foreign(tmp_path / "t.parquet"))
    assert table.modalities == ("x", "y")
    assert table.sample_id.tolist() == ["a", "b"]
    assert (table.label.tolist(), table.label_name.tolist()) == ([0, 1], ["0", "1"])
    np.testing.assert_allclose(table.discrepancy(), [0.4, -0.4], atol=1e-6)
    assert table.provenance == {}
    assert all(getattr(table, name) is None for name in EMPTY)


def test_foreign_table_of_three_may_have_missing_values(tmp_path: Path) -> None:
    table = read_scores(foreign(tmp_path / "t.parquet", confidence_z=[None, 0.7]))
    np.testing.assert_array_equal(table.present, [[True, True, False], [True, True, True]])
    np.testing.assert_allclose(table.gap, [0.4, 0.5], atol=1e-6)
    np.testing.assert_allclose(table.discrepancy("x:z"), [np.nan, -0.5], atol=1e-6)
    np.testing.assert_allclose(table.discrepancy("x"), [0.4, 0.2 - 0.65], atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "label", "names"),
    [
        ({"label": None, "label_name": ["dog", "cat"]}, [1, 0], ["dog", "cat"]),
        ({"label": ["dog", "cat"]}, [1, 0], ["dog", "cat"]),
        ({"label": [7.0, 3.0]}, [7, 3], ["7", "3"]),
        ({"label": [1, 0], "label_name": ["dog", "cat"]}, [1, 0], ["dog", "cat"]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, columns: dict[str, Any], label: list[int], names: list[str]
) -> None:
    table = read_scores(foreign(tmp_path / "t.parquet", **columns))
    assert (table.label.tolist(), table.label_name.tolist()) == (label, names)


def test_modality_may_be_null_in_all_rows(tmp_path: Path) -> None:
    columns = {"prediction_x": [0, 1], "prediction_y": [1, 1], "prediction_z": pa.nulls(2, pa.int32())}
    table = read_scores(foreign(tmp_path / "t.parquet", confidence_z=pa.nulls(2, pa.float32()), **columns))
    assert table.present.tolist() == [[True, True, False]] * 2
    assert table.prediction is not None
    assert table.prediction.tolist() == [[0, 1, -1], [1, 1, -1]]
    assert table.training_confidence is None


def test_integer_ids_are_read_as_strings(tmp_path: Path) -> None:
    assert read_scores(foreign(tmp_path / "t.parquet", sample_id=[10, 2])).sample_id.tolist() == ["10", "2"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"sample_id": None}, "is not a score table: it needs sample_id, .*; it has label, confidence_x"),
        ({"label": None}, "is not a score table"),
        ({"confidence_y": None}, "is not a score table"),
        ({"sample_id": ["a", "a"]}, "1 duplicate sample ids"),
        ({"sample_id": ["a", None]}, "sample_id, a label or a column confidence_M is null"),
        ({"sample_id": pa.nulls(2)}, "sample_id, a label or a column confidence_M is null"),
        ({"label": [0, None]}, "column label holds 1 nulls"),
        ({"label_name": ["a", None]}, "column label_name holds 1 nulls"),
        ({"label": [0.5, 1.0]}, "column label cannot be read as int32"),
        (
            {"confidence_x": [None, 0.5]},
            r"1 samples have fewer than two values of confidence \(the first: a\): a discrepancy needs two; rescore",
        ),
        ({"confidence_x": [1.01, 0.5]}, r"1 values of confidence are null or outside \[0, 1\]: rescore"),
        ({"confidence_x": [0.1, float("nan")]}, r"1 samples have fewer than two values .* \(the first: b\)"),
        ({"confidence_x": [None, 0.5], "confidence_z": [None, 0.1]}, r"1 samples have .* \(the first: a\)"),
        ({"confidence_x": [-0.1, 0.5], "confidence_z": [None, 1.5]}, "2 values of confidence are null or outside"),
        ({"confidence_x": ["much", "0.5"]}, "column confidence_x cannot be read as float32"),
        ({"confidence_x": pa.nulls(2, pa.float32())}, "2 samples have fewer than two values of confidence"),
        ({"similarity": [0.0, 1.5]}, r"1 values of similarity are null or outside \[-1, 1\]"),
        ({"balance": [None, 0.5]}, "1 values of balance"),
        ({"p_balanced": [-0.5, 0.5]}, r"outside \[0, 1\]"),
        ({"fold": [0, None]}, "column fold holds 1 nulls"),
    ],
)
def test_invalid_table_raises(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ScoreError, match=words):
        read_scores(foreign(tmp_path / "t.parquet", **columns))


def test_missing_or_invalid_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="no such file"):
        read_scores(tmp_path / "none.parquet")
    (tmp_path / "odd.parquet").write_text("id")
    with pytest.raises(ScoreError, match="cannot be read as Parquet"):
        read_scores(str(tmp_path / "odd.parquet"))


def test_invalid_arrays_raise() -> None:
    with pytest.raises(ScoreError, match="has no rows"):
        scores(num_rows=0)
    with pytest.raises(ScoreError, match="two or more are needed"):
        replace(scores(), modalities=("audio",), confidence=scores().confidence[:, :1])
    with pytest.raises(ScoreError, match="3 columns confidence_M for 6 rows"):
        replace(scores(), modalities=NAMES)


def test_table_opens_in_other_libraries(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(scores(3), path)
    frame = pd.read_parquet(path)
    assert frame.columns.tolist() == scores(3).to_arrow().column_names
    opened = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "hf"), split="train")
    assert opened.num_rows == 6
    assert opened["sample_id"][:2] == ["s0", "s1"]
    assert json.loads(pq.read_schema(path).metadata[b"mmaudit"])["seed"] == 3


# What a report is made of.

OF_REPORT = (
    *("sample_id", "label", "label_name", "confidence", "split", "group", "prediction", "training_confidence"),
    *("training_variability", "shapley", "discrepancy_sd", "balance", "p_balanced"),
)


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_report_scores_are_columns_of_the_table(num_modalities: int, tmp_path: Path) -> None:
    table = scores(num_modalities, num_rows=20)
    write_scores(table, tmp_path / "scores.parquet")
    read = read_report_scores(tmp_path / "scores.parquet", max_rows=5)  # of a file all rows
    assert read.modalities == table.modalities
    for name in OF_REPORT:
        np.testing.assert_array_equal(getattr(read, name), getattr(table, name), err_msg=name)
    left_out = {"loss", "entropy", "half_a", "loss_fused", "confidence_fused", "similarity", "content", "fold"}
    assert {name for name in left_out if getattr(read, name) is not None} == set()


def test_report_scores_of_parts_are_the_rows_of_smallest_hashes(tmp_path: Path) -> None:
    table = scores(num_rows=40)
    rows = np.arange(40)
    for folder, cuts in (("a", [10, 30]), ("b", [25])):
        for number, part in enumerate(np.split(rows, cuts)):
            write_scores(table.take(part), tmp_path / folder / f"part-{number:05d}.parquet")
    expected = hash_ids(pa.array(table.sample_id, pa.string()), seed=0, purpose="report").argsort()[:15]
    for folder in ("a", "b"):  # however the rows are divided
        sample = read_report_scores(tmp_path / folder, max_rows=15)
        assert sample.sample_id.tolist() == table.sample_id[np.sort(expected)].tolist()
        np.testing.assert_array_equal(sample.confidence, table.confidence[np.sort(expected)])
        assert len(read_report_scores(tmp_path / folder, max_rows=40)) == 40


def test_strings_that_repeat_are_one_object_and_nulls_stay(tmp_path: Path) -> None:
    table = scores(num_rows=20).to_arrow()
    splits = [None if row % 3 == 0 else "train" for row in range(20)]
    table = table.set_column(table.column_names.index("split"), "split", pa.array(splits).dictionary_encode())
    pq.write_table(table, tmp_path / "scores.parquet")
    read = read_scores(tmp_path / "scores.parquet")
    assert read.split is not None
    assert read.split.tolist() == splits
    assert read.label_name.tolist() == [f"class {row % 3}" for row in range(20)]
    assert len({id(name) for name in read.label_name}) == 3
