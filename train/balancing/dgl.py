"""DGL: encoders follow the unimodal losses only, the fusion learns from detached features.

DGL, Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning" (ICCV 2025, arXiv 2507.10213). With
F the fusion with its classifier, theta its parameters, f^j the features, and sg(x) = x without gradient:

    L = mean_i CE(F_theta(sg(f_i^1), ..., sg(f_i^m)), y_i)                     trains the fusion only
        + alpha sum_j mean_i CE(F_sg(theta)(0, ..., f_i^j, ..., 0), y_i)       trains encoder j only

The unimodal logits are those of the fusion with the other features 0, as in their code for concatenated features. alpha
is 4 there by default, and 4 or 5 in their script for CREMA-D. Their code clips gradients at a norm of 40; here
`optim.clip_norm` does.

Ours: the other fusions get features of 0 too. In their code, summed fusion leaves out the others' biases, and their
gated and FiLM fusions, which are not those of the same name here, apply a modality to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from ...audit.errors import ConfigError
from ...audit.parsing import check_ranges
from ..batches import Batch
from ..config import TrainConfig
from ..network import Outputs
from .balancer import Balancer


@dataclass(frozen=True, slots=True, kw_only=True)
class DglConfig:
    """DGL (ICCV 2025).

    Args:
        alpha: Weight of the unimodal losses, as in its code.
    """

    section: ClassVar[str] = "balancing.dgl"
    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_ranges(self.section, self, alpha="[0, 1000]")


class Dgl(Balancer):
    """The fused loss trains the fusion, alpha times each unimodal loss its encoder; neither reaches the other."""

    config_type = DglConfig
    paper = "Wei et al., ICCV 2025"
    has_unimodal_loss = True
    config: DglConfig

    @classmethod
    def check(cls, config: DglConfig, settings: TrainConfig) -> None:
        """Raise ConfigError for unpaired samples: the unimodal losses do not train the fusion."""
        dus = settings.sampling.get("dus", {})
        if not dus.get("paired", True):
            raise ConfigError(
                "sampling.dus.paired = false leaves no pairs, and with --balancing dgl only pairs train the fusion; "
                "use paired samples, or --balancing sum"
            )

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return outputs of detached features, and the loss."""
        with self.optimization.autocast():
            features = self.net.encode(batch.inputs, batch.present)
        outputs = self.net.classify([f.detach() for f in features])
        loss = self.fused_loss(outputs, batch) + self.config.alpha * self._unimodal_losses(features, batch).sum()
        return outputs, loss

    def _unimodal_losses(self, features: Sequence[Tensor], batch: Batch) -> Tensor:
        """Compute this process's parts (m,) of the mean unimodal losses, without gradient by the fusion."""
        fusion = self.net.fusion
        constants = {name: parameter.detach() for name, parameter in fusion.named_parameters()}
        features = [f.float() for f in features]
        training = fusion.training
        fusion.eval()  # the fusion's running means must not be updated on single modalities
        with torch.autocast(features[0].device.type, enabled=False):
            logits = [
                functional_call(
                    fusion, constants, ([f if i == j else torch.zeros_like(f) for i, f in enumerate(features)],)
                )
                for j in range(len(features))
            ]
        fusion.train(training)
        return batch.mean_unimodal(self.net.loss_of(torch.stack(logits), batch.label))
