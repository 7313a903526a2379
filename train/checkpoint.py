"""Checkpoints: written atomically, read without executing code, and resumed by trainings of the same settings."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..audit.errors import RunError, TrainError
from ..audit.features.encoders import function_version
from ..audit.hashing import digest
from ..audit.row_arrays import slices
from ..audit.storage import atomic_write
from .examples import Examples
from .network import FusionNet, ModelConfig
from .optimizer import DistributedContext
from .training_data import TrainingData

log = logging.getLogger("mmaudit")

_BLOCK_BYTES = 8 << 20  # of a matrix that are copied at a time
_STATE_VERSION = 6  # raised when the contents of a state change: an older state is not resumed


def save_model(state: dict[str, Tensor], path: Path, *, about: dict[str, Any]) -> None:
    """Write weights as safetensors; `about` (the network's architecture) goes into the metadata under `mmaudit`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"mmaudit": json.dumps(about, sort_keys=True)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_model(path: Path) -> dict[str, Tensor]:
    """Read weights; RunError where the file is not a safetensors file or a tensor is not finite."""
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as weights: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path} is damaged, its weights {name} are not all finite: train it again")
    return weights


def read_model_config(path: Path) -> ModelConfig:
    """Read the architecture from a model file; RunError where it was not written by mmaudit."""
    try:
        with safe_open(path, "pt") as file:
            return ModelConfig.of(json.loads((file.metadata() or {})["mmaudit"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not a model of mmaudit finetune: {error!r}") from error


def warm_start(net: FusionNet, path: Path) -> None:
    """Copy the weights of another fine-tuning: every tensor of the same name and shape.

    Modalities are matched by name; tensors without a counterpart, such as heads for other classes or a new modality,
    keep their random values. Raises TrainError where no modality matches, or one has another shape.
    """
    source = read_model_config(path)
    if source.model is not None:
        raise TrainError(f"--init {path} holds weights of the network of {source.model}, not of mmaudit's own")
    weights = load_model(path)
    target_weights, names = net.state_dict(), net.config.modalities
    target_index = {
        str(source.modalities.index(name)): str(names.index(name)) for name in names if name in source.modalities
    }
    if not target_index:
        raise TrainError(f"--init {path} was trained on {', '.join(source.modalities)}, none of which is trained now")
    same_classes = (source.task, source.classes) == (net.config.task, net.config.classes)
    same_modalities = source.modalities == names
    transferred = {}
    for name, tensor in weights.items():
        kind, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        if kind in ("encoders", "heads"):
            name = f"{kind}.{target_index.get(number, '-')}.{leaf}"
        if kind in ("target_mean", "target_scale"):
            continue  # those of the training samples
        usable = kind == "encoders" or (same_classes and (kind == "heads" or same_modalities))
        if usable and name in target_weights and target_weights[name].shape == tensor.shape:
            transferred[name] = tensor
    prefixes = tuple(f"encoders.{number}." for number in target_index.values())
    missing = [name for name in target_weights if name.startswith(prefixes) and name not in transferred]
    if missing:
        modality = names[int(missing[0].split(".")[1])]
        raise TrainError(
            f"--init {path}: its weights do not fit the encoder of {modality} ({missing[0]} is missing or of another "
            f"shape); it was trained on {', '.join(source.modalities)} with hidden {source.hidden} and width "
            f"{source.width:g}"
        )
    net.load_state_dict(transferred, strict=False)
    initialized = sorted({name.split(".")[0] for name in target_weights if name not in transferred})
    partly = f"; random in part: {', '.join(initialized)}" if initialized else ""
    log.info("started from the weights of %s%s", path, partly)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write the training state for a resume: tensors and plain values only."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)  # given a path, torch hides why a write failed
        except RuntimeError as error:  # closing the archive fails too, after the write error that has the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path, *, device: str) -> dict[str, Any]:
    """Read a training state; RunError where the file is damaged."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as error:  # torch raises a different type for each kind of damage
        raise RunError(
            f"{path} is damaged ({type(error).__name__}): delete it to start this fine-tuning again"
        ) from error


def run_identity(examples: Examples, training_data: TrainingData, *, init: Path | None) -> str:
    """Fingerprint everything that determines the weights, so that a state of another run is never resumed.

    The number of processes and the reporting settings are not part of it. Of a network of the user's its source file
    is, without the modules that it imports.
    """
    train, train_and_validation = training_data.train, np.r_[training_data.train, training_data.validation]
    ids = [_Joined(rows, examples.encoded_ids) for rows in (train, training_data.validation)]
    arrays: list[NDArray[Any]] = [
        getattr(training_data.pool, name) for name in ("rank", "discrepancy", "balance", "p_balanced")
    ]
    arrays += [examples.weight[train], examples.target[train_and_validation]]
    resident = [
        _RowBytes(matrix, train_and_validation) for matrix in training_data.store.resident if matrix is not None
    ]
    content = _Joined(train_and_validation, lambda rows: examples.content[rows].tolist())
    config = asdict(training_data.config)
    for name in ("report_to", "resident_mib", "read_ahead_mib", "save_steps", "gradient_checkpointing"):
        del config["finetune"][name]
    weights = b"" if init is None else init.read_bytes()
    model = training_data.config.finetune.model
    source = b"" if model is None else function_version(model).encode()
    inputs = (examples.class_names, examples.modalities, examples.shapes, examples.views, examples.backbones)
    settings = repr((_STATE_VERSION, config, *inputs, training_data.seed))
    buffers = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    return digest(settings.encode(), content, *ids, *buffers, *resident, weights, source)


class _Joined:
    """The texts of rows, joined by zero bytes, of which those of some rows at a time are in memory."""

    def __init__(self, rows: NDArray[np.integer[Any]], read: Callable[[NDArray[np.integer[Any]]], list[bytes]]) -> None:
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return sum(map(len, self.digest_blocks()))

    def digest_blocks(self) -> Iterator[bytes]:
        for part in slices(len(self.rows)):
            yield b"\0" * (part.start > 0) + b"\0".join(self.read(self.rows[part]))


class _RowBytes:
    """The bytes of rows of a matrix, of which some megabytes at a time are copied."""

    def __init__(self, matrix: torch.Tensor, rows: NDArray[np.integer[Any]]) -> None:
        self.matrix, self.rows = matrix, rows
        self.row_bytes = matrix[:1].numel() * matrix.element_size()

    def __len__(self) -> int:
        return len(self.rows) * self.row_bytes

    def digest_blocks(self) -> Iterator[bytes]:
        for part in slices(len(self.rows), max(1, _BLOCK_BYTES // max(1, self.row_bytes))):
            rows = torch.from_numpy(self.rows[part]).to(self.matrix.device)
            yield self.matrix.index_select(0, rows).cpu().numpy().tobytes()


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
