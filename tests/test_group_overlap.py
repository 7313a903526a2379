"""Columns that group the samples: shared values are leaks where they group, whatever the column is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import Samples
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.findings import Finding, Leakage, pair_splits
from mmaudit.audit.group_overlap import count_overlap, has_many_values, is_group_name, read_group_columns
from mmaudit.audit.leakage import ModalityContent, find_leakage

Objects = NDArray[np.object_]


def objects(values: Any) -> Objects:
    return np.array(list(values), dtype=object)


def make_samples(split: Any, *, group: Any = None, label: Any = None) -> Samples:
    split = objects(split)
    return Samples(
        sample_id=objects(f"s{row:05d}" for row in range(len(split))),
        label=np.zeros(len(split), np.int32) if label is None else np.asarray(label, np.int32),
        class_names=("a", "b", "c"),
        split=split,
        group=None if group is None else objects(group),
        paths=pa.table({}),
    )


def voices(count: int, *, speakers: int, strength: float, seed: int = 0) -> tuple[Samples, ModalityContent, Objects]:
    """Return samples split at random, features with a mean per speaker and class, and the speakers."""
    rng = np.random.default_rng(seed)
    speaker, label = rng.integers(0, speakers, count), rng.integers(0, 3, count)
    means = strength * rng.standard_normal((speakers, 16))
    matrix = rng.standard_normal((count, 16)) + means[speaker] + 2 * rng.standard_normal((3, 16))[label]
    content = ModalityContent(
        modality="audio",
        content=objects(f"c{row}" for row in range(count)),
        recurs=np.zeros(count, bool),
        inputs=MatrixInputs(matrix=matrix.astype(np.float32)),
    )
    split = np.where(rng.random(count) < 0.25, "test", "train")
    return make_samples(split, label=label), content, objects(f"v{number}" for number in speaker)


def findings(samples: Samples, content: ModalityContent, groups: Mapping[str, Objects]) -> Leakage:
    return find_leakage(samples, [content], groups=groups)


def single_finding(leakage: Leakage) -> Finding:
    assert len(leakage.findings) == 1, leakage
    return leakage.findings[0]


@pytest.mark.parametrize("name", ["participant_code", "subj", "uid", "dialogue_id", "youtube_id", "column_7"])
def test_groups_are_found_whatever_the_column_is_called(name: str) -> None:
    samples, content, speaker = voices(600, speakers=30, strength=0.7)
    finding = single_finding(findings(samples, content, {name: speaker}))
    assert (finding.what, finding.name) == ("groups", name)
    assert finding.count == 30


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["recording", "speaker", "column_7"])
def test_random_values_are_no_groups_whatever_the_column_is_called(name: str, seed: int) -> None:
    samples, content, _ = voices(600, speakers=30, strength=0.7, seed=seed)
    column = objects(str(number) for number in np.random.default_rng(100 + seed).integers(0, 40, 600))
    leakage = findings(samples, content, {name: column})
    assert not leakage.leaks
    assert len(leakage.notes) == 1
    assert "not more alike than others of their class" in leakage.notes[0]
    assert "a random split shares" in leakage.notes[0]


def test_quantities_whose_near_values_are_alike_are_no_groups() -> None:
    """An age of 20 to 60 years moves the features; a person's number, though it is one too, does not do so smoothly."""
    rng = np.random.default_rng(0)
    samples, content, _ = voices(800, speakers=1, strength=0.0)
    age = rng.integers(20, 60, 800)
    assert isinstance(content.inputs, MatrixInputs)
    content.inputs.matrix[:, 0] += 0.15 * age
    assert not findings(samples, content, {"years": objects(map(str, age))}).leaks
    samples, content, speaker = voices(800, speakers=40, strength=0.7)
    numbers = objects(name.removeprefix("v") for name in speaker)
    assert findings(samples, content, {"years": numbers}).leaks


def test_few_values_group_only_under_a_name_of_groups() -> None:
    samples, content, speaker = voices(600, speakers=4, strength=1.0)
    assert findings(samples, content, {"speaker": speaker}).leaks
    assert findings(samples, content, {"language": speaker}) == findings(samples, content, {})


def test_split_that_keeps_values_together_leaks_the_rest() -> None:
    """The features do not show the group, but the split was made by it, but for two values."""
    rng = np.random.default_rng(0)
    _, content, _ = voices(600, speakers=1, strength=0.0)
    value = rng.integers(0, 60, 600)
    split = np.where(value < 15, "test", "train")
    split[np.flatnonzero(value == 3)[:4]] = split[np.flatnonzero(value == 4)[:4]] = "train"
    finding = single_finding(findings(make_samples(split), content, {"scene": objects(f"s{v}" for v in value)}))
    assert finding.count == 2
    assert finding.message.startswith("2 of 15 test scenes also in train (a random split shares ")


def test_declared_groups_are_compared_without_a_test_of_likeness() -> None:
    samples, content, _ = voices(400, speakers=1, strength=0.0)
    column = np.random.default_rng(1).integers(0, 30, 400)
    declared = make_samples(samples.split, group=[f"g{v}" for v in column])
    assert single_finding(find_leakage(declared, [content])).name == "group"
    named = find_leakage(declared, [content], groups={"room": objects(f"g{v}" for v in column)})
    assert single_finding(named).name == "room"


