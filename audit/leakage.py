"""Leakage: ids, contents, near duplicates and groups that splits share.

Every pair of splits is compared. Whatever a held-out split shares with the one it is held out from is a finding, and
every finding is a leak; what could not be tested, or proves nothing by itself, is a note. All rules here are ours.

Letters: n samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from .dataset.columns import SPLITS
from .dataset.modalities import kind_of_path
from .dataset.samples import Samples
from .errors import ConfigError
from .features.encode import EncodeTask, Status
from .features.matrix import FeatureMatrix, Inputs, Rows
from .hashing import hash_rank
from .near_duplicates import LEAST_FEATURES, Links, near_links
from .threads import fixed_threads
from .workers import Progress, no_progress

GROUP_NAMES = (
    *("actor", "speaker", "subject", "participant", "person", "identity", "user", "patient", "session", "recording"),
    *("video", "video_id", "movie", "source", "song", "group"),
)
LEAST_ROWS = 20  # rows from which the dimension of a cloud can be told
EXAMPLES = 5

_PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))
_DATA_EXTENSIONS = {".npy", ".npz", ".pt", ".pth", ".h5", ".mat", ".pkl", ".txt", ".json", ".csv", ".parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageConfig:
    """What counts as the same. All values are ours."""

    ratio: float = 0.3  # a near duplicate is nearer than this part of the distance to the `neighbours`-th row of train
    neighbours: int = 5  # so a place where so many of train lie equally near is a cluster, not copies
    false_alarms: float = 0.01  # near duplicates expected by chance, a modality and pair of splits, if all were clean
    most_partners: int = 20  # contents that stand beside more different partners in train are placeholders: silence
    most_train: int = 200_000  # rows that near duplicates are sought among; beyond it a sample by hash(seed, id)
    most_test: int = 20_000

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 < self.false_alarms < 1:
            raise ConfigError(
                f"leakage.ratio is {self.ratio}, leakage.false_alarms {self.false_alarms}; both lie between 0 and 1"
            )
        if self.neighbours < 3 or self.most_partners < 1:
            raise ConfigError(
                f"leakage.neighbours is {self.neighbours}, leakage.most_partners {self.most_partners}; "
                "at least 3 and 1 are needed"
            )
        if min(self.most_train, self.most_test) < LEAST_ROWS:
            raise ConfigError(
                f"leakage.most_train is {self.most_train}, leakage.most_test {self.most_test}; at least {LEAST_ROWS}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityContent:
    """One modality of n samples: content (n,) are digests, None where it is missing; `inputs` their features.

    `recurs`: equal contents come about by themselves, as short texts do, and are then noted, not found.
    """

    modality: str
    content: NDArray[np.object_]
    inputs: Inputs | None = None
    recurs: bool = False

    @classmethod
    def of(cls, status: Status, tasks: Sequence[EncodeTask]) -> ModalityContent:
        """Open one modality of all samples of an encoded dataset."""
        modality = status.modality
        return cls(
            modality=modality.name,
            content=np.where(status.usable, status.content.astype(str).astype(object), np.array(None)),
            inputs=FeatureMatrix.of(tasks, status, np.arange(len(status.usable))),
            recurs=modality.kind == "text" or (modality.length or LEAST_FEATURES) < LEAST_FEATURES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that two splits share. `what`: ids, content, near duplicates or groups.

    `name` is the modality or the column of groups; "sample" for ids, and for contents equal in every modality.
    `count` of `of` are samples of between[1], or its groups; `samples` of its samples are concerned. `examples` are
    ids (of between[1], of between[0]), or (group, group).
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
    """All that the splits share, and what could not be tested or proves nothing."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def leaks(self) -> bool:
        """Tell whether anything is shared: every finding is a leak."""
        return bool(self.findings)

    def to_json(self) -> dict[str, object]:
        """Give it as plain lists and dicts."""
        return {"leaks": self.leaks, "findings": [asdict(each) for each in self.findings], "notes": list(self.notes)}


