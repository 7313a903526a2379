"""Checks of a gap with two or more modes: within classes, and against independent modalities.

Two classes, each with one mode at a different gap, make a gap of two modes; so do two modalities that are right and
wrong independently of each other. These checks are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MixtureError
from ..metrics import Floats, gap
from . import em
from .em import Gap
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


def _eta_squared(groups: list[em.Floats]) -> float:
    """Compute the share of the variance that lies between the groups, in [0, 1]; 0 if the values are constant."""
    values = np.concatenate(groups)
    between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)
    total = ((values - values.mean()) ** 2).sum()
    return min(float(between / total), 1.0) if total > 0.0 else 0.0


PERMUTATIONS = 20  # ours; a verdict that survives in more than half of them survives
PERMUTED_ROWS = 200_000  # by position, in the order of the ids' hashes: more rows do not change the verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginCheck:
    """Whether a gap has two or more modes with the modalities paired at random within each class.

    num_bimodal: permutations, of num_permutations, in which it has; None if the gap itself has not.
    """

    num_permutations: int
    num_bimodal: int | None
    num_rows: int

    @property
    def survives(self) -> bool:
        """Whether the modes come from the distributions of the single modalities, not from their pairing."""
        return self.num_bimodal is not None and 2 * self.num_bimodal > self.num_permutations

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {**asdict(self), "survives": self.survives}


def permute_within_classes(
    confidence: Floats, label: NDArray[np.integer], *, config: MixtureConfig, seed: int, bimodal: bool
) -> MarginCheck:
    """Fit the mixture to gaps of confidence (n, m) whose modalities, but the first, are permuted within classes.

    Values move among the samples that have the modality. Of the first 200,000 rows; the caller orders them by a hash.
    """
    confidence, label = confidence[:PERMUTED_ROWS], label[:PERMUTED_ROWS]
    check = MarginCheck(num_permutations=PERMUTATIONS, num_bimodal=None, num_rows=len(label))
    if not bimodal:
        return check
    rng = np.random.default_rng(seed)
    num_bimodal = 0
    for _ in range(PERMUTATIONS):
        permuted = confidence.copy()
        for column in permuted.T[1:]:
            present = np.flatnonzero(~np.isnan(column))
            by_class = present[np.argsort(label[present], kind="stable")]
            shuffled = present[np.lexsort((rng.random(len(present)), label[present]))]
            column[by_class] = column[shuffled]
        num_bimodal += fit_mixture(gap(permuted), config=config, seed=seed).bimodal
    return replace(check, num_bimodal=num_bimodal)


def count_balanced(rows: NDArray[np.bool_], right: NDArray[np.bool_], present: NDArray[np.bool_]) -> dict[str, int]:
    """Count the balanced samples `rows` (n,), those with every prediction right (n, m), and those with every one wrong.

    present (n, m): the modalities that each sample has; a missing one is not right.
    """
    num_right, num_present = right[rows].sum(axis=1), present[rows].sum(axis=1)
    return {
        "n": int(rows.sum()),
        "all_correct": int((num_right == num_present).sum()),
        "all_wrong": int((num_right == 0).sum()),
    }


def balanced_side(counts: Sequence[Mapping[str, int] | None]) -> dict[str, float] | None:
    """Return the number of balanced samples of all parts, and the shares with every prediction right, or wrong.

    counts: that of each part. Two modalities that are both wrong are balanced too. None for a regression, and without
    predictions or samples.
    """
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or not (n := sum(count["n"] for count in known)):
        return None
    return {"n": n, **{name: sum(count[name] for count in known) / n for name in ("all_correct", "all_wrong")}}
