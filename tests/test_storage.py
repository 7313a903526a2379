"""Tests of storage: files and folders are written completely or not at all, also by concurrent or killed writers."""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit import storage
from mmaudit.audit.errors import ManifestError, RunError, ScoreError
from mmaudit.audit.storage import (
    PROVENANCE_KEY,
    atomic_folder,
    atomic_write,
    read_batches,
    read_json,
    read_parquet,
    read_schema,
    remove_leftovers,
    replace_folder,
    scratch_folder,
    write_json,
    write_parquet,
    write_text,
)
from mmaudit.audit.workers import ProcessId, this_process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def temporary_name(writer: object) -> str:
    return f".mmaudit-{writer}-{secrets.token_hex(4)}.tmp"


def ended_process() -> ProcessId:
    """Return the identity of an ended process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pass
    return ProcessId(machine=this_process().machine, pid=process.pid, start="0")


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert names(path.parent) == ["file.txt"]


def test_bytes_are_flushed_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsynced_files: Callable[[int], None]
) -> None:
    target = tmp_path / "target"
    flushed: list[tuple[int, bool]] = []

    def fsync(handle: int) -> None:
        unsynced_files(handle)
        flushed.append((os.fstat(handle).st_ino, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(target) as temporary:
        temporary.write_text("text")
    assert flushed == [(target.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    target.unlink()
    flushed.clear()
    with atomic_folder(target) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("text")
    inside = [target, target / "deep", target / "deep" / "file"]
    assert sorted(flushed[:-1]) == sorted((path.stat().st_ino, False) for path in inside)
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_file_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text("text", path)
    assert path.read_text() == "text"
    with pytest.raises(OSError, match="too long") as caught:
        write_text("text", tmp_path / ("n" * 256))
    assert caught.value.filename == str(tmp_path / ("n" * 256))


def test_concurrent_writers_leave_one_complete_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    texts = [str(number) * 100_000 for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda text: write_text(text, path), texts))
    assert path.read_text() in texts
    assert names(tmp_path) == ["file.txt"]


def test_leftovers_of_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = (
        "import sys, time; from pathlib import Path; from mmaudit.audit.storage import atomic_write, scratch_folder\n"
        "with atomic_write(Path(sys.argv[1])) as file, scratch_folder(file.parent) as folder:\n"
        "    file.write_text('half'); (folder / 'part').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 3  # its writer is running
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3
    write_text("new", path)
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "new"


def test_only_leftovers_of_ended_writers_are_removed(tmp_path: Path) -> None:
    own_process = this_process()
    other_machine = ProcessId(machine="00000000", pid=own_process.pid, start=own_process.start)
    later_process = ProcessId(machine=own_process.machine, pid=own_process.pid, start="1")
    remaining = [temporary_name(own_process), temporary_name(other_machine), "notes.txt", ".mmaudit-notes.tmp"]
    removed = [temporary_name(ended_process()), temporary_name(later_process)]
    for name in (*remaining, *removed):
        (tmp_path / name).write_text("")
    old = [temporary_name(other_machine), temporary_name("unknown")]
    for name in old:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
        os.utime(tmp_path / name, (0, time.time() - 2 * 86_400))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(remaining)


def test_folder_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    for index, exchange in enumerate((storage._exchange, storage._exchange, lambda first, second: False)):
        monkeypatch.setattr(storage, "_exchange", exchange)
        with atomic_folder(path) as temporary:
            (temporary / f"{index}.txt").write_text("text")
        assert names(path) == [f"{index}.txt"]
        assert names(tmp_path) == ["folder"]

    def fail() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "half.txt").write_text("text")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert names(path) == ["2.txt"]
    assert names(tmp_path) == ["folder"]


def test_folders_are_exchanged_by_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    monkeypatch.setattr(Path, "replace", None)  # one system call, not two renames
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"]


def test_errors_name_the_target_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(error: OSError) -> None:
        with atomic_write(path):
            raise error

    for error in (OSError(28, "No space left on device"), OSError(28, "full", str(tmp_path / temporary_name("x")))):
        with pytest.raises(OSError, match="28") as caught:
            write(error)
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="other") as caught:
        write(FileNotFoundError(2, "no such file", "other"))
    assert caught.value.filename == "other"


def test_json_round_trips(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"name": "b\udcff.wav"}}
    write_json(content, tmp_path / "file.json")
    assert read_json(tmp_path / "file.json", error=RunError) == content
    write_text("b\udcff", tmp_path / "file.json")
    with pytest.raises(RunError, match="damaged"):
        read_json(tmp_path / "file.json", error=RunError)


def test_scratch_folders_are_removed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "deep") as first, scratch_folder(tmp_path / "deep") as second:
        (first / "part").write_text("")
        assert first != second
    assert names(tmp_path / "deep") == []


TABLE = pa.table({"id": ["a", "b"], "value": [1.0, None]})


def test_write_then_read_round_trips(tmp_path: Path) -> None:
    provenance = {"seed": 3, "nested": {"list": [1, 2.5, None, "ü"]}}
    write_parquet(TABLE, tmp_path / "new" / "t.parquet", provenance=provenance)
    table, read_provenance = read_parquet(tmp_path / "new" / "t.parquet", error=ScoreError)
    assert table.equals(TABLE)
    assert read_provenance == provenance
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_same_table_gives_same_bytes(tmp_path: Path) -> None:
    pandas_metadata = TABLE.replace_schema_metadata({"pandas": "somewhere else"})
    write_parquet(TABLE, tmp_path / "one", provenance={"a": 1, "b": 2})
    write_parquet(pandas_metadata, tmp_path / "two", provenance={"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_file_of_other_writer_has_no_provenance(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet", error=ScoreError) == (TABLE, {})


def test_provenance_is_stored_under_one_key(tmp_path: Path) -> None:
    write_parquet(TABLE, tmp_path / "t.parquet", provenance={"a": 1})
    assert json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[PROVENANCE_KEY]) == {"a": 1}


def test_unreadable_file_raises_requested_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_parquet(tmp_path / "none.parquet", error=ManifestError)
    (tmp_path / "odd.parquet").write_text("id,value\na,1\n")
    with pytest.raises(ScoreError, match=r"odd\.parquet cannot be read as Parquet"):
        read_parquet(tmp_path / "odd.parquet", error=ScoreError)


def test_failed_write_keeps_the_old_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_json({"b": 1, "a": [2]}, path)
    old = path.read_bytes()
    assert json.loads(old) == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"a": math.nan}, path)
    assert path.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Return the bytes with some flipped, cut, zeroed, repeated or inserted."""
    data, position = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(("flip", "flip", "cut", "zero", "repeat", "insert"))
    if kind == "flip":
        for _ in range(draw.choice((1, 4, 16))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "cut":
        del data[position:]
    elif kind == "zero":
        data[position : position + 32] = bytes(len(data[position : position + 32]))
    elif kind == "repeat":
        data[position:position] = data[position : position + 64]
    else:
        data[position:position] = draw.randbytes(8)
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"compression": "none", "use_dictionary": False}, {"row_group_size": 8}])
def test_damage_anywhere_raises_requested_error(tmp_path: Path, options: dict[str, object]) -> None:
    rows = {"id": [f"s{n}" for n in range(40)], "label": ["a", "b"] * 20, "x": [[n / 7] for n in range(40)]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(rows), path, **options)
    good, draw, messages = path.read_bytes(), random.Random(7), list[str]()
    for _ in range(150):
        path.write_bytes(mutate(good, draw))
        try:
            sum(len(str(batch.to_pylist())) for batch in read_batches(path, error=ScoreError, rows=16))
            read_parquet(path, error=ScoreError)
        except ScoreError as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


