"""Tests that the notebooks run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PRINTED = {
    "tour": ("Spearman 0.8", "report.html"),
    "compare": ("ogm-ge on lopsided: ", "rank agreement within classes 0.", "ours: helps"),
}


def test_every_notebook_is_executed() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PRINTED) == {"tour", "compare"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by nbclient, not by mmaudit
@pytest.mark.parametrize("name", ["tour", pytest.param("compare", marks=pytest.mark.slow)])
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    for text in PRINTED[name]:
        assert text in printed
