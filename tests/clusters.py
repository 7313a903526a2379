"""Stand-ins for the commands of clusters, which run the processes of a job at once, the last one first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SBATCH = """#!/bin/sh
# Runs the tasks of a job, and prints a number for it.
for word in "$@"; do
    case "$word" in --array=1-*) last=${word#--array=1-};; esac
    command=$word
done
for task in $(seq "${last:-1}" -1 1); do
    SLURM_ARRAY_TASK_ID=$task sh -c "$command" >&2 || exit 1
done
echo 1
"""
KUBECTL = """
# Keeps Jobs beside itself. One that exists neither runs again nor changes; it fails with one of its indices.
import json, os, subprocess, sys
from pathlib import Path

def file_of(name):
    return Path(__file__).with_name(f"{name}.job")

verb, target = sys.argv[1:3]
if verb == "apply":
    job = json.load(sys.stdin)
    file, spec = file_of(job["metadata"]["name"]), job["spec"]
    template = spec["template"]["spec"]
    assert template["restartPolicy"] == "Never" or not {"backoffLimitPerIndex", "podFailurePolicy"} & spec.keys()
    if file.exists():
        sys.exit(0 if json.loads(file.read_text())["spec"] == spec else "the field is immutable")
    codes = []
    for index in reversed(range(spec["completions"])):
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
        codes.append(subprocess.run(template["containers"][0]["command"], env=environment).returncode)
    ends = ["FailureTarget", "Failed"] if any(codes) else ["SuccessCriteriaMet", "Complete"]
    file.write_text(json.dumps({"spec": spec, "conditions": ends}))
elif verb == "delete":
    assert "--ignore-not-found" in sys.argv
    file_of(target.removeprefix("job/")).unlink(missing_ok=True)
elif verb == "get":
    print(*json.loads(file_of(target.removeprefix("job/")).read_text())["conditions"], end="")
else:
    sys.exit(f"no stand-in of kubectl {verb}")
"""


def write_commands(folder: Path, *, mmaudit: str) -> Path:
    """Write sbatch, kubectl and a shell script `mmaudit` into a folder; return it."""
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "kubectl").write_text(f"#!{sys.executable}\n{KUBECTL}")
    (folder / "mmaudit").write_text(f"#!/bin/sh\n{mmaudit}\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def submit(script: str, commands: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the commands of a folder."""
    environment = {**os.environ, **variables, "PATH": f"{commands}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
