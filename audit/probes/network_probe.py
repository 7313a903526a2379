"""Cross-fitted networks that are trained from scratch as probes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.labels import Target
from ..errors import ConfigError, DatasetError, ScoreError
from ..features.matrix import Inputs, Rows
from ..hashing import digest, hash_rank
from ..storage import atomic_write
from ..threads import NETWORK_THREADS, fixed_threads
from ..workers import Progress, prefetch_map
from .config import NetworkConfig
from .cross_fit import CrossFit
from .network import (
    READERS,
    InputStatistics,
    Network,
    NetworkTarget,
    augment_pictures,
    batch_slices,
    build_network,
    check_shape,
    input_statistics,
    to_pictures,
)

if TYPE_CHECKING:
    from .probe_set import Probe

VERSION = 1  # goes up when the same inputs and settings would give other logits
MOMENTUM = 0.9  # of SGD, and 0.1 the fall of its rate: the papers'
LR_FALL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkProbe:
    """What the networks said out of fold of n rows: in each round (r, n, k), and in the first by epoch (e, n, k)."""

    by_round: NDArray[np.float32]
    by_epoch: NDArray[np.float32]

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Give what was said of these rows in each round: (r, b, k). The networks are gone: no `inputs`."""
        if inputs is not None:
            raise ConfigError("a probe that is a network cannot be asked about masked inputs: set probe.joint = false")
        return self.by_round[:, rows]

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Give what was said of these rows on the way, after the epochs kept: (e, b, k)."""
        return self.by_epoch[:, rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One network to be: of round and fold, by number; the rows it scores, learns from, and chooses its epoch by."""

    round: int
    fold: int
    held: Rows
    train_mask: Rows
    holdout_mask: Rows
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFit:
    """What the training of all folds has in common."""

    inputs: Inputs
    shape: tuple[int, ...]
    target: Target
    config: NetworkConfig
    seed: int
    device: str
    survey: InputStatistics

    @property
    def device_type(self) -> str:
        """Say "cuda" or "cpu"."""
        return torch.device(self.device).type

    def chance(self, purpose: str, fold: Fold, epoch: int = 0) -> int:
        """Give a seed that depends on nothing but the course's, the purpose, round, fold and epoch."""
        where = f"{fold.round} {fold.fold} {epoch}"
        return int(hash_rank([where], seed=self.seed, purpose=f"network {purpose}")[0])

    def batches(self, rows: Sequence[Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give rows and their pictures on the device, batch by batch, while threads read what follows."""

        def read(batch: Rows) -> tuple[Tensor, Tensor]:
            found = torch.from_numpy(np.require(self.inputs.read(batch), requirements=("C", "W")))
            both = torch.from_numpy(batch), found
            return (both[0].pin_memory(), both[1].pin_memory()) if self.device_type == "cuda" else both

        for batch, found in prefetch_map(read, rows, num_threads=READERS):
            here = found.to(self.device, non_blocking=True)
            yield batch.to(self.device, non_blocking=True), to_pictures(here, self.shape)

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 where the configuration wants it."""
        wanted = "bfloat16" if self.device_type == "cuda" else "float32"
        precision = wanted if self.config.precision == "auto" else self.config.precision
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@fixed_threads(NETWORK_THREADS)
def fit_network(
    inputs: Inputs,
    shape: tuple[int, ...],
    target: Target,
    cross_fits: Sequence[CrossFit],
    *,
    config: NetworkConfig,
    seed: int,
    device: str,
    progress: Progress,
    folder: Path | None = None,
) -> Probe:
    """Train a network for each fold of each round, from scratch, and let it score that fold, in eval mode.

    `shape` is that of a row's input: (mel, t), (h, w, c) or (f, h, w, c). A fold's network learns from the rows of
    other folds that fit and are there, and standardises by them. Logits do not depend on the order of the rows; a
    number is in the units of the target. Each fold leaves its logits in `folder`, if one is given; what is there from
    the same inputs and settings is not trained again. Raises ConfigError without transformers or for rows of another
    shape, ScoreError where training diverges or a fold leaves fewer than two rows to learn from, DatasetError for a
    damaged file. On a CPU a step takes about 0.1 s a clip of three frames of 112 pixels, one core: days for thousands.
    """
    check_shape(shape, inputs.num_features)
    survey = input_statistics(inputs, shape, batch_size=config.batch_size)
    network_fit = NetworkFit(
        inputs=inputs, shape=shape, target=target, config=config, seed=seed, device=device, survey=survey
    )
    folds = [fold for number, cross_fit in enumerate(cross_fits) for fold in plan_folds(network_fit, cross_fit, number)]
    by_round = np.zeros((len(cross_fits), inputs.num_rows, target.num_outputs), np.float32)
    by_epoch = np.zeros((len(config.recorded_epochs), *by_round.shape[1:]), np.float32)
    for place, fold in enumerate(folds):

        def tick(epoch: int, before: int = place * config.epochs) -> None:
            progress("probe", before + epoch, config.epochs * len(folds))

        found = _train_once(network_fit, fold, folder, tick)
        by_round[fold.round, fold.held] = found[0]
        if fold.round == 0:
            by_epoch[:, fold.held] = found[1:]
    return NetworkProbe(by_round=by_round, by_epoch=by_epoch)


def plan_folds(network_fit: NetworkFit, cross_fit: CrossFit, number: int) -> Iterator[Fold]:
    """Say for each fold of a round who learns and who is scored, in the order of the ids' hash, not of the dataset."""
    order = np.argsort(cross_fit.key, kind="stable")
    fold, inner = cross_fit.fold[order], cross_fit.inner[order]
    usable = (cross_fit.fits & network_fit.survey.there)[order]
    identity = _identity(network_fit, cross_fit)
    for each in range(cross_fit.num_folds):
        train_mask = usable & (fold != each)
        if train_mask.sum() < 2:
            raise ScoreError(
                f"fold {each} leaves a network {train_mask.sum()} rows to learn from, where two are the least: ask for "
                "fewer folds (probe.folds), or train from more samples"
            )
        holdout_mask = train_mask & (inner == 0) & network_fit.config.choose_epoch
        if (train_mask & ~holdout_mask).sum() < 2:
            holdout_mask[:] = False
        yield Fold(
            round=number,
            fold=each,
            held=order[fold == each],
            train_mask=order[train_mask & ~holdout_mask],
            holdout_mask=order[holdout_mask],
            identity=identity,
        )


def _identity(network_fit: NetworkFit, cross_fit: CrossFit) -> str:
    """Fingerprint all that decides about a round's logits."""
    about = (
        VERSION,
        torch.__version__,
        network_fit.shape,
        sorted(asdict(network_fit.config).items()),
        network_fit.seed,
    )
    target = network_fit.target
    told = (network_fit.device_type, target.task, target.num_outputs, network_fit.survey.content)
    arrays = (target.label, target.values, cross_fit.fold, cross_fit.inner, cross_fit.fits, cross_fit.key)
    return digest(repr((about, told)).encode(), *(b"" if each is None else each.tobytes() for each in arrays))


def _train_once(
    network_fit: NetworkFit, fold: Fold, folder: Path | None, tick: Callable[[int], None]
) -> NDArray[np.float32]:
    """Read the logits of a fold from its file, or train and leave them there: see `_train`."""
    if folder is None:
        return _train(network_fit, fold, tick)
    path = folder / f"{fold.identity}-{fold.round}-{fold.fold}.npy"
    if not path.exists():
        found = _train(network_fit, fold, tick)
        content = io.BytesIO()  # to a file, numpy would hide why a write failed
        np.save(content, found, allow_pickle=False)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getvalue())
        return found
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and its network is trained anew") from error
    tick(network_fit.config.epochs)
    return np.asarray(found, dtype=np.float32)


def _train(network_fit: NetworkFit, fold: Fold, tick: Callable[[int], None]) -> NDArray[np.float32]:
    """Train one network, and give what it says of its fold (1 + e, b, k): at the end, and in round 0 by epoch."""
    config, kept = network_fit.config, []
    network = _new_network(network_fit, fold)
    network_target = NetworkTarget.of(network_fit.target, fold.train_mask, network_fit.device)
    optimiser = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, config.lr_step, LR_FALL)
    least, best = math.inf, None
    for epoch in range(1, config.epochs + 1):
        _train_epoch(network_fit, network, network_target, optimiser, fold, epoch)
        schedule.step()
        if len(fold.holdout_mask) and (loss := _holdout_loss(network_fit, network, network_target, fold)) < least:
            least, best = loss, {name: value.clone() for name, value in network.state_dict().items()}
        if fold.round == 0 and epoch in config.recorded_epochs:
            kept.append(network_target.in_units(_predict(network_fit, network, fold.held)))
        tick(epoch)
    if best is not None:
        network.load_state_dict(best)
    last = kept[-1] if kept and best is None else network_target.in_units(_predict(network_fit, network, fold.held))
    return np.stack([last, *kept])


