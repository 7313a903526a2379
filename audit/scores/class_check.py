"""Check of whether the two groups of the gap are more than its classes.

Two classes, each with one mode at a place of its own, make a bimodal gap too. All of this is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MixtureError
from .em import Floats, Gap
from .mixture import Mixture, MixtureConfig, fit_mixture

CLASS_SAMPLES = 50  # ours: from here the criteria find two clear halves always (30: 91%); one in five 15%, at 200 80%
CLASS_MAJORITY = 0.5  # ours: the share of samples, or of variance, that decides


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCheck:
    """Whether the two groups of the gap are more than its classes: a check of ours, made by `fit_by_class`.

    Shares are in [0, 1], and those of the tested classes only: a class of a few samples explains variance by chance.
    They are None where nothing was tested.
    """

    verdict: str  # "holds within classes: ...", "is class structure: ...", "undecided: ..." or "not tested: ..."
    num_classes: int
    tested: tuple[int, ...]  # labels of the classes with enough samples, rising
    bimodal: tuple[int, ...]  # of these, the ones whose gap is bimodal by itself, by the criteria of the whole
    share_tested: float  # of all samples
    share_bimodal: float | None = None  # of samples, in classes that are bimodal by themselves
    eta_squared: float | None = None  # share of the variance of p_balanced that lies between classes

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {**asdict(self), "tested": list(self.tested), "bimodal": list(self.bimodal)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ClassCheck:
        """The inverse of to_json, exactly."""
        try:
            fields = {name: found[name] for name in cls.__dataclass_fields__}
            return cls(**{**fields, "tested": tuple(fields["tested"]), "bimodal": tuple(fields["bimodal"])})
        except (KeyError, TypeError) as error:
            raise MixtureError(
                f"not a class check: {error!r} is missing or malformed; rescore with: mmaudit score DATA"
            ) from error


def fit_by_class(gap: Gap, label: NDArray[np.integer], *, config: MixtureConfig, seed: int) -> ClassCheck:
    """Ask of gap (n,) with labels (n,) whether its two groups are there within classes, or are the classes.

    Two classes, each with one mode at a place of its own, make a bimodal gap too. The rule is ours: fit within every
    class of at least CLASS_SAMPLES. The groups hold within classes if at least CLASS_MAJORITY of the tested samples are
    in classes that are bimodal by themselves; if not, they are class structure if the classes explain at least as much
    of the variance of p_balanced; else it is undecided. Nothing is tested where the whole gap is not bimodal, where
    fewer than two classes are large enough, or where these hold less than that share of the samples.
    """
    whole = fit_mixture(gap, config=config, seed=seed)
    if label.shape != gap.shape:
        raise MixtureError(f"one label per gap is needed: found {label.shape} labels and {gap.shape} gaps")
    order = np.lexsort((gap, label))  # sums do not depend on the order of the rows
    labels, first, sizes = np.unique(label[order], return_index=True, return_counts=True)
    parts = {int(labels[k]): gap[order[first[k] : first[k] + sizes[k]]] for k in np.flatnonzero(sizes >= CLASS_SAMPLES)}
    share = sum(map(len, parts.values())) / len(gap)
    blank = ClassCheck(verdict="", num_classes=len(labels), tested=tuple(parts), bimodal=(), share_tested=share)
    reason = _untested(blank, whole, largest=int(sizes.max()))
    if reason:
        return replace(blank, verdict=f"not tested: {reason}", tested=())
    bimodal = [k for k, part in parts.items() if fit_mixture(part, config=config, seed=seed).bimodal]
    balanced = [whole.posterior(part).astype(np.float64) for part in parts.values()]
    found = replace(
        blank,
        bimodal=tuple(bimodal),
        share_bimodal=sum(len(parts[k]) for k in bimodal) / sum(map(len, parts.values())),
        eta_squared=_eta_squared(balanced),
    )
    return replace(found, verdict=_verdict(found))


def _untested(blank: ClassCheck, whole: Mixture, *, largest: int) -> str:
    """Why the classes cannot be tested; empty where they can."""
    if not whole.bimodal:
        return f"the gap as a whole is not bimodal ({whole.reasons[0]})"
    if blank.num_classes < 2:
        return "there is one class only"
    few = f"of {blank.num_classes} classes {len(blank.tested)} have {CLASS_SAMPLES} samples"
    if len(blank.tested) < 2:
        return f"{few}; two are needed, and the largest has {largest}"
    return f"{few}, with {blank.share_tested:.0%} of all samples" if blank.share_tested < CLASS_MAJORITY else ""


def _verdict(found: ClassCheck) -> str:
    """One line: which it is, and the numbers that say so."""
    assert found.share_bimodal is not None
    assert found.eta_squared is not None
    numbers = (
        f"the gap is bimodal in {len(found.bimodal)} of {len(found.tested)} classes tested, and classes explain "
        f"{found.eta_squared:.0%} of the variance of p_balanced"
    )
    if found.share_bimodal >= CLASS_MAJORITY:
        return f"holds within classes: {numbers}"
    return f"{'is class structure' if found.eta_squared >= CLASS_MAJORITY else 'undecided'}: {numbers}"


def _eta_squared(groups: list[Floats]) -> float:
    """Share of the variance of all values that lies between the groups, in [0, 1]; 0 where there is none."""
    everything = np.concatenate(groups)
    between = sum(len(group) * (group.mean() - everything.mean()) ** 2 for group in groups)
    total = ((everything - everything.mean()) ** 2).sum()
    return min(float(between / total), 1.0) if total > 0.0 else 0.0
