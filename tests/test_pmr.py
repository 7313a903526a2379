"""Laws of PMR: prototypes are class means with a memory, and what lags is drawn to its own, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import BalancingConfig, PmrConfig
from mmaudit.train.balancing.pmr import distances, lag_weights
from mmaudit.train.batches import Batch, Loss, OutputFunction, RowIndex
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)
NUM = 12


class Twin(DistributedContext):
    """Two processes that see the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


class Desk:
    """A laboratory of some samples; it counts how often and how much is read."""

    def __init__(self, net: FusionNet, inputs: tuple[Tensor, ...], label: Tensor) -> None:
        self.net, self.inputs, self.label = net, inputs, label
        self.num_train, self.asked = len(label), list[int]()

    @torch.no_grad()
    def read(self, what: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        some = torch.from_numpy(np.arange(self.num_train) if rows is None else rows)
        self.asked.append(len(some))
        self.net.eval()
        found = what(self.net([each[some] for each in self.inputs]), self.label[some]).float()
        self.net.train()
        return found

    def read_validation(self, what: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise NotImplementedError

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise NotImplementedError


def inputs(number: int = NUM) -> tuple[Tensor, Tensor]:
    """The first modality tells the class, the second does not."""
    chance = torch.Generator().manual_seed(1)
    first = 0.1 * torch.randn(number, 4, generator=chance)
    first[torch.arange(number), torch.arange(number) % 3] += 3.0
    return first, torch.randn(number, 5, generator=chance)


def make(
    name: str = "pmr", *, pmr: PmrConfig | None = None, distributed: DistributedContext = SINGLE_PROCESS
) -> Balancer:
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=("a", "v"),
        shapes=((4,), (5,)),
        classes=("x", "y", "z"),
        hidden=8,
        dropout=0.0,
    )
    optim = OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    optimization = Optimization(FusionNet(plan), optim, device="cpu", distributed=distributed)
    optimization.begin_epoch(1, epochs=1)
    return build_balancer(name, optimization.net, optimization, BalancingConfig(pmr=pmr or PmrConfig()), epochs=9)


def begun(
    name: str = "pmr", *, pmr: PmrConfig | None = None, distributed: DistributedContext = SINGLE_PROCESS, epoch: int = 1
) -> Balancer:
    method = make(name, pmr=pmr, distributed=distributed)
    method.begin_epoch(epoch, Desk(method.net, inputs(), torch.arange(NUM) % 3))
    return method


def batch(*, share: float = 1.0, copies: int = 1) -> Batch:
    total = NUM * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in inputs()),
        label=(torch.arange(NUM) % 3).repeat(copies),
        present=None,
        loss_weight=torch.full((3, total), share / total),
        size=total,
    )


def moved(method: Balancer, given_: Batch) -> dict[str, Tensor]:
    before = {name: weight.detach().clone() for name, weight in method.net.named_parameters()}
    method.step(given_)
    return {name: before[name] - weight.detach() for name, weight in method.net.named_parameters()}


def class_means(method: Balancer) -> list[Tensor]:
    with torch.no_grad():
        return [torch.stack([f[c::3].mean(dim=0) for c in range(3)]) for f in method.net.encode(inputs())]


def test_distances_are_euclidean_and_have_a_slope_everywhere() -> None:
    chance = torch.Generator().manual_seed(0)
    features, prototypes = torch.randn(7, 5, generator=chance), torch.randn(3, 5, generator=chance)
    torch.testing.assert_close(distances(features, prototypes), torch.cdist(features, prototypes))
    there = prototypes.clone().requires_grad_()
    slope = torch.autograd.grad(distances(there, prototypes).sum(), there)[0]
    assert bool(slope.isfinite().all())


