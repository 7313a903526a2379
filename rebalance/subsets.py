"""Subsets by threshold, by mixture, by extremes, and at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, ManifestError, choices
from ..audit.hashing import splitmix64
from .binning import Counts, share_total
from .score_tables import ScoreBatch, ScoreFiles
from .selection import RowOutcome, SelectionRule

BALANCED_WITHIN = 0.2  # |D| up to which a sample counts as balanced: mmaudit's default
_REASONS = {
    "above": "discrepancy-too-low",
    "within": "discrepancy-too-large",
    "balanced": "posterior-too-low",
    "imbalanced": "posterior-too-high",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdRule:
    """The samples on one side of a threshold: all of one cell, none of the other.

    kind: "above" D > T, "within" |D| <= T, "balanced" P(balanced) >= T, "imbalanced" P(balanced) < T.
    """

    name: str
    between: str
    kind: str
    threshold: float
    num_cells: int = 2
    by_score: bool = False

    @property
    def reason(self) -> str:
        """Why others are dropped."""
        return _REASONS[self.kind]

    def score(self, batch: ScoreBatch) -> NDArray[np.float64]:
        """Give what is compared with the threshold, (n,), NaN where it is missing."""
        if self.kind in ("above", "within"):
            values = batch.discrepancy(self.between).astype(np.float64)  # as evaluation compares, and as is recorded
            return values if self.kind == "above" else np.abs(values)
        posterior = batch.numbers("p_balanced")
        return np.full(len(batch), np.nan) if posterior is None else posterior.astype(np.float64)

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give 0 to those that are kept, 1 to the others, -1 to those that cannot be told."""
        score = self.score(batch)
        held = {
            "above": score > self.threshold,
            "within": score <= self.threshold,
            "balanced": score >= self.threshold,
            "imbalanced": score < self.threshold,
        }[self.kind]
        return np.where(np.isnan(score), -1, np.where(held, 0, 1)).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Keep all that are on the right side."""
        return np.array([counts[0], 0], dtype=np.int64)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Nothing is left to chance."""
        return batch.key

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        """Give what was compared."""
        return RowOutcome(score=self.score(batch), threshold=np.full(len(batch), self.threshold))


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many samples: a number, or a share of what there is in (0, 1]."""

    number: int | None = None
    share: float | None = None

    def of(self, counts: Counts) -> Counts:
        """Share the amount among cells (c,) in proportion to theirs."""
        total = int(counts.sum())
        if self.number is not None and self.number > total:
            raise ConfigError(f"{self.number} samples cannot be had: the largest is {total}, all that may be kept")
        return share_total(self.number if self.number is not None else round((self.share or 0) * total), counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtremeRule:
    """The most, or the least, balanced samples of each split, by the balance score of BSS; equals by hash."""

    name: str
    between: str
    most: bool
    amount: Amount
    num_cells: int
    by_score: bool = True

    @property
    def reason(self) -> str:
        """Why others are dropped."""
        return "balance-too-low" if self.most else "balance-too-high"

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give the split; -1 to those without a balance score."""
        return np.where(np.isnan(_balance_scores(batch)), -1, batch.split).astype(np.int32)

    def quotas(self, counts: Counts) -> Counts:
        """Share the amount among the splits."""
        return self.amount.of(counts)

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Give the balance score in its first 32 bits, the least first, and the hash in the others."""
        side = -1 if self.most else 1
        place = np.nan_to_num((1 + side * _balance_scores(batch)) / 2, nan=1.0)
        steps = (np.clip(place, 0, 1) * (2**32 - 1)).astype(np.uint64)
        return np.asarray((steps << np.uint64(32)) | (batch.key >> np.uint64(32)))

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        """Give the balance score, and that of the last sample kept."""
        last = 1 - 2 * chance.threshold if self.most else 2 * chance.threshold - 1
        return RowOutcome(score=_balance_scores(batch), threshold=last)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRule:
    """Samples by chance: an amount, or as many of each split and class as another manifest has; the control."""

    name: str
    between: str
    num_classes: int
    num_cells: int
    amount: Amount | None = None
    like: Counts | None = None  # (s * k,)
    by_score: bool = True

    @property
    def reason(self) -> str:
        """Why others are dropped."""
        return "not-drawn"

    def cells(self, batch: ScoreBatch) -> NDArray[np.int32]:
        """Give split by class."""
        return np.asarray(batch.split.astype(np.int32) * self.num_classes + batch.label)

    def quotas(self, counts: Counts) -> Counts:
        """Give the other manifest's counts, or share the amount by split and class."""
        if self.like is None:
            return (self.amount or Amount(share=1.0)).of(counts)
        if (self.like > counts).any():
            raise ManifestError(f"{self.name}: there are too few samples to draw as many of each class: fewer are left")
        return self.like

    def order(self, batch: ScoreBatch) -> NDArray[np.uint64]:
        """Draw by another hash than other rules do, or the control would be part of what it controls."""
        return splitmix64(batch.key)

    def explain(self, batch: ScoreBatch, cell: NDArray[np.int32], chance: RowOutcome) -> RowOutcome:
        """Give the hash, and the last one kept."""
        return chance


def positive_sides(modalities: tuple[str, ...], between: str | None) -> dict[str, str]:
    """Give the discrepancy, as ScoreTable.discrepancy takes it, in which each name is the positive side."""
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
    known = positive_sides(modalities, between)
    if modality not in known:
        raise ConfigError(f"no modality {modality!r} to prefer; {choices(modality, known)}")
    if not 0 <= threshold < 1:
        raise ConfigError(f"the threshold of a dominated subset is {threshold}; it lies in [0, 1)")
    name = f"{modality}-preferred" if threshold == 0 else f"{modality}-dominated-{threshold:g}"
    return ThresholdRule(name=name, between=known[modality], kind="above", threshold=threshold)


