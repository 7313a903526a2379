"""Fusion of the features of the modalities.

Letters: b samples, m modalities, k classes; features f_j (b, d_j). A modality that is absent has features of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Fusion(nn.Module, ABC):
    """m features in, fused logits (b, k) out; and the logits (m, b, k) of each modality alone, if it gives them any.

    num_features: d_j of each modality; hidden: width of what the fusion adds.
    """

    decomposes: ClassVar[bool]  # whether `alone` is part of it; otherwise each modality has a head of its own beside it

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.num_features = tuple(num_features)
        self.num_classes = num_classes
        self.hidden = hidden

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Give the fused logits (b, k)."""

    def both(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give the fused logits and those of each modality alone; a fusion that adds up the latter has them once."""
        return self(features), self.alone(features)

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """Give the logits (m, b, k) of each modality alone."""
        raise TypeError(f"{type(self).__name__} gives no modality a say of its own")


def _joined(heads: Iterable[nn.Linear]) -> Tensor:
    """Give the weight (k, sum of d_j) of one classifier on the joined features: one product instead of m, and a sum."""
    return torch.cat([head.weight for head in heads], dim=1)


class Concat(Fusion):
    """One linear classifier W, b over the joined features; alone, j says W_j f_j + b / m, as OGM-GE reads it."""

    decomposes = True

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes, bias=False) for d in num_features)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """W [f_1; ...; f_m] + b."""
        heads = cast("Iterable[nn.Linear]", self.heads)
        return functional.linear(torch.cat(list(features), dim=1), _joined(heads), self.bias)

    def both(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Add what each says."""
        alone = self.alone(features)
        return alone.sum(dim=0), alone

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """Share the bias evenly."""
        share, heads = self.bias / len(self.heads), cast("Iterable[nn.Linear]", self.heads)
        return torch.stack([functional.linear(f, head.weight, share) for head, f in zip(heads, features, strict=True)])


class Late(Fusion):
    """A classifier on each modality; the fused logits are their sum: the papers' "sum"."""

    decomposes = True

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for d in num_features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Add what each says: one classifier of all, whose bias is the sum of theirs."""
        heads = list(cast("Iterable[nn.Linear]", self.heads))
        bias = torch.stack([head.bias for head in heads]).sum(dim=0)
        return functional.linear(torch.cat(list(features), dim=1), _joined(heads), bias)

    def both(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Add what each says."""
        alone = self.alone(features)
        return alone.sum(dim=0), alone

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """Each classifier's logits."""
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])


class Gated(Fusion):
    """h = sum_j z_j * tanh(V_j f_j), z_j = sigmoid(U_j [f_1; ...; f_m]); logits W h + b.

    The gated multimodal unit of Arevalo et al., arXiv 1702.01992, in its form for any number of modalities.
    """

    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.values = nn.ModuleList(nn.Linear(d, hidden) for d in num_features)
        self.gates = nn.Linear(sum(num_features), hidden * len(num_features))
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Weigh the modalities by gates that all of them decide about."""
        gates = self.gates(torch.cat(list(features), dim=1)).sigmoid().chunk(len(self.values), dim=1)
        parts = [z * value(f).tanh() for z, value, f in zip(gates, self.values, features, strict=True)]
        logits: Tensor = self.head(torch.stack(parts).sum(dim=0))
        return logits


class Film(Fusion):
    """The first modality scales and shifts the others: h = beta(f_1) + sum_{j > 1} (1 + gamma(f_1)) * V_j f_j.

    Feature-wise linear modulation, Perez et al., arXiv 1709.07871, as OGM-GE's code has it for two modalities; the sum
    over more than one other is ours, and so is 1 + gamma, which begins near the identity.
    """

    decomposes = False

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.film = nn.Linear(num_features[0], 2 * hidden)
        self.values = nn.ModuleList(nn.Linear(d, hidden) for d in num_features[1:])
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Modulate, add, classify."""
        gamma, beta = self.film(features[0]).chunk(2, dim=1)
        h = beta
        for value, f in zip(self.values, features[1:], strict=True):
            h = h + (1 + gamma) * value(f)
        logits: Tensor = self.head(h)
        return logits


