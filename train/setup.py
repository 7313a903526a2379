"""Set-up of a training, and resuming from its last state."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ManifestError
from ..audit.hashing import digest
from ..rebalance.curriculum import training_rows
from .balancing.config import BALANCERS
from .checkpoint import load_state
from .config import FinetuneConfig, TrainConfig, check_schedule
from .distributed import DistributedContext
from .examples import Examples, Store
from .network import ModelConfig
from .sampling.config import CROSS_MODAL_SAMPLERS
from .training_data import TrainingData

log = logging.getLogger("mmaudit")

_STATE_VERSION = 2  # raised when the contents of a state change: an older state is not resumed


def set_up(
    examples: Examples, config: TrainConfig, *, seed: int, device: str, distributed: DistributedContext
) -> TrainingData:
    """Check the settings against the samples and copy the samples to the device.

    Raises ManifestError where a split is empty, ConfigError where the settings name a modality that does not exist, or
    a method that needs more modalities.
    """
    train = _training_rows(examples, config.finetune)
    validation, test = examples.rows("validation"), examples.rows("test")
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if len(rows) == 0:
            advice = "relax its rule, or --keep-posterior"
            if name == "test":
                advice += "; where the data have none, mmaudit split --resplit 80/8/12 cuts some"
            raise ManifestError(f"the manifest leaves no {name} samples: {advice}")
    unknown = sorted({*config.optim.freeze, *config.optim.modality_lr_factors()} - set(examples.modalities))
    if unknown:
        raise ConfigError(f"optim.freeze and optim.modality_lr: no modality {unknown[0]}; {examples.modalities_text}")
    for warning in check_schedule(config) if distributed.is_first else ():
        log.warning("%s", warning)
    if config.optim.freeze and config.finetune.init is None:
        log.info(
            "frozen encoders without --init: those of %s keep their random weights", ", ".join(config.optim.freeze)
        )
    if config.finetune.sampling in CROSS_MODAL_SAMPLERS and len(examples.modalities) < 2:
        raise ConfigError(f"--sampling {config.finetune.sampling} needs 2 modalities; {examples.modalities_text}")
    min_modalities = BALANCERS[config.finetune.balancing].min_modalities
    if len(examples.modalities) < min_modalities:
        raise ConfigError(
            f"--balancing {config.finetune.balancing} needs {min_modalities} modalities; {examples.modalities_text}"
        )
    store = Store(examples.inputs, device=device, max_bytes=config.finetune.resident_mib << 20)
    return TrainingData.of(
        examples, store, train=train, config=config, seed=seed, device=device, distributed=distributed
    )


def build_model_config(examples: Examples, config: TrainConfig) -> ModelConfig:
    """Return the architecture of the network."""
    settings = config.finetune
    return ModelConfig(
        modalities=examples.modalities,
        shapes=examples.shapes,
        classes=examples.class_names,
        fusion=settings.fusion_used,
        own_heads=settings.own_heads or BALANCERS[settings.balancing].own_heads,
        hidden=settings.hidden,
        dropout=settings.dropout,
        width=config.width,
    )


def _training_rows(examples: Examples, config: FinetuneConfig) -> NDArray[np.int64]:
    selected = training_rows(examples.split, examples.p_balanced, keep_posterior=config.keep_posterior)
    if config.keep_posterior is not None:
        num_train = len(examples.rows("train"))
        log.info("P(balanced) >= %g keeps %d of %d training samples", config.keep_posterior, len(selected), num_train)
    return selected


def run_identity(examples: Examples, training_data: TrainingData, *, init: Path | None) -> str:
    """Fingerprint everything that determines the weights, so that a state of another run is never resumed.

    The number of processes and the reporting settings are not part of it.
    """
    train, train_and_validation = training_data.train, np.r_[training_data.train, training_data.validation]
    ids = ["\0".join(examples.sample_id[rows]) for rows in (train, training_data.validation)]
    arrays: list[NDArray[Any]] = [training_data.pool.rank, training_data.pool.balance, training_data.pool.p_balanced]
    arrays += [examples.weight[train], examples.label[train_and_validation]]
    for matrix in training_data.store.resident:
        if matrix is not None:
            arrays.append(
                matrix.index_select(0, torch.from_numpy(train_and_validation).to(matrix.device)).cpu().numpy()
            )
    content = "\0".join(examples.content[train_and_validation])
    config = asdict(training_data.config)
    for name in ("report_to", "resident_mib", "save_steps"):
        del config["finetune"][name]
    weights = b"" if init is None else init.read_bytes()
    settings = repr(
        (_STATE_VERSION, config, examples.class_names, examples.modalities, examples.shapes, training_data.seed)
    )
    texts = (settings.encode(), content.encode(), *(text.encode() for text in ids))
    return digest(*texts, *(np.ascontiguousarray(array).tobytes() for array in arrays), weights)


def resume(path: Path, identity: str, *, device: str) -> dict[str, Any] | None:
    """Read the saved state; None where there is none with this identity."""
    if not path.exists():
        return None
    state = load_state(path, device=device)
    if state.get("identity") == identity:
        return state
    log.info("the state in %s is of other data, settings or version: starting from scratch", path.parent)
    return None


def common_state(
    state: dict[str, Any] | None, distributed: DistributedContext, *, device: str
) -> dict[str, Any] | None:
    """Return the state that all processes have, or None: without a shared disk, only the first process has one."""
    position = [0, 0] if state is None else [state["epoch"], state["step"]]
    positions = distributed.gather(torch.tensor(position, dtype=torch.int64, device=device)[:, None])
    if bool((positions == positions[:, :1]).all()):
        return state
    log.info("not all processes have the same state: starting from scratch; share the run folder among the machines")
    return None


def chance_accuracy(label: NDArray[np.int64], training_data: TrainingData) -> dict[str, float]:
    """Compute the test accuracy of guessing: uniformly, and of the most common class of train."""
    counts = np.bincount(label[training_data.train])
    return {
        "uniform": 1 / (int(label.max()) + 1),
        "majority": float((label[training_data.test] == counts.argmax()).mean()),
    }
