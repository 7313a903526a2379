"""Scripts that score a dataset on a cluster: jobs of Slurm and of Kubernetes that run the stages of `score`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.engine.plan import plan_parts
from ..audit.errors import ConfigError
from ..audit.hashing import digest
from .config import environment_settings, load_config, setting_text
from .provenance import open_encodable
from .staging import BY_PART, STAGES

_GRACE_SECONDS = 30  # between SIGTERM and SIGKILL
_RETRIES = 6  # of one process of a Job, as many as Kubernetes grants a whole Job by default
# Evictions and drained nodes do not count as failures.
_DISRUPTIONS = {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]}
# kubectl itself waits for one condition, and for ever if a Job fails. Arguments: a Job.
_WAIT_FOR_JOB = """\
finish() {
    while :; do
        state=$(kubectl get "job/$1" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
        case " $state " in
            *" Complete "*) return ;;
            *" Failed "*)
                echo "job $1 failed, see: kubectl describe job/$1; then run this script again" >&2
                exit 1 ;;
        esac
        sleep 10
    done
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """Result of `plan`.

    Attributes:
        num_rows: Rows of the data.
        num_parts: Parts that the data are scored in.
        num_tasks: Processes of the stages that run by part.
        script: Shell script that submits the jobs.
    """

    num_rows: int
    num_parts: int
    num_tasks: int
    script: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "num_rows": self.num_rows,
            "num_parts": self.num_parts,
            "num_tasks": self.num_tasks,
            "script": self.script,
        }


def plan(
    data: str | Path,
    *,
    run: str | Path = "mmaudit-run",
    slurm: bool = False,
    kubernetes: bool = False,
    append: bool = False,
    tasks: int = 8,
    gpu: bool = False,
    image: str = "mmaudit",
    claim: str = "mmaudit",
    config: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
) -> PlanResult:
    """Print a script that scores large data on a cluster, as jobs that depend on each other.

    The stages encode and score run as arrays of processes, fit and merge as one. Data and run folder are on a file
    system that all of them see. A job that is stopped or fails can be submitted again: what is done stays. Slurm sends
    SIGTERM 30 s before a time limit. Kubernetes has to be of version 1.29 or later, and the script waits for its Jobs:
    it ends with an error that names one that has failed, and replaces the Jobs of before when it is run again.

    Args:
        data: The data, as for `score`.
        run: Run folder.
        slurm: Print a script for Slurm, of sbatch.
        kubernetes: Print a script for Kubernetes, of kubectl and indexed Jobs.
        append: Score the rows that were added to the data of the run by its own probes, see `score`.
        tasks: Processes of each array; no more than the data have parts.
        gpu: Ask for one GPU per process, for encode and fit.
        image: Container image of Kubernetes, with mmaudit in it.
        claim: Persistent volume claim of Kubernetes that is mounted at /data.
        config: TOML file with settings, such as data.label, which the jobs read too.
        settings: One setting, such as data.label=emotion; in Python also {"data.label": "emotion"}. Those made by
            environment variables are passed to the jobs too.

    Returns:
        The number of parts, and the script.

    Raises:
        ConfigError: Neither or both of `slurm` and `kubernetes` are passed, or a setting is invalid.
        DatasetError: The data cannot be read.

    Example:
        >>> print(mmaudit.plan("features.parquet", slurm=True, tasks=32).script)
    """
    if slurm == kubernetes:
        raise ConfigError("pass one of --slurm and --kubernetes")
    if tasks < 1:
        raise ConfigError(f"--tasks {tasks}: at least one process is needed")
    loaded = load_config(config, settings)
    dataset = open_encodable(str(data), loaded.data)
    parts = plan_parts(dataset.shards, config=loaded.parts, depends_on=()).parts
    num_tasks = min(tasks, len(parts))
    command = ["mmaudit", "score", str(data), "--run", str(run)]
    command += ["--append"] if append else []
    command += [] if config is None else ["--config", str(config)]
    # The jobs may have another environment.
    pairs = [f"{key}={text}" for key, text in environment_settings().items()]
    pairs += [setting_text(*pair) for pair in settings.items()] if isinstance(settings, Mapping) else settings
    command += [word for pair in pairs for word in ("--set", pair)]
    what = "Appends the new ones of" if append else "Scores"
    header = f"#!/bin/sh\n# {what} {dataset.num_rows:,} rows in {len(parts)} parts. Submit again what failed.\nset -e\n"
    name = "mmaudit-append" if append else "mmaudit"
    if slurm:
        script = header + _slurm_script(command, name, num_tasks=num_tasks, gpu=gpu)
    else:
        name += f"-{digest(claim.encode(), str(run).encode())[:8]}"  # no other run has Jobs of this name
        script = header + _kubernetes_script(command, name, num_tasks=num_tasks, gpu=gpu, image=image, claim=claim)
    return PlanResult(num_rows=dataset.num_rows, num_parts=len(parts), num_tasks=num_tasks, script=script)


