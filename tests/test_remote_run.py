"""Runs at URLs: what a command publishes, another reads from an empty working copy."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grown
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from fsspec.implementations.memory import MemoryFileSystem

import mmaudit
from mmaudit.audit.engine import selection
from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.audit.errors import ConfigError, RemoteError, RunError
from mmaudit.audit.features import encoded_samples
from mmaudit.audit.remote import locks, requests
from mmaudit.audit.remote.locks import remote_lock
from mmaudit.audit.remote.paths import RemotePath
from mmaudit.audit.workers import this_process
from mmaudit.cli import appending
from mmaudit.cli.remote_run import RECORDS, WorkingCopy, read_records
from mmaudit.cli.run import Run

pytestmark = pytest.mark.usefixtures("quick_scores")

URL = "memory://bucket/run"
QUICK = {"probe.repeats": 1, "probe.folds": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_figures: None) -> Iterator[Path]:
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "_WAITS", (0.01, 0.01, 0.01))
    yield tmp_path / "cache"
    MemoryFileSystem.store.clear()
    requests.forget()


def bytes_of(folder: Path) -> dict[str, bytes]:
    names = ("scores.parquet", "quarantine.parquet", "mixture.json", "manifests/balanced.parquet")
    return {name: (folder / name).read_bytes() for name in names}


def remote_bytes(name: str) -> bytes:
    return bytes(MemoryFileSystem().cat_file(f"/bucket/run/{name}"))


def write_parts(folder: Path) -> Path:
    """Write 120 samples in eight row groups."""
    pq.write_table(gaussian_table(num_samples=120), folder / "data.parquet", row_group_size=15)
    return folder / "data.parquet"


@pytest.mark.slow
def test_a_run_at_a_url_has_the_bytes_of_a_local_one(planted: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    data = planted()
    mmaudit.score(data, run=tmp_path / "local", settings=QUICK, progress=False)
    mmaudit.split(run=tmp_path / "local", balanced=True)
    mmaudit.score(data, run=URL, settings=QUICK, progress=False)
    shutil.rmtree(cache)  # as on another machine
    result = mmaudit.split(run=URL, balanced=True)
    assert result.manifest is not None
    assert result.manifest.is_file()
    local = bytes_of(tmp_path / "local")
    assert {name: remote_bytes(name) for name in local} == local
    shutil.rmtree(cache)
    assert mmaudit.report(run=URL).page.read_bytes()
    record = json.loads(remote_bytes("run.json"))
    assert record["fingerprint"] == json.loads((tmp_path / "local/run.json").read_bytes())["fingerprint"]


def test_stages_at_a_url_run_in_processes_that_share_nothing_else(tmp_path: Path, cache: Path) -> None:
    data, settings = write_parts(tmp_path), {**QUICK, "parts.rows": 15}
    mmaudit.score(data, run=tmp_path / "local", settings=settings, progress=False)
    for stage, shard in [("encode", "2/2"), ("encode", "1/2"), ("fit", None), ("score", "1/2"), ("score", "2/2")]:
        mmaudit.score(data, run=URL, settings=settings, stage=stage, shard=shard, progress=False)
        shutil.rmtree(cache)
    mmaudit.score(data, run=URL, settings=settings, stage="merge", progress=False)
    parts = sorted((tmp_path / "local/scores").glob("*.parquet"))
    assert len(parts) == 8
    for part in parts:
        assert remote_bytes(part.relative_to(tmp_path / "local").as_posix()) == part.read_bytes()
    assert not any(path.startswith("stages/") for path in read_records(RemotePath.parse(URL)))


@pytest.fixture
def copy(tmp_path: Path) -> WorkingCopy:
    opened = WorkingCopy.of(RemotePath.parse(URL))
    for name in ("run.json", "scores.parquet", "stages/rows/part-00000.arrow", "stages/rows/part-00000.json"):
        path = opened.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return opened


def fetch(cache: Path) -> Path:
    shutil.rmtree(cache, ignore_errors=True)
    opened = WorkingCopy.of(RemotePath.parse(URL))
    opened.folder.mkdir(parents=True)
    opened.fetch(lambda path: True)
    return opened.folder


def test_records_are_put_after_their_files_and_removed_before(
    copy: WorkingCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    run = requests._run

    def record(system: object, name: str, *args: object, **options: Any) -> object:
        if name in ("pipe_file", "put_file", "rm_file"):
            path = str(args[1] if name == "put_file" else args[0])
            done.append(("rm" if name == "rm_file" else "put", path.removeprefix("/bucket/run/").partition("@")[0]))
        return run(system, name, *args, **options)

    monkeypatch.setattr(requests, "_run", record)
    copy.publish()
    order = [path for _, path in done]
    assert order[-2:] == ["run.json", f"{RECORDS}/run.json"]
    for path in read_records(copy.url):
        assert order.index(path) < order.index(f"{RECORDS}/{path.replace('/', '%2F')}")
    assert order.index("stages/rows/part-00000.arrow") < order.index("stages/rows/part-00000.json")
    done.clear()
    for name in ("run.json", "scores.parquet"):
        (copy.folder / name).write_text("another", encoding="utf-8")
    copy.publish()
    assert done[:2] == [("rm", f"{RECORDS}/run.json"), ("rm", f"{RECORDS}/scores.parquet")]
    assert done[-1] == ("put", f"{RECORDS}/run.json")


def test_a_publication_that_fails_leaves_no_finished_run_and_is_completed(
    copy: WorkingCopy, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.publish()
    (copy.folder / "run.json").write_text("new", encoding="utf-8")
    (copy.folder / "scores.parquet").write_text("new", encoding="utf-8")
    put = copy._put_file.__func__  # type: ignore[attr-defined]

    def fail(self: WorkingCopy, path: str, record: object) -> None:
        if path == "scores.parquet":
            raise RemoteError("the network ended")
        put(self, path, record)

    with monkeypatch.context() as patch:
        patch.setattr(WorkingCopy, "_put_file", fail)
        with pytest.raises(RemoteError, match="ended"):
            copy.publish()
    assert "run.json" not in read_records(copy.url)
    WorkingCopy.of(copy.url).publish()  # the next command on this machine
    folder = fetch(cache)
    assert {name: (folder / name).read_text() for name in ("run.json", "scores.parquet")} == {
        "run.json": "new",
        "scores.parquet": "new",
    }


def test_a_file_that_differs_from_its_record_is_not_read(copy: WorkingCopy, cache: Path) -> None:
    copy.publish()
    MemoryFileSystem().pipe_file("/bucket/run/scores.parquet", b"scores.parqueT")
    with pytest.raises(RemoteError, match=f"{URL}: files differ from their records"):
        fetch(cache)


def test_files_that_are_gone_are_removed_in_both_directions(copy: WorkingCopy, cache: Path) -> None:
    copy.publish()
    (copy.folder / "stages/rows/part-00000.json").unlink()
    copy.publish()
    assert "stages/rows/part-00000.json" not in read_records(copy.url)
    assert not MemoryFileSystem().exists("/bucket/run/stages/rows/part-00000.json")
    other = WorkingCopy(url=copy.url, folder=cache / "other")
    other.fetch(lambda path: True)
    (copy.folder / "scores.parquet").unlink()
    copy.publish()
    other.fetch(lambda path: True)
    assert not (cache / "other/scores.parquet").exists()


@pytest.mark.parametrize(
    "path",
    ["../run.json", "/etc/x", ".hidden", "a/../../b", "a//b", "a\0b", "a\nb", "a\x7f", "\x1b[31m", "a\u202eb", "a\\b"],
)
def test_a_run_may_not_name_files_outside(path: str, copy: WorkingCopy, cache: Path) -> None:
    from urllib.parse import quote

    copy.publish()
    MemoryFileSystem().pipe_file(f"/bucket/run/{RECORDS}/{quote(path, safe='')}@1-{'0' * 64}", b"1")
    with pytest.raises(RunError, match="no record of a file of a run"):
        fetch(cache)


def test_a_lock_is_refused_while_its_process_runs_and_taken_over_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = RemotePath.parse(URL)
    path = folder / f"{locks.FOLDER}/score.json"
    message = r"held by mmaudit score \(process \d+ on"
    with remote_lock(folder, "score"), pytest.raises(RunError, match=message), remote_lock(folder, "score"):
        pass
    assert not path.exists()
    ended = {"token": "x", "command": "mmaudit score", "host": "here", "process": str(this_process())}
    ended["process"] = ended["process"].rpartition("-")[0] + "-1"  # the same pid, started at another time
    requests.call(str(path), "pipe_file", json.dumps(ended).encode())
    with remote_lock(folder, "score") as lock:
        lock.check()
        requests.call(str(path), "pipe_file", b"{}")
        with pytest.raises(RunError, match="taken over"):
            lock.check()


def test_a_lock_of_another_machine_is_taken_over_unless_it_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.3)
    folder = RemotePath.parse(URL)
    path = folder / f"{locks.FOLDER}/score.json"
    other = {"token": "x", "command": "mmaudit score", "host": "there", "process": "00000000-1-1", "renewal": 0}
    requests.call(str(path), "pipe_file", json.dumps(other).encode())
    with remote_lock(folder, "score"):
        pass
    count = iter(range(100))
    monkeypatch.setattr(RemotePath, "read_bytes", lambda path: json.dumps({**other, "renewal": next(count)}).encode())
    requests.call(str(path), "pipe_file", json.dumps(other).encode())
    with pytest.raises(RunError, match="wait until it has ended"), remote_lock(folder, "score"):
        pass


def test_a_file_that_could_not_be_read_again_is_not_published(copy: WorkingCopy) -> None:
    copy.publish()
    before = dict(MemoryFileSystem.store)
    for name in ("a\nb.parquet", "a\\b.parquet"):
        (copy.folder / name).write_text("x", encoding="utf-8")
        with pytest.raises(RunError, match="no file of a run at a URL has such a name"):
            copy.publish()
        (copy.folder / name).unlink()
    assert MemoryFileSystem.store.keys() == before.keys()


def lock_of(command: str, *, is_running: bool = True) -> bytes:
    """Return the lock of this process, or of one of this machine that has ended."""
    process = str(this_process())
    about = {"token": command, "command": command, "host": "here", "renewal": "00000000"}
    return json.dumps({**about, "process": process if is_running else f"{process.rpartition('-')[0]}-1"}).encode()


@pytest.mark.parametrize("case", ["released", "taken over", "cut short"])
def test_a_lock_that_changes_while_it_is_read_is_not_removed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two readings find the lock of a process that ends, or a part of one: a third process gets its own."""
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.3)
    folder, num_read = RemotePath.parse(URL), 0
    path = folder / f"{locks.FOLDER}/score.json"
    read_bytes = RemotePath.read_bytes

    def write(content: bytes) -> None:
        requests.call(str(path), "pipe_file", content)

    def read(self: RemotePath) -> bytes:
        nonlocal num_read
        num_read += 1
        try:
            if num_read == 2 and case == "released":
                requests.call(str(path), "rm_file")
            return read_bytes(self)[: -1 if num_read <= 2 and case == "cut short" else None]
        finally:
            if num_read == 2:
                write(lock_of("another"))

    write(lock_of("first", is_running=case == "released"))
    monkeypatch.setattr(RemotePath, "read_bytes", read)
    with pytest.raises(RunError, match=r"held by another \(process"), remote_lock(folder, "score"):
        pass
    assert read_bytes(path) == lock_of("another")


