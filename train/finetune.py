"""Fine-tuning: the loop, read top to bottom"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.errors import ManifestError
from ..audit.hashing import digest
from ..audit.workers import Progress
from ..rebalance.curriculum import id_key
from .batches import batches
from .checkpoint import load_state, save_model, save_state
from .config import FinetuneConfig
from .evaluate import evaluate, subsets
from .examples import Examples
from .fusion import FusionNet
from .sampling import SAMPLERS, SamplingConfig

log = logging.getLogger("mmaudit")

LEAST_VALIDATION = 20  # samples that may choose an epoch: two of them chose the first of 60, at chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What fine-tuning left: metrics as they stand in metrics.json, and one record an epoch."""

    metrics: dict[str, Any]
    history: list[dict[str, float]]


def finetune_on(
    examples: Examples,
    folder: Path,
    *,
    config: FinetuneConfig,
    sampling: SamplingConfig,
    between: str,
    seed: int,
    device: str,
    progress: Progress,
) -> Finetuned:
    """Train on the manifest's training rows, select on validation, test once; go on where `folder`/state stops.

    The epoch kept is the one with the highest fused validation accuracy, the least validation loss among equals; the
    last one where there are fewer than LEAST_VALIDATION samples to choose by.
    Raises ManifestError where a split is empty.
    """
    started = time.monotonic()
    train = _training_rows(examples, config)
    validation, test = examples.rows("validation"), examples.rows("test")
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if len(rows) == 0:
            raise ManifestError(f"the manifest leaves no {name} samples: loosen its rule, or --keep-posterior")
    torch.manual_seed(seed)
    inputs = [torch.from_numpy(np.array(matrix)).to(device) for matrix in examples.inputs]
    label = torch.from_numpy(examples.label).to(device)
    weight = torch.from_numpy(examples.weight).to(device)
    net = FusionNet(
        dims=[matrix.shape[1] for matrix in inputs],
        num_classes=len(examples.class_names),
        hidden=config.hidden,
        dropout=config.dropout,
        fusion=config.fusion,
    ).to(device)
    net.standardise_by([matrix[train] for matrix in inputs])
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    sampler = SAMPLERS[config.sampling](examples.rank[train], seed, sampling, key=id_key(examples.sample_id[train]))
    autocast = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()

    identity = _identity(examples, train, validation, config, sampling, seed=seed)
    state_file = folder / "state" / "last.pt"
    state = _resume(state_file, identity, device=device)
    history: list[dict[str, float]] = []
    chooses = len(validation) >= LEAST_VALIDATION
    if not chooses:
        log.info("%d validation samples are too few to choose an epoch by: the last one is taken", len(validation))
    best = (-1.0, 0.0, 0)  # validation accuracy, minus validation loss, epoch
    best_weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history, best, best_weights = state["history"], state["best"], state["best_weights"]
        log.info("resumed after epoch %d", len(history))

    for epoch in range(len(history) + 1, config.epochs + 1):
        torch.manual_seed(int(digest(f"{seed} {epoch}".encode())[:12], 16))  # dropout, the same after a resume
        net.train()
        total, seen = 0.0, 0
        for step in batches(train[sampler.rows(epoch)], batch_size=config.batch_size):
            picked = torch.from_numpy(step).to(device)
            with autocast:
                outputs = net([matrix[picked] for matrix in inputs])
                loss = net.loss(outputs, label[picked], weight[picked])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total, seen = total + loss.item() * len(step), seen + len(step)
        lr = float(schedule.get_last_lr()[0])
        schedule.step()
        accuracy, validation_loss = _validate(net, inputs, label, validation)
        history.append(
            {
                "epoch": epoch,
                "samples": seen,
                "lr": lr,
                "train_loss": total / seen,
                "validation_loss": validation_loss,
                "validation_accuracy": accuracy,
            }
        )
        if not chooses or (accuracy, -validation_loss) > best[:2]:
            best = (accuracy, -validation_loss, epoch)
            best_weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        save_state(
            {
                "identity": identity,
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "history": history,
                "best": best,
                "best_weights": best_weights,
            },
            state_file,
        )
        progress("finetune", epoch, config.epochs)

    net.load_state_dict(best_weights)
    about = {
        "modalities": list(examples.modalities),
        "dims": [matrix.shape[1] for matrix in inputs],
        "classes": list(examples.class_names),
        **asdict(config),
    }
    save_model(best_weights, folder / "model.safetensors", about=about)
    members = _members(examples, test, between)
    probabilities = _probabilities(net, [matrix[test] for matrix in inputs], examples.modalities)
    metrics = {
        "counts": {"train": len(train), "validation": len(validation), "test": len(test)},
        "chance": _chance(examples.label, train, test),
        "best_epoch": best[2],
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "samples_seen": int(sum(record["samples"] for record in history)),
        "seconds": time.monotonic() - started,
        "test": evaluate(probabilities, examples.label[test], members),
    }
    return Finetuned(metrics=metrics, history=history)


