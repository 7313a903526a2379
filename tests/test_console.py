"""Tests of printed text: names cannot send control characters, start a new line or reverse the reading order."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from runs import run_record

from mmaudit.audit.errors import printable
from mmaudit.cli.console import (
    print_check,
    print_finetune,
    print_line,
    print_score,
    print_split,
    print_text,
)
from mmaudit.cli.progress import configure_logging, print_status
from mmaudit.cli.training import FinetuneResult

HOSTILE = "\x1b[2J\x1b]0;owned\x07\rname\nerror: forged\x9b31m\u202egnp.exe\u2028next\x00\ud800"


@given(st.text(st.characters(exclude_categories=[])))
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    line = printable(text)
    assert len(line.splitlines()) <= 1
    assert not {unicodedata.category(sign) for sign in line} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(line) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    line.encode("utf-8")


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[0m\n\x9b\u202eb") == "a\\x1b[0m\\n\\u009b\\u202eb"


@pytest.fixture
def _own_logging() -> object:
    logger = logging.getLogger("mmaudit")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.mark.usefixtures("_own_logging")
def test_all_output_functions_print_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    print_line(f"id {HOSTILE}")
    print_status(f"id {HOSTILE}")
    logging.getLogger("mmaudit").info("id %s", HOSTILE)
    printed = capsys.readouterr()
    for text, lines in ((printed.out, 1), (printed.err, 2)):
        assert text.count("\n") == lines == len(text.splitlines())
        assert "\x1b" not in text
        assert "\\x1b[2J" in text


@pytest.mark.usefixtures("_own_logging")
def test_a_warning_is_printed_once_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("mmaudit")
    for _ in range(2):
        configure_logging()
        for number in (1, 1, 2):
            logger.warning("no group has %d samples", number)
            logger.info("scored")
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["no group has 1 samples", "scored", "scored", "no group has 2 samples", "scored"]


def test_print_text_keeps_line_feeds(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("one\n\ntwo \x1b[1m")
    assert capsys.readouterr().out == "one\n\ntwo \\x1b[1m\n"


def test_split_prints_the_distance_that_the_tolerance_constrains_first(capsys: pytest.CaptureFixture[str]) -> None:
    uniformity = {"distance": 0.065, "ks": 0.1, "positive": 0.5}
    summary: dict[str, Any] = {
        **{"file": None, "name": "balanced", "kept": 130, "scored": 600, "between": "audio:visual", "reasons": {}},
        **{"before": uniformity, "after": uniformity, "effective_size": 130.0, "least_uniform_classes": []},
        **{"empty_bins": [], "shortages": [], "curve": [], "splits": {"test": 35, "train": 95}},
        "distances": {"test": 0.027, "train": 0.047},
        "halves": {"num_rows": 600, "kept": 120.0, "selected": 0.048, "measured": 0.213, "chance": 0.078},
    }
    print_split(summary)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "  train 95, test 35",
        "  distance to uniform: train 0.047 (the worst split), test 0.027",
        "  distance to uniform of all splits together 0.065 before, 0.065 after",
    ]
    distances = "distance 0.048 by the half it is selected by, 0.213 by the other (0.078 by chance)"
    assert f"  by halves of the features: {distances}" in lines
    print_split({**summary, "splits": {"all": 130}, "distances": {"all": 0.065}, "halves": None})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  distance to uniform 0.065 before, 0.065 after"
    assert not any("by halves" in line for line in lines)


def test_score_prints_the_headline_and_the_warnings_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    record = run_record(
        balanced_side={"n": 50, "all_correct": 0.2, "all_wrong": 0.46},
        margin_check={"num_permutations": 20, "num_bimodal": 20, "survives": True},
    )
    record |= {"headline": "Nothing can be read", "warnings": ["The probe on audio is weak."], "report": "r.html"}
    print_score(record)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["  warning: The probe on audio is weak.", "Nothing can be read", "report: r.html"]
    assert "  balanced: 50 samples, 20% right by all modalities, 46% wrong by all" in lines
    assert "  discrepancy by halves of the features: audio r = 0.50, z = 9.0" in lines
    assert any("paired at random within classes" in line for line in lines)
    print_score({**record, "halves": None, "balanced_side": None})
    assert "not measured: probe.halves is off" in capsys.readouterr().out


def check_summary(**changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {"source": "d", "input": 9, "usable": 8, "modalities": [], "unusable": []}
    summary |= {"task": "classification", "classes": {"dog": 5, "cat": 4}, "splits": {"train": 7, "test": 2}}
    return (
        summary
        | {
            "split_source": "data",
            "leakage": {
                "notes": [],
                "findings": [],
                "leaks": False,
                "compared": [["train", "test"]],
                "sensitivity": [],
            },
        }
        | changes
    )


def test_check_states_classes_and_splits(capsys: pytest.CaptureFixture[str]) -> None:
    print_check(check_summary())
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == ["  2 classes: dog: 5, cat: 4", "  splits: train 7, test 2", "no leaks found"]
    print_check(check_summary(classes={f"c{number}": 99 - number for number in range(13)}))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("  13 classes: c0: 99, ")
    assert printed[1].endswith("c5: 94, and 1 more, c7: 92, c8: 91, c9: 90, c10: 89, c11: 88, c12: 87")


def test_check_does_not_vouch_for_a_split_that_it_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_check(check_summary(split_source="cut", task="multilabel"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "  2 labels: dog: 5, cat: 4",
        "  splits: train 7, test 2; the data state none, so that a test split was cut",
        "the data state no splits: only the split cut here was tested",
    ]


def test_tables_align_names_of_any_length_and_script(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a_very_long_modality_name_that_somebody_took_from_a_file_01", "音频特征", "fused")
    values = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "map", "macro_f1"), 0.5)
    branches = dict.fromkeys(names, values)
    subsets = ("all", *(f"{name}-dominated-{share}" for name in names[:2] for share in (0.2, 0.4)), "empty")
    metrics: dict[str, Any] = {
        **{
            "counts": dict.fromkeys(("train", "validation", "test"), 9),
            "best_epoch": 1,
            "test_labels_in_scores": False,
        },
        "chance": {"uniform": 0.25, "majority": 0.3},
        "test": {name: {"n": int(name != "empty"), "branches": branches} for name in subsets},
    }
    result = FinetuneResult(
        name="all-concat", folder=Path("run/finetune/all-concat"), accuracy=0.5, value=0.5, metrics=metrics
    )
    print_finetune(result)
    first, *table, _, folder = capsys.readouterr().out.splitlines()
    assert folder == "fine-tuning: run/finetune/all-concat"
    assert first.endswith("guessing: uniform 0.250, majority 0.300")
    assert len({cell_len(line) for line in table}) == 1
    assert len({line[:40] for line in table}) == len(table)  # cut names remain distinct
    assert max(map(cell_len, table)) < 120
