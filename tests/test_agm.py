"""Laws of AGM: Shapley values by their definition, coefficients by hand, and whom they touch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from mmaudit.train.balancing.agm import Agm, modality_lead, shapley_weights
from mmaudit.train.balancing.balancer import Balancer, build_balancer
from mmaudit.train.balancing.config import AgmConfig, BalancingConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.distributed import SINGLE_PROCESS, DistributedContext
from mmaudit.train.network import FusionNet, ModelConfig
from mmaudit.train.optimizer import Optimization

torch.set_num_threads(1)


class Twin(DistributedContext):
    """Two processes that see the same."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def make(
    name: str = "agm",
    *,
    fusion: str = "concat",
    modalities: int = 2,
    alpha: float = 1.0,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Balancer:
    """Give a method; a step of SGD at rate 1 moves a weight by minus its gradient."""
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=tuple("abc"[:modalities]),
        shapes=((4,), (5,), (6,))[:modalities],
        classes=("x", "y", "z"),
        fusion=fusion,
        hidden=8,
        dropout=0.0,
    )
    optimization = Optimization(
        FusionNet(plan),
        OptimConfig(optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"),
        device="cpu",
        distributed=distributed,
    )
    optimization.begin_epoch(1, epochs=1)
    return build_balancer(name, optimization.net, optimization, BalancingConfig(agm=AgmConfig(alpha=alpha)), epochs=9)


def agm(fusion: str, *, modalities: int) -> Agm:
    made = make(fusion=fusion, modalities=modalities)
    assert isinstance(made, Agm)
    return made


def batch(*, modalities: int = 2, seed: int = 1, share: float = 1.0, copies: int = 1) -> Batch:
    chance = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(9, 4 + j, generator=chance) for j in range(modalities))
    total = 9 * copies
    return Batch(
        rows=torch.arange(total),
        inputs=tuple(rows.repeat(copies, 1) for rows in inputs),
        label=(torch.arange(9) % 3).repeat(copies),
        present=None,
        loss_weight=torch.full((1 + modalities, total), share / total),
        size=total,
    )


def moved(method: Balancer, given: Batch) -> dict[str, Tensor]:
    before = {name: weight.detach().clone() for name, weight in method.net.named_parameters()}
    method.step(given)
    return {name: before[name] - weight.detach() for name, weight in method.net.named_parameters()}


def test_weights_of_two_and_of_three() -> None:
    """phi^1 = (V(1) - V(2) + V(12)) / 2; of three, sets in the order 3, 2, 23, 1, 13, 12, 123."""
    sets, weights = shapley_weights(2)
    assert sets == [(False, True), (True, False), (True, True)]
    assert weights.tolist() == [[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]
    assert shapley_weights(3)[1][0].tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 3, 1 / 3, 1 / 6, 1 / 6, 1 / 3])


@pytest.mark.parametrize("fusion", ["concat", "late", "gated", "film", "mmtm"])
def test_responses_are_mean_gains_over_all_orders(fusion: str) -> None:
    """The definition: what a modality adds when it comes after those before it, over all orders; nothing says 0."""
    method = agm(fusion, modalities=3)
    outputs = method.net(batch(modalities=3).inputs)
    found = method.responses(outputs)
    wanted = torch.zeros_like(found)
    method.net.eval()
    with torch.no_grad():
        for order in permutations(range(3)):
            before = torch.zeros_like(outputs.fused)
            for place, j in enumerate(order):
                after = method.net.fused_logits(outputs.features, [each in order[: place + 1] for each in range(3)])
                wanted[j] += (after - before) / 6
                before = after
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=0), outputs.fused.detach(), atol=1e-5, rtol=1e-4)


def test_what_concatenation_says_is_shared_out_as_ogm_ge_reads_it() -> None:
    method = agm("concat", modalities=2)
    method.net.fusion.bias.data[:] = torch.tensor([0.3, -1.0, 2.0])  # type: ignore[operator]
    outputs = method.net(batch().inputs)
    torch.testing.assert_close(method.responses(outputs), outputs.unimodal.detach(), atol=1e-5, rtol=1e-4)


def test_listening_to_sets_leaves_running_means_and_the_mode() -> None:
    method = agm("mmtm", modalities=2)
    outputs = method.net(batch().inputs)
    before = {name: value.clone() for name, value in method.net.named_buffers()}
    method.responses(outputs)
    assert all(torch.equal(value, before[name]) for name, value in method.net.named_buffers())
    assert method.net.fusion.training


