"""Requests: faults of a server are retried, limited in time, and reported in one line that names the URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_files import Faults, range_server

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.errors import ConfigError, RemoteError
from mmaudit.audit.features.encoded_samples import content_hashes
from mmaudit.audit.remote import requests
from mmaudit.audit.remote.paths import RemotePath
from mmaudit.audit.remote.requests import merge_ranges, read_ranges
from mmaudit.audit.remote.settings import remote_settings


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "_WAITS", (0.01, 0.01, 0.01))
    yield
    requests.forget()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def url(clip_source: Path, faults: Faults) -> Iterator[str]:
    with range_server(clip_source, faults) as address:
        yield address


def read_all(url: str) -> dict[str, str | None]:
    dataset = open_dataset(url, DataConfig(allow_outside=True))
    return {row.sample_id: row.problem for row in content_hashes(dataset)}


def test_a_get_that_fails_twice_is_tried_again(url: str, faults: Faults) -> None:
    faults.by_path["/5.wav"] = ["500", "500", ""]
    assert set(read_all(url).values()) == {None}
    assert sum(path == "/5.wav" and command == "GET" for command, path, _ in faults.requests) == 3


def test_a_body_cut_twice_is_tried_again(url: str, faults: Faults) -> None:
    faults.by_path["/5.wav"] = ["short", "short", ""]
    assert set(read_all(url).values()) == {None}


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["500"], "in 4 tries"),
        (["short"], "it is truncated, in 4 tries"),
        (["403"], r"access denied \(403\)"),
        (["redirect"], "5.wav"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_no_missing_sample(
    url: str, faults: Faults, kinds: list[str], message: str
) -> None:
    faults.by_path["/5.wav"] = kinds
    with pytest.raises(RemoteError, match=message) as caught:
        read_all(url)
    assert str(caught.value).startswith(f"{url}/5.wav: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("on_head", [False, True])
def test_a_slow_answer_has_a_time_limit(
    url: str, faults: Faults, on_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMAUDIT_REMOTE_SECONDS", "0.2")
    monkeypatch.setattr(requests, "_WAITS", ())
    faults.by_path["/5.wav"], faults.on_head = ["slow"], on_head
    path = RemotePath.parse(f"{url}/5.wav")
    with pytest.raises(RemoteError, match=r"5\.wav: no answer within 0\.2 s \(MMAUDIT_REMOTE_SECONDS\), in 1 tries"):
        path.read_bytes()


@pytest.mark.parametrize("kind", ["403", "500"])
def test_a_fault_of_the_data_themselves_is_one_line(url: str, faults: Faults, kind: str) -> None:
    faults.on_head, faults.by_path["/metadata.csv"] = True, [kind]
    with pytest.raises(RemoteError, match=r"/metadata\.csv: "):
        open_dataset(f"{url}/metadata.csv", DataConfig(allow_outside=True))


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:9/metadata\.csv: .*in 4 tries"):
        open_dataset("http://127.0.0.1:9/metadata.csv", DataConfig(allow_outside=True))


def test_a_look_up_that_fails_is_not_a_missing_file() -> None:
    for cause, kind in ((TimeoutError(), "retried"), (ConnectionResetError(), "retried"), (KeyError("x"), "missing")):
        error = FileNotFoundError("x")
        error.__cause__ = cause
        assert requests._failure(error)[0] == kind


def test_ranges_are_those_of_the_file(url: str, clip_source: Path) -> None:
    data = (clip_source / "1.wav").read_bytes()
    parts = read_ranges(f"{url}/1.wav", [(100, 200), (10, 20), (300, 300)], size=len(data))
    assert parts == [(10, data[10:200])]  # a gap of 80 bytes is read as well


def test_near_ranges_are_merged() -> None:
    assert merge_ranges([(0, 10), (5, 20), (100_000, 100_001), (20, 30)]) == [(0, 30), (100_000, 100_001)]
    assert merge_ranges([(7, 7)]) == []


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_ranged_file_reads_as_a_file(url: str, clip_source: Path, step: int) -> None:
    data = (clip_source / "1.wav").read_bytes()
    with RemotePath.parse(f"{url}/1.wav").open() as file:
        file.preload([(50, 90), (500, 700)])
        positions = [0, 49, 50, 51, 89, 90, 499, 600, 699, len(data) - 3, len(data), 2]
        for start in positions:
            file.seek(start)
            assert file.read(step) == data[start : start + step]
        assert file.seek(-4, 2) == len(data) - 4
        assert file.read() == data[-4:]


@pytest.mark.parametrize("name", ["MMAUDIT_CACHE_GB", "MMAUDIT_REMOTE_THREADS", "MMAUDIT_REMOTE_SECONDS"])
@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_settings_out_of_range_are_refused(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=name):
        remote_settings()


@pytest.mark.parametrize("name", ["a/../../b.wav", "./b.wav", "a/.."])
def test_an_object_that_no_relative_path_names_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, info = "memory://bucket/clips", {"size": 1, "type": "file"}
    names = {"find": {f"/bucket/clips/{name}": info}, "ls": [{**info, "name": f"/bucket/clips/{name.split('/')[-1]}"}]}
    monkeypatch.setattr(requests, "call", lambda url, method, **_: names[method])
    for read in (requests.find, requests.list_folder) if name.endswith("..") else (requests.find,):
        with pytest.raises(RemoteError, match="which is no plain path"):
            read(url)
