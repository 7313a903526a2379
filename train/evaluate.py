"""Test metrics of a fine-tuned network: overall, by subset and by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.errors import ManifestError, RunError, choices
from ..audit.intervals import wilson
from ..audit.probes.prediction import expected_calibration_error
from ..audit.threads import NETWORK_THREADS, fixed_threads
from .checkpoint import load_model, read_model_config
from .config import TrainConfig
from .contribution import measure_contribution, right_of_sets, sets_to_ask
from .distributed import SINGLE_PROCESS
from .examples import Examples, Rows, Store
from .network import FusionNet, Outputs
from .training_data import NetworkReader, TrainingData

Scores = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]
DOMINATED = (0.2, 0.4)  # thresholds of Xia et al., arXiv 2302.10912, besides 0


def subsets(discrepancy: NDArray[np.floating[Any]], *, first: str, second: str) -> dict[str, NDArray[np.bool_]]:
    """Give the rows of each subset of the study in arXiv 2302.10912, from signed discrepancies (n,).

    `first` is the side where D > 0. `balanced` is |D| <= 0.2, mmaudit's own.
    """
    found = {"all": np.ones(len(discrepancy), dtype=bool)}
    for name, signed in ((first, discrepancy), (second, -discrepancy)):
        found[f"{name}-preferred"] = signed > 0
        found |= {f"{name}-dominated-{threshold:g}": signed > threshold for threshold in DOMINATED}
    found["balanced-within-0.2"] = np.abs(discrepancy) <= DOMINATED[0]
    return found


def evaluate_branches(
    probabilities: Mapping[str, Scores],
    label: Labels,
    *,
    members: Mapping[str, NDArray[np.bool_]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Measure each branch's class probabilities (n, k) against label (n,): {test: by subset, test_by_class: by class}.

    Both are {name: {n, branches: {branch: measurements}}}, without `branches` where n = 0.
    """
    return {
        "test": evaluate(probabilities, label, members),
        "test_by_class": evaluate_classes(probabilities, label, class_names),
    }


def evaluate(
    probabilities: Mapping[str, Scores], label: Labels, members: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Any]:
    """Measure each branch's class probabilities (n, k) against label (n,) on each subset: {subset: {n, branches}}.

    A subset without samples has n = 0 and no measurements.
    """
    report: dict[str, Any] = {}
    for name, rows in members.items():
        report[name] = {"n": int(rows.sum())}
        if rows.any():
            report[name]["branches"] = {
                branch: measure(scores[rows], label[rows]) for branch, scores in probabilities.items()
            }
    return report


def evaluate_classes(probabilities: Mapping[str, Scores], label: Labels, class_names: Sequence[str]) -> dict[str, Any]:
    """Measure each branch on each of the k classes: {class: {n, branches}}, n counts the class's samples.

    A class without samples has n = 0 and no measurements.
    """
    by_branch = {branch: measure_classes(scores, label) for branch, scores in probabilities.items()}
    number = np.bincount(label, minlength=len(class_names)).tolist()
    report: dict[str, Any] = {}
    for index, name in enumerate(class_names):
        report[name] = {"n": number[index]}
        if number[index]:
            report[name]["branches"] = {branch: found[index] for branch, found in by_branch.items()}
    return report


def measure(probability: Scores, label: Labels) -> dict[str, float]:
    """ACC with its 95% Wilson interval, MAP (mean over classes of average precision), macro-F1 and ECE, in [0, 1].

    MAP and macro-F1 are over the classes that occur in `label`; a class that is never named has F1 = 0. ECE: 0 is best,
    of the class named first, in 15 bins; see `expected_calibration_error`.
    """
    right = probability.argmax(axis=1) == label
    classes = measure_classes(probability, label).values()
    low, high = wilson(int(right.sum()), len(label))
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "map": float(np.mean([each["average_precision"] for each in classes])),
        "macro_f1": float(np.mean([each["f1"] for each in classes])),
        "ece": expected_calibration_error(probability, label),
    }


