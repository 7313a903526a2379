"""Balancing methods in a training loop of the user's: their network, their optimiser, their loader."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ..audit.dataset.labels import TASKS
from ..audit.errors import ConfigError, choices
from ..audit.hashing import digest
from ..rebalance.curriculum import RowIndex
from .balancing.balancer import Balancer, Validation
from .batches import Batch, Loss, OutputFunction
from .config import REGRESSION_LOSSES, FinetuneConfig, OptimConfig, TrainConfig
from .custom_network import CustomNet, check_model, check_target, check_whole_numbers, custom_config, in_eval_mode
from .methods import check_custom, check_task, resolve
from .network import FusionNet
from .optimizer import DistributedContext, Optimization
from .training_data import validate

log = logging.getLogger("mmaudit")

Inputs = Mapping[str, Tensor] | Sequence[Tensor]
Evaluated = Iterable[tuple[Inputs, Tensor]]


class CustomOptimization(Optimization):
    """Steps of the user's optimiser."""

    def __init__(
        self,
        net: FusionNet,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        *,
        device: str,
        context: DistributedContext,
    ) -> None:
        self._users = optimizer
        super().__init__(net, config, device=device, distributed=context)

    def _build(self, *, by_modality: bool) -> torch.optim.Optimizer:
        return self._users


class Balanced:
    """A balancing method on a network and an optimiser of the user's; returned by `balance`.

    Example:
        >>> balanced = mmaudit.balance(model, "ogm-ge", optimizer)
        >>> for epoch in range(epochs):
        ...     balanced.set_epoch(epoch)
        ...     for inputs, label in loader:
        ...         loss = balanced.step(inputs, label)
    """

    def __init__(
        self, net: CustomNet, balancer: Balancer, *, train: Evaluated | None, validation: Evaluated | None, seed: int
    ) -> None:
        self._net, self._balancer, self._seed = net, balancer, seed
        self._reader = LoaderReader(net, self._collate, train=train, validation=validation)
        self._epoch: int | None = None
        self._step = 0
        self._checked = False

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0 as in PyTorch; methods that evaluate samples between epochs do it here.

        Args:
            epoch: Number of the epoch. Epochs of a method's settings are counted from 1: epoch 0 is their first.

        Raises:
            ConfigError: The epoch is below 0.
        """
        if epoch < 0:
            raise ConfigError(f"epoch {epoch}: epochs of a loop are counted from 0")
        if epoch == self._epoch:
            return
        if self._epoch is not None:
            self._balancer.end_epoch(self._epoch + 1, self._validation())
        self._net.follow_mode()
        self._balancer.begin_epoch(epoch + 1, self._reader)  # type: ignore[arg-type]
        self._epoch, self._step = epoch, 0

    def _validation(self) -> Validation:
        """Return the validation results of the epoch; NaN where the method does not use them."""
        if "validation" in self._balancer.evaluates:
            return validate(self._reader, net=self._net)  # type: ignore[arg-type]
        unknown = (math.nan,) * self._net.num_modalities
        return Validation(loss=math.nan, metric=math.nan, unimodal_loss=unknown, unimodal_metric=unknown)

    def step(
        self, inputs: Inputs, label: Tensor, *, weight: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Train on one batch: gradients of the method's loss, what it does to them, and a step of the optimiser.

        Gradients of before are discarded. In several processes each passes its part of the batch, and all get the same
        gradients: the network is not wrapped in DistributedDataParallel.

        Args:
            inputs: Input (b, ...) of each modality, by name or in the order of `encoders`.
            label: Target of each sample: its class (b,), int64; its labels (b, k) of 0 and 1; or its number (b,) or
                (b, 1), in the units that the network predicts.
            weight: Weight of each sample in the losses (b,), such as a manifest's; None: all are equal.
            present: Whether a sample has a modality (b, m), in the order of `encoders`; None: all do. The rows of
                absent ones are not encoded, and their features are 0.

        Returns:
            The loss, detached: a mean over the batch.

        Raises:
            ConfigError: A modality's input is missing, or of another length than `label`; `label` has another shape or
                kind of number than the task; or `unimodal_logits` of a regression are parts of a sum.
            TrainError: An encoder returns features of another shape than `num_features`.
        """
        if self._epoch is None:
            self.set_epoch(0)
        self._step += 1
        self._net.follow_mode()
        purpose = f"{self._seed} balance {self._epoch} {self._step}"
        self._balancer.optimization.generator.manual_seed(int(digest(purpose.encode())[:12], 16))
        batch = self._balancer.prepare(self._collate(inputs, label, weight=weight, present=present))
        outputs, loss = self._balancer.step(batch)
        if not self._checked:
            check_whole_numbers(self._net, outputs)
            self._checked = True
        self._balancer.distributed.sum_([loss])
        return loss

    def metrics(self) -> dict[str, float]:
        """Return the method's numbers of the epoch, such as the coefficient of each modality's gradients."""
        return self._balancer.epoch_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the method and of the heads that it added; the network and the optimiser are yours."""
        return {
            "balancer": self._balancer.state_dict(),
            "heads": self._net.heads.state_dict(),
            "frozen": list(self._balancer.optimization.frozen),
            "epoch": self._epoch,
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state; the next step is that of an uninterrupted training.

        Args:
            state: What `state_dict` returned, of the same method and network.
        """
        self._balancer.load_state_dict(state["balancer"])
        self._net.heads.load_state_dict(state["heads"])
        self._balancer.optimization.frozen = list(state["frozen"])
        self._epoch, self._step = state["epoch"], state["step"]

    def _collate(
        self, inputs: Inputs, label: Tensor, *, weight: Tensor | None = None, present: Tensor | None = None
    ) -> Batch:
        """Return a batch on the device of the network, whose weights sum to 1 over all processes."""
        device, names = self._balancer.device, self._net.config.modalities
        tensors = [x.to(device, non_blocking=True) for x in _in_order(inputs, names)]
        label = check_target(label.to(device, non_blocking=True), self._net.config)
        for name, rows in zip(names, tensors, strict=True):
            if len(rows) != len(label):
                raise ConfigError(f"the input of {name} has {len(rows)} rows, and label {len(label)}")
        row_weight = torch.ones(len(label), device=device) if weight is None else weight.to(device).float()
        weights = row_weight.repeat(1 + len(names), 1)
        if present is not None:
            present = present.to(device).bool()
            weights[0] *= present.any(dim=1)
            weights[1:] *= present.T
            tensors = [rows[present[:, j]] for j, rows in enumerate(tensors)]
        sums = torch.cat([weights.sum(dim=1), torch.full((1,), float(len(label)), device=device)])
        self._balancer.distributed.sum_([sums])
        total = sums[:-1, None]
        return Batch(
            rows=torch.arange(len(label), device=device),
            inputs=tuple(tensors),
            label=label,
            present=present,
            loss_weight=weights / torch.where(total > 0, total, 1.0),
            size=len(label) if self._balancer.distributed.world_size == 1 else int(sums[-1]),
        )


