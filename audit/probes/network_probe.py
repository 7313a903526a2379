"""Cross-fitted networks, trained from scratch, as probes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.labels import Target
from ..errors import DatasetError, ScoreError
from ..features.matrix import Inputs, RowIndex
from ..hashing import digest, hash_rank
from ..storage import atomic_write
from ..workers import NETWORK_THREADS, Progress, fixed_threads
from .config import NetworkConfig
from .crops import PictureView, augment_pictures
from .cross_fit import CrossFit
from .network import InputStatistics, Network, NetworkTarget, check_view, input_statistics
from .network_weights import FINAL, NetworkInputs, NetworkProbe, WeightFiles, Weights, epoch_name, state_of

if TYPE_CHECKING:
    from .probe_set import Probe

VERSION = 1  # to be increased when the same inputs and settings would give other logits
MOMENTUM = 0.9  # of SGD, as in the papers
LR_FALL = 0.1  # factor of the learning rate after lr_step epochs, as in the papers


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One network to train: its repeat and fold, and the rows that it scores, trains on, and chooses its epoch on."""

    repeat: int
    fold: int
    scored_rows: RowIndex
    train_rows: RowIndex
    holdout_rows: RowIndex
    identity: str

    def path(self, folder: Path) -> Path:
        """Return the file of the fold's logits."""
        return folder / f"{self.identity}-{self.repeat}-{self.fold}.npy"

    def weights_path(self, folder: Path) -> Path:
        """Return the file of the weights of the fold's network."""
        return folder / f"{self.identity}-{self.repeat}-{self.fold}.safetensors"

    def is_stored(self, folder: Path | None) -> bool:
        """Return whether the network of the fold was trained before."""
        return folder is not None and self.path(folder).exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFit:
    """Inputs and settings that the training of all folds shares."""

    inputs: NetworkInputs
    target: Target
    seed: int
    statistics: InputStatistics
    key: NDArray[np.uint64]  # hash of each row's id (n,)

    @property
    def config(self) -> NetworkConfig:
        """Settings of the networks."""
        return self.inputs.config

    @property
    def view(self) -> PictureView:
        """How rows are viewed as pictures."""
        return self.inputs.view

    @property
    def device(self) -> str:
        """Device of the networks."""
        return self.inputs.device

    def derive_seed(self, purpose: str, fold: Fold, epoch: int = 0) -> int:
        """Derive a seed that depends only on the run's seed, the purpose, repeat, fold and epoch."""
        key = f"{fold.repeat} {fold.fold} {epoch}"
        return int(hash_rank([key], seed=self.seed, purpose=f"network {purpose}")[0])

    def draw_crops(self, values: Tensor, rows: RowIndex, *, seed: int) -> Tensor:
        """Draw frames and crops of stored pictures, by the seed and by the rows' ids."""
        min_area, flip = self.config.min_crop, self.config.flip
        return self.view.draw(values, self.key[rows], seed=seed, min_area=min_area, flip=flip)


@fixed_threads(NETWORK_THREADS)
def fit_network(
    inputs: Inputs,
    view: PictureView,
    target: Target,
    cross_fits: Sequence[CrossFit],
    *,
    config: NetworkConfig,
    seed: int,
    device: str,
    progress: Progress,
    folder: Path | None = None,
    keep_weights: bool = False,
) -> Probe:
    """Train a network from scratch for each fold of each repeat, and score that fold with it in eval mode.

    `view` holds the shape of a row's input, (bins, t), (h, w, c) or (f, h, w, c), and how it is stored. The network of
    a fold trains on the rows of other folds with `fits` that have the modality, and standardises by them, unless by
    fixed numbers. Logits do not depend on the order of the rows; those of a regression are in the units of the target.
    With `folder`, the logits of each fold are written to it, and read from it instead of training if inputs and
    settings are the same; with `keep_weights` also the weights of its network, see network_weights.

    Raises ConfigError without transformers or for rows of another shape, ScoreError if training diverges or a fold
    leaves fewer than two training rows, DatasetError for a damaged file. On one CPU core a step takes about 0.1 s per
    clip of three frames of 112 pixels, so that thousands of clips take days.
    """
    check_view(view, inputs.num_features)
    statistics = input_statistics(inputs, view, batch_size=config.batch_size)
    network_fit = NetworkFit(
        inputs=NetworkInputs(rows=inputs, view=view, config=config, device=device),
        target=target,
        seed=seed,
        statistics=statistics,
        key=cross_fits[0].key,
    )
    folds = [fold for number, cross_fit in enumerate(cross_fits) for fold in plan_folds(network_fit, cross_fit, number)]
    folds.sort(key=lambda fold: not fold.is_stored(folder))  # read first, so that their time spoils no estimate
    num_stored = sum(fold.is_stored(folder) for fold in folds)
    by_repeat = np.zeros((len(cross_fits), inputs.num_rows, target.num_outputs), np.float32)
    by_epoch = np.zeros((len(config.recorded_epochs), *by_repeat.shape[1:]), np.float32)
    total = config.epochs * len(folds)
    counts = (len(cross_fits), max(cross_fit.num_folds for cross_fit in cross_fits))
    for index, fold in enumerate(folds):
        tick = partial(_tick, progress, fold, counts, config.epochs, index * config.epochs, total)
        if index == num_stored:
            tick(0)
        outputs = _train_once(network_fit, fold, folder, tick, keep_weights=keep_weights)
        by_repeat[fold.repeat, fold.scored_rows] = outputs[0]
        if fold.repeat == 0:
            by_epoch[:, fold.scored_rows] = outputs[1:]
    weights = None if folder is None or not keep_weights else _weight_files(folds, folder, num_repeats=len(cross_fits))
    return NetworkProbe(by_repeat=by_repeat, by_epoch=by_epoch, weights=weights)