def test_a_damaged_lock_is_taken_over_when_it_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.3)
    folder = RemotePath.parse(URL)
    for content in (b"", b"{}", b"{", b"[1]", b"\xff", b"[" * 100_000):
        requests.call(str(folder / f"{locks.FOLDER}/score.json"), "pipe_file", content)
        start = time.monotonic()
        with remote_lock(folder, "score") as lock:
            lock.check()
        assert time.monotonic() - start >= 0.3


def test_renewals_have_the_length_of_the_first_lock() -> None:
    lock = locks.RemoteLock(path=RemotePath.parse(URL), token="x", command="mmaudit score")
    assert len({len(replace(lock, renewal=number).content()) for number in (0, 9, 10, 99, 100_000)}) == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("memory://bucket/a\0b", "may not hold control characters"),
        ("memory://bucket/a%00b", "may not hold control characters"),
        ("file:///a%00b", "may not hold control characters"),
        (f"memory://bucket/{'x' * 300}", "holds no finished run"),
        ("s3://KEY:SECRET@bucket/run", "holds credentials"),
        ("https://host.example/run", "a run folder at a URL is s3"),
        ("memory://bucket", "a run folder at a URL is s3"),
        ("memory://bucket/none", "holds no finished run"),
    ],
)
def test_runs_that_are_not_accepted_are_one_line(run: str, message: str) -> None:
    with pytest.raises((RemoteError, RunError), match=message) as caught:
        mmaudit.report(run=run)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(RunError, match="takes a folder"):
        Run.open(run)


