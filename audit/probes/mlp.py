"""Cross-fitted probes with one hidden layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..dataset.labels import Target
from ..features.matrix import Inputs, Rows
from ..threads import NETWORK_THREADS, fixed_threads
from .cross_fit import CrossFit, FitRows, predict_out_of_fold
from .design import Design, Units, read_design
from .glm import loss_and_residual
from .linear import product_dtype
from .targets import TorchTarget

if TYPE_CHECKING:
    from .config import ProbeConfig

_FARTHEST = 10.0  # units from the centre; a straight line can bear 100, products of two layers cannot
_MOST_SNAPSHOTS = 8
_ROWS_AT_ONCE = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Nets:
    """q networks of one hidden layer: first (q, d + 1, h), second (q, h + 1, k), the bias last in each."""

    first: Tensor
    second: Tensor

    def take(self, which: Tensor) -> Nets:
        """Give some of the networks."""
        return Nets(first=self.first[which], second=self.second[which])

    def copy(self) -> Nets:
        """Give the networks as they are now."""
        return Nets(first=self.first.detach().clone(), second=self.second.detach().clone())

    def logits(self, z: Tensor, kept: Tensor | float = 1.0) -> Tensor:
        """Give the logits (b, q, k) of rows z (b, d): the first layer of all networks is one matrix product.

        `kept` (b, 1, h) tells what dropout leaves of the hidden units, the same in all networks.
        """
        q, d, h = len(self.first), z.shape[1], self.first.shape[2]
        weight = self.first[:, :-1].transpose(0, 1).reshape(d, q * h).to(z.dtype)
        hidden = (z @ weight).to(self.first.dtype).view(len(z), q, h) + self.first[:, -1]
        hidden = functional.relu(hidden) * kept
        return (hidden.transpose(0, 1) @ self.second[:, :-1] + self.second[:, -1:]).transpose(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpProbe:
    """p networks, r rounds of f folds. snapshots are the first round's after 1, 2, 4, ... epochs and the last."""

    inputs: Inputs
    cross_fits: tuple[CrossFit, ...]
    units: Units
    torch_target: TorchTarget
    nets: Nets
    num_epochs: Tensor  # (p,) epochs after which each stopped
    snapshots: tuple[Nets, ...]

    def logits(self, rows: Rows, *, inputs: Inputs | None = None) -> NDArray[np.float32]:
        """Ask in each round the probe that never saw the row: (r, b, k)."""
        found = self._predict(self.cross_fits, (self.nets,), rows, self.inputs if inputs is None else inputs)
        return np.asarray(found[0])

    def logits_by_epoch(self, rows: Rows) -> NDArray[np.float32]:
        """Ask the first round's probes as they were on the way: (e, b, k)."""
        return np.asarray(self._predict(self.cross_fits[:1], self.snapshots, rows, self.inputs)[:, 0])

    def _predict(
        self, cross_fits: Sequence[CrossFit], states: Sequence[Nets], rows: Rows, inputs: Inputs
    ) -> NDArray[np.float32]:
        """Ask several states of the networks: (e, r, b, k)."""
        out = np.empty((len(states), len(cross_fits), len(rows), self.torch_target.num_outputs), dtype=np.float32)
        for place, z in self.units.read(inputs, rows):
            near = z.clamp_(-_FARTHEST, _FARTHEST)
            for state, nets in enumerate(states):
                found = predict_out_of_fold(cross_fits, rows[place], _predictor(nets, near))
                out[state, :, place] = (found * self.torch_target.scale + self.torch_target.centre).cpu().numpy()
        return out


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
    """Fit all folds, rounds and weight decays as one stacked parameter, each on its own rows without those set aside.

    Each probe is the network, of all epochs and decays, with the least loss on what its probe set aside; with nothing
    aside, the last of the strongest decay. All start alike and forget the same units, so that none depends on others.
    """
    products = product_dtype(config.precision, device, size=len(fit_rows.rows) * inputs.num_features)
    design = read_design(inputs, fit_rows.rows, products=products, device=device, with_axes=False)
    design.rows.clamp_(-_FARTHEST, _FARTHEST)
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
        num_epochs=trained.num_epochs,
        snapshots=tuple(nets.take(of_first) for nets in trained.snapshots),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """The best network of each probe, its decay and epochs (p,), and all networks (decay by probe) on the way."""

    best: Nets
    decay: Tensor
    num_epochs: Tensor
    snapshots: tuple[Nets, ...]


