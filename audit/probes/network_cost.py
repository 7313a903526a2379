"""Estimate of the time that networks as probes will train."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..dataset.labels import Target
from ..features.matrix import Inputs
from ..workers import NETWORK_THREADS, fixed_threads, format_duration
from .config import NetworkConfig
from .cross_fit import CrossFit
from .network import NetworkTarget, build_network, to_pictures

# Rows of the longer timed step; one of 64 takes 6 s for video on a CPU core. Its difference to a step of a quarter of
# the rows is the cost of rows; the rest is the cost of a step, which updates 11 million weights. For images of 112
# pixels a row took 110 ms in steps of 8, 62 ms in steps of 32, 48 ms in steps of 64.
_TIMED_ROWS = 32
_LONG = 300.0  # seconds above which a shorter setting is suggested; ours
SHORTER = {"repeats": 1, "epochs": 20}


@fixed_threads(NETWORK_THREADS)
def seconds_per_row(
    inputs: Inputs, shape: tuple[int, ...], target: Target, *, config: NetworkConfig, device: str
) -> float:
    """Measure the time of a training step per row, in steps of the first rows, with a network that is then discarded.

    No state of a random number generator changes. Raises ConfigError without transformers.
    """
    kind = torch.device(device).type
    network = build_network(shape, num_outputs=target.num_outputs, width=config.width, seed=0).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=config.lr)
    default = "bfloat16" if kind == "cuda" else "float32"
    enabled = (default if config.precision == "auto" else config.precision) == "bfloat16"

    def step(num_rows: int) -> float:
        started, rows = _clock(kind), np.arange(num_rows, dtype=np.intp) % inputs.num_rows
        values = torch.from_numpy(np.require(inputs.read(rows), requirements=("C", "W")))
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            outputs = network(to_pictures(values.to(device), shape))
        optimiser.zero_grad()
        loss = NetworkTarget.of(target, rows, device).loss(outputs, torch.from_numpy(rows).to(device))
        torch.autograd.backward(loss)
        optimiser.step()
        return _clock(kind) - started

    longer = max(min(config.batch_size, _TIMED_ROWS, inputs.num_rows), 2)  # BatchNorm needs two rows
    shorter = max(longer // 4, 2)
    step(shorter)  # allocates memory
    times = step(shorter), step(longer)
    by_row = max(times[1] - times[0], 0.0) / max(longer - shorter, 1)
    return (times[1] + by_row * (config.batch_size - longer)) / config.batch_size


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