Messages = list[Finding | str]  # findings, and notes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two splits: the rows of one, and of the one that is held out from it, both in the order of their ids."""

    between: tuple[str, str]
    known: Rows
    held: Rows
    sample_id: NDArray[np.object_]


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
    """Compare train, validation and test by ids, contents, features, and `groups`: by column, (n,), None where unknown.

    `samples.group` is looked at as well. Row order changes nothing.
    """
    config = config or LeakageConfig()
    pairs, messages = _pair_splits(samples)
    columns, unfit = _group_columns(samples, groups or {})
    joint = _joint(modality_contents)
    for index, pair in enumerate(pairs):
        messages += _shared_ids(pair)
        messages += _same_samples(pair, modality_contents, joint)
        for number, modality_content in enumerate(modality_contents):
            messages += _same_contents(pair, modality_content, joint, most_partners=config.most_partners)
            messages += _near_duplicates(pair, modality_content, config=config, seed=seed)
            progress("leakage", index * len(modality_contents) + number + 1, len(pairs) * len(modality_contents))
        messages += [found for name, column in columns.items() if (found := _shared_groups(pair, name, column))]
    messages += unfit if pairs else []
    return Leakage(
        findings=tuple(each for each in messages if isinstance(each, Finding)),
        notes=tuple(each for each in messages if isinstance(each, str)),
    )


def group_columns(names: Sequence[str]) -> list[str]:
    """Pick the columns that may say who or what a sample is of, by name: actor, Speaker, subject_id.

    `names` are those that are neither the id nor a modality: a column called video may well be one.
    """
    folded = {name: name.casefold() for name in names}
    return [name for name in names if {folded[name], folded[name].removesuffix("_id")} & set(GROUP_NAMES)]


def _pair_splits(samples: Samples) -> tuple[list[_Pair], Messages]:
    order = np.array(sorted(range(len(samples)), key=samples.sample_id.__getitem__), dtype=np.intp)
    rows = {name: order[samples.split[order] == name] for name in SPLITS}
    pairs = [
        _Pair(between=between, known=rows[between[0]], held=rows[between[1]], sample_id=samples.sample_id)
        for between in _PAIRS
        if len(rows[between[0]]) and len(rows[between[1]])
    ]
    left = "the others are compared" if pairs else "nothing to compare"
    return pairs, [f"no {name} split: {left}" for name in ("train", "test") if not len(rows[name])]


def _finding(pair: _Pair, what: str, name: str, links: Links, *, of: int, words: str) -> Messages:
    """Put links into words; nothing without a link."""
    if not links:
        return []
    examples = tuple((pair.sample_id[row], pair.sample_id[other]) for row, other in list(links.items())[:EXAMPLES])
    message = f"{len(links)} of {of} {words}: {examples[0][0]} and {examples[0][1]}"
    return [
        Finding(
            what=what,
            name=name,
            between=pair.between,
            count=len(links),
            of=of,
            samples=len(links),
            examples=examples,
            message=message,
        )
    ]


def _shared_ids(pair: _Pair) -> Messages:
    """Find ids that are one but for case, extension or folders in front. What differs in folders is noted only."""
    whole: dict[str, int] = {}
    ends: dict[str, int] = {}
    for row in pair.known.tolist():
        endings = _endings(pair.sample_id[row])
        whole.setdefault(endings[0], row)
        for ending in endings:
            ends.setdefault(ending, row)
    links: Links = {}
    elsewhere: Links = {}  # test/0001.wav and train/0001.wav: two clips, for all that is known
    for row in pair.held.tolist():
        endings = _endings(pair.sample_id[row])
        known = [whole[ending] for ending in endings if ending in whole]
        known += [ends[endings[0]]] if endings[0] in ends else []
        if known:
            links[row] = known[0]
        elif endings[-1] in ends:
            elsewhere[row] = ends[endings[-1]]
    words = f"{pair.between[1]} ids also in {pair.between[0]} but for case, extension or folder"
    messages = _finding(pair, "ids", "sample", links, of=len(pair.held), words=words)
    words = f"{pair.between[1]} ids name a file as {pair.between[0]} does, in another folder; not taken for the same"
    return messages + _as_notes(_finding(pair, "ids", "sample", elsewhere, of=len(pair.held), words=words))


