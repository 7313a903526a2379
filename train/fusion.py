"""The network: one encoder and head per modality, one fused answer"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """Logits of one batch: fused (b, k), and unimodal (m, b, k), one for each branch alone."""

    fused: Tensor
    unimodal: Tensor


class FusionNet(nn.Module):
    """m feature vectors in, class logits out; the vectors are standardised by the training rows' mean and scale.

    A missing modality, NaN throughout, is taken for the mean of the training rows.
    concat: one linear classifier W, b over the joined features; branch j alone is W_j f_j + b / m, as OGM-GE reads it.
    late: a classifier on each branch; fused is their mean.
    """

    def __init__(self, *, dims: Sequence[int], num_classes: int, hidden: int, dropout: float, fusion: str) -> None:
        super().__init__()
        self.fusion = fusion
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout)) for dim in dims
        )
        self.heads = nn.ModuleList(nn.Linear(hidden, num_classes, bias=fusion == "late") for _ in dims)
        self.bias = nn.Parameter(torch.zeros(num_classes)) if fusion == "concat" else None
        for index, dim in enumerate(dims):
            self.register_buffer(f"mean_{index}", torch.zeros(dim))
            self.register_buffer(f"scale_{index}", torch.ones(dim))

    def standardise_by(self, inputs: Sequence[Tensor]) -> None:
        """Take mean and scale from training rows, m tensors (n, d_j); a constant feature keeps scale 1."""
        for index, some in enumerate(inputs):
            rows = some[~some.isnan().any(dim=1)]
            scale = rows.std(dim=0, unbiased=False)
            self.get_buffer(f"mean_{index}").copy_(rows.mean(dim=0))
            rounding = 1e-6 * rows.abs().amax(dim=0)
            self.get_buffer(f"scale_{index}").copy_(torch.where(scale > rounding, scale, 1.0))

    def forward(self, inputs: Sequence[Tensor]) -> Outputs:
        """Give the logits of a batch of m tensors (b, d_j)."""
        logits = []
        for index, (rows, encoder, head) in enumerate(zip(inputs, self.encoders, self.heads, strict=True)):
            standard = (rows - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"scale_{index}")
            logits.append(head(encoder(standard.nan_to_num(nan=0.0))))
        unimodal = torch.stack(logits)
        if self.bias is None:
            return Outputs(unimodal.mean(dim=0), unimodal)
        # The joined classifier is the sum of its parts: W [f_1; ...; f_m] + b.
        return Outputs(unimodal.sum(dim=0) + self.bias, unimodal + self.bias / len(logits))

    def loss(self, outputs: Outputs, label: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean cross entropy of a batch: of the fused logits, and for late fusion of every branch as well."""
        parts = [outputs.fused] if self.fusion == "concat" else [outputs.fused, *outputs.unimodal]
        each = torch.stack([nn.functional.cross_entropy(part.float(), label, reduction="none") for part in parts])
        return (each.mean(dim=0) * weight).sum() / weight.sum()
