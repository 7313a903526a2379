"""Tested processes: started in their own session, struck at a given point, and checked for orphans."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .commands import Arguments

ORPHAN_SECONDS = 5.0  # in which all processes of a command must have ended after it
TIMEOUT_SECONDS = 300.0
_MARK = "FAULT_MARK"  # in the environment of every process of a command
_NUM_WITH_WORKERS = 4  # processes: the command, multiprocessing's two servers, and a worker at least
_HOOK = Path(__file__).parent / "hook"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The scratch folder, and the interpreter whose mmaudit is tested."""

    python: str
    scratch: Path

    @property
    def case(self) -> Path:
        """The folder in which every command runs: always the same, so that no path differs between runs."""
        return self.scratch / "case"

    @property
    def log(self) -> Path:
        """The file operations of the last command."""
        return self.scratch / "operations.log"

    def operations(self) -> list[str]:
        """Return the file operations of the last command, in their order."""
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def hook(self) -> dict[str, str]:
        """Return the environment variables that let the start-up hook log file operations."""
        return {"FAULT_FOLDER": str(self.case), "FAULT_LOG": str(self.log)}

    def environment(self, mark: str) -> dict[str, str]:
        """Return an environment of two threads, without network, whose state and temporary files lie in scratch."""
        own = {
            _MARK: mark,
            "XDG_STATE_HOME": str(self.scratch / "state"),
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
            "TMPDIR": str(self.scratch / "tmp"),
            "MPLCONFIGDIR": str(self.scratch / "cache" / "matplotlib"),
            "PYTHONPATH": os.pathsep.join([str(_HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.scratch / "cache" / "hf"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        return {**os.environ, **own}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """When a signal is sent: before a file operation (1, 2, ...), or at a share of the usual duration.

    With `in_workers` it is a share of the time for which the command has workers.
    """

    number: signal.Signals
    operation: int | None = None
    share: float = 0.0
    in_workers: bool = False
    to_group: bool = False

    def __str__(self) -> str:
        share = f"{'w' if self.in_workers else 't'}{self.share:.4f}"
        when = share if self.operation is None else f"op{self.operation}"
        return f"{self.number.name}:{when}" + ":group" * self.to_group

    @classmethod
    def parse(cls, text: str) -> Point:
        """Parse the output of `str`."""
        name, when, *group = text.split(":")
        number, to_group = signal.Signals[name], group == ["group"]
        if when.startswith("op"):
            return cls(number=number, operation=int(when[2:]), to_group=to_group)
        return cls(number=number, share=float(when[1:]), in_workers=when[0] == "w", to_group=to_group)

    def hook(self) -> dict[str, str]:
        """Return the action of the start-up hook as environment variables."""
        if self.operation is None:
            return {}
        group = "1" if self.to_group else "0"
        return {"FAULT_OPERATION": str(self.operation), "FAULT_SIGNAL": str(int(self.number)), "FAULT_GROUP": group}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended: exit code as a shell has it, standard error, seconds, and processes left after it."""

    code: int
    errors: list[str]
    seconds: float
    struck: bool = False
    timed_out: bool = False
    orphans: list[str] = field(default_factory=list)


class Running:
    """A started command; `finish` waits for it and for all processes that it started."""

    def __init__(
        self,
        bench: Bench,
        arguments: Arguments,
        *,
        variables: dict[str, str] | None = None,
        prefix: Arguments = (),
        max_file_bytes: int | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*prefix, bench.python, "-m", "mmaudit", *arguments],
            cwd=bench.case,
            env={**bench.environment(self._mark), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=None if max_file_bytes is None else lambda: _limit_files(max_file_bytes),
        )
        self._errors: list[bytes] = []
        # A thread reads, since orphans may keep the pipe open.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def has_ended(self) -> bool:
        """Return whether the command has ended."""
        return self._process.poll() is not None

    def wait_for_workers(self) -> float | None:
        """Wait until other processes work for the command, and return for how long it has run; None if none do."""
        while not self.has_ended():
            if len(_marked(self._mark)) >= _NUM_WITH_WORKERS:
                return time.monotonic() - self._started
            time.sleep(0.02)
        return None

    def worker_seconds(self) -> float:
        """Wait until workers have come and gone, and return how long they lived; 0 if none came."""
        begin = self.wait_for_workers()
        while begin is not None and len(_marked(self._mark)) >= _NUM_WITH_WORKERS:
            time.sleep(0.02)
        return 0.0 if begin is None else time.monotonic() - self._started - begin

    def strike(self, point: Point, *, usual_seconds: float) -> bool:
        """Send a signal at a share of some seconds; False if the command ends before."""
        begin = self.wait_for_workers() if point.in_workers else 0.0
        if begin is None:
            return False
        try:
            self._process.wait(max(0.0, self._started + begin + point.share * usual_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            (os.killpg if point.to_group else os.kill)(self._process.pid, point.number)
            return True
        return False

    def finish(self, *, struck: bool = False) -> Outcome:
        """Wait for the end, then for that of every process it started; those that are left are killed."""
        timed_out = False
        try:
            self._process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            timed_out = True
            self._kill()
        except BaseException:  # Ctrl-C at the benchmark itself
            self._kill()
            raise
        seconds = time.monotonic() - self._started
        orphans = self._end_orphans()
        self._reader.join(1.0)
        code = self._process.returncode
        return Outcome(
            code=code if code >= 0 else 128 - code,
            errors=b"".join(self._errors).decode(errors="replace").splitlines(),
            seconds=seconds,
            struck=struck,
            timed_out=timed_out,
            orphans=list(orphans.values()),
        )

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stderr is not None
        while chunk := self._process.stderr.read1(65_536):  # type: ignore[attr-defined]
            self._errors.append(chunk)

    def _end_orphans(self) -> dict[int, str]:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (orphans := _marked(self._mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in orphans:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while _marked(self._mark) and time.monotonic() < deadline + ORPHAN_SECONDS:
            time.sleep(0.05)
        return orphans


def run(bench: Bench, arguments: Arguments, *, max_file_bytes: int | None = None) -> Outcome:
    """Run a command undisturbed; its file operations are logged, unless it may only write files up to a size."""
    if max_file_bytes is not None:
        return Running(bench, arguments, max_file_bytes=max_file_bytes).finish()
    bench.log.unlink(missing_ok=True)
    return Running(bench, arguments, variables=bench.hook()).finish()


def run_struck(bench: Bench, arguments: Arguments, point: Point, *, usual_seconds: float) -> Outcome:
    """Run a command and strike it at a point; `struck` is False where it ended before."""
    if point.operation is None:
        running = Running(bench, arguments)
        struck = running.strike(point, usual_seconds=usual_seconds)
        return running.finish(struck=struck)
    bench.log.unlink(missing_ok=True)
    outcome = Running(bench, arguments, variables={**bench.hook(), **point.hook()}).finish()
    return replace(outcome, struck=len(bench.operations()) >= point.operation)


def _limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def _marked(mark: str) -> dict[int, str]:
    """Return the processes whose environment has this mark, wherever they were re-parented, with their command."""
    variable = f"{_MARK}={mark}".encode()
    marked = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(OSError):  # it has ended, or belongs to another user
            if variable in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                marked[int(folder.name)] = words[:120]
    return marked