class Mmtm(Fusion):
    """Cross-modal squeeze: s = relu(Z [f_1; ...; f_m]), f_j * 2 sigmoid(E_j s); a head on each, logits added.

    The multimodal transfer module of Vaezi Joze et al. (CVPR 2020), which Greedy (ICML 2022) needs, once, after the
    encoders (ours; theirs stand between the stages of convolutions). Alone, j is excited by the running mean of its
    excitation in training instead: the path without the others' news that Greedy's rebalancing steps take.
    `cut` (m,) says for which modalities the fused answer takes that path too.
    """

    decomposes = True
    mean: Tensor
    MOMENTUM = 0.1

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        squeezed = max(1, sum(num_features) // (2 * len(num_features)))  # a quarter of two, as in the paper
        self.squeeze = nn.Linear(sum(num_features), squeezed)
        self.excite = nn.ModuleList(nn.Linear(squeezed, d) for d in num_features)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for d in num_features)
        self.register_buffer("mean", torch.zeros(sum(num_features)))  # before the sigmoid
        self.cut = [False] * len(num_features)

    def excitations(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Give what each modality's features are to be excited by, before the sigmoid: m of (b, d_j)."""
        squeezed = self.squeeze(torch.cat(list(features), dim=1)).relu()
        return [excite(squeezed) for excite in self.excite]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Excite, classify, add; in training, keep the running mean of the excitations."""
        fresh = self.excitations(features)
        if self.training and len(features[0]):  # a process may have no row of a last step
            with torch.no_grad():
                self.mean.lerp_(torch.cat(fresh, dim=1).float().mean(dim=0), self.MOMENTUM)
        usual = self.usual()
        logits = [
            head(f * 2 * (mean.expand_as(f) if cut else now).sigmoid())
            for head, f, now, mean, cut in zip(self.heads, features, fresh, usual, self.cut, strict=True)
        ]
        return torch.stack(logits).sum(dim=0)

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """Excite each by its usual excitation."""
        return torch.stack(
            [head(f * 2 * mean.sigmoid()) for head, f, mean in zip(self.heads, features, self.usual(), strict=True)]
        )

    def usual(self) -> list[Tensor]:
        """Give the running mean of each modality's excitations, before the sigmoid: m of (d_j,)."""
        ends = list(accumulate(self.num_features))
        return [self.mean[end - size : end] for end, size in zip(ends, self.num_features, strict=True)]


class Shared(Fusion):
    """One classifier for all modalities, by turns: MLA's head. Fused, the surer modality weighs more.

    z_j = W f_j + b; the fused logits are sum_j w_j z_j, w = softmax over j of minus the entropy of softmax(z_j): MLA
    (CVPR 2024), test-time fusion. Features of different widths are brought to one by a layer of their own (ours).
    """

    decomposes = True

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        width, alike = hidden, len(set(num_features)) == 1
        self.bring = nn.ModuleList(nn.Identity() if alike else nn.Linear(d, width) for d in num_features)
        self.head = nn.Linear(num_features[0] if alike else width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Weigh what each says by how sure it is."""
        logits = self.alone(features)
        log_p = logits.float().log_softmax(dim=2)
        entropy = -(log_p.exp() * log_p).sum(dim=2)
        return ((-entropy).softmax(dim=0)[:, :, None] * logits).sum(dim=0)

    def alone(self, features: Sequence[Tensor]) -> Tensor:
        """The same classifier on each."""
        return torch.stack([self.head(bring(f)) for bring, f in zip(self.bring, features, strict=True)])


FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concat,
    "late": Late,
    "gated": Gated,
    "film": Film,
    "mmtm": Mmtm,
    "shared": Shared,
}
