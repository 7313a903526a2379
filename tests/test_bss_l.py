"""Tests of BSS-L: its score by hand, its running mean, and draws by it."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.metrics import similarity
from mmaudit.rebalance.curriculum import OrderConfig, epoch_order, id_keys
from mmaudit.train.batches import ModelReader, OutputFunction
from mmaudit.train.network import Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS
from mmaudit.train.sampling.bss_l import BssConfig, BssL
from mmaudit.train.sampling.sampler import Pool

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
    return Pool(
        key=id_keys(f"s{row}" for row in range(N)),
        rank=np.zeros(N, np.int64),
        discrepancy=np.full(N, np.nan),
        balance=balance,
        p_balanced=np.full(N, np.nan),
        label=LABEL,
        num_classes=3,
        num_modalities=2,
    )


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
