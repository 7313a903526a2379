"""Test metrics of a fine-tuned network: overall, by subset and by class or label, and what each modality contributes.

Letters: n samples, m modalities. A set of modalities is a frozenset of their indices; a modality outside the set is
absent: its features are 0 (`FusionNet.fused_logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ManifestError, RunError, choices, printable
from ..audit.metrics import (
    DOMINATED_THRESHOLDS,
    Groups,
    balanced_name,
    calibration_error,
    dominated_name,
    is_balanced,
    is_dominated,
    mean_interval,
    shapley,
    share_interval,
    wilson_interval,
)
from ..audit.row_arrays import slices
from ..audit.workers import fixed_threads, release_memory
from ..rebalance.curriculum import RowIndex
from .checkpoint import load_model, read_model_config
from .config import TrainConfig
from .custom_network import build_custom
from .examples import Examples
from .methods import load_fusion
from .network import NO_MODALITY, FusionNet, ModalitySet, ModelConfig, correct_by_set, shapley_sets
from .optimizer import SINGLE_PROCESS
from .predictions import Predictions, class_predictions, predict
from .store import open_store
from .task_metrics import (
    TASK_METRICS,
    average_precision,
    by_label,
    compute_multilabel_metrics,
    compute_regression_metrics,
    is_signed,
)
from .training_data import NetworkReader, TrainingData

CorrectMask = NDArray[np.bool_]
_EVALUATION_MIB = 16  # ours: of inputs, on the device or read ahead; they are read in the order of the files


def measure_contribution(
    correct: Mapping[ModalitySet, CorrectMask],
    unimodal_correct: CorrectMask,
    modalities: Sequence[str],
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute how the modalities contribute to the fused prediction: {n, contribution, confusion}, or {n: 0}.

    correct: for each set of `shapley_sets`, whether the fused prediction is correct (n,). unimodal_correct (n, m):
    whether each modality's own prediction is. groups (n,): samples that are resampled together. See `contribution`,
    `confusion`.
    """
    fused_correct = correct[frozenset(range(len(modalities)))]
    if len(fused_correct) == 0:
        return {"n": 0}
    return {
        "n": len(fused_correct),
        "contribution": contribution(correct, modalities, groups=groups, seed=seed),
        "confusion": confusion(fused_correct, unimodal_correct, modalities, groups=groups),
    }


def contribution(
    correct: Mapping[ModalitySet, NDArray[Any]],
    modalities: Sequence[str],
    *,
    groups: Groups = None,
    seed: int = 0,
    task: str = "classification",
) -> dict[str, Any]:
    """Split the accuracy v(all) - v(none) by Shapley values: {nobody, all, modalities, sets}.

    v(S) in [0, 1] is the accuracy of the fused prediction with only the set S present; v(none), key `nobody`, is that
    of the prediction with every modality absent, one class for all samples: its chance level. modalities: {name: {mean,
    low, high}} in [-1, 1], above 0 where a modality helps, with a 95% interval over samples; they sum to v(all) -
    v(none). sets: {modalities, accuracy} of each set. The value is the accuracy; subtracting v(none) is ours. Exact up
    to six modalities.

    task: For label sets the value is the label accuracy, and for numbers minus the absolute error in the units of the
    data: `correct` has these of each sample; `nobody`, `all` and `sets` are the label accuracy or the mean absolute
    error.
    """
    metric = TASK_METRICS[task]
    bound = np.inf if task == "regression" else 1.0
    baseline = correct[NO_MODALITY].astype(np.float32)
    shapley_values = np.empty((len(baseline), len(modalities)), dtype=np.float32)
    for rows in slices(len(baseline)):
        part = {key: values[rows] - baseline[rows] for key, values in correct.items()}
        shapley_values[rows] = shapley(part.__getitem__, len(modalities), seed=seed)
    accuracy = {modality_set: metric.sign * float(values.mean()) for modality_set, values in correct.items()}
    return {
        "nobody": accuracy[NO_MODALITY],
        "all": accuracy[frozenset(range(len(modalities)))],
        "modalities": {
            name: _finite(mean_interval(values.astype(np.float64), groups, low=-bound, high=bound))
            for name, values in zip(modalities, shapley_values.T, strict=True)
        },
        "sets": [
            {
                "modalities": [modalities[index] for index in sorted(modality_set)],
                metric.sample_value: accuracy[modality_set],
            }
            for modality_set in sorted(accuracy, key=lambda modality_set: (len(modality_set), sorted(modality_set)))
        ],
    }


