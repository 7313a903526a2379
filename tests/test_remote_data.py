"""Data at URLs: every form gives the samples and the bytes of the same data on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from remote_files import Faults, put_memory, range_server, write_forms

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.errors import DatasetError, RemoteError, UnusableError
from mmaudit.audit.features.encoded_samples import content_hashes
from mmaudit.audit.remote import requests
from mmaudit.audit.remote.cache import cached_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, short waits, and no files left in memory://."""
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "_WAITS", (0.01, 0.01, 0.01))
    yield tmp_path / "cache"
    MemoryFileSystem.store.clear()
    requests.forget()


@pytest.fixture(scope="module")
def forms(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips as Parquet, tars, folders and a table of paths; read-only."""
    return {**write_forms(clip_source, tmp_path_factory.mktemp("forms")), "metadata": clip_source}


def samples_of(source: str, *, allow_outside: bool = False) -> list[tuple[str, str, str | None]]:
    dataset = open_dataset(source, DataConfig(allow_outside=allow_outside))
    return [(row.sample_id, row.content, row.problem) for row in content_hashes(dataset)]


@pytest.mark.parametrize("form", ["parquet", "tars", "folders", "metadata"])
@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_a_source_gives_the_same_samples_at_a_url(forms: dict[str, Path], form: str, scheme: str) -> None:
    folder = forms[form]
    local = samples_of(str(folder))
    assert len(local) == 24
    assert all(problem is None for _, _, problem in local)
    if scheme == "memory":
        assert samples_of(put_memory(folder, "bucket/clips")) == local
    else:
        with range_server(folder.parent) as url:
            assert samples_of(f"{url}/{folder.name}", allow_outside=True) == local


@pytest.mark.parametrize("pattern", ["parquet/*.parquet", "parquet/{0..1}.parquet", "**/*.parquet", "parquet/*"])
def test_patterns_match_files_at_a_url(forms: dict[str, Path], pattern: str) -> None:
    put_memory(forms["parquet"], "bucket/parquet")
    assert samples_of(f"memory://bucket/{pattern}") == samples_of(str(forms["parquet"]))


def test_file_urls_are_paths_of_this_machine(forms: dict[str, Path]) -> None:
    assert samples_of(f"file://{forms['parquet']}") == samples_of(str(forms["parquet"]))
    with pytest.raises(RemoteError, match="absolute path"):
        open_dataset("file://host/data")


def test_only_the_columns_and_row_groups_that_are_read_are_fetched(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    size, rows = 400_000, 6
    media = [rng.bytes(size) for _ in range(rows)]
    table = pa.table({"id": list("abcdef"), "label": list("xyxyxy"), "wav": media, "png": media[::-1]})
    (tmp_path / "served").mkdir()
    pq.write_table(table, tmp_path / "served/big.parquet", row_group_size=2, compression="none")
    faults = Faults()
    with range_server(tmp_path / "served", faults) as url:
        config = DataConfig(allow_outside=True, modality=("a=wav:audio", "b=png:image"))
        dataset = open_dataset(f"{url}/big.parquet", config)
        faults.requests.clear()
        got = dataset.shards[1].read(["id", "png"])
    assert got["id"].to_pylist() == ["c", "d"]
    spans = [asked[6:].split("-") for _, _, asked in faults.requests if asked]
    fetched = sum(int(end) - int(start) + 1 for start, end in spans)
    assert 2 * size <= fetched < 2.5 * size  # of 12 media of this size in the file


def test_members_of_a_tar_are_read_by_range(tmp_path: Path) -> None:
    import io
    import tarfile

    rng = np.random.default_rng(0)
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served/big.tar", "w") as archive:
        for number in range(8):
            for name, data in (("wav", rng.bytes(700_000)), ("png", rng.bytes(900_000)), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    faults = Faults()
    with range_server(tmp_path / "served", faults) as url:
        config = DataConfig(allow_outside=True, shard_rows=2, modality=("a=wav:audio", "b=png:image"))
        dataset = open_dataset(f"{url}/big.tar", config)
        faults.requests.clear()
        got = dataset.shards[2].read(["__key__", "wav"])
        local = open_dataset(tmp_path / "served/big.tar", config).shards[2].read(["__key__", "wav"])
    assert got.equals(local)
    spans = [asked[6:].split("-") for _, _, asked in faults.requests if asked]
    fetched = sum(int(end) - int(start) + 1 for start, end in spans)
    assert fetched < 1.1 * 2 * 700_000


def test_a_changed_file_is_read_again(forms: dict[str, Path]) -> None:
    url = put_memory(forms["metadata"], "bucket/clips")
    before = samples_of(url)
    files = fsspec.filesystem("memory")
    other = files.cat_file("/bucket/clips/1.wav")
    files.pipe_file("/bucket/clips/0.wav", other)
    after = samples_of(url)
    assert [row for row, _ in enumerate(after) if after[row] != before[row]] == [0]


def test_a_missing_file_is_missing_and_no_error(forms: dict[str, Path]) -> None:
    url = put_memory(forms["metadata"], "bucket/clips")
    fsspec.filesystem("memory").rm_file("/bucket/clips/3.wav")
    assert [problem for _, _, problem in samples_of(url) if problem] == ["no file 3.wav"]
    with pytest.raises(DatasetError, match="no such folder or file: memory://bucket/none"):
        open_dataset("memory://bucket/none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/0.wav", "leads outside"),
        ("https://host.example/0.wav?token=SECRET", "leads outside"),
        ("file:///etc/hostname", "leads outside"),
        ("../../0.wav", "leads outside"),
    ],
)
def test_rows_may_not_name_urls_unless_allowed(clips: Path, name: str, message: str) -> None:
    text = (clips / "metadata.csv").read_text(encoding="utf-8").replace("001,1.wav", f"001,{name}")
    (clips / "metadata.csv").write_text(text, encoding="utf-8")
    for source in (str(clips), put_memory(clips, "bucket/clips")):
        with pytest.raises(DatasetError, match=message) as caught:
            samples_of(source)
        assert "SECRET" not in str(caught.value)


def test_data_at_a_url_never_name_files_of_this_machine(clips: Path) -> None:
    path = clips / "metadata.csv"
    text = path.read_text(encoding="utf-8")
    for name in (f"file://{clips}/0.wav", f"{clips}/0.wav"):
        path.write_text(text.replace("001,1.wav", f"001,{name}"), encoding="utf-8")
        with pytest.raises(DatasetError, match="names a file of this machine"):
            samples_of(put_memory(clips, "bucket/clips"), allow_outside=True)


def test_local_rows_may_name_urls_if_allowed(clips: Path) -> None:
    expected = samples_of(str(clips))
    put_memory(clips, "bucket/clips")
    path = clips / "metadata.csv"
    text = path.read_text(encoding="utf-8")
    for number in range(24):
        text = text.replace(f",{number}.wav,", f",memory://bucket/clips/{number}.wav,")
    path.write_text(text, encoding="utf-8")
    assert samples_of(str(clips), allow_outside=True) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host.example/data.parquet", "pass --allow-outside"),
        ("https://user:SECRET@host.example/data.parquet", "holds credentials"),
        ("https://host.example/data.parquet?X-Amz-Signature=SECRET", "holds credentials"),
        ("s3://KEY:SECRET@bucket/data", "holds credentials"),
        ("ftp://host.example/data", "no scheme ftp://"),
        ("simplecache::s3://bucket/data", "no such folder or file"),
        ("s3://bucket/../other", "may not hold"),
    ],
)
def test_urls_that_are_not_accepted_are_refused_before_any_request(url: str, message: str) -> None:
    with pytest.raises((DatasetError, RemoteError), match=message) as caught:
        open_dataset(url)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ImportError

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(RemoteError, match=r"gs:// needs the package gcsfs, with: pip install gcsfs"):
        open_dataset("gs://bucket/data")


def test_text_and_vectors_in_files_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["id,label,words_file_name,vector_file_name"]
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"word {number}", encoding="utf-8")
        np.save(tmp_path / f"{number}.npy", rng.random(4))
        lines.append(f"{number},{'ab'[number % 2]},{number}.txt,{number}.npy")
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    assert samples_of(put_memory(tmp_path, "bucket/texts")) == samples_of(str(tmp_path))


def test_folders_of_frames_are_read(clips: Path) -> None:
    lines = ["id,label,audio_file_name,visual_frames"]
    for number in range(8):
        (clips / f"frames/{number}").mkdir(parents=True)
        for frame in range(11):
            (clips / f"frames/{number}/{frame}.png").write_bytes((clips / f"{(number + frame) % 24}.png").read_bytes())
        lines.append(f"{number},{'ab'[number % 2]},{number}.wav,frames/{number}")
    (clips / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    assert samples_of(put_memory(clips, "bucket/frames")) == samples_of(str(clips))


def test_large_media_are_read_from_the_cache_and_survive_its_clearing(
    forms: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmaudit.audit.dataset.cells.MAX_IN_MEMORY", 100)
    dataset = open_dataset(put_memory(forms["metadata"], "bucket/clips"))
    modality = dataset.modalities[0]
    loader = dataset._loader(modality)
    medium = loader._read_medium("0.wav", max_bytes=100)
    for file in cache.rglob("*"):
        if file.is_file():
            file.unlink()
    assert medium[:4] == b"RIFF"
    assert len(medium) == (forms["metadata"] / "0.wav").stat().st_size
    with pytest.raises(UnusableError):
        loader._read_medium("none.wav", max_bytes=100)


def test_the_cache_is_used_and_bounded(forms: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (forms["metadata"] / "0.wav").stat().st_size
    monkeypatch.setenv("MMAUDIT_CACHE_GB", str(5 * size / 1e9))
    url = put_memory(forms["metadata"], "bucket/clips")
    assert samples_of(url) == samples_of(str(forms["metadata"]))
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 5 * size
    monkeypatch.setenv("MMAUDIT_CACHE_GB", "1")
    root = open_dataset(url).root
    copy = cached_file(root / "0.wav")  # type: ignore[arg-type]
    fsspec.filesystem("memory").store["/bucket/clips/0.wav"] = None  # a request would fail
    assert cached_file(root / "0.wav") == copy  # type: ignore[arg-type]
    monkeypatch.setenv("MMAUDIT_CACHE_GB", str(size / 2 / 1e9))
    with pytest.raises(RemoteError, match="MMAUDIT_CACHE_GB"):
        cached_file(root / "1.wav")  # type: ignore[arg-type]
