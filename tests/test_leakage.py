"""Tests of leakage: planted leaks are found exactly, clean data have none, in any order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import Samples, read_samples
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import read_status
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.findings import Finding, Leakage
from mmaudit.audit.leakage import LeakageConfig, ModalityContent, find_leakage
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

Objects = NDArray[np.object_]


def objects(values: Any) -> Objects:
    return np.array(list(values), dtype=object)


def make_samples(split: Any, *, ids: Any = None, group: Any = None, label: Any = None) -> Samples:
    split = objects(split)
    return Samples(
        sample_id=objects(ids or [f"s{row:05d}" for row in range(len(split))]),
        label=np.zeros(len(split), np.int32) if label is None else np.array(label, np.int32),
        class_names=("one", "two"),
        split=split,
        group=None if group is None else objects(group),
        paths=pa.table({}),
    )


def split_of(count: int, *, seed: int = 0, names: tuple[str, ...] = ("train", "test")) -> Objects:
    draws = np.random.default_rng(seed).random(count)
    return objects(names[0] if draw < 0.75 else names[1 + int(draw * 1e6) % (len(names) - 1)] for draw in draws)


def make_content(
    modality: str, content: Any, matrix: NDArray[Any] | None = None, *, recurs: bool = False, kind: str = "features"
) -> ModalityContent:
    inputs = None if matrix is None else MatrixInputs(matrix=matrix.astype(np.float32))
    mask = np.full(len(list(content)), recurs)
    return ModalityContent(modality=modality, content=objects(content), inputs=inputs, recurs=mask, kind=kind)


def distinct(name: str, count: int) -> list[str | None]:
    return [f"{name}{row}" for row in range(count)]


def summaries(leakage: Leakage) -> list[tuple[str, str, tuple[str, str], int]]:
    return [(finding.what, finding.name, finding.between, finding.count) for finding in leakage.findings]


def single_finding(leakage: Leakage) -> Finding:
    assert len(leakage.findings) == 1, summaries(leakage)
    return leakage.findings[0]


# All kinds of leaks


def test_clean_data_have_no_findings() -> None:
    rng = np.random.default_rng(0)
    split = split_of(600, names=("train", "validation", "test"))
    modality_contents = [
        make_content(name, distinct(name, 600), rng.standard_normal((600, 30))) for name in ("audio", "visual")
    ]
    actor = objects(f"{name}{row % 7}" for row, name in enumerate(split))
    leakage = find_leakage(make_samples(split), modality_contents, groups={"actor": actor})
    assert (leakage.findings, leakage.notes) == ((), ())
    assert not leakage.leaks


@pytest.mark.parametrize("present", ["train", "validation"])
def test_single_split_has_nothing_to_compare(present: str) -> None:
    leakage = find_leakage(
        make_samples([present] * 5), [make_content("audio", ["a"] * 5)], groups={"actor": objects("abcab")}
    )
    assert "no test split: nothing to compare" in leakage.notes
    assert not leakage.leaks


def test_without_a_test_split_train_and_validation_are_compared() -> None:
    leakage = find_leakage(make_samples(["train", "validation"]), [make_content("audio", ["a", "a"])])
    assert leakage.notes == ("no test split: only the other splits are compared",)
    assert summaries(leakage) == [("content", "audio", ("train", "validation"), 1)]


def planted(
    seed: int = 0, *, names: tuple[str, str] = ("train", "test")
) -> tuple[Samples, list[ModalityContent], Objects]:
    """Return samples with 3 copies and 4 near duplicates of audio, 2 complete copies, and 5 shared actors."""
    rng = np.random.default_rng(seed)
    split = split_of(400, seed=seed)
    heldout, reference = np.flatnonzero(split == "test"), np.flatnonzero(split == "train")
    content = {name: objects(distinct(name, 400)) for name in ("audio", "visual")}
    matrix = {name: rng.standard_normal((400, 20)) for name in content}
    for name, copied in (("audio", 3), ("visual", 2)):
        content[name][heldout[:copied]] = content[name][reference[:copied]]
        matrix[name][heldout[:copied]] = matrix[name][reference[:copied]]
    matrix["audio"][heldout[10:14]] = matrix["audio"][reference[10:14]] + 0.02 * rng.standard_normal((4, 20))
    actor = objects(f"{name} {row % 8}" for row, name in enumerate(split))
    actor[heldout[20:25]] = actor[reference[reference >= 8][:5]]
    renamed = objects(names[0] if name == "train" else names[1] for name in split)
    return (
        make_samples(renamed, group=actor),
        [make_content(name, content[name], matrix[name]) for name in content],
        actor,
    )


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_planted_leaks_are_found(seed: int) -> None:
    samples, modality_contents, actor = planted(seed)
    leakage = find_leakage(samples, modality_contents, groups={"actor": actor})
    between = ("train", "test")
    shared = len(set(actor[samples.split == "train"]) & set(actor[samples.split == "test"]))
    assert summaries(leakage) == [
        ("content", "sample", between, 2),
        ("content", "audio", between, 3),
        ("near duplicates", "audio", between, 4),
        ("content", "visual", between, 2),
        ("groups", "actor", between, shared),
    ]
    assert leakage.leaks
    num_test = int((samples.split == "test").sum())
    assert [finding.of for finding in leakage.findings[:4]] == [num_test, num_test, num_test - 3, num_test]
    assert leakage.findings[-1].samples == 5
    reference, heldout = (np.flatnonzero(samples.split == name) for name in between)
    pairs = zip(samples.sample_id[heldout[10:14]], samples.sample_id[reference[10:14]], strict=True)
    assert leakage.findings[2].examples == tuple(pairs)


def test_shuffling_rows_changes_nothing() -> None:
    samples, modality_contents, actor = planted()
    order = np.random.default_rng(1).permutation(len(samples))
    shuffled = replace(
        samples,
        sample_id=samples.sample_id[order],
        label=samples.label[order],
        split=samples.split[order],
        group=actor[order],
    )
    shuffled_contents = []
    for modality_content in modality_contents:
        assert isinstance(modality_content.inputs, MatrixInputs)
        inputs = MatrixInputs(matrix=modality_content.inputs.matrix[order])
        content = modality_content.content[order]
        shuffled_contents.append(replace(modality_content, content=content, inputs=inputs))
    expected = find_leakage(samples, modality_contents, groups={"actor": actor})
    assert find_leakage(shuffled, shuffled_contents, groups={"actor": actor[order]}) == expected


def test_swapping_train_and_test_gives_same_pairs() -> None:
    samples, modality_contents, actor = planted()
    original = find_leakage(samples, modality_contents, groups={"actor": actor})
    swapped_samples, *_ = planted(names=("test", "train"))
    swapped = find_leakage(swapped_samples, modality_contents, groups={"actor": actor})
    assert summaries(swapped) == summaries(original)
    for first, second in zip(original.findings, swapped.findings, strict=True):
        assert {frozenset(pair) for pair in first.examples} == {frozenset(pair) for pair in second.examples}


def test_to_json_returns_plain_lists() -> None:
    samples, modality_contents, actor = planted()
    leakage = find_leakage(samples, modality_contents, groups={"actor": actor, "track": objects(range(400))})
    content: Any = leakage.to_json()
    assert content["leaks"] is True
    assert [finding["message"] for finding in content["findings"]] == [finding.message for finding in leakage.findings]
    assert content["notes"] == ["column 'track' has a different value in every row: not used as groups"]


def test_every_pair_of_splits_is_compared() -> None:
    split = ["train", "validation", "test"] * 4
    calls: list[tuple[str, int, int]] = []
    content = ["a", "b", "b", "c", "c", "d", "e", "f", "e", *"ghi"]
    leakage = find_leakage(
        make_samples(split), [make_content("audio", content)], progress=lambda *call, detail="": calls.append(call)
    )
    assert summaries(leakage) == [
        ("content", "audio", ("train", "test"), 1),
        ("content", "audio", ("train", "validation"), 1),
        ("content", "audio", ("validation", "test"), 1),
    ]
    assert calls == [("leakage", 1, 3), ("leakage", 2, 3), ("leakage", 3, 3)]


# Ids


@pytest.mark.parametrize(
    ("first_id", "second_id"),
    [("clip_01.wav", "CLIP_01"), ("a/clip.wav", "clip"), ("b\\a\\clip.mp4", "A/clip.npy"), ("./clip", "clip.png")],
)
def test_ids_are_compared_without_case_extension_and_leading_folders(first_id: str, second_id: str) -> None:
    for ids in ([first_id, second_id], [second_id, first_id]):
        finding = single_finding(find_leakage(make_samples(["train", "test"], ids=ids), []))
        assert (finding.what, finding.count, finding.of) == ("ids", 1, 1)
        assert finding.examples == ((ids[1], ids[0]),)
        assert finding.message == (
            f"1 of 1 test ids also in train, up to case, extension or folder: {ids[1]} and {ids[0]}"
        )


@pytest.mark.parametrize(
    ("first_id", "second_id"),
    [("clip.1", "clip.2"), ("s01.sad", "s01.joy"), ("1", "01"), ("clip_1", "clip_10"), ("/", ".")],
)
def test_different_ids_are_not_matched(first_id: str, second_id: str) -> None:
    leakage = find_leakage(make_samples(["train", "test"], ids=[first_id, second_id]), [])
    assert (leakage.findings, leakage.notes) == ((), ())


def test_same_file_name_in_another_folder_is_only_noted() -> None:
    """The folder of every split has its own numbering."""
    ids = [f"{split}/{number}.wav" for split in ("train", "test") for number in range(9)]
    leakage = find_leakage(make_samples(["train"] * 9 + ["test"] * 9, ids=ids), [])
    assert not leakage.leaks
    assert leakage.notes == (
        "9 of 9 test ids have the file name of a train id in another folder; not counted as duplicates: "
        "test/0.wav and train/0.wav",
    )


# Contents


@settings(max_examples=examples(50))
@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "test"]), st.sampled_from([None, *"abcdefgh"])), min_size=2, max_size=40
    )
)
def test_content_count_equals_set_intersection(rows: list[tuple[str, str | None]]) -> None:
    split, content = zip(*rows, strict=True)
    leakage = find_leakage(make_samples(split), [make_content("audio", content)])
    reference = {value for name, value in rows if name == "train"} - {None}
    expected = sum(name == "test" and value in reference for name, value in rows)
    assert sum(finding.count for finding in leakage.findings) == expected


def test_placeholders_are_noted_and_frequent_copies_are_found() -> None:
    split = ["train"] * 60 + ["test"] * 10
    silence = ["silence"] * 50 + ["often"] * 10 + ["silence"] * 6 + ["often"] * 4
    pictures = distinct("p", 50) + ["o"] * 10 + distinct("q", 6) + ["o"] * 4
    leakage = find_leakage(make_samples(split), [make_content("audio", silence), make_content("visual", pictures)])
    between = ("train", "test")
    assert summaries(leakage) == [
        ("content", "sample", between, 4),
        ("content", "audio", between, 4),
        ("content", "visual", between, 4),
    ]
    assert leakage.notes == (
        "audio: 6 test samples have content that occurs with more than 20 different partners in train: "
        "placeholders, not counted",
    )


def test_recurring_content_alone_is_noted_and_with_others_is_found() -> None:
    split = ["train", "train", "test", "test"]
    text = make_content("text", ["yes", "no", "yes", "no"], recurs=True)
    leakage = find_leakage(make_samples(split), [make_content("audio", ["a", "b", "a", "c"]), text])
    assert summaries(leakage) == [
        ("content", "sample", ("train", "test"), 1),
        ("content", "audio", ("train", "test"), 1),
    ]
    assert leakage.notes == (
        "2 of 2 test samples with the same text as a train sample: s00002 and s00000; "
        "not a leak by itself: such contents recur by chance",
    )


# Near duplicates


def near_duplicates(
    matrix: NDArray[Any], split: Objects, config: LeakageConfig | None = None, seed: int = 0
) -> Leakage:
    content = [row.tobytes().hex() for row in matrix.astype(np.float32)]
    return find_leakage(make_samples(split), [make_content("audio", content, matrix)], config=config, seed=seed)


def clouds(seed: int) -> Mapping[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    centres = 10 * rng.standard_normal((15, 20))
    cluster = rng.integers(0, 15, 900)
    widths = 10.0 ** rng.uniform(-3, 0, 15)
    return {
        "even": rng.standard_normal((900, 12)),
        "wide": rng.standard_normal((900, 300)),
        "clusters": centres[cluster] + widths[cluster, None] * rng.standard_normal((900, 20)),
        "a curve": np.tanh(rng.standard_normal((900, 1)) @ rng.standard_normal((1, 30))),
        "a sheet": np.tanh(rng.standard_normal((900, 3)) @ rng.standard_normal((3, 30))),
        "long tails": rng.standard_t(1.5, (900, 30)),
        "skew": np.exp(2 * rng.standard_normal((900, 30))),
        "units": rng.standard_normal((900, 20)) * 10.0 ** rng.uniform(-6, 6, 20),
        "bits": rng.integers(0, 2, (900, 60)),
        "offset": 1e4 + rng.standard_normal((900, 20)),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", clouds(0))
def test_clean_features_give_no_near_duplicates(name: str, seed: int) -> None:
    assert not near_duplicates(clouds(seed)[name], split_of(900, seed=seed)).leaks


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["even", "wide", "units", "bits"])
def test_all_noisy_copies_are_found(name: str, copies: int) -> None:
    """Also if each original is in train twice."""
    rng = np.random.default_rng(5)
    matrix, split = clouds(0)[name].astype(float), split_of(900)
    heldout, reference = np.flatnonzero(split == "test")[:12], np.flatnonzero(split == "train")[:24]
    noise = 0.01 * matrix.std(axis=0) * rng.standard_normal((2, 12, matrix.shape[1]))
    if copies == 2:
        matrix[reference[12:]] = matrix[reference[:12]] + noise[1]
    matrix[heldout] = matrix[reference[:12]] + noise[0]
    assert single_finding(near_duplicates(matrix, split)).count == 12


def test_copies_within_tight_and_wide_clusters_are_found() -> None:
    """A distance that is small in one cluster is large in another."""
    rng = np.random.default_rng(0)
    split, cluster = split_of(900), np.arange(900) % 15
    widths = np.geomspace(0.05, 0.5, 15)[cluster, None]
    matrix = 10 * rng.standard_normal((15, 20))[cluster] + widths * rng.standard_normal((900, 20))
    heldout, reference = np.flatnonzero(split == "test")[:15], np.flatnonzero(split == "train")[:15]
    assert len(set(cluster[reference])) > 8
    matrix[heldout] = matrix[reference] + 0.01 * widths[reference] * rng.standard_normal((15, 20))
    assert single_finding(near_duplicates(matrix, split)).count == 15


def test_dense_cluster_is_not_reported() -> None:
    rng = np.random.default_rng(0)
    matrix, split = rng.standard_normal((900, 20)), split_of(900)
    matrix[::10] = matrix[0] + 1e-4 * rng.standard_normal((90, 20))
    assert not near_duplicates(matrix, split).leaks


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.random.default_rng(0).standard_normal((300, 7)), "too few of its 7 features vary; 8 are needed"),
        (
            np.repeat(np.random.default_rng(0).standard_normal((300, 1)), 7, 1) @ np.eye(7, 20),
            "too few of its 20 features",
        ),
        (np.random.default_rng(0).integers(0, 2, (300, 8)), "many feature vectors are equal"),
        (np.random.default_rng(0).standard_normal((12, 20)), "9 samples, at least 20 needed"),
    ],
)
def test_untestable_features_are_noted(matrix: NDArray[Any], words: str) -> None:
    content = distinct("a", len(matrix))
    split = split_of(len(matrix)) if len(matrix) > 12 else objects(["train"] * 9 + ["test"] * 3)
    leakage = find_leakage(make_samples(split), [make_content("audio", content, matrix)])
    assert not leakage.leaks
    assert len(leakage.notes) == 1
    assert leakage.notes[0].startswith("audio, near duplicates of test in train: not tested: ")
    assert words in leakage.notes[0]


def test_missing_modality_is_not_compared() -> None:
    rng = np.random.default_rng(0)
    matrix, split = rng.standard_normal((400, 20)), split_of(400)
    heldout, reference = np.flatnonzero(split == "test"), np.flatnonzero(split == "train")
    matrix[heldout[:6]] = matrix[reference[:6]] + 1e-3
    content = objects(distinct("a", 400))
    content[[*heldout[:2], *reference[2:4]]] = None
    matrix[[*heldout[:2], *reference[2:4]]] = np.nan
    finding = single_finding(find_leakage(make_samples(split), [make_content("audio", content, matrix)]))
    assert (finding.count, finding.of) == (2, len(heldout) - 2)


def test_near_duplicate_texts_are_only_noted() -> None:
    rng = np.random.default_rng(0)
    matrix, split = rng.standard_normal((400, 20)), split_of(400)
    matrix[np.flatnonzero(split == "test")[0]] = matrix[np.flatnonzero(split == "train")[0]] + 1e-3
    leakage = find_leakage(make_samples(split), [make_content("text", distinct("t", 400), matrix, kind="text")])
    assert not leakage.leaks
    assert len(leakage.notes) == 1
    assert "nearly the same text" in leakage.notes[0]


def test_rows_beyond_maximum_are_sampled_and_noted() -> None:
    rng = np.random.default_rng(0)
    matrix, split = rng.standard_normal((800, 20)), split_of(800)
    heldout, reference = np.flatnonzero(split == "test"), np.flatnonzero(split == "train")
    matrix[heldout] = matrix[reference[: len(heldout)]] + 0.01 * rng.standard_normal((len(heldout), 20))
    everything = single_finding(near_duplicates(matrix, split))
    assert everything.count == len(heldout)
    config = LeakageConfig(max_train=300, max_test=100)
    sampled = [near_duplicates(matrix, split, config, seed) for seed in range(3)]
    assert [single_finding(leakage).of for leakage in sampled] == [100] * 3
    assert all(20 < single_finding(leakage).count < 80 for leakage in sampled)  # found with probability 300 / 600
    assert len({single_finding(leakage).examples for leakage in sampled}) == 3
    assert near_duplicates(matrix, split, config, 0) == sampled[0]
    note = f"100 of {len(heldout)} test samples were compared with 300 of {len(reference)} train samples"
    assert sampled[0].notes == (f"audio, near duplicates of test in train: {note}",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "leakage.ratio is 1.0"),
        ({"false_alarms": 0.0}, r"leakage.false_alarms is 0.0; it must lie in \(0, 1\)"),
        ({"neighbours": 2}, "leakage.neighbours is 2"),
        ({"max_partners": 0}, "leakage.max_partners is 0; it must be at least 1"),
        ({"max_test": 19}, "leakage.max_test is 19; it must be at least 20"),
    ],
)
def test_config_out_of_range_raises_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LeakageConfig(**options)


def softmax(seed: int, *, scale: float, count: int = 600) -> NDArray[np.float32]:
    """Return the probabilities of a confident classifier of ten classes."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count, 10))
    logits[np.arange(count), rng.integers(0, 10, count)] += 1.5
    exponentials = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), dtype=np.float32)


