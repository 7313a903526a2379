"""Classification of a child's failure: by exit code, memory, printed text and files."""

from __future__ import annotations

import signal
from pathlib import Path

HANG_SECONDS = 60
MAX_PEAK_BYTES = 10**9
GENERATOR_FAILED = 97  # exit code of a child that could not write its input
SECRET = b"SECRET-THAT-NO-COMMAND-MAY-COPY"  # content of the files outside
_ROOT = f"{Path(__file__).resolve().parents[2]}/"


def fault_of(folder: Path, code: int, argv: tuple[str, ...], peak: int) -> tuple[str, str, str]:
    """Return a child's failure as (fault, group, detail); ("", "", "") if there is none."""
    command = argv[0] if argv else "?"
    stderr = read_text(folder / "stderr")
    last = stderr.strip().rpartition("\n")[2][:300]
    if code == GENERATOR_FAILED:
        return "generator", last, stderr[-2000:]
    if escape := _escape_of(folder, command, argv):
        return escape
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        return "hang", _crash_frame(folder / "crash"), f"{command} did not end within {HANG_SECONDS} s"
    if code < 0:
        return "signal", f"{signal.Signals(-code).name} in {_crash_frame(folder / 'crash')}", command
    if code not in (0, 2, 3) or "Traceback (most recent call last)" in stderr:
        return "traceback", _frame(read_text(folder / "traceback") or stderr), last
    if peak > MAX_PEAK_BYTES:
        return "memory", f"{command}, exit {code}", f"{peak / 1e9:.2f} GB; {last}"
    return _fault_of_words(folder, code, command, stderr) or ("", "", "")


def _fault_of_words(folder: Path, code: int, command: str, stderr: str) -> tuple[str, str, str] | None:
    """Return a fault if the printed text has control characters, or an error that is not one line."""
    text = stderr + read_text(folder / "stdout")
    control = sorted(
        {f"{ord(char):#04x}" for char in text if (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160}
    )
    if control:
        return "message", f"{command} prints control characters", ", ".join(control)
    lines = stderr.rstrip("\n").split("\n")
    prefix = {2: "error: ", 3: "failed: "}.get(code)
    if prefix is None or "Usage: " in stderr:
        return None
    starts = [number for number, line in enumerate(lines) if line.startswith(prefix)]
    if starts != [len(lines) - 1]:
        return "message", f"{command}, exit {code}: not one line", stderr[-300:]
    return None


def _escape_of(folder: Path, command: str, argv: tuple[str, ...]) -> tuple[str, str, str] | None:
    """Return a fault if the code of an input was run, or files outside its folder were read or written."""
    names = {path.name for path in folder.iterdir()} - {
        "input",
        "outside",
        "stdout",
        "stderr",
        "cmd",
        "crash",
        "traceback",
    }
    if "executed" in names:
        return "escape", f"{command} runs code that only the input names", " ".join(argv)[:200]
    outside = {path.name: path.read_bytes() for path in (folder / "outside").iterdir() if path.is_file()}
    if names or outside != {"secret.txt": SECRET, "secret.wav": SECRET}:
        return "escape", f"{command} writes outside its folder", ", ".join(sorted(names | set(outside)))
    if command == "export" and any(SECRET in path.read_bytes() for path in _plain_files(folder / "input")):
        return "escape", f"{command} copies a file from outside", " ".join(argv)[:200]
    return None


def _plain_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _crash_frame(log: Path) -> str:
    """Return mmaudit's innermost frame in a dump of `faulthandler`, as file:line and function."""
    frames = [line.strip() for line in read_text(log).splitlines() if line.startswith('  File "')]
    own_frames = [frame for frame in frames if _is_own_frame(frame)]
    return _short((own_frames or frames or ["?"])[0])


def _frame(text: str) -> str:
    """Return mmaudit's innermost frame in a traceback, and the type of the exception."""
    text = text.rpartition("Traceback (most recent call last)")[2]
    lines = text.splitlines()
    frames = [line.strip() for line in lines if line.strip().startswith('File "')]
    own_frames = [frame for frame in frames if _is_own_frame(frame)]
    names = [line.partition(":")[0] for line in lines if line and not line.startswith((" ", "Traceback"))]
    deepest = _short(frames[-1]) if frames else "?"
    own = _short(own_frames[-1]) if own_frames else "?"
    return f"{names[-1] if names else '?'} in {own}" + ("" if own == deepest else f" (raised in {deepest})")


def _is_own_frame(frame: str) -> bool:
    return _ROOT in frame and "site-packages" not in frame


def _short(frame: str) -> str:
    """Return `cli/run.py:12 record` of `File "/x/cli/run.py", line 12, in record`."""
    path, _, rest = frame.removeprefix('File "').partition('"')
    for root in (_ROOT, "/site-packages/"):
        path = path.rpartition(root)[2] if root in path else path
    number = rest.partition("line ")[2].partition(",")[0].partition(" ")[0]
    return f"{path}:{number} {rest.rpartition(' ')[2]}".strip()


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
