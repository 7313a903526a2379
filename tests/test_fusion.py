"""Laws of fusion: each equals its formula, computed from the weights alone, also where a modality is absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmaudit.train.fusion import FUSIONS, Fusion, Mmtm, Shared

torch.set_num_threads(1)

DIMS = (5, 3, 4)
DECOMPOSE = sorted(name for name, type_ in FUSIONS.items() if type_.decomposes)
Weights = dict[str, Tensor]


def fusion_of(name: str, dims: tuple[int, ...] = DIMS) -> Fusion:
    torch.manual_seed(0)
    fusion = FUSIONS[name](dims, num_classes=6, hidden=7)
    for tensor in (
        *fusion.parameters(),
        *fusion.buffers(),
    ):  # biases start at 0, and a zero hides what is added to what
        nn.init.normal_(tensor, std=0.5)
    return fusion.eval()


def some(dims: tuple[int, ...] = DIMS, *, absent: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(11, dim, generator=generator).relu() for dim in dims]
    return [torch.zeros_like(f) if j == absent else f for j, f in enumerate(found)]


def linear(weights: Weights, name: str, rows: Tensor) -> Tensor:
    return rows @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def concat_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    weight = torch.cat([w[f"heads.{j}.weight"] for j in range(len(features))], dim=1)
    return torch.cat(features, dim=1) @ weight.T + w["bias"]


def late_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    found = torch.zeros(11, 6)
    for j, f in enumerate(features):
        found = found + linear(w, f"heads.{j}", f)
    return found


def gated_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    joined = torch.cat(features, dim=1)
    hidden = torch.zeros(11, 7)
    for j, f in enumerate(features):
        u, shift = w["gates.weight"][7 * j : 7 * j + 7], w["gates.bias"][7 * j : 7 * j + 7]
        hidden = hidden + linear(w, f"values.{j}", f).tanh() / (1 + (-joined @ u.T - shift).exp())
    return linear(w, "head", hidden)


def film_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    gamma = features[0] @ w["film.weight"][:7].T + w["film.bias"][:7]
    hidden = features[0] @ w["film.weight"][7:].T + w["film.bias"][7:]
    for j, f in enumerate(features[1:]):
        hidden = hidden + (1 + gamma) * linear(w, f"values.{j}", f)
    return linear(w, "head", hidden)


def excited(features: Tensor, by: Tensor) -> Tensor:
    return features * 2 / (1 + (-by).exp())


def usual_by_hand(w: Weights, dims: tuple[int, ...] = DIMS) -> list[Tensor]:
    return [w["mean"][sum(dims[:j]) : sum(dims[: j + 1])] for j in range(len(dims))]


def mmtm_by_hand(w: Weights, features: list[Tensor], *, cut: tuple[int, ...] = ()) -> Tensor:
    squeezed = linear(w, "squeeze", torch.cat(features, dim=1)).clamp(min=0)
    usual = usual_by_hand(w, tuple(f.shape[1] for f in features))
    found = torch.zeros(11, 6)
    for j, f in enumerate(features):
        by = usual[j] if j in cut else linear(w, f"excite.{j}", squeezed)
        found = found + linear(w, f"heads.{j}", excited(f, by))
    return found


def shared_by_hand(w: Weights, features: list[Tensor]) -> Tensor:
    """Sample by sample: weights exp(-H_j) / sum of all, H_j the entropy of what j says."""
    found = torch.zeros(11, 6)
    for row in range(11):
        says = [
            linear(w, "head", linear(w, f"bring.{j}", f[row]) if f"bring.{j}.weight" in w else f[row])
            for j, f in enumerate(features)
        ]
        p = [z.exp() / z.exp().sum() for z in says]
        sure = [float((each * each.log()).sum().exp()) for each in p]
        found[row] = sum(z * each / sum(sure) for z, each in zip(says, sure, strict=True))
    return found


BY_HAND = {
    "concat": concat_by_hand,
    "late": late_by_hand,
    "gated": gated_by_hand,
    "film": film_by_hand,
    "mmtm": mmtm_by_hand,
    "shared": shared_by_hand,
}


@torch.no_grad()
@pytest.mark.parametrize("absent", [None, 0, 1])
@pytest.mark.parametrize("dims", [(5, 3), DIMS, (4, 4, 4)])
@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_the_fused_answer_is_that_of_its_formula(name: str, dims: tuple[int, ...], absent: int | None) -> None:
    fusion, features = fusion_of(name, dims), some(dims, absent=absent)
    expected = BY_HAND[name](fusion.state_dict(), features)
    torch.testing.assert_close(fusion(features), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).min() > 1e-3  # it depends on the features


@torch.no_grad()
def test_an_absent_modality_adds_to_a_sum_nothing_but_its_bias() -> None:
    for name in ("concat", "late"):
        fusion = fusion_of(name)
        bias = fusion.state_dict().get("heads.1.bias", torch.zeros(6))
        less = fusion(some()) - fusion(some(absent=1))
        whole = fusion.unimodal_logits(some())[1] - fusion.unimodal_logits(some(absent=1))[1]
        torch.testing.assert_close(less, whole)
        shift = fusion.unimodal_logits(some(absent=1))[1]
        torch.testing.assert_close(shift, (bias if name == "late" else fusion.state_dict()["bias"] / 3).expand(11, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", ["concat", "late"])
@pytest.mark.parametrize("dims", [(5,), (5, 3), DIMS])
def test_what_each_says_alone_sums_to_the_fused_answer(name: str, dims: tuple[int, ...]) -> None:
    fusion, features = fusion_of(name, dims), some(dims)
    alone = fusion.unimodal_logits(features)
    assert alone.shape == (len(dims), 11, 6)
    torch.testing.assert_close(alone.sum(dim=0), fusion(features), rtol=1e-5, atol=1e-5)


def alone_by_hand(name: str, w: Weights, j: int, f: Tensor) -> Tensor:
    if name == "concat":
        return f @ w[f"heads.{j}.weight"].T + w["bias"] / 3
    if name == "shared":
        return linear(w, "head", linear(w, f"bring.{j}", f))
    return linear(w, f"heads.{j}", excited(f, usual_by_hand(w)[j]) if name == "mmtm" else f)


@torch.no_grad()
@pytest.mark.parametrize("name", DECOMPOSE)
def test_alone_is_the_modality_s_part_of_the_classifier(name: str) -> None:
    fusion, features = fusion_of(name), some()
    for j, f in enumerate(features):
        expected = alone_by_hand(name, fusion.state_dict(), j, f)
        torch.testing.assert_close(fusion.unimodal_logits(features)[j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", DECOMPOSE)
def test_alone_a_modality_hears_itself_alone(name: str) -> None:
    fusion, features = fusion_of(name), some()
    before, fused = fusion.unimodal_logits(features), fusion(features)
    features[1] = features[1] + 1
    moved = (fusion.unimodal_logits(features) - before).abs().amax(dim=(1, 2))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0.01
    assert (fusion(features) - fused).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(set(FUSIONS) - set(DECOMPOSE)))
def test_a_fusion_that_does_not_decompose_says_so(name: str) -> None:
    with pytest.raises(TypeError, match="has no unimodal logits"):
        fusion_of(name).unimodal_logits(some())


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_gradients_reach_every_parameter_and_every_feature(name: str) -> None:
    fusion, features = fusion_of(name), [f.requires_grad_() for f in some()]
    torch.autograd.backward(nn.functional.cross_entropy(fusion(features), torch.arange(11) % 6))
    for what, tensor in (*fusion.named_parameters(), *((f"feature {j}", f) for j, f in enumerate(features))):
        assert tensor.grad is not None, what
        assert tensor.grad.abs().max() > 1e-6, what


def fresh_mmtm() -> Mmtm:
    torch.manual_seed(0)
    fusion = Mmtm(DIMS, num_classes=6, hidden=7)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


def test_mmtm_squeezes_two_modalities_to_a_quarter() -> None:
    assert Mmtm((64, 32), num_classes=6, hidden=7).squeeze.out_features == 24


@torch.no_grad()
def test_mmtm_keeps_the_running_mean_of_its_excitations_in_training_alone() -> None:
    fusion = fresh_mmtm()
    w, expected = fusion.state_dict(), torch.zeros(12)
    for number in range(3):
        features = [f + number for f in some()]
        squeezed = linear(w, "squeeze", torch.cat(features, dim=1)).clamp(min=0)
        mean = torch.cat([linear(w, f"excite.{j}", squeezed).mean(dim=0) for j in range(3)])
        expected = 0.9 * expected + 0.1 * mean
        fusion.train()(features)
        torch.testing.assert_close(fusion.mean, expected)
        fusion.eval()(features)
        torch.testing.assert_close(fusion.mean, expected)
    assert expected.abs().min() > 1e-4
    fusion.train()([torch.zeros(0, dim) for dim in DIMS])  # what a process has of a last step may be empty
    torch.testing.assert_close(fusion.mean, expected)


@torch.no_grad()
@pytest.mark.parametrize("cut", [(0,), (1, 2), (0, 1, 2)])
def test_mmtm_cut_takes_the_path_without_the_others_news(cut: tuple[int, ...]) -> None:
    fusion, features = fusion_of("mmtm"), some()
    assert isinstance(fusion, Mmtm)
    whole = fusion(features)
    fusion.cut = [j in cut for j in range(3)]
    expected = mmtm_by_hand(fusion.state_dict(), features, cut=cut)
    torch.testing.assert_close(fusion(features), expected, rtol=1e-4, atol=1e-5)
    assert (fusion(features) - whole).abs().max() > 0.01
    if len(cut) == 3:
        torch.testing.assert_close(fusion(features), fusion.unimodal_logits(features).sum(dim=0))


def test_mmtm_cut_gives_the_others_no_gradient_by_its_own_path() -> None:
    fusion, features = fusion_of("mmtm"), [f.requires_grad_() for f in some()]
    assert isinstance(fusion, Mmtm)
    for cut, reached in ((False, True), (True, False)):
        fusion.cut = [cut, False, False]
        fusion.zero_grad()
        torch.autograd.backward(fusion(features).sum())
        grad = dict(fusion.named_parameters())["excite.0.weight"].grad
        assert (grad is not None and bool(grad.abs().max() > 0)) is reached


def test_shared_brings_different_widths_to_one_and_leaves_equal_ones() -> None:
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
def test_shared_listens_to_the_surer_modality() -> None:
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
    same = fusion([torch.tensor([[0.7]]), torch.tensor([[0.7]])])
    assert same[0].tolist() == pytest.approx([0.7, -0.7])  # weights sum to 1
