"""Run what the pages show, and write its output into them.

    python docs/outputs.py [--again] FOLDER docs/tutorial.md docs/howto/features.md

Pages run in the order given, in FOLDER, so that a page may use what an earlier one made, also in an earlier call. Of a
block `console` every line that begins with `$ ` is run, and what it prints is written below it: stdout and stderr
together, without lines of progress. Each block `python` is run as a script; where a block `text` follows it, that gets
what the script prints. Commands and scripts that have an output already are left alone; `--again` empties all outputs
first. A command that fails stops everything, unless its line ends in `# exit N` with the exit code it should have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```\n(?:(\n```text\n)(.*?)^```\n)?", flags=re.MULTILINE | re.DOTALL)
_PROGRESS = re.compile(r"^\w[\w ]*: \d+ of \d+(?:[,;] .*)?$")
_EXIT = re.compile(r"# exit (\d+)$")


def run(words: list[str], folder: Path, *, expected: int) -> list[str]:
    """Run a command and return the lines it prints."""
    state = {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "100", "TERM": "dumb"}
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **state}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != expected:
        raise SystemExit(f"{words[-1]}: exit {done.returncode}, not {expected}\n{done.stdout}")
    lines = done.stdout.replace(f"{folder}/", "").rstrip("\n").split("\n")
    return [line.rstrip() for line in lines if line and not _PROGRESS.match(line)]


def console(body: str, folder: Path) -> str:
    """Run those commands of a block that are without output, and return the block with it."""
    parts = [part for part in re.split(r"^(?=\$ )", body, flags=re.MULTILINE) if part]
    for place, part in enumerate(parts):
        command = re.match(r"(?:.*\\\n)*.*\n", part)
        assert command is not None
        if command.group() != part:
            continue
        text = part[2:].rstrip("\n")
        match = _EXIT.search(text)
        lines = run(["bash", "-c", text], folder, expected=int(match.group(1)) if match else 0)
        parts[place] = part + "".join(f"{line}\n" for line in lines)
    return "".join(parts)


def python(body: str, folder: Path) -> str:
    """Run a script and return what it prints."""
    (folder / "script.py").write_text(body, encoding="utf-8")
    return "".join(f"{line}\n" for line in run([sys.executable, "script.py"], folder, expected=0))


def update(page: Path, folder: Path) -> None:
    """Run the blocks of a page in order, and write each output as soon as it is there."""
    start = 0
    while match := _BLOCK.search(page.read_text(encoding="utf-8"), start):
        kind, body, opening, printed = match.groups()
        new = match.group()
        if kind == "console":
            new = f"```console\n{console(body, folder)}```\n" + new[len(f"```console\n{body}```\n") :]
        elif not printed:
            lines = python(body, folder)
            new = f"```python\n{body}```\n" + (f"{opening}{lines}```\n" if opening else "")
        text = page.read_text(encoding="utf-8")
        page.write_text(text[: match.start()] + new + text[match.end() :], encoding="utf-8")
        start = match.start() + len(new)


def clear(page: Path) -> None:
    """Empty all outputs of a page."""

    def cleared(match: re.Match[str]) -> str:
        kind, body, opening, _ = match.groups()
        if kind == "python":
            return f"```python\n{body}```\n" + (f"{opening}```\n" if opening else "")
        commands = re.findall(r"^\$ (?:.*\\\n)*.*\n", body, flags=re.MULTILINE)
        return f"```console\n{''.join(commands)}```\n" + match.group()[len(f"```console\n{body}```\n") :]

    page.write_text(_BLOCK.sub(cleared, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    again = sys.argv[1] == "--again"
    folder, *pages = sys.argv[2:] if again else sys.argv[1:]
    for name in pages:
        if again:
            clear(Path(name))
        update(Path(name), Path(folder).resolve())
