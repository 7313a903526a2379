"""Fusion of the features of the modalities.

Letters: b samples, m modalities, k classes; features f_j (b, d_j). A modality that is absent has features of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Fusion(nn.Module, ABC):
    """Maps m features to fused logits (b, k), and to unimodal logits (m, b, k) if the fusion decomposes into them.

    num_features: d_j of each modality; hidden: width of the layers that the fusion adds.

    Attributes:
        paper: Reference; empty where there is none.
        decomposes: It has unimodal logits; otherwise each modality gets a separate head.
        encodes_jointly: It computes the features itself, by `encode`: the encoders exchange information.
        is_sum: Its fused logits are the sum of its unimodal ones.
        min_modalities: Fewest modalities that it fuses.
        needs_pairs: Its fused logits have weights that the unimodal logits do not use.
        usual_balancing: Balancer of `--balancing auto`.
        balancing_reason: Why other balancers do not work with it, for the message that refuses one.
    """

    paper: ClassVar[str] = ""
    decomposes: ClassVar[bool]
    encodes_jointly: ClassVar[bool] = False
    is_sum: ClassVar[bool] = False
    min_modalities: ClassVar[int] = 2
    needs_pairs: ClassVar[bool] = False
    usual_balancing: ClassVar[str] = "joint"
    balancing_reason: ClassVar[str] = ""

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.num_features = tuple(num_features)
        self.num_classes = num_classes
        self.hidden = hidden

    @classmethod
    def of(cls, encoders: Sequence[nn.Module], *, num_classes: int, hidden: int) -> Fusion:
        """Build the fusion of encoders; `num_features` of each is d_j. ConfigError where it cannot join them."""
        sizes = [int(encoder.num_features) for encoder in encoders]  # type: ignore[arg-type]
        return cls(sizes, num_classes=num_classes, hidden=hidden)

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Return what the fusion needs of settings, in words."""
        return () if cls.usual_balancing == "joint" else (f"--balancing {cls.usual_balancing}",)

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the fused logits (b, k)."""

    def encode(
        self, encoders: Sequence[nn.Module], inputs: Sequence[Tensor], modality_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute the features, as `FusionNet.encode`, where `encodes_jointly`."""
        raise TypeError(f"{type(self).__name__} joins features, and computes none")

    def fused_and_unimodal_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute fused and unimodal logits; a fusion that sums the latter computes them once."""
        return self(features), self.unimodal_logits(features)

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the unimodal logits (m, b, k). Raises TypeError where the fusion does not decompose."""
        raise TypeError(f"{type(self).__name__} has no unimodal logits")


class Summed(Fusion):
    """A fusion whose logits are the sum of the unimodal ones."""

    decomposes = True
    is_sum = True

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Sum the unimodal logits."""
        return self.unimodal_logits(features).sum(dim=0)

    def fused_and_unimodal_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the unimodal logits."""
        logits = self.unimodal_logits(features)
        return logits.sum(dim=0), logits


def _joint_weight(heads: Iterable[nn.Linear]) -> Tensor:
    """Return the weight (k, sum of d_j) of one classifier on the joined features: one product, not m and a sum."""
    return torch.cat([head.weight for head in heads], dim=1)


class Concat(Summed):
    """One linear classifier W, b over the joined features; unimodal logits are W_j f_j + b / m, as in OGM-GE."""

    min_modalities = 1

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes, bias=False) for d in num_features)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute W [f_1; ...; f_m] + b."""
        heads = cast("Iterable[nn.Linear]", self.heads)
        return functional.linear(torch.cat(list(features), dim=1), _joint_weight(heads), self.bias)

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute W_j f_j + b / m: the bias is shared evenly."""
        bias, heads = self.bias / len(self.heads), cast("Iterable[nn.Linear]", self.heads)
        return torch.stack([functional.linear(f, head.weight, bias) for head, f in zip(heads, features, strict=True)])


class Late(Summed):
    """A classifier on each modality; the fused logits are their sum: the papers' "sum"."""

    min_modalities = 1

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for d in num_features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the sum of the unimodal logits as one classifier, whose bias is the sum of the biases."""
        heads = list(cast("Iterable[nn.Linear]", self.heads))
        bias = torch.stack([head.bias for head in heads]).sum(dim=0)
        return functional.linear(torch.cat(list(features), dim=1), _joint_weight(heads), bias)

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute each classifier's logits."""
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])


