"""Tests of fusion: each equals its formula, computed from the weights, also where a modality is absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmaudit.train import FUSIONS
from mmaudit.train.cross_modal import Mmtm
from mmaudit.train.fusion import Film, Fusion, Gated, Shared

torch.set_num_threads(1)

DIMS = (5, 3, 4)
OF_FEATURES = sorted(name for name in FUSIONS if not FUSIONS.load(name).encodes_jointly)  # see test_cross_modal
DECOMPOSING = [name for name in OF_FEATURES if FUSIONS.load(name).decomposes]
Weights = dict[str, Tensor]


def fusion_of(name: str, dims: tuple[int, ...] = DIMS) -> Fusion:
    torch.manual_seed(0)
    fusion: Fusion = FUSIONS.load(name)(dims, num_classes=6, hidden=7)
    for parameter in fusion.parameters():  # biases start at 0, which would hide errors in sums
        nn.init.normal_(parameter, std=0.5)
    if isinstance(fusion, Mmtm):
        nn.init.uniform_(fusion.mean)
    return fusion.eval()


def random_features(dims: tuple[int, ...] = DIMS, *, absent: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(11, dim, generator=generator).relu() for dim in dims]
    return [torch.zeros_like(f) if j == absent else f for j, f in enumerate(features)]


def linear(weights: Weights, name: str, rows: Tensor) -> Tensor:
    return rows @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def concat_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    weight = torch.cat([w[f"heads.{j}.weight"] for j in range(len(features))], dim=1)
    return torch.cat(features, dim=1) @ weight.T + w["bias"]


def late_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    logits = torch.zeros(11, 6)
    for j, f in enumerate(features):
        logits = logits + linear(w, f"heads.{j}", f)
    return logits


def gated_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    gate = 1 / (1 + (-linear(w, "gate", features[0])).exp())
    others = torch.zeros(11, 7)
    for j, f in enumerate(features[1:]):
        others = others + linear(w, f"values.{j}", f)
    return linear(w, "head", gate * others)


def gated_unit_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    joined = torch.cat(features, dim=1)
    hidden = torch.zeros(11, 7)
    for j, f in enumerate(features):
        u, shift = w["gates.weight"][7 * j : 7 * j + 7], w["gates.bias"][7 * j : 7 * j + 7]
        hidden = hidden + linear(w, f"values.{j}", f).tanh() / (1 + (-joined @ u.T - shift).exp())
    return linear(w, "head", hidden)


def film_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    modulation = linear(w, "film", features[0])
    width = modulation.shape[1] // 2
    others = torch.zeros(11, width)
    for j, f in enumerate(features[1:]):
        others = others + (linear(w, f"bring.{j}", f) if f"bring.{j}.weight" in w else f)
    return linear(w, "head", modulation[:, :width] * others + modulation[:, width:])


def film_projected_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    gamma = features[0] @ w["film.weight"][:7].T + w["film.bias"][:7]
    hidden = features[0] @ w["film.weight"][7:].T + w["film.bias"][7:]
    for j, f in enumerate(features[1:]):
        hidden = hidden + (1 + gamma) * linear(w, f"values.{j}", f)
    return linear(w, "head", hidden)


def mean_excitations_by_hand(w: Weights, dims: tuple[int, ...] = DIMS) -> list[Tensor]:
    return [w["mean"][sum(dims[:j]) : sum(dims[: j + 1])] for j in range(len(dims))]


def mmtm_by_hand(w: Weights, features: list[Tensor], *, cut: tuple[int, ...] = ()) -> Tensor:
    squeezed = linear(w, "block.squeeze", torch.cat(features, dim=1)).clamp(min=0)
    means = mean_excitations_by_hand(w, tuple(f.shape[1] for f in features))
    logits = torch.zeros(11, 6)
    for j, f in enumerate(features):
        excitation = means[j] if j in cut else 1 / (1 + (-linear(w, f"block.excite.{j}", squeezed)).exp())
        logits = logits + linear(w, f"heads.{j}", 2 * f * excitation) / len(features)
    return logits


def shared_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    """Sample by sample: weights exp(-H_j) / sum of all, H_j the entropy of modality j's probabilities."""
    logits = torch.zeros(11, 6)
    for row in range(11):
        unimodal = [
            linear(w, "head", linear(w, f"bring.{j}", f[row]) if f"bring.{j}.weight" in w else f[row])
            for j, f in enumerate(features)
        ]
        p = [z.exp() / z.exp().sum() for z in unimodal]
        weights = [float((weight * weight.log()).sum().exp()) for weight in p]
        logits[row] = sum(z * weight / sum(weights) for z, weight in zip(unimodal, weights, strict=True))
    return logits


BY_HAND = {
    "concat": concat_by_hand,
    "late": late_by_hand,
    "gated": gated_by_hand,
    "gated-unit": gated_unit_by_hand,
    "film": film_by_hand,
    "film-projected": film_projected_by_hand,
    "mmtm": mmtm_by_hand,
    "shared": shared_by_hand,
}


