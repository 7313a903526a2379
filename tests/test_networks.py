"""Networks of probes: their inputs, augmentation and targets, and that they are the papers' ResNet-18."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import NetworkConfig
from mmaudit.audit.probes.crops import PictureView, augment_pictures, to_pictures
from mmaudit.audit.probes.network import (
    Network,
    NetworkTarget,
    build_network,
    build_trunk,
    check_view,
    input_statistics,
)

SOUND, PICTURE, FRAMES = (8, 12), (9, 8, 3), (2, 9, 8, 3)
VIEW = PictureView(shape=PICTURE)
RNG = np.random.default_rng(0)


def network(shape: tuple[int, ...] = PICTURE, seed: int = 0) -> Network:
    return build_network(shape, num_outputs=4, width=1 / 16, seed=seed).eval()


def some(shape: tuple[int, ...], num: int = 5) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal((num, int(np.prod(shape)))).astype(np.float32))


@pytest.mark.parametrize(("shape", "num_channels"), [(PICTURE, 3), (FRAMES, 3), (SOUND, 1)])
def test_trunk_of_width_1_is_a_resnet18(shape: tuple[int, ...], num_channels: int) -> None:
    net = build_network(shape, num_outputs=7, width=1.0, seed=0)
    filters = 7 * 7 * 64  # of the first layer, for each channel
    assert sum(parameter.numel() for parameter in net.trunk.parameters()) == 11_176_512 - (3 - num_channels) * filters
    assert (net.head.in_features, net.head.out_features) == (512, 7)


@pytest.mark.parametrize("shape", [SOUND, PICTURE, FRAMES])
def test_rows_are_viewed_as_pictures_without_a_copy(shape: tuple[int, ...]) -> None:
    rows = some(shape)
    pictures = to_pictures(rows, shape)
    inputs = rows.numpy().reshape(5, *shape)
    frames = inputs[:, None, None] if len(shape) == 2 else np.moveaxis(inputs.reshape(5, -1, *shape[-3:]), -1, 2)
    np.testing.assert_array_equal(pictures, frames)
    assert pictures.data_ptr() == rows.data_ptr()
    assert network(shape)(pictures).shape == (5, 4)


@torch.no_grad()
@pytest.mark.parametrize("shape", [SOUND, PICTURE, FRAMES])
def test_empty_batch_gives_empty_outputs(shape: tuple[int, ...]) -> None:
    assert network(shape)(to_pictures(some(shape, num=0), shape)).shape == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize("shape", [SOUND, PICTURE, FRAMES])
def test_a_network_is_its_trunk_and_a_linear_head(shape: tuple[int, ...]) -> None:
    """At a sixteenth of the width: 32 features, averaged over frames, never below 0 after the last ReLU."""
    net, pictures = network(shape), to_pictures(some(shape), shape)
    features = net.trunk(pictures)
    assert features.shape == (5, net.trunk.num_features) == (5, 32)
    assert features.dtype == torch.float32
    assert (features >= 0).all()
    assert (features > 0).any(dim=0).sum() > 16
    torch.testing.assert_close(net(pictures), features @ net.head.weight.T + net.head.bias, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frame_order_does_not_matter() -> None:
    pictures = to_pictures(some(FRAMES), FRAMES)
    net = network(FRAMES)
    torch.testing.assert_close(net(pictures.flip(1)), net(pictures), atol=1e-5, rtol=1e-5)
    single = torch.stack([net(pictures[:, [frame]]) for frame in (0, 1)])
    torch.testing.assert_close(net(pictures), single.mean(dim=0), atol=1e-5, rtol=1e-5)  # the head is linear


@torch.no_grad()
def test_outputs_do_not_depend_on_input_scale() -> None:
    rows = some(PICTURE, 20).numpy()
    gain, offset = np.array([2.0, 50.0, 0.1], np.float32), np.array([0.0, 100.0, -3.0], np.float32)
    louder = (rows.reshape(20, -1, 3) * gain + offset).reshape(20, -1)
    outputs = []
    for inputs in (rows, louder):
        net = network()
        net.trunk.standardise_by(
            *input_statistics(MatrixInputs(matrix=inputs), VIEW, batch_size=6).channel_moments(np.arange(20))
        )
        outputs.append(net(to_pictures(torch.from_numpy(inputs), PICTURE)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_missing_inputs_equal_the_mean() -> None:
    net = network()
    net.trunk.standardise_by(np.array([5.0, 6.0, 7.0]), np.array([1.0, 0.0, 2.0]))
    missing = to_pictures(torch.full((1, 216), float("nan")), PICTURE)
    mean = to_pictures(torch.tensor([5.0, 6.0, 7.0]).repeat(72)[None], PICTURE)
    assert torch.equal(net(missing), net(mean))
    assert torch.isfinite(net(mean + 1)).all()  # of a channel without spread as well


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = network()
    assert torch.equal(torch.rand(3), expected)
    same_seed, other_seed = network(), network(seed=1)
    same, differ = (
        [torch.equal(a, b) for a, b in zip(first.parameters(), net.parameters(), strict=True)]
        for net in (same_seed, other_seed)
    )
    assert all(same)
    assert not all(differ)


@pytest.mark.parametrize("missing", [(3,), (2, 2, 2, 2, 2)])
def test_unsupported_shapes_raise(missing: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"a network reads \(mel, t\), .* not inputs of shape"):
        check_view(PictureView(shape=missing), int(np.prod(missing)))


def test_rows_of_another_length_raise() -> None:
    with pytest.raises(
        ConfigError, match=r"shape \(9, 8, 3\) have 216 numbers, but a row has 200: .* encode them again"
    ):
        check_view(VIEW, 200)
    check_view(VIEW, 216)


def test_missing_transformers_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "mmaudit\[hf\]"'):
        network()


def test_augmentation_can_be_turned_off() -> None:
    pictures = to_pictures(some(FRAMES), FRAMES)
    augmented = augment_pictures(pictures, np.random.default_rng(0), min_area=1.0, flip=False)
    torch.testing.assert_close(augmented, pictures, atol=1e-5, rtol=1e-5)


def test_half_of_the_pictures_are_flipped() -> None:
    pictures = to_pictures(some(FRAMES, 200), FRAMES)
    augmented = augment_pictures(pictures, np.random.default_rng(0), min_area=1.0, flip=True)
    straight, mirrored = (
        (augmented - reference).abs().amax(dim=(2, 3, 4)) < 1e-4 for reference in (pictures, pictures.flip(4))
    )
    assert (straight ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240  # of 400 frames: sd 10
    assert 60 < int((mirrored[:, 0] ^ mirrored[:, 1]).sum()) < 140  # each frame for itself


@pytest.mark.parametrize("least_area", [0.08, 0.5, 0.9])
def test_crops_are_inside_the_picture_and_within_the_area_bounds(least_area: float) -> None:
    """In pictures of their coordinates, the slopes of a crop are its sides and the means its centre."""
    size = 64
    coordinates = (torch.arange(size) + 0.5) / size
    picture = torch.stack([coordinates.expand(size, size), coordinates[:, None].expand(size, size)])
    crops = augment_pictures(
        picture.expand(300, 1, 2, size, size), np.random.default_rng(1), min_area=least_area, flip=False
    )
    inner = crops[:, 0, :, 8:-8, 8:-8]  # at the rim, levels are those of the outermost pixels
    steps = size - 17
    slopes = torch.stack([inner[:, 0, 0, -1] - inner[:, 0, 0, 0], inner[:, 1, -1, 0] - inner[:, 1, 0, 0]], dim=1)
    sides = (slopes * size / steps).numpy()
    centres = inner.mean(dim=(2, 3)).numpy()
    assert ((centres - sides / 2 > -1e-3) & (centres + sides / 2 < 1 + 1e-3)).all()
    area, ratio = sides.prod(axis=1), sides[:, 0] / sides[:, 1]
    assert least_area - 0.01 < area.min() < least_area + 0.05
    assert 0.95 < area.max() < 1.01
    assert ratio.min() > 3 / 4 - 0.01
    assert ratio.max() < 4 / 3 + 0.01
    assert len(np.unique(area)) == 300


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_give_channel_moments_over_any_rows(dtype: Any) -> None:
    matrix = RNG.integers(0, 256, (20, 216)).astype(dtype)
    statistics = input_statistics(MatrixInputs(matrix=matrix), VIEW, batch_size=6)
    rows = np.array([3, 19, 7])
    mean, scale = statistics.channel_moments(rows)
    pixels = matrix[rows].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scale, pixels.std(axis=0), rtol=1e-5)
    assert statistics.present.all()
    touched = matrix.copy()
    touched[11, 5] += 1
    contents = {
        input_statistics(MatrixInputs(matrix=inputs), VIEW, batch_size=6).content for inputs in (matrix, touched)
    }
    assert statistics.content in contents
    assert len(contents) == 2


def test_statistics_mark_missing_rows() -> None:
    matrix = np.ones((5, 216), np.float32)
    matrix[2] = np.nan
    statistics = input_statistics(MatrixInputs(matrix=matrix), VIEW, batch_size=2)
    assert statistics.present.tolist() == [True, True, False, True, True]


def test_losses_equal_the_references() -> None:
    outputs = RNG.standard_normal((6, 3)).astype(np.float32)
    rows = torch.tensor([4, 0, 5, 1, 2, 3])
    label = np.array([0, 1, 2, 2, 1, 0], np.int32)
    values = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], np.float32)
    single_label = Target(task="classification", label=label, num_outputs=3)
    loss = float(NetworkTarget.of(single_label, np.arange(6), "cpu").loss(torch.from_numpy(outputs), rows))
    share = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(log_loss(label[rows], share), rel=1e-5)
    several = Target(task="multilabel", label=label, num_outputs=3, values=values)
    loss = float(NetworkTarget.of(several, np.arange(6), "cpu").loss(torch.from_numpy(outputs), rows))
    sure = 1 / (1 + np.exp(-outputs))
    assert loss == pytest.approx(np.mean([log_loss(values[rows, j], sure[:, j]) for j in range(3)]), rel=1e-5)


def test_regression_targets_are_standardised_by_training_rows() -> None:
    values = np.array([[10.0], [20.0], [30.0], [1000.0]], np.float32)
    target = Target(task="regression", label=np.zeros(4, np.int32), num_outputs=1, values=values)
    truth = NetworkTarget.of(target, np.arange(3), "cpu")
    learnt = truth.values[:3]
    assert float(learnt.mean()) == pytest.approx(0, abs=1e-6)
    assert float(learnt.std(correction=0)) == pytest.approx(1)
    np.testing.assert_allclose(truth.in_units(truth.values), values, rtol=1e-6)
    outputs_off = torch.tensor([[0.5], [0.0]])
    expected = ((truth.in_units(outputs_off) - values[[0, 3]]) ** 2).mean() / np.var([10, 20, 30])
    assert float(truth.loss(outputs_off, torch.tensor([0, 3]))) == pytest.approx(float(expected), rel=1e-4)
    constant = replace(target, values=np.full((4, 1), 7.0, np.float32))
    assert NetworkTarget.of(constant, np.arange(4), "cpu").in_units(torch.zeros(2, 1)).tolist() == [[7.0], [7.0]]


@given(epochs=st.integers(1, 1000))
def test_recorded_epochs_are_spread_from_first_to_last(epochs: int) -> None:
    recorded = NetworkConfig(epochs=epochs).recorded_epochs
    assert len(recorded) == min(epochs, 8)
    assert recorded[-1] == epochs
    assert recorded[0] == 1
    steps = np.diff(recorded)
    assert len(steps) == 0 or 0 < steps.min() >= steps.max() - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, r"network\.epochs is 0; it must be at least 1"),
        ({"batch_size": 3}, r"network\.batch_size is 3; it must be at least 4"),
        ({"lr_step": 0}, r"network\.lr_step is 0; it must be at least 1"),
        ({"lr": 0.0}, r"network\.lr is 0\.0; it must be above 0"),
        ({"lr": float("nan")}, r"network\.lr is nan; it must be above 0"),
        ({"width": -1.0}, r"network\.width is -1\.0; it must be above 0"),
        ({"weight_decay": -0.1}, r"network\.weight_decay is -0\.1; it must be at least 0"),
        ({"min_crop": 0.0}, r"network\.min_crop is 0\.0; it must lie in \(0, 1\]"),
        ({"precision": "bf16"}, r"network\.precision is 'bf16'; did you mean bfloat16\? .*auto, float32, bfloat16"),
    ],
)
def test_invalid_setting_raises(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NetworkConfig(**settings)


@pytest.mark.parametrize(("width", "is_last"), [(0.0625, False), (0.125, True), (1.0, True)])
def test_narrow_networks_have_their_channels_first(width: float, is_last: bool) -> None:
    """A fault of oneDNN ends the process in the gradient of fewer than eight channels that come last."""
    trunk: Any = build_trunk((16, 16, 3), width=width)  # the type stubs lack the memory_format of `to`
    layout = torch.channels_last if is_last else torch.contiguous_format
    assert trunk.memory_format == layout
    frames = trunk._frames(torch.zeros(2, 1, 3, 16, 16))
    assert frames.is_contiguous(memory_format=layout)
    trunk.to(memory_format=layout)
    trunk(torch.rand(2, 1, 3, 16, 16)).sum().backward()
