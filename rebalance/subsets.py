"""Subsets by a threshold: which samples does one modality carry, and which does none carry alone?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.score import ScoreTable
from .manifest import Selection

BALANCED_WITHIN = 0.2  # |D| up to which a sample counts as balanced: mmaudit's default


def sides(scores: ScoreTable, between: str | None) -> dict[str, str]:
    """Give the discrepancy, as ScoreTable.discrepancy takes it, in which each name is the positive side."""
    if between is None:
        return {name: _against_the_rest(scores, name) for name in scores.modalities}
    first, _, second = between.partition(":")
    if not second and len(scores.modalities) == 2:
        return sides(scores, None)
    return {first: between, second: f"{second}:{first}"} if second else {first: between}


def preferred(scores: ScoreTable, modality: str, *, threshold: float = 0.0, between: str | None = None) -> Selection:
    """Select the samples with D > T, D being this modality's discrepancy; T = 0 is "preferred", above "dominated by".

    The subsets of Xia et al., arXiv 2302.10912, with T in {0, 0.2, 0.4}.
    """
    known = sides(scores, between)
    if modality not in known:
        raise ConfigError(f"no modality {modality!r} to prefer; {choices(modality, known)}")
    if not 0 <= threshold < 1:
        raise ConfigError(f"the threshold of a dominated subset is {threshold}; it lies in [0, 1)")
    values = scores.discrepancy(known[modality]).astype(np.float64)  # as evaluation compares, and as is recorded
    name = f"{modality}-preferred" if threshold == 0 else f"{modality}-dominated-{threshold:g}"
    return _above(name, known[modality], values, threshold, keep=values > threshold, reason="discrepancy-too-low")


def within(scores: ScoreTable, *, threshold: float = BALANCED_WITHIN, between: str | None = None) -> Selection:
    """Select the samples with |D| <= T: nearly equal confidence on both sides. mmaudit's own class."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold of the balanced subset is {threshold}; it lies in [0, 1]")
    chosen = between or scores.default_between()
    values = np.abs(scores.discrepancy(chosen).astype(np.float64))
    name = f"balanced-within-{threshold:g}"
    return _above(name, chosen, values, threshold, keep=values <= threshold, reason="discrepancy-too-large")


def by_mixture(scores: ScoreTable, which: str, *, posterior: float = 0.5, between: str | None = None) -> Selection:
    """Select by the gap mixture: `balanced` has P(balanced) >= posterior, `imbalanced` the rest."""
    if which not in ("balanced", "imbalanced"):
        raise ConfigError(f"--gmm {which}: no such side of the mixture; {choices(which, ('balanced', 'imbalanced'))}")
    if scores.p_balanced is None:
        raise ManifestError("the score table has no p_balanced: rescore with mmaudit score, or use --subset")
    balanced = scores.p_balanced >= posterior
    keep, reason = (balanced, "posterior-too-low") if which == "balanced" else (~balanced, "posterior-too-high")
    chosen = between or scores.default_between()
    return _above(f"gmm-{which}", chosen, scores.p_balanced, posterior, keep=keep, reason=reason)


def parse_subset(scores: ScoreTable, text: str, *, between: str | None = None) -> Selection:
    """Read `MODALITY-preferred`, `balanced` or `balanced:T`."""
    name, _, value = text.partition(":")
    names = [*(f"{modality}-preferred" for modality in sides(scores, between)), "balanced"]
    if name not in names:
        raise ConfigError(f"--subset {text}: no such subset; {choices(name, names)}")
    if name == "balanced":
        return within(scores, threshold=_number("--subset", text, value or str(BALANCED_WITHIN)), between=between)
    modality = name.removesuffix("-preferred")
    if value:
        raise ConfigError(f"--subset {text}: {name} takes no threshold; that is --dominated {modality}:{value}")
    return preferred(scores, modality, between=between)


def parse_dominated(scores: ScoreTable, text: str, *, between: str | None = None) -> Selection:
    """Read `MODALITY:T`."""
    modality, colon, value = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--dominated {text}: not of the form MODALITY:T, such as {scores.modalities[0]}:0.2")
    return preferred(scores, modality, threshold=_number("--dominated", text, value), between=between)


def _number(option: str, text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {value!r} is not a number") from error


def _above(
    name: str, between: str, values: NDArray[Any], threshold: float, *, keep: NDArray[np.bool_], reason: str
) -> Selection:
    return Selection(
        name=name,
        between=between,
        keep=keep,
        reason=reason,
        score=values,
        threshold=np.full(len(values), threshold),
        rule={"kind": name, "threshold": threshold},
    )


def _against_the_rest(scores: ScoreTable, name: str) -> str:
    if len(scores.modalities) > 2:
        return name
    return f"{name}:{next(other for other in scores.modalities if other != name)}"
