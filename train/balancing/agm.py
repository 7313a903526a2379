"""AGM: adaptive gradient modulation.

AGM, Li et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation" (ICCV 2023). The logits phi^j
of modality j are its Shapley value of the fused logits V(S) of sets S of modalities, the others absent. V of the empty
set is 0 as in their code, so that the phi^j sum to the fused logits:

    phi^j = sum_{S without j} |S|! (m - |S| - 1)! / m! (V(S + j) - V(S))
    s^j = mean_i -log softmax(phi_i^j)[y_i]        low = confident
    r^j = exp(mean_{l != j} s^l - s^j)             of this step; above 1 = ahead
    tau^j = the same of the mean of s over all earlier steps
    coefficient^j = exp(alpha min(tau^j - r^j, 10))

below 1 where the modality is further ahead than usual, above 1 where it is further behind. Before the first step tau is
1. The loss is the cross entropy of the fused logits, in epochs `first_epoch` to `last_epoch` with the gradient through
phi^j multiplied by coefficient^j.

As in their code: absent modalities have inputs of 0 and are read in eval mode; the gradient goes through phi^j, whose
parts belong to all encoders and the classifier; probabilities have a floor of 1e-8 and exponents a ceiling of 10; and
where a gradient of the classifier's weights exceeds 1, all gradients together are clipped to a norm of 1. Options of
ours: `absent = "features"` sets features to 0 instead, which needs no further pass through the encoders, and `modulated
= "encoders"` multiplies the gradients of whole encoders.

Ours in both forms: an input of 0 is that of a missing modality, after standardisation (theirs: spectrograms are not
standardised); after `last_epoch` nothing is modulated (theirs keeps multiplying by the last step's coefficients); a
modality that no sample of a step uses is not compared. For concatenated and late fusion with absent features phi^j is
W_j f_j plus an even share of all biases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch, ModelReader, start_warning
from ..config import TrainConfig
from ..network import Outputs
from .balancer import Balancer, check_window
from .ogm import mean_of_others

ABSENT = ("inputs", "features")
MODULATED = ("responses", "encoders")

_MAX_SCORE = -math.log(1e-8)
_MAX_EXPONENT = 10.0


def shapley_weights(num_modalities: int) -> tuple[list[tuple[bool, ...]], Tensor]:
    """Return the non-empty sets of modalities, the full set last, and each set's weight in each value (m, sets)."""
    m = num_modalities
    sets = [used for used in product((False, True), repeat=m) if any(used)]
    weights = torch.zeros(m, len(sets))
    for column, used in enumerate(sets):
        size = sum(used)
        for j, is_used in enumerate(used):
            num_others = size - 1 if is_used else size  # modalities of the set besides j
            weight = math.factorial(num_others) * math.factorial(m - num_others - 1) / math.factorial(m)
            weights[j, column] = weight if is_used else -weight
    return sets, weights


def modality_lead(score: Tensor, valid: Tensor) -> Tensor:
    """Compute exp(mean of the others' scores - its own) (m,); above 1 = ahead, 1 where a score is not valid."""
    return torch.where(valid, mean_of_others(score, valid) - score, 0.0).exp()


