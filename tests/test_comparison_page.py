"""Tests of the page of a comparison: every verdict and number of its tables, escaped names, equal bytes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from comparisons import METHODS, made_comparison

from mmaudit.audit.errors import RunError
from mmaudit.cli.report import comparison_page
from mmaudit.cli.report.comparison_page import (
    comparison_numbers,
    headline,
    points,
    render_comparison,
    stated_of_comparison,
    write_comparison_page,
)
from mmaudit.train.comparison.arrays import compare_predictions
from mmaudit.train.comparison.findings import Finding
from mmaudit.train.comparison.verdicts import Comparison

EVIL = ("joint", "<script>alert(1)</script>: a=$x^2$", "長い数字のモデル" + "é" * 80, '_y & "z"')
SVG = {"forest": b'<svg width="237.6pt" height="100pt"></svg>'}
FINDING = Finding(name="F1", claim="a < claim", outcome="cannot tell", sentence="joint on all: -4.5 [-9.0, +0.0]")
SELECTION = pd.DataFrame(
    [{"comparison": "gmm against all data", "difference": -0.034, "low": -0.07, "high": 0.002, "p": 0.06}
     | {"p_holm": 0.123, "verdict": "no evidence"}]
)  # fmt: skip


class _Text(HTMLParser):
    """The text of a page, its tables as rows of cells, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.rows = "", list[str](), list[list[str]]()
        self.is_cell = False

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.is_cell = True
            self.rows[-1].append("")
        elif tag == "br" and self.is_cell:
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.is_cell = self.is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_cell:
            self.rows[-1][-1] += data


def parsed(comparison: Comparison, images: dict[str, bytes] | None = None) -> _Text:
    page = _Text()
    page.feed(render_comparison(comparison_numbers(comparison, command="mmaudit compare 'a b'"), images or {}))
    page.text = " ".join(page.text.split())
    return page


def rows_of(page: _Text, method: str) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in page.rows if row and row[0].split(" ")[0] == method]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    made = made_comparison(
        manifests=("few", "all"), has_probabilities=True, diverged=[("all", "bss-h+sum")], num_samples=90
    )
    return replace(made, findings=(FINDING,), selection=SELECTION)


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> _Text:
    return parsed(comparison, SVG)


def test_page_states_every_verdict_in_words_and_in_tables(comparison: Comparison, page: _Text) -> None:
    rows = comparison.summary[comparison.summary["subset"] == "all"]
    for row, sentence in zip(rows.to_dict("records"), comparison.sentences(), strict=True):
        if row["kind"] == "method":
            assert comparison_page.minus(sentence) in page.text
        name = row["method"] + (f" on {row['manifest']}" if row["manifest"] != row["reference_manifest"] else "")
        interval = f"{points(row['difference'])} [{points(row['low'])}, {points(row['high'])}]"
        cells = [name] + ([row["reference"]] if row["kind"] == "control" else []) + [row["verdict"], interval]
        assert any(line[: len(cells)] == cells and line[-1] == f"{row['accuracy']:.3f}" for line in page.rows), cells
        assert any(line[-2] == f"{100 * row['smallest_effect']:.1f}" for line in page.rows if len(line) > 4)
    for row in comparison.against_unimodal().query("subset == 'all'").to_dict("records"):
        interval = f"{points(row['difference'])} [{points(row['low'])}, {points(row['high'])}]"
        assert any(line[:3] == [row["method"], row["verdict"], interval] for line in page.rows)
    assert page.text.index("helps") < page.text.index("Accuracy by subset")


def test_page_holds_every_accuracy_with_its_interval(comparison: Comparison, page: _Text) -> None:
    cells = {" ".join(cell.split()) for row in page.rows for cell in row}
    metrics = comparison.metrics
    shown = metrics[(metrics["metric"] == "accuracy") | (metrics["subset"] == "all")].rename(
        columns={"value": "accuracy"}
    )
    for row in [*shown.to_dict("records"), *comparison.missing.to_dict("records")]:
        assert f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in cells, row
    columns = [row for row in page.rows if row and row[0] == "method"]
    assert any(f"audio-dominated-0.2 {comparison.subsets['audio-dominated-0.2'].sum()}" in row for row in columns)
    assert any([cell for cell in row if "%" in cell] == [f"{10 * step}%" for step in range(11)] for row in columns)


def test_page_has_findings_selection_diverged_trainings_and_the_command(page: _Text) -> None:
    assert "F1: a < claim Cannot tell. joint on all: −4.5 [−9.0, +0.0]" in page.text
    assert ["gmm against all data", "no evidence", "−3.4 [−7.0, +0.2]", "0.123"] in page.rows
    assert ["all", "bss-h+sum", "2"] in page.rows
    assert "bss-h+sum on all diverged" in page.text
    assert ["all", "joint", "0, 1", "4", "1,600"] in page.rows
    assert "mmaudit compare 'a b'" in page.text
    assert "90 common test samples of 30 groups" in page.text


