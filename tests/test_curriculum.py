"""Tests of curriculum orders: they depend on ids, seed and epoch only, and draws match closed forms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.hashing import splitmix64
from mmaudit.rebalance.curriculum import (
    ORDERS,
    PACINGS,
    OrderConfig,
    batch_rows,
    epoch_order,
    id_keys,
    num_steps,
    root_pacing,
    step_pacing,
    with_validation,
)

START = st.floats(0.01, 1)
GROW = st.integers(1, 200)
CONFIGS = st.builds(
    OrderConfig,
    order=st.sampled_from(sorted(ORDERS)),
    pacing=st.sampled_from(sorted(PACINGS)),
    start=START,
    grow_epochs=st.integers(1, 30),
    steps=st.integers(1, 9),
    draw=st.sampled_from(["order", "replacement"]),
    weight=st.sampled_from(["linear", "softmax"]),
)
# Few scores, so that many samples share a rank.
BALANCE = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=60)
PURE = [
    OrderConfig(order=order, draw=draw, weight=weight, start=0.5)
    for order, draw, weight in [
        ("curriculum", "order", "linear"),
        ("anti-curriculum", "order", "linear"),
        ("shuffled", "order", "linear"),
        ("weighted", "order", "linear"),
        ("weighted", "order", "softmax"),
        ("weighted", "replacement", "linear"),
        ("weighted", "replacement", "softmax"),
    ]
]


def columns_of(balance: list[float], *, first_id: int = 0) -> dict[str, Any]:
    """Return rank, balance and key of a manifest; equal scores share a rank."""
    scores = np.array(balance)
    rank = (scores[:, None] < scores).sum(axis=1).astype(np.int32)
    return {"rank": rank, "balance": scores, "key": id_keys(f"s{first_id + row}" for row in range(len(scores)))}


def paced_rows(columns: dict[str, Any], config: OrderConfig, epoch: int) -> set[int]:
    """Select the rows of a curriculum by a full sort by rank and key."""
    side = 1 if config.order == "curriculum" else -1
    by_rank = sorted(range(len(columns["key"])), key=lambda row: (side * columns["rank"][row], columns["key"][row]))
    return set(by_rank[: max(1, math.floor(len(by_rank) * config.share(epoch)))])


def test_default_pacing_is_that_of_the_paper() -> None:
    assert OrderConfig().share(1) == pytest.approx(0.1864, abs=1e-4)
    assert [OrderConfig().share(epoch) for epoch in range(1, 60)] == [
        root_pacing(epoch, start=0.1, grow_epochs=40) for epoch in range(1, 60)
    ]


# --- rows of an epoch


@given(BALANCE, CONFIGS, st.integers(0, 99), st.integers(1, 40))
def test_epoch_has_the_expected_rows(balance: list[float], config: OrderConfig, seed: int, epoch: int) -> None:
    columns = columns_of(balance)
    before = {name: column.tolist() for name, column in columns.items()}
    order = epoch_order(**columns, config=config, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert {name: column.tolist() for name, column in columns.items()} == before
    all_rows = set(range(len(balance)))
    if config.order.endswith("curriculum"):
        assert set(order.tolist()) == paced_rows(columns, config, epoch)
    elif config.order == "weighted" and config.draw == "replacement":
        assert len(order) == len(balance)
        assert set(order.tolist()) <= all_rows
        return
    else:
        assert set(order.tolist()) == all_rows
    assert len(set(order.tolist())) == len(order)


@given(BALANCE, CONFIGS, st.integers(1, 40), st.randoms(use_true_random=False))
def test_order_depends_on_ids_not_on_rows(balance: list[float], config: OrderConfig, epoch: int, rnd: Any) -> None:
    columns = columns_of(balance)
    permutation = list(range(len(balance)))
    rnd.shuffle(permutation)
    order = epoch_order(**columns, config=config, seed=3, epoch=epoch)
    permuted_order = epoch_order(
        **{name: column[permutation] for name, column in columns.items()}, config=config, seed=3, epoch=epoch
    )
    assert np.array(permutation)[permuted_order].tolist() == order.tolist()


@pytest.mark.parametrize("config", PURE)
def test_row_order_does_not_matter_with_nearly_equal_keys(config: OrderConfig) -> None:
    # 2^17 rows leave 46 bits for the word, and keys that differ in their lowest bits alone do not fit in.
    n = 2**17
    key = np.arange(n, dtype=np.uint64)
    rank, balance = np.zeros(n, np.int32), np.full(n, 0.3, np.float32)
    permutation = np.random.default_rng(0).permutation(n)
    order = epoch_order(rank=rank, balance=balance, key=key, config=config, seed=0, epoch=1)
    permuted_order = epoch_order(rank=rank, balance=balance, key=key[permutation], config=config, seed=0, epoch=1)
    assert (permutation[permuted_order] == order).all()


@given(BALANCE, st.sampled_from(sorted(PACINGS)), st.sampled_from(["curriculum", "anti-curriculum"]))
def test_rows_of_an_epoch_stay_in_later_ones(balance: list[float], pacing: str, order: str) -> None:
    config = OrderConfig(order=order, pacing=pacing, start=0.05, grow_epochs=10)
    rows_by_epoch = [
        set(epoch_order(**columns_of(balance), config=config, seed=0, epoch=epoch).tolist()) for epoch in range(1, 12)
    ]
    assert all(before <= after for before, after in pairwise(rows_by_epoch))
    assert len(rows_by_epoch[-1]) == len(balance)


@given(st.integers(2, 60), st.integers(1, 20))
def test_anti_curriculum_uses_the_least_balanced(n: int, epoch: int) -> None:
    columns = columns_of(np.random.default_rng(n).permutation(np.linspace(-1, 1, n)).tolist())
    config = OrderConfig(order="anti-curriculum", start=0.05, grow_epochs=20)
    backward = epoch_order(**columns, config=config, seed=0, epoch=epoch)
    forward = epoch_order(**columns, config=OrderConfig(start=0.05, grow_epochs=20), seed=0, epoch=epoch)
    assert len(backward) == len(forward)
    assert sorted(columns["rank"][backward]) == sorted(n - 1 - columns["rank"][forward])


# --- order of the rows


@pytest.mark.parametrize("config", PURE)
def test_orders_differ_by_epoch_and_seed(config: OrderConfig) -> None:
    columns = columns_of(np.linspace(-1, 1, 50).tolist())
    pairs = [(seed, epoch) for seed in range(12) for epoch in range(1, 13)]
    orders = [tuple(epoch_order(**columns, config=config, seed=seed, epoch=epoch)) for seed, epoch in pairs]
    assert len(set(orders)) == 144  # seed 1, epoch 12 is not seed 12, epoch 1, nor 112
    assert orders == [tuple(epoch_order(**columns, config=config, seed=seed, epoch=epoch)) for seed, epoch in pairs]


@pytest.mark.parametrize("key", [np.arange(5, dtype=np.uint64), np.arange(5, dtype=np.uint64) << np.uint64(60)])
def test_permutations_are_equally_likely(key: NDArray[np.uint64]) -> None:
    # Also for keys that are not hashes.
    shuffled = OrderConfig(order="shuffled")
    counts = Counter(
        tuple(epoch_order(rank=np.zeros(5, np.int32), key=key, config=shuffled, seed=0, epoch=epoch))
        for epoch in range(1, 6001)
    )
    assert len(counts) == 120
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_orders_are_uncorrelated() -> None:
    n = 20_000
    key = np.arange(n, dtype=np.uint64)
    positions = [np.argsort(key)]
    for seed, epoch in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        order = epoch_order(rank=key.astype(int), key=key, config=OrderConfig(order="shuffled"), seed=seed, epoch=epoch)
        positions.append(np.argsort(order))
    correlation = np.abs(np.array(np.corrcoef(positions)) - np.eye(len(positions)))
    assert correlation.max() < 4 / math.sqrt(n)


def test_splitmix64_matches_the_published_sequence() -> None:
    # The first numbers of SplitMix64 from state 1234567, as published with its reference code.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * gamma) % 2**64 for step in range(5)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_splitmix64_flips_half_of_the_bits() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 4_000, dtype=np.uint64)
    for bit in range(64):
        changed = splitmix64(words) ^ splitmix64(words ^ (np.uint64(1) << np.uint64(bit)))
        flipped = np.unpackbits(changed.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert np.abs(flipped - 0.5).max() < 5 * 0.5 / math.sqrt(len(words))


# --- weighted draws

WEIGHT_OF: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "linear": lambda balance: 1.01 + balance,
    "softmax": np.exp,
}


@pytest.mark.parametrize("weight", WEIGHT_OF)
def test_draws_without_replacement_match_the_closed_form(weight: str) -> None:
    columns = columns_of([-0.9, -0.2, 0.4, 1.0])
    chance = WEIGHT_OF[weight](columns["balance"])
    chance /= chance.sum()
    config = OrderConfig(order="weighted", weight=weight)
    draws = 8_000
    orders = [epoch_order(**columns, config=config, seed=seed, epoch=1) for seed in range(draws)]
    counts = Counter((int(order[0]), int(order[1])) for order in orders)
    pairs = [(first, second) for first in range(4) for second in range(4) if first != second]
    # P(first, second) = p_first p_second / (1 - p_first)
    expected = [draws * chance[first] * chance[second] / (1 - chance[first]) for first, second in pairs]
    assert chisquare([counts[pair] for pair in pairs], expected).pvalue > 1e-3


@pytest.mark.parametrize("weight", WEIGHT_OF)
def test_draws_with_replacement_are_proportional_to_weights(weight: str) -> None:
    levels = np.array([-1.0, -0.3, 0.0, 0.6, 1.0])
    n = 50_000
    level_of_row = np.random.default_rng(0).integers(0, len(levels), n)
    columns = {"rank": np.zeros(n, np.int32), "balance": levels[level_of_row], "key": id_keys(map(str, range(n)))}
    config = OrderConfig(order="weighted", draw="replacement", weight=weight)
    order = epoch_order(**columns, config=config, seed=0, epoch=1)
    chance = WEIGHT_OF[weight](columns["balance"])
    chance /= chance.sum()
    of_level = np.bincount(level_of_row, weights=chance) * n
    assert chisquare(np.bincount(level_of_row[order], minlength=len(levels)), of_level).pvalue > 1e-3
    # Early and late draws have the same distribution; the number of rows never drawn follows the binomial.
    assert chisquare(np.bincount(level_of_row[order[: n // 5]], minlength=len(levels)), of_level / 5).pvalue > 1e-3
    by_key = np.argsort(np.argsort(columns["key"]))
    assert abs(float(np.corrcoef(by_key[order], np.arange(n))[0, 1])) < 4 / math.sqrt(n)
    left_out = n - len(np.unique(order))
    assert left_out == pytest.approx(np.sum((1 - chance) ** n), abs=4 * math.sqrt(left_out))


@pytest.mark.slow
def test_more_than_2_to_the_24_rows_are_all_drawn_once() -> None:
    n = 2**24 + 3  # above the limit of torch.multinomial
    config = OrderConfig(order="weighted")
    order = epoch_order(
        rank=np.broadcast_to(np.int8(0), n),
        balance=np.broadcast_to(np.float32(0.5), n),
        key=np.arange(n, dtype=np.uint64),
        config=config,
        seed=0,
        epoch=1,
    )
    is_drawn = np.zeros(n, dtype=bool)
    is_drawn[order] = True
    assert len(order) == n
    assert is_drawn.all()
    assert (order[: n // 2] >= n // 2).mean() == pytest.approx(0.5, abs=0.001)


# --- steps


@given(st.integers(1, 80), st.integers(1, 90))
def test_steps_partition_the_order(n: int, batch_size: int) -> None:
    order = np.random.default_rng(n).permutation(n)
    steps = [
        batch_rows(order, step=step, batch_size=batch_size) for step in range(num_steps(order, batch_size=batch_size))
    ]
    assert np.concatenate(steps).tolist() == order.tolist()
    assert {len(step) for step in steps[:-1]} <= {batch_size}
    assert 0 < len(steps[-1]) <= batch_size


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "curicculum"}, r"order\.order is 'curicculum'; did you mean curriculum\? \(available: .*shuffled"),
        ({"pacing": "log"}, r"order\.pacing is 'log'; .*root, linear, step, geometric, exponential"),
        ({"draw": "replace"}, r"order\.draw is 'replace'; did you mean replacement\?"),
        ({"weight": "soft"}, r"order\.weight is 'soft'; did you mean softmax\?"),
        ({"start": 0.0}, r"order\.start is 0\.0; it must lie in \(0, 1\]"),
        ({"start": math.nan}, r"order\.start is nan; it must lie"),
        ({"start": 1.5}, r"order\.start is 1\.5; it must lie"),
        ({"grow_epochs": 0}, r"order\.grow_epochs is 0; it must be at least 1"),
        ({"steps": 0}, r"order\.steps is 0; it must be at least 1"),
    ],
)
def test_invalid_order_config_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OrderConfig(**options)


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        (None, r"a weighted order needs balance scores; none found: rescore with mmaudit score"),
        ([0.5, math.nan, math.nan], r"2 of 3 balance scores .* \(row 1 has nan\)"),
        ([0.5, 0.1, -1.02], r"1 of 3 balance scores are not in \[-1, 1\] \(row 2 has -1\.02\)"),
        ([0.5], r"balance has shape \(1,\), expected \(3,\) as rank"),
    ],
)
def test_weighted_order_needs_all_scores(balance: list[float] | None, message: str) -> None:
    columns = {**columns_of([0, 0, 0]), "balance": None if balance is None else np.array(balance)}
    with pytest.raises(ManifestError, match=message):
        epoch_order(**columns, config=OrderConfig(order="weighted"), seed=0, epoch=1)


def test_orders_by_rank_need_no_scores() -> None:
    columns = columns_of([0.1, 0.2, 0.3])
    order = epoch_order(rank=columns["rank"], key=columns["key"], config=OrderConfig(grow_epochs=1), seed=0, epoch=1)
    assert sorted(order) == [0, 1, 2]


def test_invalid_epochs_and_columns_raise() -> None:
    columns = columns_of([0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="epoch 0: it must be at least 1"):
        epoch_order(**columns, config=OrderConfig(), seed=0, epoch=0)
    with pytest.raises(ManifestError, match=r"key has shape \(2,\), expected \(3,\) as rank"):
        epoch_order(**{**columns, "key": columns["key"][:2]}, config=OrderConfig(), seed=0, epoch=1)
    with pytest.raises(ManifestError, match="no samples to order"):
        epoch_order(**{name: column[:0] for name, column in columns.items()}, config=OrderConfig(), seed=0, epoch=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "step 3 of 10 samples in batches of 4: .* between 0 and 2"),
        ({"step": -1}, "step -1 of 10 samples"),
        ({"batch_size": 0}, "batches of 0"),
    ],
)
def test_invalid_step_raises(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batch_rows(np.arange(10), **{"step": 0, "batch_size": 4, **options})


# Pacing functions.


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


def split_table(group: Sequence[str | None]) -> pa.Table:
    names = [f"s{number:03d}" for number in range(len(group))]
    split = ["test"] * 20 + ["train"] * (len(group) - 20)
    return pa.table({"sample_id": names, "label": np.zeros(len(group), np.int32), "split": split, "group": group})


def test_validation_split_takes_whole_groups_and_no_more_rows_than_asked_for() -> None:
    group = [f"g{number}" for number in range(20)] + ["large"] * 60 + [f"s{n // 3}" for n in range(40)]
    table = split_table(group)
    for seed in range(10):
        split = with_validation(table, fraction=0.1, seed=seed)
        drawn = split == "validation"
        assert 8 <= drawn.sum() <= 10
        assert not drawn[:80].any()
        assert all(len(set(drawn[np.array(group) == name].tolist())) == 1 for name in set(group))


def test_validation_split_is_cut_within_groups_where_every_group_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    table = split_table([f"g{number % 2}" for number in range(120)])
    split = with_validation(table, fraction=0.1, seed=0)
    assert (split == "validation").sum() == 10
    assert "no group has as few as 10 training samples (finetune.validation_fraction 0.1 of 100)" in caplog.text