@pytest.mark.parametrize("decimals", [None, 4])
@pytest.mark.parametrize("scale", [1, 3, 5, 8])
def test_clean_probabilities_give_no_near_duplicates(scale: float, decimals: int | None) -> None:
    for seed in range(5):
        matrix = softmax(seed, scale=scale) if decimals is None else softmax(seed, scale=scale).round(decimals)
        leakage = find_leakage(
            make_samples(split_of(600, seed=seed)), [make_content("audio", distinct("c", 600), matrix)]
        )
        assert not leakage.leaks


def test_noisy_copies_of_probabilities_are_found() -> None:
    rng = np.random.default_rng(1)
    matrix, split = softmax(0, scale=5), split_of(600)
    heldout, reference = np.flatnonzero(split == "test")[:12], np.flatnonzero(split == "train")[:12]
    copied = matrix[reference] * np.exp(0.02 * rng.standard_normal((12, 10)))
    matrix[heldout] = copied / copied.sum(axis=1, keepdims=True)
    assert single_finding(near_duplicates(matrix, split)).count == 12


def test_copies_of_another_label_are_listed_apart() -> None:
    """Vectors of two classes may be equal, as those of a 6 and a 9 turned round; a file in both splits is a leak."""
    split, content = ["train"] * 4 + ["test"] * 3, ["a", "b", "c", "d", "a", "b", "e"]
    label = [0, 1, 0, 1, 0, 0, 1]
    leakage = find_leakage(make_samples(split, label=label), [make_content("zer", content)])
    assert [(finding.what, finding.count) for finding in leakage.findings] == [("content", 1)]
    assert leakage.notes == (
        "1 of 3 test samples with the same zer as a train sample of another label: s00005 and s00001; "
        "not counted as copies: the features cannot tell these samples apart",
    )
    leakage = find_leakage(make_samples(split, label=label), [make_content("zer", content, kind="image")])
    assert [(finding.what, finding.count) for finding in leakage.findings] == [
        ("content", 1),
        ("content of another label", 1),
    ]


