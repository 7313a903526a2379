"""Cross-fitted probes with one hidden layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..dataset.labels import Target
from ..features.matrix import Inputs, RowIndex
from ..workers import NETWORK_THREADS, fixed_threads
from .cross_fit import CrossFit, FitRows
from .design import Design, TorchTarget, Units, read_design
from .glm import loss_and_residual
from .linear import product_dtype
from .prediction import predict_out_of_fold

if TYPE_CHECKING:
    from .config import ProbeConfig

_MAX_DISTANCE = 10.0  # units from the centre at which values are clipped; a linear model bears 100, two layers do not
_MAX_SNAPSHOTS = 8
_CHUNK_ROWS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Nets:
    """q networks of one hidden layer: first (q, d + 1, h), second (q, h + 1, k), the bias last in each."""

    first: Tensor
    second: Tensor

    def take(self, index: Tensor) -> Nets:
        """Return a subset of the networks."""
        return Nets(first=self.first[index], second=self.second[index])

    def copy(self) -> Nets:
        """Return a detached copy of the current weights."""
        return Nets(first=self.first.detach().clone(), second=self.second.detach().clone())

    def logits(self, z: Tensor, hidden_scale: Tensor | float = 1.0) -> Tensor:
        """Compute the logits (b, q, k) of rows z (b, d): the first layer of all networks is one matrix product.

        `hidden_scale` (b, 1, h) multiplies the hidden units, by 0 where dropped out, the same in all networks.
        """
        q, d, h = len(self.first), z.shape[1], self.first.shape[2]
        weight = self.first[:, :-1].transpose(0, 1).reshape(d, q * h).to(z.dtype)
        hidden = (z @ weight).to(self.first.dtype).view(len(z), q, h) + self.first[:, -1]
        hidden = functional.relu(hidden) * hidden_scale
        return (hidden.transpose(0, 1) @ self.second[:, :-1] + self.second[:, -1:]).transpose(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpProbe:
    """p networks, r repeats of f folds. snapshots: those of the first repeat after 1, 2, 4, ... epochs and the last."""

    inputs: Inputs
    cross_fits: tuple[CrossFit, ...]
    units: Units
    torch_target: TorchTarget
    nets: Nets

    snapshots: tuple[Nets, ...]

    def logits(self, rows: RowIndex, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Compute out-of-fold logits in each repeat: (r, b, k)."""
        states = self._predict(self.cross_fits, (self.nets,), rows, self.inputs if inputs is None else inputs)
        return np.asarray(states[0])

    def logits_by_epoch(self, rows: RowIndex) -> NDArray[np.float32]:
        """Compute logits of the first repeat at its snapshots: (e, b, k)."""
        return np.asarray(self._predict(self.cross_fits[:1], self.snapshots, rows, self.inputs)[:, 0])

    def take(self, samples: RowIndex, inputs: Inputs) -> MlpProbe:
        """Return the probe for a part of the samples (b,), whose features are `inputs`."""
        return replace(self, inputs=inputs, cross_fits=tuple(item.take(samples) for item in self.cross_fits))

    def _predict(
        self, cross_fits: Sequence[CrossFit], states: Sequence[Nets], rows: RowIndex, inputs: Inputs
    ) -> NDArray[np.float32]:
        """Compute logits of several states of the networks: (e, r, b, k)."""
        logits = np.empty((len(states), len(cross_fits), len(rows), self.torch_target.num_outputs), dtype=np.float32)
        for positions, z in self.units.read(inputs, rows):
            clipped = z.clamp_(-_MAX_DISTANCE, _MAX_DISTANCE)
            for state, nets in enumerate(states):
                predicted = predict_out_of_fold(cross_fits, rows[positions], _predictor(nets, clipped))
                in_units = predicted * self.torch_target.scale + self.torch_target.centre
                logits[state, :, positions] = in_units.cpu().numpy()
        return logits


