"""Tests of early stopping by modality: when a modality is frozen, and what still trains."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from training import draw_batch

from mmaudit.train.balancing.balancer import Validation
from mmaudit.train.balancing.mses import Mses, MsesConfig
from mmaudit.train.batches import Batch
from mmaudit.train.config import OptimConfig
from mmaudit.train.network import FusionNet, ModelConfig, separate_losses
from mmaudit.train.optimizer import SINGLE_PROCESS, Optimization

torch.set_num_threads(1)

NAN = float("nan")


def build_mses(*, patience: int = 2, own_heads: bool = False, freeze: tuple[int, ...] = (), **constants: Any) -> Mses:
    torch.manual_seed(0)
    plan = ModelConfig(
        modalities=("audio", "visual"),
        shapes=((5,), (4,)),
        classes=("a", "b", "c"),
        own_heads=own_heads,
        hidden=6,
        dropout=0.5,
    )
    net = FusionNet(plan)
    net.freeze_encoders(freeze)
    optimization = Optimization(net, OptimConfig(precision="float32", lr=0.1), device="cpu", distributed=SINGLE_PROCESS)
    config = MsesConfig(patience=patience, **constants)
    return Mses(net, optimization, config, epochs=9)


def make_batch(present: list[list[bool]] | None = None) -> Batch:
    return draw_batch([0, 1, 2, 1], weight=[1, 2, 3, 2], present=present)


def end_epochs(balancer: Mses, *losses: tuple[float, float]) -> list[tuple[bool, bool]]:
    """End epochs with these unimodal validation losses; return which modalities are frozen after each."""
    frozen = []
    for epoch, unimodal_loss in enumerate(losses, start=1):
        balancer.end_epoch(
            epoch, Validation(loss=1.0, metric=0.5, unimodal_loss=unimodal_loss, unimodal_metric=(0.5, 0.5))
        )
        frozen.append((balancer.optimization.frozen[0], balancer.optimization.frozen[1]))
    return frozen


def changed_tensors(balancer: Mses) -> set[str]:
    """Run a step as the training loop does and return the names of the tensors it changes."""
    before = copy.deepcopy(balancer.net.state_dict())
    balancer.net.train()
    balancer.step(make_batch())
    return {name for name, tensor in balancer.net.state_dict().items() if not torch.equal(tensor, before[name])}


def test_modality_is_frozen_after_patience_epochs() -> None:
    losses = [(1.0, 1.0), (0.9, 1.0), (0.8, 0.9), (0.8, 0.8), (0.9, 0.7), (0.1, 0.6)]
    frozen = end_epochs(build_mses(patience=2), *losses)
    assert [audio for audio, _ in frozen] == [False, False, False, False, True, True]  # still frozen at a loss of 0.1
    assert not any(visual for _, visual in frozen)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_counted_from_the_lowest_loss(patience: int) -> None:
    frozen = end_epochs(build_mses(patience=patience), *[(1.0, 1.0)] * 5)
    assert frozen == [(epoch > patience, epoch > patience) for epoch in range(1, 6)]


def test_nan_loss_is_not_lower() -> None:
    assert end_epochs(build_mses(patience=2), (1.0, NAN), (NAN, NAN), (0.5, 1.0))[-1] == (False, True)


@pytest.mark.parametrize("own_heads", [False, True])
def test_frozen_modality_is_not_updated_and_the_rest_is(own_heads: bool) -> None:
    balancer = build_mses(own_heads=own_heads)
    all_changed = changed_tensors(balancer)
    end_epochs(balancer, (1.0, 1.0), (1.0, 0.9), (1.0, 0.8))
    changed = changed_tensors(balancer)
    assert {name for name in all_changed if name.startswith(("encoders.0.", "heads.0."))} == all_changed - changed
    assert "fusion.heads.0.weight" in changed


def test_frozen_encoder_is_deterministic_in_training() -> None:
    balancer, batch = build_mses(), make_batch()
    end_epochs(balancer, *[(1.0, 1.0 - epoch / 10) for epoch in range(3)])
    balancer.net.train()
    first, second = balancer.net.encode(batch.inputs), balancer.net.encode(batch.inputs)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])  # dropout


def test_encoders_frozen_from_the_start_stay_frozen() -> None:
    balancer = build_mses(freeze=(1,))
    end_epochs(balancer, *[(1.0, 1.0 - epoch / 10) for epoch in range(3)])
    assert not any(name.startswith("encoders.") for name in changed_tensors(balancer))
    assert not any(encoder.training for encoder in balancer.net.encoders)
    assert balancer.optimization.frozen == [True, False]


def losses_of(balancer: Mses, batch: Batch) -> tuple[float, list[float], Tensor]:
    balancer.net.eval()
    outputs = balancer.net(batch.inputs, batch.present)
    fused, unimodal = separate_losses(outputs, batch.label)
    means = batch.mean_unimodal(unimodal).tolist()
    return float(batch.mean_fused(fused).detach()), means, balancer.loss(outputs, batch).detach()


def test_loss_of_a_frozen_modality_leaves_the_sum() -> None:
    balancer, batch = build_mses(), make_batch([[True, True], [True, False], [False, True], [True, True]])
    fused, unimodal, loss = losses_of(balancer, batch)
    assert float(loss) == pytest.approx(fused + unimodal[0] + unimodal[1], rel=1e-5)
    end_epochs(balancer, *[(1.0, 1.0 - epoch / 10) for epoch in range(3)])
    fused, unimodal, loss = losses_of(balancer, batch)
    assert float(loss) == pytest.approx(fused + unimodal[1], rel=1e-5)


def test_fusion_still_trains_when_all_are_frozen() -> None:
    balancer, batch = build_mses(patience=1), make_batch()
    end_epochs(balancer, (1.0, 1.0), (1.0, 1.0))
    fused, _, loss = losses_of(balancer, batch)
    assert float(loss) == pytest.approx(fused, rel=1e-5)
    assert changed_tensors(balancer) == {"fusion.heads.0.weight", "fusion.heads.1.weight", "fusion.bias"}


def test_epoch_metrics_mark_frozen_modalities() -> None:
    balancer = build_mses(patience=1)
    end_epochs(balancer, (1.0, 1.0), (0.9, 1.0))
    assert balancer.epoch_metrics() == {"frozen_audio": 0.0, "frozen_visual": 1.0}


def test_state_round_trip() -> None:
    original, resumed = build_mses(), build_mses()
    end_epochs(original, (1.0, 1.0), (0.9, 1.0), (0.9, 1.0))
    resumed.load_state_dict(original.state_dict())
    assert changed_tensors(resumed) == changed_tensors(original)
    assert end_epochs(resumed, (0.9, 0.1)) == end_epochs(original, (0.9, 0.1)) == [(True, True)]


def test_smoothed_criterion_by_hand() -> None:
    """0.6 of the loss of the epoch before, unsmoothed, and 0.4 of this one; the first loss as it is.

    Losses 1.0, 0.5, 0.7, 0.9, 0.1, 0.1: criteria 1.0, 0.8, 0.58, 0.78, 0.58, 0.1. The unsmoothed lowest loss, 0.5, is
    that of epoch 2, and the smoothed one, 0.58, that of epoch 3, which epoch 5 equals.
    """
    losses = [(value, 1.0) for value in (1.0, 0.5, 0.7, 0.9, 0.1, 0.1)]
    lowest, since = [], []
    balancer = build_mses(patience=99, smoothing=0.6)
    for number, loss in enumerate(losses, start=1):
        end_epochs_from(balancer, number, loss)
        lowest.append(balancer.lowest_loss[0])
        since.append(balancer.epochs_without_improvement[0])
    assert lowest == pytest.approx([1.0, 0.8, 0.58, 0.58, 0.58, 0.1])
    assert since[:4] == [0, 0, 0, 1]
    assert since[5] == 0
    plain = build_mses(patience=99)
    end_epochs(plain, *losses[:4])
    assert plain.lowest_loss[0] == 0.5
    assert plain.epochs_without_improvement[0] == 2


def end_epochs_from(balancer: Mses, epoch: int, unimodal_loss: tuple[float, float]) -> None:
    balancer.end_epoch(epoch, Validation(loss=1.0, metric=0.5, unimodal_loss=unimodal_loss, unimodal_metric=(0.5, 0.5)))


def weights_of(balancer: Mses) -> dict[str, Tensor]:
    return copy.deepcopy(balancer.net.state_dict())


@pytest.mark.parametrize("mode", ["freeze", "restore"])
@pytest.mark.parametrize("resumed", [False, True])
def test_restore_goes_back_to_the_best_epoch_of_the_modality(mode: str, resumed: bool) -> None:
    """Audio is best after epoch 1 and stops after epoch 3; visual improves in every epoch and trains on."""
    balancer, weights = build_mses(patience=2, mode=mode, unimodal_weight=0.0), []
    for epoch, audio in enumerate((0.5, 0.6, 0.6), start=1):
        balancer.begin_epoch(epoch, cast(Any, None))
        changed_tensors(balancer)
        weights.append(weights_of(balancer))
        end_epochs_from(balancer, epoch, (audio, 1 - epoch / 10))
        for (
            name,
            tensor,
        ) in balancer.net.state_dict().items():  # what the loop records after the epoch is what it tested
            assert torch.equal(tensor, weights[-1][name])
    if resumed:
        original, balancer = balancer, build_mses(patience=2, mode=mode, unimodal_weight=0.0)
        balancer.net.load_state_dict(original.net.state_dict())
        balancer.optimization.load_state_dict(original.optimization.state_dict())
        balancer.load_state_dict(original.state_dict())
    balancer.begin_epoch(4, cast(Any, None))
    expected = weights[0 if mode == "restore" else 2]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in balancer.net.state_dict().items())
    visual_weight = dict(balancer.net.named_parameters())["encoders.1.layers.0.weight"]
    step = balancer.optimization.optimizer.state[visual_weight]["step"]
    assert float(step) == (1 if mode == "restore" else 3)
    changed = changed_tensors(balancer)
    assert not any(name.startswith("encoders.0") for name in changed)
    assert any(name.startswith("encoders.1") for name in changed)
    end_epochs_from(balancer, 4, (0.1, 0.5))
    balancer.begin_epoch(5, cast(Any, None))  # a frozen modality is not restored again
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in balancer.net.state_dict().items())


def test_loss_without_unimodal_terms_is_the_fused_one() -> None:
    balancer, batch = build_mses(unimodal_weight=0.0, fused_weight=2.0), make_batch()
    fused, _, loss = losses_of(balancer, batch)
    assert float(loss) == pytest.approx(2 * fused, rel=1e-5)
