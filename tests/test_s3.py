"""Data and runs on a server of the S3 protocol on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from remote_files import Faults, proxy, write_forms

import mmaudit
from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.errors import DatasetError, RemoteError, RunError
from mmaudit.audit.features.encoded_samples import content_hashes
from mmaudit.audit.remote import requests
from mmaudit.audit.remote.locks import remote_lock
from mmaudit.audit.remote.paths import RemotePath

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of botocore
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with the bucket `clips`, whose address and keys are in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        requests._process().systems.pop("s3", None)
        requests.file_system("s3://clips").mkdir("clips")
        yield address
        requests._process().systems.pop("s3", None)
    server.stop()


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MMAUDIT_CACHE", str(tmp_path / "cache"))
    yield
    requests.forget()


def put(folder: Path, url: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            requests.call(f"{url}/{path.relative_to(folder).as_posix()}", "pipe_file", path.read_bytes())
    return url


def samples_of(source: str) -> list[tuple[str, str, str | None]]:
    return [(row.sample_id, row.content, row.problem) for row in content_hashes(open_dataset(source))]


@pytest.mark.parametrize("form", ["parquet", "tars", "folders", "metadata"])
def test_every_form_is_read_by_s3(server: str, clip_source: Path, tmp_path: Path, form: str) -> None:
    sources = {**write_forms(clip_source, tmp_path / "forms"), "metadata": clip_source}
    url = put(sources[form], f"s3://clips/{form}")
    assert samples_of(url) == samples_of(str(sources[form]))


def test_missing_buckets_and_keys_are_one_line(server: str) -> None:
    with pytest.raises(DatasetError, match="no such folder or file: s3://no-bucket/data"):
        open_dataset("s3://no-bucket/data")
    with pytest.raises(DatasetError, match=r"no such folder or file: s3://clips/none\.csv"):
        open_dataset("s3://clips/none.csv")


def test_missing_credentials_are_one_line(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    systems = requests._process().systems
    kept = systems.pop("s3")
    try:
        with pytest.raises(RemoteError, match="s3://clips"):
            open_dataset("s3://clips/data.csv")
    finally:
        systems["s3"] = kept


def run_command(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmaudit", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_scores_and_manifests_by_s3_are_those_of_local_files(server: str, clip_source: Path, tmp_path: Path) -> None:
    data = put(clip_source, "s3://clips/scored")
    options = ["--group", "speaker", "--set", "data.shard_rows=5", "--num-workers", "2"]
    for source, run in ((str(clip_source), str(tmp_path / "local")), (data, "s3://clips/runs/one")):
        scored = run_command("score", source, "--run", run, *options)
        assert scored.returncode == 0, scored.stderr
        assert run_command("split", "--balanced", "--run", run).returncode == 0
    for name in ("scores.parquet", "quarantine.parquet", "mixture.json", "manifests/balanced.parquet"):
        assert requests.call(f"s3://clips/runs/one/{name}", "cat_file") == (tmp_path / "local" / name).read_bytes()
    again = run_command("score", data, "--run", "s3://clips/runs/one", *options, MMAUDIT_CACHE=str(tmp_path / "other"))
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    options = ["--set", "finetune.epochs=1", "--run", "s3://clips/runs/one", "--num-workers", "0"]
    trained = run_command("finetune", "--manifest", "balanced", *options)
    assert trained.returncode == 0, trained.stderr
    assert any("metrics.json" in path for path in requests.find("s3://clips/runs/one"))


def test_locks_are_objects_that_are_created_once(server: str) -> None:
    folder = RemotePath.parse("s3://clips/locked")
    with remote_lock(folder, "score"), pytest.raises(RunError, match="is held by"), remote_lock(folder, "score"):
        pass
    with ThreadPoolExecutor(8) as pool:  # the look-up before does not decide: all see no object
        created = list(pool.map(lambda number: requests.create("s3://clips/locked/race", b"%d" % number), range(8)))
    assert created.count(True) == 1
    assert requests.call("s3://clips/locked/race", "cat_file") == b"%d" % created.index(True)
    assert requests.create("s3://clips/locked/once", b"1")
    assert not requests.create("s3://clips/locked/once", b"2")
    assert requests.call("s3://clips/locked/once", "cat_file") == b"1"


def test_a_missing_bucket_of_a_run_is_one_line(server: str, clip_source: Path) -> None:
    result = run_command("score", str(clip_source), "--run", "s3://no-such-bucket/run")
    assert result.returncode == 2
    assert "s3://no-such-bucket/run/" in result.stderr
    assert "there is no such bucket to write to" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_profile_that_does_not_exist_is_one_line(server: str, clip_source: Path) -> None:
    result = run_command(
        "score", "s3://clips/metadata/metadata.csv", AWS_ENDPOINT_URL=server, AWS_ACCESS_KEY_ID="", AWS_PROFILE="none"
    )
    assert result.returncode == 2
    assert "s3://clips/metadata/metadata.csv" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def faults(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Faults between the client and the server."""
    faults, systems = Faults(), requests._process().systems
    kept = systems.pop("s3")
    with proxy(int(server.rpartition(":")[2]), faults) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr(requests, "_WAITS", (0.01, 0.01, 0.01))
        yield faults
    systems["s3"] = kept


