"""AUG: further classifiers for the modality that classifies worse.

Jiang, Huang and Yang, "Rethinking Multimodal Learning from the Perspective of Mitigating Classification Ability
Disproportion", NeurIPS 2025, arXiv 2502.20120. Modality j has n classifiers, one at first, whose logits are summed:

    o_t = W relu(A_t f^j + b_t) + b      W, b shared by all classifiers of all modalities, 256 hidden units
    z^j = sum_t o_t                      the prediction is sum_j w_j z^j
    L_j = CE(z^j) + CE(z^j - o_n) + (1 - lambda q[y]) CE(o_n)    for n > 1, q = softmax(z^j - o_n) without gradient
    L_j = CE(z^j)                                                for n = 1

The last term is the cross entropy of the residual label y - lambda y * q: what earlier classifiers predict counts less.
Modalities are trained one after another within a step. After epoch 1, and then every tenth of the epochs, a modality
gets a further classifier whose mean probability of the true class, over the epoch, is below 1 - tolerance of the mean
of the others'.

By the paper and the authors' code for CREMA-D: SGD, rate 0.01, momentum 0.9, weight decay 1e-4, batches of 64, 200
epochs; w = 0.4 of audio and 0.6 of vision; lambda 0.5. In the code the optimiser is made before classifiers are added,
so that it never trains them: `added = "fixed"`. In the paper they are trained, which is the default here.

The authors' code for three modalities has a tolerance of 0.2, lambda of 0.2, and weights of the added logits by a
further network, which is not done here. Of two modalities the code compares the ratio with 1.01 where the first is
better, and with 0.99 where the second is; here it is 0.99 both ways. The limit of MAX_CLASSIFIERS is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ...audit.errors import ConfigError
from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch, ModelReader
from ..config import TrainConfig
from ..fusion import Fusion
from ..network import Outputs, cross_entropy, separate_losses
from .balancer import Balancer

ADDED = ("trained", "fixed")
HIDDEN = 256  # units of a classifier
MAX_CLASSIFIERS = 12  # one, and one after epoch 1 and each of ten tenths; the paper compares with 12 from the start


class Boosted(Fusion):
    """Classifiers of each modality, whose logits are summed, with one output layer for all.

    All MAX_CLASSIFIERS exist from the start, so that models of any number have the same tensors; `num_classifiers` (m,)
    says how many are used.
    """

    paper = "Jiang et al., NeurIPS 2025"
    decomposes = True
    num_classifiers: Tensor
    weights: Tensor

    def __init__(self, num_features: Sequence[int], *, num_classes: int, hidden: int) -> None:
        super().__init__(num_features, num_classes=num_classes, hidden=hidden)
        self.first = nn.ModuleList(nn.Linear(d, HIDDEN) for d in num_features)
        self.added = nn.ModuleList(
            nn.ModuleList(nn.Linear(d, HIDDEN) for _ in range(MAX_CLASSIFIERS - 1)) for d in num_features
        )
        for layer in self.added.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.head = nn.Linear(HIDDEN, num_classes)
        self.register_buffer("num_classifiers", torch.ones(len(num_features), dtype=torch.int64))
        self.register_buffer("weights", torch.full((len(num_features),), 1 / len(num_features)))

    def last_and_earlier_logits(self, modality: int, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the logits (b, k) of a modality's last classifier, and the sum of the earlier ones' if it has any."""
        num_added = int(self.num_classifiers[modality]) - 1
        layers = [self.first[modality], *list(cast("nn.ModuleList", self.added[modality]))[:num_added]]
        logits: list[Tensor] = [self.head(layer(features).relu()) for layer in layers]
        return logits[-1], torch.stack(logits[:-1]).sum(dim=0) if num_added else None

    def unimodal_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Sum the logits of each modality's classifiers."""
        sums = []
        for modality, f in enumerate(features):
            last, earlier = self.last_and_earlier_logits(modality, f)
            sums.append(last if earlier is None else last + earlier)
        return torch.stack(sums)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Weight the unimodal logits."""
        return self.fused_and_unimodal_logits(features)[0]

    def fused_and_unimodal_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the unimodal logits once."""
        logits = self.unimodal_logits(features)
        return (self.weights[:, None, None] * logits).sum(dim=0), logits


def lagging_modalities(confidence: Sequence[float], *, tolerance: float) -> list[int]:
    """Return the modalities whose confidence (m,), in [0, 1], is below 1 - tolerance of the mean of the others'."""
    total, num_others = sum(confidence), len(confidence) - 1
    return [j for j, c in enumerate(confidence) if c < (1 - tolerance) * (total - c) / num_others]


def boosting_losses(last: Tensor, earlier: Tensor | None, label: Tensor, *, residual_weight: float) -> Tensor:
    """Compute L_j of each sample (b,), of logits (b, k) of the last classifier and the sum of the earlier ones'."""
    if earlier is None:
        return cross_entropy(last, label)
    predicted = (-cross_entropy(earlier.detach(), label)).exp()
    residual = (1 - residual_weight * predicted) * cross_entropy(last, label)
    return cross_entropy(last + earlier, label) + cross_entropy(earlier, label) + residual


