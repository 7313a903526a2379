"""The command evaluate: test metrics of a finished fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ManifestError, RunError
from ..audit.hashing import IdIndex
from ..audit.locks import WAIT_SECONDS, Lock, write_lock
from ..audit.parsing import build_config
from ..audit.storage import write_json
from ..audit.workers import default_workers, release_memory
from ..rebalance.manifest import ManifestFile
from ..train.evaluate import check_model_name, evaluate_file
from .config import RunConfig, without_none
from .progress import progress_bars
from .provenance import SourceOptions
from .remote_run import with_run
from .run import Run, read_metrics
from .scoring import pairs, pick_device
from .training import find_finetune, main_values, model_code
from .training_source import ManifestSource, UnscoredSource, reopened_config

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Result of `evaluate`.

    Attributes:
        name: Name of the fine-tuning.
        file: The file with the results.
        accuracy: Accuracy of the fused prediction, in [0, 1]; NaN where the task has no classes.
        value: Main metric of the task: that accuracy, the MAP of label sets, or the mean absolute error of numbers.
        metrics: Content of the file.
    """

    name: str
    file: Path
    accuracy: float
    value: float
    metrics: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file, and its path."""
        return {**self.metrics, "file": str(self.file)}


@with_run("stages", writes=True)
def evaluate(
    name: str,
    *,
    run: str | Path = "mmaudit-run",
    manifest: str | Path | None = None,
    split: str = "test",
    model: str | None = None,
    data: str | Path | None = None,
    encoder: Mapping[str, str] | Sequence[str] | None = None,
    allow_outside: bool = False,
    device: str = "auto",
    num_workers: int | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Test a finished fine-tuning: metrics by subset and class, and the contribution of each modality.

    Measured are accuracy, MAP, macro-F1 and ECE of the fused prediction and of each modality alone (of label sets MAP,
    F1 and label accuracy; of numbers MAE, correlation and accuracy of the sign), overall, by subset and by class; the
    contribution of each modality; and the samples that are predicted correctly by one modality alone but not by all
    together. They are written to evaluation.json in its folder; of other splits to evaluation-SPLIT.json, of other
    manifests to evaluation-SPLIT-MANIFEST.json.

    Args:
        name: Name of a finished fine-tuning in the run, or its folder.
        run: Run folder, a path or a URL.
        manifest: Manifest to test on; by default its training manifest.
        split: test, validation or train.
        model: Confirm the network of yours (code) that was trained, package.module:factory.
        data: The data; also if your own data moved.
        encoder: Confirm the encoder (code or model) of a modality.
        allow_outside: Allow paths outside the data folder.
        device: auto, cpu or cuda.
        num_workers: Processes that decode media; 0: none; by default one per CPU.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The results and their file. With `manifest`, `metrics["num_trained_on"]` counts the samples that were used in
        training or validation; None if unknown.

    Raises:
        RunError: The fine-tuning was not found, or its manifest has changed.
        ManifestError: The manifest or the data were not found, or have changed.

    Example:
        >>> mmaudit.evaluate("balanced-concat-bss-h").metrics["contribution"]
    """
    run_dir = Run.open(run)
    folder = find_finetune(run_dir, name)
    metrics = read_metrics(folder)
    config = build_config(
        RunConfig, without_none({k: v for k, v in metrics["config"].items() if k != "manifest"}), where=""
    )
    check_model_name(config.finetune.model, model, of=folder.name)
    _warn_changed(metrics, model_code(config), name=folder.name)
    options = SourceOptions(data=data, encoder=pairs(encoder) or (), allow_outside=allow_outside)
    workers, device = default_workers() if num_workers is None else num_workers, pick_device(device)
    source: ManifestSource | UnscoredSource
    if manifest is None and metrics["manifest"] is None:
        own_data, config = reopened_config(config, metrics["made_from"], options, name=folder.name)
        source = UnscoredSource(data=own_data, run_dir=run_dir, device=device)
    else:
        own_name = metrics["manifest"]
        path = run_dir.own_manifest(own_name) if manifest is None else run_dir.find_manifest(str(manifest))
        source = ManifestSource.open(path, run_dir, options)
        if manifest is None and source.manifest.digest() != metrics["manifest_digest"]:
            raise RunError(f"{path} has changed since {folder.name} was trained on it; pass a manifest with --manifest")
    own = manifest is None and split == "test"
    names = ["evaluation", *([] if own else [split]), *([] if manifest is None or not source.name else [source.name])]
    file = folder / f"{'-'.join(names)}.json"
    with progress_bars(progress) as report_progress, _evaluation_lock(run_dir, file):
        # Whether numbers have two signs is a matter of all samples.
        only_test = split == "test" and source.task(config) != "regression"
        loaded = source.load(config, num_workers=workers, progress=report_progress, only_test=only_test)
        release_memory()
        examples = loaded.examples
        if manifest is None and loaded.digest != metrics["manifest_digest"]:
            raise RunError(
                f"the data have changed since {folder.name} was trained on them; pass a manifest with --manifest"
            )
        if config.finetune.only is not None:
            examples = examples.only(config.finetune.only)
        measured = evaluate_file(
            folder / "model.safetensors",
            examples,
            split=split,
            between=loaded.between,
            config=config.training(),
            seed=config.seed,
            device=device,
            model=model,
        )
        result = {"name": folder.name, "manifest": source.name, "split": split, **measured}
        if manifest is not None:
            result["num_trained_on"] = _count_learned(
                run_dir, metrics, examples.sample_id.take(pa.array(examples.rows(split)))
            )
        write_json(result, file)
    return EvaluationResult(name=folder.name, file=file, metrics=result, **main_values(result))


def _evaluation_lock(run_dir: Run, file: Path) -> AbstractContextManager[Lock]:
    """Return a lock on an evaluation file, within the run if the fine-tuning belongs to it."""
    folder = file.parent
    in_run = folder.absolute() == run_dir.finetune(folder.name).absolute()
    root, scope = (run_dir.folder, f"finetune/{folder.name}/{file.name}") if in_run else (folder, file.name)
    return write_lock(root, scope, command="mmaudit evaluate", wait_seconds=WAIT_SECONDS)


def _count_learned(run_dir: Run, metrics: dict[str, Any], ids: pa.LargeStringArray) -> int | None:
    """Count samples used in training or validation; None if it had no manifest, or that has changed."""
    if metrics["manifest"] is None:
        return None
    try:
        own = ManifestFile.open(run_dir.own_manifest(metrics["manifest"]))
    except (RunError, ManifestError):
        return None
    if own.digest() != metrics["manifest_digest"]:
        return None
    index, number = IdIndex.of(ids), 0
    for batch in own.batches(["sample_id", "split"]):
        learned = batch["sample_id"].filter(pc.not_equal(batch["split"], "test"))
        number += len(index.find(learned.combine_chunks())[0])
    return number


def _warn_changed(metrics: dict[str, Any], code: dict[str, str | None], *, name: str) -> None:
    """Warn of a network of the user's whose source file has changed since it was trained."""
    if code and code["digest"] != metrics.get("code", {}).get("digest"):
        log.warning(
            "the source file of %s (%s) has changed since %s was trained; its weights are tested in the network of now",
            code["model"],
            code["file"],
            name,
        )
