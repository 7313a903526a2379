"""Findings: what two splits share, and which of it is a leak. n is the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from .dataset.columns import SPLITS
from .dataset.samples import Samples
from .features.matrix import RowIndex

EXAMPLES = 5
BY_CHANCE = "not a leak by itself: such contents recur by chance"
OTHER_LABEL = "not counted as copies: the features cannot tell these samples apart"

_PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))

Links = dict[int, int]  # tested row -> reference row that it repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPair:
    """Rows of a reference split and of the split held out from it, both sorted by id; labels (n,) of classes if any."""

    between: tuple[str, str]
    reference_rows: RowIndex
    heldout_rows: RowIndex
    sample_id: NDArray[np.object_]
    label: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of leak between two splits. `what`: ids, content, near duplicates or groups.

    Copies whose label differs from the original's are a finding of their own, "content of another label".

    `name` is the modality or the group column; "sample" for ids, and for contents equal in every modality.
    `count` of `of` samples or groups of between[1] are shared; `samples` is the number of its samples affected.
    `examples` are pairs of ids (of between[1], of between[0]), or (group, group).
    """

    what: str
    name: str
    between: tuple[str, str]
    count: int
    of: int
    samples: int
    examples: tuple[tuple[str, str], ...]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """All findings, notes on what could not be tested or is no leak by itself, and which copies the tests can find.

    `compared` are the pairs of splits, each as (reference, held out); without any, nothing was tested.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    compared: tuple[tuple[str, str], ...] = ()
    sensitivity: tuple[str, ...] = ()

    @property
    def leaks(self) -> bool:
        """Return whether anything is shared: every finding is a leak."""
        return bool(self.findings)

    def to_json(self) -> dict[str, object]:
        """Return the fields as plain lists and dicts."""
        findings = [asdict(finding) for finding in self.findings]
        return {
            "leaks": self.leaks,
            "findings": findings,
            "notes": list(self.notes),
            "compared": [list(pair) for pair in self.compared],
            "sensitivity": list(self.sensitivity),
        }


Messages = list[Finding | str]  # findings, and notes


def pair_splits(samples: Samples) -> tuple[list[SplitPair], Messages]:
    """Return the pairs of splits that have rows, rows sorted by id, and notes on those that have none."""
    order = np.array(sorted(range(len(samples)), key=samples.sample_id.__getitem__), dtype=np.intp)
    rows = {name: order[samples.split[order] == name] for name in SPLITS}
    label = samples.label if samples.task == "classification" else None
    pairs = [
        SplitPair(
            between=pair,
            reference_rows=rows[pair[0]],
            heldout_rows=rows[pair[1]],
            sample_id=samples.sample_id,
            label=label,
        )
        for pair in _PAIRS
        if len(rows[pair[0]]) and len(rows[pair[1]])
    ]
    consequence = "only the other splits are compared" if pairs else "nothing to compare"
    return pairs, [f"no {name} split: {consequence}" for name in ("train", "test") if not len(rows[name])]


def is_present(values: NDArray[np.object_]) -> NDArray[np.bool_]:
    """Return which values (n,) are not None."""
    return np.array([value is not None for value in values.tolist()], dtype=bool)


def link_findings(pair: SplitPair, what: str, name: str, links: Links, *, of: int, description: str) -> list[Finding]:
    """Return a list of one finding with examples, or an empty list without links."""
    if not links:
        return []
    sample_id, between, count = pair.sample_id, pair.between, len(links)
    examples = tuple((sample_id[row], sample_id[match]) for row, match in list(links.items())[:EXAMPLES])
    message = f"{count} of {of} {description}: {examples[0][0]} and {examples[0][1]}"
    numbers = {"count": count, "of": of, "samples": count}
    return [Finding(what=what, name=name, between=between, examples=examples, message=message, **numbers)]


def as_notes(findings: Sequence[Finding], reason: str) -> list[str]:
    """Return the messages of findings that are no leaks, with the reason."""
    return [f"{finding.message}; {reason}" for finding in findings]


def copy_findings(
    pair: SplitPair, what: str, name: str, links: Links, *, of: int, description: str, note: str = "", other: str = ""
) -> Messages:
    """Return the copies with the label of their original and, apart, those with another label.

    `note` is the reason why none of them is a leak, `other` why those of another label are none; "" if they are leaks.
    Tasks without classes have no other labels.
    """
    label = pair.label
    differs = {row: match for row, match in links.items() if label is not None and label[row] != label[match]}
    same = {row: match for row, match in links.items() if row not in differs}
    same_findings = link_findings(pair, what, name, same, of=of, description=description)
    description, what = f"{description} of another label", f"{what} of another label"
    other_findings = link_findings(pair, what, name, differs, of=of, description=description)
    note_of_other = note or other
    return [
        *(as_notes(same_findings, note) if note else same_findings),
        *(as_notes(other_findings, note_of_other) if note_of_other else other_findings),
    ]
