"""Estimate of the time that networks as probes will train."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..dataset.labels import Target
from ..features.matrix import FeatureMatrix
from ..workers import NETWORK_THREADS, fixed_threads, format_duration
from .config import NetworkConfig
from .cross_fit import CrossFit
from .network import NetworkTarget, build_network, to_pictures

# Rows of a timed step: on a CPU the time per row is that of a step of 64 rows within 15% (ResNet-18, 112 pixels).
_TIMED_ROWS = {"cpu": 16, "cuda": 64}
_TIMED_STEPS = 2  # after one that is not timed, in which memory is allocated
_LONG = 300.0  # seconds above which a shorter setting is suggested; ours
SHORTER = {"repeats": 1, "epochs": 20}


@fixed_threads(NETWORK_THREADS)
def seconds_per_row(
    inputs: FeatureMatrix, shape: tuple[int, ...], target: Target, *, config: NetworkConfig, device: str
) -> float:
    """Measure the time of a training step per row, on the first rows, with a network that is then discarded.

    No state of a random number generator changes. Raises ConfigError without transformers.
    """
    kind = torch.device(device).type
    rows = np.arange(min(_TIMED_ROWS.get(kind, 16), inputs.num_rows), dtype=np.intp)
    network = build_network(shape, num_outputs=target.num_outputs, width=config.width, seed=0).to(device)
    network_target = NetworkTarget.of(target, rows, device)
    optimiser = torch.optim.SGD(network.parameters(), lr=config.lr)
    precision = {"cpu": "float32", "cuda": "bfloat16"}.get(kind) if config.precision == "auto" else config.precision
    started = time.perf_counter()
    for step in range(_TIMED_STEPS + 1):
        if step == 1:
            started = _clock(kind)
        values = torch.from_numpy(np.require(inputs.read(rows), requirements=("C", "W")))
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = network(to_pictures(values.to(device), shape))
        optimiser.zero_grad()
        torch.autograd.backward(network_target.loss(outputs, torch.from_numpy(rows).to(device)))
        optimiser.step()
    return (_clock(kind) - started) / (_TIMED_STEPS * len(rows))


def _clock(kind: str) -> float:
    """Return the time after all computations on the device."""
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def row_passes(cross_fits: Sequence[CrossFit], *, config: NetworkConfig, control_rows: int) -> float:
    """Count the rows that all networks of a modality train on, over all epochs.

    The networks of a fold train on the rows of the other folds; those of a control, each on half of its rows.
    """
    num_rows = [sum(int((fit.fits & (fit.fold != fold)).sum()) for fold in range(fit.num_folds)) for fit in cross_fits]
    return config.epochs * float(sum(num_rows) + control_rows)


def describe_cost(
    seconds_by_row: Sequence[float],
    cross_fits: Sequence[Sequence[CrossFit]],
    *,
    config: NetworkConfig,
    control_rows: Sequence[int],
    device: str,
) -> str:
    """Return how long the networks of some modalities will train, and if it is long, how long with fewer repeats.

    Args:
        seconds_by_row: Seconds of a training step per row, by modality.
        cross_fits: Cross-fits of each modality, one per repeat.
        config: Settings of the networks.
        control_rows: Rows of the control of each modality; 0 without a control.
        device: Device of the training.

    Returns:
        For example "about 3 h on this CPU (3 repeats of 5 folds, 120 epochs); with --repeats 1 --set
        network.epochs=20 about 10 min".
    """

    def total(repeats: int, epochs: int) -> float:
        shorter = replace(config, epochs=epochs)
        return sum(
            seconds * row_passes(fits[:repeats], config=shorter, control_rows=rows)
            for seconds, fits, rows in zip(seconds_by_row, cross_fits, control_rows, strict=True)
        )

    first, repeats = cross_fits[0][0], len(cross_fits[0])
    seconds = total(repeats, config.epochs)
    name = "CPU" if torch.device(device).type == "cpu" else "GPU"
    plan = f"{repeats} repeat{'s' * (repeats > 1)} of {first.num_folds} folds, {config.epochs} epochs"
    text = f"about {format_duration(seconds)} on this {name} ({plan})"
    fewer = min(SHORTER["repeats"], repeats), min(SHORTER["epochs"], config.epochs)
    shorter = total(*fewer)
    if seconds < _LONG or shorter > seconds / 2 or math.isnan(seconds):
        return text
    return (
        f"{text}; with --repeats {fewer[0]} --set network.epochs={fewer[1]} about {format_duration(shorter)}; finished "
        "folds are stored, so that it can be interrupted and resumed"
    )
