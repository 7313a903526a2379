"""Encoders of the trained network: standardisation, missing inputs, the trunk of the probes, dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmaudit.audit.probes.crops import to_pictures
from mmaudit.audit.probes.network import Network, build_network
from mmaudit.train.network_encoders import PictureEncoder, VectorEncoder, build_encoder

torch.set_num_threads(1)

SHAPES = [(8, 12), (16, 16, 3), (2, 16, 16, 3)]  # of audio, an image, two frames


def vectors(dim: int = 5, *, hidden: int = 7, dropout: float = 0.0) -> VectorEncoder:
    torch.manual_seed(0)
    encoder = build_encoder((dim,), hidden=hidden, dropout=dropout, width=1.0)
    assert isinstance(encoder, VectorEncoder)
    for parameter in encoder.parameters():  # biases start at 0, which would hide errors in additions
        nn.init.normal_(parameter, std=0.5)
    return encoder


def pictures(shape: tuple[int, ...], *, dropout: float = 0.0) -> PictureEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(shape, hidden=7, dropout=dropout, width=0.05)
    assert isinstance(encoder, PictureEncoder)
    return encoder


def random_rows(shape: tuple[int, ...], rows: int = 6) -> Tensor:
    return torch.randn(rows, int(np.prod(shape)), generator=torch.Generator().manual_seed(1))


def standardise(encoder: VectorEncoder, rows: Tensor) -> None:
    encoder.standardise_by(rows.mean(dim=0), rows.std(dim=0, correction=0), largest=rows.abs().amax(dim=0))


@torch.no_grad()
def test_vector_encoder_equals_manual_computation() -> None:
    """relu(layer norm(W (x - mean) / scale + b)) of each row."""
    encoder, rows = vectors(), 3 * random_rows((5,)) + 2
    standardise(encoder, rows)
    w = encoder.state_dict()
    assert set(w) == {"mean", "scale", *(f"layers.{layer}.{name}" for layer in (0, 1) for name in ("weight", "bias"))}
    hidden = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0) @ w["layers.0.weight"].T + w["layers.0.bias"]
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = (normed * w["layers.1.weight"] + w["layers.1.bias"]).clamp(min=0)
    torch.testing.assert_close(encoder(rows), expected, rtol=1e-4, atol=1e-5)
    assert encoder.num_features == expected.shape[1] == 7
    assert (expected > 0).any()


@torch.no_grad()
def test_scale_and_offset_do_not_matter_after_standardisation() -> None:
    features = []
    for gain, offset in ((1.0, 0.0), (100.0, -7.0)):
        encoder, rows = vectors(), gain * random_rows((5,)) + offset
        standardise(encoder, rows)
        features.append(encoder(rows))
    torch.testing.assert_close(features[0], features[1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_feature_that_varies_by_rounding_only_has_scale_1() -> None:
    encoder, rows = vectors(), random_rows((5,))
    rows[:, 2], rows[:, 4] = 9.0, 1e4 + 1e-4 * rows[:, 4]
    standardise(encoder, rows)
    assert encoder.scale[2] == encoder.scale[4] == 1
    torch.testing.assert_close(encoder.scale[[0, 1, 3]], rows.std(dim=0, correction=0)[[0, 1, 3]])
    assert encoder(rows + 1e-3).isfinite().all()


def test_missing_vector_equals_the_mean() -> None:
    encoder, rows = vectors(), 3 * random_rows((5,)) + 2
    standardise(encoder, rows)
    holed, filled = rows.clone(), rows.clone()
    holed[3], filled[3] = torch.nan, rows.mean(dim=0)
    features = encoder(holed)
    torch.testing.assert_close(features, encoder(filled))
    assert (features[3] - encoder(rows)[3]).abs().max() > 0.01
    torch.autograd.backward(features.square().sum())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_picture_encoder_equals_the_trunk_of_the_probes(shape: tuple[int, ...]) -> None:
    encoder = pictures(shape).eval()
    encoder.standardise_by(torch.full((shape[-1] if len(shape) > 2 else 1,), 0.5), torch.full((1,), 2.0))
    probe: Network = build_network(shape, num_outputs=4, width=0.05, seed=5).eval()
    probe.trunk.load_state_dict(encoder.trunk.state_dict())
    rows = random_rows(shape)
    features = encoder(rows)
    assert features.shape == (6, encoder.num_features) == (6, 26)  # round(0.05 * 512)
    assert features.dtype == torch.float32
    assert torch.equal(features, probe.trunk(to_pictures(rows, shape)))
    assert torch.equal(features, encoder(to_pictures(rows, shape)))  # already in the shape that augmentation returns
    assert torch.equal(probe.head(features), probe(to_pictures(rows, shape)))


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_are_standardised_by_channel_and_missing_ones_are_the_mean(shape: tuple[int, ...]) -> None:
    encoder, plain = pictures(shape).eval(), pictures(shape).eval()
    channels = 1 if len(shape) == 2 else 3
    mean, scale = torch.tensor([5.0, 60.0, -7.0])[:channels], torch.tensor([2.0, 0.0, 50.0])[:channels]
    encoder.standardise_by(mean, scale)
    rows = random_rows(shape)
    by_channel = rows.view(-1, channels) if channels > 1 else rows.view(-1, 1)
    raised = (by_channel * torch.where(scale > 0, scale, 1.0) + mean).view_as(rows)
    torch.testing.assert_close(encoder(raised), plain(rows), rtol=1e-3, atol=1e-4)
    missing, average = torch.full_like(rows[:1], torch.nan), mean.repeat(rows.shape[1] // channels)[None]
    torch.testing.assert_close(encoder(missing), encoder(average))


@torch.no_grad()
def test_uint8_pixels_equal_their_float_values() -> None:
    encoder = pictures((16, 16, 3)).eval()
    levels = torch.randint(0, 256, (4, 768), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder(levels), encoder(levels.float()))


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_of_at_most_one_uses_running_statistics(rows: int) -> None:
    """A process may get one image or none in the last step; batch norm raises for one, and crashes for none."""
    encoder = pictures((16, 16, 3)).train()
    encoder(random_rows((16, 16, 3)))
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    features = encoder(random_rows((16, 16, 3), rows=rows))
    assert features.shape == (rows, 26)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    torch.autograd.backward(features.square().sum())
    grads = [parameter.grad for parameter in encoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert encoder.trunk.training
    torch.testing.assert_close(features, encoder.eval()(random_rows((16, 16, 3), rows=rows)))


@torch.no_grad()
def test_frames_of_one_clip_form_a_batch() -> None:
    encoder = pictures((2, 16, 16, 3)).train()
    before = [buffer.clone() for buffer in encoder.buffers()]
    assert encoder(random_rows((2, 16, 16, 3), rows=1)).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(encoder.buffers(), before, strict=True))


def test_empty_batch_of_vectors_has_zero_gradients() -> None:
    encoder = vectors()
    torch.autograd.backward(encoder(torch.zeros(0, 5)).sum())
    assert all(p.grad is not None and (p.grad == 0).all() for p in encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: vectors(dropout=0.5), lambda: pictures((8, 12), dropout=0.5)])
def test_dropout_is_active_only_in_training(make: Any) -> None:
    encoder = make()
    rows = random_rows((5,) if isinstance(encoder, VectorEncoder) else (8, 12))
    assert not torch.equal(encoder(rows), encoder(rows))
    encoder.eval()
    assert torch.equal(encoder(rows), encoder(rows))