def _weight_files(folds: Sequence[Fold], folder: Path, *, num_repeats: int) -> WeightFiles | None:
    """Return the files of the weights; None if one is missing, as of outputs from before weights were kept."""
    ordered = sorted(folds, key=lambda fold: fold.fold)
    files = tuple(
        tuple(fold.weights_path(folder) for fold in ordered if fold.repeat == repeat) for repeat in range(num_repeats)
    )
    return files if all(file.exists() for of_folds in files for file in of_folds) else None


def _tick(
    progress: Progress, fold: Fold, counts: tuple[int, ...], epochs: int, epochs_before: int, total: int, epoch: int
) -> None:
    """Report the epoch that runs after `epoch` finished ones of a fold; `counts` are the repeats and folds."""
    repeats, folds = counts
    repeat = f"repeat {fold.repeat + 1} of {repeats}, " if repeats > 1 else ""
    detail = f"{repeat}fold {fold.fold + 1} of {folds}, epoch {min(epoch + 1, epochs)} of {epochs}"
    progress("probe", epochs_before + epoch, total, detail=detail)


def plan_folds(network_fit: NetworkFit, cross_fit: CrossFit, number: int) -> Iterator[Fold]:
    """Yield for each fold of a repeat its rows to train on, hold out and score, in the order of the ids' hashes."""
    order = np.argsort(cross_fit.key, kind="stable")
    fold_of_row, inner = cross_fit.fold[order], cross_fit.inner[order]
    usable = (cross_fit.fits & network_fit.statistics.present)[order]
    identity = _identity(network_fit, cross_fit)
    for fold_index in range(cross_fit.num_folds):
        train_mask = usable & (fold_of_row != fold_index)
        if train_mask.sum() < 2:
            raise ScoreError(
                f"the network of fold {fold_index} has {train_mask.sum()} rows to train on, 2 or more are needed: use "
                "fewer folds (probe.folds) or more samples"
            )
        holdout_mask = train_mask & (inner == 0) & network_fit.config.choose_epoch
        if (train_mask & ~holdout_mask).sum() < 2:
            holdout_mask[:] = False
        yield Fold(
            repeat=number,
            fold=fold_index,
            scored_rows=order[fold_of_row == fold_index],
            train_rows=order[train_mask & ~holdout_mask],
            holdout_rows=order[holdout_mask],
            identity=identity,
        )


def _identity(network_fit: NetworkFit, cross_fit: CrossFit) -> str:
    """Compute a fingerprint of everything that determines the logits of a repeat."""
    config = network_fit.config.to_fingerprint()
    settings: tuple[Any, ...] = (VERSION, torch.__version__, network_fit.view.shape, config, network_fit.seed)
    if network_fit.view.stored is not None:
        settings += (network_fit.view.stored,)
    target = network_fit.target
    task_settings = (network_fit.inputs.device_type, target.task, target.num_outputs, network_fit.statistics.content)
    folds = (values.astype(np.int16, copy=False) for values in (cross_fit.fold, cross_fit.inner))
    arrays = (target.label, target.values, *folds, cross_fit.fits, cross_fit.key)
    data = (b"" if array is None else np.asarray(array).tobytes() for array in arrays)
    return digest(repr((settings, task_settings)).encode(), *data)