def test_the_lead_by_hand() -> None:
    known = torch.tensor([True, True, True])
    assert modality_lead(torch.tensor([0.2, 1.0, 1.8]), known).tolist() == pytest.approx(
        [math.exp(1.2), 1.0, math.exp(-1.2)], rel=1e-5
    )
    assert modality_lead(torch.tensor([0.2, 1.0, 0.0]), torch.tensor([True, True, False])).tolist() == pytest.approx(
        [math.exp(0.8), math.exp(-0.8), 1.0]
    )


def scores(method: Balancer, given: Batch) -> list[float]:
    """Mean minus log of the true class's probability; of concatenation, by the parts of its logits."""
    with torch.no_grad():
        return [-float(c.log().mean()) for c in method.net(given.inputs).confidence(given.label)[1:]]


def test_two_steps_by_hand() -> None:
    """First tau is 1; then it is the lead of the first step's scores, and not of both."""
    plain, method = make("joint"), make(alpha=0.7)
    usual = [0.0, 0.0]
    for seed in (1, 2):
        given = batch(seed=seed)
        now = scores(method, given)
        wanted = [math.exp(0.7 * (math.exp(usual[1 - j] - usual[j]) - math.exp(now[1 - j] - now[j]))) for j in range(2)]
        plain.net.load_state_dict(method.net.state_dict())
        whole, found = moved(plain, given), moved(method, given)
        assert list(method.epoch_metrics().values()) == pytest.approx(wanted, rel=1e-4)
        assert max(abs(each - 1) for each in wanted) > 0.01
        for name, step in whole.items():
            factor = next((wanted[j] for j in range(2) if name.startswith(f"encoders.{j}.")), 1.0)
            torch.testing.assert_close(found[name], factor * step, atol=1e-6, rtol=1e-3)
        usual = now


def test_a_modality_that_runs_ahead_is_slowed_and_the_other_hastened() -> None:
    """Usually both are as sure; now the features of the second are the class, and those of the first nothing."""
    method, given = make(), batch()
    method.load_state_dict({"mean": torch.ones(2), "steps": torch.ones(2), "coefficient": torch.ones(2)})
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    features = (torch.zeros(9, 8), 5.0 * torch.nn.functional.one_hot(given.label, 8).float())
    method.modulate(method.net.classify(features), given)
    behind, ahead = method.epoch_metrics().values()
    assert ahead < 1 < behind


def test_the_exponent_has_a_ceiling() -> None:
    """A usual lead of e^9 that is gone: the exponent would be 8,102."""
    method = make(alpha=0.5)
    method.load_state_dict(
        {"mean": torch.tensor([0.0, 9.0]), "steps": torch.tensor([5.0, 5.0]), "coefficient": torch.ones(2)}
    )
    method.step(batch())
    assert method.epoch_metrics()["coefficient_a"] == pytest.approx(math.exp(5.0), rel=1e-4)


def test_probabilities_have_a_floor() -> None:
    method, given = make(), batch()
    method.net.fusion.heads[1].weight.data[:] = torch.eye(3, 8)  # type: ignore[index, union-attr]
    wrong = 1e4 * torch.nn.functional.one_hot((given.label + 1) % 3, 8).float()
    method.modulate(method.net.classify((torch.zeros(9, 8), wrong)), given)
    assert method.state_dict()["mean"].tolist() == pytest.approx([math.log(3), -math.log(1e-8)], rel=1e-5)


def test_a_modality_that_nobody_has_is_not_compared() -> None:
    method, given = make(), batch()
    part = given.loss_weight.clone()
    part[2] = 0.0
    absent = Batch(
        rows=given.rows,
        inputs=given.inputs,
        label=given.label,
        present=torch.tensor([[True, False]]).repeat(9, 1),
        loss_weight=part,
        size=9,
    )
    before = method.state_dict()
    method.step(absent)
    assert list(method.epoch_metrics().values()) == [1.0, 1.0]
    assert torch.equal(method.state_dict()["mean"], before["mean"])


def test_two_processes_are_one() -> None:
    alone, two = make(), make(distributed=Twin(world_size=2))
    for seed in (1, 2):
        whole = moved(alone, batch(copies=2, seed=seed))
        for name, step in moved(two, batch(share=0.5, seed=seed)).items():
            torch.testing.assert_close(step, whole[name], atol=1e-6, rtol=1e-3)


def test_a_resumed_run_goes_on_exactly() -> None:
    one, other = make(), make()
    for seed in (1, 2):
        one.step(batch(seed=seed))
    other.net.load_state_dict(one.net.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.epoch_metrics() == one.epoch_metrics()
    for a, b in zip(moved(one, batch(seed=3)).values(), moved(other, batch(seed=3)).values(), strict=True):
        assert torch.equal(a, b)
