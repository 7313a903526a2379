"""Configs of fine-tuning; importing them does not load torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..audit.errors import ConfigError
from ..audit.parsing import check_choices, check_ranges
from ..rebalance.curriculum import OrderConfig
from . import TRACKERS

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "step", "constant")
OWN_FUSION = "own"  # name of the fusion of a network of the user's
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
REGRESSION_LOSSES = ("l1", "mse")
KEEP = ("best", "last")
INITIALISATIONS = ("default", "xavier")
ANSWERS = ("fused", "heads", "all")  # which logits are the prediction of all modalities together
# Fewest validation samples that may select an epoch: two of them selected the first of 60, at chance accuracy.
MIN_VALIDATION_SAMPLES = 20


def parse_factors(key: str, entries: Sequence[str], *, example: str) -> dict[str, float]:
    """Return the factors, at least 0, of NAME=FACTOR entries by name; ConfigError for an entry of another form."""
    factors: dict[str, float] = {}
    for text in entries:
        name, equals, factor = text.rpartition("=")
        if name in factors:
            raise ConfigError(f"{key} has {name} twice; each name may have one factor")
        try:
            factors[name] = float(factor)
        except ValueError:
            equals = ""
        if not equals or not name or not 0 <= factors[name] < math.inf:
            raise ConfigError(f"{key} {text}: not of the form NAME=FACTOR, such as {example}")
    return factors


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) of the models of finetune.end_to_end. The defaults are ours.

    Only adapters, fusion and heads are trained then, and only they are saved. Needs peft: pip install "mmaudit[lora]".

    Args:
        rank: Rank of the adapters; 0: none, the whole models are trained.
        alpha: Scale of the adapters: their output is multiplied by alpha / rank.
        dropout: Dropout probability of the adapters' inputs, in [0, 1).
        target_modules: Layers that get an adapter, by the end of their names, such as "q_proj"; none named: all linear
            layers.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges("finetune.lora", self, rank="[0, inf)", alpha="(0, inf)", dropout="[0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What is trained, on which samples, and for how long. All default values are mmaudit's own.

    Args:
        model: A network of yours in place of mmaudit's: package.module:factory, where
            `factory(modalities, shapes, num_classes)` returns an nn.Module, see MultimodalModel; None: mmaudit's.
        fusion: One of FUSIONS, or "auto": the usual fusion of the balancing method, "concat" for most. That of a
            network of yours is "own".
        sampling: Name of the sampler, one of SAMPLERS or installed.
        balancing: Name of the balancing method, one of BALANCERS or installed, or "auto": the usual one of the sampler
            or fusion, "joint" for most.
        only: Name of the one modality to train on; None trains on all.
        init: Start from the weights of another fine-tuning: its name in the run, a folder or a file.
        keep_posterior: Train only on samples with P(balanced) of at least this value (GMM-filtered fine-tuning).
        end_to_end: Names of modalities whose pretrained encoder, hf:MODEL, is trained with the rest, from the inputs of
            the model; that of the others is frozen, and its vectors are read.
        lora: Low-rank adapters of these encoders, of which nothing else is trained then.
        gradient_checkpointing: Compute the activations of these encoders again in the backward pass instead of keeping
            them: less memory, more time, the same gradients.
        epochs: Number of epochs, at least 1.
        batch_size: Samples per step, over all processes; with `accumulate`, of each of its parts.
        accumulate: Parts of `batch_size` samples whose gradients are summed for one step of the optimiser: as one
            batch of accumulate x batch_size samples, but batch normalisation, which sees one part at a time.
        hidden: Width of the vector encoders and of layers that the fusion adds.
        dropout: Dropout probability in [0, 1).
        own_heads: Give each modality a separate head even where the fused classifier can be split by modality.
        answer: Logits that are validated, selected by and tested as the prediction of all modalities: "fused", those
            of the fusion; "heads", the sum of the unimodal ones; "all", the sum of both. BSS tests "heads" on CREMA-D
            and "all" on Kinetics-Sounds. It is recorded with the model, and metrics name it "fused" in any case.
        regression_loss: Loss of a regression, of the target in standard deviations: "l1", the absolute error, or
            "mse", the squared one.
        initialisation: Random weights before training: "default", those of PyTorch and of the ResNet-18; "xavier",
            those of the code of OGM-GE and BSS: linear layers normal by Xavier's rule with biases of 0, convolutions
            normal by He's rule (fan out).
        drop_last: Leave out the last batch of an epoch where it is smaller than the others; an epoch that has no other
            keeps it. Without effect on samplers that choose their quantities from step to step.
        keep: Epoch whose weights are the result: "best" on the validation split, or "last", as in the papers, which
            have no validation split.
        validation_fraction: Share of the training samples, at least one, cut off as validation split where the source
            has none; in [0, 1). With keep = "last" it may be 0: all training samples are trained on.
        patience: Stop after this many epochs without a better validation result; 0 never stops early.
        compile: Compile the network with torch.compile.
        resident_mib: Inputs of up to this many MiB stay on the device; the others are read ahead from the cache.
        read_ahead_mib: Memory in MiB of the batches that are read ahead, in each process. Results do not depend on it;
            the more, the larger the parts of the files that are read at once.
        save_steps: Steps between two checkpoints within an epoch; 0 writes one after every epoch only.
        report_to: Experiment trackers, any of TRACKERS.
    """

    model: str | None = None
    fusion: str = "auto"
    sampling: str = "uniform"
    balancing: str = "auto"
    only: str | None = None
    init: str | None = None
    keep_posterior: float | None = None
    end_to_end: tuple[str, ...] = ()
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    epochs: int = 60
    batch_size: int = 64
    accumulate: int = 1
    hidden: int = 128
    dropout: float = 0.3
    own_heads: bool = False
    answer: str = "fused"
    regression_loss: str = "l1"
    initialisation: str = "default"
    drop_last: bool = False
    keep: str = "best"
    validation_fraction: float = 0.1
    patience: int = 0
    compile: bool = False
    resident_mib: int = 4096
    read_ahead_mib: int = 512
    save_steps: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.report_to:
            TRACKERS.check(name)
        choices = {"answer": ANSWERS, "regression_loss": REGRESSION_LOSSES}
        check_choices("finetune", self, initialisation=INITIALISATIONS, keep=KEEP, **choices)
        from_one = ("epochs", "batch_size", "accumulate", "hidden", "read_ahead_mib")
        check_ranges("finetune", self, **dict.fromkeys(from_one, "[1, inf)"))
        check_ranges("finetune", self, **dict.fromkeys(("patience", "save_steps", "resident_mib"), "[0, inf)"))
        check_ranges("finetune", self, dropout="[0, 1)", validation_fraction="[0, 1)", keep_posterior="[0, 1]")
        if self.model is not None:
            self._check_model(self.model)
        if self.keep == "last" and self.patience:
            raise ConfigError("finetune.patience stops by the best epoch, and finetune.keep is last: set one of them")

    @property
    def step_size(self) -> int:
        """Samples of a step of the optimiser, over all processes."""
        return self.batch_size * self.accumulate

    def _check_model(self, model: str) -> None:
        """Raise ConfigError for a name of another form, and for settings of mmaudit's own networks."""
        if not all(model.partition(":")):
            raise ConfigError(f"finetune.model {model}: not of the form package.module:factory, such as nets:build")
        if self.fusion not in ("auto", OWN_FUSION):
            raise ConfigError(
                f"--model {model}: a network of your own fuses its features itself; remove --fusion {self.fusion}, or "
                "where a file or preset sets it, pass --fusion auto"
            )
        if self.end_to_end:
            raise ConfigError(
                f"--model {model}: finetune.end_to_end is for mmaudit's own networks; one of your own loads its models "
                "itself"
            )
        if self.init is not None:
            raise ConfigError(
                f"--init {self.init} loads weights of mmaudit's own networks; load those of yours in {model}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """How weights are updated. All default values are mmaudit's own; BSS uses sgd, lr 1e-2, weight_decay 1e-4, step 70.

    Args:
        optimizer: One of OPTIMIZERS: adamw subtracts the weight decay from the weights, adam and sgd add it to the
            gradients.
        lr: Learning rate, above 0.
        weight_decay: Weight decay, at least 0.
        momentum: Momentum of sgd, in [0, 1).
        schedule: Schedule of the learning rate over epochs, one of SCHEDULES.
        warmup_epochs: Epochs in which the learning rate rises to its full value.
        lr_step: Epochs after which the schedule "step" multiplies the learning rate by lr_fall.
        lr_fall: Factor of the schedule "step", in (0, 1].
        modality_lr: NAME=FACTOR entries, each a factor on the learning rate of that modality's encoder.
        freeze: Names of modalities whose encoders are not trained.
        clip_norm: Largest norm of all gradients together; 0 does not clip.
        precision: One of PRECISIONS; "auto" is bfloat16 on CUDA and float32 elsewhere.
        ema: Decay in [0, 1) of a running mean of the weights, which is then evaluated; 0 keeps none.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup_epochs: int = 0
    lr_step: int = 70
    lr_fall: float = 0.1
    modality_lr: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    clip_norm: float = 0.0
    precision: str = "auto"
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_choices("optim", self, optimizer=OPTIMIZERS, schedule=SCHEDULES, precision=PRECISIONS)
        check_ranges("optim", self, lr="(0, inf)", weight_decay="[0, inf)", momentum="[0, 1)", ema="[0, 1)")
        check_ranges("optim", self, warmup_epochs="[0, inf)", lr_step="[1, inf)", lr_fall="(0, 1]")
        check_ranges("optim", self, clip_norm="[0, inf)")
        if self.modality_lr:
            self.modality_lr_factors()

    def modality_lr_factors(self) -> dict[str, float]:
        """Return the factors of `modality_lr` by modality name."""
        return parse_factors("optim.modality_lr", self.modality_lr, example="audio=0.1")

    def lr_multiplier(self, epoch: int, *, epochs: int) -> float:
        """Return the factor in [0, 1] on the learning rate in epoch 1, 2, ...: a pure function, so nothing is stored.

        The first `warmup_epochs` rise evenly to 1. cosine: from 1 towards 0 over the remaining epochs; step: times
        `lr_fall` every `lr_step` epochs of the whole training; constant: 1.
        """
        warmup_epochs = self.warmup_epochs
        if epoch <= warmup_epochs:
            return epoch / (warmup_epochs + 1)
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (epoch - 1 - warmup_epochs) / (epochs - warmup_epochs))) / 2
        return self.lr_fall ** ((epoch - 1) // self.lr_step) if self.schedule == "step" else 1.0

    def without_effect(self) -> list[str]:
        """Return one warning for each setting that was changed and has no effect beside the others."""
        needs = {
            "momentum": (self.optimizer == "sgd", f"optim.optimizer {self.optimizer}"),
            "lr_step": (self.schedule == "step", f"optim.schedule {self.schedule}"),
            "lr_fall": (self.schedule == "step", f"optim.schedule {self.schedule}"),
        }
        default = {field.name: field.default for field in fields(self)}
        return [
            f"optim.{name} {getattr(self, name):g} has no effect with {setting}"
            for name, (has_effect, setting) in needs.items()
            if not has_effect and getattr(self, name) != default[name]
        ]

    def late_start(self, epochs: int) -> str | None:
        """Return a warning if the learning rate never reaches its full value, or never falls, in so few epochs."""
        if epochs <= self.warmup_epochs:
            first_epoch = self.warmup_epochs + 1
            return f"the learning rate is at its full value only from epoch {first_epoch} on (optim.warmup_epochs)"
        if self.schedule == "step" and epochs <= self.lr_step:
            return f"the learning rate falls only after epoch {self.lr_step} (optim.lr_step) and stays constant"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Augmentation of pictures and spectrograms in training, never in scoring or testing. Vectors are not changed.

    Args:
        pictures: Crop and mirror pictures, as in OGM-GE's code.
        min_crop: Smallest crop, as a share of the picture's area in (0, 1].
        flip: Mirror half of the pictures; turn off where left and right distinguish classes.
        frames: Of media.network_frame_choices frames of a segment train on one at random, not on the middle one.
        sound: Apply the masks of SpecAugment (arXiv 1904.08779), without its time warping.
        time_masks: Number of masks along time.
        time_share: Widest time mask, as a share of the time steps (our value).
        band_masks: Number of masks along the mel bands.
        band_share: Widest band mask, as a share of the mel bands (our value; SpecAugment: 27 of 80).
    """

    pictures: bool = True
    min_crop: float = 0.08
    flip: bool = True
    frames: bool = True
    sound: bool = True
    time_masks: int = 2
    time_share: float = 0.1
    band_masks: int = 2
    band_share: float = 0.2

    def __post_init__(self) -> None:
        check_ranges("augment", self, min_crop="(0, 1]", time_masks="[0, inf)", band_masks="[0, inf)")
        check_ranges("augment", self, time_share="[0, 1]", band_share="[0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All sections of a fine-tuning's settings.

    Args:
        finetune: What is trained, on which samples, and for how long.
        optim: How weights are updated.
        augment: Augmentation of pictures and spectrograms.
        order: Order of samples within epochs.
        sampling: Constants of samplers, {section: {key: value}}; `methods.resolve` checks and completes them.
        balancing: Constants of balancing methods, in the same form.
        width: Width of the ResNet-18 encoders; 1 is the full width.
        normalise_pictures: Normalisation of their pictures, see NetworkConfig.
        normalise_sound: Normalisation of their spectrograms, see NetworkConfig.
    """

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    balancing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    width: float = 1.0
    normalise_pictures: str = "data"
    normalise_sound: str = "data"
