"""Findings of the balanced dataset's study (Xia et al., arXiv 2302.10912) as checks, and filters by the mixture.

The wording of the claims and the rule of decision are ours. A claim is "seen here" where the interval of every
difference that it is about lies on its side of 0, "not seen here" where one lies on the other side, else "cannot tell".
Where a claim is checked for several methods, p is corrected by Holm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from ...audit.metrics import DOMINATED_THRESHOLDS, dominated_name
from ..difference import (
    LEVEL,
    MIN_TEST_SAMPLES,
    NO_VERDICT,
    Array,
    Condition,
    Difference,
    Mask,
    compare_correctness,
    compare_on,
    holm,
)

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
_NO_WEAK = "no two modalities were trained alone of which the weaker is preferred by some test samples"
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Manifest:
    """The conditions of one manifest that findings compare: by method, and by modality trained alone."""

    name: str
    baseline: str
    methods: Mapping[str, Array]
    unimodal: Mapping[str, Array]
    subsets: Mapping[str, Mask]
    group: Sequence[str] | None
    greedy: frozenset[str]

    def others(self) -> list[str]:
        """Return the methods other than the baseline."""
        return [method for method in self.methods if method != self.baseline]

    def best_and_weak(self) -> tuple[str, str] | None:
        """Return the modality with the best accuracy alone, and the worst of those that some test samples prefer."""
        accuracy = {name: float(values.mean()) for name, values in self.unimodal.items()}
        sides = [name for name in accuracy if self.subsets.get(dominated_name(name, 0), np.zeros(1, bool)).any()]
        if not sides:
            return None
        best, weak = max(accuracy, key=accuracy.__getitem__), min(sides, key=accuracy.__getitem__)
        return None if best == weak else (best, weak)

    def compare(self, a: Array, b: Array, subset: str) -> Difference:
        return compare_on(self.subsets[subset], a, b, group=self.group)

    def place(self, method: str) -> str:
        return f"{method} on {self.name}"


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
    findings: list[Finding] = []
    for name in dict.fromkeys(manifest for manifest, _ in correct):
        manifest = _Manifest(
            name=name,
            baseline=baseline,
            methods={key[1]: values for key, values in correct.items() if key[0] == name and key not in controls},
            unimodal={
                modality: correct[key] for key, modality in design.unimodal.items() if key[0] == name and key in correct
            },
            subsets=subsets,
            group=group,
            greedy=design.greedy,
        )
        if not manifest.unimodal:
            continue
        findings += _check_balanced(manifest) if name in design.balanced else _check_biased(manifest)
        findings += _check_dominated(manifest)
    return tuple(sorted(findings, key=lambda finding: finding.name))


def _check_biased(manifest: _Manifest) -> list[Finding]:
    """Check F1 for each method: above the best modality on all samples, and below the weak one on its own."""
    modalities = manifest.best_and_weak()
    if modalities is None:
        return [_untold("F1", manifest, _NO_WEAK)] if manifest.others() else []
    best, weak = modalities
    subset, others = dominated_name(weak, 0), manifest.others()
    overall = [manifest.compare(manifest.methods[name], manifest.unimodal[best], "all") for name in others]
    on_weak = [manifest.compare(manifest.methods[name], manifest.unimodal[weak], subset) for name in others]
    findings = []
    for method, above, p_above, below, p_below in zip(
        others, overall, _corrected(overall), on_weak, _corrected(on_weak), strict=True
    ):
        sentence = (
            f"{manifest.place(method)}: {_points(above)} against {best} alone on all test samples, {_points(below)} "
            f"against {weak} alone on {subset}"
        )
        outcome = _outcome([(above, p_above, 1), (below, p_below, -1)])
        findings.append(Finding(name="F1", claim=CLAIMS["F1"], outcome=outcome, sentence=sentence))
    return findings


def _check_balanced(manifest: _Manifest) -> list[Finding]:
    """Check F2 for each method: above the baseline on the weak side; of greedy also below it on the strong side."""
    modalities = manifest.best_and_weak()
    if modalities is None or manifest.baseline not in manifest.methods:
        reason = _NO_WEAK if modalities is None else f"no training of {manifest.baseline} is finished"
        return [_untold("F2", manifest, reason)] if manifest.others() else []
    strong, weak = (dominated_name(name, 0) for name in modalities)
    others, reference = manifest.others(), manifest.methods[manifest.baseline]
    on_weak, on_strong = (
        [manifest.compare(manifest.methods[name], reference, subset) for name in others] for subset in (weak, strong)
    )
    findings = []
    for method, gain, p_gain, loss, p_loss in zip(
        others, on_weak, _corrected(on_weak), on_strong, _corrected(on_strong), strict=True
    ):
        is_greedy = method in manifest.greedy
        sentence = (
            f"{manifest.place(method)}: {_points(gain)} against {manifest.baseline} on {weak}, {_points(loss)} on "
            f"{strong}"
        )
        outcome = _outcome([(gain, p_gain, 1), *([(loss, p_loss, -1)] if is_greedy else [])])
        claim = CLAIMS["F2 greedy" if is_greedy else "F2"]
        findings.append(Finding(name="F2", claim=claim, outcome=outcome, sentence=sentence))
    return findings


def _check_dominated(manifest: _Manifest) -> list[Finding]:
    """Check F3: every method is below the dominant modality alone, on both sides and for T = 0.2 and 0.4."""
    compared = {
        f"{method}, {subset}": manifest.compare(values, alone, subset)
        for modality, alone in manifest.unimodal.items()
        for subset in (dominated_name(modality, threshold) for threshold in DOMINATED_THRESHOLDS)
        if subset in manifest.subsets and manifest.subsets[subset].sum() >= MIN_TEST_SAMPLES
        for method, values in manifest.methods.items()
    }
    if not compared:
        reason = f"no modality that was trained alone dominates {MIN_TEST_SAMPLES} test samples"
        return [_untold("F3", manifest, reason)] if manifest.methods else []
    differences = list(compared.values())
    corrected = _corrected(differences)
    num_below = sum(row.mean < 0 and row.p < LEVEL for row in differences)
    num_above = sum(row.mean > 0 and p < LEVEL for row, p in zip(differences, corrected, strict=True))
    outcome: Outcome = "not seen here" if num_above else "seen here" if num_below == len(compared) else "cannot tell"
    ranked = sorted(compared, key=lambda name: compared[name].mean)
    lowest, highest = (f"{_points(compared[name])} ({name})" for name in (ranked[0], ranked[-1]))
    sentence = (
        f"{manifest.name}: below the dominant modality alone in {num_below} of {len(compared)} comparisons, above it "
        f"in {num_above} (Holm); from {lowest} to {highest}"
    )
    return [Finding(name="F3", claim=CLAIMS["F3"], outcome=outcome, sentence=sentence)]


def _untold(name: str, manifest: _Manifest, reason: str) -> Finding:
    """Return a finding that nothing can be said of, with the reason."""
    return Finding(name=name, claim=CLAIMS[name], outcome="cannot tell", sentence=f"{manifest.name}: {reason}")


def _outcome(parts: Sequence[tuple[Difference, float, int]]) -> Outcome:
    """Decide a claim of differences, each with its corrected p and the sign that is claimed."""
    shown = [sign * difference.mean > 0 if p < LEVEL else None for difference, p, sign in parts]
    if False in shown:
        return "not seen here"
    return "seen here" if all(shown) else "cannot tell"


def _corrected(differences: Sequence[Difference]) -> list[float]:
    """Return p corrected by Holm; NaN where there are too few samples, or one training."""
    return holm([row.p if row.num_samples >= MIN_TEST_SAMPLES else float("nan") for row in differences])


def _points(difference: Difference) -> str:
    text = f"{100 * difference.mean:+.1f} points"
    if np.isnan(difference.p):
        return text
    return f"{text} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def compare_filters(
    correct: Mapping[Condition, Array], design: StudyDesign, *, group: Sequence[str] | None
) -> pd.DataFrame | None:
    """Compare filtering by the mixture with all data, the random control and the balance score; None without it.

    Conditions of the same method are compared on all test samples, and p is corrected for the rows of the table.
    """
    chosen = {condition: choice for condition, choice in design.filtering.items() if condition in correct}
    pairs = [
        (condition, other, against.role)
        for condition, choice in chosen.items()
        if choice.role == "gmm"
        for other, against in chosen.items()
        if against.role in _AGAINST and against.method == choice.method
        if against.role != "random" or (choice.manifest and against.manifest == choice.manifest)
    ]
    if not pairs:
        return None
    differences = [compare_correctness(correct[a], correct[b], group=group) for a, b, _ in pairs]
    rows = [
        {
            "comparison": f"{a[1]} on {a[0]} against {b[1]} on {b[0]} ({_AGAINST[role]})",
            **{key: getattr(row, key) for key in ("low", "high", "p")},
            "difference": row.mean,
            "p_holm": p,
            "verdict": NO_VERDICT if np.isnan(p) else row.evidence(p),
        }
        for (a, b, role), row, p in zip(pairs, differences, _corrected(differences), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(SELECTION_COLUMNS))
