"""Fuzzing of all commands with damaged and hostile inputs, which must be handled or refused with a one-line error.

Run with: python benchmarks/fuzz.py [--inputs N] [--seed N] [--only KIND[:NUMBER]] [--jobs N] [--keep DIR] [--minutes M]

Each input (a table, a manifest, a config, a sound ...) is written and read in a forked child of a process that has
imported mmaudit already. An input is handled well if the command ends with 0, 2 or 3 and without a traceback, within
60 s and 1 GB, prints an error as one line without control characters, runs no code that only the input names, and
reads and writes nothing outside its folder. No option of a command names a file outside that the command would write.
The same seed gives the same inputs. `--keep` stores what failed, with the command in `cmd`; `--only KIND:NUMBER` runs
one input again. The exit code is 1 if any input fails. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import multiprocessing
import os
import pkgutil
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from fuzzing.configs import configs, odd_names
from fuzzing.damaged import parquet_bytes, tars_and_saved
from fuzzing.downloads import lists, pickles
from fuzzing.execution import Outcome, run_input
from fuzzing.manifests import hostile_manifests, manifests
from fuzzing.media import layouts, media
from fuzzing.runs import run_folders
from fuzzing.scores import score_tables
from fuzzing.seeds import Seeds, make_seeds
from fuzzing.tables import odd_encodings, odd_tables, small_tables

# Modules that commands import late: imported once in the parent, not in every child.
PRELOADED = (
    "jinja2", "matplotlib.pyplot", "matplotlib.style", "pyarrow.dataset", "pydantic", "tomli_w", "torch._dynamo",
    "torch.profiler", "typer._adapters", "typer.rich_utils", "av", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin",
    "encodings.unicode_escape", "datasets",
)  # fmt: skip
SCRATCH = "MMAUDIT_FUZZ_SCRATCH"  # the variable that names the scratch folder
FAULTS = ("traceback", "signal", "hang", "memory", "message", "escape", "generator")
Write = Callable[[Random, Seeds], list[str]]
KINDS: dict[str, tuple[float, Write]] = {  # share of the inputs, and what writes one and returns its command
    "tables": (0.14, odd_tables),
    "small": (0.02, small_tables),
    "encodings": (0.07, odd_encodings),
    "parquet": (0.12, parquet_bytes),
    "scores": (0.14, score_tables),
    "manifests": (0.14, manifests),
    "hostile": (0.03, hostile_manifests),
    "runs": (0.04, run_folders),
    "configs": (0.08, configs),
    "names": (0.02, odd_names),
    "media": (0.07, media),
    "layouts": (0.01, layouts),
    "pickles": (0.06, pickles),
    "lists": (0.04, lists),
    "saved": (0.02, tars_and_saved),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Settings that all inputs of a run share."""

    seed: int
    scratch: Path
    keep: Path | None
    deadline: float  # of time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND[:NUMBER]", help=f"one kind, or one input of it: {', '.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to store inputs that failed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, with fewer inputs")
    options = parser.parse_args()
    if SCRATCH not in os.environ:
        return _run_in_scratch()
    scratch = Path(os.environ[SCRATCH])
    _import_all()
    make_seeds(scratch / "seeds")
    stamps = _stamps(scratch / "seeds")
    keep = None if options.keep is None else options.keep.absolute()
    job = Job(seed=options.seed, scratch=scratch, keep=keep, deadline=time.monotonic() + 60 * options.minutes)
    failed = _report(_run(list(_inputs(options.inputs, options.only)), job, jobs=options.jobs))
    if changed := stamps ^ _stamps(scratch / "seeds"):
        print(f"an input changed the seed files, such as {min(changed)[0]}")
    return int(failed or bool(changed))


