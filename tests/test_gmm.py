"""Laws of the adaptive loss: the formula by hand, its three properties, two stages, and gaps of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import BalancingConfig, GmmConfig
from mmaudit.train.balancing.gmm import fit_gap_mixture, modality_gap
from mmaudit.train.batches import Batch, Loss, OutputFunction, RowIndex
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig, Outputs
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)
CPU = torch.device("cpu")
LABEL = torch.tensor([0, 1, 2, 0])
STRONG = torch.tensor([0.90, 0.95, 0.80, 0.90])
GAP = torch.tensor([0.02, 0.10, 0.55, 0.80])  # two are balanced and two are not
NET = FusionNet(ModelConfig(modalities=("a",), shapes=((1,),), classes=("x", "y")))
PART = torch.tensor([0.1, 0.2, 0.3, 0.4])


class Twin(DistributedContext):
    """Two processes that see the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


class Planted:
    """A laboratory where gaps are read that were planted; it notes which rows."""

    def __init__(self, gap: NDArray[np.float64]) -> None:
        self.net, self.num_train, self.gap = NET, len(gap), gap
        self.asked: list[RowIndex] = []

    def read(self, what: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        assert rows is not None
        self.asked.append(rows)
        gap = torch.from_numpy(self.gap[rows])
        label = torch.arange(len(gap)) % 3
        return what(said(torch.full_like(gap, 0.99), gap * 0.98, label), label).float()

    def read_validation(self, what: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise NotImplementedError

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise NotImplementedError


def said(strong: Tensor, gap: Tensor, label: Tensor) -> Outputs:
    """Outputs where the first modality gives the true class `strong`, the second less by the gap; fused gives 0.7."""
    rest = (1 - torch.nn.functional.one_hot(label, 3)).bool()

    def logits(confidence: Tensor) -> Tensor:
        p = confidence[:, None].double().repeat(1, 3)
        return torch.where(rest, (1 - p) / 2, p).log().requires_grad_()

    unimodal = torch.stack([logits(strong), logits(strong - gap)]).detach().requires_grad_()
    return Outputs(logits(torch.full_like(gap, 0.7)), unimodal, ())


def two_groups(number: int = 3000) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    gap = np.where(rng.random(number) < 0.6, 0.08 + 0.04 * rng.standard_normal(number), 0.7)
    return np.asarray(np.clip(gap + 0.03 * rng.standard_normal(number), 0, 1))


def make(*, gmm: GmmConfig | None = None, distributed: DistributedContext = SINGLE_PROCESS, epoch: int = 1) -> Balancer:
    torch.manual_seed(0)
    plan = ModelConfig(modalities=("a", "v"), shapes=((4,), (5,)), classes=("x", "y", "z"), hidden=8, dropout=0.0)
    optim = OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    optimization = Optimization(FusionNet(plan), optim, device="cpu", distributed=distributed)
    optimization.begin_epoch(1, epochs=1)
    config = BalancingConfig(gmm=gmm or GmmConfig(warmup_epochs=0))
    method = build_balancer("gmm", optimization.net, optimization, config, epochs=9)
    method.begin_epoch(epoch, Planted(two_groups()))
    return method


def batch(*, loss_weight: Tensor = PART, present: Tensor | None = None) -> Batch:
    chance = torch.Generator().manual_seed(1)
    inputs = (torch.randn(4, 4, generator=chance), torch.randn(4, 5, generator=chance))
    rows = torch.arange(4)
    return Batch(rows=rows, inputs=inputs, label=LABEL, present=present, loss_weight=loss_weight.repeat(3, 1), size=4)


def gammas(gap: Tensor = GAP) -> NDArray[np.float64]:
    return fit_gap_mixture(read_gaps(), device=CPU).balanced(gap).double().numpy()


def read_gaps() -> NDArray[np.float64]:
    """What a method reads of `two_groups`, at some of its rows."""
    model_reader = Planted(two_groups())
    make().begin_epoch(1, model_reader)
    return np.asarray(0.98 * two_groups()[model_reader.asked[0]])


def gradient(method: Balancer, outputs: Outputs, given: Batch) -> Tensor:
    found = torch.autograd.grad(method.loss(outputs, given), outputs.unimodal)
    return found[0]


def test_the_gap_is_the_most_less_the_least_confidence() -> None:
    assert modality_gap(said(STRONG, GAP, LABEL), LABEL).tolist() == pytest.approx(GAP.tolist(), abs=1e-6)
    three = Outputs(torch.zeros(1, 2), torch.tensor([[[0.0, 0.0]], [[np.log(3), 0.0]], [[0.0, np.log(9)]]]), ())
    assert modality_gap(three, torch.tensor([0])).tolist() == pytest.approx([0.75 - 0.1])


def test_the_loss_by_hand() -> None:
    method, given = make(gmm=GmmConfig(warmup_epochs=0, lam_gap=0.7, lam_align=0.3)), batch()
    known = fit_gap_mixture(read_gaps(), device=CPU)
    g, w, gamma = GAP.double().numpy(), PART.double().numpy(), gammas()
    own = -np.log(STRONG.double().numpy()) - np.log((STRONG - GAP).double().numpy())
    excess = np.maximum(g - known.mean, 0) ** 2 / (2 * known.variance)
    align = (w * (1 - gamma) * excess).sum() / (w * (1 - gamma)).sum()
    wanted = (w * ((1 + gamma) * -np.log(0.7) + own + 0.7 * (2 - gamma) * g)).sum() + 0.3 * align
    assert method.loss(said(STRONG, GAP, LABEL), given).item() == pytest.approx(wanted, rel=1e-4)


def test_the_loss_by_hand_where_balanced_gaps_are_wide() -> None:
    """P = 1 - g, mean 0.5: a gap of 0.1 is partly imbalanced, and not drawn up to the balanced mean."""
    method = make(gmm=GmmConfig(warmup_epochs=0, lam_gap=0.0, lam_align=1.0))
    known = {"posterior": 1 - torch.linspace(0, 1, 4097), "mean": 0.5, "variance": 0.04}
    method.load_state_dict({"refit": {**known, "share": 0.0, "gap": 0.0, "bimodal": True}})
    g, w = GAP.double().numpy(), PART.double().numpy()
    own = -np.log(STRONG.double().numpy()) - np.log((STRONG - GAP).double().numpy())
    align = (w * g * np.array([0, 0, 0.05, 0.3]) ** 2).sum() / (2 * 0.04) / (w * g).sum()
    wanted = (w * ((2 - g) * -np.log(0.7) + own)).sum() + align
    assert method.loss(said(STRONG, GAP, LABEL), batch()).item() == pytest.approx(wanted, rel=1e-4)


def test_the_posterior_parts_the_two_groups() -> None:
    gamma = gammas()
    assert gamma[:2].min() > 0.99
    assert gamma[2:].max() < 0.01
    known = fit_gap_mixture(read_gaps(), device=CPU)
    assert known.mean == pytest.approx(0.98 * 0.08, abs=0.01)
    assert known.variance == pytest.approx(0.01)  # that of the component, 0.05 squared, would make alignment all
    assert make().epoch_metrics() == pytest.approx({"gmm_balanced": 0.6, "gmm_gap": 0.32, "gmm_bimodal": 1.0}, abs=0.03)


@pytest.mark.parametrize("stop_strong", [True, False])
def test_a_step_down_the_loss_shrinks_every_gap(stop_strong: bool) -> None:
    """The first property, of the terms of the gap alone: every gap is smaller after a small step."""
    given = batch()
    terms = {}
    for lam in (1.0, 0.0):
        outputs = said(STRONG, GAP, LABEL)
        config = GmmConfig(warmup_epochs=0, lam_gap=lam, lam_align=0.1 * lam, stop_strong=stop_strong)
        terms[lam] = gradient(make(gmm=config), outputs, given)
    step = terms[1.0] - terms[0.0]
    outputs = said(STRONG, GAP, LABEL)
    after = modality_gap(Outputs(outputs.fused, outputs.unimodal.detach() - 0.1 * step, outputs.features), LABEL)
    assert bool((after < GAP - 1e-4).all())


def test_imbalanced_samples_are_drawn_to_the_balanced_ones_and_no_others() -> None:
    """The second property: alignment alone closes gaps beyond the balanced mean, the further the stronger."""
    given = batch()
    with_it = gradient(make(), said(STRONG, GAP, LABEL), given)
    without = gradient(make(gmm=GmmConfig(warmup_epochs=0, lam_align=0.0)), said(STRONG, GAP, LABEL), given)
    pull = (without - with_it)[1].gather(1, LABEL[:, None]).squeeze(1)  # on the true class's logit, of the lagging one
    slope = (STRONG - GAP) * (1 - STRONG + GAP)  # of a confidence by its logit
    per_gap = pull / slope / PART
    assert per_gap[:2].abs().max() < 0.01 * per_gap[3]
    assert 0 < per_gap[2] < per_gap[3]


def test_gaps_weigh_more_and_the_fused_answer_less_with_imbalance() -> None:
    """The third property, on gradients: 1 + gamma on the fused cross entropy's, 2 - gamma on the gap's."""
    given, gamma = batch(), gammas()
    outputs = said(STRONG, GAP, LABEL)
    loss = make(gmm=GmmConfig(warmup_epochs=0, lam_align=0.0)).loss(outputs, given)
    fused, own = torch.autograd.grad(loss, (outputs.fused, outputs.unimodal))
    fused_weight = fused.gather(1, LABEL[:, None]).squeeze(1) / (0.7 - 1) / PART
    assert fused_weight.tolist() == pytest.approx((1 + gamma).tolist(), rel=1e-4)
    weak = STRONG - GAP
    own_true = own[1].gather(1, LABEL[:, None]).squeeze(1) / PART
    gap_weight = (own_true - (weak - 1)) / -(weak * (1 - weak))
    assert gap_weight.tolist() == pytest.approx((2 - gamma).tolist(), rel=1e-3)
    assert fused_weight[1] > fused_weight[2]
    assert gap_weight[1] < gap_weight[2]


def test_a_gap_is_not_closed_by_spoiling_the_stronger() -> None:
    """With stop_strong the stronger branch has the gradient of its own cross entropy alone; without, less of it."""
    given = batch()
    plain = make(gmm=GmmConfig(warmup_epochs=99))
    kept = gradient(plain, said(STRONG, GAP, LABEL), given)[0]
    stopped = gradient(make(), said(STRONG, GAP, LABEL), given)[0]
    open_ = gradient(make(gmm=GmmConfig(warmup_epochs=0, stop_strong=False)), said(STRONG, GAP, LABEL), given)[0]
    torch.testing.assert_close(stopped, kept)
    true = LABEL[:, None]
    assert bool((open_.gather(1, true) > kept.gather(1, true)).all())


def test_the_warm_up_is_the_sum_and_reads_nothing() -> None:
    method, plain, model_reader = make(gmm=GmmConfig(warmup_epochs=2)), make(), Planted(two_groups())
    summed = build_balancer("sum", plain.net, plain.optimization, BalancingConfig(), epochs=9)
    outputs, given = said(STRONG, GAP, LABEL), batch()
    for epoch, same in ((1, True), (2, True), (3, False)):
        method.begin_epoch(epoch, model_reader)
        assert torch.equal(method.loss(outputs, given), summed.loss(outputs, given)) == same
    assert len(model_reader.asked) == 1


def test_a_refit_reads_as_many_rows_as_it_may_and_always_the_same() -> None:
    few, many = Planted(two_groups(300)), Planted(two_groups(3000))
    method = make(gmm=GmmConfig(warmup_epochs=0, fit_rows=500))
    for model_reader in (few, many, many):
        method.begin_epoch(1, model_reader)
    assert few.asked[0].tolist() == list(range(300))
    assert len(set(many.asked[0].tolist())) == 500
    assert many.asked[0].tolist() == many.asked[1].tolist()


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
def test_where_there_are_no_two_groups_the_threshold_decides(gap: list[float]) -> None:
    found = fit_gap_mixture(np.array(gap), device=CPU)
    assert not found.bimodal
    assert found.balanced(torch.tensor([0.0, 0.19, 0.21, 1.0])).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert 0 <= found.mean <= 0.2
    assert 0.01 - 1e-12 <= found.variance <= 0.25
    assert found.share == pytest.approx(np.mean(np.array(gap) <= 0.2))


def test_the_table_is_the_posterior() -> None:
    found = fit_gap_mixture(read_gaps(), device=CPU)
    gap = torch.linspace(0, 1, 9001)
    gamma = found.balanced(gap)
    assert bool((gamma[1:] <= gamma[:-1]).all())
    assert float(gamma[0]) > 0.99
    assert float(gamma[-1]) < 0.01
    assert np.isfinite(gamma.numpy()).all()


def test_a_sample_without_a_modality_has_the_ordinary_loss() -> None:
    method, given = make(), batch()
    lone = torch.zeros_like(PART)
    lone[3] = 1.0
    present = torch.tensor([[True, True]] * 3 + [[True, False]])
    found = method.loss(said(STRONG, GAP, LABEL), batch(loss_weight=lone, present=present)).item()
    assert found == pytest.approx(-np.log(0.7) - np.log(0.9) - np.log(0.1), rel=1e-5)
    unheard = method.loss(said(STRONG, GAP, LABEL), batch(loss_weight=PART * (1 - lone)))
    both = method.loss(said(STRONG, GAP, LABEL), replace(given, present=present))
    assert (both - unheard).item() == pytest.approx(0.4 * found, rel=1e-4)


def test_two_processes_are_one() -> None:
    whole = make().loss(said(STRONG, GAP, LABEL), batch()).item()
    half = make(distributed=Twin(world_size=2)).loss(said(STRONG, GAP, LABEL), batch(loss_weight=PART / 2)).item()
    assert half == pytest.approx(whole / 2, rel=1e-5)


def test_a_resumed_run_goes_on_exactly() -> None:
    one, other = make(epoch=3), make(gmm=GmmConfig(warmup_epochs=0), epoch=1)
    other.begin_epoch(1, Planted(np.full(50, 0.1)))
    other.net.load_state_dict(one.net.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.epoch_metrics() == one.epoch_metrics()
    for _ in range(2):
        assert torch.equal(one.step(batch())[1], other.step(batch())[1])
    warm = make(gmm=GmmConfig(warmup_epochs=5))
    other.load_state_dict(warm.state_dict())
    assert other.epoch_metrics() == {}


def test_training_closes_the_gap_and_spoils_nothing() -> None:
    """One modality tells the class, the other a little: beside the sum of losses the second has learnt more by then."""
    chance = torch.Generator().manual_seed(2)
    label = torch.arange(60) % 3
    clear = torch.randn(60, 4, generator=chance) * 0.3
    faint = torch.randn(60, 5, generator=chance)
    for rows, size in ((clear, 3.0), (faint, 1.0)):
        rows[torch.arange(60), label] += size
    loss_weight = torch.full((3, 60), 1 / 60)
    given = Batch(
        rows=torch.arange(60), inputs=(clear, faint), label=label, present=None, loss_weight=loss_weight, size=60
    )
    sure = []
    for warmup in (99, 0):
        method = make(gmm=GmmConfig(warmup_epochs=warmup))
        for group in method.optimization.optimizer.param_groups:
            group["lr"] = 0.05
        for epoch in range(1, 11):
            with torch.no_grad():
                gap = modality_gap(method.net(given.inputs), label)
            method.begin_epoch(epoch, Planted(gap.double().numpy() / 0.98))
            for _ in range(10):
                outputs, _ = method.step(given)
        sure.append(outputs.confidence(label).mean(dim=1))
    summed, adaptive = sure
    assert adaptive[2] > summed[2] + 0.05
    assert adaptive[1] > summed[1] - 0.01
    assert adaptive[1] - adaptive[2] < summed[1] - summed[2] - 0.05
