"""The linear probe: which strength, and which weights, for every fold and round at once?

Of few rows a Gaussian model of the classes is mixed in (see gaussian.py). With covariances of each class's own, which
the kind "auto" allows and each probe tries, what is found is linear in the features no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..encoding.matrix import Inputs, Rows
from .aim import Aim
from .crossing import Crossing, Lesson, ask_own
from .design import Design, Units, read_design
from .estimate import log_estimate
from .gaussian import MOST_FEATURES, MOST_ROWS, Mixed, mix_in_gaussian
from .glm import fit_glm
from .lbfgs import Minimum
from .quadratic import Curve
from .strength import choose_strength
from .target import Target

if TYPE_CHECKING:
    from .config import ProbeConfig

_COARSE = (
    2e-3  # of bfloat16: a step that gains less is not worth its pass (at 5e-4 the loss out of fold is .004 better)
)
_SMALL = 1 << 22  # features in all, below which bfloat16 saves no time worth its rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """p linear models, r rounds of f folds: theta (p, d + 1, k) of standardised features.

    To the logits of a probe that has found curved boundaries better, its curve is added: it is linear no more.
    snapshots are the thetas of the first round on the way, after 1, 2, 4, ... steps and the last.
    """

    inputs: Inputs
    crossings: tuple[Crossing, ...]
    units: Units
    theta: Tensor
    curves: tuple[Curve | None, ...]
    strength: Tensor
    num_steps: int
    snapshots: tuple[Tensor, ...]

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask in each round the probe that never saw the row: (r, b, k)."""
        found = self._ask(self.crossings, self.theta[None], rows, self.inputs if inputs is None else inputs)
        return np.asarray(found[0])

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way: (e, b, k). Only the last have curves."""
        return np.asarray(self._ask(self.crossings[:1], torch.stack(self.snapshots), rows, self.inputs)[:, 0])

    def _ask(self, crossings: Sequence[Crossing], thetas: Tensor, rows: Rows, inputs: Inputs) -> NDArray[np.float32]:
        """Ask several states (e, p, d + 1, k) of the probes, the last of them with curves: (e, r, b, k)."""
        out = np.empty((len(thetas), len(crossings), len(rows), thetas.shape[3]), dtype=np.float32)
        straight: tuple[Curve | None, ...] = (None,) * len(self.curves)
        for place, z in self.units.read(inputs, rows):
            for state, theta in enumerate(thetas):
                curves = self.curves if state == len(thetas) - 1 else straight
                found = ask_own(crossings, rows[place], _asker(theta, curves, z))
                out[state, :, place] = found.cpu().numpy()
        return out


def fit_linear(
    inputs: Inputs,
    target: Target,
    crossings: Sequence[Crossing],
    lesson: Lesson,
    *,
    config: ProbeConfig,
    device: str,
) -> LinearProbe:
    """Fit all folds and rounds as one stacked parameter, each on its own rows and with the strength it chose.

    The strength is chosen on some of the rows and carried over as scikit-learn's C, the variance of a prior: beside a
    mean over s times as many rows it is s times less.
    """
    products = products_of(config.precision, device, size=len(lesson.rows) * inputs.num_features)
    design = read_design(inputs, lesson.rows, products=products, device=device)
    answer = Aim.of(target, lesson.rows, design.curvature)
    log_estimate(design, answer, lesson, max_steps=config.max_steps)
    strength = choose_strength(design, answer, lesson, key=crossings[0].key, config=config)
    found = _fit(design, answer, lesson, strength, config)
    mixed = Mixed(theta=found.theta, curves=(None,) * len(strength))
    if _wants_gaussian(design, answer, lesson, config):
        mixed = mix_in_gaussian(
            design,
            answer.found,
            lesson,
            crossings,
            theta=found.theta,
            strength=strength,
            max_steps=config.max_steps,
            curved=config.kind == "auto",
        )
    first = crossings[0].num_folds
    return LinearProbe(
        inputs=inputs,
        crossings=tuple(crossings),
        units=design.units,
        theta=_in_units(mixed.theta, answer),
        curves=mixed.curves,
        strength=strength,
        num_steps=found.num_steps,
        snapshots=tuple(_in_units(moment[:first], answer) for moment in (*found.snapshots[:-1], mixed.theta)),
    )


def _fit(design: Design, answer: Aim, lesson: Lesson, strength: Tensor, config: ProbeConfig) -> Minimum:
    """Fit every probe from nothing, so that the way there can be told."""
    learn = torch.from_numpy(lesson.learn).to(strength.device)
    coarse = design.rows.dtype == torch.bfloat16
    return fit_glm(
        design,
        answer.found,
        task=answer.task,
        learn=learn,
        strength=strength,
        start=strength.new_zeros(len(strength), design.rows.shape[1] + 1, answer.num_outputs),
        max_steps=config.max_steps,
        tolerance=max(config.tolerance, _COARSE if coarse else 0.0),
        patience=1 if coarse else 2,
    )


def _wants_gaussian(design: Design, answer: Aim, lesson: Lesson, config: ProbeConfig) -> bool:
    """Tell whether rows are few enough, and there are some to choose by; a strength that is given is to stand alone."""
    small = len(lesson.rows) <= MOST_ROWS and design.rows.shape[1] <= MOST_FEATURES
    chooses = len(config.strengths) > 1 and lesson.can_choose
    return config.gaussian and answer.task == "classification" and small and chooses


def _asker(theta: Tensor, curves: Sequence[Curve | None], z: Tensor) -> Callable[[int, Tensor], Tensor]:
    def ask(probe: int, mine: Tensor) -> Tensor:
        straight, curve = torch.addmm(theta[probe, -1], z[mine], theta[probe, :-1]), curves[probe]
        return straight if curve is None else straight + curve.logits(z[mine])

    return ask


def products_of(precision: str, device: str, *, size: int) -> torch.dtype:
    """Choose the dtype of matrix products by what the machine can, never by how fast it seems just now."""
    if precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        able = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cpu
        precision = "bfloat16" if able and size >= _SMALL else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def _in_units(theta: Tensor, answer: Aim) -> Tensor:
    """Give models (p, d + 1, k) whose outputs are in the units of the target."""
    moved = theta * answer.scale
    moved[:, -1] += answer.centre
    return moved
