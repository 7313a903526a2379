"""GMM-adaptive training: losses by the posterior of the modality gap.

The adaptive loss of Modality Gap (Liu et al., arXiv 2510.21797). Its aims are the paper's: the overall gap shrinks;
imbalanced samples are drawn to the balanced ones; the gap weighs more for imbalanced samples, the fused answer for
balanced ones; an ordinary loss first, then the mixture, then this. The formula is ours:

    L = mean_i[(1 + gamma_i) CE(z_i^fused, y_i) + lam_gap (2 - gamma_i) g_i] + sum_j mean_i CE(z_i^j, y_i) + lam_align A
    A = sum_i (1 - gamma_i) relu(g_i - mu_b)^2 / (2 var_b) / sum_i (1 - gamma_i)

g_i = max_j c_i^j - min_j c_i^j is the modality gap, c_i^j the probability of the true class by modality j alone, and
gamma_i = P(balanced | g_i), which has no gradient. Warm-up: the sum of the cross entropies. With `stop_strong` (ours)
nothing flows through the larger c, so that a gap is closed by the branch that lags and not by spoiling the other.

Ours too: the mixture is refitted before every epoch, to the gaps of `fit_rows` samples in eval mode, and gamma is read
at the gap that a sample has in the step. To read all samples would cost a third of an epoch, and their gaps would be
an epoch old at its end. Where the gap is not bimodal the audit's rule holds: balanced is a gap up to the threshold. A
sample that a step hears in one modality alone has no gap: it has the ordinary loss. var_b is 0.01 at least.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...audit.scores.mixture import Mixture, MixtureConfig, fit_mixture
from ..batches import Batch, ModelReader, some_rows
from ..network import FusionNet, Outputs, cross_entropies
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig

_STEPS = 4096  # of the table over [0, 1]: a gap is read 0.00012 beside at most
_LEAST_SD = 0.1  # of the balanced side in A: with a component's least, 0.01, A would be 1,800 at a gap of 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """What is known of the gap before an epoch.

    posterior (_STEPS + 1,): P(balanced) at gaps evenly from 0 to 1. mean, variance: of the balanced side. share: of
    samples that are balanced, P >= 0.5. gap: the mean. bimodal: whether P is the mixture's, otherwise it is the rule's.
    """

    posterior: Tensor
    mean: float
    variance: float
    share: float
    gap: float
    bimodal: bool

    def balanced(self, gap: Tensor) -> Tensor:
        """Give P(balanced | gap) of gaps (b,), without asking the device."""
        place = torch.add(0.5, gap, alpha=_STEPS).long()
        return self.posterior[place.clamp_(0, _STEPS)]  # what is no number is the loss's to report


def refit(gap: NDArray[np.float64], *, device: torch.device) -> Refit:
    """Fit the mixture to gaps (n,) in [0, 1], with the audit's defaults; constant gaps and few samples are no error."""
    mixture = fit_mixture(gap, config=MixtureConfig(), seed=0)
    mean, sd = _balanced_side(gap, mixture)
    return Refit(
        posterior=torch.from_numpy(mixture.posterior(np.linspace(0.0, 1.0, _STEPS + 1))).to(device),
        mean=mean,
        variance=max(sd, _LEAST_SD) ** 2,
        share=float((mixture.posterior(gap) >= 0.5).mean()),
        gap=float(gap.mean()),
        bimodal=mixture.bimodal,
    )


def _balanced_side(gap: NDArray[np.float64], mixture: Mixture) -> tuple[float, float]:
    """Give mean and sd of the balanced component; by the rule, of the gaps up to the threshold; or that, if none is."""
    if mixture.bimodal and mixture.components is not None:
        return mixture.components[0].mean, mixture.components[0].sd
    below = gap[gap <= mixture.threshold]
    return (float(below.mean()), float(below.std())) if len(below) else (mixture.threshold, 0.0)


def modality_gap(outputs: Outputs, label: Tensor) -> Tensor:
    """Give the gap (b,) in [0, 1] of a batch; high = the modalities differ in how sure they are of the true class."""
    confidence = outputs.confidence(label)[1:]
    # A network that has diverged is told of by the loss.
    return (confidence.amax(dim=0) - confidence.amin(dim=0)).nan_to_num(nan=1.0)


class Gmm(Balancer):
    """The adaptive loss in two stages. State: what is known of the gap."""

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        self._known: Refit | None = None  # None: in the warm-up

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """After the warm-up, fit the mixture to the gaps as they are now."""
        super().begin_epoch(epoch, model_reader)
        if epoch <= self.config.gmm.warmup_epochs:
            return
        gap = (
            model_reader.read(modality_gap, rows=some_rows(model_reader, self.config.gmm.fit_rows))
            .double()
            .cpu()
            .numpy()
        )
        self._known = refit(gap, device=self.optimization.generator.device)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Give the loss of the stage."""
        return (
            self.summed_losses(outputs, batch) if self._known is None else self._adaptive(outputs, batch, self._known)
        )

    def _adaptive(self, outputs: Outputs, batch: Batch, known: Refit) -> Tensor:
        config = self.config.gmm
        fused, own = cross_entropies(outputs, batch.label)
        confidence = (-own).exp()  # of the true class
        strong, weak = confidence.amax(dim=0), confidence.amin(dim=0)
        gap = (strong.detach() if config.stop_strong else strong) - weak
        weight = paired = batch.loss_weight[0]
        if batch.present is not None:
            paired = weight * batch.present.all(dim=1)
        apart = paired * (1.0 - known.balanced(gap.detach()))
        total = apart.sum()
        self.distributed.sum_([total])
        align = apart @ (gap - known.mean).relu().square() / total.clamp(min=1e-12)
        return (
            (weight + paired - apart) @ fused
            + batch.mean_own(own).sum()
            + config.lam_gap * ((paired + apart) @ gap)
            + config.lam_align / (2 * known.variance) * align
        )

    def numbers(self) -> dict[str, float]:
        """Give what was found before the epoch: share of balanced samples, mean gap, 1 where the gap is bimodal."""
        if (found := self._known) is None:
            return {}
        return {"gmm_balanced": found.share, "gmm_gap": found.gap, "gmm_bimodal": float(found.bimodal)}

    def state_dict(self) -> dict[str, Any]:
        """Give what the next step depends on."""
        return {"refit": None if self._known is None else asdict(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._known = None if state["refit"] is None else Refit(**state["refit"])
