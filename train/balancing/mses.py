"""MSES: early stopping by modality.

Fujimori et al., "Modality-Specific Learning Rate Control for Multimodal Classification", ACPR 2019. Its own code has
not been published, and its constants could not be read. Two forms are offered: mmaudit's, which is the default, and the
one in a published reimplementation, that in the code of AGM (Li et al., ICCV 2023), see MsesConfig.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...audit.parsing import check_choices, check_ranges
from ..batches import Batch, ModelReader
from ..network import Outputs
from .balancer import Sum, Validation, check_loss_weights

MSES_MODES = ("freeze", "restore")


@dataclass(frozen=True, slots=True, kw_only=True)
class MsesConfig:
    """Modality-specific early stopping (2019). The defaults are mmaudit's own.

    AGM's code has mode = "restore", smoothing = 0.6, unimodal_weight = 0, and patience = 81 on CREMA-D, 11 and 31 on
    other data (it freezes after more than 80, 10 and 30 epochs).

    Args:
        mode: "freeze": a modality that stops stays as it is; "restore": the whole network and the optimiser go back to
            the end of that modality's best epoch first.
        patience: Epochs without a lower criterion after which a modality is frozen.
        smoothing: Share of the previous epoch's unimodal validation loss in the criterion, in [0, 1).
        fused_weight: Weight of the cross entropy of the fused logits.
        unimodal_weight: Weight of the cross entropy of each modality that is not frozen.
    """

    section: ClassVar[str] = "balancing.mses"
    mode: str = "freeze"
    patience: int = 5
    smoothing: float = 0.0
    fused_weight: float = 1.0
    unimodal_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices("balancing.mses", self, mode=MSES_MODES)
        check_ranges("balancing.mses", self, patience="[1, 1e9]", smoothing="[0, 1)")
        check_loss_weights("balancing.mses", fused=self.fused_weight, unimodal=self.unimodal_weight)


class Mses(Sum):
    """L = w_f CE(fused) + w_u times the sum of the CEs of the modalities that are not frozen.

    The criterion of modality j after epoch t is smoothing L_{t-1}^j + (1 - smoothing) L_t^j, L its unimodal validation
    loss, and L_1^j after the first. A modality whose criterion has not fallen below its lowest for `patience` epochs is
    frozen: encoder and separate head stay as they are, and its loss leaves the sum. The fusion still trains on its
    features, also when all are frozen. AGM's code multiplies the gradients of a frozen modality by 0, so that weight
    decay and running means go on; here they do not.

    Where two modalities stop after the same epoch, "restore" goes back to the best epoch of the later one in the order
    of the modalities. Their counts of epochs go on.
    """

    config_type = MsesConfig
    paper = "Fujimori et al., ACPR 2019"
    evaluates = ("validation",)
    min_modalities = 2
    state_fields = (
        *("lowest_loss", "epochs_without_improvement", "previous_loss"),
        *("best_states", "restore_from"),
    )
    config: MsesConfig

    @classmethod
    def reads_validation(cls, config: MsesConfig) -> bool:
        """Return True: validation losses decide."""
        return True

    def initialize(self) -> None:
        """Set up the state."""
        m = self.net.num_modalities
        self.lowest_loss = [math.inf] * m
        self.epochs_without_improvement = [0] * m
        self.previous_loss: list[float] = []  # empty before the first epoch
        self.best_states: list[dict[str, Any] | None] = [None] * m  # network and optimiser, in the mode restore
        self.restore_from: int | None = None  # the modality whose best state the next epoch starts from
        self.loss_mask = torch.ones(m, device=self.device)  # 0: frozen

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of the losses that are still trained."""
        return self.weighted_losses(outputs, batch, loss_mask=self.loss_mask)

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Go back to the best state of a modality that has stopped, after the last epoch's weights were recorded."""
        super().begin_epoch(epoch, model_reader)
        if self.restore_from is None:
            return
        state, self.restore_from = self.best_states[self.restore_from], None
        assert state is not None, "an epoch without a lower criterion comes after one with it"
        self.net.load_state_dict(state["net"])
        self.optimization.optimizer.load_state_dict(state["optimizer"])
        self.best_states = [  # not needed any longer once frozen
            None if frozen else best for frozen, best in zip(self.optimization.frozen, self.best_states, strict=True)
        ]

    def end_epoch(self, epoch: int, validation: Validation) -> None:
        """Freeze modalities whose criterion has not fallen for `patience` epochs."""
        smoothing, losses = self.config.smoothing, validation.unimodal_loss
        previous_losses, self.previous_loss = self.previous_loss or losses, list(losses)
        state: dict[str, Any] | None = None
        for j, (previous, current) in enumerate(zip(previous_losses, losses, strict=True)):
            # 0 times an infinite loss would be NaN.
            loss = smoothing * previous + (1 - smoothing) * current if smoothing else current
            is_lower = loss < self.lowest_loss[j]  # NaN is not
            self.epochs_without_improvement[j] = 0 if is_lower else self.epochs_without_improvement[j] + 1
            self.lowest_loss[j] = loss if is_lower else self.lowest_loss[j]
            if is_lower and self.config.mode == "restore" and not self.optimization.frozen[j]:
                state = state or self._current_state()
                self.best_states[j] = state
        stopped = [
            j
            for j, num_epochs in enumerate(self.epochs_without_improvement)
            if num_epochs >= self.config.patience and not self.optimization.frozen[j]
        ]
        with_state = [j for j in stopped if self.best_states[j] is not None]
        self.restore_from = with_state[-1] if with_state else self.restore_from
        self._freeze(stopped)

    def _current_state(self) -> dict[str, Any]:
        """Copy the state of network and optimiser."""
        return copy.deepcopy({"net": self.net.state_dict(), "optimizer": self.optimization.optimizer.state_dict()})

    def _freeze(self, modalities: list[int]) -> None:
        """Freeze more modalities; their encoders are kept in eval mode, so that no running mean changes either."""
        for j in modalities:
            self.optimization.frozen[j] = True
        untrainable = [not any(p.requires_grad for p in encoder.parameters()) for encoder in self.net.encoders]
        self.net.freeze_encoders(
            [j for j, is_untrainable in enumerate(untrainable) if is_untrainable or self.optimization.frozen[j]]
        )
        learns = [not frozen for frozen in self.optimization.frozen]
        self.loss_mask.copy_(torch.tensor(learns, dtype=torch.float32))

    def epoch_metrics(self) -> dict[str, float]:
        """Return which modalities are frozen: 1, or 0."""
        return self.by_modality("frozen", self.optimization.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return the criteria, the best states, and which modalities are frozen."""
        return {**super().state_dict(), "frozen": list(self.optimization.frozen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""
        super().load_state_dict(state)
        self._freeze([j for j, frozen in enumerate(state["frozen"]) if frozen])
