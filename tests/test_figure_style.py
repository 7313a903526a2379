"""Tests of the style of figures: names cut to fit, and fonts for every script."""

from __future__ import annotations

import logging

import matplotlib
import pytest

from mmaudit.audit.figure_style import canvas, fit_names, font_families, text_width

SENTENCE = "playing the instrument number {} in a crowded room full of people"


def test_names_that_are_cut_remain_distinct() -> None:
    with canvas():
        names = [SENTENCE.format(index) for index in range(40)]
        cut = fit_names(names, 1.5)
        assert len(set(cut)) == 40
        assert all(str(index) in text for index, text in enumerate(cut))
        assert all(text_width(text, size=9) <= 1.5 for text in cut)
        assert fit_names(["audio", "visual", "audio"], 1.5) == ["audio", "visual", "audio"]
        assert len(set(fit_names(["x" * 90 + "y" * n for n in range(9)], 0.5))) == 9


def test_latin_greek_cyrillic_and_arabic_need_no_other_font(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmaudit.audit.figure_style._installed", lambda: ["DejaVu Sans", "STIXGeneral"])
    with caplog.at_level(logging.WARNING, logger="mmaudit"), canvas(("voilà", "λόγος", "звук", "صوت")):
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans"]
    assert not caplog.records


def test_a_font_that_covers_a_script_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = {"DejaVu Sans": frozenset(map(ord, "audio")), "A": frozenset(map(ord, "数")), "B": frozenset()}
    monkeypatch.setattr("mmaudit.audit.figure_style._installed", lambda: ["B", "A", "DejaVu Sans"])
    monkeypatch.setattr("mmaudit.audit.figure_style._characters", covered.__getitem__)
    assert font_families(["audio", "数"]) == ["DejaVu Sans", "A"]
    assert font_families(["audio"]) == ["DejaVu Sans"]  # no other font changes Latin labels


def test_names_from_right_to_left_keep_the_order_of_their_label() -> None:
    with canvas():
        assert fit_names(["صوت", "audio"], 2) == ["\u200eصوت\u200e", "audio"]