def _finite(interval: dict[str, float]) -> dict[str, float]:
    """Return an interval with its mean in place of infinite bounds: those of a single sample."""
    return {key: value if np.isfinite(value) else interval["mean"] for key, value in interval.items()}


def confusion(
    fused_correct: CorrectMask, unimodal_correct: CorrectMask, modalities: Sequence[str], *, groups: Groups = None
) -> dict[str, Any]:
    """Count the samples that fusion gets wrong although a modality is correct, and those that only fusion gets right.

    fused_correct (n,), unimodal_correct (n, m): whether the fused prediction and that of each modality are correct.
    Returns {confused, confused_by, synergy}. confused_by: per modality, correct alone and wrong when fused; confused:
    with at least one of them; synergy: every modality wrong and fused correct. Each is {n, share, low, high}, a share
    of all samples in [0, 1] with its 95% interval. The definitions are ours.
    """
    return {
        "confused": share_interval(unimodal_correct.any(axis=1) & ~fused_correct, groups),
        "confused_by": {
            name: share_interval(correct_alone & ~fused_correct, groups)
            for name, correct_alone in zip(modalities, unimodal_correct.T, strict=True)
        },
        "synergy": share_interval(~unimodal_correct.any(axis=1) & fused_correct, groups),
    }


Probabilities = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]
Measure = Callable[[Any, Any], Mapping[str, float | None]]


def subsets(discrepancy: NDArray[np.floating[Any]], *, first: str, second: str) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of each subset of the study in arXiv 2302.10912, from signed discrepancies (n,).

    `first` is the side where D > 0. `balanced` is |D| <= 0.2, mmaudit's own.
    """
    masks = {"all": np.ones(len(discrepancy), dtype=bool)}
    for side, signed in ((first, discrepancy), (second, -discrepancy)):
        masks |= {
            dominated_name(side, threshold): is_dominated(signed, threshold) for threshold in (0, *DOMINATED_THRESHOLDS)
        }
    masks[balanced_name()] = is_balanced(discrepancy)
    return masks


def subsets_of_rows(examples: Examples, rows: RowIndex, *, between: str) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of each subset of some rows (b,); only `all` where the samples have no scores."""
    if np.isnan(examples.discrepancy).all():
        return {"all": np.ones(len(rows), dtype=bool)}
    first, _, second = between.partition(":")
    return subsets(examples.discrepancy[rows], first=first, second=second or "rest")


