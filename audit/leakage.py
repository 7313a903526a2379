"""Leakage between splits: shared ids, contents, near duplicates and groups.

Every pair of splits is compared. Whatever a held-out split shares with the split it is held out from is a finding, and
every finding is a leak; what could not be tested, or is no leak by itself, is a note. All rules here are mmaudit's own.
n is the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from .dataset.columns import SPLITS
from .dataset.samples import Samples
from .features.encode import EncodeTask
from .features.encoded_samples import Status
from .features.matrix import FeatureMatrix, Inputs
from .media.files import kind_of_path
from .near_duplicates import MIN_ROWS, Links, SplitPair, is_present, search_near_duplicates
from .parsing import check_ranges
from .workers import Progress, fixed_threads, no_progress

GROUP_NAMES = (
    *("actor", "speaker", "subject", "participant", "person", "identity", "user", "patient", "session", "recording"),
    *("video", "video_id", "movie", "source", "song", "group"),
)
EXAMPLES = 5

_PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))
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

    `recurs` (n,): equal contents occur by chance, as short texts do, and are then notes, not findings. `kind` is that
    of the modality: nearly equal texts are notes, and so are equal vectors of samples with different labels.
    """

    modality: str
    content: NDArray[np.object_]
    recurs: NDArray[np.bool_]
    kind: str = "features"
    inputs: Inputs | None = None

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
        )


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
    """All findings, and notes on what could not be tested or is no leak by itself."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def leaks(self) -> bool:
        """Return whether anything is shared: every finding is a leak."""
        return bool(self.findings)

    def to_json(self) -> dict[str, object]:
        """Return the findings and notes as plain lists and dicts."""
        findings = [asdict(finding) for finding in self.findings]
        return {"leaks": self.leaks, "findings": findings, "notes": list(self.notes)}


Messages = list[Finding | str]  # findings, and notes


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
    pairs, messages = _pair_splits(samples)
    columns, column_notes = _group_columns(samples, groups or {})
    joint_keys = _joint_keys(modality_contents)
    label = samples.label if samples.task == "classification" else None
    for pair_index, pair in enumerate(pairs):
        messages += _shared_ids(pair)
        messages += _same_samples(pair, modality_contents, joint_keys, label)
        for modality_index, modality_content in enumerate(modality_contents):
            messages += _same_contents(pair, modality_content, joint_keys, label, max_partners=config.max_partners)
            messages += _near_duplicates(pair, modality_content, label, config=config, seed=seed)
            num_done = pair_index * len(modality_contents) + modality_index + 1
            progress("leakage", num_done, len(pairs) * len(modality_contents))
        messages += [finding for name, column in columns.items() if (finding := _shared_groups(pair, name, column))]
    messages += column_notes if pairs else []
    return Leakage(
        findings=tuple(message for message in messages if isinstance(message, Finding)),
        notes=tuple(message for message in messages if isinstance(message, str)),
    )


def group_columns(names: Sequence[str]) -> list[str]:
    """Return the names of columns that usually hold groups: actor, Speaker, subject_id.

    `names` must not include the id or a modality, since a column called video may be one.
    """
    folded = {name: name.casefold() for name in names}
    return [name for name in names if {folded[name], folded[name].removesuffix("_id")} & set(GROUP_NAMES)]


def _pair_splits(samples: Samples) -> tuple[list[SplitPair], Messages]:
    order = np.array(sorted(range(len(samples)), key=samples.sample_id.__getitem__), dtype=np.intp)
    rows = {name: order[samples.split[order] == name] for name in SPLITS}
    ids = samples.sample_id
    pairs = [
        SplitPair(between=pair, reference_rows=rows[pair[0]], heldout_rows=rows[pair[1]], sample_id=ids)
        for pair in _PAIRS
        if len(rows[pair[0]]) and len(rows[pair[1]])
    ]
    consequence = "only the other splits are compared" if pairs else "nothing to compare"
    return pairs, [f"no {name} split: {consequence}" for name in ("train", "test") if not len(rows[name])]


def _finding(pair: SplitPair, what: str, name: str, links: Links, *, of: int, description: str) -> list[Finding]:
    """Return a list of one finding with examples, or an empty list without links."""
    if not links:
        return []
    sample_id, between, count = pair.sample_id, pair.between, len(links)
    examples = tuple((sample_id[row], sample_id[match]) for row, match in list(links.items())[:EXAMPLES])
    message = f"{count} of {of} {description}: {examples[0][0]} and {examples[0][1]}"
    numbers = {"count": count, "of": of, "samples": count}
    return [Finding(what=what, name=name, between=between, examples=examples, message=message, **numbers)]


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
    findings = _finding(pair, "ids", "sample", links, of=num_ids, description=description)
    description = f"{heldout} ids have the file name of a {reference} id in another folder; not counted as duplicates"
    note = [
        finding.message
        for finding in _finding(pair, "ids", "sample", folder_links, of=num_ids, description=description)
    ]
    return [*findings, *note]


def _path_suffixes(name: str) -> list[str]:
    """Return a name in lower case without extension, then the same with ever fewer leading folders."""
    parts = [part for part in name.casefold().replace("\\", "/").split("/") if part not in ("", ".")] or [name]
    extension = PurePosixPath(parts[-1]).suffix
    if kind_of_path(parts[-1]) or extension in _DATA_EXTENSIONS:  # neither .5 of clip.5 nor .sad of s01.sad is one
        parts[-1] = parts[-1].removesuffix(extension)
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _as_notes(messages: Messages, reason: str) -> Messages:
    return [f"{message.message}; {reason}" if isinstance(message, Finding) else message for message in messages]


_BY_CHANCE = "not a leak by itself: such contents recur by chance"
_OTHER_LABELS = "not counted as copies: the features cannot tell these samples apart"


def _copies(
    pair: SplitPair, what: str, name: str, links: Links, *, of: int, description: str, label: NDArray[np.int32] | None
) -> Messages:
    """Return the findings of copies with the same label and, apart, of those whose label differs from the original's.

    `label` (n,) is None for tasks without classes: then no label differs.
    """
    differs = {row: match for row, match in links.items() if label is not None and label[row] != label[match]}
    same = {row: match for row, match in links.items() if row not in differs}
    other = f"{description} of another label"
    return [
        *_finding(pair, what, name, same, of=of, description=description),
        *_finding(pair, f"{what} of another label", name, differs, of=of, description=other),
    ]


def _joint_keys(modality_contents: Sequence[ModalityContent]) -> NDArray[np.object_]:
    """Return one key for each sample (n,), from the contents of all modalities, missing ones included."""
    parts = zip(*(modality_content.content.tolist() for modality_content in modality_contents), strict=True)
    return np.array(["\0".join(part or "" for part in row) for row in parts], dtype=object)


def _link_equal(pair: SplitPair, keys: NDArray[np.object_], label: NDArray[np.int32] | None) -> tuple[Links, int]:
    """Link held-out rows to a reference row of equal key (n,), None where missing; count those with a key.

    The first such row of the same label, if there is one, else the first.
    """
    labels = [0] * len(keys) if label is None else label.tolist()
    first_row: dict[object, int] = {}
    for row in reversed(pair.reference_rows.tolist()):
        if keys[row] is not None:
            first_row[keys[row]] = first_row[keys[row], labels[row]] = row
    present_rows = [row for row in pair.heldout_rows.tolist() if keys[row] is not None]
    links = {row: first_row.get((keys[row], labels[row]), first_row.get(keys[row], -1)) for row in present_rows}
    return {row: match for row, match in links.items() if match >= 0}, len(present_rows)


def _same_samples(
    pair: SplitPair,
    modality_contents: Sequence[ModalityContent],
    joint_keys: NDArray[np.object_],
    label: NDArray[np.int32] | None,
) -> Messages:
    """Find samples that are equal in every modality."""
    if len(modality_contents) < 2:
        return []  # `_same_contents` finds the same
    is_complete = np.logical_and.reduce([is_present(modality.content) for modality in modality_contents])
    recurs = np.logical_and.reduce([modality.recurs for modality in modality_contents])
    links, num_complete = _link_equal(pair, np.where(is_complete, joint_keys, np.array(None)), label)
    description = f"{pair.between[1]} samples equal in every modality to a {pair.between[0]} sample"
    copies = partial(_copies, pair, "content", "sample", of=num_complete, description=description, label=label)
    return copies(_where(links, ~recurs)) + _as_notes(copies(_where(links, recurs)), _BY_CHANCE)


def _where(links: Links, mask: NDArray[np.bool_]) -> Links:
    return {row: match for row, match in links.items() if mask[row]}


def _same_contents(
    pair: SplitPair,
    modality_content: ModalityContent,
    joint_keys: NDArray[np.object_],
    label: NDArray[np.int32] | None,
    *,
    max_partners: int,
) -> Messages:
    """Find contents of one modality in both splits; one with many different partners is a placeholder, and a note."""
    content, modality = modality_content.content, modality_content.modality
    shared, num_present = _link_equal(pair, content, label)
    partners: dict[str, set[str]] = {}
    for row in pair.reference_rows.tolist():
        partners.setdefault(content[row], set()).add(joint_keys[row])
    links = {row: match for row, match in shared.items() if len(partners[content[row]]) <= max_partners}
    description = f"{pair.between[1]} samples with the same {modality} as a {pair.between[0]} sample"
    copies = partial(_copies, pair, "content", modality, of=num_present, description=description, label=label)
    messages = _apart(copies(_where(links, ~modality_content.recurs)), modality_content)
    messages += _as_notes(copies(_where(links, modality_content.recurs)), _BY_CHANCE)
    if len(shared) > len(links):
        messages.append(
            f"{modality}: {len(shared) - len(links)} {pair.between[1]} samples have content that occurs with more "
            f"than {max_partners} different partners in {pair.between[0]}: placeholders, not counted"
        )
    return messages


def _apart(messages: Messages, modality_content: ModalityContent) -> Messages:
    """Return vectors equal to those of another label as notes; a file or text in both splits is a leak in any case."""
    if modality_content.kind != "features":
        return messages
    is_other = [isinstance(message, Finding) and message.what.endswith("another label") for message in messages]
    return [
        entry
        for message, other in zip(messages, is_other, strict=True)
        for entry in (_as_notes([message], _OTHER_LABELS) if other else [message])
    ]


def _shared_groups(pair: SplitPair, name: str, column: NDArray[np.object_]) -> Finding | None:
    """Find groups that occur in both splits."""
    reference_groups = {value for value in column[pair.reference_rows] if value is not None}
    heldout_groups = {value for value in column[pair.heldout_rows] if value is not None}
    shared_groups = sorted(reference_groups & heldout_groups)
    if not shared_groups:
        return None
    between, count, of = pair.between, len(shared_groups), len(heldout_groups)
    message = f"{count} of {of} {between[1]} {_plural(name)} also in {between[0]}"
    examples = tuple((value, value) for value in shared_groups[:EXAMPLES])
    samples = sum(value in reference_groups for value in column[pair.heldout_rows])
    numbers = {"count": count, "of": of, "samples": samples}
    return Finding(what="groups", name=name, between=between, examples=examples, message=message, **numbers)


def _plural(name: str) -> str:
    """Return the plural of a column name: actors, identities, classes, and videos for video_id."""
    word = name.casefold().removesuffix("_id").replace("_", " ")
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def _group_columns(
    samples: Samples, groups: Mapping[str, NDArray[np.object_]]
) -> tuple[dict[str, NDArray[np.object_]], Messages]:
    """Return the distinct columns that hold groups, and notes on the columns that do not."""
    columns = dict(groups)
    if samples.group is not None:  # samples without a group have their id there
        columns.setdefault("group", np.where(samples.group == samples.sample_id, np.array(None), samples.group))
    group_columns: dict[str, NDArray[np.object_]] = {}
    seen_partitions: set[bytes] = set()
    messages: Messages = []
    for name in sorted(columns, key="group".__eq__):  # the least specific name last
        values = columns[name].tolist()
        column = np.array([None if value is None or value != value else str(value) for value in values], dtype=object)
        code_of_value = {value: index for index, value in enumerate(dict.fromkeys(column.tolist()))}
        partition = np.array([-1 if value is None else code_of_value[value] for value in column]).tobytes()
        num_distinct, num_present = len(code_of_value.keys() - {None}), int(is_present(column).sum())
        if num_distinct < 2 or num_distinct == num_present:
            reason = "has a different value in every row" if num_distinct > 1 else f"has {num_distinct} distinct values"
            messages.append(f"column {name!r} {reason}: not used as groups")
        elif partition not in seen_partitions:
            group_columns[name] = column
        seen_partitions.add(partition)
    return group_columns, messages


def _near_duplicates(
    pair: SplitPair,
    modality_content: ModalityContent,
    label: NDArray[np.int32] | None,
    *,
    config: LeakageConfig,
    seed: int,
) -> Messages:
    """Find held-out samples nearer to a reference sample than by chance; those of equal content are left out."""
    content, modality = modality_content.content, modality_content.modality
    if modality_content.inputs is None:
        return []
    search = search_near_duplicates(pair, content, modality_content.inputs, config=config, seed=seed)
    if search is None:
        return []
    reference, heldout = pair.between
    prefix = f"{modality}, near duplicates of {heldout} in {reference}"
    if isinstance(search, str):
        return [f"{prefix}: not tested: {search}"]
    description = f"{heldout} samples with nearly the same {modality} as a {reference} sample"
    messages = _copies(
        pair, "near duplicates", modality, search.links, of=search.num_tested, description=description, label=label
    )
    is_text = modality_content.kind == "text"
    messages = _as_notes(messages, _BY_CHANCE) if is_text else _apart(messages, modality_content)
    if search.num_searched < search.num_reference or search.num_tested < search.num_heldout:
        messages.append(
            f"{prefix}: {search.num_tested} of {search.num_heldout} {heldout} samples were compared with "
            f"{search.num_searched} of {search.num_reference} {reference} samples"
        )
    return messages
