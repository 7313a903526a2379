"""Samples and settings of one training, its set-up, and evaluation of the network on batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.errors import ConfigError, ManifestError
from ..audit.hashing import digest
from ..audit.probes.config import fixed_moments
from ..rebalance.curriculum import RowIndex, id_keys, training_rows
from .augment import InputForm, augment, local_rows
from .backbones import PretrainedEncoder
from .balancing.balancer import Validation
from .batches import Batch, Loss, OutputFunction, Step, to_batch, whole_batches
from .config import FinetuneConfig, LoraConfig, TrainConfig
from .custom_network import PictureStandardization, build_custom
from .examples import Examples
from .methods import Methods, check_schedule, check_task, list_ineffective, list_unused
from .network import FusionNet, ModelConfig, Outputs
from .network_encoders import PictureEncoder, VectorStandardization, apply_outside_pretrained, initialise_xavier
from .optimizer import DistributedContext, Optimization
from .sampling.sampler import Pool, Uniform
from .store import Store, open_store
from .task_metrics import mean_average_precision

log = logging.getLogger("mmaudit")

_READ_BATCH_SIZE = 1024  # vectors, in eval mode
_STORED_BATCH_SIZE = 64  # stored pictures: of 360 x 360 pixels, 64 take 200 MB as float64
_MAX_MOMENT_PICTURES = 4096  # pictures that mean and scale are computed from: precise to 1%


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Samples of a training on their device, and its settings. Rows index the samples of `store`.

    forms: how a row becomes the input of each modality; present (n, m): whether a row has the modality. label (n,) on
    the device, weight (n,). pool: what samplers draw from. has_backbones: whether a modality's rows are the inputs of a
    pretrained model.
    """

    store: Store
    forms: tuple[InputForm, ...]
    present: NDArray[np.bool_]
    label: Tensor
    weight: NDArray[np.float32]
    train: RowIndex
    validation: RowIndex
    test: RowIndex
    pool: Pool
    config: TrainConfig
    seed: int
    device: str
    distributed: DistributedContext
    has_backbones: bool = False

    @classmethod
    def of(
        cls,
        examples: Examples,
        store: Store,
        *,
        train: RowIndex,
        validation: RowIndex,
        test: RowIndex,
        config: TrainConfig,
        seed: int,
        device: str,
        distributed: DistributedContext,
    ) -> TrainingData:
        """Build the data of a training on some of the training rows, or of a test of other rows alone."""
        pool = Pool(
            key=id_keys(examples.sample_id.take(pa.array(train))),
            rank=examples.rank[train],
            discrepancy=examples.discrepancy[train],
            balance=examples.balance[train],
            p_balanced=examples.p_balanced[train],
            label=examples.label[train],
            num_classes=len(examples.class_names) if examples.values is None else int(examples.label.max()) + 1,
            num_modalities=len(examples.modalities),
        )
        return cls(
            store=store,
            forms=tuple(
                InputForm(shape=shape, view=view, key=pool.key)
                for shape, view in zip(examples.shapes, examples.views or [None] * len(examples.shapes), strict=True)
            ),
            present=examples.present,
            label=torch.from_numpy(examples.target).to(device),
            weight=examples.weight,
            train=train,
            validation=validation,
            test=test,
            pool=pool,
            config=config,
            seed=seed,
            device=device,
            distributed=distributed,
            has_backbones=any(examples.backbones),
        )

    def derive_seed(self, *purpose: object) -> int:
        """Return a seed below 2^48 that depends on the training's seed and on its purpose only."""
        return int(digest(" ".join(map(str, (self.seed, *purpose))).encode())[:12], 16)

    def batches(
        self, steps: Iterable[Step], *, epoch: int, first_step: int = 1, prefetch: bool = True
    ) -> Iterator[Batch]:
        """Yield this process's batches of an epoch's steps on the device; `first_step` is the number of the first step.

        A modality that a sample does not have is masked in its batch, whatever the sampler selects.
        """
        finetune = self.config.finetune
        if finetune.drop_last and prefetch:  # steps that depend on the last one cannot be read ahead
            steps = whole_batches(steps, batch_size=finetune.step_size, num_done=first_step - 1)
        present = self.present[self.train]
        if not present.all():
            steps = (step.masked_by(present) for step in steps)
        label, weight = self.label[torch.from_numpy(self.train).to(self.device)], self.weight[self.train]
        augmented = any(len(form.shape) > 1 for form in self.forms)

        def rows_of(step: Step) -> list[RowIndex]:
            local_step = step.shard(self.distributed)
            if local_step.present is None:
                return [self.train[local_step.rows]] * len(self.forms)
            return [self.train[local_step.rows_of(j)] for j in range(len(self.forms))]

        stream = self.store.stream(steps, rows_of, prefetch=prefetch)
        for step_number, (step, inputs) in enumerate(stream, start=first_step):
            batch = to_batch(step, inputs, label=label, weight=weight, distributed=self.distributed)
            if augmented:
                rows = local_rows(step, len(self.forms), self.distributed)
                seed = self.derive_seed("augment", epoch, step_number, 0)
                batch = augment(batch, self.forms, self.config.augment, seed=seed, rows=rows)
            yield batch

    def standardise(self, net: FusionNet) -> None:
        """Set mean and scale of the encoders from the training rows; for pictures from an evenly spaced subset.

        Of a regression, also those of the target. Raises ManifestError where no training row has a modality.
        """
        if net.config.task == "regression":
            net.standardise_target(self.label[torch.from_numpy(self.train).to(self.device)])
        for modality, (name, module) in enumerate(zip(net.config.modalities, net.standardizations(), strict=True)):
            fixed = self._fixed_moments(self.forms[modality].shape)
            if isinstance(module, PictureEncoder | PictureStandardization):
                rows = self.train[:: -(-len(self.train) // _MAX_MOMENT_PICTURES)]
                module.standardise_by(*(fixed or self._moments(modality, rows, name=name)[:2]))
            elif isinstance(module, VectorStandardization):
                mean, scale, largest = self._moments(modality, self.train, name=name)
                module.standardise_by(mean, scale, largest=largest)

    def _fixed_moments(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of each channel by the settings; None: those of the training rows."""
        names = {"pictures": self.config.normalise_pictures, "sound": self.config.normalise_sound}
        moments = fixed_moments(shape, **names) if len(shape) > 1 else None
        return None if moments is None else (torch.from_numpy(moments[0]), torch.from_numpy(moments[1]))

    def standardize_resident(self, net: FusionNet) -> None:
        """Standardise the vectors on the device once, which each step would otherwise repeat: 4% of its time."""
        for matrix, module in zip(self.store.resident, net.standardizations(), strict=True):
            if matrix is not None and isinstance(module, VectorStandardization):
                for rows in matrix.split(_READ_BATCH_SIZE):  # type: ignore[no-untyped-call]
                    rows.copy_(module.standardize(rows))
                module.inputs_standardized = True

    def _moments(self, modality: int, rows: RowIndex, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Compute mean, standard deviation and largest size of each feature or channel (c,) over rows that have it."""
        form = self.forms[modality]
        shape, size = form.shape, _READ_BATCH_SIZE if form.view is None else _STORED_BATCH_SIZE
        num_values, sums = 0, []
        rows = rows[self.store.reading_order(rows)]
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        for values in self.store.stream_modality(modality, batches):
            values = values[~values.isnan().any(dim=1)]
            if form.view is not None:
                values = form.whole(values).permute(0, 1, 3, 4, 2).flatten(1)
            values = values.double()
            channels = 1 if len(shape) == 2 else shape[-1]
            values = values.view(-1, channels) if len(shape) > 1 else values
            if len(values):
                num_values += len(values)
                sums.append(torch.stack([values.sum(dim=0), values.square().sum(dim=0), values.abs().amax(dim=0)]))
        if not sums:
            raise ManifestError(
                f"none of {len(rows)} training samples has the modality {name}: train without it with --only, or use "
                "another manifest"
            )
        total, square, largest = torch.stack(sums).unbind(dim=1)
        mean = total.sum(dim=0) / num_values
        scale = (square.sum(dim=0) / num_values - mean.square()).clamp_min(0).sqrt()
        return mean.float(), scale.float(), largest.amax(dim=0).float()


class NetworkReader:
    """Evaluates the network in eval mode, a part of the samples in each process: the ModelReader of a training."""

    def __init__(self, training_data: TrainingData, net: FusionNet) -> None:
        self.training_data, self.net = training_data, net
        self.num_train = len(training_data.train)

    def read(self, function: OutputFunction, *, rows: RowIndex | None = None, net: FusionNet | None = None) -> Tensor:
        """See ModelReader.read."""
        return self.read_samples(
            function, self.training_data.train if rows is None else self.training_data.train[rows], net=net
        )

    def read_validation(self, function: OutputFunction, *, net: FusionNet | None = None) -> Tensor:
        """See ModelReader.read_validation."""
        return self.read_samples(function, self.training_data.validation, net=net)

    def read_samples(self, function: OutputFunction, rows: RowIndex, *, net: FusionNet | None = None) -> Tensor:
        """Evaluate the function on any samples, by their row in the store."""
        distributed, store = self.training_data.distributed, self.training_data.store
        local_rows = rows[distributed.slice(len(rows))]
        order = store.reading_order(local_rows)
        values, start = torch.empty(0), 0
        for batch in self.iterate(function, local_rows[order], net=net):
            stop = start + batch.shape[-1]
            if not start:
                values = batch.new_empty(*batch.shape[:-1], len(local_rows))
            values[..., torch.from_numpy(order[start:stop]).to(batch.device)] = batch
            start = stop
        return distributed.gather(values)

    @torch.no_grad()
    def iterate(self, function: OutputFunction, rows: RowIndex, *, net: FusionNet | None = None) -> Iterator[Tensor]:
        """Yield the values of the function on samples in their order, batch by batch, in this process alone."""
        data, network = self.training_data, self.net if net is None else net
        small = all(len(form.shape) == 1 for form in data.forms) and not data.has_backbones
        size = _READ_BATCH_SIZE if small else data.config.finetune.batch_size
        all_present = bool(data.present[rows].all())

        def rows_of(batch_rows: RowIndex) -> list[RowIndex]:
            return [
                batch_rows if all_present else batch_rows[data.present[batch_rows, j]] for j in range(len(data.forms))
            ]

        batches = [rows[start : start + size] for start in range(0, len(rows), size)] or [rows]
        training = network.training
        network.eval()
        for batch_rows, inputs in data.store.stream(batches, rows_of):
            label = data.label[torch.from_numpy(batch_rows).to(data.device)]
            modality_mask = None if all_present else torch.from_numpy(data.present[batch_rows]).to(data.device)
            inputs = tuple(form.whole(values) for form, values in zip(data.forms, inputs, strict=True))
            yield function(network(inputs, modality_mask), label).float()
        network.train(training)

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        """See ModelReader.train_copy. The copy starts with a new optimiser at the rate of a first epoch."""
        data, net = self.training_data, copy.deepcopy(self.net)
        finetune, distributed = data.config.finetune, data.distributed
        part_size = finetune.batch_size if finetune.accumulate > 1 else None
        optimization = Optimization(
            net, data.config.optim, device=data.device, distributed=distributed, by_modality=False
        )
        seed = data.derive_seed("copy")
        sampler = Uniform(
            data.pool, data.config.order, batch_size=finetune.step_size, seed=seed, distributed=distributed
        )
        net.train()
        for epoch in range(1, epochs + 1):
            optimization.begin_epoch(epoch, epochs=finetune.epochs)
            for step_number, batch in enumerate(data.batches(sampler.steps(epoch), epoch=epoch), start=1):
                optimization.begin_step(data.derive_seed("copy", epoch, step_number))
                parts = batch.parts(part_size, world_size=distributed.world_size)
                optimization.backward(_part_losses(net, parts, loss, optimization))
                optimization.apply()
        return net


def _part_losses(net: FusionNet, parts: Sequence[Batch], loss: Loss, optimization: Optimization) -> Iterator[Tensor]:
    """Yield the loss of each part of a step."""
    for part in parts:
        with optimization.autocast():
            outputs = net(part.inputs, part.present)
        yield loss(outputs, part)


def validate(reader: NetworkReader, *, net: FusionNet | None = None) -> Validation:
    """Compute mean loss and metric on validation, of the tested logits and of each modality."""
    network = reader.net if net is None else net
    task = network.config.task

    def losses_and_values(outputs: Outputs, target: Tensor) -> Tensor:
        logits = torch.cat([network.tested_logits(outputs)[None], outputs.unimodal])
        losses = network.loss_of(logits, target)
        if task == "classification":
            return torch.cat([losses, (logits.argmax(dim=2) == target).float()])
        predictions = network.predict(logits)
        if task == "regression":
            return torch.cat([losses, (predictions - target).abs().mean(dim=2)])
        return torch.cat([losses, predictions.movedim(1, 2).flatten(0, 1), target.T])

    readings = reader.read_validation(losses_and_values, net=net)
    num_branches = network.num_modalities + 1
    losses, values = readings[:num_branches].double().mean(dim=1).tolist(), readings[num_branches:]
    if task == "multilabel":
        *branches, truth = values.cpu().numpy().reshape(num_branches + 1, -1, values.shape[1])
        metrics = [mean_average_precision(branch.T, truth.T) for branch in branches]
    else:
        metrics = values.double().mean(dim=1).tolist()
    return Validation(
        loss=losses[0], unimodal_loss=tuple(losses[1:]), metric=metrics[0], unimodal_metric=tuple(metrics[1:])
    )


def set_up(
    examples: Examples, methods: Methods, *, seed: int, device: str, distributed: DistributedContext
) -> TrainingData:
    """Check the settings against the samples and copy the samples to the device.

    Raises ManifestError where a split is empty, ConfigError where the settings name a modality that does not exist, or
    a method that needs more modalities.
    """
    config = methods.config
    check_task(methods, examples.task)
    train = _training_rows(examples, config.finetune)
    validation, test = examples.rows("validation"), examples.rows("test")
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        if name == "validation" and len(rows) == 0:
            _check_unvalidated(methods)
        elif len(rows) == 0:
            advice = "relax its rule, or --keep-posterior"
            if name == "test":
                advice += "; where the data have none, mmaudit split --resplit 80/8/12 cuts some"
            raise ManifestError(f"the manifest leaves no {name} samples: {advice}")
    unknown = sorted({*config.optim.freeze, *config.optim.modality_lr_factors()} - set(examples.modalities))
    if unknown:
        raise ConfigError(f"optim.freeze and optim.modality_lr: no modality {unknown[0]}; {examples.modalities_text}")
    warnings = (*check_schedule(methods), *list_unused(methods), *list_ineffective(methods, task=examples.task))
    for warning in warnings if distributed.is_first else ():
        log.warning("%s", warning)
    random = sorted({*config.optim.freeze} - {*config.finetune.end_to_end})
    if random and config.finetune.init is None and config.finetune.model is None:
        log.info("frozen encoders without --init: those of %s keep their random weights", ", ".join(random))
    for option, name, method in (
        ("sampling", config.finetune.sampling, methods.sampler),
        ("balancing", config.finetune.balancing, methods.balancer),
    ):
        if len(examples.modalities) < method.min_modalities:
            raise ConfigError(f"--{option} {name} needs {method.min_modalities} modalities; {examples.modalities_text}")
    store = open_store(examples.inputs, config.finetune, device=device)
    return TrainingData.of(
        examples,
        store,
        train=train,
        validation=validation,
        test=test,
        config=config,
        seed=seed,
        device=device,
        distributed=distributed,
    )


def _check_unvalidated(methods: Methods) -> None:
    """Raise an error for a training without validation samples that needs some."""
    settings = methods.config.finetune
    if settings.keep == "best":
        raise ManifestError(
            "the manifest leaves no validation samples, and finetune.validation_fraction cuts none: raise it, or keep "
            "the last epoch with --set finetune.keep=last"
        )
    if methods.balancer.reads_validation(methods.balancer_config):
        raise ConfigError(
            f"--balancing {settings.balancing} follows validation losses, and there are no validation samples: cut "
            "some with --set finetune.validation_fraction=0.1"
        )


def build_network(examples: Examples, methods: Methods) -> FusionNet:
    """Build the network that the methods train, with random weights."""
    settings = methods.config.finetune
    config = ModelConfig(
        modalities=examples.modalities,
        shapes=examples.shapes,
        classes=examples.class_names,
        fusion=settings.fusion,
        task=examples.task,
        regression_loss=settings.regression_loss,
        own_heads=methods.has_own_heads or _predicts_parts(examples, settings),
        answer=settings.answer,
        hidden=settings.hidden,
        dropout=settings.dropout,
        width=methods.config.width,
        model=settings.model,
        backbones=examples.backbones if any(examples.backbones) else (),
        lora=settings.lora if any(examples.backbones) else LoraConfig(),
    )
    if settings.model is not None:
        return build_custom(config)
    net = FusionNet(config, fusion=methods.fusion)
    if settings.initialisation == "xavier":
        apply_outside_pretrained(net, initialise_xavier)
    for encoder in net.encoders if settings.gradient_checkpointing else ():
        if isinstance(encoder, PretrainedEncoder):
            encoder.checkpoint_gradients()
    return net


def _predicts_parts(examples: Examples, settings: FinetuneConfig) -> bool:
    """Return whether unimodal logits of the fusion may be parts of a number, of which only a head predicts the whole.

    Those of a network of the user's are checked instead, see `check_whole_numbers`.
    """
    return examples.task == "regression" and len(examples.modalities) > 1 and settings.model is None


def _training_rows(examples: Examples, config: FinetuneConfig) -> NDArray[np.int64]:
    selected = training_rows(examples.split, examples.p_balanced, keep_posterior=config.keep_posterior)
    if config.keep_posterior is not None:
        num_train = len(examples.rows("train"))
        log.info("P(balanced) >= %g keeps %d of %d training samples", config.keep_posterior, len(selected), num_train)
    return selected
