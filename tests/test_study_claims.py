"""Published claims: each outcome from made numbers, with the numbers in its sentence."""

from __future__ import annotations

from typing import Any

import pytest
from study_numbers import comparison, control, dataset, row

from mmaudit.cli.study.claims import ClaimOutcome, check_claims, judge


def outcome_of(numbers: dict[str, Any], start: str) -> ClaimOutcome:
    matching = [outcome for outcome in check_claims(numbers) if outcome.claim.startswith(start)]
    assert len(matching) == 1
    return matching[0]


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [(0.05, "holds here"), (-0.05, "the opposite here"), (0.01, "cannot be told"), (-0.01, "not of that size here")],
)
def test_claim_of_a_gain_is_judged_by_verdict_and_by_the_published_size(difference: float, outcome: str) -> None:
    """OGM-GE's published gain is 2.8 points; intervals reach 2 points to either side."""
    outcome_here = outcome_of(dataset(comparison(row("ogm-ge", difference))), "OGM-GE")
    assert outcome_here.outcome == outcome
    assert f"{100 * difference:+.1f} points" in outcome_here.sentence
    assert ("+2.8 points are excluded" in outcome_here.sentence) == (outcome == "not of that size here")
    assert ("effects of 3.0 points would have been shown" in outcome_here.sentence) == (outcome == "cannot be told")


def test_equal_trainings_decide_nothing() -> None:
    """A curriculum that ends in the first epoch has no order."""
    equal = control("anti-curriculum for bss-h+sum", 0.0, reference="bss-h+sum", low=0.0, high=0.0, p_holm=1.0)
    outcome = outcome_of(dataset(comparison(row("bss-h+sum", 0.0), equal)), "The order of bss-h+sum matters")
    assert outcome.outcome == "cannot be told"
    assert outcome.sentence.startswith("no test sample is predicted otherwise")


def test_a_claim_without_a_published_number_has_no_size_to_exclude() -> None:
    assert outcome_of(dataset(comparison(row("ogm", -0.01))), "OGM is").outcome == "cannot be told"


def test_one_seed_decides_nothing() -> None:
    undecided = row("ogm-ge", 0.05, p=None, p_holm=None, low=None, high=None, smallest_effect=None)
    assert outcome_of(dataset(comparison(undecided)), "OGM-GE").outcome == "cannot be told"
    nothing = judge("claim", {"difference": 0.1, "low": -1.0, "high": 1.0, "p_holm": float("nan")})
    assert nothing.outcome == "cannot be told"
    assert nothing.sentence.startswith("no verdict")


@pytest.mark.parametrize(("difference", "outcome"), [(-0.05, "holds here"), (0.05, "the opposite here")])
def test_order_matters_where_its_opposite_is_worse(difference: float, outcome: str) -> None:
    rows = [row("bss-h+sum", 0.0), control("anti-curriculum for bss-h+sum", difference, reference="bss-h+sum")]
    order = outcome_of(dataset(comparison(*rows)), "The order of bss-h+sum matters")
    assert order.outcome == outcome
    assert f"{-100 * difference:+.1f} points" in order.sentence


def test_learned_schedule_is_compared_with_the_heuristic_one() -> None:
    pair = {"method": "bss-l+sum", "reference": "bss-h+sum", "mean": 0.05, "low": 0.02, "high": 0.08, "p": 0.001}
    numbers = dataset(comparison(row("bss-l+sum", 0.0), pairs=[pair | {"standard_error": 0.015, "df": 50.0}]))
    assert outcome_of(numbers, "BSS-L is better than BSS-H").outcome == "holds here"


def test_a_subset_is_judged_against_random_samples_of_its_size() -> None:
    random = control("joint", -0.06, manifest="random-like-balanced", reference_manifest="balanced")
    alone = control("audio alone", -0.2, manifest="balanced", reference_manifest="balanced")
    numbers = dataset(comparison(), comparison(random, alone))
    outcome = outcome_of(numbers, "Training on the subset balanced")
    assert outcome.outcome == "holds here"
    assert "+6.0 points" in outcome.sentence


def test_checks_of_the_study_keep_their_outcome_and_are_not_repeated() -> None:
    claims = [
        {"name": f"F{index}", "claim": "claim", "outcome": outcome, "sentence": f"numbers {index}"}
        for index, outcome in enumerate(("seen here", "not seen here", "cannot tell"), start=1)
    ]
    outcomes = check_claims(dataset(comparison(findings=claims), comparison(findings=claims)))
    assert [(row.claim, row.outcome, row.sentence) for row in outcomes] == [
        ("F1: claim", "holds here", "numbers 1"),
        ("F3: claim", "cannot be told", "numbers 3"),
        ("F2: claim", "the opposite here", "numbers 2"),
    ]


def test_filters_by_the_mixture_are_one_claim_for_all_methods() -> None:
    selection = [
        {"comparison": text, "difference": 0.05, "low": low, "high": 0.09, "p_holm": p}
        for text, low, p in (
            ("joint on gmm-balanced against joint on all (all data)", 0.01, 0.01),
            ("greedy on gmm-balanced against greedy on all (all data)", -0.01, 0.3),
            ("anti-curriculum for bss-h+sum on gmm-balanced against it on all (all data)", 0.01, 0.01),
        )
    ]
    joint, greedy = check_claims(dataset(comparison(), comparison(selection=selection)))
    assert joint.claim == greedy.claim == "Training on the balanced side of the mixture is better than on all samples"
    assert (joint.outcome, greedy.outcome) == ("holds here", "cannot be told")
    assert joint.sentence == "joint on gmm-balanced against joint on all: +5.0 points, 95% [+1.0, +9.0], p 0.010"


def test_methods_that_were_not_trained_have_no_outcome() -> None:
    assert check_claims(dataset(comparison())) == []