def _slurm_script(command: Sequence[str], name: str, *, num_tasks: int, gpu: bool) -> str:
    """Return the calls of sbatch.

    Without `B:` Slurm signals the steps that srun has started, and not the batch shell; `exec` makes that mmaudit.
    """
    lines: list[str] = []
    previous = ""
    for stage in STAGES:
        task = "exec " + shlex.join([*command, "--stage", stage])
        words = ["sbatch", "--parsable", f"--job-name={name}-{stage}", "--requeue", f"--signal=B:TERM@{_GRACE_SECONDS}"]
        words += ["--kill-on-invalid-dep=yes"] if previous else []  # or a job waits for ever for one that has failed
        if stage in BY_PART:
            words.append(f"--array=1-{num_tasks}")
            task += f' --shard "$SLURM_ARRAY_TASK_ID/{num_tasks}"'
        if gpu and stage in ("encode", "fit"):
            words.append("--gres=gpu:1")
        depends = [] if not previous else [f'"--dependency=afterok:${previous}"']
        lines.append(f"{stage}=$({' '.join([shlex.join(words), *depends, '--wrap', shlex.quote(task)])})")
        previous = stage
    return "\n".join([*lines, f'echo "submitted; the last job is ${previous}"', ""])


def _kubernetes_script(command: Sequence[str], name: str, *, num_tasks: int, gpu: bool, image: str, claim: str) -> str:
    """Return the calls of kubectl; a Job of before is removed first, since it neither changes nor restarts."""
    lines = [_WAIT_FOR_JOB]
    for stage in STAGES:
        task = "exec " + shlex.join([*command, "--stage", stage])
        if stage in BY_PART:
            task += f' --shard "$((JOB_COMPLETION_INDEX + 1))/{num_tasks}"'
        job = _kubernetes_job(
            f"{name}-{stage}",
            task,
            completions=num_tasks if stage in BY_PART else 1,
            gpu=gpu and stage in ("encode", "fit"),
            image=image,
            claim=claim,
        )
        lines.append(f"kubectl delete job/{name}-{stage} --ignore-not-found --cascade=foreground")
        lines += ["kubectl apply -f - <<'JOB'", json.dumps(job, indent=2), "JOB"]
        lines.append(f"finish {name}-{stage}")
    return "\n".join([*lines, ""])


def _kubernetes_job(name: str, task: str, *, completions: int, gpu: bool, image: str, claim: str) -> dict[str, Any]:
    """Return an indexed Job; JSON is YAML. A process that fails again and again does not end the others."""
    container: dict[str, Any] = {
        "name": "mmaudit",
        "image": image,
        "command": ["sh", "-c", task],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    if gpu:
        container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    pod = {
        "restartPolicy": "Never",  # which a limit for each index needs
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": completions,
            "parallelism": completions,
            "backoffLimitPerIndex": _RETRIES,
            "podFailurePolicy": _DISRUPTIONS,
            "template": {"spec": pod},
        },
    }
