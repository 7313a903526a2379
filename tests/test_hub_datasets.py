"""Laws of names on the hub: what looks like one. What loading gives stands in test_sources.py."""

from __future__ import annotations

import pytest

from mmaudit.audit.dataset.formats.saved import looks_like_hub_name


@pytest.mark.parametrize("name", ["user/name", "name", "user/name:config", "name:en-US", "A-b_c.d/x.y", "_u/n"])
def test_names(name: str) -> None:
    assert looks_like_hub_name(name)


@pytest.mark.parametrize(
    "path",
    ["", "/a", "./a", "../a", "a/b/c", "a/", "~/a", "a.csv", "u/a.parquet", "a.tar", "a.jsonl", "a b", "a:", "a\\b"],
)
def test_paths(path: str) -> None:
    assert not looks_like_hub_name(path)
