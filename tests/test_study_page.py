"""The page of a study: its sentences follow from the numbers, and the same numbers give the same bytes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from study_numbers import agreement, comparison, dataset, row, study

from mmaudit.cli.study.figures import FIGURES
from mmaudit.cli.study.page import page_text, write_page

TRUTH = {
    "rank": agreement(0.85),
    "levels": [
        {"planted": value, "n": 60, "mean": value / 2, "low": value / 2 - 0.1, "high": value / 2 + 0.1}
        for value in (-1.0, -0.5, 0.0)
    ],
}


def test_verdicts_are_counted_and_named() -> None:
    text = page_text(study(digits=dataset(comparison(row("ogm-ge", 0.05), row("greedy", -0.04), row("pmr", 0.0)))))
    assert "**digits**: ogm-ge helps (+5.0), greedy hurts (-4.0); no evidence of the other 1; " in text
    assert "smallest effect that shows: 3.0 points (median of 3.0 to 3.0)." in text
    none = page_text(study(digits=dataset(comparison(row("pmr", 0.0)))))
    assert "**digits**: no evidence that any of 1 method helps or hurts; smallest effect" in none
    assert "**holds here**. +5.0 points" in text
    assert "| OGM-GE is better than joint training (+2.8 points)" in text


def test_nothing_is_claimed_of_one_seed() -> None:
    undecided = row("ogm-ge", 0.05, p=None, p_holm=None, smallest_effect=None, verdict="no verdict")
    text = page_text({**study(digits=dataset(comparison(undecided))), "seeds": 1})
    assert "no verdict on any of 1 methods, with 1 seed." in text
    assert "One seed has no variance of training" in text
    assert "holds here" not in text


def test_methods_at_chance_are_named() -> None:
    at_chance = {"method": "greedy", "accuracy": 0.1, "lowest": 0.08, "shuffled": 0.11, "above": False}
    text = page_text(study(digits=dataset(comparison(row("greedy", -0.5)), shuffled=[at_chance])))
    assert "not better than on shuffled labels: greedy" in text
    assert "| 0.110 |" in text
    fine = page_text(study(digits=dataset(comparison(row("greedy", 0.0)))))
    assert "each of 1 methods is better with every seed than on shuffled labels" in fine


def test_planted_truth_is_told_only_where_it_is_known() -> None:
    text = page_text(
        study(a=dataset(comparison()), b=dataset(comparison(), truth=TRUTH, truth_text="Noise was added."))
    )
    assert "**b**: the discrepancy agrees with the planted one by 0.85 [0.75, 0.95]" in text
    assert "**a**: the discrepancy" not in text
    assert text.count("Noise was added.") == 1


def test_networks_and_probes_stand_beside_their_ceilings() -> None:
    text = page_text(study(digits=dataset(comparison())))
    assert "| digits | mlp (0.60, 0.70) | audio:image | 0.60 [0.50, 0.70] | 0.95 | 0.70 | 0.50 [0.40, 0.60] |" in text
    assert "| digits | joint | 0.40 [0.30, 0.50] | 0.90 | 0.80 | 0.30 [0.20, 0.40] |" in text
    assert "above 0 for 1 of 1 methods" in text


def test_several_checks_of_one_claim_are_counted() -> None:
    checks = [
        {"name": "F3", "claim": "below it", "outcome": outcome, "sentence": sentence}
        for outcome, sentence in (("seen here", "on all"), ("seen here", "on balanced"), ("cannot tell", "on few"))
    ]
    text = page_text(study(digits=dataset(comparison(findings=checks))))
    assert "| F3: below it | 2 holds here, 1 cannot be told |" in text
    assert "- F3: below it:\n  - **holds here**. on all\n  - **holds here**. on balanced\n" in text


def test_figures_are_svg_of_the_same_bytes_and_shown_on_the_page(tmp_path: Path) -> None:
    numbers = study(digits=dataset(comparison(row("ogm-ge", 0.05)), truth=TRUTH))
    text = write_page(numbers, tmp_path).read_text(encoding="utf-8")
    for kind, draw in FIGURES.items():
        file = tmp_path / "study" / f"digits-{kind}.svg"
        assert f"(study/{file.name})" in text
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
        assert file.read_text(encoding="utf-8") == draw(numbers["sets"]["digits"])


@pytest.mark.parametrize("kind", FIGURES)
def test_nothing_is_drawn_without_numbers(kind: str) -> None:
    assert FIGURES[kind](dataset(comparison(), probes=[], networks=[])) is None
