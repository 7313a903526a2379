"""AGM: adaptive gradient modulation.

AGM, Li et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation" (ICCV 2023). The logits phi^j
of modality j are its Shapley value of the fused logits V(S) of sets S of modalities, the others absent. V of the empty
set is 0 as in their code, so that the phi^j sum to the fused logits:

    phi^j = sum_{S without j} |S|! (m - |S| - 1)! / m! (V(S + j) - V(S))
    s^j = mean_i -log softmax(phi_i^j)[y_i]        low = confident
    r^j = exp(mean_{l != j} s^l - s^j)             of this step; above 1 = ahead
    tau^j = the same of the mean of s over all earlier steps
    coefficient^j = exp(alpha min(tau^j - r^j, 10))

on the gradients of encoder j: below 1 where it is further ahead than usual, above 1 where it is further behind. The
probability has a floor of 1e-8 and the exponent a ceiling of 10, as in their code. Before the first step tau is 1.

Ours: gradients of whole encoders are multiplied (in their code, the gradient through phi^j, of which parts belong to
the other modalities); absent means features of 0, not an input of 0. For concatenated and late fusion phi^j is W_j f_j
plus an even share of all biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_ranges
from ..batches import Batch
from ..network import Outputs, cross_entropy
from .balancer import Balancer
from .ogm import mean_of_others

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AgmConfig:
    """AGM (ICCV 2023).

    Args:
        alpha: Strength of the modulation (ours).
    """

    section: ClassVar[str] = "balancing.agm"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_ranges("balancing.agm", self, alpha="[0, 1000]")


class Agm(Balancer):
    """Scales gradients by the lead of this step against the usual one. State: mean scores and step counts (m,)."""

    config_type = AgmConfig
    paper = "Li et al., ICCV 2023"
    state_fields = ("_mean", "_steps", "_coefficient")
    config: AgmConfig
    needs_unimodal_logits = False

    def initialize(self) -> None:
        """Set up the state."""
        device, m = self.device, self.net.num_modalities
        sets, weights = shapley_weights(m)
        self._sets, self._weights = sets[:-1], weights.to(device)
        self._mean, self._steps = torch.zeros(m, device=device), torch.zeros(m, device=device)
        self._coefficient = torch.ones(m, device=device)

    @torch.no_grad()
    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Reduce the gradients of modalities further ahead than usual, increase those of modalities further behind."""
        losses = cross_entropy(self.responses(outputs), batch.label)
        sums = torch.stack([batch.mean_unimodal(losses.clamp(max=_MAX_SCORE)), batch.loss_weight[1:].sum(dim=1)])
        self.distributed.sum_([sums])
        score, valid = sums[0], sums[1] > 0  # a modality that no sample of the step uses is not compared
        valid = valid & (valid.sum() > 1)
        exponent = modality_lead(self._mean, self._steps > 0) - modality_lead(score, valid)
        exponent = torch.where(valid, exponent, 0.0).clamp(max=_MAX_EXPONENT)
        self._coefficient = (self.config.alpha * exponent).exp()
        self.scale_gradients(self._coefficient)
        self._steps = self._steps + valid
        self._mean = self._mean + torch.where(valid, (score - self._mean) / self._steps.clamp(min=1.0), 0.0)

    def responses(self, outputs: Outputs) -> Tensor:
        """Compute the Shapley logits of each modality, phi (m, b, k), detached."""
        features = [f.detach() for f in outputs.features]
        training = self.net.training
        self.net.fusion.eval()  # the fusion's running means must not be updated on sets
        with self.optimization.autocast():
            values = [self.net.fused_logits(features, used) for used in self._sets]
        self.net.fusion.train(training)
        set_logits = torch.stack([*values, outputs.fused.detach()]).float()
        shapley_logits: Tensor = torch.tensordot(self._weights, set_logits, dims=1)
        return shapley_logits

    def epoch_metrics(self) -> dict[str, float]:
        """Return the coefficients of the last step by modality."""
        return self.by_modality("coefficient", self._coefficient)
