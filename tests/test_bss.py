"""Tests of BSS: its score by hand, the order that it ranks, its running mean, and draws by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from training import make_pool

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.metrics import similarity
from mmaudit.rebalance.curriculum import OrderConfig, epoch_order
from mmaudit.train.batches import ModelReader, OutputFunction
from mmaudit.train.config import FinetuneConfig, TrainConfig
from mmaudit.train.methods import list_unused, resolve
from mmaudit.train.network import Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.bss import AntiCurriculum, BssConfig, BssH, BssL
from mmaudit.train.sampling.sampler import Ordered, Pool

torch.set_num_threads(1)

N = 40
LABEL = np.arange(N) % 3


class FixedOutputs:
    """Model reader with fixed outputs: fused logits (n, k) and those of m modalities (m, n, k)."""

    def __init__(self, fused: Tensor, unimodal: Tensor) -> None:
        self.outputs = Outputs(fused, unimodal, ())
        self.num_reads = 0

    def read(self, function: OutputFunction) -> Tensor:
        self.num_reads += 1
        return function(self.outputs, torch.from_numpy(LABEL))


def random_outputs(seed: int, *, num_modalities: int = 2) -> FixedOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1 + num_modalities, N, 3, generator=generator)
    return FixedOutputs(logits[0], logits[1:])


def as_model_reader(model_reader: FixedOutputs) -> ModelReader:
    return cast(ModelReader, model_reader)


def pool_of(balance: NDArray[np.float64]) -> Pool:
    return make_pool(N, rank=np.zeros(N, np.int64), balance=balance, label=LABEL, num_classes=3)


def sampler_of(bss: BssConfig, *, order: OrderConfig | None = None, balance: NDArray[np.float64] | None = None) -> BssL:
    pool = pool_of(np.full(N, np.nan) if balance is None else balance)
    return BssL(pool, order or OrderConfig(), bss, batch_size=8, seed=3, distributed=SINGLE_PROCESS)


def expected_score(model_reader: FixedOutputs, *, alpha: float) -> NDArray[np.float64]:
    """Compute s as in the paper: minmax of the cosine minus minmax of the loss."""
    probabilities = model_reader.outputs.unimodal.softmax(dim=2).numpy()
    log_p = torch.cat([model_reader.outputs.fused[None], model_reader.outputs.unimodal]).log_softmax(dim=2).numpy()
    losses = -log_p[:, np.arange(N), LABEL]
    similarities, loss = similarity(list(probabilities)), alpha * losses[0] + losses[1:].sum(axis=0)
    scaled = [(values - values.min()) / (values.max() - values.min()) for values in (similarities, loss)]
    return np.asarray(scaled[0] - scaled[1], dtype=np.float64)


def curriculum_of(
    kind: type[BssH], bss: BssConfig, *, rank: NDArray[np.int64] | None = None, batch_size: int = 8
) -> BssH:
    pool = replace(pool_of(np.full(N, np.nan)), rank=np.arange(N)[::-1].copy() if rank is None else rank)
    return kind(pool, OrderConfig(), bss, batch_size=batch_size, seed=3, distributed=SINGLE_PROCESS)


def rows_of(sampler: Ordered, epoch: int) -> list[int]:
    return [row for step in sampler.steps(epoch) for row in step.rows.tolist()]


def difficulty_of_the_code(model_reader: FixedOutputs) -> NDArray[np.float64]:
    """Compute what the authors' code sorts by, on CREMA-D: 1 - similarity + loss, both scaled to [0, 1]."""
    logits = torch.cat([model_reader.outputs.fused[None], model_reader.outputs.unimodal]).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    fused, audio, visual = -np.log(p[:, np.arange(N), LABEL])
    loss = 0.1 * fused + 0.9 * (audio + visual)
    cosine = (p[1] * p[2]).sum(axis=1) / np.sqrt((p[1] ** 2).sum(axis=1) * (p[2] ** 2).sum(axis=1))
    scaled = [(values - values.min()) / (values.max() - values.min()) for values in (cosine, loss)]
    return np.asarray(1 - scaled[0] + scaled[1])


def running_score(sampler: BssL) -> NDArray[np.float64]:
    assert sampler.balance is not None
    return sampler.balance


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_first_score_is_similarity_minus_loss(alpha: float, num_modalities: int) -> None:
    model_reader = random_outputs(0, num_modalities=num_modalities)
    sampler = sampler_of(BssConfig(alpha=alpha))
    sampler.begin_epoch(1, as_model_reader(model_reader))
    assert running_score(sampler) == pytest.approx(expected_score(model_reader, alpha=alpha), abs=1e-5)
    assert np.abs(running_score(sampler)).max() <= 1