def _stamps(folder: Path) -> set[tuple[str, int, int]]:
    """Return path, size and time of change of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def _run_in_scratch() -> int:
    """Run this script again with a scratch folder and the environment that its imports need; return its exit code.

    One thread, so that a fork is safe; no network; caches, state and home in the scratch folder.
    """
    with tempfile.TemporaryDirectory(prefix="mmaudit-fuzz-") as scratch:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {SCRATCH: scratch, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120", "MPLBACKEND": "Agg"}
        environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        environment |= {f"{library}_OFFLINE": "1" for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
        for name in (
            "XDG_STATE_HOME",
            "XDG_CACHE_HOME",
            "XDG_CONFIG_HOME",
            "HF_HOME",
            "MPLCONFIGDIR",
            "TMPDIR",
            "HOME",
        ):
            folder = Path(scratch) / "home" / name.lower()
            folder.mkdir(parents=True)
            environment[name] = str(folder)
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def _import_all() -> None:
    """Import the modules that the children use; nothing else, so that no thread runs when they are forked."""
    import mmaudit

    for module in pkgutil.walk_packages(mmaudit.__path__, "mmaudit."):
        if module.name.split(".")[1] in ("audit", "rebalance", "train", "cli"):
            importlib.import_module(module.name)
    for name in PRELOADED:
        importlib.import_module(name)
    logging.captureWarnings(False)
    importlib.import_module("torch").set_num_threads(1)
    gc.collect()
    gc.freeze()  # else the garbage collector of a child copies every page that it visits


def _inputs(count: int, only: str | None) -> Iterator[tuple[str, int]]:
    """Yield (kind, number within its kind), the kinds interleaved by their shares."""
    kind, _, number = (only or "").partition(":")
    if number:
        yield kind, int(number)
        return
    shares = {kind: 1.0} if kind else {name: share for name, (share, _) in KINDS.items()}
    num_generated: Counter[str] = Counter()
    for total in range(1, count + 1):
        next_kind = max(shares, key=lambda name: shares[name] * total - num_generated[name])
        yield next_kind, num_generated[next_kind]
        num_generated[next_kind] += 1


def _run(inputs: list[tuple[str, int]], job: Job, *, jobs: int) -> Iterator[Outcome]:
    """Yield the outcome of each input as it comes, from processes that fork a child for each."""
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for outcome in pool.imap_unordered(partial(_run_one, job), inputs):
            if outcome is not None:
                yield outcome


def _run_one(job: Job, numbered: tuple[str, int]) -> Outcome | None:
    """Run one input; None after the deadline."""
    if time.monotonic() > job.deadline:
        return None
    kind, number = numbered
    generate = partial(_generate, KINDS[kind][1], Seeds(job.scratch / "seeds"))
    return run_input(
        f"{kind}-{number:05d}",
        generate,
        kind=kind,
        rng_seed=f"{job.seed}/{kind}/{number}",
        scratch=job.scratch,
        keep=job.keep,
    )


def _generate(write: Write, seeds: Seeds, rng: Random) -> list[str]:
    return write(rng, seeds)


def _report(outcomes: Iterator[Outcome]) -> bool:
    """Print a line for each failure as it comes, then the groups and the table; return whether any failed."""
    start, done = time.perf_counter(), []
    for outcome in outcomes:
        done.append(outcome)
        if outcome.fault:
            command = shlex.join(outcome.argv)[:200]
            print(f"{outcome.name}: {outcome.fault}: {outcome.group}: {outcome.detail!r}: {command!r}", flush=True)
    seconds = time.perf_counter() - start
    failed = [outcome for outcome in done if outcome.fault]
    _print_groups(failed)
    print("| kind | inputs | done | refused | " + " | ".join(FAULTS) + " | slowest | peak RSS |")
    print("|---|" + "---|" * (len(FAULTS) + 5))
    for kind in [*KINDS, "all"]:
        if rows := [outcome for outcome in done if kind in (outcome.kind, "all")]:
            _print_row(kind, rows)
    print(f"\n{len(done):,} inputs in {seconds:.0f} s, {len(done) / seconds:.1f} a second; {len(failed)} failed")
    return bool(failed) or not done


def _print_groups(failed: list[Outcome]) -> None:
    """Print the failures grouped by fault and location, most frequent first, with the first input of each."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in sorted(failed, key=lambda failure: failure.name):
        groups.setdefault((outcome.fault, outcome.group), []).append(outcome)
    if groups:
        print("\n| fault | location | count | kinds | first input | last line |\n|---|---|---|---|---|---|")
    for (fault, group), rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        kinds = ", ".join(sorted({outcome.kind for outcome in rows}))
        detail = rows[0].detail.replace("|", "\\|").replace("\n", " ")[:160]
        print(f"| {fault} | {group} | {len(rows)} | {kinds} | {rows[0].name} | {detail!r} |")
    print()


def _print_row(kind: str, rows: list[Outcome]) -> None:
    good = [outcome for outcome in rows if not outcome.fault]
    refused = sum(outcome.exit_code == 2 for outcome in good)
    faults = Counter(outcome.fault for outcome in rows)
    counts = [len(rows), len(good) - refused, refused, *(faults[fault] for fault in FAULTS)]
    slowest, peak = max(outcome.seconds for outcome in rows), max(outcome.peak_bytes for outcome in rows)
    print(f"| {kind} | {' | '.join(f'{count:,}' for count in counts)} | {slowest:.1f} s | {peak / 1e6:.0f} MB |")


if __name__ == "__main__":
    raise SystemExit(main())