def test_changed_bytes_are_detected_by_checksums(tmp_path: Path) -> None:
    """Pages have checksums, so that changes that decode to other values are detected, too."""
    path = tmp_path / "t.parquet"
    write_parquet(pa.table({"id": [f"sample {n}" for n in range(9)]}), path, provenance={})
    good = path.read_bytes()
    begin, end = 40, pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    for position in range(begin, end):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            table, _ = read_parquet(path, error=ScoreError)
        except ScoreError:
            continue
        assert table["id"].to_pylist() == [f"sample {n}" for n in range(9)]  # a statistic that is not read


def test_duplicate_columns_and_impossible_row_counts_raise_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ScoreError, match=r"t\.parquet has 2 columns named a: column names must be unique"):
        read_schema(path, error=ScoreError)
    pq.write_table(pa.table({"a": pa.nulls(1_000_000, pa.int8())}), path)
    with pytest.raises(ScoreError, match="the footer states 1,000,000 rows, the file has only"):
        read_parquet(path, error=ScoreError)


def test_views_are_read_as_plain_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": pa.array(["x"], pa.string_view()), "b": pa.array([b"y"], pa.binary_view())}), path)
    schema = pa.schema([("a", pa.string()), ("b", pa.binary())])
    assert read_schema(path, error=ScoreError).equals(schema)
    assert read_parquet(path, error=ScoreError)[0].schema.equals(schema)
    assert [batch.schema.equals(schema) for batch in read_batches(path, error=ScoreError, rows=1)] == [True]


@pytest.mark.parametrize("text", [b"[1]", b"5", b"\xff", b'{"a": NaN}', b"[" * 9_999, b'{"a": ' + b"9" * 5_000 + b"}"])
def test_damaged_provenance_raises_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE.replace_schema_metadata({PROVENANCE_KEY: text}), path)
    with pytest.raises(ScoreError, match=r"t\.parquet: the metadata under the key mmaudit are damaged: "):
        read_parquet(path, error=ScoreError)


def test_huge_footer_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE.replace_schema_metadata({PROVENANCE_KEY: json.dumps({"a": "x" * (3 << 20)})}), path)
    assert read_parquet(path, error=ScoreError)[0].num_rows == 2
    monkeypatch.setattr("mmaudit.audit.storage._MAX_FOOTER", 1 << 20)
    with pytest.raises(ScoreError, match=r"t\.parquet cannot be read as Parquet: the footer has \d MiB"):
        read_parquet(path, error=ScoreError)


def test_relative_path_like_a_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("hf:/owner/a.parquet")
    write_parquet(pa.table({"a": [1, 2]}), path, provenance={})
    assert read_parquet(path, error=ScoreError)[0]["a"].to_pylist() == [1, 2]


def test_columns_read_in_pieces_are_not_held_whole(tmp_path: Path) -> None:
    path, num_rows = tmp_path / "one-row-group.parquet", 1_000_000
    values = pa.array(np.random.default_rng(0).random(num_rows))  # 8 MB that cannot be compressed
    pq.write_table(pa.table({"value": values}), path, row_group_size=num_rows, use_dictionary=False)
    largest = {}
    for buffer_bytes in (0, 1 << 16):
        batches: list[pa.Table] = []
        before, most = pa.total_allocated_bytes(), 0
        for batch in read_batches(path, error=ScoreError, rows=10_000, buffer_bytes=buffer_bytes):
            most = max(most, pa.total_allocated_bytes() - before - sum(len(read) for read in batches) * 8)
            batches.append(batch)
        assert pa.concat_tables(batches)["value"].combine_chunks().equals(values)
        largest[buffer_bytes] = most
        del batch, batches
    assert largest[0] > 7e6
    assert largest[1 << 16] < 4e6