def _train(design: Design, torch_target: TorchTarget, fit_rows: FitRows, *, seed: int, config: ProbeConfig) -> _Trained:
    device, decays, p = design.rows.device, sorted(config.decays), fit_rows.train_mask.shape[1]
    chooses = fit_rows.can_choose
    train_mask = torch.from_numpy(fit_rows.train_mask & ~fit_rows.holdout_mask if chooses else fit_rows.train_mask).to(
        device
    )
    holdout_mask = torch.from_numpy(fit_rows.holdout_mask if chooses else fit_rows.train_mask).to(device)
    draw = torch.Generator().manual_seed(seed)
    nets = _start(design, torch_target, num=len(decays) * p, hidden=config.hidden, draw=draw)
    shrink = design.curvature.new_tensor(decays).repeat_interleave(p)[:, None, None]
    optimiser = torch.optim.Adam([nets.first, nets.second], lr=config.lr)
    best = nets.take(torch.arange(p, device=device) + (len(decays) - 1) * p).copy()
    least = design.curvature.new_full((p,), torch.inf)
    decay = torch.full((p,), len(decays) - 1, device=device)
    num_epochs = torch.zeros_like(decay)
    snapshots: list[Nets] = []
    for epoch in range(1, config.epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
        _one_epoch(nets, optimiser, design, torch_target, train_mask, shrink=shrink, draw=draw, config=config)
        if epoch & (epoch - 1) == 0 or epoch == config.epochs:
            snapshots = [*snapshots[: _MOST_SNAPSHOTS - 1], nets.copy()]
        loss, which = _mean_loss(nets, design, torch_target, holdout_mask).view(len(decays), p).min(dim=0)
        better = (loss < least) if chooses else torch.full_like(loss, epoch == config.epochs, dtype=torch.bool)
        if not chooses:
            which = decay
        least, decay = torch.where(better, loss, least), torch.where(better, which, decay)
        num_epochs = torch.where(better, epoch, num_epochs)
        found = nets.take(which * p + torch.arange(p, device=device))
        pick = better[:, None, None]
        best = Nets(
            first=torch.where(pick, found.first, best.first), second=torch.where(pick, found.second, best.second)
        )
        best = best.copy()
    return _Trained(best=best, decay=decay, num_epochs=num_epochs, snapshots=tuple(snapshots))


def _one_epoch(
    nets: Nets,
    optimiser: torch.optim.Optimizer,
    design: Design,
    torch_target: TorchTarget,
    train_mask: Tensor,
    *,
    shrink: Tensor,
    draw: torch.Generator,
    config: ProbeConfig,
) -> None:
    """Take every row once, in an order of chance; decay is decoupled from the gradient (AdamW, arXiv 1711.05101)."""
    device, copies = design.rows.device, len(nets.first) // train_mask.shape[1]
    for batch in torch.randperm(len(design.rows), generator=draw).tensor_split(
        _ends(len(design.rows), config.batch_size)
    ):
        left = torch.rand(len(batch), 1, config.hidden, generator=draw) >= config.dropout
        batch = batch.to(device)
        mask = train_mask[batch].repeat(1, copies).to(nets.first.dtype)
        logits = nets.logits(design.rows[batch], left.to(device) / (1 - config.dropout))
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
    """Give the mean loss (q,) of each network over its probe's rows in the mask (n, p)."""
    copies = len(nets.first) // mask.shape[1]
    total = nets.first.new_zeros(len(nets.first))
    for some in mask.any(dim=1).nonzero().squeeze(1).chunk(max(1, len(mask) // _ROWS_AT_ONCE)):
        loss, _ = loss_and_residual(nets.logits(design.rows[some]), torch_target.values[some], task=torch_target.task)
        total += (loss * mask[some].repeat(1, copies)).sum(dim=0)
    return total / mask.sum(dim=0).repeat(copies)


def _start(design: Design, torch_target: TorchTarget, *, num: int, hidden: int, draw: torch.Generator) -> Nets:
    """Give `num` networks that start alike: He's normal weights, and a second layer that says next to nothing."""
    d, k = design.rows.shape[1], torch_target.num_outputs
    first, second = torch.zeros(d + 1, hidden), torch.zeros(hidden + 1, k)
    first[:-1] = torch.randn(d, hidden, generator=draw) * math.sqrt(2 / d)
    second[:-1] = torch.randn(hidden, k, generator=draw) * 0.1 / math.sqrt(hidden)
    each = [layer.to(design.rows.device).repeat(num, 1, 1).requires_grad_() for layer in (first, second)]
    return Nets(first=each[0], second=each[1])


def _predictor(nets: Nets, z: Tensor) -> Callable[[int, Tensor], Tensor]:
    def ask(probe: int, mine: Tensor) -> Tensor:
        return nets.take(torch.tensor([probe], device=z.device)).logits(z[mine])[:, 0]

    return ask


def _ends(num_rows: int, size: int) -> tuple[int, ...]:
    return tuple(range(size, num_rows, size))


def _seed(cross_fit: CrossFit) -> int:
    """Make a seed of the hashes of the ids: not of the order of the rows, the target or the config."""
    return int(np.bitwise_xor.reduce(cross_fit.key[cross_fit.fits])) & (2**63 - 1)