@dataclass(frozen=True, slots=True, kw_only=True)
class AugConfig:
    """AUG (NeurIPS 2025). The defaults are those of its code for CREMA-D, but for `weights` and `added`.

    Args:
        every_epochs: Epochs between two comparisons, after that of epoch 1; 0: a tenth of the epochs, as in its code,
            which of its 200 epochs on CREMA-D are the paper's 20.
        tolerance: How much lower than the others' a modality's mean confidence must be, as a share, for a further
            classifier.
        residual_weight: Lambda: how much less a sample counts for the last classifier that the earlier ones predict.
        weights: Weights of the modalities in the prediction, in their order, at least 0; 0.4 and 0.6 in its script for
            CREMA-D. None: equal ones (ours).
        added: Whether added classifiers are "trained", as in the paper, or "fixed", as in its code, whose optimiser
            does not have them.
    """

    section: ClassVar[str] = "balancing.aug"
    every_epochs: int = 0
    tolerance: float = 0.01
    residual_weight: float = 0.5
    weights: tuple[float, ...] | None = None
    added: str = "trained"

    def __post_init__(self) -> None:
        check_choices(self.section, self, added=ADDED)
        check_ranges(self.section, self, every_epochs="[0, 1e9]", tolerance="[0, 1)", residual_weight="[0, 1]")
        check_ranges(self.section, self, weights="[0, inf)")
        if self.weights is not None and not any(self.weights):
            raise ConfigError("balancing.aug.weights are all 0: no modality would be used")


class Aug(Balancer):
    """L_j of one modality after another. State: the epoch, and the sums of the confidence (m,) over its samples."""

    class_reason = "it compares the probabilities of the true class"
    config_type = AugConfig
    paper = "Jiang et al., NeurIPS 2025"
    fusions = ()
    own_fusion = Boosted
    fusion_reason = "it adds classifiers to a modality, whose logits are summed"
    has_unimodal_loss = True
    state_fields = ("epoch", "confidence")
    config: AugConfig

    @classmethod
    def late_start(cls, config: AugConfig, settings: TrainConfig) -> str | None:
        """Return a warning where no epoch follows the first comparison."""
        if settings.finetune.epochs > 1:
            return None
        return "aug adds the first classifier after epoch 1"

    def initialize(self) -> None:
        """Set up the state."""
        assert isinstance(self.net.fusion, Boosted)  # checked by methods.resolve
        self.fusion = self.net.fusion
        weights, names = self.config.weights, self.net.config.modalities
        if weights is not None:
            if len(weights) != len(names):
                raise ConfigError(
                    f"balancing.aug.weights has {len(weights)} entries for {len(names)} modalities: {', '.join(names)}"
                )
            self.fusion.weights.copy_(torch.tensor(weights))  # saved with the model
        self.epoch = 0
        self.confidence = torch.zeros(len(names), device=self.device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Add classifiers where the last epoch was one of comparison."""
        super().begin_epoch(epoch, model_reader)
        done, every = epoch - 1, self.config.every_epochs or max(1, self.epochs // 10)
        if done == 1 or (done > 1 and done % every == 0):
            for modality in lagging_modalities(self.confidence.tolist(), tolerance=self.config.tolerance):
                if self.fusion.num_classifiers[modality] < MAX_CLASSIFIERS:
                    self.fusion.num_classifiers[modality] += 1
        self.confidence.zero_()

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train each modality in turn. No turn changes another's features, so all are encoded at once."""
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
            with torch.no_grad():
                outputs = self.net.classify([f.detach() for f in features])
        self.confidence += self.mean_confidence(outputs, batch)[1:] * batch.size
        losses = [self._turn(j, feature, batch) for j, feature in enumerate(features)]
        return outputs, torch.stack(losses).mean()

    def _turn(self, modality: int, feature: Tensor, batch: Batch) -> Tensor:
        with torch.autocast(feature.device.type, enabled=False):
            last, earlier = self.fusion.last_and_earlier_logits(modality, feature.float())
            head_logits = self.net.heads[modality](feature.detach().float()) if self.net.has_own_heads else None
        weight = batch.loss_weight[1 + modality]
        losses = boosting_losses(last, earlier, batch.label, residual_weight=self.config.residual_weight)
        loss = (losses * weight).sum()
        total_loss = loss
        if head_logits is not None:
            total_loss = loss + (cross_entropy(head_logits, batch.label) * weight).sum()
        self.optimization.backward(total_loss)
        if self.config.added == "fixed":
            for parameter in self.fusion.added.parameters():
                parameter.grad = None
        self.optimization.apply()
        return loss.detach()

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the mean of the modalities' cross entropies, as a step reports it while each has one classifier."""
        return batch.mean_unimodal(separate_losses(outputs, batch.label)[1]).mean()

    def epoch_metrics(self) -> dict[str, float]:
        """Return the number of classifiers of each modality."""
        return self.by_modality("classifiers", self.fusion.num_classifiers)