def test_weights_by_hand() -> None:
    """S = 4, 5: the first lags by 5 / 4 - 1; 1, 5: by more than 1, which is the most; 4, 5, 6: by 5.5 / 4 - 1."""
    assert lag_weights(torch.tensor([4.0, 5.0])).tolist() == pytest.approx([0.25, 0.0])
    assert lag_weights(torch.tensor([1.0, 5.0])).tolist() == [1.0, 0.0]
    assert lag_weights(torch.tensor([4.0, 5.0, 6.0])).tolist() == pytest.approx([0.375, 0.0, 0.0])
    assert lag_weights(torch.tensor([4.0, 0.0])).tolist() == [0.0, 0.0]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.floats(0.1, 10))
def test_the_surest_has_no_weight_whatever_the_unit(scores: list[float], unit: float) -> None:
    score = torch.tensor(scores, dtype=torch.float64)
    found = lag_weights(score)
    torch.testing.assert_close(lag_weights(unit * score), found, atol=1e-9, rtol=1e-6)
    assert float(found[score.argmax()]) == pytest.approx(0, abs=1e-9)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_prototypes_are_class_means_and_move_by_the_momentum() -> None:
    method = begun(pmr=PmrConfig(momentum=0.75))
    first = class_means(method)
    for found, wanted in zip(method.state_dict()["prototypes"], first, strict=True):
        torch.testing.assert_close(found, wanted)
    method.step(batch())
    second = class_means(method)
    method.begin_epoch(2, Desk(method.net, inputs(), torch.arange(NUM) % 3))
    for found, old, new in zip(method.state_dict()["prototypes"], first, second, strict=True):
        torch.testing.assert_close(found, 0.75 * old + 0.25 * new)


def test_the_loss_by_hand_and_its_gradient_reaches_what_lags_alone() -> None:
    plain, method, given_ = begun("joint"), begun(pmr=PmrConfig(alpha=0.6)), batch()
    outputs = method.net(given_.inputs)
    score, pce = [], []
    for f, prototype in zip(outputs.features, class_means(method), strict=True):
        p = (-torch.cdist(f.detach(), prototype)).softmax(dim=1).gather(1, given_.label[:, None])
        score.append(float(p.mean()))
        pce.append(-float(p.log().mean()))
    weight = [min(max(score[1 - j] / score[j] - 1, 0), 1) for j in range(2)]
    assert weight[0] == 0
    assert weight[1] > 0.1
    wanted = plain.loss(outputs, given_).item() + 0.6 * weight[1] * pce[1]
    assert method.loss(outputs, given_).item() == pytest.approx(wanted, rel=1e-5)
    assert list(method.epoch_metrics().values()) == pytest.approx(weight, rel=1e-4)
    whole, found = moved(plain, given_), moved(method, given_)
    for name, step in whole.items():
        same = torch.allclose(step, found[name], atol=1e-7)
        assert same != (name.startswith("encoders.1") and float(step.abs().sum()) > 0), name


def test_a_modality_is_drawn_to_its_prototypes() -> None:
    method, plain = begun(), begun("joint")
    prototypes = class_means(method)[1]
    for each in (method, plain):
        for group in each.optimization.optimizer.param_groups:
            group["lr"] = 0.05
    ends = []
    for each in (plain, method):
        for _ in range(20):
            outputs, _ = each.step(batch())
        logits = -torch.cdist(outputs.features[1].detach(), prototypes)
        ends.append(float(torch.nn.functional.cross_entropy(logits, batch().label)))
    assert ends[1] < ends[0]


def test_it_ends_with_the_last_epoch() -> None:
    method = make(pmr=PmrConfig(last_epoch=2))
    desk = Desk(method.net, inputs(), torch.arange(NUM) % 3)
    plain = begun("joint")
    for epoch in (1, 2, 3):
        method.begin_epoch(epoch, desk)
        outputs = method.net(batch().inputs)
        same = torch.equal(method.loss(outputs, batch()), plain.loss(outputs, batch()))
        assert same == (epoch == 3)
    assert len(desk.asked) == 2


