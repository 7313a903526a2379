"""Laws of a survey: it counts as Python does, whatever parts the rows lie in, and names labels that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ScoreError
from mmaudit.rebalance.survey import survey_table

ROW = st.tuples(
    st.integers(-2, 3),
    st.sampled_from(["a", "b", None]),
    st.sampled_from(["train", "test", None]),
    st.none() | st.just(0.5),
)
TYPES = {"label": pa.int32(), "label_name": pa.string(), "split": pa.string(), "balance": pa.float32()}


def table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.table(
        {name: pa.array([row[at] for row in rows], type_) for at, (name, type_) in enumerate(TYPES.items())}
    )


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_counts_as_python_does(tmp_path: Path, rows: list[tuple[Any, ...]], cut: int, statistics: bool) -> None:
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for path, some in zip(paths, (rows[:cut], rows[cut:]), strict=True):
        pq.write_table(table(some), path, write_statistics=statistics)
    called: dict[int, set[str]] = {}
    for label, name, _, _ in rows:
        called.setdefault(label, set()).add(name or "")
    for parts in (paths, [table(rows)]):
        if any(len(names) > 1 for names in called.values()):
            with pytest.raises(ScoreError, match="more than one label_name"):
                survey_table(parts, list(TYPES))
            continue
        found = survey_table(parts, list(TYPES))
        assert found.num_rows == len(rows)
        assert found.classes.to_pylist() == sorted(called)
        assert list(found.class_names) == [min(called[label]) for label in sorted(called)]
        assert list(found.splits) == sorted({split or "all" for _, _, split, _ in rows})
        assert found.every_row_has_split == all(split for _, _, split, _ in rows)
        assert found.one_name_per_class == all(len(names) == 1 and "" not in names for names in called.values())
        assert found.empty_columns == ({"balance"} if all(value is None for *_, value in rows) else set())


def test_without_names_and_splits_labels_are_their_own_names() -> None:
    found = survey_table([pa.table({"label": [2, 1, 1]})], ["label"])
    assert (found.classes.to_pylist(), found.class_names, found.splits) == ([1, 2], ("1", "2"), ("all",))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1], ["one"]], "column label is int in one shard and str in another"),
        ([[1, 2**31]], "label 2147483648 has more than 32 bits"),
        ([[1, None]], "column label holds nulls"),
        ([[0.5]], "column label does not hold classes"),
    ],
)
def test_labels_that_are_none_are_named(labels: list[list[Any]], words: str) -> None:
    with pytest.raises(ScoreError, match=words):
        survey_table([pa.table({"label": pa.array(each)}) for each in labels], ["label"])
