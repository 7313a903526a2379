"""PMR: prototypical modal rebalance.

PMR, Fan et al. (CVPR 2023). A class has a prototype in each modality, the mean of its features there, and a modality
alone says softmax over classes of minus the Euclidean distance to them. With S^j the mean probability of the true
class that modality j gives in this way, over the samples of a step, and PCE^j the mean cross entropy:

    L = mean_i CE(z_i^fused, y_i) + alpha sum_j w^j PCE^j,    w^j = clip(mean_{l != j} S^l / S^j - 1, 0, 1)

so that the modality that lags is drawn to its own centres. w is the paper's for two modalities (its code has 1 for the
one that lags); the mean of the others for more is ours. Until `last_epoch`. Prototypes are computed before every epoch
in eval mode, P <- momentum P + (1 - momentum) mean.

Ours: they are the means of up to 2,048 training samples, or 16 a class, the same ones always (its code: a tenth of the
training set, anew each time); a class of which none was among them has no prototype, and its samples no PCE. Left out
is the paper's second regulariser, PER, the entropy of the modality that is ahead in the first epochs: its weight and
its span could not be read, and its code has none.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..batches import Batch, ModelReader, some_rows
from ..network import FusionNet, Outputs, cross_entropy
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig
from .ogm import mean_of_others

_ROWS, _ROWS_A_CLASS = 2_048, 16
_LEAST_SQUARE = 1e-6  # of a distance, whose root has no slope at 0


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Give Euclidean distances (b, k) of features (b, d) to prototypes (k, d)."""
    square = torch.addmm(prototypes.square().sum(dim=1), features, prototypes.T, alpha=-2.0)
    return (square + features.square().sum(dim=1, keepdim=True)).clamp(min=_LEAST_SQUARE).sqrt()


def lag(score: Tensor) -> Tensor:
    """Give the weights w (m,) in [0, 1] from scores S (m,), any multiple of them; high = far behind."""
    others = mean_of_others(score, score > 0)
    return (others / torch.where(score > 0, score, torch.inf) - 1.0).clamp(0.0, 1.0)


class Pmr(Balancer):
    """The fused loss and the prototypes' for what lags. State: the epoch, and prototypes (k, d_j) of each modality."""

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        device, k = optimization.generator.device, len(net.plan.classes)
        self.epoch = 0
        self._sizes = [int(encoder.num_features) for encoder in net.encoders]  # type: ignore[arg-type]
        self._prototypes = [torch.zeros(k, size, device=device) for size in self._sizes]
        self._seen = torch.zeros(k, dtype=torch.bool, device=device)  # classes that have prototypes
        self._weight = torch.zeros(net.num_modalities, device=device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Move the prototypes to where their classes are now."""
        super().begin_epoch(epoch, model_reader)
        self._weight = torch.zeros_like(self._weight)
        if epoch > self.config.pmr.last_epoch:
            return
        found = model_reader.read(
            _features_and_label, rows=some_rows(model_reader, max(_ROWS, _ROWS_A_CLASS * len(self._seen)))
        )
        member = functional.one_hot(found[-1].long(), len(self._seen)).float().T  # (k, r); a product adds in one order
        count = member.sum(dim=1, keepdim=True)
        old, new = self._seen[:, None], count > 0
        for j, end in enumerate(accumulate(self._sizes)):
            mean = member @ found[end - self._sizes[j] : end].T / count.clamp(min=1.0)
            moved = torch.where(old, mean.lerp(self._prototypes[j], self.config.pmr.momentum), mean)
            self._prototypes[j] = torch.where(new, moved, self._prototypes[j])
        self._seen = self._seen | new.squeeze(1)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the mean cross entropy of the fused answer, and that of the prototypes for what lags."""
        loss = self.fused_loss(outputs, batch)
        if self.epoch > self.config.pmr.last_epoch:
            return loss
        each = torch.stack(
            [self._own(f, p, batch.label) for f, p in zip(outputs.features, self._prototypes, strict=True)]
        )
        known = self._seen[batch.label]
        score = batch.mean_own((-each.detach()).exp())  # 0 where a class has no prototype
        self.distributed.sum_([score])
        self._weight = lag(score)
        return loss + self.config.pmr.alpha * (self._weight @ batch.mean_own(each.masked_fill(~known, 0.0)))

    def _own(self, features: Tensor, prototypes: Tensor, label: Tensor) -> Tensor:
        """Give each sample's cross entropy (b,) by the prototypes of one modality."""
        logits = -distances(features.float(), prototypes)
        return cross_entropy(logits.masked_fill(~self._seen, -torch.inf), label)

    def numbers(self) -> dict[str, float]:
        """Give the weights of the last step, by modality."""
        named = zip(self.net.plan.modalities, self._weight.tolist(), strict=True)
        return {f"lag_{name}": value for name, value in named}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next step depends on."""
        known = {"prototypes": list(self._prototypes), "seen": self._seen}
        return {"epoch": self.epoch, "weight": self._weight, **known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self._weight = state["epoch"], state["weight"]
        self._prototypes, self._seen = list(state["prototypes"]), state["seen"]


def _features_and_label(outputs: Outputs, label: Tensor) -> Tensor:
    """Give features of all modalities and the class, one below another (sum of d_j + 1, b)."""
    return torch.cat([*(f.float() for f in outputs.features), label[:, None].float()], dim=1).T