def _train_once(
    network_fit: NetworkFit, fold: Fold, folder: Path | None, tick: Callable[[int], None], *, keep_weights: bool
) -> NDArray[np.float32]:
    """Read the logits of a fold from its file, or train the network and write them, its weights first: see `_train`."""
    if folder is None:
        return _train(network_fit, fold, tick)[0]
    path = fold.path(folder)
    if not path.exists():
        outputs, weights = _train(network_fit, fold, tick, keep_weights=keep_weights)
        if weights is not None:
            weights.write(fold.weights_path(folder))
        content = io.BytesIO()  # when writing to a file, numpy hides why a write failed
        np.save(content, outputs, allow_pickle=False)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getvalue())
        return outputs
    try:
        outputs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it to train its network again") from error
    return np.asarray(outputs, dtype=np.float32)


def _train(
    network_fit: NetworkFit, fold: Fold, tick: Callable[[int], None], *, keep_weights: bool = False
) -> tuple[NDArray[np.float32], Weights | None]:
    """Train one network and return the outputs of its fold (1 + e, b, k): final ones, and by epoch in repeat 0."""
    config, inputs = network_fit.config, network_fit.inputs
    by_epoch: list[NDArray[np.float32]] = []
    states: dict[str, dict[str, Tensor]] = {}
    network = _new_network(network_fit, fold)
    network_target = NetworkTarget.of(network_fit.target, fold.train_rows, network_fit.device)
    optimiser = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, config.lr_step, LR_FALL)
    min_loss, best_state = math.inf, None
    for epoch in range(1, config.epochs + 1):
        _train_epoch(network_fit, network, network_target, optimiser, fold, epoch)
        schedule.step()
        if len(fold.holdout_rows) and (loss := _holdout_loss(network_fit, network, network_target, fold)) < min_loss:
            min_loss, best_state = loss, {name: value.clone() for name, value in network.state_dict().items()}
        if fold.repeat == 0 and epoch in config.recorded_epochs:
            if keep_weights:
                states[epoch_name(len(by_epoch))] = state_of(network)
            by_epoch.append(network_target.in_units(inputs.predict(network, fold.scored_rows)))
        tick(epoch)
    if best_state is not None:
        network.load_state_dict(best_state)
    is_last = bool(by_epoch) and best_state is None  # the final network is that of the last recorded epoch
    if keep_weights and not is_last:
        states[FINAL] = state_of(network)
    final = by_epoch[-1] if is_last else network_target.in_units(inputs.predict(network, fold.scored_rows))
    weights = Weights(states=states, centre=network_target.centre, scale=network_target.scale)
    return np.stack([final, *by_epoch]), weights if keep_weights else None


def _new_network(network_fit: NetworkFit, fold: Fold) -> Network:
    inputs = network_fit.inputs
    network = inputs.build(num_outputs=network_fit.target.num_outputs, seed=network_fit.derive_seed("weights", fold))
    moments = network_fit.config.fixed_moments(network_fit.view.shape)
    network.trunk.standardise_by(*(moments or network_fit.statistics.channel_moments(fold.train_rows)))
    return inputs.to_device(network)


def _train_epoch(
    network_fit: NetworkFit,
    network: Network,
    network_target: NetworkTarget,
    optimiser: torch.optim.Optimizer,
    fold: Fold,
    epoch: int,
) -> None:
    """Train for one epoch on all rows, in batches of even size, so that no batch has a single row."""
    rng = np.random.default_rng(network_fit.derive_seed("batches", fold, epoch))
    order = rng.permutation(fold.train_rows)
    config, total = network_fit.config, torch.zeros((), device=network_fit.device)
    batches = np.array_split(order, math.ceil(len(order) / config.batch_size))
    network.train()
    draw = partial(network_fit.draw_crops, seed=network_fit.derive_seed("crops", fold, epoch))
    for rows, pictures in network_fit.inputs.batches(batches, draw=draw):
        if len(network_fit.view.shape) > 2 and not network_fit.view.is_sized:
            pictures = augment_pictures(pictures, rng, min_area=config.min_crop, flip=config.flip)
        with network_fit.inputs.autocast():
            outputs = network(pictures)
        loss = network_target.loss(outputs, rows)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        total += loss.detach()
    if not math.isfinite(float(total)):
        raise ScoreError(
            f"the network of repeat {fold.repeat}, fold {fold.fold} diverged in epoch {epoch}: its loss is "
            f"{float(total)}; lower network.lr, which is {config.lr}"
        )


@torch.no_grad()
def _holdout_loss(network_fit: NetworkFit, network: Network, network_target: NetworkTarget, fold: Fold) -> float:
    outputs = network_fit.inputs.predict(network, fold.holdout_rows)
    return float(network_target.loss(outputs, torch.from_numpy(fold.holdout_rows).to(network_fit.device)))