def test_file_urls_are_local_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path}/local holds no finished run"):
        mmaudit.report(run=f"file://{tmp_path}/local")


class TwoMachines:
    """A pool of two machines in this process, each with a cache and a job of its own, which do units by turns."""

    size = 2

    def __init__(self, caches: list[Path], shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches, self.monkeypatch = caches, monkeypatch
        self.jobs = [pickle.loads(pickle.dumps(shared)) for _ in caches]
        self.stages: list[str] = []

    def run(self, work: Callable[[Any, Any], Any], units: Sequence[Any], *, names: Sequence[str], stage: str) -> None:
        self.stages.append(stage)
        for number, unit in enumerate(units):
            with self.monkeypatch.context() as patch:
                machine = (number + len(self.stages)) % 2
                patch.setenv("MMAUDIT_CACHE", str(self.caches[machine]))
                work(self.jobs[machine], unit)


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TwoMachines]:
    """The pools that were opened, of two machines in place of Ray's."""
    from mmaudit.audit.engine import ray_executor

    pools: list[TwoMachines] = []

    @contextmanager
    def open_pool(options: Any, *, shared: Any, folder: Path | None, **_: Any) -> Iterator[TwoMachines]:
        assert folder is None
        pools.append(TwoMachines([tmp_path / "first", tmp_path / "second"], shared, monkeypatch))
        yield pools[-1]

    monkeypatch.setattr(ray_executor, "open_pool", open_pool)
    return pools


