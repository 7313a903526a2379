"""Samples and settings of one training, augmentation, and reading of batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audit.errors import ManifestError
from ..audit.hashing import digest
from ..audit.probes.network import augment_pictures, to_pictures
from ..rebalance.curriculum import id_key
from .balancing.balancer import Validation
from .batches import Batch, Loss, Reading, Step, to_batch
from .config import AugmentConfig, TrainConfig
from .distributed import DistributedContext
from .examples import READERS, Examples, Rows, Store
from .network import FusionNet, Outputs, PictureEncoder, VectorEncoder
from .optimizer import Optimization
from .sampling.sampler import Pool, build_sampler


def augment(batch: Batch, shapes: Sequence[tuple[int, ...]], config: AugmentConfig, *, seed: int) -> Batch:
    """Vary a batch: pictures and frames are cropped and mirrored, spectrograms masked, vectors left as they are."""
    rng = np.random.default_rng(seed)
    return replace(
        batch,
        inputs=tuple(_vary_one(rows, shape, config, rng) for rows, shape in zip(batch.inputs, shapes, strict=True)),
    )


def _vary_one(rows: Tensor, shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    if len(rows) == 0:  # as a process may have of a last step; affine_grid refuses it
        return rows
    if len(shape) > 2 and config.pictures:
        return augment_pictures(to_pictures(rows, shape), rng, least_area=config.least_crop, flip=config.flip)
    if len(shape) == 2 and config.sound:
        return mask_spectrograms(to_pictures(rows, shape), config, rng)
    return rows


def mask_spectrograms(pictures: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Blot out bands and spans of time of spectrograms (b, 1, 1, mel, t): the masks of SpecAugment, arXiv 1904.08779.

    A mask's width is uniform from 0 to its share of the axis, its place uniform; it reads as the mean, which is what a
    network makes of NaN.
    """
    found = pictures.float().clone()
    for axis, number, share in (
        (4, config.time_masks, config.time_share),
        (3, config.band_masks, config.band_share),
    ):
        size = found.shape[axis]
        width = np.floor(rng.random((len(found), number)) * (share * size + 1)).astype(np.int64)
        start = np.floor(rng.random((len(found), number)) * (size - width + 1)).astype(np.int64)
        place = np.arange(size)
        hidden = ((place >= start[..., None]) & (place < (start + width)[..., None])).any(axis=1)  # (b, size)
        shape = [len(found), 1, 1, 1, 1]
        shape[axis] = size
        found.masked_fill_(torch.from_numpy(hidden).to(found.device).view(shape), torch.nan)
    return found


