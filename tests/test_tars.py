"""Tars: samples are the members of one key, only requested members are read, and damage is reported."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.formats import Plan, tars
from mmaudit.audit.dataset.formats.tars import find_tars, plan_tar_files
from mmaudit.audit.dataset.modalities import Modality
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import DatasetError

Members = Sequence[tuple[str, bytes]]


def pack(path: Path, members: Members, *, format_: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(array))
    return file.getvalue()


def read_rows(plan: Plan) -> list[dict[str, Any]]:
    shards = [pickle.loads(pickle.dumps(shard)) for shard in plan.shards]
    return [row for shard in shards for row in shard.read(plan.sample.column_names).to_pylist()]


def test_members_are_read_by_extension(tmp_path: Path) -> None:
    members = [
        ("./a/1.left.PNG", b"sight"),
        ("a/1.txt", b"a dog\n"),
        ("a/1.cls", b" 3\n"),
        ("a/1.json", json.dumps({"who": "x", "age": 4, "tags": ["u"], "deep": {"no": 1}, "__key__": "z"}).encode()),
        ("a/1.npy", npy([1.5, 2.0])),
        ("a/2.cls", b"-1"),
        ("a/2.left.png", b""),
        ("a/.hidden", b"x"),
        ("README", b"x"),
    ]
    plan = plan_tar_files([pack(tmp_path / "x.tar", members)], shard_rows=1)
    (not_read,) = plan.not_read
    assert (not_read.name, not_read.form) == ("deep", "nested field of 1 .json members")
    assert read_rows(plan) == [
        {"__key__": "a/1", "age": 4, "cls": 3, "tags": ["u"], "txt": "a dog\n", "who": "x",
         "left.png": b"sight", "npy": [1.5, 2.0]},
        {"__key__": "a/2", "age": None, "cls": -1, "tags": None, "txt": None, "who": None,
         "left.png": b"", "npy": None},
    ]  # fmt: skip


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["wav", "png", "mp4"]), st.binary(max_size=1_500), min_size=1), min_size=1
    ),
    st.integers(1, 5),
)
def test_every_member_is_read_back(
    tmp_path: Path, format_: int, samples: list[dict[str, bytes]], shard_rows: int
) -> None:
    folder = "ö" * (4 if format_ == tarfile.USTAR_FORMAT else 150)
    members = [
        (f"{folder}/{number}.{name}", data) for number, sample in enumerate(samples) for name, data in sample.items()
    ]
    plan = plan_tar_files([pack(tmp_path / "x.tar", members, format_=format_)], shard_rows=shard_rows)
    names = {name for sample in samples for name in sample}
    assert read_rows(plan) == [
        {"__key__": f"{folder}/{number}", **{name: sample.get(name) for name in names}}
        for number, sample in enumerate(samples)
    ]
    assert all(shard.num_rows <= shard_rows for shard in plan.shards)
    assert [shard.first for shard in plan.shards] == list(range(0, len(samples), shard_rows))


def test_only_requested_members_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{number}.{name}", b"x" * 2_000) for number in range(3) for name in ("png", "wav")]
    [shard] = plan_tar_files([pack(tmp_path / "x.tar", members)], shard_rows=9).shards
    counted = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            counted.append(size)
            data: bytes = super().read(size)
            return data

    monkeypatch.setattr("mmaudit.audit.dataset.formats.tar_index.open_regular", lambda path: Counting(path, "rb"))
    assert shard.read(["__key__"])["__key__"].to_pylist() == ["0", "1", "2"]
    assert counted == []
    assert shard.read(["wav"])["wav"].to_pylist() == [b"x" * 2_000] * 3
    assert counted == [2_000] * 3


def test_bytes_of_media_per_shard_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_SHARD_BYTES", 250)
    members = [(f"{number}.wav", b"x" * size) for number, size in enumerate((100, 100, 100, 900, 1, 1))]
    plan = plan_tar_files([pack(tmp_path / "x.tar", members)], shard_rows=9)
    assert [shard.num_rows for shard in plan.shards] == [2, 1, 1, 2]


def clips(*keys: str) -> Members:
    return [(f"{key}.{name}", b"x") for key in keys for name in ("wav", "png", "cls")]


def test_tars_of_folder_file_and_glob_are_found(tmp_path: Path) -> None:
    paths = [pack(tmp_path / name, clips(name)) for name in ("b.tar", "a.tar", "val/c.tar", "other/d.tar")]
    assert find_tars(str(tmp_path)) == [paths[1], paths[0], paths[2]]
    assert find_tars(str(paths[0])) == [paths[0]]
    assert find_tars(f"{tmp_path}/*.tar") == [paths[1], paths[0]]
    assert find_tars(f"{tmp_path}/*") == [paths[1], paths[0]]
    assert find_tars(f"{tmp_path}/none.tar") == []
    (tmp_path / "e.tar.gz").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"e\.tar\.gz is compressed .*: unpack it"):
        find_tars(str(tmp_path / "e.tar.gz"))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000.tar", "train_1.tar", "val-0.tar", "test.tar"], ["train", "train", "val", "test"]),
        (["train/0.tar", "val/0.tar"], ["train", "val"]),
        (["train-000.tar", "other.tar"], None),
        (["trainers.tar", "a.tar"], None),
    ],
)
def test_splits_are_inferred_from_names_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], splits: list[str] | None
) -> None:
    caplog.set_level(logging.INFO, "mmaudit")
    paths = [pack(tmp_path / "d" / name, clips(f"k{number}")) for number, name in enumerate(names)]
    split_of_row = [row.get("split") for row in read_rows(plan_tar_files(paths, shard_rows=9))]
    expected = {"train": "train", "val": "validation", "test": "test"}
    assert split_of_row == ([None] * len(names) if splits is None else [expected[split] for split in splits])
    assert ("by the names of the files: " in caplog.text) == (splits is not None)


def test_existing_split_field_is_kept(tmp_path: Path) -> None:
    members = [*clips("a"), ("a.json", b'{"split": "test"}')]
    assert read_rows(plan_tar_files([pack(tmp_path / "train.tar", members)], shard_rows=9))[0]["split"] == "test"


def test_tars_with_different_columns_are_concatenated(tmp_path: Path) -> None:
    first = pack(tmp_path / "1.tar", [("a.wav", b"1"), ("a.json", b'{"n": 1}')])
    second = pack(tmp_path / "2.tar", [("b.png", b"2"), ("b.json", b'{"n": 2.5, "word": "x"}')])
    assert read_rows(plan_tar_files([first, second], shard_rows=9)) == [
        {"__key__": "a", "n": 1.0, "word": None, "wav": b"1", "png": None},
        {"__key__": "b", "n": 2.5, "word": "x", "wav": None, "png": b"2"},
    ]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], r"cannot be read|has no samples"),
        ([("README", b"x")], r"has no samples: its members must be named KEY\.EXTENSION"),
        (
            [*clips("a", "b"), ("a.txt", b"x")],
            "the key a is repeated in .*x.tar, after .*x.tar: the members of a sample",
        ),
        ([("a.wav", b"x"), ("a.WAV", b"x")], r"a\.WAV is repeated"),
        ([("a.json", b"{no")], r"x\.tar, a\.json cannot be read"),
        ([("a.json", b"[1]")], r"a\.json cannot be read: it is not a JSON object"),
        ([("a.txt", b"\xff\xfe\x00")], r"a\.txt cannot be read"),
        ([("a.json", b'{"wav": 1}'), ("a.wav", b"x")], r"a\.wav is repeated, or \.json has a field of this name"),
        ([("a.wav", b"x"), ("a.json", b'{"wav": 1}')], r"a\.json has a field 'wav' and a member"),
        ([("a.wav", b"x"), ("b.json", b'{"wav": 1}')], r"'wav' is both an extension and a field"),
    ],
)
def test_invalid_samples_are_rejected(tmp_path: Path, members: Members, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        plan_tar_files([pack(tmp_path / "x.tar", members)], shard_rows=9)


def test_key_in_two_tars_is_rejected(tmp_path: Path) -> None:
    paths = [pack(tmp_path / name, clips("0001")) for name in ("1.tar", "2.tar")]
    with pytest.raises(DatasetError, match=r"the key 0001 is repeated in .*2\.tar, after .*1\.tar"):
        plan_tar_files(paths, shard_rows=9)


@pytest.mark.parametrize("array", [[[1.0, 2.0]], 3.0, ["word"]])
def test_array_that_is_not_a_vector_is_rejected(tmp_path: Path, array: Any) -> None:
    path = pack(tmp_path / "x.tar", [("a.npy", npy(array))])
    with pytest.raises(DatasetError, match=r"a\.npy is of shape .*; features must be a vector of numbers"):
        plan_tar_files([path], shard_rows=9)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"a\.npy cannot be read: .*header states objects"):
        plan_tar_files([pack(tmp_path / "x.tar", [("a.npy", file.getvalue())])], shard_rows=9)


def announcing(shape: bytes) -> bytes:
    """Return the bytes of a vector of one number whose header announces another shape."""
    return npy([0.5]).replace(b"(1,), }".ljust(len(shape)), shape)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy([0.5])[:20], "a\\.npy cannot be read"),
        (npy([0.5]).replace(b"(1,)", b"(1, "), "a\\.npy cannot be read"),
        (announcing(b"(9999999999999), }"), "a\\.npy cannot be read"),
        (announcing(b"(999999999999,), }"), "states 7,999,999,999,992 bytes"),
        (npy([0.5])[:-3], "states 8 bytes|cannot be read"),
    ],
)
def test_damaged_vector_is_reported(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        plan_tar_files([pack(tmp_path / "x.tar", [("a.npy", data)])], shard_rows=9)


def test_link_is_rejected(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a.wav")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DatasetError, match=r"a\.wav is a link or sparse: pack the files themselves"):
        plan_tar_files([tmp_path / "x.tar"], shard_rows=9)


def test_truncated_tar_gives_complete_members_or_is_rejected(tmp_path: Path) -> None:
    """A tar cut at the end of a member is valid; anywhere else the damage is reported."""
    content = pack(tmp_path / "whole.tar", [("a.wav", b"x" * 700), ("b.wav", b"y" * 10)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(b"")
    for end in (0, 100, 512, 900, 1_300, 1_536, 1_800, 2_048, 2_050, 2_100, 2_560, 3_000):
        (tmp_path / "cut.tar").write_bytes(content[:end])
        if end in (1_536, 2_560, 3_000):
            assert len(read_rows(plan_tar_files([tmp_path / "cut.tar"], shard_rows=9))) == (1 if end < 2_000 else 2)
        else:
            with pytest.raises(DatasetError, match=r"cut\.tar.*(truncated|header at byte \d+ cannot be read)"):
                plan_tar_files([tmp_path / "cut.tar"], shard_rows=9)


def test_damaged_header_is_reported(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", clips("a", "b", "c"))
    content = bytearray(path.read_bytes())
    content[3 * 1_024 + 148] ^= 0xFF  # in the checksum of the fourth member
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"x\.tar: the header at byte 3072 cannot be read"):
        plan_tar_files([path], shard_rows=9)


def test_tar_truncated_after_opening_is_reported(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.wav", b"x" * 5_000)])
    [shard] = plan_tar_files([path], shard_rows=9).shards
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(DatasetError, match="was truncated after it was opened"):
        shard.read(["wav"])


def test_modalities_of_tars_are_named_by_kind(tmp_path: Path) -> None:
    members = [*clips("a"), ("a.caption.txt", b"a dog"), ("a.face.jpg", b"x")]
    dataset = open_dataset(pack(tmp_path / "x.tar", members))
    assert [str(modality) for modality in dataset.modalities] == [
        "caption=caption.txt:text", "audio=wav:audio", "face=face.jpg:image", "image=png:image"
    ]  # fmt: skip
    requested = open_dataset(tmp_path / "x.tar", DataConfig(modality=("a=wav", "i=png:image")))
    assert read_samples(requested, seed=0, test_fraction=0.5).sample_id.tolist() == ["a"]
    vectors = open_dataset(pack(tmp_path / "v.tar", [*clips("a"), ("a.sound.npy", npy([0.5, 1.0]))]))
    assert vectors.modalities[-1] == Modality(name="sound", column="sound.npy", kind="features", length=2)


def test_only_canonical_integers_are_numbers(tmp_path: Path) -> None:
    members = [("a.cls", b"1"), ("a.json", b'{"id": "007"}'), ("b.cls", b"01"), ("b.json", b'{"id": "8"}')]
    read_back = read_rows(plan_tar_files([pack(tmp_path / "x.tar", members)], shard_rows=9))
    assert [(row["cls"], row["id"]) for row in read_back] == [("1", "007"), ("01", "8")]


def test_keys_with_dots_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(tmp_path / "a.tar", [("22.05.png", b"x"), ("22.05.cls", b"1")])
    plan_tar_files([path], shard_rows=9)
    assert f"{path}: the member 22.05.png is the column 05.png of the sample 22, since a key ends at" in caplog.text
    caplog.clear()
    plan_tar_files([pack(tmp_path / "b.tar", [("22.seg.png", b"x"), ("22.cls", b"1")])], shard_rows=9)
    assert not caplog.records


def test_texts_of_other_encodings_and_system_members(tmp_path: Path) -> None:
    members = [("a.txt", "caf\u00e9".encode("utf-16")), ("__MACOSX/a.txt", b"x"), ("._b/b.txt", b"x"), (".c.txt", b"x")]
    assert read_rows(plan_tar_files([pack(tmp_path / "a.tar", members)], shard_rows=9)) == [
        {"__key__": "a", "txt": "caf\u00e9"}
    ]