def _training_rows(examples: Examples, config: FinetuneConfig) -> NDArray[np.intp]:
    train = examples.rows("train")
    if config.keep_posterior is None:
        return train
    posterior = examples.p_balanced[train]
    if np.isnan(posterior).any():
        raise ManifestError("--keep-posterior: the manifest has no p_balanced; rescore with mmaudit score, split again")
    kept = train[posterior >= config.keep_posterior]
    log.info("P(balanced) >= %g keeps %d of %d training samples", config.keep_posterior, len(kept), len(train))
    return kept


def _identity(
    examples: Examples,
    train: NDArray[np.intp],
    validation: NDArray[np.intp],
    config: FinetuneConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
) -> str:
    """Fingerprint all that decides about the weights, so that a state of something else is never gone on from."""
    ids = ["\0".join(examples.sample_id[rows]) for rows in (train, validation)]
    both = np.r_[train, validation]
    arrays: list[NDArray[Any]] = [examples.rank[train], examples.weight[train], examples.label[both]]
    arrays += [matrix[both] for matrix in examples.inputs]
    settings = repr((asdict(config), asdict(sampling), examples.class_names, seed))
    return digest(settings.encode(), *(text.encode() for text in ids), *(array.tobytes() for array in arrays))


def _resume(path: Path, identity: str, *, device: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state = load_state(path, device=device)
    if state["identity"] == identity:
        return state
    log.info("the state in %s is of other data or settings: starting anew", path.parent)
    return None


@torch.no_grad()
def _validate(net: FusionNet, inputs: Sequence[Tensor], label: Tensor, rows: NDArray[np.intp]) -> tuple[float, float]:
    """Give fused accuracy and mean cross entropy."""
    net.eval()
    picked = torch.from_numpy(rows).to(label.device)
    fused = net([matrix[picked] for matrix in inputs]).fused
    loss = torch.nn.functional.cross_entropy(fused, label[picked])
    return float((fused.argmax(dim=1) == label[picked]).float().mean()), float(loss)


@torch.no_grad()
def _probabilities(net: FusionNet, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Give class probabilities (n, k) of the fused answer and of each branch alone."""
    net.eval()
    outputs = net(inputs)
    branches = {"fused": outputs.fused, **dict(zip(names, outputs.unimodal, strict=True))}
    return {name: logits.softmax(dim=1).cpu().numpy() for name, logits in branches.items()}


def _members(examples: Examples, test: NDArray[np.intp], between: str) -> dict[str, NDArray[np.bool_]]:
    first, _, second = between.partition(":")
    members = subsets(examples.discrepancy[test], first=first, second=second or "rest")
    return {**members, "in-manifest": examples.chosen[test]}


def _chance(label: NDArray[np.int64], train: NDArray[np.intp], test: NDArray[np.intp]) -> dict[str, float]:
    """Accuracy on test of guessing: each class alike, or always the most common class of train."""
    counts = np.bincount(label[train])
    return {"uniform": 1 / (int(label.max()) + 1), "majority": float((label[test] == counts.argmax()).mean())}