def test_agreement_at_low_loss_scores_1_and_a_confident_error_minus_1() -> None:
    correct_logits = 20.0 * torch.eye(3)[LABEL]
    unimodal = torch.stack([correct_logits, correct_logits])
    unimodal[1, 0] = unimodal[1, 0].roll(1)  # the second modality confidently predicts another class
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_model_reader(FixedOutputs(correct_logits, unimodal)))
    assert running_score(sampler)[0] == pytest.approx(-1)
    assert running_score(sampler)[1:] == pytest.approx(1)


def test_score_is_a_running_mean_over_evaluations() -> None:
    readers = [random_outputs(seed) for seed in range(8)]
    sampler = sampler_of(BssConfig(every_epochs=3, beta=0.6))
    for epoch in range(1, 8):
        sampler.begin_epoch(epoch, as_model_reader(readers[epoch]))
    assert [model_reader.num_reads for model_reader in readers] == [0, 1, 0, 0, 1, 0, 0, 1]
    first, second, third = (expected_score(readers[epoch], alpha=1.0) for epoch in (1, 4, 7))
    assert running_score(sampler) == pytest.approx(0.4 * (0.4 * first + 0.6 * second) + 0.6 * third, abs=1e-5)


def test_beta_1_every_epoch_is_the_form_of_the_authors_code() -> None:
    sampler = sampler_of(BssConfig(every_epochs=1, beta=1.0))
    for epoch in (1, 2):
        sampler.begin_epoch(epoch, as_model_reader(random_outputs(epoch)))
    assert running_score(sampler) == pytest.approx(expected_score(random_outputs(2), alpha=1.0), abs=1e-5)


def test_alpha_of_a_ninth_ranks_by_the_loss_of_the_code_on_crema_d() -> None:
    sampler = sampler_of(BssConfig(alpha=1 / 9))
    sampler.begin_epoch(1, as_model_reader(random_outputs(0)))
    assert running_score(sampler) == pytest.approx(1 - difficulty_of_the_code(random_outputs(0)), abs=1e-5)
    other = sampler_of(BssConfig(alpha=1.0))
    other.begin_epoch(1, as_model_reader(random_outputs(0)))
    assert np.abs(running_score(other) - running_score(sampler)).max() > 0.01


@pytest.mark.parametrize(("kind", "sign"), [(BssH, 1), (AntiCurriculum, -1)])
def test_bss_h_ranks_once_by_the_untrained_model(kind: type[BssH], sign: int) -> None:
    """Epoch t has the floor(40 lambda(t)) samples that the authors' code sorts first: 7 in epoch 1, 28 in epoch 20."""
    readers = [random_outputs(seed) for seed in range(21)]
    sampler = curriculum_of(kind, BssConfig(score_source="model", alpha=1 / 9))
    for epoch in range(1, 21):
        sampler.begin_epoch(epoch, as_model_reader(readers[epoch]))
    assert [reader.num_reads for reader in readers] == [0, 1] + [0] * 19
    sorted_rows = np.argsort(sign * difficulty_of_the_code(readers[1])).tolist()
    for epoch, size in ((1, 7), (20, 28), (40, 40)):
        assert sorted(rows_of(sampler, epoch)) == sorted(sorted_rows[:size])


@pytest.mark.parametrize("source", ["auto", "manifest"])
def test_bss_h_ranks_by_the_manifest_by_default(source: str) -> None:
    model_reader = random_outputs(0)
    sampler = curriculum_of(BssH, BssConfig(score_source=source))
    sampler.begin_epoch(1, as_model_reader(model_reader))
    assert model_reader.num_reads == 0
    assert sorted(rows_of(sampler, 1)) == list(range(N - 7, N))


def test_bss_h_of_a_resumed_run_keeps_the_rank_of_the_untrained_model() -> None:
    config = BssConfig(score_source="model")
    original, resumed = (curriculum_of(BssH, config) for _ in range(2))
    original.begin_epoch(1, as_model_reader(random_outputs(0)))
    resumed.load_state_dict(original.state_dict())
    for sampler in (original, resumed):
        sampler.begin_epoch(2, as_model_reader(random_outputs(1)))
    assert rows_of(resumed, 2) == rows_of(original, 2) != rows_of(curriculum_of(BssH, config), 2)


