"""Findings of the balanced dataset's study (Xia et al., arXiv 2302.10912) as checks, and filters by the mixture.

The wording of the claims and the rule of decision are ours. A claim is "seen here" where the interval of every
difference that it is about lies on its side of 0, "not seen here" where one lies on the other side, else "cannot tell".
Where a claim is checked for several methods, p is corrected by Holm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import pandas as pd

from .difference import Array, Condition, Mask

Outcome = Literal["seen here", "not seen here", "cannot tell"]
Role = Literal["gmm", "all", "random", "balance-score"]

CLAIMS = {
    "F1": "on biased data, methods beat the best unimodal model overall and still lose to the unimodal model of the "
    "weaker modality on the samples that prefer it",
    "F2": "on the balanced set, methods help on the samples that prefer the weaker modality",
    "F2 greedy": "on the balanced set, greedy gains on the samples that prefer the weaker modality and loses on those "
    "that prefer the stronger one",
    "F3": "on samples that one modality dominates (T >= 0.2), every multimodal method is below that modality alone",
}
SELECTION_COLUMNS = ("comparison", "difference", "low", "high", "p", "p_holm", "verdict")
_AGAINST = {"all": "all data", "random": "the random control", "balance-score": "filtering by the balance score"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Outcome of a named check of a published claim.

    Attributes:
        name: F1, F2 or F3.
        claim: What is claimed.
        outcome: Whether the claim's differences are shown here, one is shown to be the opposite, or neither.
        sentence: Methods, manifest and differences in points with 95% intervals.
    """

    name: str
    claim: str
    outcome: Outcome
    sentence: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtering:
    """How the training samples of a condition were chosen, and the method apart from that.

    manifest: of `gmm` the manifest, where that is filtered; of `random` the manifest whose counts it copies.
    """

    role: Role
    method: str
    manifest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudyDesign:
    """What findings need to know of the conditions.

    Attributes:
        unimodal: The modality of each condition that trains one alone.
        balanced: Manifests whose discrepancy is uniform (`split --balanced`).
        greedy: Methods that balance by Greedy.
        filtering: How the training samples of conditions were chosen, where a row of `selection` may need it.
    """

    unimodal: Mapping[Condition, str] = field(default_factory=dict)
    balanced: frozenset[str] = frozenset()
    greedy: frozenset[str] = frozenset()
    filtering: Mapping[Condition, Filtering] = field(default_factory=dict)


def check_findings(
    correct: Mapping[Condition, Array],
    *,
    baseline: str,
    controls: frozenset[Condition],
    subsets: Mapping[str, Mask],
    group: Sequence[str] | None,
    design: StudyDesign,
) -> tuple[Finding, ...]:
    """Check F1 to F3 on each manifest on which modalities were trained alone."""
    return ()


def compare_filters(
    correct: Mapping[Condition, Array], design: StudyDesign, *, group: Sequence[str] | None
) -> pd.DataFrame | None:
    """Compare filtering by the mixture with all data, the random control and the balance score; None without it."""
    return None
