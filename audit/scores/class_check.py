"""Check of whether the two groups of the gap exist within classes.

Two classes, each with one mode at a different gap, make a bimodal gap too. This check is ours.
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

# Ours: with 50 samples the criteria detect two clear halves always (with 30: 91%), a group of one in five in 15% (with
# 200: 80%).
CLASS_SAMPLES = 50
CLASS_MAJORITY = 0.5  # ours: the share of samples, or of variance, that decides the verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCheck:
    """Result of `fit_by_class`: whether the two groups of the gap exist within classes.

    Shares are in [0, 1], over the tested classes only: a class of a few samples explains variance by chance. They are
    None if nothing was tested.
    """

    verdict: str  # "holds within classes: ...", "is class structure: ...", "undecided: ..." or "not tested: ..."
    num_classes: int
    tested: tuple[int, ...]  # labels of the classes with enough samples, ascending
    bimodal: tuple[int, ...]  # those of them whose own gap is bimodal by the criteria of the mixture
    share_tested: float  # of all samples
    share_bimodal: float | None = None  # of the tested samples, in classes that are bimodal
    eta_squared: float | None = None  # share of the variance of p_balanced that lies between classes

    def to_json(self) -> dict[str, object]:
        """Return the check as JSON values."""
        return {**asdict(self), "tested": list(self.tested), "bimodal": list(self.bimodal)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClassCheck:
        """Build a check from the values of to_json, of which it is the exact inverse."""
        try:
            fields = {name: values[name] for name in cls.__dataclass_fields__}
            return cls(**{**fields, "tested": tuple(fields["tested"]), "bimodal": tuple(fields["bimodal"])})
        except (KeyError, TypeError) as error:
            raise MixtureError(
                f"not a class check: {error!r} is missing or malformed; rescore with: mmaudit score DATA"
            ) from error


def fit_by_class(gap: Gap, label: NDArray[np.integer], *, config: MixtureConfig, seed: int) -> ClassCheck:
    """Check for gap (n,) with labels (n,) whether its two groups exist within classes, or are the classes.

    The rule is ours: fit the mixture within every class of at least CLASS_SAMPLES. The groups hold within classes if at
    least CLASS_MAJORITY of the tested samples are in classes that are bimodal by themselves; otherwise they are class
    structure if the classes explain at least that share of the variance of p_balanced; else it is undecided. Nothing is
    tested if the gap of all classes is not bimodal, if fewer than two classes are large enough, or if these have less
    than that share of the samples.
    """
    mixture = fit_mixture(gap, config=config, seed=seed)
    if label.shape != gap.shape:
        raise MixtureError(f"labels and gaps must have the same shape: found {label.shape} labels and {gap.shape} gaps")
    order = np.lexsort((gap, label))  # sums do not depend on the order of the rows
    labels, first, sizes = np.unique(label[order], return_index=True, return_counts=True)
    gaps = {int(labels[k]): gap[order[first[k] : first[k] + sizes[k]]] for k in np.flatnonzero(sizes >= CLASS_SAMPLES)}
    share = sum(map(len, gaps.values())) / len(gap)
    check = ClassCheck(verdict="", num_classes=len(labels), tested=tuple(gaps), bimodal=(), share_tested=share)
    reason = _untested(check, mixture, largest=int(sizes.max()))
    if reason:
        return replace(check, verdict=f"not tested: {reason}", tested=())
    bimodal = [k for k, class_gap in gaps.items() if fit_mixture(class_gap, config=config, seed=seed).bimodal]
    balanced = [mixture.posterior(class_gap).astype(np.float64) for class_gap in gaps.values()]
    check = replace(
        check,
        bimodal=tuple(bimodal),
        share_bimodal=sum(len(gaps[k]) for k in bimodal) / sum(map(len, gaps.values())),
        eta_squared=_eta_squared(balanced),
    )
    return replace(check, verdict=_verdict(check))


def _untested(check: ClassCheck, mixture: Mixture, *, largest: int) -> str:
    """Return why the classes cannot be tested; empty if they can."""
    if not mixture.bimodal:
        return f"the gap of all samples is not bimodal ({mixture.reasons[0]})"
    if check.num_classes < 2:
        return "there is only one class"
    large = f"{len(check.tested)} of {check.num_classes} classes have {CLASS_SAMPLES} or more samples"
    if len(check.tested) < 2:
        return f"{large}, two are needed; the largest has {largest}"
    return f"{large}, {check.share_tested:.0%} of all samples" if check.share_tested < CLASS_MAJORITY else ""


def _verdict(check: ClassCheck) -> str:
    """Format the verdict and its numbers as one line."""
    assert check.share_bimodal is not None
    assert check.eta_squared is not None
    numbers = (
        f"the gap is bimodal in {len(check.bimodal)} of {len(check.tested)} classes tested, and classes explain "
        f"{check.eta_squared:.0%} of the variance of p_balanced"
    )
    if check.share_bimodal >= CLASS_MAJORITY:
        return f"holds within classes: {numbers}"
    return f"{'is class structure' if check.eta_squared >= CLASS_MAJORITY else 'undecided'}: {numbers}"


def _eta_squared(groups: list[Floats]) -> float:
    """Compute the share of the variance that lies between the groups, in [0, 1]; 0 if the values are constant."""
    values = np.concatenate(groups)
    between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)
    total = ((values - values.mean()) ** 2).sum()
    return min(float(between / total), 1.0) if total > 0.0 else 0.0