_READ_AT_ONCE = 1024  # vectors, in eval mode
_MOST_SURVEYED = 4096  # pictures whose levels stand for all: known to 1% then


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The samples of a training on their device, and the settings. Rows number the samples of `store`.

    shapes: of a row's input by modality; present (n, m): whether a row has it. label (n,) on the device, weight (n,).
    pool: what samplers draw from.
    """

    store: Store
    shapes: tuple[tuple[int, ...], ...]
    present: NDArray[np.bool_]
    label: Tensor
    weight: NDArray[np.float32]
    train: Rows
    validation: Rows
    test: Rows
    pool: Pool
    config: TrainConfig
    seed: int
    device: str
    distributed: DistributedContext

    @classmethod
    def of(
        cls,
        examples: Examples,
        store: Store,
        *,
        train: Rows,
        config: TrainConfig,
        seed: int,
        device: str,
        distributed: DistributedContext,
    ) -> TrainingData:
        """Plan a training on some of the training rows."""
        pool = Pool(
            key=id_key(examples.sample_id[train]),
            rank=examples.rank[train],
            balance=examples.balance[train],
            p_balanced=examples.p_balanced[train],
            label=examples.label[train],
            num_classes=len(examples.class_names),
            num_modalities=len(examples.modalities),
        )
        return cls(
            store=store,
            shapes=examples.shapes,
            present=examples.present,
            label=torch.from_numpy(examples.label).to(device),
            weight=examples.weight,
            train=train,
            validation=examples.rows("validation"),
            test=examples.rows("test"),
            pool=pool,
            config=config,
            seed=seed,
            device=device,
            distributed=distributed,
        )

    def chance(self, *what: object) -> int:
        """Give a seed, below 2^48, that depends on the course's and on what it is for, and on nothing else."""
        return int(digest(" ".join(map(str, (self.seed, *what))).encode())[:12], 16)

    def batches(self, steps: Iterable[Step], *, epoch: int, first: int = 1, ahead: bool = True) -> Iterator[Batch]:
        """Bring an epoch's steps, of which the first has the number `first`, to the device: this process's shares.

        A modality that a sample does not have is not present in its batch, whatever the sampler says.
        """
        there = self.present[self.train]
        if not there.all():
            steps = (step.there(there) for step in steps)
        label, weight = self.label[torch.from_numpy(self.train).to(self.device)], self.weight[self.train]
        varies = any(len(shape) > 1 for shape in self.shapes)

        def rows_of(step: Step) -> list[Rows]:
            mine = step.share(self.distributed)
            return [self.train[mine.rows_of(j)] for j in range(len(self.shapes))]

        stream = self.store.stream(steps, rows_of, num_threads=READERS if ahead else 0)
        for number, (step, inputs) in enumerate(stream, start=first):
            batch = to_batch(step, inputs, label=label, weight=weight, distributed=self.distributed)
            if varies:
                seed = self.chance("augment", epoch, number, self.distributed.rank)
                batch = augment(batch, self.shapes, self.config.augment, seed=seed)
            yield batch

    def standardise(self, net: FusionNet) -> None:
        """Let the encoders take mean and scale from the training rows; of pictures from some of them, evenly spread.

        Raises ManifestError where none of them has a modality.
        """
        for place, (name, encoder) in enumerate(zip(net.plan.modalities, net.encoders, strict=True)):
            if isinstance(encoder, PictureEncoder):
                some = self.train[:: -(-len(self.train) // _MOST_SURVEYED)]
                encoder.standardise_by(*self._moments(place, some, name=name)[:2])
            elif isinstance(encoder, VectorEncoder):
                mean, scale, largest = self._moments(place, self.train, name=name)
                encoder.standardise_by(mean, scale, largest=largest)

    def hold_standard(self, net: FusionNet) -> None:
        """Standardise the vectors on the device once and for all, where each step would do so anew: 4% of its time."""
        for held, encoder in zip(self.store.held, net.encoders, strict=True):
            if held is not None and isinstance(encoder, VectorEncoder):
                for rows in held.split(_READ_AT_ONCE):  # type: ignore[no-untyped-call]
                    rows.copy_(encoder.standard(rows))
                encoder.reads_standard = True

    def _moments(self, place: int, rows: Rows, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, standard deviation and largest size of each feature or channel (c,), over rows that have it."""
        shape, held = self.shapes[place], self.store.held[place]
        number, parts = 0, []
        for start in range(0, len(rows), _READ_AT_ONCE):
            some = rows[start : start + _READ_AT_ONCE]
            if held is not None:
                found = held.index_select(0, torch.from_numpy(some).to(held.device))
            else:
                found = torch.from_numpy(np.array(self.store.inputs[place].read(some)))
            found = found[~found.isnan().any(dim=1)].double()
            channels = 1 if len(shape) == 2 else shape[-1]
            found = found.view(-1, channels) if len(shape) > 1 else found
            if len(found):
                number += len(found)
                parts.append(torch.stack([found.sum(dim=0), found.square().sum(dim=0), found.abs().amax(dim=0)]))
        if not parts:
            raise ManifestError(
                f"none of {len(rows)} training samples has the modality {name}: train without it with --only, or on "
                "another manifest"
            )
        total, square, largest = torch.stack(parts).unbind(dim=1)
        mean = total.sum(dim=0) / number
        scale = (square.sum(dim=0) / number - mean.square()).clamp_min(0).sqrt()
        return mean.float(), scale.float(), largest.amax(dim=0).float()


class NetworkReader:
    """The laboratory of a course: readings of the network in eval mode, each process a share."""

    def __init__(self, training_data: TrainingData, net: FusionNet) -> None:
        self.training_data, self.net = training_data, net
        self.num_train = len(training_data.train)

    def read(self, what: Reading, *, rows: Rows | None = None, net: FusionNet | None = None) -> Tensor:
        """See Lab.read."""
        return self.read_samples(
            what, self.training_data.train if rows is None else self.training_data.train[rows], net=net
        )

    def read_validation(self, what: Reading, *, net: FusionNet | None = None) -> Tensor:
        """See Lab.read_validation."""
        return self.read_samples(what, self.training_data.validation, net=net)

    @torch.no_grad()
    def read_samples(self, what: Reading, rows: Rows, *, net: FusionNet | None = None) -> Tensor:
        """Read any samples, by their number in the store."""
        training_data, reader = self.training_data, self.net if net is None else net
        vectors = all(len(shape) == 1 for shape in training_data.shapes)
        size = _READ_AT_ONCE if vectors else training_data.config.finetune.batch_size
        mine, whole = rows[training_data.distributed.slice(len(rows))], bool(training_data.present[rows].all())

        def rows_of(part: Rows) -> list[Rows]:
            return [part if whole else part[training_data.present[part, j]] for j in range(len(training_data.shapes))]

        cut = [mine[start : start + size] for start in range(0, len(mine), size)] or [mine]
        training = reader.training
        reader.eval()
        found = []
        for some, inputs in training_data.store.stream(cut, rows_of):
            label = training_data.label[torch.from_numpy(some).to(training_data.device)]
            there = None if whole else torch.from_numpy(training_data.present[some]).to(training_data.device)
            found.append(what(reader(inputs, there), label).float())
        reader.train(training)
        return training_data.distributed.gather(torch.cat(found, dim=-1))

    def train_copy(self, loss: Loss, *, epochs: int) -> FusionNet:
        """See Lab.train_copy. The copy begins with a fresh optimiser at the rate of a first epoch."""
        training_data = self.training_data
        net = copy.deepcopy(self.net)
        optimization = Optimization(
            net,
            training_data.config.optim,
            device=training_data.device,
            distributed=training_data.distributed,
            by_modality=False,
        )
        finetune = training_data.config.finetune
        sampler = build_sampler(
            "uniform",
            training_data.pool,
            training_data.config.sampling,
            training_data.config.order,
            batch_size=finetune.batch_size,
            seed=training_data.chance("copy"),
            distributed=training_data.distributed,
        )
        net.train()
        for epoch in range(1, epochs + 1):
            optimization.begin_epoch(epoch, epochs=finetune.epochs)
            for number, batch in enumerate(training_data.batches(sampler.steps(epoch), epoch=epoch), start=1):
                optimization.begin_step(training_data.chance("copy", epoch, number))
                with optimization.autocast():
                    outputs = net(batch.inputs, batch.present)
                optimization.backward(loss(outputs, batch))
                optimization.apply()
        return net


def validate(reader: NetworkReader, *, net: FusionNet | None = None) -> Validation:
    """Read the validation samples: mean cross entropy and accuracy of the fused answer and of each modality."""

    def what(outputs: Outputs, label: Tensor) -> Tensor:
        right = torch.cat([outputs.fused[None], outputs.unimodal]).argmax(dim=2) == label
        return torch.cat([outputs.cross_entropy(label), right.float()])

    found = reader.read_validation(what, net=net).double().mean(dim=1).tolist()
    num = len(found) // 2
    return Validation(
        loss=found[0], own_loss=tuple(found[1:num]), accuracy=found[num], own_accuracy=tuple(found[num + 1 :])
    )