def clip_by_largest(gradients: Sequence[Tensor], largest_of: Sequence[Tensor], *, bound: float) -> None:
    """Scale gradients to a joint norm of at most `bound` where some others have an entry beyond +-bound; no sync."""
    largest = torch.stack(torch._foreach_norm(list(largest_of), math.inf)).max()
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    factor = torch.where(largest > bound, (bound / (norm + 1e-6)).clamp(max=1.0), 1.0)  # 1e-6 as in clip_grad_norm_
    torch._foreach_mul_(list(gradients), factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgmConfig:
    """AGM (ICCV 2023). The defaults are those of its code.

    Args:
        alpha: Strength of the modulation, at least 0; 1 in its code.
        first_epoch: First epoch with modulation, from 1.
        last_epoch: Last epoch with modulation; 20 in its code.
        absent: What is 0 of a modality that is left out: "inputs", read by a further pass in eval mode, or "features"
            (ours), which needs none.
        modulated: What a coefficient multiplies: the gradient through the "responses" phi, or those of "encoders" as a
            whole (ours).
        clip: Where a gradient of the classifier's weights is beyond this bound, clip all gradients to this norm; 0
            never clips; 1 in its code.
    """

    section: ClassVar[str] = "balancing.agm"
    alpha: float = 1.0
    first_epoch: int = 1
    last_epoch: int = 20
    absent: str = "inputs"
    modulated: str = "responses"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_choices("balancing.agm", self, absent=ABSENT, modulated=MODULATED)
        check_ranges("balancing.agm", self, alpha="[0, 1000]", clip="[0, inf)")
        check_window("balancing.agm", self)


class Agm(Balancer):
    """Scales gradients by the lead of this step against the usual one. State: mean scores and step counts (m,)."""

    config_type = AgmConfig
    paper = "Li et al., ICCV 2023"
    accumulation_reason = "the gradient of a step is multiplied by coefficients of all its samples"
    state_fields = ("epoch", "_mean", "_steps", "_coefficient")
    config: AgmConfig
    needs_unimodal_logits = False

    @classmethod
    def late_start(cls, config: AgmConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the method starts after the last epoch."""
        return start_warning("balancing.agm.first_epoch", config.first_epoch, settings, fallback="joint")

    def initialize(self) -> None:
        """Set up the state."""
        device, m = self.device, self.net.num_modalities
        sets, weights = shapley_weights(m)
        self._sets, self._weights = sets[:-1], weights.to(device)
        self.epoch = 0
        self._mean, self._steps = torch.zeros(m, device=device), torch.zeros(m, device=device)
        self._coefficient = torch.ones(m, device=device)
        matrices = {name: p for name, p in self.net.fusion.named_parameters() if p.ndim == 2}
        self._classifier = [p for name, p in matrices.items() if name.startswith("head")] or list(matrices.values())

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Reset the coefficients."""
        super().begin_epoch(epoch, model_reader)
        self._coefficient = torch.ones_like(self._coefficient)

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch; scores are compared up to the last epoch with modulation."""
        with self.optimization.autocast():
            outputs: Outputs = self.net(batch.inputs, batch.present, unimodal=False)
        modulates, modulated = self.config.first_epoch <= self.epoch, outputs
        if self.epoch <= self.config.last_epoch:
            through_responses = modulates and self.config.modulated == "responses"
            with nullcontext() if through_responses else torch.no_grad():
                responses = self.responses(outputs, batch)
            coefficient = self._compare(responses.detach(), batch)
            self._coefficient = coefficient if modulates else self._coefficient
            if through_responses:
                change = ((coefficient - 1)[:, None, None] * (responses - responses.detach())).sum(dim=0)
                modulated = replace(outputs, fused=outputs.fused + change)  # the same value, another gradient
        loss = self.loss(modulated, batch)
        self.optimization.backward(loss)
        self.modulate(outputs, batch)
        self.optimization.apply()
        return outputs, loss.detach()

    @torch.no_grad()
    def _compare(self, responses: Tensor, batch: Batch) -> Tensor:
        """Compute the coefficients (m,) of responses (m, b, k), then include their scores in the usual ones."""
        losses = self.net.loss_of(responses, batch.label)
        sums = torch.stack([batch.mean_unimodal(losses.clamp(max=_MAX_SCORE)), batch.loss_weight[1:].sum(dim=1)])
        self.distributed.sum_([sums])
        score, valid = sums[0], sums[1] > 0  # a modality that no sample of the step uses is not compared
        valid = valid & (valid.sum() > 1)
        exponent = modality_lead(self._mean, self._steps > 0) - modality_lead(score, valid)
        exponent = torch.where(valid, exponent, 0.0).clamp(max=_MAX_EXPONENT)
        self._steps = self._steps + valid
        self._mean = self._mean + torch.where(valid, (score - self._mean) / self._steps.clamp(min=1.0), 0.0)
        return (self.config.alpha * exponent).exp()

    @torch.no_grad()
    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Scale the gradients of whole encoders, if those are modulated, and clip."""
        if self.config.modulated == "encoders":
            self.scale_gradients(self._coefficient)
        classifier = [p.grad for p in self._classifier if p.grad is not None]
        if self.config.clip and classifier:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            clip_by_largest(gradients, classifier, bound=self.config.clip)

    def responses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the Shapley logits of each modality, phi (m, b, k)."""
        training = self.net.training
        self.net.eval()  # no dropout, and no running mean is updated
        try:
            present, blank = self._features(outputs, batch)
            values = [
                self.net.classify(
                    [f if is_used else b for f, b, is_used in zip(present, blank, used, strict=True)], unimodal=False
                ).fused
                for used in self._sets
            ]
        finally:
            self.net.train(training)
        shapley_logits: Tensor = torch.tensordot(self._weights, torch.stack([*values, outputs.fused]).float(), dims=1)
        return shapley_logits

    def _features(self, outputs: Outputs, batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the features of the modalities that are present, and those of the ones that are left out."""
        if self.config.absent == "features":
            return outputs.features, [torch.zeros_like(f) for f in outputs.features]
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
            blank = [
                encoder(_blank_input(encoder, rows))  # one row, which is the same for all samples in eval mode
                for encoder, rows in zip(self.net.encoders, batch.inputs, strict=True)
            ]
        blank = [row.expand_as(f) for row, f in zip(blank, features, strict=True)]
        if batch.present is not None:  # what a sample lacks cannot be left out of it
            blank = [row * batch.present[:, [j]] for j, row in enumerate(blank)]
        return features, blank

    def epoch_metrics(self) -> dict[str, float]:
        """Return the coefficients of the last step by modality."""
        return self.by_modality("coefficient", self._coefficient)


def _blank_input(encoder: nn.Module, rows: Tensor) -> Tensor:
    """Return one row like `rows` that is 0 after standardisation: NaN, which encoders replace by the mean."""
    value = 0.0 if getattr(encoder, "inputs_standardized", False) else math.nan
    return torch.full((1, *rows.shape[1:]), value, device=rows.device)
