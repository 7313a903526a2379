"""Tests of faults on one machine: nothing is lost, no half file is visible, and a rerun gives the undisturbed bytes.

Faults of single files, locks and pools of workers are tested with these: test_storage, test_part_store, test_swap,
test_locks, test_workers; kills within a process in test_stages, signals in test_interrupts.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table, picture
from grown import files

import mmaudit
from mmaudit.audit import storage
from mmaudit.audit.engine import row_data, stages
from mmaudit.audit.errors import DatasetError, MmauditError, RunError
from mmaudit.audit.locks import write_lock
from mmaudit.audit.storage import read_json
from mmaudit.cli import swap
from mmaudit.cli.failures import describe
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score

SETTINGS = ["probe.folds=2", "probe.repeats=1", "probe.l2_penalties=[1e-2]", "probe.control=false", "parts.rows=20"]
OPTIONS: dict[str, Any] = {"settings": SETTINGS, "num_workers": 0}
pytestmark = pytest.mark.usefixtures("quick_scores")

NUM_PARTS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=120), path, row_group_size=15)
    return path


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in eight parts; read-only."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    score(data, run=run, **OPTIONS)
    return run


@pytest.fixture(scope="module")
def staged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which all is done but the merge; read-only."""
    run = tmp_path_factory.mktemp("staged") / "run"
    for stage in ("encode", "fit", "score"):
        score(data, run=run, stage=stage, **OPTIONS)
    return run


def check_same(run: Path, undisturbed: Path) -> None:
    assert files(run) == files(undisturbed)
    records = [Run(folder).record() for folder in (run, undisturbed)]
    for record in records:
        del record["seconds"], record["signature"]
    assert records[0] == records[1]


def visible(run: Path) -> dict[str, bytes]:
    """Return the files that other commands see: not those of stages, nor hidden ones."""
    return {
        name: content
        for name, content in (files(run) if run.exists() else {}).items()
        if not name.startswith(("stages/", ".")) and "/." not in name
    }


def check_no_half_file(run: Path, undisturbed: Path) -> None:
    """Check that all visible files are those of the undisturbed run, and that each part with a record is complete."""
    expected = files(undisturbed)
    assert all(expected[name] == content for name, content in visible(run).items())
    for record_file in (run / "stages").glob("*/*.json"):
        record = read_json(record_file, error=RunError)
        assert record_file.with_suffix(".arrow").stat().st_size == record["size"]