def test_workers_that_share_no_folder_have_the_bytes_of_one_process(
    tmp_path: Path, cache: Path, pools: list[TwoMachines]
) -> None:
    """Its slow twin, test_two_machines_on_ray_share_a_bucket_alone, does so on Ray and a server of the S3 protocol."""
    data, settings = write_parts(tmp_path), {**QUICK, "parts.rows": 15}
    mmaudit.score(data, run=tmp_path / "local", settings=settings, progress=False)
    mmaudit.score(data, run=URL, settings=settings, engine="ray", num_workers=2, progress=False)
    assert pools[0].stages == ["rows", "encode", "status", "probe", "score"]
    parts = sorted((tmp_path / "local/scores").glob("*.parquet"))
    for name in ("quarantine.parquet", "mixture.json", *(f"scores/{part.name}" for part in parts)):
        assert remote_bytes(name) == (tmp_path / "local" / name).read_bytes(), name
    assert not any(path.startswith("stages/") for path in read_records(RemotePath.parse(URL)))
    # The features are those of the machines: none lies in the working copy of this one.
    assert list((tmp_path / "first").rglob("features/*"))
    assert not list(cache.rglob("features/*.arrow"))
    # A second call finds the run finished.
    mmaudit.score(data, run=URL, settings=settings, engine="ray", num_workers=2, progress=False)
    assert len(pools) == 1


@pytest.mark.slow  # quick twins: the test above it, and test_append_parts.py
@pytest.mark.parametrize("copied", [None, 3])
def test_workers_that_share_no_folder_append_the_bytes_of_one_process(
    copied: int | None, tmp_path: Path, cache: Path, pools: list[TwoMachines], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last parts alone; where new rows include a copy of an old one all parts are read, and their features."""
    for module in (encoded_samples, selection, appending):  # parts that have not changed are not read
        monkeypatch.setattr(module, "SORTED_ROWS", 40)
    rows, config = grown.table(), replace(grown.CONFIG, parts=PartsConfig(rows=15))
    source, local = str(tmp_path / "data/*.parquet"), tmp_path / "local"
    grown.write(rows.slice(0, grown.NUM_OLD), tmp_path / "data/a.parquet")
    mmaudit.score(source, run=local, config=config, num_workers=0, progress=False)
    shutil.copytree(local, WorkingCopy.of(RemotePath.parse(URL)).folder)
    WorkingCopy.of(RemotePath.parse(URL)).publish()
    shutil.rmtree(cache)  # another machine starts the command
    grown.write(rows.slice(grown.NUM_OLD), tmp_path / "data/b.parquet")
    if copied is not None:
        grown.write(grown.with_copy(rows, of=copied, name="copy"), tmp_path / "data/c.parquet")
    mmaudit.score(source, run=local, config=config, append=True, num_workers=0, progress=False)
    mmaudit.score(source, run=URL, config=config, append=True, engine="ray", num_workers=2, progress=False)
    assert [pool.stages for pool in pools] == [["rows", "encode_unchanged", "status", "score"]]
    names = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    compared = {name for name in names if name.startswith(("scores/", "probes/", "quarantine.", "mixture."))}
    assert len(compared) > 10
    for name in sorted(compared):
        assert remote_bytes(name) == (local / name).read_bytes(), name
    assert not any(path.startswith("stages/") for path in read_records(RemotePath.parse(URL)))


def test_one_process_of_several_writes_and_commands_of_one_process_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmaudit.cli import remote_run

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=rf"^--run {URL}: report runs in one process: run it without torchrun$"):
        mmaudit.report(run=URL)
    for rank, writes in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert remote_run._is_writer({"engine": "ray"}) is writes
        assert remote_run._is_writer({}) is writes
    monkeypatch.delenv("RANK")
    assert remote_run._is_writer({})
    assert not remote_run._is_writer({"engine": "ray"})


def test_files_elsewhere_are_refused_in_one_line(planted: Callable[..., Path], tmp_path: Path) -> None:
    data = planted(num_samples=60)
    with pytest.raises(ConfigError, match=f"^--init {data}: with --engine ray and a run at a URL, pass the name of"):
        mmaudit.finetune(data=data, init=str(data), run=URL, engine="ray", num_workers=1, progress=False)
    with pytest.raises(ConfigError, match=r"^--features with --engine ray and a run at a URL: score them with --stage"):
        mmaudit.score(data, features={"a": data}, run=URL, engine="ray", num_workers=1, progress=False)
