"""Laws of a checkpoint: what is written is read again, whole or not at all, and nobody's code is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmaudit.audit.errors import RunError
from mmaudit.train import checkpoint
from mmaudit.train.checkpoint import load_model, load_state, save_model, save_state

WEIGHTS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "count": torch.tensor(3),
}
STATE = {"net": WEIGHTS, "history": [{"epoch": 1, "loss": 0.5}], "best": (0.5, -1.0, 1), "identity": "abc"}


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_model(WEIGHTS, tmp_path / "deep" / "m.safetensors", about={"classes": ["a"], "epochs": 3})
    found = load_model(tmp_path / "deep" / "m.safetensors")
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "deep" / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mmaudit"]) == {"classes": ["a"], "epochs": 3}


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name, about in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        save_model({**WEIGHTS, "part": torch.arange(12.0).reshape(3, 4).T}, tmp_path / name, about=about)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_state(STATE, tmp_path / "state" / "last.pt")
    found = load_state(tmp_path / "state" / "last.pt", device="cpu")
    assert {name: found[name] for name in ("history", "best", "identity")} == {
        name: STATE[name] for name in ("history", "best", "identity")
    }
    for name, tensor in WEIGHTS.items():
        torch.testing.assert_close(found["net"][name], tensor, rtol=0, atol=0)


class Danger:
    """What runs code when it is unpickled: it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_damaged_state_says_so(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(STATE, path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], pickle.dumps(Danger(tmp_path / "ran"))):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"last.pt is damaged \(\w+\): delete it to start this fine-tuning anew"):
            load_state(path, device="cpu")
    torch.save({"net": Danger(tmp_path / "ran")}, path)
    with pytest.raises(RunError, match="is damaged"):
        load_state(path, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "file"

    def save() -> None:
        if kind == "model":
            save_model(WEIGHTS, path, about={})
        else:
            save_state(STATE, path)

    def fail(content: Any, where: Path, **options: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    save()
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fail)
        patched.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save()
        assert path.read_bytes() == before
        path.unlink()
        with pytest.raises(OSError, match="disk full"):
            save()
        assert not path.exists()