@torch.no_grad()
@pytest.mark.parametrize("absent", [None, 0, 1])
@pytest.mark.parametrize("dims", [(5, 3), DIMS, (4, 4, 4)])
@pytest.mark.parametrize("name", OF_FEATURES)
def test_fused_logits_follow_the_formula(name: str, dims: tuple[int, ...], absent: int | None) -> None:
    fusion, features = fusion_of(name, dims), random_features(dims, absent=absent)
    expected = BY_HAND[name](fusion.state_dict(), features)
    torch.testing.assert_close(fusion(features), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).min() > 1e-3  # it depends on the features


@torch.no_grad()
def test_absent_modality_adds_only_its_bias_to_a_sum() -> None:
    for name in ("concat", "late"):
        fusion = fusion_of(name)
        bias = fusion.state_dict().get("heads.1.bias", torch.zeros(6))
        fused_change = fusion(random_features()) - fusion(random_features(absent=1))
        unimodal_change = (
            fusion.unimodal_logits(random_features())[1] - fusion.unimodal_logits(random_features(absent=1))[1]
        )
        torch.testing.assert_close(fused_change, unimodal_change)
        shift = fusion.unimodal_logits(random_features(absent=1))[1]
        torch.testing.assert_close(shift, (bias if name == "late" else fusion.state_dict()["bias"] / 3).expand(11, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", ["concat", "late"])
@pytest.mark.parametrize("dims", [(5,), (5, 3), DIMS])
def test_unimodal_logits_sum_to_the_fused_logits(name: str, dims: tuple[int, ...]) -> None:
    fusion, features = fusion_of(name, dims), random_features(dims)
    unimodal = fusion.unimodal_logits(features)
    assert unimodal.shape == (len(dims), 11, 6)
    torch.testing.assert_close(unimodal.sum(dim=0), fusion(features), rtol=1e-5, atol=1e-5)


def unimodal_by_hand(name: str, w: Weights, j: int, f: Tensor) -> Tensor:
    if name == "concat":
        return f @ w[f"heads.{j}.weight"].T + w["bias"] / 3
    if name == "shared":
        return linear(w, "head", linear(w, f"bring.{j}", f))
    return linear(w, f"heads.{j}", 2 * f * mean_excitations_by_hand(w)[j] if name == "mmtm" else f)


@torch.no_grad()
@pytest.mark.parametrize("name", DECOMPOSING)
def test_unimodal_logits_follow_the_formula(name: str) -> None:
    fusion, features = fusion_of(name), random_features()
    for j, f in enumerate(features):
        expected = unimodal_by_hand(name, fusion.state_dict(), j, f)
        torch.testing.assert_close(fusion.unimodal_logits(features)[j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", DECOMPOSING)
def test_unimodal_logits_depend_on_their_modality_only(name: str) -> None:
    fusion, features = fusion_of(name), random_features()
    before, fused = fusion.unimodal_logits(features), fusion(features)
    features[1] = features[1] + 1
    moved = (fusion.unimodal_logits(features) - before).abs().amax(dim=(1, 2))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0.01
    assert (fusion(features) - fused).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(set(OF_FEATURES) - set(DECOMPOSING)))
def test_unimodal_logits_of_other_fusions_raise(name: str) -> None:
    with pytest.raises(TypeError, match="has no unimodal logits"):
        fusion_of(name).unimodal_logits(random_features())


@pytest.mark.parametrize("name", OF_FEATURES)
def test_gradients_reach_every_parameter_and_feature(name: str) -> None:
    fusion, features = fusion_of(name), [f.requires_grad_() for f in random_features()]
    torch.autograd.backward(nn.functional.cross_entropy(fusion(features), torch.arange(11) % 6))
    for tensor_name, tensor in (*fusion.named_parameters(), *((f"feature {j}", f) for j, f in enumerate(features))):
        assert tensor.grad is not None, tensor_name
        assert tensor.grad.abs().max() > 1e-6, tensor_name


@torch.no_grad()
def test_gated_and_film_of_ogm_ge_on_one_sample() -> None:
    """Worked out by hand: features x = (1, -1) and y = (2, 3), two classes, identity weights but for the biases."""
    x, y = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    gated, film = (kind((2, 2), num_classes=2, hidden=2) for kind in (Gated, Film))
    assert isinstance(gated, Gated)
    assert isinstance(film, Film)
    for layer in (gated.gate, gated.values[0], gated.head, film.head):
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
    gated.head.bias.copy_(torch.tensor([0.5, 0.0]))
    # sigmoid(1) = 0.7310586, sigmoid(-1) = 0.2689414: h = (1.4621172, 0.8068243).
    assert gated([x, y])[0].tolist() == pytest.approx([1.9621172, 0.8068243], abs=1e-6)
    film.film.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -1.0]]))
    film.film.bias.zero_()
    # gamma = (2, -1), beta = (0, 1): h = (2 * 2 + 0, -1 * 3 + 1), where (1 + gamma) would give (6, 1).
    assert film([x, y])[0].tolist() == pytest.approx([4.0, -2.0])
    assert [name for name, _ in film.named_parameters()] == ["film.weight", "film.bias", "head.weight", "head.bias"]


