"""Greedy: rebalancing steps by conditional learning speed.

Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks", ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..fusion import Mmtm
from ..network import FusionNet, Outputs
from ..optimizer import Optimization
from .balancer import Balancer
from .config import BalancingConfig

_LEAST = 1e-30  # a speed of 0, such as a modality's whose parameters are all frozen


def conditional_speeds(cross: Sequence[float], own: Sequence[float]) -> list[float]:
    """Give s (m,) = log10(sum of mu_cross / sum of mu_own): how fast the others are learned from beside the modality.

    cross, own (m,): mu = ||gradient||^2 / ||theta||^2, added over steps, of the parameters that bring the others' news
    to modality j, and of its own. High: j itself is learned slowly.
    """
    return [math.log10(max(c, _LEAST) / max(o, _LEAST)) for c, o in zip(cross, own, strict=True)]


def slowest(speeds: Sequence[float]) -> tuple[int, float]:
    """Give the modality that is learned slowest, and d >= 0: its s less the mean of the others' (ours for m > 2)."""
    slow = max(range(len(speeds)), key=speeds.__getitem__)
    others = [speed for j, speed in enumerate(speeds) if j != slow]
    return slow, speeds[slow] - sum(others) / len(others)


class Greedy(Balancer):
    """L = CE(fused). Ordinary steps, and rebalancing steps of the modality that is learned slowly.

    In those its cross-modal path is cut: the running mean stands for what the others would tell it, and nothing but
    its encoder and its head moves. Each time `rest` ordinary steps have passed, the next one compares the speeds, and
    d > alpha starts `window` rebalancing steps. That is ours: in the paper every ordinary step compares, here one in
    `rest` + 1 does, so that the device is seldom waited for.
    """

    needs_unimodal_logits = False

    def __init__(self, net: FusionNet, optimization: Optimization, config: BalancingConfig, *, epochs: int) -> None:
        super().__init__(net, optimization, config, epochs=epochs)
        assert isinstance(net.fusion, Mmtm)  # the config has seen to it
        self.fusion = net.fusion
        device = next(net.parameters()).device
        self.total = torch.zeros(2, net.num_modalities, device=device)  # of mu over the steps: cross-modal, own
        self.ordinary = 0  # steps since the last comparison or rebalancing
        self.slow, self.left = 0, 0  # which is rebalanced, for how many more steps
        self.rebalanced = 0  # steps in all
        self._gather_paths(device)

    def _gather_paths(self, device: torch.device) -> None:
        """List what is measured, and which of it belongs to which path (2m, number of parameters)."""
        fusion, paths = self.fusion, []
        for excite in fusion.excite:
            paths.append([*excite.parameters(), *fusion.squeeze.parameters()])
        for encoder, head in zip(self.net.encoders, fusion.heads, strict=True):
            paths.append([*(p for p in encoder.parameters() if p.requires_grad), *head.parameters()])
        self._measured = list({id(p): p for path in paths for p in path}.values())
        number = {id(p): index for index, p in enumerate(self._measured)}
        belongs = torch.zeros(len(paths), len(self._measured))
        for row, path in enumerate(paths):
            belongs[row, [number[id(p)] for p in path]] = 1
        self._belongs = belongs.to(device)
        self._own = [{id(p) for p in path} for path in paths[self.net.num_modalities :]]
        self._nothing = torch.zeros((), device=device)

    def step(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Learn from one batch; the path is cut in a rebalancing step only, and in no reading between epochs."""
        slow = self.slow
        self.fusion.cut[slow] = self.left > 0
        try:
            found = super().step(batch)
        finally:
            self.fusion.cut[slow] = False
        if self.distributed.world_size > 1:  # what stands for the others' news is the same in all processes
            self.distributed.sum_([self.fusion.mean])
            self.fusion.mean /= self.distributed.world_size
        return found

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The fused answer's."""
        return self.fused_loss(outputs, batch)

    def modulate(self, outputs: Outputs, batch: Batch) -> None:
        """Keep still what does not take part, add up the speeds of the rest, and see what the next step is."""
        if self.left > 0:
            self._still_others()
        self._add_speeds()
        if self.left > 0:
            self.left -= 1
            self.rebalanced += 1
            return
        self.ordinary += 1
        if self.ordinary > self.config.greedy.rest:
            self.ordinary = 0
            slow, lead = slowest(conditional_speeds(*self.total.tolist()))
            if lead > self.config.greedy.alpha:
                self.slow, self.left = slow, self.config.greedy.window

    def _still_others(self) -> None:
        """Leave gradients to the slow modality alone, and to heads that only listen."""
        for part in (self.net.encoders, self.fusion):
            for parameter in part.parameters():
                if id(parameter) not in self._own[self.slow]:
                    parameter.grad = None

    @torch.no_grad()
    def _add_speeds(self) -> None:
        """Add mu of every path; what does not move adds 0, and so does a step that overflowed."""
        weights: list[Tensor] = [p.detach() for p in self._measured]
        gradients = [self._nothing if p.grad is None else p.grad for p in self._measured]
        norms = torch._foreach_norm([*gradients, *weights])
        squares = torch.stack(norms).float().square().view(2, -1)
        moved, size = squares @ self._belongs.T
        speed = (moved / size).nan_to_num(nan=0.0, posinf=0.0)
        self.total += speed.view_as(self.total)

    def numbers(self) -> dict[str, float]:
        """The conditional speeds, high for a modality that is learned slowly, and rebalancing steps in all."""
        speeds = conditional_speeds(*self.total.tolist())
        named = {f"speed_{name}": s for name, s in zip(self.net.plan.modalities, speeds, strict=True)}
        return {**named, "rebalanced": float(self.rebalanced)}

    def state_dict(self) -> dict[str, Any]:
        """Speeds and counters."""
        counters = {name: getattr(self, name) for name in ("ordinary", "slow", "left", "rebalanced")}
        return {"total": self.total.clone(), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.total = state["total"].to(self.total)
        self.ordinary, self.slow = state["ordinary"], state["slow"]
        self.left, self.rebalanced = state["left"], state["rebalanced"]