def _endings(name: str) -> list[str]:
    """Give a name without case and extension: whole, then without one folder after another."""
    parts = [part for part in name.casefold().replace("\\", "/").split("/") if part not in ("", ".")] or [name]
    extension = PurePosixPath(parts[-1]).suffix
    if kind_of_path(parts[-1]) or extension in _DATA_EXTENSIONS:  # not the .5 of clip.5, nor the .sad of s01.sad
        parts[-1] = parts[-1].removesuffix(extension)
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _as_notes(messages: Messages) -> Messages:
    return [each.message if isinstance(each, Finding) else each for each in messages]


def _recurring(messages: Messages) -> Messages:
    return [f"{note}; no leak by itself: such contents recur" for note in _as_notes(messages)]


def _known(values: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.array([value is not None for value in values.tolist()], dtype=bool)


def _joint(modality_contents: Sequence[ModalityContent]) -> NDArray[np.object_]:
    """Give one key for each sample (n,) over all its contents, a missing one among them."""
    parts = zip(*(modality_content.content.tolist() for modality_content in modality_contents), strict=True)
    return np.array(["\0".join(part or "" for part in row) for row in parts], dtype=object)


def _same_samples(pair: _Pair, modality_contents: Sequence[ModalityContent], joint: NDArray[np.object_]) -> Messages:
    """Find samples that are equal in every modality."""
    if len(modality_contents) < 2:
        return []  # the modality's own contents say the same
    complete = np.logical_and.reduce([_known(modality_content.content) for modality_content in modality_contents])
    first = {joint[row]: row for row in reversed(pair.known.tolist()) if complete[row]}
    held = [row for row in pair.held.tolist() if complete[row]]
    links = {row: first[joint[row]] for row in held if joint[row] in first}
    words = f"{pair.between[1]} samples also in {pair.between[0]}, equal in every modality"
    messages = _finding(pair, "content", "sample", links, of=len(held), words=words)
    return _recurring(messages) if all(modality_content.recurs for modality_content in modality_contents) else messages


def _same_contents(
    pair: _Pair, modality_content: ModalityContent, joint: NDArray[np.object_], *, most_partners: int
) -> Messages:
    """Find contents of one modality on both sides; one beside many different partners is a placeholder, and a note."""
    content = modality_content.content
    first = {content[row]: row for row in reversed(pair.known.tolist()) if content[row] is not None}
    partners: dict[str, set[str]] = {}
    for row in pair.known.tolist():
        partners.setdefault(content[row], set()).add(joint[row])
    held = [row for row in pair.held.tolist() if content[row] is not None]
    shared = [row for row in held if content[row] in first]
    links = {row: first[content[row]] for row in shared if len(partners[content[row]]) <= most_partners}
    words = f"{pair.between[1]} samples with the same {modality_content.modality} as a {pair.between[0]} sample"
    messages = _finding(pair, "content", modality_content.modality, links, of=len(held), words=words)
    messages = _recurring(messages) if modality_content.recurs else messages
    if len(shared) > len(links):
        messages.append(
            f"{modality_content.modality}: {len(shared) - len(links)} {pair.between[1]} samples hold what stands with "
            f"more than {most_partners} different partners in {pair.between[0]}: placeholders, not counted"
        )
    return messages


def _shared_groups(pair: _Pair, name: str, column: NDArray[np.object_]) -> Finding | None:
    """Find groups that stand on both sides."""
    known = {value for value in column[pair.known] if value is not None}
    groups = {value for value in column[pair.held] if value is not None}
    shared = sorted(known & groups)
    if not shared:
        return None
    message = f"{len(shared)} of {len(groups)} {pair.between[1]} {_plural(name)} also in {pair.between[0]}"
    return Finding(
        what="groups",
        name=name,
        between=pair.between,
        count=len(shared),
        of=len(groups),
        samples=sum(value in known for value in column[pair.held]),
        examples=tuple((value, value) for value in shared[:EXAMPLES]),
        message=message,
    )


def _plural(name: str) -> str:
    """Name a column's values: actors, identities, classes, and videos for video_id."""
    word = name.casefold().removesuffix("_id").replace("_", " ")
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def _group_columns(
    samples: Samples, groups: Mapping[str, NDArray[np.object_]]
) -> tuple[dict[str, NDArray[np.object_]], Messages]:
    """Give the columns that are groups, once each, and why the others are none."""
    columns = dict(groups)
    if samples.group is not None:  # where the id stands for a null
        columns.setdefault("group", np.where(samples.group == samples.sample_id, np.array(None), samples.group))
    kept: dict[str, NDArray[np.object_]] = {}
    taken: set[bytes] = set()
    messages: Messages = []
    for name in sorted(columns, key="group".__eq__):  # the vaguest name last
        values = columns[name].tolist()
        column = np.array([None if v is None or v != v else str(v) for v in values], dtype=object)
        number = {value: index for index, value in enumerate(dict.fromkeys(column.tolist()))}
        same = np.array([-1 if value is None else number[value] for value in column]).tobytes()
        distinct, present = len(number.keys() - {None}), int(_known(column).sum())
        if distinct < 2 or distinct == present:
            found = "differs from row to row" if distinct > 1 else f"holds {distinct} values"
            messages.append(f"column {name!r} {found}: no groups")
        elif same not in taken:
            kept[name] = column
        taken.add(same)
    return kept, messages


def _near_duplicates(pair: _Pair, modality_content: ModalityContent, *, config: LeakageConfig, seed: int) -> Messages:
    """Find held-out samples nearer to a known one than chance explains; those of equal content are found already."""
    if modality_content.inputs is None:
        return []
    present = _known(modality_content.content)
    every, held = pair.known[present[pair.known]], pair.held[present[pair.held]]
    held = held[~np.isin(modality_content.content[held].astype(str), modality_content.content[every].astype(str))]
    known = _draw(pair, every, most=config.most_train, seed=seed)
    tested = _draw(pair, held, most=config.most_test, seed=seed)
    if not len(tested):
        return []
    begin = f"{modality_content.modality}, near duplicates of {pair.between[1]} in {pair.between[0]}"
    if len(known) < max(LEAST_ROWS, config.neighbours + 1):
        return [f"{begin}: not tested: {len(known)} samples are too few to tell"]
    links = near_links(
        modality_content.inputs,
        known,
        tested,
        ratio=config.ratio,
        neighbours=config.neighbours,
        false_alarms=config.false_alarms,
        seed=seed,
    )
    if isinstance(links, str):
        return [f"{begin}: not tested: {links}"]
    links = {row: links[row] for row in pair.held.tolist() if row in links}
    words = f"{pair.between[1]} samples with nearly the same {modality_content.modality} as a {pair.between[0]} sample"
    messages = _finding(pair, "near duplicates", modality_content.modality, links, of=len(tested), words=words)
    messages = _recurring(messages) if modality_content.recurs else messages
    if len(known) < len(every) or len(tested) < len(held):
        messages.append(f"{begin}: {len(tested)} of {len(held)} were sought among {len(known)} of {len(every)} samples")
    return messages


def _draw(pair: _Pair, rows: Rows, *, most: int, seed: int) -> Rows:
    """Order rows by hash(seed, id), and keep the first `most`."""
    key = hash_rank(pair.sample_id[rows], seed=seed, purpose="near duplicates")
    return rows[np.argsort(key, kind="stable")][:most]
