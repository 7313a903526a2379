"""AGM: adaptive gradient modulation.

AGM, Li et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation" (ICCV 2023). What modality j
says is its Shapley value among the fused logits V(S) of sets S of modalities, the others absent, V of none being 0 as
in their code, so that what all say adds up to the fused logits:

    phi^j = sum_{S without j} |S|! (m - |S| - 1)! / m! (V(S + j) - V(S))
    s^j = mean_i -log softmax(phi_i^j)[y_i]        low = sure
    r^j = exp(mean_{l != j} s^l - s^j)             of this step; above 1 = ahead
    tau^j = the same of the mean of s over all steps before this one
    coefficient^j = exp(alpha min(tau^j - r^j, 10))

on the gradients of encoder j: below 1 where it is further ahead than usual, above 1 where it is further behind. The
probability has a floor of 1e-8 and the exponent a ceiling of 10, as in their code. Before the first step tau is 1.

Ours: gradients of whole encoders are multiplied (in their code, what passes back through phi^j, of which parts belong
to the other modalities); absent means features of 0, not an input of 0. For concatenated and late fusion phi^j is
W_j f_j plus an even share of all biases.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..network import FusionNet, Outputs, cross_entropy
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig
from .ogm import mean_of_others

_MOST_SCORE = -math.log(1e-8)
_MOST_EXPONENT = 10.0


def shapley_weights(num_modalities: int) -> tuple[list[tuple[bool, ...]], Tensor]:
    """Give the sets of modalities but the empty one, all of them last, and what each counts in each value (m, sets)."""
    m = num_modalities
    sets = [heard for heard in product((False, True), repeat=m) if any(heard)]
    weights = torch.zeros(m, len(sets))
    for place, heard in enumerate(sets):
        size = sum(heard)
        for j, there in enumerate(heard):
            rest = size - 1 if there else size  # of the others
            share = math.factorial(rest) * math.factorial(m - rest - 1) / math.factorial(m)
            weights[j, place] = share if there else -share
    return sets, weights


def modality_lead(score: Tensor, known: Tensor) -> Tensor:
    """Give exp(mean of the others' scores - its own) (m,); above 1 = ahead, 1 where a score is not known."""
    return torch.where(known, mean_of_others(score, known) - score, 0.0).exp()


class Agm(Balancer):
    """Gradients by the lead of this step against the usual one. State: the mean scores (m,), over how many steps."""

    needs_unimodal_logits = False

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        device, m = optimization.generator.device, net.num_modalities
        sets, weights = shapley_weights(m)
        self._sets, self._weights = sets[:-1], weights.to(device)
        self._mean, self._steps = torch.zeros(m, device=device), torch.zeros(m, device=device)
        self._coefficient = torch.ones(m, device=device)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the mean cross entropy of the fused answer."""
        return self.fused_loss(outputs, batch)

    @torch.no_grad()
    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Slow what is further ahead than usual, hasten what is further behind."""
        each = cross_entropy(self.responses(outputs), batch.label)
        found = torch.stack([batch.mean_own(each.clamp(max=_MOST_SCORE)), batch.loss_weight[1:].sum(dim=1)])
        self.distributed.sum_([found])
        score, known = found[0], found[1] > 0  # a modality that no sample of the step has is not compared
        known = known & (known.sum() > 1)
        exponent = modality_lead(self._mean, self._steps > 0) - modality_lead(score, known)
        exponent = torch.where(known, exponent, 0.0).clamp(max=_MOST_EXPONENT)
        self._coefficient = (self.config.agm.alpha * exponent).exp()
        self.scale_gradients(self._coefficient)
        self._steps = self._steps + known
        self._mean = self._mean + torch.where(known, (score - self._mean) / self._steps.clamp(min=1.0), 0.0)

    def responses(self, outputs: Outputs) -> Tensor:
        """Give what each modality says, phi (m, b, k), detached."""
        features = [f.detach() for f in outputs.features]
        training = self.net.training
        self.net.fusion.eval()  # a running mean of the fusion's must not learn from sets
        with self.optimization.autocast():
            values = [self.net.fused_of(features, heard) for heard in self._sets]
        self.net.fusion.train(training)
        every = torch.stack([*values, outputs.fused.detach()]).float()
        found: Tensor = torch.tensordot(self._weights, every, dims=1)
        return found

    def numbers(self) -> dict[str, float]:
        """Give the coefficients of the last step, by modality."""
        named = zip(self.net.plan.modalities, self._coefficient.tolist(), strict=True)
        return {f"coefficient_{name}": value for name, value in named}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next step depends on."""
        return {"mean": self._mean, "steps": self._steps, "coefficient": self._coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean, self._steps, self._coefficient = state["mean"], state["steps"], state["coefficient"]
