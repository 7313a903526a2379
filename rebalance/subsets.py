"""Selection rules of subsets: by threshold, by mixture, by balance score, and at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.hashing import splitmix64
from ..audit.metrics import BALANCED_WITHIN, balanced_name, dominated_name, is_balanced, is_dominated
from .score_tables import ScoreBatch, ScoreFiles
from .selection import Counts, RowOutcome, SelectionRule, share_total

_REASONS = {
    "above": "discrepancy-too-low",
    "within": "discrepancy-too-large",
    "balanced": "posterior-too-low",
    "imbalanced": "posterior-too-high",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdRule:
    """Rule that keeps all samples on one side of a threshold: cell 0 passes, cell 1 does not.

    kind: "above" D > T, "within" |D| <= T, "balanced" P(balanced) >= T, "imbalanced" P(balanced) < T.
    """

    name: str
    between: str
    kind: str
    threshold: float
    num_cells: int = 2
    by_score: bool = False
    weighs: bool = False

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that are not kept."""
        return _REASONS[self.kind]

    def score(self, batch: ScoreBatch) -> NDArray[np.float64]:
        """Return the values that are compared with the threshold, (n,), NaN where missing."""
        if self.kind in ("above", "within"):
            values = batch.discrepancy(self.between).astype(np.float64)  # as in evaluation and in the recorded score
            return values if self.kind == "above" else np.abs(values)
        posterior = batch.numbers("p_balanced")
        return np.full(len(batch), np.nan) if posterior is None else posterior.astype(np.float64)

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return 0 for rows that pass, 1 for others, -1 for missing values, (n,)."""
        score = self.score(batch)
        passes = {
            "above": is_dominated(score, self.threshold),
            "within": is_balanced(score, self.threshold),
            "balanced": score >= self.threshold,
            "imbalanced": score < self.threshold,
        }[self.kind]
        return np.where(np.isnan(score), -1, np.where(passes, 0, 1)).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Return the quotas: all of cell 0, none of cell 1."""
        return np.array([counts[0], 0], dtype=np.int64)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Return the hash of each row, (n,); it has no effect, since cells are kept whole."""
        return batch.key

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        """Return the compared values and the threshold."""
        return RowOutcome(score=self.score(batch), threshold=np.full(len(batch), self.threshold))


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """An amount of samples: a number, or a share in (0, 1] of the available ones."""

    number: int | None = None
    share: float | None = None

    def of(self, counts: Counts) -> Counts:
        """Share the amount among cells (c,) in proportion to their counts."""
        total = int(counts.sum())
        if self.number is not None and self.number > total:
            raise ConfigError(f"requested {self.number} samples, available {total}")
        return share_total(self.number if self.number is not None else round((self.share or 0) * total), counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtremeRule:
    """Rule that keeps the most, or least, balanced samples of each split by the BSS balance score; ties by hash."""

    name: str
    between: str
    keep_most: bool
    amount: Amount
    num_cells: int
    by_score: bool = True
    weighs: bool = False

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that are not kept."""
        return "balance-too-low" if self.keep_most else "balance-too-high"

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the split of each row, -1 without a balance score, (n,)."""
        return np.where(np.isnan(_balance_scores(batch)), -1, batch.split).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Compute the quota of each split, in proportion to its size."""
        return self.amount.of(counts)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Return keys with the balance score in the upper 32 bits, first to keep lowest, and the hash in the lower."""
        sign = -1 if self.keep_most else 1
        position = np.nan_to_num((1 + sign * _balance_scores(batch)) / 2, nan=1.0)
        steps = (np.clip(position, 0, 1) * (2**32 - 1)).astype(np.uint64)
        return np.asarray((steps << np.uint64(32)) | (batch.key >> np.uint64(32)))

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        """Return the balance score of each row, and that of the last one kept."""
        last_balance = 1 - 2 * hash_outcome.threshold if self.keep_most else 2 * hash_outcome.threshold - 1
        return RowOutcome(score=_balance_scores(batch), threshold=last_balance)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRule:
    """Rule that draws samples at random: an amount, or as many per split and class as another manifest; a control."""

    name: str
    between: str
    num_classes: int
    num_cells: int
    amount: Amount | None = None
    like: Counts | None = None  # (s * k,)
    by_score: bool = True
    weighs: bool = False

    @property
    def reason(self) -> str:
        """Reason recorded for the rows that are not kept."""
        return "not-drawn"

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Return the cell of each row, split by class, (n,)."""
        return np.asarray(batch.split.astype(np.int32) * self.num_classes + batch.label)

    def quotas(self, counts: Counts) -> Counts:
        """Return the other manifest's counts, or share the amount by split and class."""
        if self.like is None:
            return (self.amount or Amount(share=1.0)).of(counts)
        if (self.like > counts).any():
            raise ManifestError(f"{self.name}: too few samples available to draw as many of each split and class")
        return self.like

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Return another hash than other rules use, so that the control is independent of their subsets."""
        return splitmix64(batch.key)

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], hash_outcome: RowOutcome) -> RowOutcome:
        """Return the hash of each row, and the last one kept."""
        return hash_outcome


def positive_sides(modalities: tuple[str, ...], between: str | None) -> dict[str, str]:
    """Return, per modality, the pair as in ScoreTable.discrepancy in which it is the positive side."""
    if between is None:
        return {name: _against_others(modalities, name) for name in modalities}
    first, _, second = between.partition(":")
    if not second and len(modalities) == 2:
        return positive_sides(modalities, None)
    return {first: between, second: f"{second}:{first}"} if second else {first: between}


def prefer_modality(
    modalities: tuple[str, ...], modality: str, *, threshold: float = 0.0, between: str | None = None
) -> ThresholdRule:
    """Select the samples with D > T, D being this modality's discrepancy; T = 0 is "preferred", above "dominated by".

    The subsets of Xia et al., arXiv 2302.10912, with T in {0, 0.2, 0.4}.
    """
    between_of = positive_sides(modalities, between)
    if modality not in between_of:
        raise ConfigError(f"modality {modality!r} not found; {choices(modality, between_of)}")
    if not 0 <= threshold < 1:
        raise ConfigError(f"the threshold of a dominated subset is {threshold}; it lies in [0, 1)")
    name = dominated_name(modality, threshold)
    return ThresholdRule(name=name, between=between_of[modality], kind="above", threshold=threshold)


def within_threshold(between: str, *, threshold: float = BALANCED_WITHIN) -> ThresholdRule:
    """Select the samples with |D| <= T: nearly equal confidence on both sides. The class is mmaudit's."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold of the balanced subset is {threshold}; it lies in [0, 1]")
    return ThresholdRule(name=balanced_name(threshold), between=between, kind="within", threshold=threshold)


