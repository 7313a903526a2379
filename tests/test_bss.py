"""Laws of BSS-L: its score by hand, its running mean, and draws by it."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmaudit.audit.errors import ManifestError
from mmaudit.audit.metrics import similarity
from mmaudit.rebalance.curriculum import OrderConfig, id_key, order_of
from mmaudit.train.batches import ModelReader, OutputFunction
from mmaudit.train.distributed import SINGLE_PROCESS
from mmaudit.train.network import Outputs
from mmaudit.train.sampling.bss_l import BssL
from mmaudit.train.sampling.config import BssConfig, SamplingConfig
from mmaudit.train.sampling.sampler import Pool

torch.set_num_threads(1)

N = 40
LABEL = np.arange(N) % 3


class Told:
    """A lab whose network says what it is told: fused logits (n, k) and those of m modalities (m, n, k)."""

    def __init__(self, fused: Tensor, unimodal: Tensor) -> None:
        self.outputs = Outputs(fused, unimodal, ())
        self.num_reads = 0

    def read(self, what: OutputFunction) -> Tensor:
        self.num_reads += 1
        return what(self.outputs, torch.from_numpy(LABEL))


def told(seed: int, *, num_modalities: int = 2) -> Told:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1 + num_modalities, N, 3, generator=generator)
    return Told(logits[0], logits[1:])


def as_lab(model_reader: Told) -> ModelReader:
    return cast(ModelReader, model_reader)


def pool_of(balance: NDArray[np.float64]) -> Pool:
    return Pool(
        key=id_key(f"s{row}" for row in range(N)),
        rank=np.zeros(N, np.int64),
        balance=balance,
        p_balanced=np.full(N, np.nan),
        label=LABEL,
        num_classes=3,
        num_modalities=2,
    )


def sampler_of(bss: BssConfig, *, order: OrderConfig | None = None, balance: NDArray[np.float64] | None = None) -> BssL:
    pool = pool_of(np.full(N, np.nan) if balance is None else balance)
    config = SamplingConfig(bss=bss)
    return BssL(pool, config, order or OrderConfig(), batch_size=8, seed=3, distributed=SINGLE_PROCESS)


def score_of(model_reader: Told, *, alpha: float) -> NDArray[np.float64]:
    """Work s out as the paper has it: minmax of the cosine less minmax of the loss."""
    p = model_reader.outputs.unimodal.softmax(dim=2).numpy()
    log_p = torch.cat([model_reader.outputs.fused[None], model_reader.outputs.unimodal]).log_softmax(dim=2).numpy()
    losses = -log_p[:, np.arange(N), LABEL]
    sim, loss = similarity(list(p)), alpha * losses[0] + losses[1:].sum(axis=0)
    scaled = [(each - each.min()) / (each.max() - each.min()) for each in (sim, loss)]
    return np.asarray(scaled[0] - scaled[1], dtype=np.float64)


def score(sampler: BssL) -> NDArray[np.float64]:
    assert sampler.balance is not None
    return sampler.balance


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_the_first_score_is_similarity_less_loss(alpha: float, num_modalities: int) -> None:
    model_reader = told(0, num_modalities=num_modalities)
    sampler = sampler_of(BssConfig(alpha=alpha))
    sampler.begin_epoch(1, as_lab(model_reader))
    assert score(sampler) == pytest.approx(score_of(model_reader, alpha=alpha), abs=1e-5)
    assert np.abs(score(sampler)).max() <= 1


def test_agreement_at_low_loss_scores_1_and_a_sure_error_alone_scores_least() -> None:
    right = 20.0 * torch.eye(3)[LABEL]
    unimodal = torch.stack([right, right])
    unimodal[1, 0] = unimodal[1, 0].roll(1)  # the second modality is sure of another class
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_lab(Told(right, unimodal)))
    assert score(sampler)[0] == pytest.approx(-1)
    assert score(sampler)[1:] == pytest.approx(1)


def test_the_score_is_a_running_mean_of_readings_every_few_epochs() -> None:
    labs = [told(seed) for seed in range(8)]
    sampler = sampler_of(BssConfig(every_epochs=3, beta=0.6))
    for epoch in range(1, 8):
        sampler.begin_epoch(epoch, as_lab(labs[epoch]))
    assert [model_reader.num_reads for model_reader in labs] == [0, 1, 0, 0, 1, 0, 0, 1]
    first, second, third = (score_of(labs[epoch], alpha=1.0) for epoch in (1, 4, 7))
    assert score(sampler) == pytest.approx(0.4 * (0.4 * first + 0.6 * second) + 0.6 * third, abs=1e-5)


def test_beta_1_every_epoch_is_the_form_of_the_code() -> None:
    sampler = sampler_of(BssConfig(every_epochs=1, beta=1.0))
    for epoch in (1, 2):
        sampler.begin_epoch(epoch, as_lab(told(epoch)))
    assert score(sampler) == pytest.approx(score_of(told(2), alpha=1.0), abs=1e-5)


@pytest.mark.parametrize("draw", ["order", "replacement"])
@pytest.mark.parametrize("weight", ["linear", "softmax"])
@pytest.mark.parametrize("source", ["model", "manifest"])
def test_an_epoch_is_the_weighted_order_of_the_scores(draw: str, weight: str, source: str) -> None:
    order = OrderConfig(draw=draw, weight=weight)
    balance = np.linspace(-1, 1, N)
    sampler = sampler_of(BssConfig(score_source=source), order=order, balance=balance)
    sampler.begin_epoch(1, as_lab(told(0)))
    expected = order_of(
        rank=np.zeros(N, np.int64),
        key=sampler.pool.key,
        balance=balance if source == "manifest" else score(sampler),
        config=OrderConfig(order="weighted", draw=draw, weight=weight),
        seed=3,
        epoch=2,
    )
    assert np.concatenate([step.rows for step in sampler.steps(2)]).tolist() == expected.tolist()


def test_scores_of_the_manifest_are_never_read_anew() -> None:
    model_reader = told(0)
    sampler = sampler_of(BssConfig(score_source="manifest", every_epochs=1), balance=np.linspace(-1, 1, N))
    for epoch in range(1, 5):
        sampler.begin_epoch(epoch, as_lab(model_reader))
    assert model_reader.num_reads == 0
    assert score(sampler).tolist() == np.linspace(-1, 1, N).tolist()


def test_a_manifest_without_scores_is_refused_with_the_mend() -> None:
    balance = np.linspace(-1, 1, N)
    balance[[3, 5]] = np.nan
    with pytest.raises(ManifestError, match=r"2 of 40 training samples have none .*rescore .*score_source=model"):
        sampler_of(BssConfig(score_source="manifest"), balance=balance)


def test_equal_outputs_everywhere_score_0_and_one_modality_by_its_loss() -> None:
    same = Told(torch.zeros(N, 3), torch.zeros(2, N, 3))
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_lab(same))
    assert score(sampler).tolist() == [0.0] * N
    alone = told(0, num_modalities=1)
    sampler = sampler_of(BssConfig())
    sampler.begin_epoch(1, as_lab(alone))
    assert score(sampler).max() == 0
    assert score(sampler).min() == -1
