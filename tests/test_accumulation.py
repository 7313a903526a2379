"""Accumulated gradients: parts of a step train as the whole step does, under every method that does not refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_in_processes
from safetensors.torch import load_file
from test_methods import ACTIVE
from torch import Tensor
from training import QUICK, draw_batch, fine_tune, make_examples, make_label_sets, model_bytes, stop_after, with_options

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.registry import Registry
from mmaudit.train.balancing import BALANCERS
from mmaudit.train.balancing.balancer import Joint
from mmaudit.train.config import TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.methods import resolve

torch.set_num_threads(1)

REFUSING = {"agm", "mla", "gmm", "lfm", "pmr", "greedy"}  # with accumulated gradients
QUICK_ONES = ("joint", "ogm-ge", "mmpareto", "dgl")  # a loss, modulated gradients, two backward passes, own forward
ACCUMULATING = [
    name if name in QUICK_ONES else pytest.param(name, marks=pytest.mark.slow)
    for name in BALANCERS
    if name not in REFUSING
]

SCRIPT = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_accumulation import config_of, lacking_some
from training import fine_tune
from mmaudit.train.optimizer import open_distributed

with open_distributed("cpu") as context, tempfile.TemporaryDirectory() as folder:
    config = config_of("ogm-ge", batch_size=10, accumulate=2)
    result = fine_tune(lacking_some(), Path(folder), config, distributed=context)
print(json.dumps([record["train_loss"] for record in result.history]))
"""


def lacking_some(n: int = 120) -> Examples:
    """Build examples with weights, of which a third lacks the first modality."""
    examples = make_examples(n)
    present = examples.present.copy()
    present[::3, 0] = False
    return replace(examples, present=present, weight=np.linspace(0.5, 1.5, n).astype(np.float32))


def config_of(balancing: str, *, batch_size: int, accumulate: int = 1) -> TrainConfig:
    """Build a config without dropout, by SGD: Adam enlarges the rounding errors of gradients near 0."""
    options = {"optimizer": "sgd", "lr": 0.05, "dropout": 0.0, "epochs": 3, "keep": "last"}
    rates = ("audio=0.5",) if balancing == "mslr" else ()
    return with_options(
        ACTIVE, balancing=balancing, batch_size=batch_size, accumulate=accumulate, modality_lr=rates, **options
    )


def weights_after(examples: Examples, folder: Path, config: TrainConfig) -> dict[str, Tensor]:
    fine_tune(examples, folder, config)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("balancing", ACCUMULATING)
def test_two_batches_of_16_train_as_one_of_32(balancing: str, tmp_path: Path) -> None:
    """Also with missing modalities and weights, where a part has another share of each than the whole step."""
    whole = weights_after(lacking_some(), tmp_path / "whole", config_of(balancing, batch_size=32))
    parts = weights_after(lacking_some(), tmp_path / "parts", config_of(balancing, batch_size=16, accumulate=2))
    half = weights_after(lacking_some(), tmp_path / "half", config_of(balancing, batch_size=16))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=1e-5)
    assert max((half[name] - weight).abs().max().item() for name, weight in whole.items()) > 1e-3


@pytest.mark.parametrize("balancing", sorted(REFUSING))
def test_methods_that_need_the_whole_step_refuse(balancing: str) -> None:
    config = with_options(balancing=balancing, accumulate=2)
    with pytest.raises(
        ConfigError, match=f"--balancing {balancing} does not train with finetune.accumulate = 2: [a-z]+ "
    ):
        resolve(config)
    resolve(with_options(balancing=balancing))


def test_refusing_methods_would_differ() -> None:
    """What is refused is what has a statistic of the whole step; others have no reason."""
    assert {name for name in BALANCERS if BALANCERS.load(name).accumulation_reason} == REFUSING


def test_balancers_of_packages_must_state_that_they_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed(Joint):
        pass

    load = Registry.load

    def load_any(registry: Registry, name: str) -> Any:
        return Installed if name == "installed" else load(registry, name)

    monkeypatch.setattr(Registry, "load", load_any)
    with pytest.raises(ConfigError, match=r"installed does not train with finetune.accumulate = 2: it does not state"):
        resolve(with_options(balancing="installed", accumulate=2))
    Installed.accumulation_reason = ""
    resolve(with_options(balancing="installed", accumulate=2))


@pytest.mark.parametrize(("size", "num_parts"), [(None, 1), (7, 1), (4, 2), (3, 3), (1, 7)])
def test_parts_are_the_batch_in_order(size: int | None, num_parts: int) -> None:
    present = [[True, False], [True, True], [False, True], [True, True], [False, True], [True, True], [True, False]]
    batch = draw_batch([0, 1, 2, 0, 1, 2, 1], weight=[1, 2, 3, 4, 5, 6, 7], present=present)
    parts = batch.parts(size, world_size=1)
    assert len(parts) == num_parts
    for name in ("rows", "label", "present"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.loss_weight for part in parts], dim=1), batch.loss_weight)
    for j, rows in enumerate(batch.inputs):
        assert torch.equal(torch.cat([part.inputs[j] for part in parts]), rows)
        assert [len(part.inputs[j]) for part in parts] == [int(part.present[:, j].sum()) for part in parts]  # type: ignore[index]


def test_processes_have_equally_many_parts() -> None:
    """One of 7 rows of a step is in one process more than in the other; 3 processes of 2 rows have one part."""
    batch = draw_batch([0, 1, 2, 0, 1, 2, 1])
    for world_size, num_rows in ((2, (3, 4)), (7, (1, 1))):
        counts = {len(replace(batch, rows=batch.rows[:n]).parts(2, world_size=world_size)) for n in num_rows}
        assert len(counts) == 1
        assert counts.pop() <= min(num_rows)


def test_resumed_training_has_the_same_bytes(tmp_path: Path) -> None:
    config = with_options(batch_size=8, accumulate=3, save_steps=1, balancing="ogm-ge")
    fine_tune(make_examples(), tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(make_examples(), tmp_path / "resumed", config, progress=stop_after(2))
    fine_tune(make_examples(), tmp_path / "resumed", config)
    assert model_bytes(tmp_path / "resumed") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision_accumulates(precision: str, tmp_path: Path) -> None:
    """The scale of float16 is the same in all parts of a step, and undone once."""
    losses = [
        [r["train_loss"] for r in fine_tune(make_examples(), tmp_path / str(accumulate), config).history]
        for accumulate in (1, 2)
        for config in [
            with_options(config_of("sum", batch_size=32 // accumulate, accumulate=accumulate), precision=precision)
        ]
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)


def test_label_sets_and_steps_that_samplers_choose(tmp_path: Path) -> None:
    for sampling in ("uniform", "dus-h"):
        config = with_options(QUICK, sampling=sampling, balancing="sum", dropout=0.0, optimizer="sgd", epochs=2)
        whole = weights_after(make_label_sets(), tmp_path / f"{sampling}-1", with_options(config, batch_size=32))
        parts = weights_after(
            make_label_sets(), tmp_path / f"{sampling}-2", with_options(config, batch_size=16, accumulate=2)
        )
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    config = config_of("ogm-ge", batch_size=10, accumulate=2)
    expected = [record["train_loss"] for record in fine_tune(lacking_some(), tmp_path, config).history]
    for losses in run_in_processes(SCRIPT.format(tests=str(Path(__file__).parent)), size=2):
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
