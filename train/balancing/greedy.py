"""Greedy: rebalancing steps by conditional learning speed.

Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks", ICML 2022.
As in their code:

    L = sum_j CE(x_j), x_j the logits of branch j; the prediction is the mean of the x_j
    mu = ||gradient||^2 / ||theta||^2, summed over ordinary steps, of cross-modal and of own parameters of each branch
    s_j = log10(mu_cross / mu_own)                high: modality j itself is learned slowly
    d = the slow modality's s - that of the other

Every ordinary step from epoch `first_epoch` on compares; d > alpha starts `window` rebalancing steps, in which the mean
over all training steps replaces the slow modality's excitation. They do not count in mu, and update all parameters that
have a gradient. Their optimiser is SGD without momentum and weight decay, learning rate 0.1, batches of 8.

Their network has cross-modal modules after three stages of two ResNets: cross_modal.MmtmStages, --fusion mmtm-stages.

Ours: one module on the features of encoders of any kind, cross_modal.Mmtm, the default; the mean of the others' s for
more than two modalities; a branch's loss is that of the samples with its modality; the options `rest` and `trained`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch, start_warning
from ..config import TrainConfig
from ..cross_modal import CrossModal
from ..network import Outputs
from .balancer import Balancer

TRAINED = ("all", "slow")
_MIN_SPEED = 1e-30  # replaces a speed of 0, as of a modality whose parameters are all frozen


def conditional_speeds(cross: Sequence[float], own: Sequence[float]) -> list[float]:
    """Compute s (m,) = log10(sum of mu_cross / sum of mu_own), the speed of the cross-modal path relative to its own.

    cross, own (m,): mu = ||gradient||^2 / ||theta||^2, summed over steps, of the parameters that carry the others'
    features to modality j, and of its own. High: modality j itself is learned slowly.
    """
    return [math.log10(max(c, _MIN_SPEED) / max(o, _MIN_SPEED)) for c, o in zip(cross, own, strict=True)]


def slowest_modality(speeds: Sequence[float]) -> tuple[int, float]:
    """Return the modality that is learned slowest, and d >= 0: its s minus the mean of the others' (ours for m > 2)."""
    slow = max(range(len(speeds)), key=speeds.__getitem__)
    other_speeds = [speed for j, speed in enumerate(speeds) if j != slow]
    return slow, speeds[slow] - sum(other_speeds) / len(other_speeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyConfig:
    """Greedy (ICML 2022). The defaults are those of its code, on ModelNet40.

    Args:
        alpha: Difference of conditional learning speeds, in powers of ten, above which rebalancing starts; epsilon in
            its code.
        window: Number of rebalancing steps.
        first_epoch: First epoch in which rebalancing may start; speeds are summed from epoch 1.
        rest: Ordinary steps between two comparisons of the speeds (ours); 0 compares in every one, which waits for the
            device.
        trained: What rebalancing steps train: "all" branches, or the "slow" one alone (ours).
    """

    section: ClassVar[str] = "balancing.greedy"
    alpha: float = 0.01
    window: int = 5
    first_epoch: int = 2
    rest: int = 0
    trained: str = "all"

    def __post_init__(self) -> None:
        check_choices("balancing.greedy", self, trained=TRAINED)
        check_ranges("balancing.greedy", self, alpha="[0, 1000]", window="[1, 1e9]", rest="[0, 1e9]")
        check_ranges("balancing.greedy", self, first_epoch="[1, 1e9]")


class Greedy(Balancer):
    """L = sum_j CE(x_j) of the branches. Ordinary steps, and rebalancing steps of the modality that is learned slowly.

    In rebalancing steps its cross-modal path is cut: the mean excitation replaces the other modalities' input.
    """

    config_type = GreedyConfig
    paper = "Wu et al., ICML 2022"
    accumulation_reason = "the mean excitation that cuts a path follows every pass"
    fusions = ("mmtm", "mmtm-stages")
    fusion_reason = "it measures and cuts the cross-modal path, which no other fusion has"
    state_fields = ("epoch", "total", "ordinary", "slow", "steps_left", "rebalanced")
    config: GreedyConfig
    needs_unimodal_logits = False

    @classmethod
    def late_start(cls, config: GreedyConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the method starts after the last epoch."""
        key = "balancing.greedy.first_epoch"
        return start_warning(key, config.first_epoch, settings, fallback="the loss of all branches")

    def initialize(self) -> None:
        """Set up the state."""
        assert isinstance(self.net.fusion, CrossModal)  # checked by methods.resolve
        self.fusion = self.net.fusion
        # Of mu over the ordinary steps: cross-modal, own.
        self.total = torch.zeros(2, self.net.num_modalities, device=self.device)
        self.epoch = 0
        self.ordinary = 0  # steps since the last comparison or rebalancing
        self.slow, self.steps_left = 0, 0  # the modality that is rebalanced, for how many more steps
        self.rebalanced = 0  # steps in all
        self._gather_paths()

    def _gather_paths(self) -> None:
        """List the measured parameters, and which of them belong to which path (2m, number of parameters)."""
        paths = [self.fusion.cross_parameters(j) for j in range(self.net.num_modalities)]
        for encoder, head in zip(self.net.encoders, self.fusion.heads, strict=True):
            paths.append([*(p for p in encoder.parameters() if p.requires_grad), *head.parameters()])
        self._measured = list({id(p): p for path in paths for p in path}.values())
        index_of = {id(p): index for index, p in enumerate(self._measured)}
        membership = torch.zeros(len(paths), len(self._measured))
        for row, path in enumerate(paths):
            membership[row, [index_of[id(p)] for p in path]] = 1
        self._path_membership = membership.to(self.device)
        self._nothing = torch.zeros((), device=self.device)

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch; the path is cut in rebalancing steps only, and never in evaluation between epochs."""
        slow, rebalances = self.slow, self.steps_left > 0
        self.fusion.cut[slow] = rebalances
        try:
            outputs, branches = self._forward(batch)
        finally:
            self.fusion.cut[slow] = False
        trained = [slow] if rebalances and self.config.trained == "slow" else range(len(branches))
        # The others get no gradient, instead of one of 0: weight decay and momentum do not move them either.
        losses = [(self.net.loss_of(branches[j], batch.label) * batch.loss_weight[1 + j]).sum() for j in trained]
        loss = torch.stack(losses).sum() + self.head_loss(outputs, batch)
        self.optimization.backward(loss)
        self.modulate(outputs, batch)
        self.optimization.apply()
        if self.distributed.world_size > 1:  # the mean excitation is the same in all processes
            self.distributed.sum_([self.fusion.mean])
            self.fusion.mean /= self.distributed.world_size
        return outputs, loss.detach()

    def _forward(self, batch: Batch) -> tuple[Outputs, list[Tensor]]:
        """Compute the outputs, and the logits of every branch in float32, m of (b, k)."""
        with self.optimization.autocast():
            features = tuple(f.float() for f in self.net.encode(batch.inputs, batch.present))
        branches = self.fusion.branch_logits(features)
        return Outputs(torch.stack(branches).mean(dim=0), None, features, self.net.loss_of), branches

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Update the speeds in ordinary steps, and set the kind of the next step."""
        if self.steps_left > 0:
            self.steps_left -= 1
            self.rebalanced += 1
            return
        self._add_speeds()
        if self.epoch < self.config.first_epoch:
            return
        self.ordinary += 1
        if self.ordinary > self.config.rest:
            self.ordinary = 0
            slow, lead = slowest_modality(conditional_speeds(*self.total.tolist()))
            if lead > self.config.alpha:
                self.slow, self.steps_left = slow, self.config.window

    @torch.no_grad()
    def _add_speeds(self) -> None:
        """Add mu of every path; parameters without gradient add 0, and so does a step that overflowed."""
        weights: list[Tensor] = [p.detach() for p in self._measured]
        gradients = [self._nothing if p.grad is None else p.grad for p in self._measured]
        norms = torch._foreach_norm([*gradients, *weights])
        squares = torch.stack(norms).float().square().view(2, -1)
        moved, size = squares @ self._path_membership.T
        speed = (moved / size).nan_to_num(nan=0.0, posinf=0.0)
        self.total += speed.view_as(self.total)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the conditional speeds, high for a modality that is learned slowly, and the rebalancing steps."""
        speeds = self.by_modality("speed", conditional_speeds(*self.total.tolist()))
        return {**speeds, "rebalanced": float(self.rebalanced)}
