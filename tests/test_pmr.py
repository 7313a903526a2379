"""Tests of PMR: prototypes are class means with momentum, and the prototype loss by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import TwoEqualProcesses, weight_changes

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.curriculum import RowIndex
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.balancing.pmr import LAG_WEIGHTS, PmrConfig, distances, lag_weights
from mmaudit.train.batches import Batch, Loss, OutputFunction
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext, Optimization

torch.set_num_threads(1)
NUM = 12


class CountingReader:
    """Model reader on given samples that records the number of rows of each call."""

    def __init__(self, net: FusionNet, inputs: tuple[Tensor, ...], label: Tensor) -> None:
        self.net, self.inputs, self.label = net, inputs, label
        self.num_train, self.rows_read = len(label), list[int]()

    @torch.no_grad()
    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        row_index = torch.from_numpy(np.arange(self.num_train) if rows is None else rows)
        self.rows_read.append(len(row_index))
        self.net.eval()
        values = function(self.net([matrix[row_index] for matrix in self.inputs]), self.label[row_index]).float()
        self.net.train()
        return values

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        raise NotImplementedError

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        raise NotImplementedError


def make_inputs(num_samples: int = NUM) -> tuple[Tensor, Tensor]:
    """Build inputs whose first modality determines the class and whose second does not."""
    generator = torch.Generator().manual_seed(1)
    first = 0.1 * torch.randn(num_samples, 4, generator=generator)
    first[torch.arange(num_samples), torch.arange(num_samples) % 3] += 3.0
    return first, torch.randn(num_samples, 5, generator=generator)


def build_method(
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
    balancer: Balancer = BALANCERS.load(name)(optimization.net, optimization, pmr or PmrConfig(), epochs=9)
    return balancer


def build_in_epoch(
    name: str = "pmr", *, pmr: PmrConfig | None = None, distributed: DistributedContext = SINGLE_PROCESS, epoch: int = 1
) -> Balancer:
    method = build_method(name, pmr=pmr, distributed=distributed)
    method.begin_epoch(epoch, CountingReader(method.net, make_inputs(), torch.arange(NUM) % 3))
    return method


def make_batch(*, share: float = 1.0, copies: int = 1) -> Batch:
    total = NUM * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in make_inputs()),
        label=(torch.arange(NUM) % 3).repeat(copies),
        present=None,
        loss_weight=torch.full((3, total), share / total),
        size=total,
    )


def class_means(method: Balancer) -> list[Tensor]:
    with torch.no_grad():
        return [torch.stack([f[c::3].mean(dim=0) for c in range(3)]) for f in method.net.encode(make_inputs())]


def test_distances_are_euclidean_and_differentiable_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    features, prototypes = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(distances(features, prototypes), torch.cdist(features, prototypes))
    features_at_prototypes = prototypes.clone().requires_grad_()
    slope = torch.autograd.grad(distances(features_at_prototypes, prototypes).sum(), features_at_prototypes)[0]
    assert bool(slope.isfinite().all())


def weights_of(scores: list[float], weight: str) -> list[float]:
    return lag_weights(torch.tensor(scores), weight=weight).tolist()


def test_lag_weights_by_hand() -> None:
    """S = 4, 5: w = 5 / 4 - 1 for the first; 1, 5: above 1, clipped to 1; 4, 5, 6: 5.5 / 4 - 1."""
    assert weights_of([4.0, 5.0], "ratio") == pytest.approx([0.25, 0.0])
    assert weights_of([1.0, 5.0], "ratio") == [1.0, 0.0]
    assert weights_of([4.0, 5.0, 6.0], "ratio") == pytest.approx([0.375, 0.0, 0.0])
    assert weights_of([4.0, 0.0], "ratio") == [0.0, 0.0]
    assert weights_of([0.30, 0.27], "ratio") == pytest.approx([0.0, 1 / 9], abs=1e-6)


def test_hard_weights_by_hand() -> None:
    """The authors' code: alpha for the modality whose summed confidence is lower, 0 for the other, 0 for both if equal.

    Of three, those below the mean of the other two: of 3, 5, 6 the first, of 1, 2, 6 the first two.
    """
    assert weights_of([0.30, 0.27], "hard") == [0.0, 1.0]
    assert weights_of([0.27, 0.30], "hard") == [1.0, 0.0]
    assert weights_of([0.3, 0.3], "hard") == [0.0, 0.0]
    assert weights_of([3.0, 5.0, 6.0], "hard") == [1.0, 0.0, 0.0]
    assert weights_of([1.0, 2.0, 6.0], "hard") == [1.0, 1.0, 0.0]
    assert weights_of([4.0, 0.0], "hard") == [0.0, 0.0]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.floats(0.1, 10), st.sampled_from(LAG_WEIGHTS))
def test_most_confident_modality_has_weight_0_in_any_unit(scores: list[float], unit: float, weight: str) -> None:
    score = torch.tensor(scores, dtype=torch.float64)
    weights = lag_weights(score, weight=weight)
    if weight == "ratio":
        torch.testing.assert_close(lag_weights(unit * score, weight=weight), weights, atol=1e-9, rtol=1e-6)
    else:
        assert torch.equal(lag_weights(4 * score, weight=weight), weights)  # a power of 2 rounds nothing
    assert float(weights[score.argmax()]) == pytest.approx(0, abs=1e-9)
    assert float(weights.min()) >= 0
    assert float(weights.max()) <= 1


def test_a_loss_worked_out_apart_from_the_implementation() -> None:
    """Three samples, two classes, one feature a modality, prototypes -1 and 1: p of class 1 is sigmoid(2 f).

    The first modality has features -0.5, 0.5, 0.5, the second -0.25, 0.25, -0.5, the last of which is wrong.
    """
    first = [1 / (1 + math.exp(-1.0))] * 3
    second = [1 / (1 + math.exp(-0.5))] * 2 + [1 / (1 + math.exp(1.0))]
    label = torch.tensor([0, 1, 1])
    prototypes = torch.tensor([[-1.0], [1.0]])
    confidences, losses = [], []
    for features in ([-0.5, 0.5, 0.5], [-0.25, 0.25, -0.5]):
        logits = -distances(torch.tensor(features)[:, None], prototypes)
        confidences.append(float(logits.softmax(dim=1).gather(1, label[:, None]).mean()))
        losses.append(float(torch.nn.functional.cross_entropy(logits, label)))
    assert confidences == pytest.approx([np.mean(first), np.mean(second)], rel=1e-5)
    assert losses == pytest.approx([-np.log(first).mean(), -np.log(second).mean()], rel=1e-5)
    assert weights_of(confidences, "hard") == [0.0, 1.0]


def test_prototypes_are_class_means_with_momentum_from_the_third_epoch() -> None:
    """Those of the untrained network are replaced before epoch 2: 0.75 P_2 + 0.25 mean_3 before epoch 3."""
    method = build_in_epoch(pmr=PmrConfig(momentum=0.75))
    means = [class_means(method)]
    for epoch in (2, 3):
        method.step(make_batch())
        means.append(class_means(method))
        method.begin_epoch(epoch, CountingReader(method.net, make_inputs(), torch.arange(NUM) % 3))
        expected = means[1] if epoch == 2 else [0.75 * old + 0.25 * new for old, new in zip(*means[1:], strict=True)]
        for prototype, mean in zip(method.state_dict()["prototypes"], expected, strict=True):
            torch.testing.assert_close(prototype, mean)
    assert not torch.allclose(means[0][0], means[1][0])


@pytest.mark.parametrize("kind", LAG_WEIGHTS)
def test_loss_by_hand_and_gradient_for_the_weaker_modality_only(kind: str) -> None:
    plain, batch = build_in_epoch("joint"), make_batch()
    method = build_in_epoch(pmr=PmrConfig(alpha=0.6, weight=kind))
    outputs = method.net(batch.inputs)
    score, pce = [], []
    for f, prototype in zip(outputs.features, class_means(method), strict=True):
        p = (-torch.cdist(f.detach(), prototype)).softmax(dim=1).gather(1, batch.label[:, None])
        score.append(float(p.mean()))
        pce.append(-float(p.log().mean()))
    weight = [min(max(score[1 - j] / score[j] - 1, 0), 1) for j in range(2)]
    assert weight[0] == 0
    assert 0.1 < weight[1] < 0.9
    weight = [0.0, 1.0] if kind == "hard" else weight
    expected = plain.loss(outputs, batch).item() + 0.6 * weight[1] * pce[1]
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)
    assert list(method.epoch_metrics().values()) == pytest.approx(weight, rel=1e-4)
    plain_changes, changes = weight_changes(plain, batch), weight_changes(method, batch)
    for name, step in plain_changes.items():
        same = torch.allclose(step, changes[name], atol=1e-7)
        assert same != (name.startswith("encoders.1") and float(step.abs().sum()) > 0), name


def test_a_modality_is_drawn_to_its_prototypes() -> None:
    method, plain = build_in_epoch(), build_in_epoch("joint")
    prototypes = class_means(method)[1]
    for balancer in (method, plain):
        for group in balancer.optimization.optimizer.param_groups:
            group["lr"] = 0.05
    ends = []
    for balancer in (plain, method):
        for _ in range(20):
            outputs, _ = balancer.step(make_batch())
        logits = -torch.cdist(outputs.features[1].detach(), prototypes)
        ends.append(float(torch.nn.functional.cross_entropy(logits, make_batch().label)))
    assert ends[1] < ends[0]


def test_prototype_loss_ends_with_the_last_epoch() -> None:
    method = build_method(pmr=PmrConfig(last_epoch=2))
    reader = CountingReader(method.net, make_inputs(), torch.arange(NUM) % 3)
    plain = build_in_epoch("joint")
    for epoch in (1, 2, 3):
        method.begin_epoch(epoch, reader)
        outputs = method.net(make_batch().inputs)
        same = torch.equal(method.loss(outputs, make_batch()), plain.loss(outputs, make_batch()))
        assert same == (epoch == 3)
    assert len(reader.rows_read) == 2


def test_class_without_samples_has_no_prototype_and_no_loss() -> None:
    method, plain = build_method(pmr=PmrConfig(weight="ratio", momentum=0.5)), build_method("joint")
    label = torch.arange(NUM) % 3
    is_known = label < 2
    method.begin_epoch(
        1, CountingReader(method.net, tuple(matrix[is_known] for matrix in make_inputs()), label[is_known])
    )
    assert method.state_dict()["seen"].tolist() == [True, True, False]
    batch = make_batch()
    outputs = method.net(batch.inputs)
    score, pce = [], []
    for f, prototype in zip(outputs.features, class_means(method), strict=True):
        p = (-torch.cdist(f.detach(), prototype[:2])).softmax(dim=1)[is_known].gather(1, label[is_known][:, None])
        score.append(float(p.sum()))
        pce.append(-float(p.log().sum()) / NUM)
    weight = min(score[0] / score[1] - 1, 1)
    assert weight > 0
    expected = plain.loss(outputs, batch).item() + weight * pce[1]
    assert method.loss(outputs, batch).item() == pytest.approx(expected, rel=1e-5)
    assert all(bool(step.isfinite().all()) for step in weight_changes(method, batch).values())
    before = [matrix.clone() for matrix in method.state_dict()["prototypes"]]
    method.begin_epoch(3, CountingReader(method.net, make_inputs(), label))
    for prototype, old, mean in zip(method.state_dict()["prototypes"], before, class_means(method), strict=True):
        torch.testing.assert_close(prototype[2], mean[2])  # the first mean of a class has no momentum
        torch.testing.assert_close(prototype[:2], (old[:2] + mean[:2]) / 2)
    last = [matrix[2].clone() for matrix in method.state_dict()["prototypes"]]
    method.begin_epoch(
        4, CountingReader(method.net, tuple(matrix[is_known] for matrix in make_inputs()), label[is_known])
    )
    for prototype, old in zip(method.state_dict()["prototypes"], last, strict=True):
        assert torch.equal(prototype[2], old)  # without samples the prototype stays


def test_number_of_rows_read_is_bounded() -> None:
    method = build_method()
    reader = CountingReader(method.net, make_inputs(5000), torch.arange(5000) % 3)
    method.begin_epoch(1, reader)
    assert reader.rows_read == [2048]


def test_samples_outside_the_fused_loss_train_the_weaker_modality() -> None:
    """Samples with a fused weight of 0 still train the weaker modality, and nothing else."""
    method, batch = build_in_epoch(), make_batch()
    loss_weight = batch.loss_weight.clone()
    loss_weight[0] = 0.0
    unimodal_batch = Batch(
        rows=batch.rows,
        inputs=batch.inputs,
        label=batch.label,
        present=None,
        loss_weight=loss_weight,
        size=batch.size,
    )
    changes = weight_changes(method, unimodal_batch)
    assert float(changes["encoders.1.layers.0.weight"].abs().sum()) > 0
    assert float(changes["encoders.0.layers.0.weight"].abs().sum()) == 0


def test_defaults_are_those_of_the_authors_code() -> None:
    """alpha 1, momentum 0.2, epochs 0 to 100; a hard weight."""
    assert PmrConfig() == PmrConfig(alpha=1.0, weight="hard", momentum=0.2, last_epoch=101)
    with pytest.raises(ConfigError, match=r"balancing.pmr.weight .*hard.*ratio"):
        PmrConfig(weight="soft")


def test_two_processes_take_the_step_of_one() -> None:
    single, distributed = build_in_epoch(), build_in_epoch(distributed=TwoEqualProcesses())
    expected = weight_changes(single, make_batch(copies=2))
    for name, step in weight_changes(distributed, make_batch(share=0.5)).items():
        torch.testing.assert_close(step, expected[name], atol=1e-6, rtol=1e-4)
    assert distributed.epoch_metrics() == pytest.approx(single.epoch_metrics(), rel=1e-5)


def test_scores_are_over_all_processes() -> None:
    """The data of the other process make the first modality the weaker one."""

    class OtherProcess(DistributedContext):
        def sum_(self, tensors: Sequence[Tensor]) -> None:
            for tensor in tensors:
                if tensor.shape == (2,):
                    tensor.add_(torch.tensor([0.0, 3.0]))

    single, distributed = build_in_epoch(), build_in_epoch(distributed=OtherProcess(world_size=2))
    outputs = single.net(make_batch().inputs)
    for method in (single, distributed):
        method.loss(outputs, make_batch())
    assert single.epoch_metrics()["lag_a"] == 0 < single.epoch_metrics()["lag_v"]
    assert distributed.epoch_metrics() == {"lag_a": 1.0, "lag_v": 0.0}


def test_resumed_method_continues_exactly() -> None:
    original, resumed = build_in_epoch(), build_method()
    original.step(make_batch())
    resumed.net.load_state_dict(original.net.state_dict())
    resumed.load_state_dict(original.state_dict())
    assert resumed.epoch_metrics() == original.epoch_metrics()
    for a, b in zip(
        weight_changes(original, make_batch()).values(), weight_changes(resumed, make_batch()).values(), strict=True
    ):
        assert torch.equal(a, b)
    for method in (original, resumed):
        method.begin_epoch(2, CountingReader(method.net, make_inputs(), torch.arange(NUM) % 3))
    for a, b in zip(original.state_dict()["prototypes"], resumed.state_dict()["prototypes"], strict=True):
        assert torch.equal(a, b)