def test_a_class_that_was_not_read_has_no_prototype_and_no_loss() -> None:
    method, plain = make(), make("joint")
    label = torch.arange(NUM) % 3
    known = label < 2
    method.begin_epoch(1, Desk(method.net, tuple(each[known] for each in inputs()), label[known]))
    assert method.state_dict()["seen"].tolist() == [True, True, False]
    given_ = batch()
    outputs = method.net(given_.inputs)
    score, pce = [], []
    for f, prototype in zip(outputs.features, class_means(method), strict=True):
        p = (-torch.cdist(f.detach(), prototype[:2])).softmax(dim=1)[known].gather(1, label[known][:, None])
        score.append(float(p.sum()))
        pce.append(-float(p.log().sum()) / NUM)
    weight = min(score[0] / score[1] - 1, 1)
    assert weight > 0
    wanted = plain.loss(outputs, given_).item() + weight * pce[1]
    assert method.loss(outputs, given_).item() == pytest.approx(wanted, rel=1e-5)
    assert all(bool(step.isfinite().all()) for step in moved(method, given_).values())
    before = [each.clone() for each in method.state_dict()["prototypes"]]
    method.begin_epoch(2, Desk(method.net, inputs(), label))
    for found, old, mean in zip(method.state_dict()["prototypes"], before, class_means(method), strict=True):
        torch.testing.assert_close(found[2], mean[2])  # a class that is met for the first time has no past
        torch.testing.assert_close(found[:2], (old[:2] + mean[:2]) / 2)
    last = [each[2].clone() for each in method.state_dict()["prototypes"]]
    method.begin_epoch(3, Desk(method.net, tuple(each[known] for each in inputs()), label[known]))
    for found, old in zip(method.state_dict()["prototypes"], last, strict=True):
        assert torch.equal(found[2], old)  # and one that is not met again stays


def test_no_more_is_read_than_prototypes_want() -> None:
    method = make()
    desk = Desk(method.net, inputs(5000), torch.arange(5000) % 3)
    method.begin_epoch(1, desk)
    assert desk.asked == [2048]


def test_own_samples_are_learned_from() -> None:
    """Samples that the fused answer does not see still draw what lags, and nothing else."""
    method, given_ = begun(), batch()
    part = given_.loss_weight.clone()
    part[0] = 0.0
    alone = Batch(
        rows=given_.rows, inputs=given_.inputs, label=given_.label, present=None, loss_weight=part, size=given_.size
    )
    found = moved(method, alone)
    assert float(found["encoders.1.layers.0.weight"].abs().sum()) > 0
    assert float(found["encoders.0.layers.0.weight"].abs().sum()) == 0


def test_two_processes_are_one() -> None:
    alone, two = begun(), begun(distributed=Twin(world_size=2))
    whole = moved(alone, batch(copies=2))
    for name, step in moved(two, batch(share=0.5)).items():
        torch.testing.assert_close(step, whole[name], atol=1e-6, rtol=1e-4)
    assert two.epoch_metrics() == pytest.approx(alone.epoch_metrics(), rel=1e-5)


def test_scores_are_those_of_all_processes() -> None:
    """The other process saw that the first modality lags."""

    class Beside(DistributedContext):
        def sum_(self, tensors: Sequence[Tensor]) -> None:
            for tensor in tensors:
                if tensor.shape == (2,):
                    tensor.add_(torch.tensor([0.0, 3.0]))

    alone, beside = begun(), begun(distributed=Beside(world_size=2))
    outputs = alone.net(batch().inputs)
    for method in (alone, beside):
        method.loss(outputs, batch())
    assert alone.epoch_metrics()["lag_a"] == 0 < alone.epoch_metrics()["lag_v"]
    assert beside.epoch_metrics() == {"lag_a": 1.0, "lag_v": 0.0}


def test_a_resumed_run_goes_on_exactly() -> None:
    one, other = begun(), make()
    one.step(batch())
    other.net.load_state_dict(one.net.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.epoch_metrics() == one.epoch_metrics()
    for a, b in zip(moved(one, batch()).values(), moved(other, batch()).values(), strict=True):
        assert torch.equal(a, b)
    for method in (one, other):
        method.begin_epoch(2, Desk(method.net, inputs(), torch.arange(NUM) % 3))
    for a, b in zip(one.state_dict()["prototypes"], other.state_dict()["prototypes"], strict=True):
        assert torch.equal(a, b)