def _new_network(network_fit: NetworkFit, fold: Fold) -> Network:
    network: Any = build_network(  # the types of torch know no memory_format of a module
        network_fit.shape,
        num_outputs=network_fit.target.num_outputs,
        width=network_fit.config.width,
        seed=network_fit.chance("weights", fold),
    )
    network.trunk.standardise_by(*network_fit.survey.levels(fold.train_mask))
    moved: Network = network.to(network_fit.device, memory_format=torch.channels_last)
    return moved


def _train_epoch(
    network_fit: NetworkFit,
    network: Network,
    network_target: NetworkTarget,
    optimiser: torch.optim.Optimizer,
    fold: Fold,
    epoch: int,
) -> None:
    """Train for an epoch: all rows once, in batches even in size, so that none is left with a single row."""
    rng = np.random.default_rng(network_fit.chance("batches", fold, epoch))
    order = rng.permutation(fold.train_mask)
    config, total = network_fit.config, torch.zeros((), device=network_fit.device)
    network.train()
    for rows, pictures in network_fit.batches(np.array_split(order, math.ceil(len(order) / config.batch_size))):
        if len(network_fit.shape) > 2:
            pictures = augment_pictures(pictures, rng, least_area=config.least_crop, flip=config.flip)
        with network_fit.autocast():
            outputs = network(pictures)
        loss = network_target.loss(outputs, rows)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        total += loss.detach()
    if not math.isfinite(float(total)):
        raise ScoreError(
            f"the network of round {fold.round}, fold {fold.fold} diverges in epoch {epoch}: its loss is "
            f"{float(total)}; lower network.lr, which is {config.lr}"
        )


@torch.no_grad()
def _predict(network_fit: NetworkFit, network: Network, rows: Rows) -> Tensor:
    """Give a network's outputs (b, k) for some rows, in eval mode."""
    network.eval()
    found = [torch.zeros(0, network_fit.target.num_outputs, device=network_fit.device)]
    for _, pictures in network_fit.batches(batch_slices(rows, network_fit.config.batch_size)):
        with network_fit.autocast():
            found.append(network(pictures))
    return torch.cat(found)


def _holdout_loss(network_fit: NetworkFit, network: Network, network_target: NetworkTarget, fold: Fold) -> float:
    return float(
        network_target.loss(
            _predict(network_fit, network, fold.holdout_mask),
            torch.from_numpy(fold.holdout_mask).to(network_fit.device),
        )
    )
