"""Greedy: rebalancing steps by conditional learning speed.

Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks", ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_ranges
from ..batches import Batch
from ..fusion import Mmtm
from ..network import Outputs
from .balancer import Balancer

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
    """Greedy (ICML 2022); the constants are ours.

    Args:
        alpha: Difference of conditional learning speeds, in powers of ten, that starts rebalancing.
        window: Number of rebalancing steps.
        rest: Ordinary steps after them, before the speeds are compared again.
    """

    section: ClassVar[str] = "balancing.greedy"
    alpha: float = 0.1
    window: int = 5
    rest: int = 3

    def __post_init__(self) -> None:
        check_ranges("balancing.greedy", self, alpha="[0, 1000]", window="[1, 1e9]", rest="[0, 1e9]")


class Greedy(Balancer):
    """L = CE(fused). Ordinary steps, and rebalancing steps of the modality that is learned slowly.

    In rebalancing steps its cross-modal path is cut: the running mean replaces the other modalities' input, and only
    its encoder and its head are updated. Each time `rest` ordinary steps have passed, the next one compares the speeds,
    and d > alpha starts `window` rebalancing steps. That is ours: in the paper every ordinary step compares, here one
    in `rest` + 1 does, so that the device is synchronised seldom.
    """

    config_type = GreedyConfig
    paper = "Wu et al., ICML 2022"
    fusions = ("mmtm",)
    fusion_reason = "it measures and cuts the cross-modal path, which no other fusion has"
    state_fields = ("total", "ordinary", "slow", "steps_left", "rebalanced")
    config: GreedyConfig
    needs_unimodal_logits = False

    def initialize(self) -> None:
        """Set up the state."""
        assert isinstance(self.net.fusion, Mmtm)  # checked by methods.resolve
        self.fusion = self.net.fusion
        self.total = torch.zeros(
            2, self.net.num_modalities, device=self.device
        )  # of mu over the steps: cross-modal, own
        self.ordinary = 0  # steps since the last comparison or rebalancing
        self.slow, self.steps_left = 0, 0  # the modality that is rebalanced, for how many more steps
        self.rebalanced = 0  # steps in all
        self._gather_paths()

    def _gather_paths(self) -> None:
        """List the measured parameters, and which of them belong to which path (2m, number of parameters)."""
        fusion, paths = self.fusion, []
        for excite in fusion.excite:
            paths.append([*excite.parameters(), *fusion.squeeze.parameters()])
        for encoder, head in zip(self.net.encoders, fusion.heads, strict=True):
            paths.append([*(p for p in encoder.parameters() if p.requires_grad), *head.parameters()])
        self._measured = list({id(p): p for path in paths for p in path}.values())
        index_of = {id(p): index for index, p in enumerate(self._measured)}
        membership = torch.zeros(len(paths), len(self._measured))
        for row, path in enumerate(paths):
            membership[row, [index_of[id(p)] for p in path]] = 1
        self._path_membership = membership.to(self.device)
        self._own = [{id(p) for p in path} for path in paths[self.net.num_modalities :]]
        self._nothing = torch.zeros((), device=self.device)

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Train on one batch; the path is cut in rebalancing steps only, and never in evaluation between epochs."""
        slow = self.slow
        self.fusion.cut[slow] = self.steps_left > 0
        try:
            outputs_and_loss = super().step(batch)
        finally:
            self.fusion.cut[slow] = False
        if self.distributed.world_size > 1:  # the running mean is the same in all processes
            self.distributed.sum_([self.fusion.mean])
            self.fusion.mean /= self.distributed.world_size
        return outputs_and_loss

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Clear the gradients that do not take part, update the speeds, and set the kind of the next step."""
        if self.steps_left > 0:
            self._clear_other_gradients()
        self._add_speeds()
        if self.steps_left > 0:
            self.steps_left -= 1
            self.rebalanced += 1
            return
        self.ordinary += 1
        if self.ordinary > self.config.rest:
            self.ordinary = 0
            slow, lead = slowest_modality(conditional_speeds(*self.total.tolist()))
            if lead > self.config.alpha:
                self.slow, self.steps_left = slow, self.config.window

    def _clear_other_gradients(self) -> None:
        """Keep the gradients of the slow modality and of separate heads only."""
        for part in (self.net.encoders, self.fusion):
            for parameter in part.parameters():
                if id(parameter) not in self._own[self.slow]:
                    parameter.grad = None

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
