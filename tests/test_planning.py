"""Tests of the scripts for clusters: every stage once, with every shard, each after the one before."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from clusters import submit, write_commands
from conftest import gaussian_table

from mmaudit.audit.dataset.dataset import DataConfig
from mmaudit.audit.errors import ConfigError
from mmaudit.cli.config import load_config
from mmaudit.cli.planning import plan
from mmaudit.cli.provenance import open_encodable
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
        assert shlex.split(job[-1]) == ["exec", *common, "--stage", stage, *shard]
        assert ("--array=1-4" in job) == bool(shard)
        assert ("--gres=gpu:1" in job) == (stage in ("encode", "fit"))
        assert [word for word in job if "dependency" in word] == [f"--dependency=afterok:${before}"] * bool(before)
        assert ("--kill-on-invalid-dep=yes" in job) == bool(before)
    assert len(jobs) == len(STAGES)


def test_jobs_of_kubernetes_are_indexed(data: Path) -> None:
    script = plan(data, kubernetes=True, tasks=100, image="registry/mmaudit", claim="c", settings=SETTINGS).script
    texts = re.findall(r"<<'JOB'\n(.*?)\nJOB\nfinish (\S+)", script, flags=re.DOTALL)
    for (text, waited), stage in zip(texts, STAGES, strict=True):
        job = json.loads(text)
        assert job["metadata"]["name"] == waited
        assert re.fullmatch(rf"mmaudit-[0-9a-f]{{8}}-{stage}", waited)
        num_processes = 6 if stage in ("encode", "score") else 1
        assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", num_processes)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "registry/mmaudit"
        assert ("$((JOB_COMPLETION_INDEX + 1))/6" in container["command"][2]) == (num_processes > 1)
        assert shlex.split(container["command"][2])[:4] == ["exec", "mmaudit", "score", str(data)]


def test_jobs_of_an_append_are_its_stages(data: Path) -> None:
    jobs = commands_of_slurm(plan(data, run="a run", slurm=True, append=True, tasks=4, settings=SETTINGS).script)
    assert [shlex.split(job[-1])[:7] for job in jobs] == [
        ["exec", "mmaudit", "score", str(data), "--run", "a run", "--append"]
    ] * len(STAGES)
    assert [f"--job-name=mmaudit-append-{stage}" in job for job, stage in zip(jobs, STAGES, strict=True)] == [True] * 4
    script = plan(data, kubernetes=True, append=True, settings=SETTINGS).script
    names = re.findall(r"^finish mmaudit-append-[0-9a-f]{8}-(\S+)", script, flags=re.MULTILINE)
    assert names == list(STAGES)


def test_one_kind_of_cluster_is_chosen(data: Path) -> None:
    for both in (False, True):
        with pytest.raises(ConfigError, match="pass one of --slurm and --kubernetes"):
            plan(data, slurm=both, kubernetes=both)
    with pytest.raises(ConfigError, match="at least one process"):
        plan(data, slurm=True, tasks=0)


def test_slurm_signals_mmaudit_itself(data: Path, tmp_path: Path) -> None:
    """The batch shell, which `B:` names, is mmaudit: it has the signal's 30 s."""
    job = commands_of_slurm(plan(data, slurm=True, settings=SETTINGS).script)[0]
    assert "--signal=B:TERM@30" in job
    stand_in = "trap 'echo TERM > got; exit 143' TERM; touch runs; while :; do sleep 0.02; done"
    commands = write_commands(tmp_path / "bin", mmaudit=stand_in)
    # As `sbatch --wrap` makes it.
    (tmp_path / "batch").write_text(f"#!/bin/sh\n# This script was created by sbatch --wrap.\n\n{job[-1]}\n")
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1"}
    with subprocess.Popen(["/bin/sh", "batch"], cwd=tmp_path, env=environment, start_new_session=True) as shell:
        end = time.monotonic() + 20
        while not (tmp_path / "runs").exists() and time.monotonic() < end:
            time.sleep(0.02)
        shell.send_signal(signal.SIGTERM)
        try:
            assert shell.wait(20) == 143
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert (tmp_path / "got").read_text() == "TERM\n"