@pytest.mark.parametrize("kinds", [["500", "500", ""], ["short", "short", ""], ["503", "short", ""]])
def test_a_get_by_s3_that_fails_twice_is_made_good(clip_source: Path, faults: Faults, kinds: list[str]) -> None:
    url = put(clip_source, "s3://clips/faults")
    faults.by_path["/5.wav"] = list(kinds)
    assert samples_of(url) == samples_of(str(clip_source))
    assert faults.by_path["/5.wav"] == [""]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("403", r"access denied \(403\)"),
        ("500", "in 4 tries"),
        ("short", "in 4 tries"),
        ("slow", r"no answer within 0\.5 s \(MMAUDIT_REMOTE_SECONDS\), in 4 tries"),
    ],
)
def test_a_fault_by_s3_that_stays_is_one_line(
    clip_source: Path, faults: Faults, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(clip_source, "s3://clips/faults")
    if kind == "slow":
        monkeypatch.setenv("MMAUDIT_REMOTE_SECONDS", "0.5")
    faults.by_path["/5.wav"] = [kind]
    with pytest.raises(RemoteError, match=message) as caught:
        samples_of(url)
    assert str(caught.value).startswith(f"{url}/5.wav: ")
    assert "\n" not in str(caught.value)


# Scores and trains on a cluster of two machines that share a bucket and nothing else.
TWO_MACHINES = """
import os, sys
import ray
from ray.cluster_utils import Cluster
from mmaudit.audit.engine import ray_pool
import mmaudit

folder, data, url = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
for name in ("first", "second"):
    own = {"MMAUDIT_CACHE": os.path.join(folder, name)}
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, env_vars=own)
pids, run = set(), ray_pool.RayPool.run
def keep(self, *values, **options):
    records = run(self, *values, **options)
    pids.update(record.pid for record in records)
    return records
ray_pool.RayPool.run = keep
options = dict(run=url, engine="ray", ray_address=cluster.address, num_workers=2, progress=False)
settings = {"probe.repeats": 1, "probe.folds": 3, "parts.rows": 15, "ray.memory_gb": 1.0}
"""
SCORE_AND_TRAIN = """
mmaudit.score(data, settings=settings, **options)
assert len(pids) == 2, pids
mmaudit.split(subset="most-balanced:100%", name="all", run=url)
settings = {"finetune.epochs": 3, "finetune.hidden": 8, "finetune.batch_size": 32, "ray.memory_gb": 1.0}
result = mmaudit.finetune("all", settings=settings, name="on-ray", **options)
assert result.metrics["counts"]["train"], result.metrics
again = mmaudit.finetune("all", settings=settings, name="on-ray", **options)
assert again.metrics == result.metrics
cluster.shutdown()
"""
APPEND = """
mmaudit.score(data, settings=settings, append=True, **options)
assert len(pids) == 2, pids
cluster.shutdown()
"""
TRAINING = ["finetune.epochs=3", "finetune.hidden=8", "finetune.batch_size=32"]


def write_parts(folder: Path) -> Path:
    """Write 120 samples in eight row groups."""
    pq.write_table(gaussian_table(num_samples=120), folder / "data.parquet", row_group_size=15)
    return folder / "data.parquet"


def score_locally(data: Path, run: Path) -> None:
    settings = {"probe.repeats": 1, "probe.folds": 3, "parts.rows": 15}
    mmaudit.score(data, run=run, settings=settings, progress=False)
    mmaudit.split(subset="most-balanced:100%", name="all", run=run)


def check_scores(url: str, local: Path) -> None:
    parts = [f"scores/{path.name}" for path in sorted((local / "scores").glob("*.parquet"))]
    assert len(parts) == 8
    for name in (*parts, "quarantine.parquet", "mixture.json", "manifests/all.parquet"):
        assert requests.call(f"{url}/{name}", "cat_file") == (local / name).read_bytes(), name


def run_by_torchrun(folder: Path, *words: str, caches: list[Path | None]) -> None:
    """Run a command in one process on each of several machines, which have caches of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank, cache in enumerate(caches):
        own = {} if cache is None else {"MMAUDIT_CACHE": str(cache)}
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(caches)}", f"--node-rank={rank}"]
        launcher += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "--", "mmaudit"]
        machines.append(
            subprocess.Popen(
                [*launcher, *words],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * len(machines), outputs


def check_training(url: str, local: Path) -> None:
    for name in ("model.safetensors", "history.jsonl", "config.toml"):
        assert requests.call(f"{url}/{name}", "cat_file") == (local / name).read_bytes(), name
    contents = [requests.call(f"{url}/metrics.json", "cat_file"), (local / "metrics.json").read_bytes()]
    metrics = [json.loads(content) for content in contents]
    for content in metrics:
        content.pop("seconds")
        content["made_from"].pop("seconds", None)
    assert metrics[0] == metrics[1]


def run_on_two_machines(commands: str, folder: Path, data: str, run: str) -> None:
    """Run commands with a cluster of Ray, whose two machines have caches in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_MACHINES + commands, str(folder), data, run],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_two_machines_on_ray_append_by_a_bucket_alone(server: str, tmp_path: Path) -> None:
    """The appended run has the bytes of one machine; its quick twin is in test_remote_run.py."""
    pytest.importorskip("ray")
    rows, local, url = pq.read_table(write_parts(tmp_path)), tmp_path / "local", "s3://clips/grown/run"
    data, settings = "s3://clips/grown/data.parquet", {"probe.repeats": 1, "probe.folds": 3, "parts.rows": 15}

    def put(num_rows: int) -> None:
        pq.write_table(rows.slice(0, num_rows), tmp_path / "grown.parquet", row_group_size=15)
        requests.call(data, "pipe_file", (tmp_path / "grown.parquet").read_bytes())

    put(90)
    for run in (str(local), url):
        mmaudit.score(data, run=run, settings=settings, progress=False)
    put(120)
    mmaudit.score(data, run=local, settings=settings, append=True, progress=False)
    run_on_two_machines(APPEND, tmp_path, data, url)
    names = [f"scores/{path.name}" for path in sorted((local / "scores").glob("*.parquet"))]
    assert len(names) == 8
    for name in (*names, "quarantine.parquet", "mixture.json"):
        assert requests.call(f"{url}/{name}", "cat_file") == (local / name).read_bytes(), name