@fixed_threads(NETWORK_THREADS)
def fit_mlp(
    inputs: Inputs,
    target: Target,
    cross_fits: Sequence[CrossFit],
    fit_rows: FitRows,
    *,
    config: ProbeConfig,
    device: str,
) -> MlpProbe:
    """Fit all folds, repeats and weight decays as one stacked parameter, each on its rows that are not held out.

    Each probe is the network, of all epochs and decays, with the lowest loss on its held-out rows; without any, the
    last of the largest decay. All have the same initial weights and dropout masks, so that none depends on the others.
    """
    products = product_dtype(config.precision, device, size=len(fit_rows.rows) * inputs.num_features)
    design = read_design(inputs, fit_rows.rows, products=products, device=device, with_axes=False)
    design.rows.clamp_(-_MAX_DISTANCE, _MAX_DISTANCE)
    torch_target = TorchTarget.of(target, fit_rows.rows, design.curvature)
    trained = _train(design, torch_target, fit_rows, seed=_seed(cross_fits[0]), config=config)
    p, num_first = fit_rows.train_mask.shape[1], cross_fits[0].num_folds
    of_first = trained.decay[:num_first] * p + torch.arange(num_first, device=trained.decay.device)
    return MlpProbe(
        inputs=inputs,
        cross_fits=tuple(cross_fits),
        units=design.units,
        torch_target=torch_target,
        nets=trained.best,
        snapshots=tuple(nets.take(of_first) for nets in trained.snapshots),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """The best network of each probe, its decay index (p,), and snapshots of all networks (decay, probe)."""

    best: Nets
    decay: Tensor
    snapshots: tuple[Nets, ...]


def _train(design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, seed: int, config: ProbeConfig) -> _Trained:
    device, decays, p = design.rows.device, sorted(config.decays), fit_rows.train_mask.shape[1]
    chooses = fit_rows.can_choose
    masks = fit_rows.train_mask, fit_rows.train_mask
    if chooses:
        masks = fit_rows.train_mask & ~fit_rows.holdout_mask, fit_rows.holdout_mask
    train_mask, holdout_mask = (torch.from_numpy(mask).to(device) for mask in masks)
    generator = torch.Generator().manual_seed(seed)
    nets = _init_nets(design, torch_target, num=len(decays) * p, hidden=config.hidden, generator=generator)
    shrink = design.curvature.new_tensor(decays).repeat_interleave(p)[:, None, None]
    optimiser = torch.optim.Adam([nets.first, nets.second], lr=config.lr)
    best = nets.take(torch.arange(p, device=device) + (len(decays) - 1) * p).copy()
    min_loss = design.curvature.new_full((p,), torch.inf)
    decay = torch.full((p,), len(decays) - 1, device=device)

    snapshots: list[Nets] = []
    for epoch in range(1, config.epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
        _one_epoch(nets, optimiser, design, torch_target, train_mask, shrink=shrink, generator=generator, config=config)
        if epoch & (epoch - 1) == 0 or epoch == config.epochs:
            snapshots = [*snapshots[: _MAX_SNAPSHOTS - 1], nets.copy()]
        loss, best_decay = _mean_loss(nets, design, torch_target, holdout_mask).view(len(decays), p).min(dim=0)
        better = (loss < min_loss) if chooses else torch.full_like(loss, epoch == config.epochs, dtype=torch.bool)
        if not chooses:
            best_decay = decay
        min_loss, decay = torch.where(better, loss, min_loss), torch.where(better, best_decay, decay)

        new = nets.take(best_decay * p + torch.arange(p, device=device))
        first = torch.where(better[:, None, None], new.first, best.first)
        best = Nets(first=first, second=torch.where(better[:, None, None], new.second, best.second)).copy()
    return _Trained(best=best, decay=decay, snapshots=tuple(snapshots))


def _one_epoch(
    nets: Nets,
    optimiser: torch.optim.Optimizer,
    design: Design,
    torch_target: TorchTarget,
    train_mask: Tensor,
    *,
    shrink: Tensor,
    generator: torch.Generator,
    config: ProbeConfig,
) -> None:
    """Train on every row once, in random order; decay is decoupled from the gradient (AdamW, arXiv 1711.05101)."""
    device, copies = design.rows.device, len(nets.first) // train_mask.shape[1]
    for batch in torch.split(torch.randperm(len(design.rows), generator=generator), config.batch_size):
        is_kept = torch.rand(len(batch), 1, config.hidden, generator=generator) >= config.dropout
        batch = batch.to(device)
        mask = train_mask[batch].repeat(1, copies).to(nets.first.dtype)
        logits = nets.logits(design.rows[batch], is_kept.to(device) / (1 - config.dropout))
        _, residual = loss_and_residual(logits.detach().clone(), torch_target.values[batch], task=torch_target.task)
        residual *= (mask / mask.sum(dim=0).clamp_min(1))[:, :, None]
        optimiser.zero_grad()
        torch.autograd.backward(logits, residual)
        optimiser.step()
        with torch.no_grad():
            keep = 1 - optimiser.param_groups[0]["lr"] * shrink
            nets.first[:, :-1] *= keep
            nets.second[:, :-1] *= keep


@torch.no_grad()
def _mean_loss(nets: Nets, design: Design, torch_target: TorchTarget, mask: Tensor) -> Tensor:
    """Compute the mean loss (q,) of each network over its probe's rows in the mask (n, p)."""
    copies = len(nets.first) // mask.shape[1]
    total = nets.first.new_zeros(len(nets.first))
    for rows in mask.any(dim=1).nonzero().squeeze(1).chunk(max(1, len(mask) // _CHUNK_ROWS)):
        loss, _ = loss_and_residual(nets.logits(design.rows[rows]), torch_target.values[rows], task=torch_target.task)
        total += (loss * mask[rows].repeat(1, copies)).sum(dim=0)
    return total / mask.sum(dim=0).repeat(copies)


def _init_nets(design: Design, torch_target: TorchTarget, *, num: int, hidden: int, generator: torch.Generator) -> Nets:
    """Build `num` networks of equal weights: He's normal initialisation, and a second layer close to 0."""
    d, k = design.rows.shape[1], torch_target.num_outputs
    first, second = torch.zeros(d + 1, hidden), torch.zeros(hidden + 1, k)
    first[:-1] = torch.randn(d, hidden, generator=generator) * math.sqrt(2 / d)
    second[:-1] = torch.randn(hidden, k, generator=generator) * 0.1 / math.sqrt(hidden)
    layers = [layer.to(design.rows.device).repeat(num, 1, 1).requires_grad_() for layer in (first, second)]
    return Nets(first=layers[0], second=layers[1])


def _predictor(nets: Nets, z: Tensor) -> Callable[[int, Tensor], Tensor]:
    def predict(probe: int, positions: Tensor) -> Tensor:
        return nets.take(torch.tensor([probe], device=z.device)).logits(z[positions])[:, 0]

    return predict


def _seed(cross_fit: CrossFit) -> int:
    """Compute a seed from the hashes of the ids: it depends on neither row order, target nor config."""
    return int(np.bitwise_xor.reduce(cross_fit.key[cross_fit.fits])) & (2**63 - 1)