def test_copy_of_two_originals_is_compared_with_that_of_its_label() -> None:
    leakage = find_leakage(make_samples(["train", "train", "test"], label=[0, 1, 1]), [make_content("zer", "aaa")])
    assert single_finding(leakage).examples == (("s00002", "s00001"),)


def test_no_leak_states_what_could_be_found() -> None:
    contents = [make_content("zer", distinct("a", 4)), make_content("text", distinct("b", 4), kind="text")]
    leakage = find_leakage(make_samples(["train", "test"] * 2), contents)
    assert leakage.sensitivity[:2] == ("zer: equal contents only", "text: equal contents only")
    assert leakage.compared == (("train", "test"),)
    assert "mmaudit score" in leakage.sensitivity[-1]
    assert find_leakage(make_samples(["train"] * 4), contents).sensitivity == ()


# Encoded datasets


def test_leakage_of_encoded_dataset(clips: Path, tmp_path: Path) -> None:
    """One clip is a copy under another name, and one is missing."""
    (clips / "7.wav").write_bytes((clips / "4.wav").read_bytes())
    (clips / "5.png").unlink()
    dataset = open_dataset(clips)
    samples = read_samples(dataset, seed=0, test_fraction=0.25)
    samples = replace(samples, split=objects("test" if row in (5, 7, 11) else "train" for row in range(24)))
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MediaConfig(), num_workers=0, progress=no_progress)
    statuses = [read_status(tasks, modality, samples.sample_id) for modality in dataset.modalities]
    modality_contents = [ModalityContent.of(status, tasks) for status in statuses]
    assert [sum(value is None for value in modality_content.content) for modality_content in modality_contents] == [
        0,
        1,
    ]
    leakage = find_leakage(samples, modality_contents)
    finding = single_finding(leakage)
    assert (finding.what, finding.name, finding.examples) == ("content", "audio", (("007", "004"),))
