"""Tests of connections to Ray: one-line errors, machines that differ or vanish, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table

from mmaudit.audit.engine.executors import RayConfig, RayOptions, choose_engine
from mmaudit.audit.engine.ray_cluster import Site, import_ray, installed_versions, num_slots, open_ray
from mmaudit.audit.errors import ConfigError, MmauditError, RunError
from mmaudit.cli.scoring import score

OPTIONS = RayOptions(config=RayConfig(memory_gb=1.0), address=None, num_workers=2)


@pytest.mark.parametrize(
    ("engine", "options", "text"),
    [
        ("rai", {}, "--engine rai: did you mean ray"),
        ("local", {"address": "auto"}, "--ray-address auto: only with --engine ray"),
        ("ray", {"num_workers": 0}, "--num-workers 0: with --engine ray at least one worker is needed"),
        ("ray", {"device": "cuda"}, "--device cuda: with --engine ray .* pass --set ray.gpus=1"),
    ],
)
def test_contradicting_options_are_refused(engine: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_engine(engine, RayConfig(), **options)


def test_engine_is_chosen() -> None:
    assert choose_engine("local", RayConfig()) is None
    gpus = RayConfig(gpus=0.5)
    assert choose_engine("ray", gpus, device="cuda") == RayOptions(config=gpus, address=None, num_workers=None)
    with pytest.raises(ConfigError, match=r"ray\.cpus is 0; it must be at least 1"):
        RayConfig(cpus=0)


def test_stages_and_ray_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--engine ray runs all stages: without --stage and --shard"):
        score("data.parquet", run=tmp_path, engine="ray", stage="encode")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r'^--engine ray needs Ray: pip install "mmaudit\[ray\]"$'):
        import_ray()


def test_room_is_that_of_each_machine() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 5e9}},
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0, "memory": 50e9}},
        {"Alive": False, "Resources": {"CPU": 64.0, "memory": 500e9}},
    ]
    cluster = SimpleNamespace(nodes=lambda: nodes)
    assert num_slots(cluster, RayConfig(memory_gb=2.0)) == 2 + 3
    assert num_slots(cluster, RayConfig(cpus=2, memory_gb=0.0)) == 4 + 1
    assert num_slots(cluster, RayConfig(gpus=0.5, memory_gb=0.0)) == 2


def test_machine_that_lacks_something_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marker, data = tmp_path / "marker", tmp_path / "data.csv"
    marker.write_text("token")
    data.write_text("a,b\n")
    site = Site.of(marker=(str(marker), "token"), files=[data, "absent"])
    site.enter()
    host = socket.gethostname()
    shared = "lie on a file system that all machines see"
    for changed, text in (
        ({"versions": {**installed_versions(), "torch": "1.0"}}, f"{host} has torch .*, the driver 1.0: install the"),
        ({"cwd": "/absent"}, f"the working folder /absent is not visible on {host}: .*{shared}"),
        ({"marker": (str(marker), "other")}, f"the run folder {tmp_path} is not visible on {host}: .*{shared}"),
        ({"files": ((str(data), 9),)}, rf"{data} is not the same on {host} \(size 4, here 9\)"),
        ({"files": (("absent.csv", 9),)}, rf"absent.csv is not the same on {host} \(size None, here 9\)"),
    ):
        with pytest.raises(RunError, match=text):
            replace(site, **changed).enter()


def test_of_many_files_some_are_compared(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.parquet" for number in range(1_000)]
    for path in paths:
        path.touch()
    names = [name for name, _ in Site.of(marker=("", ""), files=paths).files]
    assert names[0] == str(paths[0])
    assert 64 <= len(names) <= 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", r"no Ray cluster answers at 127.0.0.1:1 \(Connection refused\)"),
        ("auto", "no Ray cluster answers at auto"),
        ("ray://127.0.0.1:10001", "the Ray client is not supported"),
        ("somewhere", "--ray-address somewhere: not of the form HOST:PORT, nor auto"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unreachable_cluster_is_one_line_within_seconds(
    address: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import_ray()
    start = time.monotonic()
    with pytest.raises(MmauditError, match=text), open_ray(replace(OPTIONS, address=address)):
        pass
    assert time.monotonic() - start < 60  # Ray 2.50 looks for the cluster of a file in /tmp for 40 s, beside other jobs


# Scores on a cluster of two machines, of which the second is removed, without warning, when two units have begun on it.
TWO_NODES = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import psutil
import ray
from ray.cluster_utils import Cluster
import ray_faults
from mmaudit.audit.engine.executors import RayConfig, RayOptions
from mmaudit.audit.engine.ray_pool import open_pool
from test_stages import CONFIG
from mmaudit.cli.scoring import score

folder = Path({folder!r})
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "object_store_memory": 80 << 20}})
second = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
options = RayOptions(config=RayConfig(memory_gb=0.5), address=cluster.address, num_workers=3)

def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

def remove():
    while len(list(folder.glob("begun-*"))) < 3:
        time.sleep(0.1)
    pids = [int(path.name.rpartition("-")[2]) for path in folder.glob("begun-*")]
    cluster.remove_node(second, allow_graceful=False)
    while sum(is_running(pid) for pid in pids) > 1:
        time.sleep(0.1)
    (folder / "go").touch()

removal = threading.Thread(target=remove, daemon=True)
removal.start()
with open_pool(options, max_workers=3, folder=folder, shared=folder) as pool:
    records = pool.run(ray_faults.wait_for, range(6), names=list("abcdef"), stage="test")
removal.join()
assert [record.result for record in records] == list(range(6))
assert len(list(folder.glob("begun-*"))) == 6 + 2  # two were done again
print("pool done", flush=True)

third = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
def remove_third():
    while not (folder / "run/stages/scores/part-00001.json").exists():
        time.sleep(0.01)
    cluster.remove_node(third, allow_graceful=False)
removal = threading.Thread(target=remove_third, daemon=True)
removal.start()
score({data!r}, run=folder / "run", config=CONFIG, num_workers=2, engine="ray", ray_address=cluster.address)
removal.join()
cluster.shutdown()
"""


@pytest.mark.slow
def test_machine_is_removed(tmp_path: Path) -> None:
    """Its parts are done again elsewhere, and the result has the bytes of one process."""
    pytest.importorskip("ray")
    from test_stages import CONFIG, check_same

    data = tmp_path / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=120), data, row_group_size=15)
    score(data, run=tmp_path / "local", config=CONFIG, num_workers=0)
    script = TWO_NODES.format(tests=str(Path(__file__).parent), folder=str(tmp_path), data=str(data))
    environment = {**os.environ, "TMPDIR": "/tmp", "RAY_ADDRESS": "", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "run", tmp_path / "local")
