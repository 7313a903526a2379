"""Fusions with a cross-modal path, which Greedy measures and cuts: on features, or within two ResNets.

Letters: b samples, m modalities, k classes; features f_j (b, d_j). A modality that is absent has features of 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..audit.errors import ConfigError
from .fusion import Fusion
from .network_encoders import PictureEncoder

_FIRST_STAGE = 1  # of 0 to 3: the first stage of a ResNet-18 whose feature maps are excited, as in Greedy's code


class SqueezeExcitation(nn.Module):
    """s = relu(Z [f_1; ...; f_m]), and the excitation sigmoid(E_j s) of each modality's features, m of (b, d_j)."""

    def __init__(self, sizes: Sequence[int], *, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(sum(sizes), squeezed)
        self.excite = nn.ModuleList(nn.Linear(squeezed, size) for size in sizes)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the excitations."""
        squeezed = self.squeeze(torch.cat(list(features), dim=1)).relu()
        return [excite(squeezed).sigmoid() for excite in self.excite]


class CrossModal(Fusion):
    """Branches x_j, each of modality j excited by all; the fused logits are their mean, as in Greedy's code.

    `mean` is the mean of each excitation over all training steps (Greedy's code also counts evaluations, and the second
    modality gets the mean of the first). For unimodal logits it replaces the excitation: the path without information
    from the other modalities, which Greedy's rebalancing steps use. `cut` (m,): for which modalities the branches use
    that path. Its blocks are numbered; `sizes[block][j]` is the number of excitations of modality j.
    """

    decomposes = True
    needs_pairs = True
    mean: Tensor
    num_steps: Tensor
    heads: nn.ModuleList

    def __init__(
        self, num_features: Sequence[int], *, num_classes: int, hidden: int, sizes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        ends = list(accumulate(size for block in sizes for size in block))
        self._ends = [ends[index : index + len(num_features)] for index in range(0, len(ends), len(num_features))]
        self._sizes = sizes
        self.register_buffer("mean", torch.full((ends[-1],), 0.5))
        self.register_buffer("num_steps", torch.zeros(()))
        self.cut = [False] * len(num_features)

    @abstractmethod
    def cross_parameters(self, modality: int) -> list[nn.Parameter]:
        """Return the parameters that carry the features of all modalities to a branch."""

    @abstractmethod
    def branch_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits of every branch, m of (b, k)."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the mean of the branches' logits."""
        return torch.stack(self.branch_logits(features)).mean(dim=0)

    def mean_excitations(self, block: int = 0) -> list[Tensor]:
        """Return the mean over training steps of each modality's excitations in a block, m of (d_j,)."""
        mean = self.mean.clone()  # the next step changes it in place
        return [mean[end - size : end] for end, size in zip(self._ends[block], self._sizes[block], strict=True)]

    @torch.no_grad()
    def _update_mean(self, excitations: Sequence[Tensor], *, block: int = 0) -> None:
        """Count a step's excitations in; its first block counts the step."""
        if block == 0:
            self.num_steps += 1
        if len(excitations[0]):  # a process may have no row of a last step
            end = self._ends[block][-1]
            mean = torch.cat(list(excitations), dim=1).float().mean(dim=0)
            self.mean[end - len(mean) : end].lerp_(mean, 1 / self.num_steps)


class Mmtm(CrossModal):
    """Cross-modal squeeze of features: x_j = W_j (f_j * 2 sigmoid(E_j s)) + b_j, s = relu(Z [f_1; ...; f_m]).

    The multimodal transfer module of Vaezi Joze et al. (CVPR 2020), which Greedy (ICML 2022) needs, once, on the
    features of encoders of any kind (ours; see MmtmStages). The factor 2 is that of Vaezi Joze et al., which Greedy's
    code leaves out.
    """

    paper = "Vaezi Joze et al., CVPR 2020"

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden, sizes=[num_features])
        squeezed = max(1, sum(num_features) // (2 * len(num_features)))  # a quarter of two, as in the paper
        self.block = SqueezeExcitation(num_features, squeezed=squeezed)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for d in num_features)

    def cross_parameters(self, modality: int) -> list[nn.Parameter]:
        """Return the parameters of a modality's excitation, and of the squeeze."""
        return [*self.block.excite[modality].parameters(), *self.block.squeeze.parameters()]

    def branch_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits of every branch, m of (b, k); in training, update the mean excitations."""
        excitations = self.block(features)
        if self.training:
            self._update_mean(excitations)
        means = self.mean_excitations()
        return self._excited_logits(
            features,
            [mean if cut else e for e, mean, cut in zip(excitations, means, self.cut, strict=True)],
        )

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits with each modality's mean excitation."""
        return torch.stack(self._excited_logits(features, self.mean_excitations()))

    def _excited_logits(self, features: Sequence[Tensor], excitations: Sequence[Tensor]) -> list[Tensor]:
        return [head(f * 2 * excitation) for head, f, excitation in zip(self.heads, features, excitations, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pictures:
    """One modality's pictures of a batch: its encoder, and the samples that have it (b_j,) of b."""

    index: int
    encoder: PictureEncoder
    frames: int
    rows: Tensor

    def averaged(self, maps: Tensor) -> Tensor:
        """Average feature maps (b_j f, c, h, w) over pixels and frames, in float32: (b_j, c)."""
        return maps.float().mean(dim=(2, 3)).view(len(self.rows), self.frames, -1).mean(dim=1)

    def excited(self, maps: Tensor, excitation: Tensor) -> Tensor:
        """Multiply feature maps (b_j f, c, h, w) by excitations (b_j, c)."""
        return maps * excitation.to(maps.dtype).repeat_interleave(self.frames, dim=0)[:, :, None, None]

    def in_batch(self, values: Tensor, *, size: int) -> Tensor:
        """Return values (b_j, c) as rows of the batch (b, c): 0 where a sample lacks the modality."""
        return values.new_zeros(size, values.shape[1]).index_copy(0, self.rows, values)


class MmtmStages(CrossModal):
    """Cross-modal squeeze after stages 2, 3 and 4 of ResNet-18 encoders, as in the code of Greedy (ICML 2022).

    Each block averages the feature maps of every modality over pixels and frames, squeezes them to half as many
    numbers, and multiplies the maps of modality j by their excitation sigmoid(E_j s), without the factor 2 of Vaezi
    Joze et al.; x_j is a linear classifier of the averaged maps after the last block.

    The features f_j (b, 2 d_j) are two halves: with the excitations, and with their means, of modality j alone. A
    sample that lacks a modality, in the data or in an evaluation without it, uses the means (ours; the authors have
    complete samples of two modalities). In training, where the unimodal logits are not read, both halves are the first.
    Raises ConfigError for encoders other than ResNet-18.
    """

    paper = "Wu et al., ICML 2022"
    encodes_jointly = True
    usual_balancing: ClassVar[str] = "greedy"
    balancing_reason: ClassVar[str] = "the two halves of its features are not those of one modality each"

    def __init__(
        self, num_features: Sequence[int], *, num_classes: int, hidden: int, sizes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden, sizes=sizes)
        self.blocks = nn.ModuleList(SqueezeExcitation(block, squeezed=max(1, sum(block) // 2)) for block in sizes)
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for d in num_features)

    @classmethod
    def of(cls, encoders: Sequence[nn.Module], *, num_classes: int, hidden: int) -> MmtmStages:
        """Build the fusion of ResNet-18 encoders."""
        maps = [encoder.trunk.num_maps for encoder in encoders if isinstance(encoder, PictureEncoder)]
        if len(maps) < len(encoders):
            raise ConfigError(
                "--fusion mmtm-stages joins the stages of ResNet-18 encoders, and a modality has none: score with "
                "data.encoder=NAME=resnet18 for each, or use --fusion mmtm"
            )
        sizes = list(zip(*(sizes[_FIRST_STAGE:] for sizes in maps), strict=True))
        return cls(sizes[-1], num_classes=num_classes, hidden=hidden, sizes=sizes)

    def cross_parameters(self, modality: int) -> list[nn.Parameter]:
        """Return the parameters of a modality's excitations, and of all squeezes."""
        parameters: list[nn.Parameter] = []
        for block in self.blocks:
            assert isinstance(block, SqueezeExcitation)
            parameters += [*block.excite[modality].parameters(), *block.squeeze.parameters()]
        return parameters

    def encode(
        self, encoders: Sequence[nn.Module], inputs: Sequence[Tensor], modality_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute both halves of the features; in training, update the mean excitations."""
        size, device = len(inputs[0] if modality_mask is None else modality_mask), inputs[0].device
        mask = (
            torch.ones(size, len(inputs), dtype=torch.bool, device=device) if modality_mask is None else modality_mask
        )
        modalities, pictures = list[_Pictures](), list[Tensor]()
        for index, (encoder, rows) in enumerate(zip(encoders, inputs, strict=True)):
            assert isinstance(encoder, PictureEncoder)  # checked by `of`
            if len(rows) > 0:
                pictures.append(encoder.pictures(rows))
                indices = (
                    torch.arange(size, device=device) if len(rows) == size else mask[:, index].nonzero().squeeze(1)
                )
                frames = pictures[-1].shape[1]
                modalities.append(_Pictures(index=index, encoder=encoder, frames=frames, rows=indices))
        is_complete = mask.all(dim=1) if len(modalities) == len(inputs) else None
        joint, alone = self._both_paths(modalities, pictures, is_complete)
        features = [inputs[0].new_zeros(size, 2 * d, dtype=torch.float32) for d in self.num_features]
        for own, *halves in zip(modalities, joint, alone, strict=True):
            features[own.index] = own.encoder.dropout(own.in_batch(torch.cat(halves, dim=1), size=size))
        return tuple(features)

    def _both_paths(
        self, modalities: Sequence[_Pictures], pictures: Sequence[Tensor], is_complete: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the averaged maps of each modality, with the excitations and with their means."""
        lacking = [
            own.encoder.trunk for own, p in zip(modalities, pictures, strict=True) if own.encoder.lacks_variance(p)
        ]
        try:
            for trunk in lacking:
                trunk.eval()
            stages = _FIRST_STAGE + 1
            first = [
                own.encoder.trunk.first_maps(p, stages=stages) for own, p in zip(modalities, pictures, strict=True)
            ]
            joint = self._averaged_maps(modalities, first, is_complete)
            return joint, joint if self.training else self._averaged_maps(modalities, first, None)
        finally:
            for trunk in lacking:
                trunk.train()

    def _averaged_maps(
        self, modalities: Sequence[_Pictures], maps: Sequence[Tensor], is_complete: Tensor | None
    ) -> list[Tensor]:
        """Compute the averaged maps of each modality after the last block, m of (b_j, d_j).

        maps: After the first excited stage. is_complete (b,): Samples whose excitations are used; None: only means are.
        """
        maps = list(maps)
        for block in range(len(self.blocks)):
            if block > 0:
                stage = _FIRST_STAGE + block
                maps = [own.encoder.trunk.next_maps(m, stage=stage) for own, m in zip(modalities, maps, strict=True)]
            excitations = self._excitations(block, modalities, maps, is_complete)
            maps = [own.excited(m, e) for own, m, e in zip(modalities, maps, excitations, strict=True)]
        return [own.averaged(m) for own, m in zip(modalities, maps, strict=True)]

    def _excitations(
        self, block: int, modalities: Sequence[_Pictures], maps: Sequence[Tensor], is_complete: Tensor | None
    ) -> list[Tensor]:
        """Compute the excitations of a block in float32, m of (b_j, c_j): the mean where they are cut or missing."""
        if is_complete is None:
            means = self.mean_excitations(block)
            return [means[own.index].expand(len(own.rows), -1) for own in modalities]
        size = len(is_complete)
        with torch.autocast(maps[0].device.type, enabled=False):
            averages = [own.in_batch(own.averaged(m), size=size) for own, m in zip(modalities, maps, strict=True)]
            excitations = self.blocks[block](averages)
        if self.training:
            self._update_mean([e[is_complete] for e in excitations], block=block)
        means = self.mean_excitations(block)
        return [
            mean.expand(len(own.rows), -1) if cut else torch.where(is_complete[:, None], e, mean)[own.rows]
            for own, e, mean, cut in zip(modalities, excitations, means, self.cut, strict=True)
        ]

    def branch_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits of every branch, m of (b, k): of a sample that lacks a modality, those of each alone."""
        is_complete = torch.stack([f.any(dim=1) for f in features]).all(dim=0)
        halves = [f.chunk(2, dim=1) for f in features]
        used = [torch.where(is_complete[:, None], joint, alone) for joint, alone in halves]
        return [head(f) for head, f in zip(self.heads, used, strict=True)]

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits with the mean excitations."""
        return torch.stack([head(f.chunk(2, dim=1)[1]) for head, f in zip(self.heads, features, strict=True)])
