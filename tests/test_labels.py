"""Labels: every cell is a class, a label set, a number, missing or unknown; declared features; targets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from datasets import Audio, ClassLabel, Features, Image, Value, Video
from datasets import Sequence as SequenceOf
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.dataset.label_columns import read_label_sets, read_regression_targets
from mmaudit.audit.dataset.labels import (
    NO_LABEL,
    TASKS,
    UNKNOWN_LABEL,
    Labels,
    Target,
    declared_classes,
    declared_kind,
    read_classes,
)
from mmaudit.audit.errors import DatasetError


def read_as_classes(
    cells: Sequence[object],
    names: Sequence[object] | None = None,
    *,
    declared: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Labels:
    return read_classes(cells, names, declared=declared, classes=classes)


def read_as_sets(cells: Sequence[object], *, declared: Sequence[str] = (), classes: Sequence[str] = ()) -> Labels:
    return read_label_sets(cells, declared=declared, classes=classes)


def test_declared_classes_keep_their_numbers_and_others_are_unknown() -> None:
    labels = read_as_classes([1, 0, -1, 7, None, 1], declared=("zebra", "ape", "none seen"))
    assert labels.names == labels.outputs == ("zebra", "ape", "none seen")
    assert labels.label.tolist() == [1, 0, UNKNOWN_LABEL, UNKNOWN_LABEL, NO_LABEL, 1]
    assert labels.unknown == ((2, "-1"), (3, "7"))
    assert labels.values is None
    assert read_as_classes([0, 1], ["other", "names"], declared=("zebra", "ape")).names == ("zebra", "ape")


@pytest.mark.parametrize(
    ("cells", "classes", "label"),
    [
        (["dog", "cat", "cow", None], ("dog", "cat"), [0, 1, UNKNOWN_LABEL, NO_LABEL]),
        ([2, 1.0, -1, math.nan], ("1", "2"), [1, 0, UNKNOWN_LABEL, NO_LABEL]),
        (["", "a"], ("a",), [UNKNOWN_LABEL, 0]),
    ],
)
def test_labels_outside_requested_classes_are_unknown(
    cells: list[object], classes: tuple[str, ...], label: list[int]
) -> None:
    labels = read_as_classes(cells, classes=classes)
    assert (labels.names, labels.label.tolist()) == (classes, label)


def test_declared_classes_can_be_requested_by_name_or_number() -> None:
    for classes in (("ape", "cow"), ("1", "2"), ("ape", "2")):
        labels = read_as_classes([0, 1, 2], declared=("zebra", "ape", "cow"), classes=classes)
        assert (labels.names, labels.label.tolist()) == (("ape", "cow"), [UNKNOWN_LABEL, 0, 1])
    with pytest.raises(DatasetError, match="names 'dog'; the source has the classes zebra, ape"):
        read_as_classes([0], declared=("zebra", "ape"), classes=("dog",))


def test_names_column_renames_classes() -> None:
    assert read_as_classes([2, 1, 9], ["two", None, "odd"], classes=("1", "2")).names == ("1", "two")


def test_structs_are_no_labels() -> None:
    with pytest.raises(DatasetError, match="the labels are structs of several fields: a class label is an integer"):
        read_classes([{"x": 1}, None], None, declared=(), classes=())


@pytest.mark.parametrize(
    ("cells", "words"),
    [([[1], [2]], "are lists: .* with --label, or pass --task multilabel"), ([0.5], "--task regression")],
)
def test_lists_and_fractions_suggest_another_task(cells: list[object], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        read_as_classes(cells)


@pytest.mark.parametrize(
    "cells",
    [
        [["b", "a"], ["a"], [], None],
        ["b|a", "a", [], None],
        ["b ; a", " a", ",", None],
        ["a,b", "a", "", math.nan],
        [["a", "b"], "a", [], [None]],
    ],
)
def test_label_sets_in_every_format_are_equal(cells: list[object]) -> None:
    labels = read_as_sets(cells)
    assert labels.outputs == ("a", "b")
    assert labels.values is not None
    assert labels.values.dtype == np.float32
    np.testing.assert_array_equal(labels.values, [[1, 1], [1, 0], [0, 0], [math.nan, math.nan]])
    assert labels.label.tolist()[3] == NO_LABEL
    assert min(labels.label.tolist()[:3]) >= 0


def test_rare_label_sets_share_a_stratum() -> None:
    cells: list[object] = [["a"]] * 12 + [["b", "a"]] * 10 + [[]] * 10 + [["b"]] * 9 + [["c"], None]
    labels = read_as_sets(cells)
    assert labels.names == ("(none)", "a", "a|b", "other")
    assert labels.label.tolist() == [1] * 12 + [2] * 10 + [0] * 10 + [3] * 10 + [NO_LABEL]


def test_label_sets_with_an_unknown_label_are_unknown() -> None:
    labels = read_as_sets([[0, 2], [1], [0, 5]], declared=("x", "y", "z"))
    assert labels.outputs == ("x", "y", "z")
    assert labels.unknown == ((2, "5"),)
    assert labels.label.tolist()[2] == UNKNOWN_LABEL
    assert labels.values is not None
    assert labels.values[:2].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert np.isnan(labels.values[2]).all()
    assert read_as_sets([["y", "z"], ["x"]], classes=("x", "y")).unknown == ((0, "z"),)


def test_indicator_vectors_are_read_as_label_sets() -> None:
    labels = read_as_sets([[0, 1, 1], [0, 0, 0], None, [1, 0, 0]])
    assert labels.outputs == ("0", "1", "2")
    assert labels.values is not None
    np.testing.assert_array_equal(labels.values[[0, 1, 3]], [[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert read_as_sets([[0, 1, 1]], classes=("x", "y", "z")).outputs == ("x", "y", "z")
    with pytest.raises(DatasetError, match="vectors of length 3, but there are 2 classes"):
        read_as_sets([[0, 1, 1]], classes=("x", "y"))
    with pytest.raises(DatasetError, match="a list of labels repeats a label"):
        read_as_sets([["a", "a"], ["b"]])


@pytest.mark.parametrize("cell", [{"a": 1}, [{"a": 1}, {"a": 1}], [["dog"], ["dog"]]])
def test_nested_labels_are_rejected(cell: object) -> None:
    with pytest.raises(DatasetError, match="is neither a list of labels"):
        read_label_sets(["dog", cell], declared=(), classes=())


@pytest.mark.parametrize("cells", [[None], [[], []], [""]])
def test_only_empty_label_sets_are_rejected(cells: list[object]) -> None:
    with pytest.raises(DatasetError, match="no sample has any label"):
        read_as_sets(cells)


@given(st.lists(st.sets(st.sampled_from("abcd")).map(sorted), min_size=1, max_size=60))
def test_values_of_a_label_set_mark_its_labels(sets: list[list[str]]) -> None:
    if any(sets):
        read_labels = read_as_sets(sets)
        assert read_labels.values is not None
        assert [[read_labels.outputs[column] for column in np.flatnonzero(row)] for row in read_labels.values] == sets
        for stratum, name in enumerate(read_labels.names):
            sets_of_stratum = [
                labels for labels, index in zip(sets, read_labels.label, strict=True) if index == stratum
            ]
            assert sets_of_stratum
            assert name == "other" or sets_of_stratum == [sets_of_stratum[0]] * len(sets_of_stratum)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-50, 50)), min_size=1, max_size=80))
def test_deciles_are_ordered_and_numbers_unchanged(cells: list[float | int | None]) -> None:
    if all(cell is None for cell in cells):
        return
    labels = read_regression_targets(cells, name="score")
    assert labels.values is not None
    assert labels.values.shape == (len(cells), 1)
    valid = np.array([cell is not None for cell in cells])
    np.testing.assert_array_equal(
        labels.values[valid, 0], np.array([c for c in cells if c is not None], dtype=np.float32)
    )
    assert np.isnan(labels.values[~valid]).all()
    assert (labels.label[~valid] == NO_LABEL).all()
    order = np.argsort(np.array([c for c in cells if c is not None], dtype=float), kind="stable")
    assert (np.diff(labels.label[valid][order]) >= 0).all()
    assert 1 <= len(labels.names) <= 10
    assert labels.label.max() < len(labels.names)
    assert labels.outputs == ("score",)


def test_deciles_of_distinct_values_have_equal_size() -> None:
    labels = read_regression_targets([str(number) for number in range(100)], name="y")
    assert np.bincount(labels.label).tolist() == [10] * 10
    assert labels.names[0] == "[0, 9.9)"
    assert labels.names[-1] == "[89.1, 99]"
    assert read_regression_targets([3, 3, 3], name="y").names == ("[3, 3]",)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.lists(
        st.sampled_from([math.inf, -math.inf, "inf", "-Infinity", 1e39, -2e15, math.nan, "nan", None, ""]), max_size=9
    ),
    st.randoms(use_true_random=False),
)
def test_values_that_are_not_finite_do_not_change_other_labels(
    finite: list[float], not_finite: list[float | str | None], random: Random
) -> None:
    cells: list[float | str | None] = [*finite, *not_finite]
    order = random.sample(range(len(cells)), len(cells))
    mixed, expected = (
        read_regression_targets([cells[row] for row in order], name="y"),
        read_regression_targets(finite, name="y"),
    )
    assert mixed.values is not None
    assert expected.values is not None
    row_of_cell = np.argsort(order)
    finite_rows, other_rows = row_of_cell[: len(finite)], row_of_cell[len(finite) :]
    np.testing.assert_array_equal(mixed.values[finite_rows], expected.values)
    np.testing.assert_array_equal(mixed.label[finite_rows], expected.label)
    assert mixed.names == expected.names
    assert np.isnan(mixed.values[other_rows]).all()
    missing = [cell in (None, "", "nan") or cell != cell for cell in not_finite]
    assert mixed.label[other_rows].tolist() == [NO_LABEL if is_missing else UNKNOWN_LABEL for is_missing in missing]
    cells_of_rows = zip(other_rows.tolist(), not_finite, missing, strict=True)
    unknown = [(row, str(cell)) for row, cell, is_missing in cells_of_rows if not is_missing]
    assert mixed.unknown == tuple(sorted(unknown))


@pytest.mark.parametrize("cell", ["word", [1.0]])
def test_cell_that_is_not_a_number_is_rejected(cell: object) -> None:
    with pytest.raises(DatasetError, match=r"column 'y' holds .*, which is not a number: pass --task classification"):
        read_regression_targets([1.0, cell], name="y")


def test_column_without_any_number_is_rejected() -> None:
    with pytest.raises(DatasetError, match="no sample has a number in column 'y'"):
        read_regression_targets([None, math.nan, " ", math.inf, "-inf"], name="y")


@pytest.mark.parametrize("task", TASKS)
def test_take_selects_rows_repeatedly(task: str) -> None:
    rng = np.random.default_rng(0)
    k = {"classification": 4, "multilabel": 3, "regression": 1}[task]
    values = None if task == "classification" else rng.random((20, k)).astype(np.float32)
    target = Target(task=task, label=rng.integers(0, 4, 20).astype(np.int32), num_outputs=k, values=values)
    rows, rows_of_rows = np.array([7, 3, 3, 19]), np.array([2, 0])
    selected = target.take(rows).take(rows_of_rows)
    assert (len(target), len(target.take(rows)), len(selected)) == (20, 4, 2)
    assert (selected.task, selected.num_outputs) == (task, k)
    np.testing.assert_array_equal(selected.label, target.label[[3, 7]])
    if values is None:
        assert selected.values is None
    else:
        np.testing.assert_array_equal(np.asarray(selected.values), values[[3, 7]])


FEATURES = Features(
    {
        "sound": Audio(sampling_rate=16_000, decode=False),
        "sight": Image(),
        "film": Video(),
        "label": ClassLabel(names=["cat", "dog"]),
        "labels": SequenceOf(ClassLabel(names=["a", "b", "c"])),  # from datasets 4 on this is a List
        "text": Value("string"),
    }
)


def test_features_written_by_datasets_are_read() -> None:
    schema = FEATURES.arrow_schema
    assert [declared_kind(schema, name) for name in FEATURES] == ["audio", "image", "video", None, None, None]
    assert declared_classes(schema, "label") == ("cat", "dog")
    assert declared_classes(schema, "labels") == ("a", "b", "c")
    assert declared_classes(schema, "text") == ()
    assert declared_classes(schema, "none") == ()


def schema_saying(features: object) -> pa.Schema:
    return pa.schema([("x", pa.int64())], metadata={"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize(
    "entry",
    [
        {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a"]}},
        [{"_type": "ClassLabel", "names": ["a"]}],
        {"_type": "ClassLabel", "names": ["a"]},
    ],
)
def test_features_of_older_versions_are_read(entry: object) -> None:
    assert declared_classes(schema_saying({"x": entry}), "x") == ("a",)


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([("x", pa.int64())]),
        pa.schema([("x", pa.int64())], metadata={"huggingface": "{no json"}),
        pa.schema([("x", pa.int64())], metadata={"huggingface": "[1]"}),
        schema_saying([]),
        schema_saying({"x": 3}),
        schema_saying({"x": []}),
        schema_saying({"x": {"_type": "ClassLabel", "num_classes": 3}}),
    ],
)
def test_malformed_metadata_declares_nothing(schema: pa.Schema) -> None:
    assert declared_kind(schema, "x") is None
    assert declared_classes(schema, "x") == ()


def test_labels_that_differ_only_in_form_are_named(caplog: pytest.LogCaptureFixture) -> None:
    labels = read_as_classes(["Dog", "dog ", "cat", "caf\u00e9", "cafe\u0301", "dog ", None])
    assert len(labels.names) == 5
    assert "different classes: 'Dog' (1), 'dog ' (2)" in caplog.text
    assert "different classes: 'cafe\u0301' (1), 'caf\u00e9' (1)" in caplog.text
    caplog.clear()
    read_label_sets([["Dog", "cat"], ["dog"]], declared=(), classes=())
    assert "different classes: 'Dog' (1), 'dog' (1)" in caplog.text
    caplog.clear()
    for number in range(7):
        read_as_classes([f"{letter}{number}" for number in range(number) for letter in "aA"])
    assert len(caplog.records) == sum(min(number, 6) for number in range(7))
    assert caplog.records[-1].getMessage() == "1 more labels have several spellings"
    caplog.clear()
    read_as_classes(["Dog", "dog", "a b"], classes=["Dog", "dog", "a b"])
    read_as_classes(["dog", "cat", None])
    assert not caplog.records


def test_numbers_are_no_classes() -> None:
    with pytest.raises(DatasetError, match=r"the labels are 3 numbers, such as -2\.75: pass --task regression"):
        read_as_classes(["-2.75", "3", "+1e0", None])
    assert read_as_classes(["1.0", "2.0"]).names == ("1.0", "2.0")
    assert read_as_classes(["1.5", "2.5"], classes=["1.5", "2.5"]).names == ("1.5", "2.5")
    assert read_as_classes(["1.5", "v2"]).names == ("1.5", "v2")