def test_random_split_of_cremad_shares_all_actors() -> None:
    """91 actors, 7,442 clips, of which 744 are drawn at random for test; without features the name decides."""
    rng = np.random.default_rng(0)
    actor = objects(str(1001 + number % 91) for number in range(7442))
    split = objects(["train"] * 7442)
    split[rng.choice(7442, 744, replace=False)] = "test"
    finding = single_finding(find_leakage(make_samples(split), [], groups={"actor": actor}))
    assert finding.message == "91 of 91 test actors also in train (a random split shares 91.0)"
    assert (finding.count, finding.of, finding.samples) == (91, 91, 744)


@settings(max_examples=examples(50))
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, *"abcd"])), min_size=2, max_size=30))
def test_overlap_equals_set_intersection_without_nulls(
    rows: list[tuple[bool, str | None]],
) -> None:
    is_test, column = np.array([test for test, _ in rows]), objects(value for _, value in rows)
    pairs, _ = pair_splits(make_samples(np.where(is_test, "test", "train")))
    if not pairs:
        assert is_test.all() or not is_test.any()
        return
    overlap = count_overlap(pairs[0], column)
    train, test = ({v for v in column[mask] if v is not None} for mask in (~is_test, is_test))
    assert set(overlap.shared) == train & test
    assert overlap.num_heldout == len(test)
    assert 0 <= overlap.expected <= len(train | test)


def test_expected_overlap_is_the_mean_over_random_splits() -> None:
    rng = np.random.default_rng(0)
    column = objects(f"v{number}" for number in rng.zipf(1.6, 300) % 60)
    counts, expected = [], 0.0
    for _ in range(300):
        split = np.where(rng.permutation(300) < 60, "test", "train")
        overlap = count_overlap(pair_splits(make_samples(split))[0][0], column)
        counts.append(len(overlap.shared))
        expected = overlap.expected
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / np.sqrt(300))


@pytest.mark.parametrize(
    ("column", "noun"),
    [
        *(("speaker", "speakers"), ("group", "groups"), ("video_id", "videos"), ("Identity", "identities")),
        *(("class", "classes"), ("boy", "boys"), ("song", "songs"), ("raw_source", "raw sources")),
    ],
)
def test_message_uses_plural_of_group_column(column: str, noun: str) -> None:
    samples = make_samples(["train", "train", "test", "test"], group="abbb")
    finding = single_finding(find_leakage(samples, [], groups={column: objects("abbb")}))
    assert finding.message.startswith(f"1 of 1 test {noun} also in train")
    assert finding.name == column


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("abcd", "has a different value in every row"),
        ("aaaa", "has 1 distinct values"),
        ([None] * 4, "has 0 distinct values"),
    ],
)
def test_columns_named_like_groups_without_groups_are_noted(column: Any, words: str) -> None:
    leakage = find_leakage(make_samples(["train", "test"] * 2), [], groups={"video": objects(column)})
    assert leakage.findings == ()
    assert leakage.notes == (f"column 'video' {words}: not used as groups",)
    assert find_leakage(make_samples(["train", "test"] * 2), [], groups={"take": objects(column)}).notes == ()


def test_equivalent_group_columns_are_reported_once() -> None:
    split, group = ["train", "train", "test", "test", "test"], ["g1", "g2", "g1", "g1", "s00004"]
    columns = {"group": objects(["1", "2", "1", "1", None]), "actor": objects(["x", "y", "x", "x", None])}
    assert single_finding(find_leakage(make_samples(split), [], groups=columns)).name == "actor"
    samples = make_samples(split, group=group)  # samples without a group have their id there
    assert single_finding(find_leakage(samples, [])).message.startswith("1 of 1 test groups also in train")
    assert single_finding(find_leakage(samples, [], groups={"actor": columns["actor"]})).name == "actor"
    assert len(find_leakage(samples, [], groups={"actor": objects("aabab")}).findings) == 2


def test_names_of_groups_are_recognised_by_their_words() -> None:
    names = ["Actor", "speaker_id", "VIDEO_ID", "participant-code", "subjectNumber", "uid", "dialogue_id", "user3"]
    assert [name for name in names if not is_group_name(name)] == []
    assert not any(is_group_name(name) for name in ("label", "text", "sources", "factor", "videography"))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([20] * 30, True), ([2] * 40, True), ([200] * 4, False), ([1] * 300 + [2] * 30, False), ([500] * 40, False)],
)
def test_groups_are_many_values_of_several_rows(counts: list[int], expected: bool) -> None:
    assert has_many_values(np.array(counts)) is expected


def test_columns_of_the_source_are_read_by_their_values(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    n = 300
    columns = {
        "id": [f"s{row}" for row in range(n)],
        "label": rng.integers(0, 3, n),
        "a": list(rng.standard_normal((n, 4)).astype(np.float32)),
        "b": list(rng.standard_normal((n, 4)).astype(np.float32)),
        "who": [f"w{v}" for v in rng.integers(0, 30, n)],
        "number": pa.array(rng.integers(0, 30, n)),
        "whole": rng.integers(0, 30, n).astype(np.float64),
        "length": rng.integers(0, 30, n) / 7,
        "sex": ["f" if v else "m" for v in rng.integers(0, 2, n)],
        "speaker": ["x" if v else None for v in rng.integers(0, 2, n)],
        "note": [f"n{row}" for row in range(n)],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    dataset = open_dataset(tmp_path / "t.parquet", DataConfig(modality=("a=a", "b=b")))
    columns_read = read_group_columns(dataset)
    assert set(columns_read) == {"who", "number", "whole", "speaker"}
    assert columns_read["who"].tolist() == columns["who"]
    assert None in columns_read["speaker"].tolist()
