"""Tests of the scripts for clusters: every stage once, with every shard, each after the one before."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table

from mmaudit.audit.errors import ConfigError
from mmaudit.cli.planning import plan
from mmaudit.cli.staging import STAGES

SETTINGS = {"parts.rows": 10, "data.label": "label"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("some data") / "it's.parquet"  # names that a shell would divide
    pq.write_table(gaussian_table(num_samples=60), path, row_group_size=10)
    return path


def commands_of_slurm(script: str) -> list[list[str]]:
    """Return the words of sbatch of each job."""
    return [shlex.split(line.partition("$(")[2].removesuffix(")")) for line in script.splitlines() if "=$(" in line]


def test_jobs_of_slurm_depend_on_the_stage_before(data: Path) -> None:
    result = plan(data, run="a run", slurm=True, tasks=4, gpu=True, settings=SETTINGS)
    assert (result.num_rows, result.num_parts, result.num_tasks) == (60, 6, 4)
    jobs = commands_of_slurm(result.script)
    common = ["mmaudit", "score", str(data), "--run", "a run", "--set", "parts.rows=10", "--set", "data.label=label"]
    for job, stage, before in zip(jobs, STAGES, ["", *STAGES], strict=False):
        shard = ["--shard", "$SLURM_ARRAY_TASK_ID/4"] if stage in ("encode", "score") else []
        assert shlex.split(job[-1]) == [*common, "--stage", stage, *shard]
        assert ("--array=1-4" in job) == bool(shard)
        assert ("--gres=gpu:1" in job) == (stage in ("encode", "fit"))
        assert [word for word in job if "dependency" in word] == [f"--dependency=afterok:${before}"] * bool(before)
    assert len(jobs) == len(STAGES)


def test_jobs_of_kubernetes_are_indexed(data: Path) -> None:
    script = plan(data, kubernetes=True, tasks=100, image="registry/mmaudit", claim="c", settings=SETTINGS).script
    texts = re.findall(r"<<'JOB'\n(.*?)\nJOB\nkubectl wait \S+ \S+ job/(\S+)", script, flags=re.DOTALL)
    for (text, waited), stage in zip(texts, STAGES, strict=True):
        job = json.loads(text)
        assert job["metadata"]["name"] == waited == f"mmaudit-{stage}"
        num_processes = 6 if stage in ("encode", "score") else 1
        assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", num_processes)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "registry/mmaudit"
        assert ("$((JOB_COMPLETION_INDEX + 1))/6" in container["command"][2]) == (num_processes > 1)
        assert shlex.split(container["command"][2])[:4] == ["exec", "mmaudit", "score", str(data)]


def test_jobs_of_an_append_are_its_stages(data: Path) -> None:
    jobs = commands_of_slurm(plan(data, run="a run", slurm=True, append=True, tasks=4, settings=SETTINGS).script)
    assert [shlex.split(job[-1])[:6] for job in jobs] == [
        ["mmaudit", "score", str(data), "--run", "a run", "--append"]
    ] * len(STAGES)
    assert [f"--job-name=mmaudit-append-{stage}" in job for job, stage in zip(jobs, STAGES, strict=True)] == [True] * 4
    script = plan(data, kubernetes=True, append=True, settings=SETTINGS).script
    assert re.findall(r"job/(\S+)", script) == [f"mmaudit-append-{stage}" for stage in STAGES]


def test_one_kind_of_cluster_is_chosen(data: Path) -> None:
    for both in (False, True):
        with pytest.raises(ConfigError, match="pass one of --slurm and --kubernetes"):
            plan(data, slurm=both, kubernetes=both)
    with pytest.raises(ConfigError, match="at least one process"):
        plan(data, slurm=True, tasks=0)
