"""Tests of scoring on Ray: the bytes of one process, whatever workers, drivers and machines do meanwhile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray_faults
from conftest import gaussian_table
from test_ray_cluster import OPTIONS
from test_stages import CONFIG, N, check_same, files, run_stages

import mmaudit
from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.engine import ray_executor
from mmaudit.audit.engine.plan import PartsConfig, plan_parts
from mmaudit.audit.engine.ray_executor import shards_of
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import split

MAX_WORKER_BYTES = 1_000_000_000  # of parts with few rows: 0.35 GB are libraries


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=N), path, row_group_size=15)
    return path


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in eight parts by one process; read-only."""
    run = tmp_path_factory.mktemp("local") / "run"
    score(data, run=run, config=CONFIG, num_workers=0)
    return run


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of this machine, to which every `engine="ray"` connects; returns the folder of `encode_and_die`."""
    pytest.importorskip("ray")
    from mmaudit.audit.engine.ray_cluster import open_ray

    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import ray_faults
        patch.setenv("TEST_FAULTS", str(folder))
        with open_ray(OPTIONS):
            yield folder


def test_parts_are_divided_into_their_shards(data: Path) -> None:
    dataset = open_dataset(data, DataConfig())
    for part_rows, indices in ((20, list(range(8))), (100, [0] * 8)):
        parts = plan_parts(dataset.shards, config=PartsConfig(rows=part_rows), depends_on=()).parts
        pieces = shards_of(dataset.shards, parts)
        assert [piece.index for piece in pieces] == indices
        assert [(piece.first_shard, piece.end_shard) for piece in pieces] == [(i, i + 1) for i in range(8)]
        assert [piece.first for piece in pieces] == [0, 15, 30, 45, 60, 75, 90, 105]


def test_units_are_named() -> None:
    parts = plan_parts((), config=PartsConfig(), depends_on=()).parts[:1]
    one = replace(parts[0], index=3, first_shard=5, end_shard=10)
    assert ray_executor._name([one]) == "part 3 (shards 5 to 9)"
    assert ray_executor._name([one, replace(one, index=4)]) == "parts 3 to 4"


def tables_of(run: Path) -> dict[str, bytes]:
    """Return the scores, mixture, quarantine and plan, and report.json; probes are files of staged runs alone."""
    contents = {name: text for name, text in files(run).items() if not name.startswith("probes/")}
    return {**contents, "report.json": (run / "report.json").read_bytes()}


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_parts_have_the_bytes_of_one_process(num_workers: int, data: Path, local: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", Path(shutil.copytree(local, tmp_path / "copy"))
    score(data, run=run, config=CONFIG, num_workers=num_workers, engine="ray")
    check_same(run, local)
    assert tables_of(run) == tables_of(local)
    for folder in (run, copy):
        split(run=folder, config=CONFIG, subset="balanced:0.9", name="even")
    assert (run / "manifests/even.parquet").read_bytes() == (copy / "manifests/even.parquet").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 7])
def test_arrays_do_too(count: int, data: Path, local: Path, tmp_path: Path) -> None:
    run_stages(data, tmp_path, count)
    assert tables_of(tmp_path) == tables_of(local)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_one_part_has_the_bytes_of_a_run_in_memory(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, parts=PartsConfig())
    score(data, run=tmp_path / "ray", config=config, num_workers=2, engine="ray")
    score(data, run=tmp_path / "local", config=config, num_workers=0)
    assert (tmp_path / "ray" / "scores.parquet").exists()
    assert tables_of(tmp_path / "ray") == tables_of(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_worker_killed_while_it_encodes(ray: Path, clips: Path, tmp_path: Path) -> None:
    """Media are encoded shard by shard in one part; the tenth picture kills its worker, once."""
    data = DataConfig(shard_rows=4, encoder=("image=ray_faults:encode_and_die",))
    config = replace(CONFIG, data=data, parts=PartsConfig())
    score(clips, run=tmp_path / "ray", config=config, num_workers=2, engine="ray")
    encoded = list(ray.iterdir())
    assert len({path.name.split("-")[1] for path in encoded}) >= 2
    assert 24 < len(encoded) <= 24 + 4  # those of the shard that was interrupted were encoded twice
    score(clips, run=tmp_path / "local", config=config, num_workers=0)
    assert tables_of(tmp_path / "ray") == tables_of(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_records_are_small_and_workers_take_what_they_reserve(data: Path, tmp_path: Path) -> None:
    """No media and no features enter the object store: only the job does, and records come back."""
    from mmaudit.audit.engine import ray_pool

    records: list[ray_pool.Completed] = []
    jobs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        done = ray_pool.RayPool.run

        def keep(self: Any, *values: Any, **options: Any) -> Any:
            records.extend(result := done(self, *values, **options))
            jobs.append(self.ray.get(self.shared))
            return result

        patch.setattr(ray_pool.RayPool, "run", keep)
        score(data, run=tmp_path, config=CONFIG, num_workers=2, engine="ray")
    assert len(records) == 8 + 8 + 8 + 1 + 8
    assert all(record.result is None and len(pickle.dumps(record)) < 1_000 for record in records)
    assert len(pickle.dumps(jobs[0])) < 20_000
    assert 50_000_000 < max(record.max_rss for record in records) < MAX_WORKER_BYTES


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_work_is_repeated_when_a_worker_or_a_disk_fails(tmp_path: Path) -> None:
    from mmaudit.audit.engine.ray_pool import open_pool

    for work in (ray_faults.die_once, ray_faults.fail_once):
        folder = tmp_path / work.__name__
        folder.mkdir()
        with open_pool(OPTIONS, max_workers=2, folder=tmp_path, shared=folder) as pool:
            records = pool.run(work, range(3), names=["a", "b", "c"], stage="test")
        assert [record.result for record in records] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("killed", mmaudit.MmauditError, "^part 7 failed 2 times, the last time by ActorDiedError.*lower parts.rows"),
        ("disk", mmaudit.MmauditError, "^part 7 failed 2 times, the last time by OSError.*No space left"),
        ("data", mmaudit.MmauditError, "^the data are bad$"),
        ("bug", RuntimeError, "^part 7: KeyError: 'a bug'$"),
    ],
)
def test_work_that_always_fails_is_named(kind: str, error: type[Exception], text: str, tmp_path: Path) -> None:
    from mmaudit.audit.engine.ray_pool import open_pool

    options = replace(OPTIONS, config=replace(OPTIONS.config, retries=1))
    with (
        open_pool(options, max_workers=1, folder=tmp_path, shared=kind) as pool,
        pytest.raises(error, match=text),
    ):
        pool.run(ray_faults.always_fail, [0], names=["part 7"], stage="test")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_cluster_without_room_is_named(tmp_path: Path) -> None:
    from mmaudit.audit.engine.ray_pool import open_pool

    options = replace(OPTIONS, config=replace(OPTIONS.config, gpus=1.0, start_seconds=3.0))
    text = "no worker of 1 CPU, 1 GPU and 1 GB has begun within 3 s; the cluster has 2 CPU, 0 GPU"
    with (
        open_pool(options, max_workers=1, folder=tmp_path, shared=0) as pool,
        pytest.raises(mmaudit.MmauditError, match=text),
    ):
        pool.run(ray_faults.double, [0], names=["part 7"], stage="test")


COMMAND = [sys.executable, "-m", "mmaudit", "--quiet", "score"]


def settings_of(config: RunConfig) -> list[str]:
    probe = config.probe
    texts = [f"probe.folds={probe.folds}", f"probe.repeats={probe.repeats}", "probe.control=false"]
    texts += [f"probe.l2_penalties=[{probe.l2_penalties[0]}]", f"parts.rows={config.parts.rows}"]
    return [word for text in texts for word in ("--set", text)]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["status/part-00003.json", "scores/part-00002.json"])
def test_rerun_after_the_driver_was_killed(after: str, data: Path, local: Path, tmp_path: Path) -> None:
    """Its local cluster ends with it, and the same command finishes with the same bytes."""
    pytest.importorskip("ray")
    command = [*COMMAND, str(data), "--run", "run", *settings_of(CONFIG), "--engine", "ray", "--num-workers", "2"]
    environment = {**os.environ, "TMPDIR": "/tmp"}
    with subprocess.Popen([*command, "--json"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        family: list[psutil.Process] = []
        while not (tmp_path / "run/stages" / after).exists():
            assert process.poll() is None
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        names = {child: child.name() for child in family}
        process.send_signal(signal.SIGKILL)
    # Two agents of Ray, which only report, end a minute or two later.
    _, alive = psutil.wait_procs([child for child in family if not names[child].endswith("Agent")], timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert not Run(tmp_path / "run").is_scored()
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["input"] == N  # Ray prints nothing among the results
    check_same(tmp_path / "run", local)