def test_two_machines_on_ray_share_a_bucket_alone(server: str, tmp_path: Path) -> None:
    """Their scores, manifests and weights have the bytes of one machine; its quick twin is in test_remote_run.py."""
    pytest.importorskip("ray")
    data, local = write_parts(tmp_path), tmp_path / "local"
    score_locally(data, local)
    requests.call("s3://clips/two/data.parquet", "pipe_file", data.read_bytes())
    run_on_two_machines(SCORE_AND_TRAIN, tmp_path, "s3://clips/two/data.parquet", "s3://clips/two/run")
    assert {path.name for path in tmp_path.iterdir()} >= {"first", "second"}
    check_scores("s3://clips/two/run", local)
    words = ["finetune", "--manifest", "all", "--run", str(local), "--name", "on-ray", "--device", "cpu"]
    words += [word for setting in TRAINING for word in ("--set", setting)]
    run_by_torchrun(tmp_path, *words, "--num-workers", "0", caches=[None, None])
    check_training("s3://clips/two/run/finetune/on-ray", local / "finetune/on-ray")


def test_torchrun_trains_in_a_run_at_a_url(server: str, tmp_path: Path) -> None:
    """Two machines with a bucket and nothing else have the weights of two processes with one folder."""
    data, local, url = write_parts(tmp_path), tmp_path / "local", "s3://clips/torchrun/run"
    score_locally(data, local)
    requests.call("s3://clips/torchrun/data.parquet", "pipe_file", data.read_bytes())
    settings = {"probe.repeats": 1, "probe.folds": 3, "parts.rows": 15}
    mmaudit.score("s3://clips/torchrun/data.parquet", run=url, settings=settings, progress=False)
    mmaudit.split(subset="most-balanced:100%", name="all", run=url)
    words = ["finetune", "--manifest", "all", "--device", "cpu", "--name", "both", "--num-workers", "0"]
    words += [word for setting in TRAINING for word in ("--set", setting)]
    remote = ["--run", url, "--data", "s3://clips/torchrun/data.parquet"]
    run_by_torchrun(tmp_path, *words, *remote, caches=[tmp_path / "first", tmp_path / "second"])
    run_by_torchrun(tmp_path, *words, "--run", str(local), caches=[None, None])
    check_training(f"{url}/finetune/both", local / "finetune/both")