def by_mixture(scores: ScoreFiles, side: str, *, between: str, posterior: float = 0.5) -> ThresholdRule:
    """Select by the gap mixture: `balanced` has P(balanced) >= posterior, `imbalanced` the rest."""
    if side not in ("balanced", "imbalanced"):
        raise ConfigError(f"--gmm {side}: unknown component; {choices(side, ('balanced', 'imbalanced'))}")
    if not 0 < posterior <= 1:
        raise ConfigError(f"the posterior of a mixture's subset is {posterior}; it lies in (0, 1]")
    _require_column(scores, "p_balanced", f"--gmm {side}")
    return ThresholdRule(name=f"gmm-{side}", between=between, kind=side, threshold=posterior)


def by_balance(scores: ScoreFiles, side: str, amount: str, *, between: str) -> ExtremeRule:
    """Select the `most-balanced` or `least-balanced` samples, a number or a share (`20%`), in proportion per split."""
    _require_column(scores, "balance", f"--subset {side}")
    return ExtremeRule(
        name=f"{side}-{amount.replace('%', 'pc')}",
        between=between,
        keep_most=side == "most-balanced",
        amount=parse_amount(f"--subset {side}:{amount}", amount),
        num_cells=len(scores.splits),
    )


def at_random(
    scores: ScoreFiles, *, between: str, amount: str = "", like: tuple[str, Counts] | None = None
) -> RandomRule:
    """Select at random: an amount, or as many per split and class as in `like` (name, counts (s * k,))."""
    if bool(amount) == (like is not None):
        raise ConfigError("--subset random: pass either an amount, as random:500 or random:20%, or --like MANIFEST")
    num_classes = len(scores.classes)
    return RandomRule(
        name=f"random-{amount.replace('%', 'pc')}" if like is None else f"random-like-{like[0]}",
        between=between,
        num_classes=num_classes,
        num_cells=len(scores.splits) * num_classes,
        amount=None if like is not None else parse_amount(f"--subset random:{amount}", amount),
        like=None if like is None else like[1],
    )


