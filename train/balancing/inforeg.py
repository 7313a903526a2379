"""InfoReg: the modality ahead is kept near its weights at the start of the epoch, while it still learns quickly.

InfoReg, Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition" (CVPR 2025, arXiv
2503.18595), by the authors' code. The loss is CE(fused) + sum_j CE(z^j), z^j by separate heads. S^j is the sum over a
step of the probabilities of the true class. Where S^j exceeds that of the other modality, encoder j has in addition

    strength exp(tanh(S^j - S^other)) (theta - theta_start)

in its gradient, theta_start its weights at the start of the epoch, as long as its prime learning window is open. That
is judged before each epoch t = 0, 1, ... by the trace of the Fisher information of the epochs before, T_s = the sum
over weights W of encoder j and over steps of mean(grad_W^2), the pull included:

    k = (sum_{s = t-10}^{t-1} T_s - sum_{s = t-11}^{t-2} T_s) / sum_{s = t-10}^{t-1} T_s,   k = 1 at t = 0

Open where k > threshold. Two versions of their code are public, with thresholds of 0.04 and 0.05. The first is followed
here: z^j are those of separate heads; in the second they are parts of the fused classifier. Both have a strength of
0.95 for audio, the stronger modality of CREMA-D, and judge the window by its trace alone; the second has 0.1 for video,
which the first never regulates, since it repeats a condition. The paper itself was not read.

Ours: one strength for all modalities, a window for each, and the mean of the others for more than two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_ranges
from ..batches import Batch, ModelReader
from ..network import Outputs
from .balancer import Balancer, Validation
from .ogm import mean_of_others

_NUM_EPOCHS = 10  # that the trace is averaged over, as in the code


def trace_growth(traces: Sequence[float]) -> float:
    """Compute k from the traces T of all epochs so far, oldest first; high = quick learning, 1 = none so far."""
    now, before = sum(traces[-_NUM_EPOCHS:]), sum(traces[-_NUM_EPOCHS - 1 : -1])
    return (now - before) / now if now > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoRegConfig:
    """InfoReg (CVPR 2025).

    Args:
        strength: Strength of the regulation, as in its code.
        threshold: Growth of the trace above which a modality is regulated, as in its code.
    """

    section: ClassVar[str] = "balancing.inforeg"
    strength: float = 0.95
    threshold: float = 0.04

    def __post_init__(self) -> None:
        check_ranges(self.section, self, strength="[0, 1000]", threshold="[-1e9, 1]")


class InfoReg(Balancer):
    """The summed losses, with a pull on the encoder ahead. State: traces (m, epochs) and the weights of the start."""

    class_reason = "it compares the probabilities of the true class"
    config_type = InfoRegConfig
    paper = "Huang et al., CVPR 2025"
    has_unimodal_loss = True
    own_heads = True
    state_fields = ("_traces", "_trace", "_growth", "_start", "_strength")
    config: InfoRegConfig

    def initialize(self) -> None:
        """Set up the state."""
        m = self.net.num_modalities
        self._traces: list[list[float]] = [[] for _ in range(m)]  # of the last epochs
        self._trace = torch.zeros(m, device=self.device)  # of this epoch so far
        self._growth = [1.0] * m
        self._start: list[list[Tensor]] = [[] for _ in range(m)]  # empty where the window is closed
        self._strength = torch.zeros(m, device=self.device)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Open or close the windows, and record the weights of the encoders whose window is open."""
        super().begin_epoch(epoch, model_reader)
        if epoch > 1:
            traces = zip(self._traces, self._trace.tolist(), strict=True)
            self._traces = [[*earlier, trace][-_NUM_EPOCHS - 1 :] for earlier, trace in traces]
        self._trace = torch.zeros_like(self._trace)
        self._growth = [trace_growth(traces) for traces in self._traces]
        self._start = [
            [p.detach().clone() for p in encoder.parameters()] if growth > self.config.threshold else []
            for encoder, growth in zip(self.net.encoders, self._growth, strict=True)
        ]

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the mean cross entropies."""
        return self.summed_losses(outputs, batch)

    @torch.no_grad()
    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Add the pull to the gradients of the encoders ahead, and update the traces."""
        score = batch.size * self.mean_confidence(outputs, batch)[1:]
        used = score > 0
        lead = torch.where(used & (used.sum() > 1), score - mean_of_others(score, used), 0.0)
        self._strength = torch.where(lead > 0, self.config.strength * lead.tanh().exp(), 0.0)
        for j, (encoder, start) in enumerate(zip(self.net.encoders, self._start, strict=True)):
            parameters = list(encoder.parameters())
            for parameter, value in zip(parameters, start or parameters, strict=True):
                if parameter.grad is not None and start:
                    parameter.grad.add_(self._strength[j] * (parameter - value))
            means = [p.grad.square().mean() for p in parameters if p.grad is not None and p.ndim > 1]
            if means:
                self._trace[j] += torch.stack(means).sum().nan_to_num(nan=0.0, posinf=0.0)  # of a step that overflowed

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Drop the weights of the start, which the next epoch replaces."""
        self._start = [[] for _ in self._start]

    def epoch_metrics(self) -> dict[str, float]:
        """Return the strength of the last step, the growth of the trace before the epoch, and the trace."""
        return {
            **self.by_modality("pull", self._strength),
            **self.by_modality("trace_growth", self._growth),
            **self.by_modality("trace", self._trace),
        }
