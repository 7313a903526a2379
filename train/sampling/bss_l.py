"""BSS-L: balance scores of the model that is being trained."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...audit.errors import ManifestError
from ...audit.metrics import balance
from ..batches import ModelReader, Rows
from ..network import Outputs, cross_entropies
from .ordered import Ordered


class BssL(Ordered):
    """BSS-L (arXiv 2501.01470): epochs drawn with chances by a running balance score of the model in training.

    Before epochs 1, 1 + E, 1 + 2 E, ... the model is read in eval mode: s = minmax(similarity) - minmax(loss), and
    s_hat <- (1 - beta) s_hat + beta s, s_hat = s the first time; high = balanced. `order.draw` and `order.weight` say
    how epochs are drawn: softmax weights with replacement are the paper's, linear ones in an order without it its
    code's, and the default. Scores of the manifest's probes in place of the model's, which never change, are ours.
    """

    def begin(self) -> None:
        """Take the manifest's scores, or none as yet."""
        self.reads = self.config.bss.score_source == "model"
        self.balance = None if self.reads else self.pool.balance
        lacking, num = int(np.isnan(self.pool.balance).sum()), len(self.pool)
        if lacking and not self.reads:
            raise ManifestError(
                f"--sampling bss-l draws by balance scores, and {lacking} of {num} training samples have none in "
                "the manifest: rescore with mmaudit score and split again, or take scores of the model in training "
                "with --set sampling.bss.score_source=model"
            )

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Read the model, if it is time."""
        bss = self.config.bss
        if not self.reads or (epoch - 1) % bss.every_epochs:
            return
        similarity, loss = (
            model_reader.read(lambda outputs, label: _criteria(outputs, label, alpha=bss.alpha)).cpu().numpy()
        )
        fresh = balance(similarity, loss, fits=np.ones(len(loss), dtype=np.bool_)).astype(np.float64)
        self.balance = fresh if self.balance is None else (1 - bss.beta) * self.balance + bss.beta * fresh

    def rows(self, epoch: int) -> Rows:
        """Draw an epoch by s_hat."""
        assert self.balance is not None, "begin_epoch comes first"
        return self.in_order("weighted", epoch, balance=self.balance)

    def state_dict(self) -> dict[str, Any]:
        """Give s_hat, where it is the model's."""
        held = self.reads and self.balance is not None
        return {"balance": torch.from_numpy(self.balance) if held else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        if self.reads:
            self.balance = None if state["balance"] is None else state["balance"].cpu().numpy()


def _criteria(outputs: Outputs, label: Tensor, *, alpha: float) -> Tensor:
    """Give what the score is made of, (2, b): similarity in [0, 1], and loss alpha CE(fused) + sum of the own CE.

    The similarity is the mean cosine over pairs of the unimodal softmax outputs; 0 where there is one modality alone.
    """
    fused, own = cross_entropies(outputs, label)
    p = outputs.unimodal.float().softmax(dim=2)
    cosines = [functional.cosine_similarity(p[i], p[j], dim=1) for i, j in combinations(range(len(p)), 2)]
    similarity = torch.stack(cosines).mean(dim=0) if cosines else torch.zeros_like(fused)
    return torch.stack([similarity, alpha * fused + own.sum(dim=0)])