def all_samples(between: str, *, name: str) -> ThresholdRule:
    """Select all samples that have this discrepancy, the base of --intersect and --exclude."""
    return ThresholdRule(name=name, between=between, kind="within", threshold=1.0)


def parse_subset(
    scores: ScoreFiles, text: str, *, between: str | None, like: tuple[str, Counts] | None = None
) -> SelectionRule:
    """Parse `MODALITY-preferred`, `balanced[:T]`, `most-balanced:N`, `least-balanced:N`, `random:N`; N may be `20%`."""
    name, _, value = text.partition(":")
    by_side = [f"{modality}-preferred" for modality in positive_sides(scores.modalities, between)]
    names = [*by_side, "balanced", "most-balanced", "least-balanced", "random"]
    if name not in names:
        raise ConfigError(f"--subset {text}: unknown subset; {choices(name, names)}")
    if name in by_side:
        modality = name.removesuffix("-preferred")
        if value:
            raise ConfigError(f"--subset {text}: {name} has no threshold; use --dominated {modality}:{value}")
        return prefer_modality(scores.modalities, modality, between=between)
    between_or_default = between or scores.default_between()
    if name == "balanced":
        return within_threshold(
            between_or_default, threshold=_parse_number("--subset", text, value or str(BALANCED_WITHIN))
        )
    if name == "random":
        return at_random(scores, between=between_or_default, amount=value, like=like)
    return by_balance(scores, name, value, between=between_or_default)


def parse_dominated(modalities: tuple[str, ...], text: str, *, between: str | None = None) -> ThresholdRule:
    """Parse `MODALITY:T`."""
    modality, colon, value = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--dominated {text}: not of the form MODALITY:T, such as {modalities[0]}:0.2")
    return prefer_modality(modalities, modality, threshold=_parse_number("--dominated", text, value), between=between)


def parse_amount(option: str, text: str) -> Amount:
    """Parse a number of samples, or a share such as `20%`."""
    share = text.endswith("%")
    try:
        value = float(text[:-1]) / 100 if share else int(text)
    except ValueError as error:
        raise ConfigError(
            f"{option}: {text!r} is neither a number of samples, such as 500, nor a share, such as 20%"
        ) from error
    if not (0 < value <= 1 if share else value >= 1):
        raise ConfigError(
            f"{option}: {text} is out of range; use a number of at least 1, or a share above 0% up to 100%"
        )
    return Amount(share=value) if share else Amount(number=int(value))


def _parse_number(option: str, text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {value!r} is not a number") from error


def _require_column(scores: ScoreFiles, column: str, option: str) -> None:
    if column not in scores.columns:
        raise ManifestError(
            f"{option}: the score table has no column {column}: rescore with mmaudit score, or use --balanced"
        )


def _balance_scores(batch: ScoreBatch) -> NDArray[np.float64]:
    balance = batch.numbers("balance")
    return np.full(len(batch), np.nan) if balance is None else balance.astype(np.float64)


def _against_others(modalities: tuple[str, ...], name: str) -> str:
    if len(modalities) > 2:
        return name
    return f"{name}:{next(modality for modality in modalities if modality != name)}"
