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
from .balancing.config import BALANCERS
from .checkpoint import load_state
from .config import FinetuneConfig, TrainConfig, check_schedule
from .distributed import DistributedContext
from .examples import Examples, Store
from .network import ModelConfig
from .sampling.config import BETWEEN
from .training_data import TrainingData

log = logging.getLogger("mmaudit")

_STATE = 2  # raised with what a state is made of: an older one is not gone on from


def set_up(
    examples: Examples, config: TrainConfig, *, seed: int, device: str, distributed: DistributedContext
) -> TrainingData:
    """Bring the samples to the device.

    Raises ManifestError where a split is empty, ConfigError where the settings name a modality that is not there, or a
    method that needs more of them.
    """
    train = _training_rows(examples, config.finetune)
    validation, test = examples.rows("validation"), examples.rows("test")
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if len(rows) == 0:
            mend = "loosen its rule, or --keep-posterior"
            if name == "test":
                mend += "; where the data have none, mmaudit split --resplit 80/8/12 cuts some"
            raise ManifestError(f"the manifest leaves no {name} samples: {mend}")
    unknown = sorted({*config.optim.freeze, *config.optim.factors()} - set(examples.modalities))
    if unknown:
        raise ConfigError(f"optim.freeze and optim.modality_lr: no modality {unknown[0]} here; {examples.named}")
    for each in check_schedule(config) if distributed.is_first else ():
        log.warning("%s", each)
    if config.optim.freeze and config.finetune.init is None:
        log.info("frozen encoders without --init: those of %s stay as they are drawn", ", ".join(config.optim.freeze))
    if config.finetune.sampling in BETWEEN and len(examples.modalities) < 2:
        raise ConfigError(f"--sampling {config.finetune.sampling} needs 2 modalities; {examples.named}")
    least = BALANCERS[config.finetune.balancing].least
    if len(examples.modalities) < least:
        raise ConfigError(f"--balancing {config.finetune.balancing} needs {least} modalities; {examples.named}")
    store = Store(examples.inputs, device=device, most_bytes=config.finetune.resident_mib << 20)
    return TrainingData.of(
        examples, store, train=train, config=config, seed=seed, device=device, distributed=distributed
    )


def model_config_of(examples: Examples, config: TrainConfig) -> ModelConfig:
    """Give the shape of the network."""
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
    train = examples.rows("train")
    if config.keep_posterior is None:
        return train
    posterior = examples.p_balanced[train]
    if np.isnan(posterior).any():
        raise ManifestError("--keep-posterior: the manifest has no p_balanced; rescore with mmaudit score, split again")
    kept = train[posterior >= config.keep_posterior]
    log.info("P(balanced) >= %g keeps %d of %d training samples", config.keep_posterior, len(kept), len(train))
    return kept


def identity_of(examples: Examples, training_data: TrainingData, *, init: Path | None) -> str:
    """Fingerprint all that decides about the weights, so that a state of something else is never gone on from.

    How many processes there are, and what is told to whom, does not.
    """
    train, both = training_data.train, np.r_[training_data.train, training_data.validation]
    ids = ["\0".join(examples.sample_id[rows]) for rows in (train, training_data.validation)]
    arrays: list[NDArray[Any]] = [training_data.pool.rank, training_data.pool.balance, training_data.pool.p_balanced]
    arrays += [examples.weight[train], examples.label[both]]
    for held in training_data.store.held:
        if held is not None:
            arrays.append(held.index_select(0, torch.from_numpy(both).to(held.device)).cpu().numpy())
    content = "\0".join(examples.content[both])
    config = asdict(training_data.config)
    for name in ("report_to", "resident_mib", "save_steps"):
        del config["finetune"][name]
    weights = b"" if init is None else init.read_bytes()
    settings = repr((_STATE, config, examples.class_names, examples.modalities, examples.shapes, training_data.seed))
    told = (settings.encode(), content.encode(), *(text.encode() for text in ids))
    return digest(*told, *(np.ascontiguousarray(array).tobytes() for array in arrays), weights)


def resume(path: Path, identity: str, *, device: str) -> dict[str, Any] | None:
    """Read the state that was left behind; None where there is none of this identity."""
    if not path.exists():
        return None
    state = load_state(path, device=device)
    if state.get("identity") == identity:
        return state
    log.info("the state in %s is of other data, settings or version: starting anew", path.parent)
    return None


def agreed(state: dict[str, Any] | None, distributed: DistributedContext, *, device: str) -> dict[str, Any] | None:
    """Give the state that all processes have, or None: on machines without a common disk, the first alone has one."""
    place = [0, 0] if state is None else [state["epoch"], state["step"]]
    told = distributed.gather(torch.tensor(place, dtype=torch.int64, device=device)[:, None])
    if bool((told == told[:, :1]).all()):
        return state
    log.info("not all processes have the same state: starting anew; share the run folder among the machines")
    return None


def chance_of(label: NDArray[np.int64], training_data: TrainingData) -> dict[str, float]:
    """Accuracy on test of guessing: each class alike, or always the most common class of train."""
    counts = np.bincount(label[training_data.train])
    return {
        "uniform": 1 / (int(label.max()) + 1),
        "majority": float((label[training_data.test] == counts.argmax()).mean()),
    }
