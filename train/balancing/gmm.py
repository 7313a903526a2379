"""GMM-adaptive training: losses by the posterior of the modality gap.

The adaptive loss of Modality Gap (Liu et al., arXiv 2510.21797). Its aims are the paper's: the overall gap shrinks; the
distribution of imbalanced samples moves to that of the balanced ones; the gap has a larger weight for imbalanced
samples, the fused loss for balanced ones; first an ordinary loss, then the mixture, then the adaptive loss. The formula
is ours:

    L = mean_i[(1 + gamma_i) CE(z_i^fused, y_i) + lam_gap (2 - gamma_i) g_i] + sum_j mean_i CE(z_i^j, y_i) + lam_align A
    A = sum_i (1 - gamma_i) relu(g_i - mu_b)^2 / (2 var_b) / sum_i (1 - gamma_i)

g_i = max_j c_i^j - min_j c_i^j is the modality gap, c_i^j the probability of the true class by modality j alone, and
gamma_i = P(balanced | g_i), which has no gradient. Warm-up: the sum of the cross entropies. With `stop_strong` (ours)
no gradient flows through the larger c, so that the weaker branch closes the gap and the stronger one is not degraded.

Ours too: the mixture is refitted before every epoch, to the gaps of `fit_rows` samples in eval mode, and gamma is
evaluated at the gap that a sample has in the step. Reading all samples would cost a third of an epoch, and their gaps
would be an epoch old at its end. Where the gap is not bimodal the audit's rule holds: balanced is a gap up to the
threshold. A sample that a step uses in one modality only has no gap: it has the ordinary loss. var_b is 0.01 at least.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...audit.parsing import check_ranges
from ...audit.scores.mixture import Mixture, MixtureConfig, fit_mixture
from ..batches import Batch, ModelReader, sample_rows, start_warning
from ..config import TrainConfig
from ..network import Outputs, separate_losses
from .balancer import Balancer

_NUM_BINS = 4096  # of the table over [0, 1]: a gap is rounded by 0.00012 at most
_MIN_SD = 0.1  # of the balanced side in A: with a component's minimum, 0.01, A would be 1,800 at a gap of 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class GapMixture:
    """Fit of the gap before an epoch.

    posterior (_NUM_BINS + 1,): P(balanced) at gaps evenly from 0 to 1. mean, variance: of the balanced side. share: of
    samples that are balanced, P >= 0.5. gap: the mean. bimodal: whether P is the mixture's, otherwise it is the rule's.
    """

    posterior: Tensor
    mean: float
    variance: float
    share: float
    gap: float
    bimodal: bool

    def balanced(self, gap: Tensor) -> Tensor:
        """Return P(balanced | gap) of gaps (b,), without synchronising the device."""
        bin_index = torch.add(0.5, gap, alpha=_NUM_BINS).long()
        return self.posterior[bin_index.clamp_(0, _NUM_BINS)]  # NaN is reported by the loss


def fit_gap_mixture(gap: NDArray[np.float64], *, device: torch.device) -> GapMixture:
    """Fit the mixture to gaps (n,) in [0, 1] with the audit's defaults; constant gaps and few samples are no error."""
    mixture = fit_mixture(gap, config=MixtureConfig(), seed=0)
    mean, sd = _balanced_side(gap, mixture)
    return GapMixture(
        posterior=torch.from_numpy(mixture.posterior(np.linspace(0.0, 1.0, _NUM_BINS + 1))).to(device),
        mean=mean,
        variance=max(sd, _MIN_SD) ** 2,
        share=float((mixture.posterior(gap) >= 0.5).mean()),
        gap=float(gap.mean()),
        bimodal=mixture.bimodal,
    )


def _balanced_side(gap: NDArray[np.float64], mixture: Mixture) -> tuple[float, float]:
    """Return mean and sd of the balanced component; by the rule, of gaps up to the threshold, or the threshold."""
    if mixture.bimodal and mixture.components is not None:
        return mixture.components[0].mean, mixture.components[0].sd
    below = gap[gap <= mixture.threshold]
    return (float(below.mean()), float(below.std())) if len(below) else (mixture.threshold, 0.0)