# Damage of what stages leave


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "stages/rows/part-00001.arrow": truncate,
    "stages/status/part-00002.json": Path.unlink,
    "stages/keys/part-00000.arrow": flip,
    "stages/contents/part-00000.arrow": Path.unlink,
    "stages/usable/part-00000.arrow": flip,
    "stages/halves/part-00000.json": Path.unlink,
    "stages/selection/part-00000.arrow": truncate,
    "stages/probes/audio.safetensors": flip,
    "stages/probes/joint.safetensors": Path.unlink,
    "stages/scores/part-00003.arrow": Path.unlink,
    "stages/measured/part-00004.arrow": flip,
    "stages/scores/part-00005.json": truncate,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_result_of_a_stage_is_made_again(
    name: str, data: Path, staged: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(staged, run)
    DAMAGE[name](run / name)
    score(data, run=run, **OPTIONS)
    check_same(run, undisturbed)


def test_all_results_damaged_at_once_are_made_again(
    data: Path, staged: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(staged, run)
    for name, damage in DAMAGE.items():
        damage(run / name)
    for stage in ("encode", "fit", "score", "merge"):
        score(data, run=run, stage=stage, **OPTIONS)
    check_same(run, undisturbed)


# Data that are missing or change between stages


def test_changed_or_missing_data_are_refused_until_they_are_back(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    copy, run = tmp_path / "planted.parquet", tmp_path / "run"
    shutil.copy2(data, copy)
    score(copy, run=run, stage="encode", **OPTIONS)
    pq.write_table(gaussian_table(num_samples=120, seed=1), copy, row_group_size=15)
    with pytest.raises(RunError, match="has parts of other data or of another config"):
        score(copy, run=run, stage="fit", **OPTIONS)
    copy.unlink()
    with pytest.raises(DatasetError, match=r"planted\.parquet"):
        score(copy, run=run, stage="fit", **OPTIONS)
    shutil.copy2(data, copy)
    score(copy, run=run, **OPTIONS)
    without_names = [{**files(folder), "shards.json": b""} for folder in (run, undisturbed)]
    assert without_names[0] == without_names[1]


@pytest.mark.parametrize("change", ["removed", "shorter"])
def test_data_that_change_within_a_stage_are_one_line(
    change: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, read = tmp_path / "planted.parquet", row_data.read_row_table
    shutil.copy2(data, copy)

    def change_and_read(*values: Any, **options: Any) -> pa.Table:
        copy.unlink(missing_ok=True)
        if change == "shorter":
            pq.write_table(gaussian_table(num_samples=30), copy, row_group_size=15)
        return read(*values, **options)

    monkeypatch.setattr(stages, "read_row_table", change_and_read)
    with pytest.raises(MmauditError) as caught:
        score(copy, run=tmp_path / "run", **OPTIONS)
    assert "\n" not in str(caught.value)
    assert "planted.parquet" in str(caught.value)
    assert not visible(tmp_path / "run")


# A full disk


@pytest.mark.parametrize("after", [30, *(pytest.param(after, marks=pytest.mark.slow) for after in (2, 60, 82, 110))])
def test_full_disk_leaves_no_half_file(
    after: int, data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, flush, num_calls = tmp_path / "run", storage.flush, [0]

    def fail(path: Path) -> None:
        num_calls[0] += 1
        if num_calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "flush", fail)
        patch.setattr(swap, "flush", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            score(data, run=run, **OPTIONS)
    failure = describe(caught.value, command="score", parameters={})
    assert failure.code == 2
    assert failure.line is not None
    assert "free some space, and run the same command again" in failure.line
    check_no_half_file(run, undisturbed)
    assert not list(run.rglob(".mmaudit-*.tmp"))
    score(data, run=run, **OPTIONS)
    check_same(run, undisturbed)


def command(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmaudit", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """Mount a file system in memory of this size."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=False)
    if done.returncode:
        pytest.skip("file systems can only be mounted by root; test_full_disk_leaves_no_half_file does without")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_small_file_system_is_one_line(share: float, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    blocks = sum(4 * -(-path.stat().st_size // 4096) + 4 for path in undisturbed.rglob("*"))
    words: list[str | Path] = [
        "score",
        data,
        "--run",
        disk / "run",
        "--num-workers",
        "0",
        *(f"--set={text}" for text in SETTINGS),
    ]
    with small_disk(disk, kilobytes=int(share * blocks)):
        done = command(*words, folder=tmp_path)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert "No space left on device; free some space, and run the same command again" in last
        check_no_half_file(disk / "run", undisturbed)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert command(*words, folder=tmp_path).returncode == 0
        check_same(disk / "run", undisturbed)


# Two commands on one folder


def test_second_command_names_the_first_and_reading_ones_do_not_wait(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    mmaudit.split(run=run, subset="balanced:0.9", name="even")
    mmaudit.split(run=run, subset="balanced:0.8", name="other")
    with write_lock(run, command="mmaudit score"):
        for writing in (
            lambda: score(data, run=run, overwrite=True, **OPTIONS),
            lambda: score(data, run=run, append=True, **OPTIONS),
            lambda: score(data, run=run, stage="score", shard="1/2", **OPTIONS),
        ):
            with pytest.raises(RunError, match=rf"is being written by mmaudit score \(process {os.getpid()} on "):
                writing()
        manifest = run / "manifests" / "even.parquet"
        assert len(Run(run).scores()) == 120
        assert mmaudit.verify(manifest, run=run, data=data).failed_gate == ""
        assert mmaudit.diff(manifest, run / "manifests" / "other.parquet").lines()
        assert mmaudit.read_manifest(manifest)
        score(data, run=run, **OPTIONS)  # finished: it writes nothing
    score(data, run=run, stage="encode", shard="1/2", **OPTIONS)


def test_shards_of_a_stage_lock_themselves_only(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with write_lock(run, "stages/encode-1-of-2", command="mmaudit score --stage encode"):
        score(data, run=run, stage="encode", shard="2/2", **OPTIONS)
        with pytest.raises(RunError, match="is being written by mmaudit score --stage encode"):
            score(data, run=run, stage="encode", shard="1/2", **OPTIONS)
        with pytest.raises(RunError, match="is being written by mmaudit score --stage encode"):
            score(data, run=run, **OPTIONS)


# Processes that are killed

_SCORE = """
import os, signal, sys, time
from importlib import import_module
import mmaudit
from mmaudit.cli import scoring, staging  # what takes seconds to import, before the processes are forked
import mmaudit.audit.engine.stages
from runs import write_empty_report

scoring._write_report = write_empty_report
data, folder, settings, points = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])

def kill_at(name, after):
    module, _, attribute = name.rpartition(".")
    module = import_module("mmaudit." + module)
    original, calls = getattr(module, attribute), [0]
    def count(*values, **options):
        calls[0] += 1
        if calls[0] > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*values, **options)
    setattr(module, attribute, count)

for number, (name, after) in enumerate(points):
    for killed in (True, False):
        if (child := os.fork()) == 0:
            if killed:
                kill_at(name, after)
            mmaudit.score(data, run=f"{folder}/{number}", settings=settings, num_workers=0, progress=False)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(ended) == killed, (name, after, ended)
        if killed:
            os.system(f"cp -r {folder}/{number} {folder}/killed-{number}")
"""
POINTS = {
    "encode": ("audit.engine.stages.read_status_table", 3),
    "fit": ("audit.engine.stages.fit_probes", 0),
    "files of fit": ("audit.engine.fit_results.selection_tables", 0),
    "score": ("audit.engine.stages._score", 3),
    "a file of score": ("audit.storage.flush", 60),
    "merge": ("audit.engine.stages.merge", 0),
    "finish": ("audit.engine.stages.finish_part", 3),
    "publication, before": ("cli.swap.flush", 0),
    "publication, within": ("cli.swap.flush", 2),
    "publication, at its end": ("cli.swap.flush", 4),
}


def run_killed(data: Path, folder: Path, points: list[tuple[str, int]]) -> None:
    """Kill scoring at each of these points with SIGKILL, keep a copy of its folder, and run it again."""
    done = subprocess.run(
        [sys.executable, "-c", _SCORE, str(data), str(folder), repr(SETTINGS), repr(points)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_driver_is_resumed(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With SIGKILL; test_stages has a quick twin, which raises an error in its place."""
    run_killed(data, tmp_path, [*POINTS.values()])
    for number in range(len(POINTS)):
        killed = tmp_path / f"killed-{number}"
        check_no_half_file(killed, undisturbed)
        assert not Run(killed).is_scored() or files(killed).keys() >= {"mixture.json", "quarantine.parquet"}
        check_same(tmp_path / str(number), undisturbed)


_SLOW = """
import sys, time
from mmaudit.cli import scoring
import mmaudit.audit.engine.stages as stages
from mmaudit.cli.main import main
from runs import write_empty_report

scoring._write_report = write_empty_report
original = getattr(stages, sys.argv[1])
def slow(*values, **options):
    print("running", flush=True)
    time.sleep(0.2)
    return original(*values, **options)
setattr(stages, sys.argv[1], slow)
del sys.argv[1]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("read_status_table", 3), ("fit_probes", 1), ("_score", 3)])
def test_terminated_command_keeps_finished_parts(
    name: str, lines: int, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGTERM, of which Slurm and Kubernetes grant 30 seconds before SIGKILL."""
    run = tmp_path / "run"
    words = ["score", str(data), "--run", str(run), "--num-workers", "0", *(f"--set={text}" for text in SETTINGS)]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, name, *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - started < 30
    assert process.returncode == 143
    assert errors.strip().splitlines()[-1] == "interrupted; run the same command again to resume"
    check_no_half_file(run, undisturbed)
    table = {"read_status_table": "status", "fit_probes": "status", "_score": "scores"}[name]
    num_done = len(list((run / "stages" / table).glob("*.json")))
    assert num_done == (lines - 1 if name != "fit_probes" else NUM_PARTS)
    score(data, run=run, **OPTIONS)
    check_same(run, undisturbed)


_ENCODER = """
import os, signal
from pathlib import Path
import numpy as np

def encode(decoded, media):
    marker = Path(__file__).with_name("killed")
    if not marker.exists() and len(list(Path(__file__).parent.glob("seen-*"))) >= 20:
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if not marker.exists():
        Path(__file__).with_name(f"seen-{os.getpid()}-{len(list(Path(__file__).parent.iterdir()))}").touch()
    return np.asarray(decoded[0] if isinstance(decoded, tuple) else decoded, dtype=np.float32).reshape(-1)[:16]
"""


@pytest.mark.slow
def test_killed_worker_is_one_line_and_resumed(tmp_path: Path) -> None:
    """A worker process is killed while it encodes the pictures of a shard, as by the kernel for its memory."""
    rng, clips = np.random.default_rng(0), tmp_path / "clips"
    clips.mkdir()
    (tmp_path / "fragile.py").write_text(_ENCODER)
    rows = ["id,image_file_name,other_file_name,label"]
    for number in range(40):
        for name in ("a", "b"):
            (clips / f"{name}{number}.png").write_bytes(picture(number % 3, rng))
        rows.append(f"c{number},a{number}.png,b{number}.png,class-{number % 2}")
    (clips / "metadata.csv").write_text("\n".join(rows) + "\n")
    settings = [*(f"--set={text}" for text in SETTINGS[:4]), "--set=data.shard_rows=5", "--num-workers", "2"]
    modalities = ["--modality", "a=image_file_name:image", "--modality", "b=other_file_name:image"]
    words: list[str | Path] = ["score", clips, *settings, *modalities, "--encoder", "a=fragile:encode"]
    killed = command(*words, "--run", tmp_path / "run", folder=tmp_path)
    assert killed.returncode == 2, killed.stderr
    assert "a worker process ended before its work was done" in killed.stderr.strip().splitlines()[-1]
    assert (tmp_path / "killed").exists()
    assert not visible(tmp_path / "run")
    for name in ("run", "whole"):
        done = command(*words, "--run", tmp_path / name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    check_same(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["counts"]["scored"] > 30
