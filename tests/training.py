"""Small trainings for tests: four classes, of which each modality determines one bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.workers import Progress, no_progress
from mmaudit.rebalance.curriculum import OrderConfig, id_keys
from mmaudit.train.balancing.balancer import Balancer
from mmaudit.train.batches import Batch, Step, to_batch
from mmaudit.train.config import FinetuneConfig, OptimConfig, TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.finetune import Finetuned, finetune_on
from mmaudit.train.methods import resolve
from mmaudit.train.network import FusionNet
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext
from mmaudit.train.sampling.sampler import Pool
from mmaudit.train.training_data import TrainingData, build_network, set_up

QUICK = TrainConfig(
    finetune=FinetuneConfig(epochs=5, batch_size=16, hidden=6),
    optim=OptimConfig(lr=1e-2),
    order=OrderConfig(grow_epochs=4),
)


@dataclass(frozen=True, kw_only=True)
class TwoEqualProcesses(DistributedContext):
    """Two processes with the same rows: sums are twice those of one."""

    world_size: int = 2

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


def make_examples(n: int = 120, *, noise: float = 0.3, seed: int = 0, num_modalities: int = 2) -> Examples:
    """Build four classes of which audio determines one bit and visual the other: neither alone knows the class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n)
    bits = 2.0 * np.stack([label // 2, label % 2], axis=1) - 1
    split = np.array([("train", "train", "validation", "test")[number % 4] for number in range(n)], dtype=object)
    inputs = tuple(
        MatrixInputs(matrix=(bits[:, [side % 2]] * np.ones(3) + noise * rng.standard_normal((n, 3))).astype(np.float32))
        for side in range(num_modalities)
    )
    return Examples(
        sample_id=pa.array([f"s{number}" for number in range(n)], pa.large_string()),
        inputs=inputs,
        present=np.ones((n, num_modalities), dtype=bool),
        shapes=((3,),) * num_modalities,
        content=np.array([f"c{number}" for number in range(n)], dtype="S32"),
        modalities=("audio", "visual", "text", "touch")[:num_modalities],
        label=label,
        class_names=("a", "b", "c", "d"),
        split=split,
        rank=rng.permutation(n),
        weight=np.ones(n, np.float32),
        discrepancy=rng.uniform(-1, 1, n),
        balance=rng.uniform(-1, 1, n),
        p_balanced=rng.random(n),
        in_manifest=np.arange(n) % 8 != 3,
    )


def make_label_sets(n: int = 120, *, noise: float = 0.3, seed: int = 0, num_modalities: int = 2) -> Examples:
    """Build label sets of the same samples: label "low" is in audio, "high" in visual, "both" in neither alone."""
    examples = make_examples(n, noise=noise, seed=seed, num_modalities=num_modalities)
    first, second = examples.label // 2, examples.label % 2
    values = np.stack([first, second, first & second], axis=1).astype(np.float32)
    return replace(examples, task="multilabel", values=values, class_names=("low", "high", "both"))


def make_numbers(
    n: int = 120, *, noise: float = 0.3, seed: int = 0, num_modalities: int = 2, offset: float = 0.0, unit: float = 1.0
) -> Examples:
    """Build numbers of the same samples: offset + unit (2 a + b), a = -1 or 1 by audio, b by visual."""
    examples = make_examples(n, noise=noise, seed=seed, num_modalities=num_modalities)
    number = 2 * (2 * (examples.label // 2) - 1) + 2 * (examples.label % 2) - 1
    values = (offset + unit * number[:, None]).astype(np.float32)
    return replace(examples, task="regression", values=values, class_names=("number",))


def build_training_data(examples: Examples, config: TrainConfig = QUICK) -> tuple[TrainingData, FusionNet]:
    """Build the data of a training, and its network with the means and scales of the inputs."""
    training_data = set_up(examples, resolve(config), seed=0, device="cpu", distributed=SINGLE_PROCESS)
    torch.manual_seed(0)
    net = build_network(examples, resolve(config))
    training_data.standardise(net)
    return training_data, net


def with_options(config: TrainConfig = QUICK, **options: Any) -> TrainConfig:
    """Change settings by name, in the section finetune or optim that has them."""
    of_finetune = {name: value for name, value in options.items() if name in FinetuneConfig.__dataclass_fields__}
    of_optim = {name: value for name, value in options.items() if name not in of_finetune}
    return replace(config, finetune=replace(config.finetune, **of_finetune), optim=replace(config.optim, **of_optim))


def fine_tune(examples: Examples, folder: Path, config: TrainConfig = QUICK, **options: Any) -> Finetuned:
    """Train on the CPU without progress output."""
    settings: dict[str, Any] = {"between": "audio:visual", "seed": 0, "device": "cpu", "progress": no_progress}
    return finetune_on(examples, folder, config=config, **{**settings, **options})


def stop_after(epochs: int) -> Progress:
    """Return a progress callback that raises KeyboardInterrupt after `epochs` epochs."""

    def progress(stage: str, done: int, total: int, *, detail: str = "") -> None:
        if done == epochs:
            raise KeyboardInterrupt

    return progress


def model_bytes(folder: Path) -> bytes:
    """Return the bytes of the model file."""
    return (folder / "model.safetensors").read_bytes()


def metrics_without_seconds(result: Finetuned) -> dict[str, Any]:
    """Return the metrics without the duration."""
    return {name: value for name, value in result.metrics.items() if name != "seconds"}


def select_rows(present: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the used rows (b, m) of m inputs (b, ...), or all rows where the mask is None."""
    if present is None:
        return tuple(inputs)
    modality_mask = torch.as_tensor(np.asarray(present))
    return tuple(x[modality_mask[:, j]] for j, x in enumerate(inputs))


def weight_changes(balancer: Balancer, batch: Batch) -> dict[str, Tensor]:
    """Take a step; return by how much it lowered each weight."""
    before = {name: weight.detach().clone() for name, weight in balancer.net.named_parameters()}
    balancer.step(batch)
    return {name: before[name] - weight.detach() for name, weight in balancer.net.named_parameters()}


def make_pool(n: int, *, num_modalities: int = 2, num_classes: int = 2, **columns: Any) -> Pool:
    """Build a pool of samples s0, s1, ... of one class, without scores unless they are passed."""
    filled: dict[str, Any] = {"rank": np.arange(n), "label": np.zeros(n, np.int64)}
    filled |= dict.fromkeys(("discrepancy", "balance", "p_balanced"), np.full(n, np.nan)) | columns
    key = id_keys(f"s{row}" for row in range(n))
    return Pool(key=key, num_classes=num_classes, num_modalities=num_modalities, **filled)


def draw_batch(
    label: Sequence[int],
    *,
    sizes: Sequence[int] = (5, 4),
    weight: Sequence[float] | None = None,
    present: list[list[bool]] | None = None,
    seed: int = 1,
) -> Batch:
    """Build a batch of normal vectors with labels (b,), weights (b,), by default 1, and used modalities (b, m)."""
    torch.manual_seed(seed)
    b, modality_mask = len(label), None if present is None else np.array(present)
    return to_batch(
        Step(rows=np.arange(b), present=modality_mask),
        select_rows(modality_mask, [torch.randn(b, size) for size in sizes]),
        label=torch.tensor(label),
        weight=np.ones(b, np.float32) if weight is None else np.array(weight, dtype=np.float32),
        distributed=SINGLE_PROCESS,
    )
