"""BSS-L: balance scores of the model that is being trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...audit.errors import ManifestError
from ...audit.metrics import balance
from ...audit.parsing import check_choices, check_ranges
from ...rebalance.curriculum import RowIndex
from ..batches import ModelReader
from ..network import Outputs, cross_entropies
from .sampler import Ordered

SCORE_SOURCES = ("manifest", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class BssConfig:
    """Balance scores of BSS (arXiv 2501.01470). Orders and draws are set by `order.*`.

    Args:
        score_source: Scores that bss-l draws by, one of SCORE_SOURCES: the manifest's probe scores, read once, or
            those of the model in training.
        every_epochs: E, epochs between two evaluations of the model. 8 is ours, so that scoring takes a twentieth of
            the time; the authors' code has 1, with beta = 1.
        beta: Weight of new scores in the running score, s_hat <- (1 - beta) s_hat + beta s; the paper's value.
        alpha: Weight of the fused term of the loss; the unimodal terms have weight 1.
    """

    section: ClassVar[str] = "sampling.bss"
    score_source: str = "model"
    every_epochs: int = 8
    beta: float = 0.6
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self.section, self, score_source=SCORE_SOURCES)
        check_ranges(self.section, self, every_epochs="[1, inf)", beta="(0, 1]", alpha="[0, inf)")


class BssL(Ordered):
    """BSS-L (arXiv 2501.01470): epochs drawn by a running balance score of the model in training.

    Before epochs 1, 1 + E, 1 + 2 E, ... the model is evaluated in eval mode: s = minmax(similarity) - minmax(loss), and
    s_hat <- (1 - beta) s_hat + beta s, s_hat = s the first time; high = balanced. `order.draw` and `order.weight`
    select how epochs are drawn: softmax weights with replacement are the paper's, linear ones in an order without it
    its code's, and the default. Scores of the manifest's probes instead of the model's, which never change, are ours.
    """

    config_type = BssConfig
    paper = "Guan et al., arXiv 2501.01470"
    order_fields = ("draw", "weight")
    state_fields = ("balance",)
    config: BssConfig

    @classmethod
    def reads_scores(cls, config: BssConfig) -> bool:
        """Return whether the scores are the manifest's."""
        return config.score_source == "manifest"

    def initialize(self) -> None:
        """Set the manifest's scores, or none before the first evaluation."""
        self.reads_model = self.config.score_source == "model"
        self.balance = None if self.reads_model else self.pool.balance
        num_missing, num_samples = int(np.isnan(self.pool.balance).sum()), len(self.pool)
        if num_missing and not self.reads_model:
            raise ManifestError(
                f"--sampling bss-l draws by balance scores, and {num_missing} of {num_samples} training samples have "
                "none in the manifest: rescore with mmaudit score and split again, or use scores of the model in "
                "training with --set sampling.bss.score_source=model"
            )

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Evaluate the model in every E-th epoch."""
        bss = self.config
        if not self.reads_model or (epoch - 1) % bss.every_epochs:
            return
        criteria = model_reader.read(partial(_criteria, alpha=bss.alpha))
        similarity, loss = criteria.cpu().numpy()
        scores = balance(similarity, loss, fits=np.ones(len(loss), dtype=np.bool_)).astype(np.float64)
        self.balance = scores if self.balance is None else (1 - bss.beta) * self.balance + bss.beta * scores

    def rows(self, epoch: int) -> RowIndex:
        """Draw an epoch by s_hat."""
        assert self.balance is not None, "begin_epoch comes first"
        return self.in_order("weighted", epoch, balance=self.balance)


def _criteria(outputs: Outputs, label: Tensor, *, alpha: float) -> Tensor:
    """Compute the terms of the score (2, b): similarity in [0, 1], and loss alpha CE(fused) + sum of unimodal CE.

    The similarity is the mean cosine over pairs of the unimodal softmax outputs; 0 where there is only one modality.
    """
    fused, unimodal = cross_entropies(outputs, label)
    probabilities = outputs.unimodal.float().softmax(dim=2)
    cosines = [
        functional.cosine_similarity(probabilities[i], probabilities[j], dim=1)
        for i, j in combinations(range(len(probabilities)), 2)
    ]
    similarity = torch.stack(cosines).mean(dim=0) if cosines else torch.zeros_like(fused)
    return torch.stack([similarity, alpha * fused + unimodal.sum(dim=0)])