def _in_order(inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    """Return the inputs of the modalities in order; ConfigError where one is missing."""
    if not isinstance(inputs, Mapping):
        if len(inputs) != len(names):
            raise ConfigError(f"{len(inputs)} inputs for {len(names)} modalities: {', '.join(names)}")
        return list(inputs)
    if missing := [name for name in names if name not in inputs]:
        raise ConfigError(f"the inputs lack {missing[0]}; they are {', '.join(map(str, inputs))}")
    return [inputs[name] for name in names]


class LoaderReader:
    """Evaluation of the user's network on batches of theirs: the ModelReader of a loop of their own."""

    def __init__(
        self,
        net: CustomNet,
        collate: Callable[[Inputs, Tensor], Batch],
        *,
        train: Evaluated | None,
        validation: Evaluated | None,
    ) -> None:
        self.net, self._collate, self._train, self._validation = net, collate, train, validation
        self._num_train: int | None = None

    @property
    def num_train(self) -> int:
        """Number of samples in `train`."""
        if self._num_train is None:
            self._num_train = sum(len(label) for _, label in self._train or ())
        return self._num_train

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        """Return function(outputs, label) on the samples of `train`: all, or `rows` of them."""
        values = self._read(function, self._train)
        return values if rows is None else values[..., torch.from_numpy(np.asarray(rows)).to(values.device)]

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        """Return function(outputs, label) on the samples of `validation`."""
        return self._read(function, self._validation)

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        """Raise ConfigError: `check_custom` refuses methods that train copies."""
        raise ConfigError("copies of the network are trained by mmaudit finetune only")

    def _read(self, function: OutputFunction, batches: Evaluated | None) -> Tensor:
        if batches is None:
            raise ConfigError("the method evaluates samples between epochs: pass train and validation to balance")
        values = []
        self.net.follow_mode()
        with in_eval_mode(self.net), torch.no_grad():
            for inputs, label in batches:
                batch = self._collate(inputs, label)
                values.append(function(self.net(batch.inputs, batch.present), batch.label).float())
        if not values:
            raise ConfigError(
                "train or validation of balance yielded no batch: pass a list or a loader, not a generator"
            )
        return torch.cat(values, dim=-1)


def balance(
    model: nn.Module,
    method: str,
    optimizer: torch.optim.Optimizer,
    *,
    task: str = "classification",
    regression_loss: str = "l1",
    settings: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    train: Evaluated | None = None,
    validation: Evaluated | None = None,
    clip_norm: float = 0.0,
    precision: str = "float32",
    seed: int = 0,
) -> Balanced:
    """Return a balancing method for a training loop of your own: your network, your optimizer, your loader.

    `step` of the result takes the place of zero_grad, forward pass, loss, backward and optimizer.step. Every method
    works that needs no more than encoders, features and fused logits, see `MultimodalModel`; the others are refused
    with the reason. Where a method needs logits of single modalities and the network has no `unimodal_logits`, linear
    heads are added and given to the optimizer. Move the network to its device before.

    Args:
        model: The network, an nn.Module with the attributes of `MultimodalModel`; not wrapped.
        method: Name of the balancing method, such as ogm-ge; `mmaudit.methods(kind="balancer")` lists them.
        optimizer: Optimizer of the network's parameters. Schedules stay yours.
        task: classification; multilabel, whose loss is the mean binary cross entropy of the labels; or regression, of
            one number, for which methods compare errors in the units of `label`: standardise it.
        regression_loss: l1 or mse: absolute or squared error of a regression.
        settings: Constants of the method, such as {"balancing.ogm.alpha": 0.8}.
        epochs: Number of epochs, for methods that depend on it.
        train: Batches (inputs, label) of training samples, for methods that evaluate some between epochs; iterated more
            than once, in the same order, and the same in all processes. A few thousand samples are enough.
        validation: Batches (inputs, label) of validation samples, for methods that follow their loss.
        clip_norm: Largest norm of all gradients together; 0 does not clip.
        precision: float32, or bfloat16: autocast of the encoders.
        seed: Seed of the method's random numbers.

    Returns:
        The method; its `set_epoch` begins an epoch and `step` trains on a batch.

    Raises:
        ConfigError: The network lacks an attribute, the method or a setting does not exist, or the method needs more,
            such as classes.

    Example:
        >>> balanced = mmaudit.balance(model, "ogm-ge", optimizer)
        >>> for epoch in range(20):
        ...     balanced.set_epoch(epoch)
        ...     for inputs, label in loader:
        ...         loss = balanced.step(inputs, label)
    """
    check_model(model)
    _check_options(model, precision=precision, task=task, regression_loss=regression_loss)
    methods = resolve(TrainConfig(finetune=FinetuneConfig(balancing=method), balancing=_sections(settings or {})))
    balancer_type = methods.balancer
    check_custom(method, balancer_type)
    check_task(methods, task)
    _check_loop(method, balancer_type, num_modalities=len(model.encoders), train=train, validation=validation)  # type: ignore[arg-type]
    has_logits = callable(getattr(model, "unimodal_logits", None))
    needs_logits = balancer_type.needs_unimodal_logits or "validation" in balancer_type.evaluates
    heads = balancer_type.own_heads or (needs_logits and not has_logits)
    net = CustomNet(model, heads=heads, config=custom_config(model, task=task, regression_loss=regression_loss))
    if heads:
        optimizer.add_param_group({"params": list(net.heads.parameters())})
    optimization = CustomOptimization(
        net,
        optimizer,
        OptimConfig(clip_norm=clip_norm, precision=precision),
        device=str(next(model.parameters()).device),
        context=_context(),
    )
    balancer = balancer_type(net, optimization, methods.balancer_config, epochs=epochs or 1)
    return Balanced(net, balancer, train=train, validation=validation, seed=seed)


def _check_options(model: nn.Module, *, precision: str, task: str, regression_loss: str) -> None:
    """Raise ConfigError for names that do not exist, and for a regression of several numbers."""
    for key, value, values in (
        ("precision", precision, ("float32", "bfloat16")),
        ("task", task, TASKS),
        ("regression_loss", regression_loss, REGRESSION_LOSSES),
    ):
        if value not in values:
            raise ConfigError(f"{key} {value}: no such {key}; {choices(value, values)}")
    if task == "regression" and model.num_classes != 1:
        raise ConfigError(f"the network has num_classes {model.num_classes}; of a regression it predicts one number")
    if regression_loss != REGRESSION_LOSSES[0] and task != "regression":
        log.warning("regression_loss %s has no effect: the task is %s", regression_loss, task)


def _check_loop(
    name: str, method: type[Balancer], *, num_modalities: int, train: Evaluated | None, validation: Evaluated | None
) -> None:
    """Raise ConfigError where a method needs more than a loop of the user's has, or batches that were not passed."""
    if num_modalities < method.min_modalities:
        raise ConfigError(
            f"balancing {name} needs {method.min_modalities} modalities, the network has {num_modalities}"
        )
    reason = ""
    if "copies" in method.evaluates:
        reason = "it trains copies of the network between epochs"
    elif method.sets_rates:
        reason = "it sets a learning rate per modality, and the rates of your optimizer are yours"
    if reason:
        raise ConfigError(
            f"balancing {name} does not work in a loop of your own: {reason}; use mmaudit finetune --model"
        )
    for key, batches in (("train", train), ("validation", validation)):
        if key in method.evaluates and batches is None:
            raise ConfigError(
                f"balancing {name} evaluates {key} samples between epochs: pass {key}, batches (inputs, label)"
            )


def _sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings such as "balancing.ogm.alpha" by section."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        axis, _, rest = key.partition(".")
        section, _, name = rest.partition(".")
        if axis != "balancing" or not name:
            raise ConfigError(
                f"setting {key}: the settings of balance are balancing.SECTION.KEY, as balancing.ogm.alpha"
            )
        sections.setdefault(section, {})[name] = value
    return sections


def _context() -> DistributedContext:
    """Return this process's place in the process group of the loop, if there is one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return DistributedContext()
    return DistributedContext(rank=distributed.get_rank(), world_size=distributed.get_world_size())