class Gated(Fusion):
    """The first modality gates the others: h = sigmoid(W_1 f_1) * sum_{j > 1} W_j f_j; logits W h + b.

    OGM-GE's "gated" fusion for two modalities, after Kiela et al., arXiv 1802.02892; the sum over more than one other
    modality is ours. The layers have biases and `hidden` units, 512 in OGM-GE's code.
    """

    paper = "Kiela et al., arXiv 1802.02892"
    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.gate = nn.Linear(num_features[0], hidden)
        self.values = nn.ModuleList(nn.Linear(d, hidden) for d in num_features[1:])
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Gate, classify."""
        values = torch.stack([value(f) for value, f in zip(self.values, features[1:], strict=True)])
        logits: Tensor = self.head(self.gate(features[0]).sigmoid() * values.sum(dim=0))
        return logits


class GatedUnit(Fusion):
    """h = sum_j z_j * tanh(V_j f_j), z_j = sigmoid(U_j [f_1; ...; f_m]); logits W h + b.

    The gated multimodal unit of Arevalo et al., arXiv 1702.01992, in its form for any number of modalities.
    """

    paper = "Arevalo et al., arXiv 1702.01992"
    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.values = nn.ModuleList(nn.Linear(d, hidden) for d in num_features)
        self.gates = nn.Linear(sum(num_features), hidden * len(num_features))
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Weight the modalities by gates that depend on all of them."""
        gates = self.gates(torch.cat(list(features), dim=1)).sigmoid().chunk(len(self.values), dim=1)
        gated = [z * value(f).tanh() for z, value, f in zip(gates, self.values, features, strict=True)]
        logits: Tensor = self.head(torch.stack(gated).sum(dim=0))
        return logits


class Film(Fusion):
    """The first modality scales and shifts the others: h = gamma(f_1) * sum_{j > 1} f_j + beta(f_1); logits W h + b.

    Feature-wise linear modulation, Perez et al., arXiv 1709.07871, as in OGM-GE's code, which has two modalities: the
    features are modulated as they are. For more than two (ours) they are summed, and mapped to `hidden` features by a
    layer each where their widths differ.
    """

    paper = "Perez et al., arXiv 1709.07871"
    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        same_width = len(set(num_features[1:])) == 1
        width = num_features[1] if same_width else hidden
        self.film = nn.Linear(num_features[0], 2 * width)
        self.bring = nn.ModuleList(nn.Identity() if same_width else nn.Linear(d, width) for d in num_features[1:])
        self.head = nn.Linear(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Modulate, classify."""
        gamma, beta = self.film(features[0]).chunk(2, dim=1)
        values = torch.stack([bring(f) for bring, f in zip(self.bring, features[1:], strict=True)])
        logits: Tensor = self.head(gamma * values.sum(dim=0) + beta)
        return logits


class FilmProjected(Fusion):
    """FiLM of projected features: h = beta(f_1) + sum_{j > 1} (1 + gamma(f_1)) * V_j f_j; logits W h + b.

    Ours: the layers V_j, and 1 + gamma, which starts near the identity; see Film for the form of OGM-GE's code.
    """

    paper = "Perez et al., arXiv 1709.07871"
    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.film = nn.Linear(num_features[0], 2 * hidden)
        self.values = nn.ModuleList(nn.Linear(d, hidden) for d in num_features[1:])
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Modulate, sum, classify."""
        gamma, beta = self.film(features[0]).chunk(2, dim=1)
        h = beta
        for value, f in zip(self.values, features[1:], strict=True):
            h = h + (1 + gamma) * value(f)
        logits: Tensor = self.head(h)
        return logits


class Shared(Fusion):
    """One classifier for all modalities, MLA's head: z_j = W f_j + b; the fused logits are sum_j w_j z_j.

    By default w = softmax over j of minus the entropy of softmax(z_j), of every sample: the modality with the lower
    entropy weighs more. That is the test-time fusion of the paper (MLA, CVPR 2024); its released code computes one
    entropy per batch, of a softmax over the samples. Where `weights` (m,) are set, they are the w_j of all samples, the
    fixed fusion of the code. Features of different widths are first mapped to one width by a layer each (ours).
    """

    paper = "Zhang et al., CVPR 2024"
    usual_balancing = "mla"
    balancing_reason = "a shared classifier is trained one modality at a time, which only mla does"
    decomposes = True
    weights: Tensor

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        width, same_width = hidden, len(set(num_features)) == 1
        self.bring = nn.ModuleList(nn.Identity() if same_width else nn.Linear(d, width) for d in num_features)
        self.head = nn.Linear(num_features[0] if same_width else width, num_classes)
        self.register_buffer("weights", torch.zeros(len(num_features)))  # 0: by entropy

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Weight the unimodal logits."""
        logits = self.unimodal_logits(features)
        log_p = logits.float().log_softmax(dim=2)
        entropy = -(log_p.exp() * log_p).sum(dim=2)
        weights = torch.where(self.weights.any(), self.weights[:, None], (-entropy).softmax(dim=0))
        return (weights[:, :, None] * logits).sum(dim=0)

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Apply the classifier to each modality."""
        return torch.stack([self.head(bring(f)) for bring, f in zip(self.bring, features, strict=True)])