def within_threshold(between: str, *, threshold: float = BALANCED_WITHIN) -> ThresholdRule:
    """Select the samples with |D| <= T: nearly equal confidence on both sides. mmaudit's own class."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold of the balanced subset is {threshold}; it lies in [0, 1]")
    return ThresholdRule(name=f"balanced-within-{threshold:g}", between=between, kind="within", threshold=threshold)


def by_mixture(score_files: ScoreFiles, which: str, *, between: str, posterior: float = 0.5) -> ThresholdRule:
    """Select by the gap mixture: `balanced` has P(balanced) >= posterior, `imbalanced` the rest."""
    if which not in ("balanced", "imbalanced"):
        raise ConfigError(f"--gmm {which}: no such side of the mixture; {choices(which, ('balanced', 'imbalanced'))}")
    if not 0 < posterior <= 1:
        raise ConfigError(f"the posterior of a mixture's subset is {posterior}; it lies in (0, 1]")
    _require_column(score_files, "p_balanced", f"--gmm {which}")
    return ThresholdRule(name=f"gmm-{which}", between=between, kind=which, threshold=posterior)


def by_balance(score_files: ScoreFiles, which: str, amount: str, *, between: str) -> ExtremeRule:
    """Select the `most-balanced` or `least-balanced` samples, so many or such a share (`20%`) of each split."""
    _require_column(score_files, "balance", f"--subset {which}")
    return ExtremeRule(
        name=f"{which}-{amount.replace('%', 'pc')}",
        between=between,
        most=which == "most-balanced",
        amount=parse_amount(f"--subset {which}:{amount}", amount),
        num_cells=len(score_files.splits),
    )


def at_random(
    score_files: ScoreFiles, *, between: str, amount: str = "", like: tuple[str, Counts] | None = None
) -> RandomRule:
    """Select by chance: an amount, or `like` (name, counts (s * k,)), as many as it of each split and class."""
    if bool(amount) == (like is not None):
        raise ConfigError("--subset random: say how many, as random:500 or random:20%, or as what, by --like MANIFEST")
    k = len(score_files.classes)
    return RandomRule(
        name=f"random-{amount.replace('%', 'pc')}" if like is None else f"random-like-{like[0]}",
        between=between,
        num_classes=k,
        num_cells=len(score_files.splits) * k,
        amount=None if like is not None else parse_amount(f"--subset random:{amount}", amount),
        like=None if like is None else like[1],
    )


def all_samples(between: str, *, name: str) -> ThresholdRule:
    """Select all samples that have this discrepancy: what set algebra starts from."""
    return ThresholdRule(name=name, between=between, kind="within", threshold=1.0)


def parse_subset(
    score_files: ScoreFiles, text: str, *, between: str | None, like: tuple[str, Counts] | None = None
) -> SelectionRule:
    """Read `MODALITY-preferred`, `balanced[:T]`, `most-balanced:N`, `least-balanced:N`, `random:N`; N also as `20%`."""
    name, _, value = text.partition(":")
    by_side = [f"{modality}-preferred" for modality in positive_sides(score_files.modalities, between)]
    names = [*by_side, "balanced", "most-balanced", "least-balanced", "random"]
    if name not in names:
        raise ConfigError(f"--subset {text}: no such subset; {choices(name, names)}")
    if name in by_side:
        modality = name.removesuffix("-preferred")
        if value:
            raise ConfigError(f"--subset {text}: {name} takes no threshold; that is --dominated {modality}:{value}")
        return prefer_modality(score_files.modalities, modality, between=between)
    chosen = between or score_files.default_between()
    if name == "balanced":
        return within_threshold(chosen, threshold=_parse_number("--subset", text, value or str(BALANCED_WITHIN)))
    if name == "random":
        return at_random(score_files, between=chosen, amount=value, like=like)
    return by_balance(score_files, name, value, between=chosen)


def parse_dominated(modalities: tuple[str, ...], text: str, *, between: str | None = None) -> ThresholdRule:
    """Read `MODALITY:T`."""
    modality, colon, value = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--dominated {text}: not of the form MODALITY:T, such as {modalities[0]}:0.2")
    return prefer_modality(modalities, modality, threshold=_parse_number("--dominated", text, value), between=between)


def parse_amount(what: str, text: str) -> Amount:
    """Read a number of samples, or a share as `20%`."""
    share = text.endswith("%")
    try:
        value = float(text[:-1]) / 100 if share else int(text)
    except ValueError as error:
        raise ConfigError(
            f"{what}: {text!r} is no number of samples, such as 500, and no share, such as 20%"
        ) from error
    if not (0 < value <= 1 if share else value >= 1):
        raise ConfigError(f"{what}: {text} is nothing to keep; give a number above 0, or a share up to 100%")
    return Amount(share=value) if share else Amount(number=int(value))


def _parse_number(option: str, text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {value!r} is not a number") from error


def _require_column(score_files: ScoreFiles, column: str, what: str) -> None:
    if column not in score_files.columns:
        raise ManifestError(f"{what}: the score table has no {column}: rescore with mmaudit score, or use --balanced")


def _balance_scores(batch: ScoreBatch) -> NDArray[np.float64]:
    found = batch.numbers("balance")
    return np.full(len(batch), np.nan) if found is None else found.astype(np.float64)


def _against_others(modalities: tuple[str, ...], name: str) -> str:
    if len(modalities) > 2:
        return name
    return f"{name}:{next(other for other in modalities if other != name)}"
