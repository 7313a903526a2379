"""Tests of Markdown escaping: text is shown unchanged, on one line, also in tables."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.errors import printable
from mmaudit.rebalance.card import code_span, escape_markdown, markdown_table

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@given(texts)
def test_escaped_names_read_as_they_are(name: str) -> None:
    text = escape_markdown(name)
    assert len(text.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<*`_]", text)
    assert re.sub(r"\\(.)", r"\1", text) == printable(" ".join(name.split()))


@given(st.text("` ab\n", max_size=12))
def test_a_code_span_ends_only_where_it_ends(text: str) -> None:
    written, unescaped = code_span(text), " ".join(text.split())
    (fence,) = re.findall("^`+", written)
    inner = written[len(fence) :].removesuffix(fence)
    assert fence not in re.findall("`+", inner)
    assert inner.removeprefix(" ").removesuffix(" ") == unescaped


@pytest.mark.parametrize("name", ["a|b", "`x`", "# head", "<script>", "$x$", "a\x1b[31mb", "\u202eb", "a\n- forged"])
def test_a_name_stays_one_cell_of_a_table(name: str) -> None:
    (row,) = markdown_table(("what", "n"), [(escape_markdown(name), "1")])[2:]
    assert len(row.splitlines()) == 1
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not set(row) & set("\x1b\u202e")
    assert "<script>" not in row


def test_a_table_has_its_numbers_on_the_right() -> None:
    written = markdown_table(("what", "n", ""), [("a", "1", "x")])
    assert written == ["| what | n |  |", "| --- | ---: | --- |", "| a | 1 | x |"]
