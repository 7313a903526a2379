"""Tests of opening files: special files raise a one-line error, without waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.downloads.ingest import ingest
from mmaudit.audit.downloads.unpickle import read_pickle
from mmaudit.audit.errors import MmauditError, RunError
from mmaudit.audit.storage import check_regular, open_regular, read_footer, read_json
from mmaudit.cli.config import load_config
from mmaudit.cli.run import Run
from mmaudit.rebalance.score_tables import open_scores


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    working_folder = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket has at most 108 characters
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        os.chdir(working_folder)
        yield {name: tmp_path / name for name in ("fifo", "folder", "zero", "socket")}


@pytest.mark.parametrize(
    ("name", "kind"), [("fifo", "a FIFO"), ("folder", "a folder"), ("zero", "a device"), ("socket", "a socket")]
)
def test_only_regular_files_are_opened(special: dict[str, Path], name: str, kind: str) -> None:
    for read in (open_regular, check_regular):
        with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
            read(special[name])


def test_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("run.toml", load_config),
    "json": ("run.json", lambda path: read_json(path, error=RunError)),
    "pickle": ("a.pkl", read_pickle),
    "mosei": ("train.npz", lambda path: ingest("mosei", path.parent, out=path.parent / "o.parquet")),
    "list": ("train.csv", lambda path: ingest("ogm-ge", path.parent, lists=[path])),
    "scores": ("scores.parquet", lambda path: open_scores(path, seed=0)),
    "score shards": ("part.parquet", lambda path: open_scores(path.parent, seed=0)),
    "metadata": ("metadata.csv", lambda path: open_dataset(path.parent)),
    "table": ("a.csv", open_dataset),
    "tables": ("a.jsonl", lambda path: open_dataset(path.parent / "*.jsonl")),
    "table of rows": ("a.parquet", open_dataset),
    "manifest": (
        "m.parquet",
        lambda path: read_footer(Run(folder=path.parent).find_manifest(str(path)), error=RunError),
    ),
    "parquets": ("a.parquet", lambda path: open_dataset(path.parent / "*.parquet")),
    "tars": ("a.tar", lambda path: open_dataset(path.parent / "*.tar")),
    "tar in a folder": ("a.tar", lambda path: open_dataset(path.parent)),
    "parquet in a folder": ("a.parquet", lambda path: open_dataset(path.parent)),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_do_not_wait_for_a_fifo(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    os.mkfifo(tmp_path / name)
    child = os.fork()
    if child == 0:  # in a child process, which is killed if it waits
        try:
            read(tmp_path / name)
            code = 1
        except MmauditError as error:
            code = 0 if len(str(error).splitlines()) == 1 else 2
        except BaseException:
            code = 3
        os._exit(code)
    watchdog = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(20); os.kill({child}, 9)"])
    _, status = os.waitpid(child, 0)
    watchdog.kill()
    watchdog.wait()
    assert os.waitstatus_to_exitcode(status) == 0
