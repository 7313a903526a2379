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
from typing import Any, cast

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray_faults
from conftest import gaussian_table
from test_ray_cluster import OPTIONS
from test_stages import CONFIG, N, check_same, files, run_stages

import mmaudit
from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.engine import ray_executor, ray_pool
from mmaudit.audit.engine.executors import RayConfig, RayOptions
from mmaudit.audit.engine.plan import PartsConfig, plan_parts
from mmaudit.audit.engine.ray_executor import shards_of, worker_bytes
from mmaudit.audit.workers import no_progress
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import split
from mmaudit.cli.staging import open_job

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
        ("server", mmaudit.MmauditError, "^part 7 failed 2 times, the last time by s3://b/x: no answer, in 4 tries$"),
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
@pytest.mark.filterwarnings("ignore")
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
        commands = {child: " ".join([child.name(), *child.cmdline()]) for child in family}
        process.send_signal(signal.SIGKILL)
    # Two agents of Ray, which only report, end a minute or two later.
    _, alive = psutil.wait_procs([child for child in family if "agent" not in commands[child].lower()], timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert not Run(tmp_path / "run").is_scored()
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["input"] == N  # Ray prints nothing among the results
    check_same(tmp_path / "run", local)


def job_of(data: Path, folder: Path, **settings: Any) -> Any:
    config = replace(CONFIG, **settings)
    return open_job(
        Run(folder), open_dataset(data, config.data), config, device="cpu", num_workers=0, progress=no_progress
    )


def test_memory_of_a_worker_follows_from_rows_and_features(data: Path, tmp_path: Path) -> None:
    """The stages grow with what they hold, and with nothing else."""
    job = job_of(data, tmp_path / "run")
    least = worker_bytes(job)
    many = replace(job.plan, num_rows=10**8)
    assert worker_bytes(replace(job, plan=many))["fit"] - least["fit"] >= 80 * (10**8 - N)
    assert worker_bytes(replace(job, plan=many))["score"] == least["score"]
    parts = tuple(replace(part, num_rows=10**6) for part in job.plan.parts)
    large = worker_bytes(replace(job, plan=replace(job.plan, parts=parts)))
    assert large["fit"] == least["fit"]
    assert large["score"] > 1_841_000_000  # measured on 10^6 rows of 2 x 32 features
    wide = tuple(replace(modality, length=1_024) for modality in job.dataset.modalities)
    assert worker_bytes(replace(job, dataset=replace(job.dataset, modalities=wide)))["encode"] > least["encode"]


def test_what_is_not_stated_is_reserved_by_the_memory_of_a_worker(data: Path, tmp_path: Path) -> None:
    job = job_of(data, tmp_path / "run")
    stated = RayOptions(config=RayConfig(memory_gb=0.5), address=None, num_workers=1)
    assert ray_executor._with_memory(stated, job) is stated
    config = ray_executor._with_memory(replace(stated, config=RayConfig()), job).config
    assert max(worker_bytes(job).values()) <= config.resources["memory"] < max(worker_bytes(job).values()) + 2e8
    assert RayConfig().resources == {"CPU": 1, "memory": 2_000_000_000}


def test_worker_beyond_its_reservation_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = RayConfig(memory_gb=1.0)
    pool = ray_pool.RayPool(ray=None, config=config, size=1, site=cast(Any, None), shared=None)
    for max_rss in (900_000_000, 1_500_000_000, 1_600_000_000, 2_500_000_000):
        record = ray_pool.Completed(unit=0, result=None, host="node-7", pid=1, max_rss=max_rss, messages=())
        pool._log(record)
    assert [record.getMessage() for record in caplog.records] == [
        "a worker on node-7 took 1.50 GB, and ray.memory_gb, which Ray reserves for it, is 1: pass --set "
        "ray.memory_gb=1.6, or lower parts.rows",
        "a worker on node-7 took 2.50 GB, and ray.memory_gb, which Ray reserves for it, is 1: pass --set "
        "ray.memory_gb=2.6, or lower parts.rows",
    ]


PART_ROWS = 1 << 18  # of PartsConfig


# Scores in parts and prints what workers reserved and the most that one of them took.
MEMORY = """
import json, sys
from mmaudit.audit.engine import plan, ray_executor, ray_pool
from mmaudit.cli.scoring import score
plan.SINGLE = 1
taken, reserved, run = [], [], ray_pool.RayPool.run
def keep(self, *values, **options):
    records = run(self, *values, **options)
    taken.extend(record.max_rss for record in records)
    reserved.append(self.config.resources["memory"])
    return records
ray_pool.RayPool.run = keep
settings = {{"probe.repeats": 1, "probe.control": False, "parts.rows": {part_rows}}}
score({data!r}, run={run!r}, engine="ray", num_workers=2, settings=settings, progress=False)
print(json.dumps([max(taken), min(reserved)]))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray 2.50 forgets processes of the cluster of this module
@pytest.mark.parametrize("part_rows", [4_096, PART_ROWS])
def test_workers_take_at_most_what_they_reserve(part_rows: int, tmp_path: Path) -> None:
    """Of two parts, of few rows and of those of the default."""
    pytest.importorskip("ray")
    data = write_rows(tmp_path / "rows.parquet", 2 * part_rows)
    script = MEMORY.format(data=str(data), run=str(tmp_path / "run"), part_rows=part_rows)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    taken, reserved = json.loads(done.stdout)
    assert reserved / 3 < taken <= reserved


def write_rows(path: Path, num_rows: int) -> Path:
    """Write rows of two modalities of 32 features and 10 classes, in row groups of 65,536 at most."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2, 10, 32)).astype(np.float32) * 0.3
    label = rng.integers(0, 10, num_rows)
    columns: dict[str, Any] = {"id": [f"r{row:08d}" for row in range(num_rows)], "label": label}
    for name, mean in zip(("audio", "visual"), means, strict=True):
        values = mean[label] + rng.standard_normal((num_rows, 32), dtype=np.float32)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 32)
    pq.write_table(pa.table(columns), path, row_group_size=65_536)
    return path