def measure_classes(probability: Scores, label: Labels) -> dict[int, dict[str, float]]:
    """Measure each class that occurs in `label`: recall with its 95% Wilson interval, F1, average precision.

    Recall is the accuracy on the class's samples; F1 and average precision count what is taken for it elsewhere too.
    """
    num_classes = probability.shape[1]
    named = probability.argmax(axis=1)
    number, said, hit = (
        np.bincount(each, minlength=num_classes).tolist() for each in (label, named, label[named == label])
    )
    found = {}
    for index in np.unique(label).tolist():
        low, high = wilson(hit[index], number[index])
        found[index] = {
            "recall": hit[index] / number[index],
            "recall_low": low,
            "recall_high": high,
            "f1": 2 * hit[index] / (number[index] + said[index]),
            "average_precision": average_precision(probability[:, index], label == index),
        }
    return found


def average_precision(scores: Scores, positive: NDArray[np.bool_]) -> float:
    """Compute the average precision in [0, 1] of scores (n,), at least one of which is positive.

    It is that of scikit-learn, as the mean over positives of the precision at each one's score, in a tenth of the time:
    with 5,000 classes, three branches and ten subsets it is computed 165,000 times.
    """
    own = np.sort(scores[positive])
    num_above = len(scores) - np.searchsorted(np.sort(scores), own, side="left")
    num_positive_above = len(own) - np.searchsorted(own, own, side="left")
    return float((num_positive_above / num_above).mean())


def evaluate_network(
    reader: NetworkReader, rows: Rows, examples: Examples, *, between: str, seed: int
) -> dict[str, Any]:
    """Measure the reader's network on some rows: {test, test_by_class, contribution}.

    Fused and each modality alone, overall, by subset and by class; see `evaluate_branches`; what each modality
    contributes and where they confuse each other, see `measure_contribution`.
    """
    label = examples.label[rows]
    first, _, second = between.partition(":")
    members = subsets(examples.discrepancy[rows], first=first, second=second or "rest")
    members["in-manifest"] = examples.chosen[rows]
    answers = probabilities(reader, rows, examples.modalities)
    sets = sets_to_ask(len(examples.modalities), seed=seed)
    right = reader.read_samples(right_of_sets(reader.net, sets), rows).cpu().numpy() > 0.5
    own = np.stack([answers[name].argmax(axis=1) == label for name in examples.modalities], axis=1)
    measured = measure_contribution(dict(zip(sets, right, strict=True)), own, examples.modalities, seed=seed)
    by_branch = evaluate_branches(answers, label, members=members, class_names=examples.class_names)
    return {**by_branch, "contribution": measured}


@fixed_threads(NETWORK_THREADS)
def evaluate_file(
    path: Path, examples: Examples, *, split: str, between: str, config: TrainConfig, seed: int, device: str
) -> dict[str, Any]:
    """Measure the network in a file on one split of the examples, {n, test, ...}: see `examine`.

    Raises RunError for a file that is no model, ManifestError where the samples are of other modalities or classes, or
    none is of the split.
    """
    plan = read_model_config(path)
    for what, then, now in (
        ("modalities", plan.modalities, examples.modalities),
        ("inputs", plan.shapes, examples.shapes),
        ("classes", plan.classes, examples.class_names),
    ):
        if then != now:
            raise ManifestError(f"{path} was trained on other {what}: {then} there and {now} here")
    rows = examples.rows(split)
    if len(rows) == 0:
        raise ManifestError(f"no samples of split {split}; {choices(split, sorted(set(examples.split)))}")
    net = FusionNet(plan)
    try:
        net.load_state_dict(load_model(path))
    except RuntimeError as error:  # torch's, for tensors that are missing or of another shape
        raise RunError(f"{path} is damaged, its weights do not fit its own description: train it anew") from error
    store = Store(examples.inputs, device=device, most_bytes=config.finetune.resident_mib << 20)
    training_data = TrainingData.of(
        examples, store, train=rows, config=config, seed=seed, device=device, distributed=SINGLE_PROCESS
    )
    found = evaluate_network(NetworkReader(training_data, net.to(device)), rows, examples, between=between, seed=seed)
    return {"n": len(rows), **found}


def probabilities(reader: NetworkReader, rows: Rows, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Give class probabilities (n, k) of the fused answer and of each modality alone."""

    def what(outputs: Outputs, label: Tensor) -> Tensor:
        return torch.cat([outputs.fused[None], outputs.unimodal]).float().softmax(dim=2).movedim(1, 2)

    found = reader.read_samples(what, rows).cpu().numpy()
    return {name: np.ascontiguousarray(each.T) for name, each in zip(("fused", *names), found, strict=True)}