def test_stages_by_s3_run_on_machines_that_share_a_bucket_alone(server: str, tmp_path: Path) -> None:
    data, local, url = write_parts(tmp_path), tmp_path / "local", "s3://clips/stages/run"
    score_locally(data, local)
    requests.call("s3://clips/stages/data.parquet", "pipe_file", data.read_bytes())
    settings = ["probe.repeats=1", "probe.folds=3", "parts.rows=15"]
    words = ["score", "s3://clips/stages/data.parquet", "--run", url, "--num-workers", "0"]
    words += [word for setting in settings for word in ("--set", setting)]

    def run_shards(stage: str) -> None:
        """Run both shards at the same time, each on a machine of its own."""
        with ThreadPoolExecutor(2) as pool:
            shards = [("1/2", "first"), ("2/2", "second")]
            commands = [(*words, "--stage", stage, "--shard", shard) for shard, _ in shards]
            caches = [str(tmp_path / cache) for _, cache in shards]
            for done in pool.map(
                lambda pair: run_command(*pair[0], MMAUDIT_CACHE=pair[1]), zip(commands, caches, strict=True)
            ):
                assert done.returncode == 0, done.stderr

    run_shards("encode")
    assert run_command(*words, "--stage", "fit", MMAUDIT_CACHE=str(tmp_path / "third")).returncode == 0
    run_shards("score")
    assert run_command(*words, "--stage", "merge", MMAUDIT_CACHE=str(tmp_path / "fourth")).returncode == 0
    mmaudit.split(subset="most-balanced:100%", name="all", run=url)
    check_scores(url, local)
