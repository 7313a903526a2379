"""Tests of the figures of a comparison: which there are, their size and text, and equal bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from comparisons import METHODS, made_comparison
from matplotlib.text import Text

from mmaudit.audit.errors import ConfigError
from mmaudit.train.comparison.arrays import compare_predictions
from mmaudit.train.comparison.figures import draw_files, figure_kinds
from mmaudit.train.comparison.verdicts import Comparison

KINDS = ["forest", "forest-unimodal", "subsets", "threshold", "missing", "missing-audio", "missing-visual"]
EVIL = ("joint", "<script>alert(1)</script>: a=$x^2$", "長い数字のモデル" + "é" * 80, '_y & "z"')


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison()


@pytest.fixture(scope="module")
def files(comparison: Comparison) -> dict[str, bytes]:
    return draw_files(comparison.figure_tables(), ["forest", "threshold"])


def texts_of(svg: bytes) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_figures_are_those_that_there_are_data_for(comparison: Comparison, files: dict[str, bytes]) -> None:
    assert figure_kinds(comparison.figure_tables()) == KINDS
    assert list(files) == ["forest.svg", "forest.pdf", "threshold.svg", "threshold.pdf"]
    tables = made_comparison(has_subsets=False).figure_tables()
    assert figure_kinds(replace(tables, missing=tables.missing[:0])) == ["forest", "forest-unimodal", "subsets"]
    empty = replace(
        tables, **{name: getattr(tables, name)[:0] for name in ("summary", "unimodal", "metrics", "missing")}
    )
    assert figure_kinds(empty) == []
    assert draw_files(empty) == {}


def test_figures_are_as_wide_as_a_column_with_text_of_at_least_7_points(
    comparison: Comparison, files: dict[str, bytes]
) -> None:
    for name, content in files.items():
        if name.endswith(".svg"):
            assert b'width="237.6pt"' in content, name
            sizes = re.findall(rb"font(?:-size)?: ?(?:\w+ )?([\d.]+)px", content)
            assert sizes, name
            assert min(map(float, sizes)) >= 7, name
            assert b"sans-serif" in content  # for machines without the first font
    for kind in KINDS:
        figure = comparison.plot(kind)
        assert figure.get_figwidth() == pytest.approx(3.3)
        figure.draw_without_rendering()
        shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        assert min(float(text.get_fontsize()) for text in shown) >= 7
        ticks = {text for axes in figure.axes for text in axes.get_xticklabels()}  # some beyond the axis are not drawn
        for text in set(shown) - ticks:
            box = text.get_window_extent()
            assert -1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, (kind, text.get_text())


def test_same_tables_give_the_same_bytes_without_dates(comparison: Comparison, files: dict[str, bytes]) -> None:
    assert draw_files(comparison.figure_tables(), ["forest", "threshold"]) == files
    for content in files.values():
        assert b"CreationDate" not in content
        assert b"<dc:date>" not in content
        assert b"matplotlib.org" not in content


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process(comparison: Comparison, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from comparisons import made_comparison;"
        "from mmaudit.train.comparison.figures import draw_files\n"
        "for name, content in draw_files(made_comparison().figure_tables()).items():\n"
        "    Path(sys.argv[1], name).write_bytes(content)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent), "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    files = draw_files(comparison.figure_tables())
    assert set(files) == {f"{kind}.{suffix}" for kind in KINDS if kind != "missing" for suffix in ("svg", "pdf")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_text_remains_text_and_fonts_of_pdf_are_embedded(files: dict[str, bytes]) -> None:
    texts = texts_of(files["forest.svg"])
    assert "bss-h+sum" in texts
    assert any("difference of accuracy in points" in text for text in texts)
    assert b"/FontFile2" in files["forest.pdf"]
    assert b"/Type3" not in files["forest.pdf"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_any_text_are_drawn_as_they_are() -> None:
    made = made_comparison(methods=EVIL, modalities=("au<i>dio$", "visüal"), num_samples=60)
    files = draw_files(made.figure_tables(), ["forest", "threshold"], formats=["svg"])
    assert not any(b"<script" in content for name, content in files.items() if name.endswith(".svg"))
    texts = texts_of(files["forest.svg"])
    assert any("$" in text for text in texts)
    assert "visüal" in texts_of(files["threshold.svg"])


def test_plot_names_the_kinds_that_there_are(comparison: Comparison) -> None:
    with pytest.raises(ConfigError, match="no figure treshold; did you mean threshold"):
        comparison.plot("treshold")
    few = compare_predictions({"joint": [[1, 0] * 40] * 2, "ours": [[1, 1] * 40] * 2})
    with pytest.raises(ConfigError, match="forest, subsets"):
        few.plot("missing")


def test_figures_without_intervals_of_one_seed(comparison: Comparison) -> None:
    single = made_comparison(num_seeds=1, num_samples=60)
    for kind in KINDS:
        single.plot(kind).draw_without_rendering()
    lines = [line for line in comparison.plot().axes[0].lines if np.size(line.get_xdata()) == 2]
    axes = single.plot().axes[0]
    assert (
        len(lines) == len([line for line in axes.lines if np.size(line.get_xdata()) == 2]) + 6
    )  # all but the clipped ones
    assert METHODS[2] in {text.get_text() for text in axes.get_yticklabels()}
