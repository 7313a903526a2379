"""Checkpoints: whole or not at all, and loaded without running anybody's code"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..audit.errors import RunError
from ..audit.files import whole


def save_model(state: dict[str, Tensor], path: Path, *, about: dict[str, Any]) -> None:
    """Write weights as safetensors; `about` (what the network is) goes into the file's metadata under `mmaudit`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={"mmaudit": json.dumps(about, sort_keys=True)})


def load_model(path: Path) -> dict[str, Tensor]:
    """Read weights."""
    return load_file(path)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write what a run needs to go on: tensors and plain values only."""
    with whole(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, *, device: str) -> dict[str, Any]:
    """Read a state; RunError where the file is damaged."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise RunError(
            f"{path} is damaged ({type(error).__name__}): delete it to start this fine-tuning anew"
        ) from error
