"""Tests of SMV: Shapley values and copies by hand, and the positions of copies."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import make_pool

from mmaudit.audit.metrics import shapley
from mmaudit.rebalance.curriculum import OrderConfig, epoch_order
from mmaudit.train.batches import ModelReader, OutputFunction, Step
from mmaudit.train.network import Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.smv import Smv, SmvConfig, num_copies

torch.set_num_threads(1)

# Logits of class 0 of 2 by audio and visual for five samples of class 0; the fused logit is their sum, correct above 0.
# Correct audio, visual, fused: (yes, yes, yes), (yes, no, yes), (yes, no, no), (no, no, no), (no, yes, yes).
LOGITS = torch.tensor([[1.0, 2.0, 1.0, -1.0, -1.0], [1.0, -1.0, -2.0, -1.0, 2.0]])
# phi^audio, phi^visual by hand, where the value of a set is its size if correct: (1, 1), (1.5, 0.5), (0.5, -0.5),
# (0, 0), (0.5, 1.5); and copies at 1, 0.5, 0, -0.5: 0, 1, 2, 3.
PHI = [[1.0, 1.5, 0.5, 0.0, 0.5], [1.0, 0.5, -0.5, 0.0, 1.5]]
COPIES = [[0, 0, 1, 2, 1], [0, 1, 3, 2, 0]]


class FixedReader:
    """Model reader whose features are logits of class 0 and whose fused logits are their sum."""

    def __init__(self, logits: Tensor = LOGITS) -> None:
        self.said, self.num_reads = logits, 0
        config = SimpleNamespace(modalities=("audio", "visual"), task="classification")
        self.net = SimpleNamespace(config=config, num_modalities=2, tested_logits_of=self.fused_logits)

    @staticmethod
    def fused_logits(features: Sequence[Tensor], used: Sequence[bool]) -> Tensor:
        total = torch.stack(
            [f if is_used else torch.zeros_like(f) for f, is_used in zip(features, used, strict=True)]
        ).sum(dim=0)
        return torch.stack([total, torch.zeros_like(total)], dim=1)

    def read(self, function: OutputFunction) -> Tensor:
        self.num_reads += 1
        features = tuple(self.said)
        label = torch.zeros(self.said.shape[1], dtype=torch.int64)
        return function(
            Outputs(self.fused_logits(features, (True, True)), torch.zeros(2, 5, 2), features), label
        ).float()


def sampler_of(n: int = 5, *, batch_size: int = 4, seed: int = 0, **changes: int) -> Smv:
    pool = make_pool(n)
    config = SmvConfig(**{"warmup_epochs": 0, **changes})
    return Smv(pool, OrderConfig(), config, batch_size=batch_size, seed=seed, distributed=SINGLE_PROCESS)


def begin_epoch(sampler: Smv, epoch: int, model_reader: FixedReader) -> None:
    sampler.begin_epoch(epoch, cast(ModelReader, model_reader))


def rows_and_modalities(steps: Sequence[Step]) -> list[tuple[int, str]]:
    """Return the rows of steps with the modalities used, in order."""
    pairs = []
    for step in steps:
        present = np.ones((len(step.rows), 2), bool) if step.present is None else step.present
        names = {(True, True): "both", (True, False): "audio", (False, True): "visual"}
        pairs += [(row, names[a, v]) for row, (a, v) in zip(step.rows.tolist(), present.tolist(), strict=True)]
    return pairs


def test_copies_by_hand() -> None:
    sampler = sampler_of()
    begin_epoch(sampler, 1, FixedReader())
    assert sampler.copies.tolist() == COPIES
    expected = Counter({(row, "both"): 1 for row in range(5)})
    for name, copies in zip(("audio", "visual"), COPIES, strict=True):
        expected.update({(row, name): number for row, number in enumerate(copies) if number})
    steps = list(sampler.steps(1))
    assert Counter(rows_and_modalities(steps)) == expected
    assert [len(step.rows) for step in steps] == [4, 4, 4, 3]
    assert all(step.fused is None for step in steps)


def test_epoch_metrics_are_mean_values_and_mean_copies() -> None:
    sampler = sampler_of()
    assert sampler.epoch_metrics() == {"copies_0": 0.0, "copies_1": 0.0}
    begin_epoch(sampler, 1, FixedReader())
    assert sampler.epoch_metrics() == pytest.approx(
        {
            "shapley_audio": np.mean(PHI[0]),
            "shapley_visual": np.mean(PHI[1]),
            "copies_audio": np.mean(COPIES[0]),
            "copies_visual": np.mean(COPIES[1]),
        }
    )


def test_num_copies_by_hand() -> None:
    assert num_copies(np.array(PHI, np.float32).T, max_copies=3).T.tolist() == COPIES
    assert num_copies(np.array(PHI, np.float32).T, max_copies=1).max() == 1
    # Three modalities: the smallest value is -1, so that a third of the way from 1 to it is one copy of three.
    value = np.array([[1.0, 1 / 3, 0.3], [0.0, -1 / 3, -1.0]], np.float32)
    assert num_copies(value, max_copies=3).tolist() == [[0, 1, 2], [2, 2, 3]]


@given(st.lists(st.floats(-2, 3, width=32), min_size=2, max_size=40), st.integers(2, 4), st.integers(1, 5))
def test_lower_values_get_more_copies(values: list[float], m: int, max_copies: int) -> None:
    column = np.sort(np.array(values, np.float32))
    copies = num_copies(np.repeat(column[:, None], m, axis=1), max_copies=max_copies)[:, 0].astype(int)
    assert (np.diff(copies) <= 0).all()
    assert copies.min() >= 0
    assert copies.max() <= max_copies
    assert (copies[column >= 1] == 0).all()
    assert (copies[column < 0.99] > 0).all()


def test_model_is_evaluated_every_few_epochs_after_warm_up() -> None:
    model_reader, sampler = FixedReader(), sampler_of(warmup_epochs=2, every_epochs=3)
    reads = []
    for epoch in range(1, 10):
        begin_epoch(sampler, epoch, model_reader)
        reads.append(model_reader.num_reads)
    assert reads == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_form_of_the_authors_code_evaluates_before_every_epoch_after_five() -> None:
    model_reader, sampler = FixedReader(), sampler_of(warmup_epochs=SmvConfig().warmup_epochs, every_epochs=1)
    reads = []
    for epoch in range(1, 10):
        begin_epoch(sampler, epoch, model_reader)
        reads.append(model_reader.num_reads)
    assert reads == [0, 0, 0, 0, 0, 1, 2, 3, 4]


def test_values_and_copies_of_all_eight_outcomes() -> None:
    """For two modalities: with v(S) = |S| if correct, phi_a = (v(a) + v(av) - v(v)) / 2, and copies by phi, by hand.

    1 copy at phi = 1/2, 2 at 0, 3 at -1/2, none from 1 on; the other modality is left out of a copy.
    """
    for audio, visual, both in itertools.product((0, 1), repeat=3):
        phi = np.array([[(audio + 2 * both - visual) / 2, (visual + 2 * both - audio) / 2]], np.float32)
        table = {-0.5: 3, 0.0: 2, 0.5: 1, 1.0: 0, 1.5: 0}
        correct = {
            frozenset(subset): np.array([bool(value)])
            for subset, value in (((), 0), ((0,), audio), ((1,), visual), ((0, 1), both))
        }
        values = shapley(lambda subset, correct=correct: len(subset) * correct[subset], 2)  # type: ignore[misc]
        assert values.tolist() == phi.tolist()
        assert num_copies(values, max_copies=3).tolist() == [[table[value] for value in phi[0].tolist()]]


def test_new_evaluation_replaces_the_old_one() -> None:
    sampler = sampler_of(every_epochs=1)
    begin_epoch(sampler, 1, FixedReader())
    begin_epoch(sampler, 2, FixedReader(torch.ones(2, 5)))  # all sets are correct
    assert sampler.copies.tolist() == [[0] * 5] * 2
    assert rows_and_modalities(list(sampler.steps(2))) == [
        (row, "both") for step in sampler.steps(2) for row in step.rows.tolist()
    ]


def test_epoch_before_the_first_evaluation_is_uniform() -> None:
    sampler = sampler_of(30)
    pool = sampler.pool
    order = epoch_order(rank=pool.rank, key=pool.key, config=OrderConfig(order="shuffled"), seed=0, epoch=2)
    assert [row for row, _ in rows_and_modalities(list(sampler.steps(2)))] == order.tolist()
    assert all(step.present is None for step in sampler.steps(2))


def test_copies_are_spread_over_the_epoch() -> None:
    """Positions of originals and copies are uncorrelated and equally distributed."""
    sampler = sampler_of(1_000, batch_size=64)
    sampler.copies = np.ones((2, 1_000), np.int16)
    order = rows_and_modalities(list(sampler.steps(1)))
    position_of = {pair: number for number, pair in enumerate(order)}
    originals, audio, visual = (
        np.array([position_of[row, name] for row in range(1_000)]) for name in ("both", "audio", "visual")
    )
    assert abs(np.corrcoef([originals, audio, visual]) - np.eye(3)).max() < 4 / np.sqrt(1_000)
    for places in (originals, audio, visual):
        assert places.mean() == pytest.approx(1_500, abs=4 * 866 / np.sqrt(1_000))
