"""Check of the language of the source: names that say nothing, docstrings that state nothing, folders in a circle.

    python .ci/language.py [ROOT]

Prints what it counts, and each place above a bound; exits with 1 if a bound is missed. The glossary in docs/ has the
terms to use instead.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("audit", "rebalance", "train", "cli")
MAX_FILLER_SHARE = 0.01  # of all assigned names and parameters; scikit-learn and PyTorch lie between 0.001 and 0.006
MAX_WEAK_OPENINGS = 5
FILLER = frozenset(
    re.findall(
        r"\w+",
        """
        ahead apart asked at beside both called chosen each even everyone found fresh given heard held here kept known
        lacking least left looked made mine more most much named nobody now odd one other others ours place right said
        seen some taken theirs then there told twice waiting wanted what who whole whose within wrong again
        """,
    )
)
WEAK_OPENING = re.compile(r"(Give|Tell|Say|Take|Let|Ask|Hear)\b")  # a docstring opens with Compute, Return, Read, ...


def assigned_names(tree: ast.AST) -> Iterator[str]:
    """Yield every variable that is assigned and every parameter, without leading and trailing underscores."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        else:
            continue
        if name not in ("self", "cls", "_"):
            yield name.strip("_")


def weak_docstrings(tree: ast.AST, path: Path) -> Iterator[str]:
    """Yield the place of each function or class whose docstring does not open with what it does."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if WEAK_OPENING.match(ast.get_docstring(node) or ""):
            yield f"{path}:{node.lineno} {node.name}"


def imported_folders(tree: ast.AST, path: Path, root: Path) -> Iterator[Path]:
    """Yield the folders that a module imports from by relative imports, its own and those around it left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            for part in (node.module or "").split("."):
                if part and (root / folder / part).is_dir():
                    folder = folder / part
            if folder != path.parent and folder not in path.parents and path.parent not in folder.parents:
                yield folder


def main(root: Path) -> int:
    """Return the exit code: 0 if the source keeps all bounds."""
    names: Counter[str] = Counter()
    questions: list[str] = []
    openings: list[str] = []
    imports: set[tuple[Path, Path]] = set()
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        path, tree = file.relative_to(root), ast.parse(file.read_text(encoding="utf-8"))
        names.update(assigned_names(tree))
        if "?" in (ast.get_docstring(tree) or "").partition("\n\n")[0]:
            questions.append(str(path))
        openings += weak_docstrings(tree, path)
        imports |= {(path.parent, folder) for folder in imported_folders(tree, path, root)}
    circles = sorted(f"{a} <-> {b}" for a, b in imports if (b, a) in imports and a < b)
    filler = Counter({name: count for name, count in names.items() if name in FILLER})
    share = filler.total() / max(names.total(), 1)
    print(f"names that say nothing: {share:.2%} of {names.total()} (at most {MAX_FILLER_SHARE:.0%})")
    print(f"module docstrings that ask a question: {len(questions)} (0)")
    print(f"docstrings with a weak opening: {len(openings)} (at most {MAX_WEAK_OPENINGS})")
    print(f"folders that import each other: {len(circles)} (0)")
    failures = questions + circles
    if share > MAX_FILLER_SHARE:
        failures += [f"{name}: {count} times" for name, count in filler.most_common(20)]
    if len(openings) > MAX_WEAK_OPENINGS:
        failures += openings
    print(*failures, sep="\n", end="\n" * bool(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