def modality_gap(outputs: Outputs, label: Tensor) -> Tensor:
    """Compute the gap (b,) in [0, 1] of a batch; high = the modalities differ in their confidence in the true class."""
    confidence = outputs.confidence(label)[1:]
    # A network that has diverged is reported by the loss.
    return (confidence.amax(dim=0) - confidence.amin(dim=0)).nan_to_num(nan=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GmmConfig:
    """Adaptive loss of arXiv 2510.21797 in mmaudit's form; all constants except the two stages are ours.

    Args:
        warmup_epochs: Epochs with the ordinary summed loss before the mixture is fitted.
        lam_gap: Weight of the modality gap.
        lam_align: Weight of the alignment term A.
        stop_strong: Pass no gradient of the gap through the stronger branch, so that weakening it closes no gap.
        fit_rows: Training samples, the same ones every time, that the mixture is refitted to before every epoch.
    """

    section: ClassVar[str] = "balancing.gmm"
    warmup_epochs: int = 10
    lam_gap: float = 1.0
    lam_align: float = 0.1
    stop_strong: bool = True
    fit_rows: int = 1_024

    def __post_init__(self) -> None:
        check_ranges(
            "balancing.gmm",
            self,
            warmup_epochs="[0, 1e9]",
            lam_gap="[0, 1e9]",
            lam_align="[0, 1e9]",
            fit_rows="[10, 1e12]",
        )


class Gmm(Balancer):
    """The adaptive loss in two stages. State: the fit of the gap."""

    class_reason = "its modality gap is one of probabilities of the true class"
    config_type = GmmConfig
    paper = "Liu et al., arXiv 2510.21797"
    accumulation_reason = "its alignment is a mean over the imbalanced samples of a step"
    has_unimodal_loss = True
    evaluates = ("train",)
    config: GmmConfig

    @classmethod
    def late_start(cls, config: GmmConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the method starts after the last epoch."""
        return start_warning("balancing.gmm.warmup_epochs", config.warmup_epochs + 1, settings, fallback="sum")

    def initialize(self) -> None:
        """Set up the state."""
        self._gap_mixture: GapMixture | None = None  # None: in the warm-up

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Fit the mixture to the current gaps, after the warm-up."""
        super().begin_epoch(epoch, model_reader)
        if epoch <= self.config.warmup_epochs:
            return
        gap = model_reader.read(modality_gap, rows=sample_rows(model_reader, self.config.fit_rows))
        self._gap_mixture = fit_gap_mixture(gap.double().cpu().numpy(), device=self.device)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the loss of the stage."""
        if self._gap_mixture is None:
            return self.summed_losses(outputs, batch)
        return self._adaptive(outputs, batch, self._gap_mixture)

    def _adaptive(self, outputs: Outputs, batch: Batch, mixture: GapMixture) -> Tensor:
        config = self.config
        fused, unimodal = separate_losses(outputs, batch.label)
        confidence = (-unimodal).exp()  # of the true class
        strong, weak = confidence.amax(dim=0), confidence.amin(dim=0)
        gap = (strong.detach() if config.stop_strong else strong) - weak
        weight = paired = batch.loss_weight[0]
        if batch.present is not None:
            paired = weight * batch.present.all(dim=1)
        imbalanced = paired * (1.0 - mixture.balanced(gap.detach()))
        total = imbalanced.sum()
        self.distributed.sum_([total])
        align = imbalanced @ (gap - mixture.mean).relu().square() / total.clamp(min=1e-12)
        return (
            (weight + paired - imbalanced) @ fused
            + batch.mean_unimodal(unimodal).sum()
            + config.lam_gap * ((paired + imbalanced) @ gap)
            + config.lam_align / (2 * mixture.variance) * align
        )

    def epoch_metrics(self) -> dict[str, float]:
        """Return the fit before the epoch: share of balanced samples, mean gap, 1 where the gap is bimodal."""
        if (mixture := self._gap_mixture) is None:
            return {}
        return {"gmm_balanced": mixture.share, "gmm_gap": mixture.gap, "gmm_bimodal": float(mixture.bimodal)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step depends on."""
        return {"refit": None if self._gap_mixture is None else asdict(self._gap_mixture)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        self._gap_mixture = None if state["refit"] is None else GapMixture(**state["refit"])
