"""Checkpoints, written whole or not at all, and read without running code."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..audit.errors import RunError, TrainError
from ..audit.storage import atomic_write
from .network import FusionNet, ModelConfig

log = logging.getLogger("mmaudit")


def save_model(state: dict[str, Tensor], path: Path, *, about: dict[str, Any]) -> None:
    """Write weights as safetensors; `about` (what the network is) goes into the file's metadata under `mmaudit`."""
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
    """Read weights; RunError where the file is no safetensors file, or one of them is not finite."""
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as weights: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path} is damaged, its weights {name} are not all finite: train it anew")
    return weights


def read_model_config(path: Path) -> ModelConfig:
    """Read which network a file's weights belong to; RunError where it is not one of mmaudit's."""
    try:
        with safe_open(path, "pt") as file:
            return ModelConfig.of(json.loads((file.metadata() or {})["mmaudit"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not a model of mmaudit finetune: {error!r}") from error


def warm_start(net: FusionNet, path: Path) -> None:
    """Begin with the weights of another fine-tuning: every tensor of the same name and shape.

    Modalities are matched by name; what has no counterpart, as heads for other classes or a modality that was not
    there, stays as it was drawn. Raises TrainError where no modality has one, or one of another shape.
    """
    old, weights = read_model_config(path), load_model(path)
    here, names = net.state_dict(), net.plan.modalities
    place = {str(old.modalities.index(name)): str(names.index(name)) for name in names if name in old.modalities}
    if not place:
        raise TrainError(f"--init {path} was trained on {', '.join(old.modalities)}, and none of them is trained here")
    same_classes, same_modalities = old.classes == net.plan.classes, old.modalities == names
    taken = {}
    for name, tensor in weights.items():
        kind, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        if kind in ("encoders", "heads"):
            name = f"{kind}.{place.get(number, '-')}.{leaf}"
        usable = kind == "encoders" or (same_classes and (kind == "heads" or same_modalities))
        if usable and name in here and here[name].shape == tensor.shape:
            taken[name] = tensor
    wanted = tuple(f"encoders.{number}." for number in place.values())
    lacking = [name for name in here if name.startswith(wanted) and name not in taken]
    if lacking:
        modality = names[int(lacking[0].split(".")[1])]
        raise TrainError(
            f"--init {path}: its weights do not fit the encoder of {modality} ({lacking[0]} is missing or of another "
            f"shape); it was trained on {', '.join(old.modalities)} with hidden {old.hidden} and width {old.width:g}"
        )
    net.load_state_dict(taken, strict=False)
    fresh = sorted({name.split(".")[0] for name in here if name not in taken})
    log.info("begun with the weights of %s%s", path, f"; drawn anew in part: {', '.join(fresh)}" if fresh else "")


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write what a run needs to go on: tensors and plain values only."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)  # to a path, it would hide why a write failed
        except RuntimeError as error:  # closing its archive fails once more, after the write that says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path, *, device: str) -> dict[str, Any]:
    """Read a state; RunError where the file is damaged."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise RunError(
            f"{path} is damaged ({type(error).__name__}): delete it to start this fine-tuning anew"
        ) from error
