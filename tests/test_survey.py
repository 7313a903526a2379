"""Tests of the survey of a score table: it matches Python for any files, and invalid labels raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.rebalance.score_files import survey_table

ROW = st.tuples(
    st.integers(-2, 3),
    st.sampled_from(["a", "b", None]),
    st.sampled_from(["train", "test", None]),
    st.none() | st.just(0.5),
)
TYPES = {"label": pa.int32(), "label_name": pa.string(), "split": pa.string(), "balance": pa.float32()}


def table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.table(
        {name: pa.array([row[index] for row in rows], type_) for index, (name, type_) in enumerate(TYPES.items())}
    )


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_survey_matches_python(tmp_path: Path, rows: list[tuple[Any, ...]], cut: int, statistics: bool) -> None:
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for path, part in zip(paths, (rows[:cut], rows[cut:]), strict=True):
        pq.write_table(table(part), path, write_statistics=statistics)
    names_of_label: dict[int, set[str]] = {}
    for label, name, _, _ in rows:
        names_of_label.setdefault(label, set()).add(name or "")
    for files in (paths, [table(rows)]):
        if any(len(names) > 1 for names in names_of_label.values()):
            with pytest.raises(ScoreError, match="more than one label_name"):
                survey_table(files, list(TYPES))
            continue
        survey = survey_table(files, list(TYPES))
        assert survey.num_rows == len(rows)
        assert survey.classes.to_pylist() == sorted(names_of_label)
        assert list(survey.class_names) == [min(names_of_label[label]) for label in sorted(names_of_label)]
        assert list(survey.splits) == sorted({split or "all" for _, _, split, _ in rows})
        assert survey.every_row_has_split == all(split for _, _, split, _ in rows)
        assert survey.one_name_per_class == all(
            len(names) == 1 and "" not in names for names in names_of_label.values()
        )
        assert survey.empty_columns == ({"balance"} if all(value is None for *_, value in rows) else set())


def test_labels_are_names_if_there_are_no_names() -> None:
    survey = survey_table([pa.table({"label": [2, 1, 1]})], ["label"])
    assert (survey.classes.to_pylist(), survey.class_names, survey.splits) == ([1, 2], ("1", "2"), ("all",))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1], ["one"]], "column label is int in one shard and str in another"),
        ([[1, 2**31]], "label 2147483648 has more than 32 bits"),
        ([[1, None]], "column label holds nulls"),
        ([[0.5]], "column label does not hold classes"),
    ],
)
def test_invalid_labels_raise(labels: list[list[Any]], words: str) -> None:
    with pytest.raises(ScoreError, match=words):
        survey_table([pa.table({"label": pa.array(values)}) for values in labels], ["label"])