def evaluate(
    predictions: Mapping[str, Any],
    label: NDArray[Any],
    subset_masks: Mapping[str, NDArray[np.bool_]],
    *,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Compute each branch's metrics from probabilities (n, k) and label (n,) on each subset: {subset: {n, branches}}.

    A subset without samples has n = 0 and no metrics. predictions: arrays, or Predictions of classes. measure: function
    of the predictions and targets of a subset; None: compute_metrics.
    """
    if measure is None:
        classes = {name: _as_predictions(scores) for name, scores in predictions.items()}
    report: dict[str, Any] = {}
    for name, rows in subset_masks.items():
        report[name] = {"n": int(rows.sum())}
        if not rows.any():
            continue
        if measure is None:
            own = label if rows.all() else label[rows]
            branches = {key: compute_metrics(entry.select(rows), own) for key, entry in classes.items()}
            report[name]["branches"] = branches
        else:
            measured = {key: dict(measure(scores[rows], label[rows])) for key, scores in predictions.items()}
            report[name]["branches"] = measured
    return report


def _as_predictions(predictions: Probabilities | Predictions) -> Predictions:
    return predictions if isinstance(predictions, Predictions) else Predictions.of(predictions)


def evaluate_classes(
    predictions: Mapping[str, Probabilities | Predictions], label: Labels, class_names: Sequence[str]
) -> dict[str, Any]:
    """Compute each branch's metrics on each of the k classes: {class: {n, branches}}; n counts the class's samples.

    A class without samples has n = 0 and no metrics.
    """
    by_branch = {branch: compute_class_metrics(scores, label) for branch, scores in predictions.items()}
    counts = np.bincount(label, minlength=len(class_names)).tolist()
    report: dict[str, Any] = {}
    for index, name in enumerate(class_names):
        report[name] = {"n": counts[index]}
        if counts[index]:
            report[name]["branches"] = {branch: metrics[index] for branch, metrics in by_branch.items()}
    return report


def compute_metrics(predictions: Probabilities | Predictions, label: Labels) -> dict[str, float]:
    """Compute ACC with its 95% Wilson interval, MAP (mean over classes of average precision), macro-F1 and ECE.

    All lie in [0, 1]. MAP and macro-F1 are over the classes that occur in `label`; a class that is never predicted has
    F1 = 0. ECE: 0 is best, of the predicted class, in 15 bins; see `calibration_error`.
    """
    predictions = _as_predictions(predictions)
    correct = predictions.predicted == label
    classes = compute_class_metrics(predictions, label).values()
    low, high = wilson_interval(int(correct.sum()), len(label))
    return {
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "map": float(np.mean([metrics["average_precision"] for metrics in classes])),
        "macro_f1": float(np.mean([metrics["f1"] for metrics in classes])),
        "ece": calibration_error(predictions.confidence, correct),
    }


def compute_class_metrics(predictions: Probabilities | Predictions, label: Labels) -> dict[int, dict[str, float]]:
    """Compute recall with its 95% Wilson interval, F1 and average precision of each class that occurs in `label`.

    Recall is the accuracy on the class's samples; F1 and average precision also count samples of other classes that are
    predicted as it.
    """
    predictions = _as_predictions(predictions)
    num_classes, predicted = predictions.num_classes, predictions.predicted
    num_true, num_predicted, num_correct = (
        np.bincount(labels, minlength=num_classes).tolist() for labels in (label, predicted, label[predicted == label])
    )
    metrics = {}
    for index in np.unique(label).tolist():
        low, high = wilson_interval(num_correct[index], num_true[index])
        metrics[index] = {
            "recall": num_correct[index] / num_true[index],
            "recall_low": low,
            "recall_high": high,
            "f1": 2 * num_correct[index] / (num_true[index] + num_predicted[index]),
            "average_precision": average_precision(predictions.column(index), label == index),
        }
    return metrics


def evaluate_network(
    reader: NetworkReader,
    rows: RowIndex,
    examples: Examples,
    *,
    between: str,
    seed: int,
    predictions: Mapping[str, Any] | None = None,
    values: Mapping[ModalitySet, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Evaluate the reader's network on some rows: {task, answer, test, test_by_class, contribution}.

    The prediction of all modalities, named "fused" whichever logits it is by (`answer`), and each modality alone,
    overall, by subset (where the samples have scores) and by class, see `evaluate` and `evaluate_classes`; each
    modality's contribution and the confused samples, see `measure_contribution`. Label sets and numbers have the
    metrics of `task_metrics`, and no confused samples; test_by_class has the labels, and nothing of numbers.
    predictions: those of `predict` or `class_predictions`, where they are known; values: those of `values_by_set`, or
    masks of `class_predictions`.
    """
    task, target = examples.task, examples.target[rows]
    subset_masks = subsets_of_rows(examples, rows, between=between)
    if len(subset_masks) > 1:
        subset_masks["in-manifest"] = examples.in_manifest[rows]
    if predictions is None:
        predictions = predict(reader, rows, examples.modalities)
    sets = shapley_sets(len(examples.modalities), seed=seed)
    values = values_by_set(reader, rows, seed=seed) if values is None else values
    about = {"task": task, "answer": reader.net.config.answer}
    if task != "classification":
        measure = compute_multilabel_metrics
        if task == "regression":
            measure = partial(compute_regression_metrics, signed=is_signed(examples.target))
        shares = contribution({key: values[key] for key in sets}, examples.modalities, seed=seed, task=task)
        return {
            **about,
            "test": evaluate(predictions, target, subset_masks, measure=measure),
            "test_by_class": {} if task == "regression" else by_label(predictions, target, examples.class_names),
            "contribution": {"n": len(rows), "contribution": shares},
        }
    predictions = {name: _as_predictions(scores) for name, scores in predictions.items()}
    target = target.astype(np.int32)
    unimodal_correct = np.stack([predictions[name].predicted == target for name in examples.modalities], axis=1)
    correct_by_modalities = {key: values[key].astype(bool, copy=False) for key in sets}
    del values
    metrics = {
        **about,
        "test": evaluate(predictions, target, subset_masks),
        "test_by_class": evaluate_classes(predictions, target, examples.class_names),
    }
    del predictions, subset_masks
    release_memory()  # what sorting the columns took
    shares = measure_contribution(correct_by_modalities, unimodal_correct, examples.modalities, seed=seed)
    return {**metrics, "contribution": shares}


def values_by_set(reader: NetworkReader, rows: RowIndex, *, seed: int) -> dict[ModalitySet, NDArray[np.float32]]:
    """Compute the value of the tested prediction (n,) with only a set of modalities present, see `correct_by_set`.

    The sets are those of `shapley_sets`, and all modalities but one.
    """
    sets = list(dict.fromkeys([*shapley_sets(reader.net.num_modalities, seed=seed), *sets_without(reader.net)]))
    values = reader.read_samples(correct_by_set(reader.net, sets), rows).cpu().numpy()
    return dict(zip(sets, values, strict=True))


def sets_without(net: FusionNet) -> list[ModalitySet]:
    """Return the set of all other modalities for each modality."""
    modalities = range(net.num_modalities)
    return [frozenset(index for index in modalities if index != absent) for absent in modalities]


def evaluate_file(
    path: Path,
    examples: Examples,
    *,
    split: str,
    between: str,
    config: TrainConfig,
    seed: int,
    device: str,
    model: str | None = None,
) -> dict[str, Any]:
    """Evaluate the network in a file on one split of the examples: {n, task, answer, test, ...}.

    model: factory of a network of the user's; without its name no code runs that the file names.

    Raises RunError for a file that is not a model, or one of another `model`; ManifestError where its modalities,
    inputs or classes differ from those of the samples, or the split has no samples.
    """
    model_config = read_model_config(path)
    check_model_name(model_config.model, model, of=str(path))
    check_backbones(path, model_config, examples)
    for field_name, trained_on, current in (
        ("modalities", model_config.modalities, examples.modalities),
        ("inputs", model_config.shapes, examples.shapes),
        ("task", model_config.task, examples.task),
        ("classes", model_config.classes, examples.class_names),
    ):
        if trained_on != current:
            before, now = (_described(value) for value in (trained_on, current))
            raise ManifestError(f"{path} was trained on other {field_name}: {before}; the samples have {now}")
    rows = examples.rows(split)
    if len(rows) == 0:
        raise ManifestError(f"no samples of split {split}; {choices(split, sorted(set(examples.split)))}")
    # The models of the samples, which the user has named, not those that a file names.
    backbones = examples.backbones if model_config.backbones else ()
    net = _load_network(path, replace(model_config, backbones=backbones))
    with fixed_threads(examples.num_threads):
        settings = config.finetune
        bounded = replace(
            settings,
            resident_mib=min(settings.resident_mib, _EVALUATION_MIB),
            read_ahead_mib=min(settings.read_ahead_mib, _EVALUATION_MIB),
        )
        store = open_store(examples.inputs, bounded, device=device)
        rows = rows[store.reading_order(rows)]
        training_data = TrainingData.of(
            examples,
            store,
            train=rows[:0],
            validation=rows[:0],
            test=rows,
            config=config,
            seed=seed,
            device=device,
            distributed=SINGLE_PROCESS,
        )
        reader = NetworkReader(training_data, net.to(device))
        measure = partial(evaluate_network, reader, rows, examples, between=between, seed=seed)
        if examples.task != "classification":
            return {"n": len(rows), **measure()}
        sets = shapley_sets(len(examples.modalities), seed=seed)
        tested = class_predictions(reader, rows, examples.modalities, sets=sets, folder=path.parent)
        with tested as (predictions, correct):
            return {"n": len(rows), **measure(predictions=predictions, values=correct)}


def check_model_name(recorded: str | None, passed: str | None, *, of: str) -> None:
    """Raise RunError where a fine-tuning's network is of another factory than the one that the user names, or none."""
    if recorded == passed:
        return
    if recorded is None:
        raise RunError(f"{of} is a network of mmaudit's own: remove --model {passed}")
    raise RunError(
        f"{of} is a network of your own, and code runs only where you name it: pass --model {printable(recorded)}"
    )


def _load_network(path: Path, config: ModelConfig) -> FusionNet:
    """Build the network of a file with its weights; RunError where they do not fit."""
    own = config.model is None
    net = FusionNet(config, fusion=load_fusion(config.fusion)) if own else build_custom(config)
    try:
        net.load_state_dict(load_model(path))
    except RuntimeError as error:  # torch's, for tensors that are missing or of another shape
        if not own:
            raise RunError(f"the weights of {path} do not fit the network that {config.model} builds now") from error
        raise RunError(f"{path} is damaged, its weights do not fit its own architecture: train it again") from error
    return net


def _described(value: object) -> str:
    """Return names as a list, other values as they are."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_backbones(path: Path, config: ModelConfig, examples: Examples) -> None:
    """Raise ManifestError where a network was trained with other pretrained models than the samples are inputs of."""
    pairs = zip_longest(config.backbones or (), examples.backbones if any(examples.backbones) else ())
    for trained_on, current in pairs:
        same = trained_on == current or (trained_on and current and trained_on.same_but_place(current))
        if not same:
            before, now = (
                "none" if entry is None else f"{entry.model} of version {entry.version[:24]}"
                for entry in (trained_on, current)
            )
            raise ManifestError(f"{path} was trained end to end with other models: {before}; the samples have {now}")
