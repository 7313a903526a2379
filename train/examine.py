"""The examination: how good is a network on samples that it has not learned from?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.errors import ManifestError, RunError, choices
from ..audit.threads import NETWORK_THREADS, fixed_threads
from .checkpoint import load_model, read_blueprint
from .config import TrainConfig
from .contribution import measure_contribution, right_of_sets, sets_to_ask
from .course import Course, Reader
from .evaluate import evaluate_branches, subsets
from .examples import Examples
from .network import FusionNet, Outputs
from .stores import Rows, Store
from .world import ALONE


def examine(reader: Reader, rows: Rows, examples: Examples, *, between: str, seed: int) -> dict[str, Any]:
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
def examine_file(
    path: Path, examples: Examples, *, split: str, between: str, config: TrainConfig, seed: int, device: str
) -> dict[str, Any]:
    """Measure the network in a file on one split of the examples, {n, test, ...}: see `examine`.

    Raises RunError for a file that is no model, ManifestError where the samples are of other modalities or classes, or
    none is of the split.
    """
    plan = read_blueprint(path)
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
    course = Course.of(examples, store, train=rows, config=config, seed=seed, device=device, world=ALONE)
    found = examine(Reader(course, net.to(device)), rows, examples, between=between, seed=seed)
    return {"n": len(rows), **found}


def probabilities(reader: Reader, rows: Rows, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Give class probabilities (n, k) of the fused answer and of each modality alone."""

    def what(outputs: Outputs, label: Tensor) -> Tensor:
        return torch.cat([outputs.fused[None], outputs.unimodal]).float().softmax(dim=2).movedim(1, 2)

    found = reader.read_samples(what, rows).cpu().numpy()
    return {name: np.ascontiguousarray(each.T) for name, each in zip(("fused", *names), found, strict=True)}
