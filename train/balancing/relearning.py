"""Diagnosing & Re-learning: encoders that overfit are moved back towards their initial weights.

Wei et al., "Diagnosing and Re-learning for Balanced Multimodal Learning" (ECCV 2024, arXiv 2407.09705). The loss is the
fused one. At some epochs every modality is diagnosed in eval mode: its features are scaled to [-1, 1], clustered by
k-means into as many clusters as classes, and P is the purity of the clusters, on training and on validation samples:

    g^j = |P_train^j - P_validation^j|        alpha^j = tanh(strength g^j)
    theta^j <- (1 - alpha^j) theta^j + alpha^j theta_initial^j        all parameters of encoder j

Strength 3, every 20 epochs and 3 times are those of the authors' script for CREMA-D. As in their code the epochs are
counted from 0 and diagnosed at their end: re-initialised are the encoders before epochs 22, 42 and 62.

Ours: features of up to `max_rows` training samples, without augmentation (theirs: all, with it); ten starts of k-means;
samples without the modality are left out; and no more clusters than distinct samples. The purity of few samples is high
by chance, so that a small validation split has a gap in itself. The optimiser's state is kept, as in their code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from ...audit.parsing import check_ranges
from ..batches import ModelReader, sample_rows, start_warning
from ..config import TrainConfig
from ..network import Outputs
from .balancer import Balancer

_NUM_STARTS = 10  # of k-means: ours, the default of scikit-learn before 1.4


def purity(cluster: NDArray[np.integer[Any]], label: NDArray[np.integer[Any]]) -> float:
    """Compute the purity in (0, 1] of clusters (n,): the share of samples of their cluster's most frequent class."""
    counts = np.zeros((int(cluster.max()) + 1, int(label.max()) + 1), dtype=np.int64)
    np.add.at(counts, (cluster, label), 1)
    return float(counts.max(axis=1).sum() / len(label))


def cluster_purity(features: NDArray[np.float32], label: NDArray[np.int64], *, num_classes: int) -> float:
    """Compute the purity of the k-means clusters of features (n, d); 1 where there are none."""
    from sklearn.cluster import KMeans  # not in every training: scikit-learn takes half a second
    from sklearn.preprocessing import MinMaxScaler

    scaled = MinMaxScaler((-1, 1)).fit_transform(features) if len(features) else features
    num_clusters = min(num_classes, len(np.unique(scaled, axis=0)))
    if num_clusters == 0:
        return 1.0
    with threadpool_limits(limits=1):  # several threads of k-means add their sums in no fixed order
        return purity(KMeans(num_clusters, n_init=_NUM_STARTS, random_state=0).fit_predict(scaled), label)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelearningConfig:
    """Diagnosing & Re-learning (ECCV 2024).

    Args:
        strength: Factor on the purity gap, lambda in the paper; 3 in its script for CREMA-D.
        every_epochs: Epochs between two diagnoses, as in its code.
        times: Number of diagnoses, as in its code.
        max_rows: Most training samples that the purity is computed on (ours).
    """

    section: ClassVar[str] = "balancing.relearning"
    strength: float = 3.0
    every_epochs: int = 20
    times: int = 3
    max_rows: int = 10_000

    def __post_init__(self) -> None:
        check_ranges(self.section, self, strength="[0, 1000]", every_epochs="[1, 1e9]", times="[0, 1e9]")
        check_ranges(self.section, self, max_rows="[10, 1e12]")


class Relearning(Balancer):
    """The fused loss; encoders move towards their initial weights by tanh of the purity gap. State: these weights."""

    class_reason = "the purity of its clusters is one of classes"
    config_type = RelearningConfig
    paper = "Wei et al., ECCV 2024"
    state_fields = ("_initial", "_gap", "_share", "_num_diagnoses")
    config: RelearningConfig
    needs_unimodal_logits = False
    evaluates = ("train", "validation")

    @classmethod
    def late_start(cls, config: RelearningConfig, settings: TrainConfig) -> str | None:
        """Return a warning where the first diagnosis is after the last epoch."""
        first_epoch = config.every_epochs + 2
        return start_warning("balancing.relearning.every_epochs", first_epoch, settings, fallback="joint")

    def initialize(self) -> None:
        """Record the initial weights; those of --init, where it is given."""
        self._initial = [[p.detach().clone() for p in encoder.parameters()] for encoder in self.net.encoders]
        self._gap, self._share = [0.0] * self.net.num_modalities, [0.0] * self.net.num_modalities
        self._num_diagnoses = 0

    def begin_epoch(self, epoch: int, model_reader: ModelReader) -> None:
        """Diagnose and re-initialise the encoders, at some epochs."""
        super().begin_epoch(epoch, model_reader)
        config, since = self.config, epoch - 2
        if since <= 0 or since % config.every_epochs or self._num_diagnoses == config.times:
            return
        self._num_diagnoses += 1
        self._gap = self._diagnose(model_reader)
        self._share = [math.tanh(config.strength * gap) for gap in self._gap]
        self._reinitialize()
        if self._num_diagnoses == config.times:
            self._initial = []  # no longer part of a checkpoint

    def _diagnose(self, model_reader: ModelReader) -> list[float]:
        """Compute the purity gaps g (m,) in [0, 1]; high = the classes of training samples are separated better."""
        rows = sample_rows(model_reader, self.config.max_rows)
        train = self._purities(model_reader.read(_features_and_label, rows=rows))
        validation = self._purities(model_reader.read_validation(_features_and_label))
        return [abs(first - second) for first, second in zip(train, validation, strict=True)]

    def _purities(self, readings: Tensor) -> list[float]:
        """Compute the purity of each modality from features and labels (sum of d_j + 1, n)."""
        values = readings.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu().numpy()
        label = values[-1].astype(np.int64)
        sizes = [int(encoder.num_features) for encoder in self.net.encoders]  # type: ignore[arg-type]
        purities = []
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            features = values[end - size : end].T
            has_modality = features.any(axis=1)
            purities.append(
                cluster_purity(features[has_modality], label[has_modality], num_classes=len(self.net.config.classes))
            )
        return purities

    @torch.no_grad()
    def _reinitialize(self) -> None:
        """Move each encoder by its share of the way to its initial weights; a frozen one does not change."""
        for encoder, initial, share in zip(self.net.encoders, self._initial, self._share, strict=True):
            for parameter, value in zip(encoder.parameters(), initial, strict=True):
                if parameter.requires_grad:
                    parameter.lerp_(value, share)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the last purity gaps and the shares of the way back."""
        return {**self.by_modality("purity_gap", self._gap), **self.by_modality("reinitialized", self._share)}


def _features_and_label(outputs: Outputs, label: Tensor) -> Tensor:
    """Stack the features of all modalities and the label (sum of d_j + 1, b)."""
    return torch.cat([*(f.float() for f in outputs.features), label[:, None].float()], dim=1).T
