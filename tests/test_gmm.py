"""Tests of the adaptive loss: the formula by hand, its three properties, two stages, and gaps of any shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from training import TwoEqualProcesses

from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.balancing.gmm import GmmConfig, fit_gap_mixture, modality_gap
from mmaudit.train.batches import Batch, Loss, OutputFunction
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)
CPU = torch.device("cpu")
LABEL = torch.tensor([0, 1, 2, 0])
STRONG = torch.tensor([0.90, 0.95, 0.80, 0.90])
GAP = torch.tensor([0.02, 0.10, 0.55, 0.80])  # two balanced, two imbalanced
NET = FusionNet(ModelConfig(modalities=("a",), shapes=((1,),), classes=("x", "y")))
LOSS_WEIGHT = torch.tensor([0.1, 0.2, 0.3, 0.4])


class PlantedGaps:
    """Model reader with planted gaps; it records the rows that are read."""

    def __init__(self, gap: NDArray[np.float64]) -> None:
        self.net, self.num_train, self.gap = NET, len(gap), gap
        self.rows_read: list[RowIndex] = []

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        assert rows is not None
        self.rows_read.append(rows)
        gap = torch.from_numpy(self.gap[rows])
        label = torch.arange(len(gap)) % 3
        return function(make_outputs(torch.full_like(gap, 0.99), gap * 0.98, label), label).float()

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise NotImplementedError

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise NotImplementedError


def make_outputs(strong: Tensor, gap: Tensor, label: Tensor) -> Outputs:
    """Build outputs: true-class probability `strong` in the first modality, less the gap in the second, fused 0.7."""
    is_other = (1 - torch.nn.functional.one_hot(label, 3)).bool()

    def logits(confidence: Tensor) -> Tensor:
        p = confidence[:, None].double().repeat(1, 3)
        return torch.where(is_other, (1 - p) / 2, p).log().requires_grad_()

    unimodal = torch.stack([logits(strong), logits(strong - gap)]).detach().requires_grad_()
    return Outputs(logits(torch.full_like(gap, 0.7)), unimodal, ())


def two_groups(num_samples: int = 3000) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    gap = np.where(rng.random(num_samples) < 0.6, 0.08 + 0.04 * rng.standard_normal(num_samples), 0.7)
    return np.asarray(np.clip(gap + 0.03 * rng.standard_normal(num_samples), 0, 1))


def build_method(
    *, gmm: GmmConfig | None = None, distributed: DistributedContext = SINGLE_PROCESS, epoch: int = 1
) -> Balancer:
    torch.manual_seed(0)
    plan = ModelConfig(modalities=("a", "v"), shapes=((4,), (5,)), classes=("x", "y", "z"), hidden=8, dropout=0.0)
    optim = OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    optimization = Optimization(FusionNet(plan), optim, device="cpu", distributed=distributed)
    optimization.begin_epoch(1, epochs=1)
    config = gmm or GmmConfig(warmup_epochs=0)
    method: Balancer = BALANCERS.load("gmm")(optimization.net, optimization, config, epochs=9)
    method.begin_epoch(epoch, PlantedGaps(two_groups()))
    return method


def make_batch(*, loss_weight: Tensor = LOSS_WEIGHT, present: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(4, 4, generator=generator), torch.randn(4, 5, generator=generator))
    rows = torch.arange(4)
    return Batch(rows=rows, inputs=inputs, label=LABEL, present=present, loss_weight=loss_weight.repeat(3, 1), size=4)


def posteriors(gap: Tensor = GAP) -> NDArray[np.float64]:
    return fit_gap_mixture(read_gaps(), device=CPU).balanced(gap).double().numpy()


def read_gaps() -> NDArray[np.float64]:
    """Return the gaps that a method reads of `two_groups`, at some of its rows."""
    model_reader = PlantedGaps(two_groups())
    build_method().begin_epoch(1, model_reader)
    return np.asarray(0.98 * two_groups()[model_reader.rows_read[0]])


def gradient(method: Balancer, outputs: Outputs, batch: Batch) -> Tensor:
    gradients = torch.autograd.grad(method.loss(outputs, batch), outputs.unimodal)
    return gradients[0]


def test_gap_is_the_largest_minus_the_smallest_confidence() -> None:
    assert modality_gap(make_outputs(STRONG, GAP, LABEL), LABEL).tolist() == pytest.approx(GAP.tolist(), abs=1e-6)
    three = Outputs(torch.zeros(1, 2), torch.tensor([[[0.0, 0.0]], [[np.log(3), 0.0]], [[0.0, np.log(9)]]]), ())
    assert modality_gap(three, torch.tensor([0])).tolist() == pytest.approx([0.75 - 0.1])


def test_loss_by_hand() -> None:
    method, batch = build_method(gmm=GmmConfig(warmup_epochs=0, lam_gap=0.7, lam_align=0.3)), make_batch()
    mixture = fit_gap_mixture(read_gaps(), device=CPU)
    gaps, weights, gamma = GAP.double().numpy(), LOSS_WEIGHT.double().numpy(), posteriors()
    unimodal_loss = -np.log(STRONG.double().numpy()) - np.log((STRONG - GAP).double().numpy())
    excess = np.maximum(gaps - mixture.mean, 0) ** 2 / (2 * mixture.variance)
    align = (weights * (1 - gamma) * excess).sum() / (weights * (1 - gamma)).sum()
    expected = (weights * ((1 + gamma) * -np.log(0.7) + unimodal_loss + 0.7 * (2 - gamma) * gaps)).sum() + 0.3 * align
    assert method.loss(make_outputs(STRONG, GAP, LABEL), batch).item() == pytest.approx(expected, rel=1e-4)


def test_loss_by_hand_with_wide_balanced_gaps() -> None:
    """P = 1 - g, mean 0.5: a gap of 0.1 is partly imbalanced, and not pulled up to the balanced mean."""
    method = build_method(gmm=GmmConfig(warmup_epochs=0, lam_gap=0.0, lam_align=1.0))
    mixture = {"posterior": 1 - torch.linspace(0, 1, 4097), "mean": 0.5, "variance": 0.04}
    method.load_state_dict({"refit": {**mixture, "share": 0.0, "gap": 0.0, "bimodal": True}})
    gaps, weights = GAP.double().numpy(), LOSS_WEIGHT.double().numpy()
    unimodal_loss = -np.log(STRONG.double().numpy()) - np.log((STRONG - GAP).double().numpy())
    align = (weights * gaps * np.array([0, 0, 0.05, 0.3]) ** 2).sum() / (2 * 0.04) / (weights * gaps).sum()
    expected = (weights * ((2 - gaps) * -np.log(0.7) + unimodal_loss)).sum() + align
    assert method.loss(make_outputs(STRONG, GAP, LABEL), make_batch()).item() == pytest.approx(expected, rel=1e-4)


def test_posterior_separates_the_two_groups() -> None:
    gamma = posteriors()
    assert gamma[:2].min() > 0.99
    assert gamma[2:].max() < 0.01
    mixture = fit_gap_mixture(read_gaps(), device=CPU)
    assert mixture.mean == pytest.approx(0.98 * 0.08, abs=0.01)
    assert mixture.variance == pytest.approx(0.01)  # the component's own, 0.05 squared, would let alignment dominate
    assert build_method().epoch_metrics() == pytest.approx(
        {"gmm_balanced": 0.6, "gmm_gap": 0.32, "gmm_bimodal": 1.0}, abs=0.03
    )


@pytest.mark.parametrize("stop_strong", [True, False])
def test_step_down_the_loss_shrinks_every_gap(stop_strong: bool) -> None:
    """The first property, for the gap terms only: every gap is smaller after a small step."""
    batch = make_batch()
    terms = {}
    for lam in (1.0, 0.0):
        outputs = make_outputs(STRONG, GAP, LABEL)
        config = GmmConfig(warmup_epochs=0, lam_gap=lam, lam_align=0.1 * lam, stop_strong=stop_strong)
        terms[lam] = gradient(build_method(gmm=config), outputs, batch)
    step = terms[1.0] - terms[0.0]
    outputs = make_outputs(STRONG, GAP, LABEL)
    after = modality_gap(Outputs(outputs.fused, outputs.unimodal.detach() - 0.1 * step, outputs.features), LABEL)
    assert bool((after < GAP - 1e-4).all())


def test_alignment_moves_only_imbalanced_samples() -> None:
    """The second property: alignment closes only gaps above the balanced mean, larger ones more."""
    batch = make_batch()
    with_alignment = gradient(build_method(), make_outputs(STRONG, GAP, LABEL), batch)
    without_alignment = gradient(
        build_method(gmm=GmmConfig(warmup_epochs=0, lam_align=0.0)), make_outputs(STRONG, GAP, LABEL), batch
    )
    # On the true class's logit of the weaker modality.
    pull = (without_alignment - with_alignment)[1].gather(1, LABEL[:, None]).squeeze(1)
    slope = (STRONG - GAP) * (1 - STRONG + GAP)  # derivative of a confidence by its logit
    per_gap = pull / slope / LOSS_WEIGHT
    assert per_gap[:2].abs().max() < 0.01 * per_gap[3]
    assert 0 < per_gap[2] < per_gap[3]


def test_imbalance_raises_the_gap_weight_and_lowers_the_fused_weight() -> None:
    """The third property, for gradients: 1 + gamma for the fused cross entropy, 2 - gamma for the gap."""
    batch, gamma = make_batch(), posteriors()
    outputs = make_outputs(STRONG, GAP, LABEL)
    loss = build_method(gmm=GmmConfig(warmup_epochs=0, lam_align=0.0)).loss(outputs, batch)
    fused, unimodal = torch.autograd.grad(loss, (outputs.fused, outputs.unimodal))
    fused_weight = fused.gather(1, LABEL[:, None]).squeeze(1) / (0.7 - 1) / LOSS_WEIGHT
    assert fused_weight.tolist() == pytest.approx((1 + gamma).tolist(), rel=1e-4)
    weak = STRONG - GAP
    true_class_gradient = unimodal[1].gather(1, LABEL[:, None]).squeeze(1) / LOSS_WEIGHT
    gap_weight = (true_class_gradient - (weak - 1)) / -(weak * (1 - weak))
    assert gap_weight.tolist() == pytest.approx((2 - gamma).tolist(), rel=1e-3)
    assert fused_weight[1] > fused_weight[2]
    assert gap_weight[1] < gap_weight[2]


def test_stop_strong_leaves_the_stronger_branch_its_own_gradient() -> None:
    """With stop_strong the stronger branch has the gradient of its own cross entropy only; without, less of it."""
    batch = make_batch()
    plain = build_method(gmm=GmmConfig(warmup_epochs=99))
    ordinary = gradient(plain, make_outputs(STRONG, GAP, LABEL), batch)[0]
    stopped = gradient(build_method(), make_outputs(STRONG, GAP, LABEL), batch)[0]
    unstopped = gradient(
        build_method(gmm=GmmConfig(warmup_epochs=0, stop_strong=False)), make_outputs(STRONG, GAP, LABEL), batch
    )[0]
    torch.testing.assert_close(stopped, ordinary)
    true = LABEL[:, None]
    assert bool((unstopped.gather(1, true) > ordinary.gather(1, true)).all())


def test_warm_up_is_the_summed_loss_and_reads_nothing() -> None:
    method, plain, model_reader = (
        build_method(gmm=GmmConfig(warmup_epochs=2)),
        build_method(),
        PlantedGaps(two_groups()),
    )
    summed = BALANCERS.load("sum")(plain.net, plain.optimization, epochs=9)
    outputs, batch = make_outputs(STRONG, GAP, LABEL), make_batch()
    for epoch, is_warm_up in ((1, True), (2, True), (3, False)):
        method.begin_epoch(epoch, model_reader)
        assert torch.equal(method.loss(outputs, batch), summed.loss(outputs, batch)) == is_warm_up
    assert len(model_reader.rows_read) == 1


def test_refit_reads_the_same_fit_rows_every_time() -> None:
    few, many = PlantedGaps(two_groups(300)), PlantedGaps(two_groups(3000))
    method = build_method(gmm=GmmConfig(warmup_epochs=0, fit_rows=500))
    for model_reader in (few, many, many):
        method.begin_epoch(1, model_reader)
    assert few.rows_read[0].tolist() == list(range(300))
    assert len(set(many.rows_read[0].tolist())) == 500
    assert many.rows_read[0].tolist() == many.rows_read[1].tolist()


@pytest.mark.parametrize(
    "gap",
    [
        [0.0] * 50,
        [1.0] * 50,
        [0.3] * 50,
        [0.5],
        [0.1, 0.9],
        list(np.linspace(0, 1, 400)),
        list(np.linspace(0.5, 1, 99)),
    ],
    ids=["none", "all", "constant", "one", "two", "uniform", "none-balanced"],
)
def test_threshold_decides_where_gaps_are_not_bimodal(gap: list[float]) -> None:
    mixture = fit_gap_mixture(np.array(gap), device=CPU)
    assert not mixture.bimodal
    assert mixture.balanced(torch.tensor([0.0, 0.19, 0.21, 1.0])).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert 0 <= mixture.mean <= 0.2
    assert 0.01 - 1e-12 <= mixture.variance <= 0.25
    assert mixture.share == pytest.approx(np.mean(np.array(gap) <= 0.2))


def test_posterior_table_is_monotone() -> None:
    mixture = fit_gap_mixture(read_gaps(), device=CPU)
    gap = torch.linspace(0, 1, 9001)
    gamma = mixture.balanced(gap)
    assert bool((gamma[1:] <= gamma[:-1]).all())
    assert float(gamma[0]) > 0.99
    assert float(gamma[-1]) < 0.01
    assert np.isfinite(gamma.numpy()).all()


def test_sample_with_one_modality_has_the_ordinary_loss() -> None:
    method, batch = build_method(), make_batch()
    lone = torch.zeros_like(LOSS_WEIGHT)
    lone[3] = 1.0
    present = torch.tensor([[True, True]] * 3 + [[True, False]])
    lone_loss = method.loss(make_outputs(STRONG, GAP, LABEL), make_batch(loss_weight=lone, present=present)).item()
    assert lone_loss == pytest.approx(-np.log(0.7) - np.log(0.9) - np.log(0.1), rel=1e-5)
    without = method.loss(make_outputs(STRONG, GAP, LABEL), make_batch(loss_weight=LOSS_WEIGHT * (1 - lone)))
    with_sample = method.loss(make_outputs(STRONG, GAP, LABEL), replace(batch, present=present))
    assert (with_sample - without).item() == pytest.approx(0.4 * lone_loss, rel=1e-4)


def test_two_processes_have_the_loss_of_one() -> None:
    single = build_method().loss(make_outputs(STRONG, GAP, LABEL), make_batch()).item()
    half = (
        build_method(distributed=TwoEqualProcesses())
        .loss(make_outputs(STRONG, GAP, LABEL), make_batch(loss_weight=LOSS_WEIGHT / 2))
        .item()
    )
    assert half == pytest.approx(single / 2, rel=1e-5)


def test_resumed_method_continues_exactly() -> None:
    original, resumed = build_method(epoch=3), build_method(gmm=GmmConfig(warmup_epochs=0), epoch=1)
    resumed.begin_epoch(1, PlantedGaps(np.full(50, 0.1)))
    resumed.net.load_state_dict(original.net.state_dict())
    resumed.load_state_dict(original.state_dict())
    assert resumed.epoch_metrics() == original.epoch_metrics()
    for _ in range(2):
        assert torch.equal(original.step(make_batch())[1], resumed.step(make_batch())[1])
    warming_up = build_method(gmm=GmmConfig(warmup_epochs=5))
    resumed.load_state_dict(warming_up.state_dict())
    assert resumed.epoch_metrics() == {}


def test_training_closes_the_gap_without_degrading_the_stronger() -> None:
    """The weaker modality has learned more than with the summed losses after the same number of steps."""
    generator = torch.Generator().manual_seed(2)
    label = torch.arange(60) % 3
    strong_inputs = torch.randn(60, 4, generator=generator) * 0.3
    weak_inputs = torch.randn(60, 5, generator=generator)
    for rows, size in ((strong_inputs, 3.0), (weak_inputs, 1.0)):
        rows[torch.arange(60), label] += size
    loss_weight = torch.full((3, 60), 1 / 60)
    batch = Batch(
        rows=torch.arange(60),
        inputs=(strong_inputs, weak_inputs),
        label=label,
        present=None,
        loss_weight=loss_weight,
        size=60,
    )
    confidences = []
    for warmup in (99, 0):
        method = build_method(gmm=GmmConfig(warmup_epochs=warmup))
        for group in method.optimization.optimizer.param_groups:
            group["lr"] = 0.05
        for epoch in range(1, 11):
            with torch.no_grad():
                gap = modality_gap(method.net(batch.inputs), label)
            method.begin_epoch(epoch, PlantedGaps(gap.double().numpy() / 0.98))
            for _ in range(10):
                outputs, _ = method.step(batch)
        confidences.append(outputs.confidence(label).mean(dim=1))
    summed, adaptive = confidences
    assert adaptive[2] > summed[2] + 0.05
    assert adaptive[1] > summed[1] - 0.01
    assert adaptive[1] - adaptive[2] < summed[1] - summed[2] - 0.05
