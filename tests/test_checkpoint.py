"""Tests of checkpoints: round trips, atomic writes, and no execution of code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmaudit.audit.errors import RunError, TrainError
from mmaudit.train import checkpoint
from mmaudit.train.checkpoint import load_model, load_state, read_model_config, save_model, save_state, warm_start
from mmaudit.train.network import FusionNet, ModelConfig

WEIGHTS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "count": torch.tensor(3),
}
STATE = {"net": WEIGHTS, "history": [{"epoch": 1, "loss": 0.5}], "best": (0.5, -1.0, 1), "identity": "abc"}


def test_weights_round_trip(tmp_path: Path) -> None:
    save_model(WEIGHTS, tmp_path / "deep" / "m.safetensors", about={"classes": ["a"], "epochs": 3})
    weights = load_model(tmp_path / "deep" / "m.safetensors")
    assert weights.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "deep" / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mmaudit"]) == {"classes": ["a"], "epochs": 3}


def test_same_weights_give_same_bytes(tmp_path: Path) -> None:
    for name, about in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        save_model({**WEIGHTS, "part": torch.arange(12.0).reshape(3, 4).T}, tmp_path / name, about=about)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_state_round_trip(tmp_path: Path) -> None:
    save_state(STATE, tmp_path / "state" / "last.pt")
    state = load_state(tmp_path / "state" / "last.pt", device="cpu")
    assert {name: state[name] for name in ("history", "best", "identity")} == {
        name: STATE[name] for name in ("history", "best", "identity")
    }
    for name, tensor in WEIGHTS.items():
        torch.testing.assert_close(state["net"][name], tensor, rtol=0, atol=0)


class FileWriter:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_damaged_state_raises_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(STATE, path)
    state_bytes = path.read_bytes()
    for content in (b"", b"nonsense", state_bytes[: len(state_bytes) // 2], pickle.dumps(FileWriter(tmp_path / "ran"))):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"last.pt is damaged \(\w+\): delete it to start this fine-tuning again"):
            load_state(path, device="cpu")
    torch.save({"net": FileWriter(tmp_path / "ran")}, path)
    with pytest.raises(RunError, match="is damaged"):
        load_state(path, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["model", "state"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "file"

    def save() -> None:
        if kind == "model":
            save_model(WEIGHTS, path, about={})
        else:
            save_state(STATE, path)

    def fail(content: Any, target: Any, **options: Any) -> None:
        if isinstance(target, (str, Path)):
            Path(target).write_bytes(b"half")
        else:
            target.write(b"half")
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


def net_of(
    *, modalities: tuple[str, ...] = ("audio", "visual"), classes: tuple[str, ...] = ("x", "y", "z"), **options: Any
) -> FusionNet:
    sizes = {"audio": 3, "visual": 5, "text": 4}
    shapes = tuple((sizes[name],) for name in modalities)
    return FusionNet(ModelConfig(modalities=modalities, shapes=shapes, classes=classes, **{"hidden": 6, **options}))


def save_network(net: FusionNet, path: Path) -> Path:
    save_model(net.state_dict(), path, about=asdict(net.config))
    return path


def equal_tensors(first: FusionNet, second: FusionNet) -> set[str]:
    """Return the names of the tensors that are equal in two networks."""
    second_tensors = second.state_dict()
    return {
        name
        for name, tensor in first.state_dict().items()
        if name in second_tensors and torch.equal(tensor, second_tensors[name])
    }


def test_warm_start_copies_all_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, new = net_of(), net_of()
    old.encoders[0].mean.fill_(3.0)  # type: ignore[operator]
    warm_start(new, save_network(old, tmp_path / "old"))
    assert equal_tensors(new, old) == set(new.state_dict())  # the standardisation too


def test_modalities_are_matched_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = net_of(modalities=("text", "audio", "visual"), own_heads=True)
    new = net_of(modalities=("visual", "audio"), own_heads=True)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    warm_start(new, save_network(old, tmp_path / "old"))
    new_weights, old_weights = new.state_dict(), old.state_dict()
    for j, k in ((0, 2), (1, 1)):
        assert torch.equal(new_weights[f"encoders.{j}.layers.0.weight"], old_weights[f"encoders.{k}.layers.0.weight"])
        assert torch.equal(new_weights[f"heads.{j}.weight"], old_weights[f"heads.{k}.weight"])
    fused = [name for name in new_weights if name.startswith("fusion")]
    assert fused
    assert all(torch.equal(new_weights[name], before[name]) for name in fused)  # of other modalities: random


def test_new_modality_keeps_its_random_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, new = net_of(modalities=("audio",)), net_of()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    warm_start(new, save_network(old, tmp_path / "old"))
    weights = new.state_dict()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in weights if name.startswith("encoders.0.layers.0")}  # the others start equal
    assert {name for name in weights if name.startswith("encoders.0.")} <= equal_tensors(new, old)


def test_heads_of_other_classes_keep_their_random_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old, new = net_of(), net_of(classes=("x", "y", "w"))
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    warm_start(new, save_network(old, tmp_path / "old"))
    unchanged = {name for name, tensor in new.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in new.state_dict() if name.startswith("fusion")} <= unchanged
    assert {name for name in new.state_dict() if name.startswith("encoders")} <= equal_tensors(new, old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 7}, r"do not fit the encoder of audio .*hidden 6"),
        ({"modalities": ("text",)}, "was trained on audio, visual, none of which is trained now"),
    ],
)
def test_weights_that_do_not_fit_raise(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        warm_start(net_of(**options), save_network(net_of(), tmp_path / "old"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(tmp_path: Path, value: float) -> None:
    save_model({**WEIGHTS, "bias": torch.tensor([0.5, value])}, tmp_path / "m.safetensors", about={})
    with pytest.raises(RunError, match="is damaged, its weights bias are not all finite"):
        load_model(tmp_path / "m.safetensors")


def test_other_files_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    save_model(WEIGHTS, tmp_path / "strange", about={"classes": ["a"]})
    for name in ("text", "strange", "absent"):
        with pytest.raises(RunError, match="is not a model of mmaudit finetune"):
            read_model_config(tmp_path / name)
    with pytest.raises(RunError, match="cannot be read as weights"):
        load_model(tmp_path / "text")
