"""Indexes of tars in the cache: the same samples without reading the tar, and never those of another tar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_files import Faults, range_server
from test_tars import npy, pack

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.formats import tar_index
from mmaudit.audit.dataset.formats.tar_index import index_tar
from mmaudit.audit.errors import DatasetError, RemoteError
from mmaudit.audit.remote import requests
from mmaudit.audit.remote.paths import RemotePath

MEMBERS = [
    ("a/1.png", b"sight"),
    (
        "a/1.json",
        b'{"a": NaN, "b": 1e-7, "c": [1, null, "\\ud800"], "d": 123456789012345678901, "e": {"f": 1}}',
    ),
    ("a/1.cls", b"3"),
    ("a/2.npy", npy([1.5, 2.0])),
    ("a/2.txt", "Über".encode()),
    ("README", b"x"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "_MIN_KEPT", 1)
    yield tmp_path / "cache"
    requests.forget()


def refuse(*_: Any) -> Any:
    raise AssertionError("the headers are read again")


def test_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = pack(tmp_path / "a.tar", MEMBERS)
    first, said = index_tar(path), [record.getMessage() for record in caplog.records]
    assert "skipped 1 members" in said[0]
    caplog.clear()
    monkeypatch.setattr(tar_index, "_read_headers", refuse)
    again = index_tar(path)
    assert repr(again) == repr(first)  # NaN is not equal to itself
    assert [record.getMessage() for record in caplog.records] == said


def test_index_of_a_tar_that_has_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "a.tar", MEMBERS)
    index_tar(path)
    status = path.stat()
    pack(path, [("a/1.png", b"sound"), *MEMBERS[1:]])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time, but changed later
    monkeypatch.setattr(tar_index, "_read_headers", refuse)
    with pytest.raises(AssertionError, match="read again"):
        index_tar(path)


def test_damaged_index_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path = pack(tmp_path / "a.tar", MEMBERS)
    first = index_tar(path)
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert len(files) == 1
    for damaged in (b"", files[0].read_bytes()[:20], b"[]"):
        files[0].write_bytes(damaged)
        assert repr(index_tar(path)) == repr(first)


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    assert len(index_tar(pack(tmp_path / "a.tar", MEMBERS))) == 2


def test_tar_without_samples_is_an_error_each_time(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [("README", b"x")])
    for _ in range(2):
        with pytest.raises(DatasetError, match="has no samples"):
            index_tar(path)


def test_small_tars_of_this_machine_are_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_MIN_KEPT", 3)
    index_tar(pack(tmp_path / "a.tar", MEMBERS))
    assert not cache.exists()


def test_index_of_a_tar_at_a_url_is_read_once(tmp_path: Path) -> None:
    """A later process asks for its size and tag alone."""
    folder = tmp_path / "served"
    members = [(f"{number:03d}.{name}", b"x" * 70_000) for number in range(30) for name in ("png", "wav")]
    pack(folder / "a.tar", members)
    faults = Faults()
    with range_server(folder, faults) as url:
        path = RemotePath.parse(f"{url}/a.tar")
        first = index_tar(path)
        assert sum(method == "GET" for method, *_ in faults.requests) >= 5
        requests.forget()
        faults.requests.clear()
        assert index_tar(path) == first
        assert [method for method, *_ in faults.requests] == ["HEAD"]
        os.utime(folder / "a.tar", ns=(1, 1))  # another tag
        requests.forget()
        faults.requests.clear()
        assert index_tar(path) == first
        assert sum(method == "GET" for method, *_ in faults.requests) >= 5


@pytest.mark.parametrize("form", ["query", "saved"])
def test_sources_at_urls_that_are_not_read_are_one_line(tmp_path: Path, form: str) -> None:
    import datasets

    with range_server(tmp_path) as url:
        if form == "query":
            with pytest.raises(RemoteError, match="download what a presigned URL names, or name it by s3://") as caught:
                open_dataset(f"{url}/data.tar?X-Amz-Signature=SECRET")
            assert "SECRET" not in str(caught.value)
            return
        datasets.Dataset.from_dict({"label": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(DatasetError, match="was saved by save_to_disk, which is read on this machine only"):
            open_dataset(f"{url}/saved", DataConfig(allow_outside=True))
