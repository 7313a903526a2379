"""BSS: balance scores, the curriculum that ranks by them, and draws by those of the model in training.

Guan et al., "Balance-aware Sequence Sampling Makes Multimodal Learning Better" (IJCAI 2025, arXiv 2501.01470):

    s_i = minmax(sim_i) - minmax(l_i) in [-1, 1],    l_i = alpha CE(z_i^fused) + sum_j CE(z_i^j)

sim is the mean cosine over pairs of the unimodal softmax outputs; high = balanced. The authors' loss on CREMA-D, 0.1
CE(fused) + 0.9 (CE(audio) + CE(visual)), has the same min-max as alpha = 1/9.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...audit.errors import ManifestError
from ...audit.metrics import balance
from ...audit.parsing import check_choices, check_ranges
from ...rebalance.curriculum import RowIndex
from ..batches import ModelReader
from ..network import Outputs, separate_losses
from .sampler import Ordered, Paced

_MODEL_REASON = (
    "balance scores of the model are by class probabilities; use those of the manifest with --set "
    "sampling.bss.score_source=manifest"
)
SCORE_SOURCES = ("auto", "manifest", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class BssConfig:
    """Balance scores of BSS (arXiv 2501.01470). Orders and draws are set by `order.*`.

    The authors' code: bss-h with score_source = "model"; bss-l with every_epochs = 1, beta = 1, order.draw = "order"
    and order.weight = "linear"; and for both alpha = 0.1111111111111111 on CREMA-D.

    Args:
        score_source: Scores to rank or draw by: "manifest", those of the manifest's probes, which never change;
            "model", those of the model in training; "auto", "manifest" for bss-h and "model" for bss-l.
        every_epochs: E, epochs between two evaluations of the model by bss-l. 8 is ours, so that scoring takes a
            twentieth of the time; the authors' code has 1, with beta = 1.
        beta: Weight of new scores in the running score, s_hat <- (1 - beta) s_hat + beta s; the paper's value.
        alpha: Weight of the fused term of the loss; the unimodal terms have weight 1.
    """

    section: ClassVar[str] = "sampling.bss"
    score_source: str = "auto"
    every_epochs: int = 8
    beta: float = 0.6
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self.section, self, score_source=SCORE_SOURCES)
        check_ranges(self.section, self, every_epochs="[1, inf)", beta="(0, 1]", alpha="[0, inf)")


class BssH(Paced):
    """BSS-H (arXiv 2501.01470): a pass over the most balanced share of the samples, which grows.

    The share of epoch t is lambda(t) by `order.pacing`, `order.start` and `order.grow_epochs`, by default the paper's:
    0.186 at t = 1, and all from t = 40 on. Samples are ranked once: by the manifest's probes (ours, the default), or,
    as in the authors' code, by the network before its first step. Theirs is in train mode then, and its scores depend
    on the other samples of a batch; here it is in eval mode.
    """

    config_type = BssConfig
    paper = "Guan et al., arXiv 2501.01470"
    state_fields = ("rank",)
    config: BssConfig
    order_name: ClassVar[str] = "curriculum"

    @classmethod
    def needs_classes(cls, config: BssConfig) -> str:
        """Return the reason of scores by the model."""
        return _MODEL_REASON if config.score_source == "model" else ""

    @classmethod
    def unused(cls, config: BssConfig) -> dict[str, str]:
        """Return the constants of later evaluations, and of all where the manifest's scores rank."""
        reason = "the samples are ranked once"
        unused = dict.fromkeys(("every_epochs", "beta"), f"{reason}; bss-l evaluates the model again")
        by_manifest = f"{reason}, by the scores of the manifest (sampling.bss.score_source = {config.score_source})"
        return unused if config.score_source == "model" else {**unused, "alpha": by_manifest}

    def initialize(self) -> None:
        """Rank by the manifest, until the model is evaluated."""
        self.rank = self.pool.rank

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Rank by the untrained model, before the first epoch."""
        if epoch == 1 and self.config.score_source == "model":
            scores = read_balance(model_reader, alpha=self.config.alpha)
            self.rank = np.searchsorted(np.sort(-scores), -scores)

    def rows(self, epoch: int) -> RowIndex:
        """Shuffle the share of floor(n lambda(epoch)) rows."""
        return self.in_order(self.order_name, epoch, rank=self.rank)


class AntiCurriculum(BssH):
    """The control of BSS-H: the least balanced share comes first. It should reduce the accuracy."""

    order_name = "anti-curriculum"


class BssL(Ordered):
    """BSS-L (arXiv 2501.01470): epochs drawn by a running balance score of the model in training.

    Before epochs 1, 1 + E, 1 + 2 E, ... the model is evaluated in eval mode: s = minmax(similarity) - minmax(loss), and
    s_hat <- (1 - beta) s_hat + beta s, s_hat = s the first time; high = balanced. `order.draw` and `order.weight`
    select how epochs are drawn: softmax weights with replacement are the paper's, linear ones in an order without it
    its code's, and the default. Scores of the manifest's probes instead of the model's, which never change, are ours.
    The code ranks in train mode; here scores are taken in eval mode and without augmentation.
    """

    config_type = BssConfig
    paper = "Guan et al., arXiv 2501.01470"
    order_fields = ("draw", "weight")
    state_fields = ("balance",)
    config: BssConfig

    @classmethod
    def needs_classes(cls, config: BssConfig) -> str:
        """Return the reason of scores by the model."""
        return _MODEL_REASON if config.score_source != "manifest" else ""

    @classmethod
    def reads_scores(cls, config: BssConfig) -> bool:
        """Return whether the scores are the manifest's."""
        return config.score_source == "manifest"

    @classmethod
    def unused(cls, config: BssConfig) -> dict[str, str]:
        """Return the constants of evaluations where the manifest's scores are drawn by."""
        reason = "the scores are those of the manifest (sampling.bss.score_source = manifest), which never change"
        return dict.fromkeys(("every_epochs", "beta", "alpha"), reason) if config.score_source == "manifest" else {}

    def initialize(self) -> None:
        """Set the manifest's scores, or none before the first evaluation."""
        self.reads_model = self.config.score_source != "manifest"
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
        scores = read_balance(model_reader, alpha=bss.alpha)
        self.balance = scores if self.balance is None else (1 - bss.beta) * self.balance + bss.beta * scores

    def rows(self, epoch: int) -> RowIndex:
        """Draw an epoch by s_hat."""
        assert self.balance is not None, "begin_epoch comes first"
        return self.in_order("weighted", epoch, balance=self.balance)


def read_balance(model_reader: ModelReader, *, alpha: float) -> NDArray[np.float64]:
    """Compute the balance scores (n,) in [-1, 1] of the training samples by the current model; high = balanced."""
    similarity, loss = model_reader.read(partial(_criteria, alpha=alpha)).cpu().numpy()
    return balance(similarity, loss, fits=np.ones(len(loss), dtype=np.bool_)).astype(np.float64)


def _criteria(outputs: Outputs, label: Tensor, *, alpha: float) -> Tensor:
    """Compute the terms of the score (2, b): similarity in [0, 1], and loss alpha CE(fused) + sum of unimodal CE.

    The similarity is the mean cosine over pairs of the unimodal softmax outputs; 0 where there is only one modality.
    """
    fused, unimodal = separate_losses(outputs, label)
    probabilities = outputs.unimodal.float().softmax(dim=2)
    cosines = [
        functional.cosine_similarity(probabilities[i], probabilities[j], dim=1)
        for i, j in combinations(range(len(probabilities)), 2)
    ]
    similarity = torch.stack(cosines).mean(dim=0) if cosines else torch.zeros_like(fused)
    return torch.stack([similarity, alpha * fused + unimodal.sum(dim=0)])