def test_page_is_self_contained(comparison: Comparison) -> None:
    numbers = comparison_numbers(comparison, command="")
    html = render_comparison(numbers, SVG)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert base64.b64decode(sources[0].partition(",")[2]) == SVG["forest"]
    assert "default-src 'none'" in html
    assert "script" not in parsed(comparison).tags


def test_names_are_escaped_and_whole() -> None:
    made = made_comparison(methods=EVIL, manifests=("a<b>",), modalities=("au<i>dio$", "visüal"), num_samples=60)
    page = parsed(made)
    assert not {"script", "b>", "i"} & set(page.tags)
    for method in EVIL:
        assert any(row and row[0].startswith(method) for row in page.rows), method
    assert "On a<b>: against joint" in page.text


def test_frames_without_rows_leave_sections_out() -> None:
    made = made_comparison(has_subsets=False, num_samples=60)
    empty = replace(made, metrics=made.metrics[:0], missing=made.missing[:0])
    text = parsed(empty).text
    for title in ("Accuracy by subset", "Missing modality", "Published findings", "Filtering by", "Diverged trainings"):
        assert title not in text
    assert "How it was made" in text
    nothing = replace(empty, summary=made.summary[:0], correct={})
    assert "No two methods were trained" in parsed(nothing).text


def test_one_seed_has_no_intervals_and_no_verdict() -> None:
    page = parsed(made_comparison(num_seeds=1, num_samples=60))
    assert "No verdict: whether a method differs from joint cannot be shown" in page.text
    row = next(row for row in page.rows if row[:2] == ["bss-h+sum", "no verdict"])
    assert re.fullmatch(r"[+−][\d.]+", row[2])
    assert row[3:5] == ["", ""]
    assert not any("nan" in cell for row in page.rows for cell in row)


def test_comparison_of_arrays_has_a_page() -> None:
    made = compare_predictions({"joint": [[1, 0] * 40] * 2, "ours": [[1, 1] * 40] * 2})
    page = parsed(made)
    assert "ours helps against joint" in page.text
    assert ["joint", "baseline", "", "", "", "0.500"] in page.rows


def test_many_methods_have_their_verdicts_in_tables() -> None:
    made = made_comparison(methods=["joint", *(f"method-{index}" for index in range(32))], num_samples=60)
    page = parsed(made)
    assert sum(len(row) == 6 and row[0].startswith("method-") for row in page.rows) == 2 * 32  # also against a modality
    assert "of 32 verdicts; the tables below have all" in page.text


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["helps", "hurts", "no evidence"], "a helps; b hurts against joint"),
        (["helps", "helps", "no evidence"], "a and b help against joint"),
        (["helps"] * 5, "a, b and 3 others help against joint"),
        (["no evidence"] * 2, "No evidence that any method differs from joint"),
        ([], "No two methods were trained: there is nothing to compare"),
    ],
)
def test_headline_counts_the_verdicts(verdicts: list[str], words: str) -> None:
    rows = pd.DataFrame({"manifest": "", "method": list("abcdefg")[: len(verdicts)], "verdict": verdicts})
    assert headline(rows, "joint") == words


def test_files_are_the_same_twice_and_stale_figures_are_removed(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"forest.svg": SVG["forest"], "forest.pdf": b"%PDF", "missing-a/b.svg": SVG["forest"]}
    monkeypatch.setattr("mmaudit.train.comparison.figures.draw_files", lambda tables: drawn)
    path = write_comparison_page(comparison, tmp_path, command="mmaudit compare")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"forest.svg", "forest.pdf", "missing-a_b.svg"}
    first = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    (tmp_path / "figures" / "missing-old.pdf").write_bytes(b"")
    write_comparison_page(comparison, tmp_path, command="mmaudit compare")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == first
    assert path in first
    stated = stated_of_comparison(tmp_path / "compare.json")
    assert stated["headline"] == comparison_numbers(comparison, command="")["headline"]
    assert stated["href"].startswith("compare/")


def test_damaged_statements_are_refused(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"name": "x", "headline": 3}))
    with pytest.raises(RunError, match=r"compare\.json"):
        stated_of_comparison(tmp_path / "compare.json")


def test_methods_of_the_made_comparison_are_on_the_page(page: _Text) -> None:
    assert all(rows_of(page, method.split(" ")[0]) for method in METHODS)
