"""Laws of roles: a name that is given wins, a usual one is found, and a wrong one names its nearest.

More of them stand in test_dataset.py, where columns come from files.
"""

from __future__ import annotations

import pytest

from mmaudit.audit.dataset.columns import Columns, find_columns
from mmaudit.audit.errors import ConfigError, DatasetError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "label", "id"], ["id", "label"]),
        (["__key__", "cls", "wav"], ["__key__", "cls"]),
        (["__key__", "id", "label", "cls"], ["id", "label"]),
        (["labels", "text"], ["labels"]),
        (["y", "label_name", "group", "split"], ["y", "label_name", "group", "split"]),
    ],
)
def test_usual_names_have_their_role(names: list[str], expected: list[str]) -> None:
    assert find_columns(names, {}).names == expected


def test_what_is_named_wins() -> None:
    names = ["id", "label", "label_name", "split", "group", "other"]
    found = find_columns(names, {"label": "other", "split": "none", "group": "id"})
    assert found == Columns(id="id", label="other", label_name=None, group="id", split=None)


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--group speker: no such column; did you mean speaker\?"):
        find_columns(["label", "speaker"], {"group": "speker"})
    with pytest.raises(DatasetError, match="no label column among a, b: name it with --label"):
        find_columns(["a", "b"], {})
    with pytest.raises(DatasetError, match="more than one column is called 'a'"):
        find_columns(["a", "label", "a"], {})