def random_mmtm() -> Mmtm:
    torch.manual_seed(0)
    fusion = Mmtm(DIMS, num_classes=6, hidden=7)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


def test_mmtm_squeezes_two_modalities_to_a_quarter() -> None:
    assert Mmtm((64, 32), num_classes=6, hidden=7).block.squeeze.out_features == 24


@torch.no_grad()
def test_mmtm_updates_mean_excitations_in_training_only() -> None:
    """The mean over all training steps of the excitations after the sigmoid; before the first it is 0.5."""
    fusion, means = random_mmtm(), list[Tensor]()
    w = fusion.state_dict()
    assert fusion.mean.tolist() == [0.5] * 12
    for step in range(3):
        features = [f + step for f in random_features()]
        squeezed = linear(w, "block.squeeze", torch.cat(features, dim=1)).clamp(min=0)
        means.append(torch.cat([linear(w, f"block.excite.{j}", squeezed).sigmoid().mean(dim=0) for j in range(3)]))
        expected = torch.stack(means).mean(dim=0)
        fusion.train()(features)
        torch.testing.assert_close(fusion.mean, expected)
        fusion.eval()(features)
        torch.testing.assert_close(fusion.mean, expected)
    assert (means[0] - means[2]).abs().max() > 0.01
    fusion.train()([torch.zeros(0, dim) for dim in DIMS])  # a process may have no row of a last step
    torch.testing.assert_close(fusion.mean, expected)


@torch.no_grad()
@pytest.mark.parametrize("cut", [(0,), (1, 2), (0, 1, 2)])
def test_mmtm_cut_uses_the_mean_excitation(cut: tuple[int, ...]) -> None:
    fusion, features = fusion_of("mmtm"), random_features()
    assert isinstance(fusion, Mmtm)
    uncut = fusion(features)
    fusion.cut = [j in cut for j in range(3)]
    expected = mmtm_by_hand(fusion.state_dict(), features, cut=cut)
    torch.testing.assert_close(fusion(features), expected, rtol=1e-4, atol=1e-5)
    assert (fusion(features) - uncut).abs().max() > 0.01
    if len(cut) == 3:
        torch.testing.assert_close(fusion(features), fusion.unimodal_logits(features).mean(dim=0))


def test_mmtm_cut_passes_no_gradient_to_its_excitation() -> None:
    fusion, features = fusion_of("mmtm"), [f.requires_grad_() for f in random_features()]
    assert isinstance(fusion, Mmtm)
    for cut, reached in ((False, True), (True, False)):
        fusion.cut = [cut, False, False]
        fusion.zero_grad()
        torch.autograd.backward(fusion(features).sum())
        grad = dict(fusion.named_parameters())["block.excite.0.weight"].grad
        assert (grad is not None and bool(grad.abs().max() > 0)) is reached


def test_shared_maps_different_widths_to_one() -> None:
    assert [name for name, _ in Shared((4, 4), num_classes=6, hidden=7).named_parameters()] == [
        "head.weight",
        "head.bias",
    ]
    unlike = Shared((4, 5), num_classes=6, hidden=7)
    assert {tuple(parameter.shape) for name, parameter in unlike.named_parameters() if "weight" in name} == {
        (7, 4),
        (7, 5),
        (6, 7),
    }


@torch.no_grad()
def test_shared_weights_the_more_confident_modality_higher() -> None:
    """Two modalities of one feature, classes a and b: logits (z, -z), entropies by hand."""
    fusion = Shared((1, 1), num_classes=2, hidden=7)
    fusion.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    fusion.head.bias.zero_()
    sure, unsure = 3.0, -0.5
    p = torch.tensor([sure, unsure]).mul(2).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    weight = (-entropy).exp() / (-entropy).exp().sum()
    assert weight[0] > 0.6
    fused = fusion([torch.tensor([[sure]]), torch.tensor([[unsure]])])
    assert fused[0, 0].item() == pytest.approx(float(weight[0] * sure + weight[1] * unsure), rel=1e-5)
    equal = fusion([torch.tensor([[0.7]]), torch.tensor([[0.7]])])
    assert equal[0].tolist() == pytest.approx([0.7, -0.7])  # weights sum to 1


@torch.no_grad()
def test_shared_with_fixed_weights_is_their_weighted_sum() -> None:
    fusion, features = fusion_of("shared", (4, 4)), random_features((4, 4))
    assert isinstance(fusion, Shared)
    first, second = fusion.unimodal_logits(features)
    fusion.weights.copy_(torch.tensor([0.55, 0.45]))
    torch.testing.assert_close(fusion(features), 0.55 * first + 0.45 * second)