def test_equal_scores_of_the_model_share_a_rank() -> None:
    sampler = curriculum_of(BssH, BssConfig(score_source="model"))
    sampler.begin_epoch(1, as_model_reader(FixedOutputs(torch.zeros(N, 3), torch.zeros(2, N, 3))))
    assert sampler.rank.tolist() == [0] * N


def test_first_draws_of_the_code_are_proportional_to_1_01_plus_s() -> None:
    """E = 1, beta = 1, an order without replacement: how often a sample comes first, over 4,000 epochs."""
    sampler = sampler_of(BssConfig(every_epochs=1, beta=1.0), order=OrderConfig(draw="order", weight="linear"))
    sampler.begin_epoch(1, as_model_reader(random_outputs(0)))
    weight = 1.01 + expected_score(random_outputs(0), alpha=1.0)
    first_rows = [int(sampler.rows(epoch)[0]) for epoch in range(1, 4_001)]
    assert sorted(sampler.rows(1).tolist()) == list(range(N))
    expected = 4_000 * weight / weight.sum()
    often = expected > 5  # the approximation of the test
    observed = np.bincount(first_rows, minlength=N)
    statistic = ((observed - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < 2 * often.sum()  # 4.5 standard deviations above the number of its terms
    equal = 4_000 / N
    assert ((observed - equal) ** 2 / equal).sum() > 4 * N


@pytest.mark.parametrize(
    ("sampling", "constants", "names"),
    [
        ("bss-h", {"every_epochs": 1, "beta": 1.0, "alpha": 0.5}, ["every_epochs", "beta", "alpha"]),
        ("bss-h", {"score_source": "model", "every_epochs": 1, "alpha": 0.5}, ["every_epochs"]),
        ("anti-curriculum", {"beta": 1.0}, ["beta"]),
        ("bss-l", {"every_epochs": 1, "beta": 1.0, "alpha": 0.5}, []),
        ("bss-l", {"score_source": "manifest", "alpha": 0.5}, ["alpha"]),
    ],
)
def test_constants_without_effect_are_named(sampling: str, constants: dict[str, Any], names: list[str]) -> None:
    config = TrainConfig(finetune=FinetuneConfig(sampling=sampling), sampling={"bss": constants})
    warnings = list_unused(resolve(config))
    assert [text.partition(" = ")[0] for text in warnings] == [f"sampling.bss.{name}" for name in names]
    assert all(" has no effect: " in text for text in warnings)


@pytest.mark.parametrize("draw", ["order", "replacement"])
@pytest.mark.parametrize("weight", ["linear", "softmax"])
@pytest.mark.parametrize("source", ["model", "manifest"])
def test_epoch_is_the_weighted_order_of_the_scores(draw: str, weight: str, source: str) -> None:
    order = OrderConfig(draw=draw, weight=weight)
    balance = np.linspace(-1, 1, N)
    sampler = sampler_of(BssConfig(score_source=source), order=order, balance=balance)
    sampler.begin_epoch(1, as_model_reader(random_outputs(0)))
    expected = epoch_order(
        rank=np.zeros(N, np.int64),
        key=sampler.pool.key,
        balance=balance if source == "manifest" else running_score(sampler),
        config=OrderConfig(order="weighted", draw=draw, weight=weight),
        seed=3,
        epoch=2,
    )
    assert np.concatenate([step.rows for step in sampler.steps(2)]).tolist() == expected.tolist()


def test_manifest_scores_never_evaluate_the_model() -> None:
    model_reader = random_outputs(0)
    sampler = sampler_of(BssConfig(score_source="manifest", every_epochs=1), balance=np.linspace(-1, 1, N))
    for epoch in range(1, 5):
        sampler.begin_epoch(epoch, as_model_reader(model_reader))
    assert model_reader.num_reads == 0
    assert running_score(sampler).tolist() == np.linspace(-1, 1, N).tolist()


def test_manifest_without_scores_raises() -> None:
    balance = np.linspace(-1, 1, N)
    balance[[3, 5]] = np.nan
    with pytest.raises(ManifestError, match=r"2 of 40 training samples have none .*rescore .*score_source=model"):
        sampler_of(BssConfig(score_source="manifest"), balance=balance)


def test_equal_outputs_score_0_and_one_modality_scores_by_its_loss() -> None:
    equal_reader = FixedOutputs(torch.zeros(N, 3), torch.zeros(2, N, 3))
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_model_reader(equal_reader))
    assert running_score(sampler).tolist() == [0.0] * N
    unimodal_reader = random_outputs(0, num_modalities=1)
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_model_reader(unimodal_reader))
    assert running_score(sampler).max() == 0
    assert running_score(sampler).min() == -1
