"""Tests of pacing functions against their published formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.rebalance.curriculum import PACINGS, root_pacing, step_pacing

START = st.floats(0.01, 1)
GROW = st.integers(1, 200)


@pytest.mark.parametrize(
    ("epoch", "share"),
    # lambda0 = 0.1, T_grow = 40: lambda(t)^2 = 0.99 t / 40 + 0.01, by hand
    [(0, 0.1), (1, math.sqrt(0.03475)), (10, math.sqrt(0.2575)), (20, math.sqrt(0.505)), (40, 1.0), (41, 1.0)],
)
def test_root_pacing_matches_the_paper(epoch: int, share: float) -> None:
    assert root_pacing(epoch, start=0.1, grow_epochs=40) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("pacing", PACINGS)
@given(START, GROW)
def test_pacing_is_monotone_and_ends_at_one(pacing: str, start: float, grow_epochs: int) -> None:
    shares = [PACINGS[pacing](epoch, start=start, grow_epochs=grow_epochs) for epoch in range(grow_epochs + 3)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(start)
    assert shares[grow_epochs:] == [1.0, 1.0, 1.0]  # exactly: 0.9999 of n samples would be n - 1
    assert 0 < shares[0] <= shares[-2]


@given(START, st.integers(1, 20), st.integers(1, 10))
def test_step_pacing_has_equal_steps(start: float, width: int, steps: int) -> None:
    shares = [step_pacing(t, start=start, grow_epochs=width * steps, steps=steps) for t in range(width * steps + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0  # exactly: 0.9999 of n samples would be n - 1
    rises = [after - before for before, after in pairwise(shares)]
    assert rises == pytest.approx(([0] * (width - 1) + [(1 - start) / steps]) * steps, abs=1e-12)


@pytest.mark.parametrize(
    ("pacing", "shares"),
    # At t = 1, 5, 10, 15 and 19 of T = 20, from lambda0 = 0.04, by the published formulas with a calculator.
    [
        ("linear", [0.088, 0.28, 0.52, 0.76, 0.952]),
        ("geometric", [0.0469848, 0.0894427, 0.2, 0.4472136, 0.8513399]),
        ("exponential", [0.0400283, 0.0404873, 0.0464250, 0.1187616, 0.6222523]),
        ("step", [0.04, 0.232, 0.424, 0.616, 0.808]),
    ],
)
def test_other_pacings_match_hand_calculation(pacing: str, shares: list[float]) -> None:
    assert [PACINGS[pacing](epoch, start=0.04, grow_epochs=20) for epoch in (1, 5, 10, 15, 19)] == pytest.approx(
        shares, rel=1e-5
    )
