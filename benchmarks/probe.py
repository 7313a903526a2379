"""Time and loss of the cross-fitted probes against scikit-learn's. --quick: a tenth of the rows.

50,000 rows of 512 features, 30 classes, 5 folds, one repeat: out-of-fold probabilities by `fit_probe`, including its
choice of l2, and by `cross_val_predict(LogisticRegression())` with its defaults (C = 1, max_iter = 100). Two datasets:

    embeddings  like those of a network: variances fall as 1 / rank over rotated axes, features have their own scales
                (log-normal, 0.5) and offsets, the norms of rows differ (log-normal, 0.3), classes differ mostly along
                the 64 widest axes; float32 and float64
    isotropic   unit Gaussians around class means, of one scale: the easiest case for any solver

Threads sleep while they wait, as under the command line: threads that spin take 10 times as long with other jobs
running. Prints a Markdown table; the exit code is 1 if, on the embeddings, the ratio is below 40 or mmaudit's loss or
accuracy is worse.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch.utils.flop_counter import FlopCounterMode

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.probe_set import fit_probe

NUM_ROWS, NUM_FEATURES, NUM_CLASSES, NUM_FOLDS = 50_000, 512, 30, 5
MIN_RATIO = 40.0
NUM_TIMINGS = 3
SEED = 0

Label = NDArray[np.int32]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Out-of-fold probabilities (n, k), and the seconds of their computation."""

    probability: Floats
    seconds: float

    def nll(self, label: Label) -> float:
        at_label = self.probability[np.arange(len(label)), label].astype(np.float64)
        return float(-np.log(np.maximum(at_label, 1e-30)).mean())

    def accuracy(self, label: Label) -> float:
        return float((self.probability.argmax(axis=1) == label).mean())


def embeddings(num_rows: int) -> tuple[Floats, Label]:
    rng = np.random.default_rng(SEED)
    label = rng.integers(0, NUM_CLASSES, num_rows).astype(np.int32)
    deviation = np.arange(1, NUM_FEATURES + 1) ** -0.5
    class_sd = np.where(np.arange(NUM_FEATURES) < 64, 0.3, 0.05) * deviation
    x = rng.standard_normal((num_rows, NUM_FEATURES)) * deviation
    x += (rng.standard_normal((NUM_CLASSES, NUM_FEATURES)) * class_sd)[label]
    x *= np.exp(rng.normal(0, 0.3, (num_rows, 1)))
    rotation, _ = np.linalg.qr(rng.standard_normal((NUM_FEATURES, NUM_FEATURES)))
    return x @ rotation * np.exp(rng.normal(0, 0.5, NUM_FEATURES)) + rng.normal(0, 1, NUM_FEATURES), label


def isotropic(num_rows: int) -> tuple[Floats, Label]:
    rng = np.random.default_rng(SEED)
    label = rng.integers(0, NUM_CLASSES, num_rows).astype(np.int32)
    means = 3 * rng.standard_normal((NUM_CLASSES, NUM_FEATURES)) / np.sqrt(NUM_FEATURES)
    return means[label] + rng.standard_normal((num_rows, NUM_FEATURES)), label


def fit_mmaudit(x: Floats, label: Label, fold: NDArray[np.int16], *, repeats: int = 1) -> Result:
    rng = np.random.default_rng(SEED)
    cross_fit = [
        CrossFit(
            fold=((fold + shift * rng.integers(1, NUM_FOLDS, len(label))) % NUM_FOLDS).astype(np.int16),
            inner=rng.integers(0, NUM_FOLDS, len(label)).astype(np.int16),
            fits=np.ones(len(label), dtype=bool),
            key=rng.permutation(len(label)).astype(np.uint64),
        )
        for shift in range(repeats)
    ]
    target = Target(task="classification", label=label, num_outputs=NUM_CLASSES)
    started = time.perf_counter()
    probe = fit_probe(MatrixInputs(matrix=x), target, cross_fit, config=ProbeConfig())
    logits = probe.logits(np.arange(len(label)))
    probability = softmax(logits, axis=2).mean(axis=0)
    return Result(probability=probability, seconds=time.perf_counter() - started)


def fit_sklearn(x: Floats, label: Label, fold: NDArray[np.int16]) -> Result:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probability = cross_val_predict(
            LogisticRegression(), x, label, cv=PredefinedSplit(fold), method="predict_proba"
        )
    return Result(probability=probability, seconds=time.perf_counter() - started)


def peak(dtype: torch.dtype, size: int = 4_096) -> float:
    """Return the highest measured GFLOP/s of a square matrix product."""
    a, b = torch.randn(2, size, size).to(dtype)
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - started) / 1e9)
    return max(rates)


def count_flops(x: Floats, label: Label, fold: NDArray[np.int16]) -> tuple[Result, float]:
    """Run mmaudit's probe once, and count the GFLOP of its products."""
    with FlopCounterMode(display=False) as counter:
        result = fit_mmaudit(x, label, fold)
    return result, counter.get_total_flops() / 1e9


def main(num_rows: int) -> int:
    single, half = peak(torch.float32), peak(torch.bfloat16)
    print(f"peaks: float32 {single:.0f}, bfloat16 {half:.0f} GFLOP/s; {torch.get_num_threads()} threads\n")
    print("| features | scikit-learn s | mmaudit s | ratio | NLL (both) | accuracy (both) | GFLOP | of peak |")
    print("|---|---|---|---|---|---|---|---|")
    missed = False
    for name, draw, dtype, has_bound in (
        ("embeddings float32", embeddings, np.float32, True),
        ("embeddings float64", embeddings, np.float64, True),
        ("isotropic float32", isotropic, np.float32, False),
    ):
        drawn, label = draw(num_rows)
        x: Floats = drawn.astype(dtype)
        fold = (np.random.default_rng(SEED + 1).permutation(num_rows) % NUM_FOLDS).astype(np.int16)
        result, gflop = count_flops(x, label, fold)
        seconds = median(fit_mmaudit(x, label, fold).seconds for _ in range(NUM_TIMINGS))
        reference = fit_sklearn(x, label, fold)
        ratio = reference.seconds / seconds
        worse = result.nll(label) > reference.nll(label) or result.accuracy(label) < reference.accuracy(label)
        missed |= has_bound and (ratio < MIN_RATIO or worse)
        print(
            f"| {name} | {reference.seconds:.1f} | {seconds:.2f} | {ratio:.1f} "
            f"| {reference.nll(label):.4f}, {result.nll(label):.4f} "
            f"| {reference.accuracy(label):.4f}, {result.accuracy(label):.4f} "
            f"| {gflop:.0f} | {gflop / seconds / half:.0%} |",
            flush=True,
        )
        if name == "embeddings float32":
            thrice = median(fit_mmaudit(x, label, fold, repeats=3).seconds for _ in range(NUM_TIMINGS))
            print(
                f"| {name}, 3 repeats | - | {thrice:.2f} | {thrice / seconds:.1f} of one repeat | - | - | - | - |",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(NUM_ROWS // 10 if "--quick" in sys.argv[1:] else NUM_ROWS))
