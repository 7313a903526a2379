"""A probe: how sure is one modality alone, asked by a model that never saw the sample?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..encoding.matrix import Inputs, Rows
from ..errors import ConfigError, choices
from ..threads import fixed_threads
from .config import ProbeConfig
from .crossing import Crossing, set_lesson
from .linear import fit_linear
from .mlp import fit_mlp
from .target import Target

__all__ = ["KINDS", "Crossing", "Probe", "fit_probe"]

KINDS = ("auto", "linear", "mlp")


class Probe(Protocol):
    """A cross-fitted probe of one modality: each row is asked of the one that never saw it, r rounds of it.

    Outputs are raw: logits of classes or labels, or the number itself.
    """

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask about these rows: (r, b, k). `inputs`: the same rows elsewhere, as with a modality masked."""

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way, at e moments of training: (e, b, k)."""


@fixed_threads()
def fit_probe(
    inputs: Inputs,
    target: Target,
    crossings: Sequence[Crossing],
    *,
    config: ProbeConfig,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Probe:
    """Fit the probes of all folds of all rounds at once. What is NaN counts as the feature's centre.

    A row outside a round's `fits` is learned from by none of its probes, and neither is what `most_rows` leaves out.
    Raises ConfigError for a kind of probe that does not exist.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"probe.kind is {config.kind!r}; {choices(config.kind, KINDS)}")
    lesson = set_lesson(crossings, most_rows=config.most_rows)
    fit = fit_mlp if config.kind == "mlp" else fit_linear
    probe: Probe = fit(inputs, target, crossings, lesson, config=config, device=device)
    progress("probe", 1, 1)
    return probe
