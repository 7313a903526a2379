"""Leakage between splits: shared ids, contents, near duplicates and groups.

Every pair of splits is compared. Whatever a held-out split shares with the split it is held out from is a finding, and
every finding is a leak; what could not be tested, or is no leak by itself, is a note. All rules here are mmaudit's own.
n is the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from .dataset.samples import Samples
from .features.cached_matrix import FeatureMatrix
from .features.descriptors import Fingerprints
from .features.encode import EncodeTask
from .features.encoded_samples import Status
from .features.matrix import Inputs
from .findings import (
    BY_CHANCE,
    OTHER_LABEL,
    Finding,
    Leakage,
    Links,
    Messages,
    SplitPair,
    copy_findings,
    is_present,
    link_findings,
    pair_splits,
)
from .group_overlap import GroupColumn, group_columns, likeness, shared_groups
from .hashing import canonical_order
from .media.files import kind_of_path
from .near_duplicates import MIN_ROWS, search_near_duplicates
from .parsing import check_ranges
from .workers import Progress, fixed_threads, no_progress

_DATA_EXTENSIONS = {".npy", ".npz", ".pt", ".pth", ".h5", ".mat", ".pkl", ".txt", ".json", ".csv", ".parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageConfig:
    """Thresholds of duplicates. All values are mmaudit's own.

    Args:
        ratio: A near duplicate is nearer than this fraction of the distance to the `neighbours`-th train row.
        neighbours: Rank of that row; as many train rows that lie equally near form a cluster and are not copies.
        false_alarms: Near duplicates expected by chance in clean data, for each modality and pair of splits.
        max_partners: Contents with more different partners in train than this are placeholders, such as silence.
        max_train: Train rows that near duplicates are searched among; of more rows a sample by hash(seed, id).
        max_test: Held-out rows that are compared; of more rows a sample by hash(seed, id).

    Raises:
        ConfigError: A value is out of range.
    """

    ratio: float = 0.3
    neighbours: int = 5
    false_alarms: float = 0.01
    max_partners: int = 20
    max_train: int = 200_000
    max_test: int = 20_000

    def __post_init__(self) -> None:
        check_ranges("leakage", self, ratio="(0, 1)", neighbours="[3, inf)", false_alarms="(0, 1)")
        at_least_min_rows = f"[{MIN_ROWS}, inf)"
        check_ranges("leakage", self, max_partners="[1, inf)", max_train=at_least_min_rows, max_test=at_least_min_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityContent:
    """One modality of n samples: `content` (n,) holds digests, None where missing, and `inputs` the features.

    `fingerprints` are those of the media, if it has them.

    `recurs` (n,): equal contents occur by chance, as short texts do, and are then notes, not findings. `kind` is that
    of the modality: nearly equal texts are notes, and so are equal vectors of samples with different labels.
    """

    modality: str
    content: NDArray[np.object_]
    recurs: NDArray[np.bool_]
    kind: str = "features"
    inputs: Inputs | None = None
    fingerprints: Fingerprints | None = None

    @property
    def other_label(self) -> str:
        """Why copies with another label are no leak; "" if they are: a file or text in both splits always is."""
        return OTHER_LABEL if self.kind == "features" else ""

    @classmethod
    def of(cls, status: Status, tasks: Sequence[EncodeTask]) -> ModalityContent:
        """Load one modality of all samples of an encoded dataset."""
        modality = status.modality
        return cls(
            modality=modality.name,
            content=np.where(status.usable, status.content.astype(str).astype(object), np.array(None)),
            recurs=status.recurs,
            kind=modality.kind,
            inputs=FeatureMatrix.of(tasks, status, np.arange(len(status.usable))),
            fingerprints=Fingerprints.of(tasks, modality),
        )


@fixed_threads()
def find_leakage(
    samples: Samples,
    modality_contents: Sequence[ModalityContent],
    *,
    groups: Mapping[str, NDArray[np.object_]] | None = None,
    config: LeakageConfig | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Leakage:
    """Find what train, validation and test share. The order of rows does not matter.

    Args:
        samples: Ids, splits and, if any, groups of n samples.
        modality_contents: Digests and features of every modality.
        groups: Further group columns by name, each (n,), None where unknown; `samples.group` is always compared.
        config: Thresholds of duplicates.
        seed: Seed of the samples of rows and of the random projections.
        progress: Function called after each modality of each pair of splits.

    Returns:
        Findings, each of which is a leak, and notes.
    """
    config = config or LeakageConfig()
    pairs, messages = pair_splits(samples)
    columns, column_notes = group_columns(samples, groups or {})
    alike = cache(partial(_likeness, samples, modality_contents, seed=seed))
    joint_keys = _joint_keys(modality_contents)
    not_searched: set[str] = set()
    for pair_index, pair in enumerate(pairs):
        messages += _shared_ids(pair)
        messages += _same_samples(pair, modality_contents, joint_keys)
        for modality_index, modality_content in enumerate(modality_contents):
            messages += _same_contents(pair, modality_content, joint_keys, max_partners=config.max_partners)
            near, is_searched = _near_duplicates(pair, modality_content, config=config, seed=seed)
            messages += near
            if not is_searched:
                not_searched.add(modality_content.modality)
            num_done = pair_index * len(modality_contents) + modality_index + 1
            progress("leakage", num_done, len(pairs) * len(modality_contents))
        for column in columns:
            messages += shared_groups(pair, column, alike)
    messages += column_notes if pairs else []
    return Leakage(
        findings=tuple(message for message in messages if isinstance(message, Finding)),
        notes=tuple(message for message in messages if isinstance(message, str)),
        compared=tuple(pair.between for pair in pairs),
        sensitivity=_sensitivity(modality_contents, not_searched) if pairs else (),
    )


_SENSITIVITY = {  # ours: of planted copies benchmarks/leaks.py finds this share or more, see docs/log.md
    "image": "8 of 10 copies saved again, brightened, shifted by a pixel or cropped by 10%; none mirrored or turned",
    "video": "8 of 10 copies saved again, and where scenes differ those brightened or cropped by 10%; none mirrored",
    "audio": "8 of 10 copies saved again, made quieter, trimmed or played faster by 5%; none noisy, no steady tones",
    "text": "equal texts; similar ones are notes",
    "features": "9 of 10 copies with noise of 1% of each number's spread",
}


def _sensitivity(modality_contents: Sequence[ModalityContent], not_searched: set[str]) -> tuple[str, ...]:
    """Return which copies are found, one line for each modality; of those `not_searched` only equal ones."""
    lines = []
    for content in modality_contents:
        if content.modality in not_searched:
            lines.append(f"{content.modality}: equal contents only")
            continue
        kind = "video" if content.kind == "frames" else content.kind
        if kind not in ("text", "features") and content.fingerprints is None:
            kind = "features"
        lines.append(f"{content.modality}: {_SENSITIVITY[kind]}")
    return (*lines, "whether features know the labels is tested by mmaudit score")


def _shared_ids(pair: SplitPair) -> Messages:
    """Find ids that are equal except for case, extension or leading folders; differing folders are only noted."""
    row_of_full_id: dict[str, int] = {}
    row_of_ending: dict[str, int] = {}
    for row in pair.reference_rows.tolist():
        endings = _path_suffixes(pair.sample_id[row])
        row_of_full_id.setdefault(endings[0], row)
        for ending in endings:
            row_of_ending.setdefault(ending, row)
    links: Links = {}
    folder_links: Links = {}  # test/0001.wav and train/0001.wav may well be two clips
    for row in pair.heldout_rows.tolist():
        endings = _path_suffixes(pair.sample_id[row])
        matches = [row_of_full_id[ending] for ending in endings if ending in row_of_full_id]
        matches += [row_of_ending[endings[0]]] if endings[0] in row_of_ending else []
        if matches:
            links[row] = matches[0]
        elif endings[-1] in row_of_ending:
            folder_links[row] = row_of_ending[endings[-1]]
    reference, heldout = pair.between
    num_ids = len(pair.heldout_rows)
    description = f"{heldout} ids also in {reference}, up to case, extension or folder"
    findings = link_findings(pair, "ids", "sample", links, of=num_ids, description=description)
    description = f"{heldout} ids have the file name of a {reference} id in another folder; not counted as duplicates"
    note = [
        finding.message
        for finding in link_findings(pair, "ids", "sample", folder_links, of=num_ids, description=description)
    ]
    return [*findings, *note]


def _path_suffixes(name: str) -> list[str]:
    """Return a name in lower case without extension, then the same with ever fewer leading folders."""
    parts = [part for part in name.casefold().replace("\\", "/").split("/") if part not in ("", ".")] or [name]
    extension = PurePosixPath(parts[-1]).suffix
    if kind_of_path(parts[-1]) or extension in _DATA_EXTENSIONS:  # neither .5 of clip.5 nor .sad of s01.sad is one
        parts[-1] = parts[-1].removesuffix(extension)
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _likeness(
    samples: Samples, modality_contents: Sequence[ModalityContent], column: GroupColumn, *, seed: int
) -> float | None:
    """Return how alike samples of the same value are, as z; see `likeness`."""
    inputs = [
        (content.inputs, is_present(content.content)) for content in modality_contents if content.inputs is not None
    ]
    values, order = column.values, canonical_order(samples.sample_id)
    return likeness(inputs, values, samples.label, order=order, seed=seed)


def _joint_keys(modality_contents: Sequence[ModalityContent]) -> NDArray[np.object_]:
    """Return one key for each sample (n,), from the contents of all modalities, missing ones included."""
    parts = zip(*(modality_content.content.tolist() for modality_content in modality_contents), strict=True)
    return np.array(["\0".join(part or "" for part in row) for row in parts], dtype=object)


def _link_equal(pair: SplitPair, keys: NDArray[np.object_]) -> tuple[Links, int]:
    """Link held-out rows to a reference row of equal key (n,), None where missing; count those with a key.

    The first such row of the same label, if there is one, else the first.
    """
    labels = [0] * len(keys) if pair.label is None else pair.label.tolist()
    first_row: dict[object, int] = {}
    for row in reversed(pair.reference_rows.tolist()):
        if keys[row] is not None:
            first_row[keys[row]] = first_row[keys[row], labels[row]] = row
    present_rows = [row for row in pair.heldout_rows.tolist() if keys[row] is not None]
    links = {row: first_row.get((keys[row], labels[row]), first_row.get(keys[row], -1)) for row in present_rows}
    return {row: match for row, match in links.items() if match >= 0}, len(present_rows)


def _same_samples(
    pair: SplitPair, modality_contents: Sequence[ModalityContent], joint_keys: NDArray[np.object_]
) -> Messages:
    """Find samples that are equal in every modality."""
    if len(modality_contents) < 2:
        return []  # `_same_contents` finds the same
    is_complete = np.logical_and.reduce([is_present(modality.content) for modality in modality_contents])
    recurs = np.logical_and.reduce([modality.recurs for modality in modality_contents])
    links, num_complete = _link_equal(pair, np.where(is_complete, joint_keys, np.array(None)))
    description = f"{pair.between[1]} samples equal in every modality to a {pair.between[0]} sample"
    copies = partial(copy_findings, pair, "content", "sample", of=num_complete, description=description)
    return copies(_where(links, ~recurs)) + copies(_where(links, recurs), note=BY_CHANCE)


def _where(links: Links, mask: NDArray[np.bool_]) -> Links:
    return {row: match for row, match in links.items() if mask[row]}


def _same_contents(
    pair: SplitPair, modality_content: ModalityContent, joint_keys: NDArray[np.object_], *, max_partners: int
) -> Messages:
    """Find contents of one modality in both splits; one with many different partners is a placeholder, and a note."""
    content, modality, recurs = modality_content.content, modality_content.modality, modality_content.recurs
    shared, num_present = _link_equal(pair, content)
    partners: dict[str, set[str]] = {}
    for row in pair.reference_rows.tolist():
        partners.setdefault(content[row], set()).add(joint_keys[row])
    links = {row: match for row, match in shared.items() if len(partners[content[row]]) <= max_partners}
    description = f"{pair.between[1]} samples with the same {modality} as a {pair.between[0]} sample"
    copies = partial(copy_findings, pair, "content", modality, of=num_present, description=description)
    messages = copies(_where(links, ~recurs), other=modality_content.other_label)
    messages += copies(_where(links, recurs), note=BY_CHANCE)
    if len(shared) > len(links):
        messages.append(
            f"{modality}: {len(shared) - len(links)} {pair.between[1]} samples have content that occurs with more "
            f"than {max_partners} different partners in {pair.between[0]}: placeholders, not counted"
        )
    return messages


def _near_duplicates(
    pair: SplitPair, modality_content: ModalityContent, *, config: LeakageConfig, seed: int
) -> tuple[Messages, bool]:
    """Find held-out samples nearer to a reference sample than by chance; those of equal content are left out.

    Also returns whether the search was possible.
    """
    content, modality = modality_content.content, modality_content.modality
    if modality_content.inputs is None:
        return [], False
    search = search_near_duplicates(
        pair,
        content,
        modality_content.inputs,
        fingerprints=modality_content.fingerprints,
        config=config,
        seed=seed,
    )
    if search is None:
        return [], True
    reference, heldout = pair.between
    prefix = f"{modality}, near duplicates of {heldout} in {reference}"
    if isinstance(search, str):
        return [f"{prefix}: not tested: {search}"], False
    messages = copy_findings(
        pair,
        "near duplicates",
        modality,
        search.links,
        of=search.num_tested,
        description=f"{heldout} samples with nearly the same {modality} as a {reference} sample",
        note=BY_CHANCE if modality_content.kind == "text" else "",
        other=modality_content.other_label,
    )
    if search.num_searched < search.num_reference or search.num_tested < search.num_heldout:
        messages.append(
            f"{prefix}: {search.num_tested} of {search.num_heldout} {heldout} samples were compared with "
            f"{search.num_searched} of {search.num_reference} {reference} samples"
        )
    if 0 < search.num_fingerprints < search.num_tested:
        messages.append(f"{prefix}: {search.num_fingerprints} of them were compared by fingerprint, too")
    return messages, True
