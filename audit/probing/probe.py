"""A probe: how sure is one modality alone, asked by a model that never saw the sample?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..encoding.matrix import Inputs, Rows
from ..errors import ConfigError, choices
from .crossing import Crossing, set_lesson
from .linear import fit_linear
from .mlp import fit_mlp
from .target import Target

__all__ = ["KINDS", "Crossing", "Probe", "ProbeConfig", "fit_probe"]

KINDS = ("auto", "linear", "mlp")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """How the cross-fitted probes are trained. All constants are mmaudit's defaults."""

    kind: str = "auto"  # "linear"; "auto", of few rows curved where a probe finds that better; "mlp", one hidden layer
    folds: int = 5
    repeats: int = 3  # rounds of cross-fitting with other folds; probabilities are averaged over them
    learn_from: str = "all"  # splits that probes learn from: "all", or "train" for all but the test split
    joint: bool = True  # fit a probe of all modalities' features side by side as well: for the Shapley values
    control: bool = True  # fit a probe of each modality to shuffled labels as well, which must be at chance
    most_rows: int = 200_000  # rows that all probes together learn from; all rows are scored
    # What a strength means stands in glm.py: 1 / (C n) in scikit-learn's terms.
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    gaussian: bool = True  # of few rows, mix a Gaussian model of the classes into the logistic one, unless of an mlp
    choice_rows: int = 8_000  # rows on which the strength is chosen; the probe itself learns from most_rows
    max_steps: int = 300
    tolerance: float = 1e-4  # a fit ends when two steps running lower its loss by less, relatively
    precision: str = "auto"  # of matrix products: "float32", "bfloat16", or the latter where the machine has it
    hidden: int = 64  # of an mlp, as all that follow
    epochs: int = 40
    lr: float = 3e-3
    dropout: float = 0.2
    batch_size: int = 256
    decays: tuple[float, ...] = (1e-2, 1.0)  # weight decays that are tried, each probe choosing its own

    def __post_init__(self) -> None:
        for name, right in (("learn_from", ("all", "train")), ("precision", PRECISIONS)):
            if getattr(self, name) not in right:
                raise ConfigError(f"probe.{name} is {getattr(self, name)!r}; {choices(getattr(self, name), right)}")
        for name in ("folds", "repeats", "most_rows", "choice_rows", "max_steps", "hidden", "epochs", "batch_size"):
            least = 2 if name == "folds" else 1
            if getattr(self, name) < least:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("strengths", "decays"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"probe.{name} is {list(getattr(self, name))}; give one or more, all above 0")
        for name in ("tolerance", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"probe.dropout is {self.dropout}; it must be at least 0 and below 1")


class Probe(Protocol):
    """A cross-fitted probe of one modality: each row is asked of the one that never saw it, r rounds of it.

    Outputs are raw: logits of classes or labels, or the number itself.
    """

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask about these rows: (r, b, k). `inputs`: the same rows elsewhere, as with a modality masked."""

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way, at e moments of training: (e, b, k)."""


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