def test_a_job_of_kubernetes_that_failed_ends_the_script_and_is_replaced(data: Path, tmp_path: Path) -> None:
    """Shard 2 of the stage score fails in the first submission."""
    tasks = tmp_path / "tasks"
    fails = f'case "$*" in *"--stage score --shard 2/3") [ -e {tmp_path}/mended ] || exit 1;; esac'
    commands = write_commands(tmp_path / "bin", mmaudit=f'{fails}\necho "$@" >> {tasks}')
    script = plan(data, run="/data/run", kubernetes=True, tasks=3, settings=SETTINGS).script
    done = submit(script, commands)
    assert done.returncode == 1
    job = re.findall(r"^finish (\S+)", script, flags=re.MULTILINE)[2]
    assert done.stderr.endswith(f"job {job} failed, see: kubectl describe job/{job}; then run this script again\n")
    stages = [line.partition("--stage ")[2] for line in tasks.read_text().splitlines()]
    encoded = [f"encode --shard {number}/3" for number in (3, 2, 1)]
    assert stages == [*encoded, "fit", "score --shard 3/3", "score --shard 1/3"]  # the others do not end with it
    tasks.unlink()
    (tmp_path / "mended").touch()
    for _ in range(2):  # a finished one runs again too
        assert submit(script, commands).returncode == 0
        assert [line.partition("--stage ")[2] for line in tasks.read_text().splitlines()] == [
            *encoded, "fit", *(f"score --shard {number}/3" for number in (3, 2, 1)), "merge",
        ]  # fmt: skip
        tasks.unlink()
    # With more processes, and for another run, which keeps the Jobs of the first.
    before = set((tmp_path / "bin").glob("*.job"))
    for run in ("/data/run", "/data/other"):
        other = plan(data, run=run, kubernetes=True, tasks=6, settings=SETTINGS).script
        assert submit(other, commands).returncode == 0
    assert len(set((tmp_path / "bin").glob("*.job")) - before) == len(STAGES)


SETTINGS_TO_PRINT: list[Any] = [
    {"probe.thorough": True, "parts.rows": 10},
    {"data.modality": ("a=a", 'b="b"')},
    {"data.modality": ["a=a's", "b=$HOME `x`", "c=back\\slash\n\ttab \x7f \u00e9\U0001f600"]},
    {"data.label": "10"},
    {"data.label": "true"},
    {"data.label": 'an "emotion"'},
    {"data.label": "$(touch x) it's"},
    {"data.label": "'quoted'"},
    {"data.group": "[a]", "data.split": " b "},
    {"probe.l2_penalties": (1e-2, 1.0), "posterior": 0.25},
    ["data.label=10x", "data.group='10'", "probe.l2_penalties=[1e-2]"],
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*(("slurm", settings) for settings in SETTINGS_TO_PRINT), ("kubernetes", SETTINGS_TO_PRINT[2])],
)
def test_settings_are_read_back_from_the_script(
    kind: str, settings: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell passes them to mmaudit, as for the data and the run; those of environment variables too."""
    monkeypatch.setattr(
        "mmaudit.cli.planning.open_encodable", lambda source, config: open_encodable(data, DataConfig())
    )
    monkeypatch.setenv("MMAUDIT_PROBE_FOLDS", "7")
    run, config = 'a $run\'s "x"', tmp_path / "a config.toml"
    config.write_text("seed = 3\n")
    script = plan(data, run=run, slurm=kind == "slurm", kubernetes=kind == "kubernetes", config=config,
                  settings=settings, tasks=1).script  # fmt: skip
    words_file = tmp_path / "words"
    commands = write_commands(tmp_path / "bin", mmaudit=f"printf '%s\\0' \"$@\" END >> {words_file}")
    expected = load_config(config, settings)
    assert submit(script, commands).returncode == 0
    monkeypatch.delenv("MMAUDIT_PROBE_FOLDS")
    *calls, rest = words_file.read_text(encoding="utf-8").split("\0END\0")
    assert (len(calls), rest) == (len(STAGES), "")
    for call in calls:
        words = call.split("\0")
        assert words[:4] == ["score", str(data), "--run", run]
        pairs = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
        assert load_config(words[words.index("--config") + 1], pairs) == expected
        assert expected.probe.folds == 7


def test_a_setting_without_a_value_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="is no value that --set can state"):
        plan(data, slurm=True, settings={**SETTINGS, "data.group": None})
