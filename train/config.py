"""Configs of fine-tuning; importing them does not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..audit.errors import ConfigError, choices
from ..rebalance.curriculum import OrderConfig
from .balancing.config import BALANCERS, BalancingConfig
from .sampling.config import ALONE, BETWEEN, CURRICULA, SAMPLERS, SamplingConfig

FUSIONS = ("concat", "late", "gated", "film", "mmtm", "shared")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LEAST_VALIDATION = 20  # samples that may choose an epoch: two of them chose the first of 60, at chance
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What is trained on which samples, and for how long. All constants are mmaudit's defaults."""

    fusion: str = "auto"  # concat, or what the balancing method needs
    sampling: str = "uniform"
    balancing: str = "joint"
    only: str | None = None  # one modality alone, by name
    init: str | None = None  # begin with the weights of another fine-tuning: a name in the run, a folder or a file
    keep_posterior: float | None = None  # train on samples with P(balanced) of at least this: GMM-filtered
    epochs: int = 60
    batch_size: int = 64  # samples a step, over all processes
    hidden: int = 128
    dropout: float = 0.3
    own_heads: bool = False  # a head of its own for each modality, also where the fused classifier can be split
    validation_fraction: float = 0.1  # of the training samples, one at least, where the source has no validation split
    patience: int = 0  # epochs without a better one on validation after which training stops; 0: never
    compile: bool = False  # torch.compile the network
    resident_mib: int = 4096  # inputs up to this size stay on the device; others are read as they are wanted
    save_steps: int = 0  # steps between two checkpoints within an epoch; 0: one after every epoch
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (
            ("fusion", ("auto", *FUSIONS)),
            ("sampling", tuple(SAMPLERS)),
            ("balancing", tuple(BALANCERS)),
        )
        for name, names in known:
            if getattr(self, name) not in names:
                raise ConfigError(f"--{name} {getattr(self, name)}: {choices(getattr(self, name), names)}")
        for name in self.report_to:
            if name not in TRACKERS:
                raise ConfigError(f"--report-to {name}: {choices(name, TRACKERS)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("hidden", 1), ("patience", 0), ("save_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.resident_mib < 0:
            raise ConfigError(f"finetune.resident_mib is {self.resident_mib}; it must be at least 0")
        for name in ("dropout", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.keep_posterior is not None and not 0 <= self.keep_posterior <= 1:
            raise ConfigError(f"--keep-posterior {self.keep_posterior}: a probability lies in [0, 1]")
        self._check_combination()

    @property
    def fusion_used(self) -> str:
        """The fusion: what was asked for, or what the balancing method usually has."""
        return BALANCERS[self.balancing].fusions[0] if self.fusion == "auto" else self.fusion

    def _check_combination(self) -> None:
        """Refuse what makes no sense together, with the reason."""
        method = BALANCERS[self.balancing]
        if self.fusion_used not in method.fusions:
            reasons = {
                "greedy": "it measures and cuts the cross-modal path, which no other fusion has",
                "mla": "it trains one classifier that all modalities share, by turns",
            }
            why = reasons.get(self.balancing, "a shared classifier is trained by turns, which only mla does")
            raise ConfigError(
                f"--balancing {self.balancing} does not go with --fusion {self.fusion_used}: {why}; "
                f"take --fusion {' or '.join(method.fusions)}"
            )
        if self.sampling in ALONE and not method.has_unimodal_loss:
            able = [name for name, each in BALANCERS.items() if each.has_unimodal_loss]
            raise ConfigError(
                f"--sampling {self.sampling} chooses samples for each modality, and --balancing {self.balancing} has "
                f"no loss of each modality's own to learn from them; take --balancing {', '.join(able)}"
            )
        if self.only is not None:
            if method.least > 1:
                raise ConfigError(
                    f"--only {self.only} leaves one modality, and --balancing {self.balancing} is between modalities; "
                    "take --balancing joint"
                )
            if self.sampling in BETWEEN:
                raise ConfigError(
                    f"--only {self.only} leaves one modality, and --sampling {self.sampling} chooses between modalities"
                )
            if self.fusion_used not in ("concat", "late"):
                raise ConfigError(f"--only {self.only} leaves nothing to fuse: leave --fusion {self.fusion} out")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """How weights move. All constants are mmaudit's defaults; BSS's are sgd, lr 1e-2, weight_decay 1e-4, step 70."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9  # of sgd
    schedule: str = "cosine"  # of the learning rate, by epoch
    warmup_epochs: int = 0
    lr_step: int = 70  # of the schedule "step": epochs after which the rate falls ...
    lr_fall: float = 0.1  # ... to this share
    modality_lr: tuple[str, ...] = ()  # NAME=FACTOR on the learning rate of a modality's encoder
    freeze: tuple[str, ...] = ()  # modalities whose encoders stay as they are
    clip_norm: float = 0.0  # of all gradients together; 0: never
    precision: str = "auto"  # bfloat16 on CUDA, float32 elsewhere
    ema: float = 0.0  # decay of a running mean of the weights, which is then what is tested; 0: none

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: {choices(getattr(self, name), known)}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ConfigError("optim.lr must be a number above 0, and optim.weight_decay one not below")
        for name in ("momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.warmup_epochs < 0 or self.lr_step < 1 or not 0 < self.lr_fall <= 1:
            raise ConfigError("optim: warmup_epochs is at least 0, lr_step at least 1, lr_fall in (0, 1]")
        if not 0 <= self.clip_norm < math.inf:
            raise ConfigError(f"optim.clip_norm is {self.clip_norm}; it must be a number not below 0")
        self.factors()

    def factors(self) -> dict[str, float]:
        """Give the factors of `modality_lr` by name."""
        found = {}
        for text in self.modality_lr:
            name, equals, factor = text.rpartition("=")
            try:
                found[name] = float(factor)
            except ValueError:
                equals = ""
            if not equals or not name or not 0 <= found[name] < math.inf:
                raise ConfigError(f"optim.modality_lr {text}: not of the form NAME=FACTOR, such as audio=0.1")
        return found

    def share_of_rate(self, epoch: int, *, epochs: int) -> float:
        """Give the share of the learning rate that epoch 1, 2, ... has: a pure function, so that nothing is stored.

        The first `warmup_epochs` rise evenly to 1. cosine: from 1 towards 0 over the others; step: times `lr_fall`
        every `lr_step` epochs of the whole training; constant: 1.
        """
        warm = self.warmup_epochs
        if epoch <= warm:
            return epoch / (warm + 1)
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (epoch - 1 - warm) / (epochs - warm))) / 2
        return self.lr_fall ** ((epoch - 1) // self.lr_step) if self.schedule == "step" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How inputs of networks are varied in training, never for scoring or testing. Vectors are left as they are."""

    pictures: bool = True  # crop and mirror, as in OGM-GE's code
    least_crop: float = 0.08  # of a picture's area
    flip: bool = True  # mirror one picture in two; not where left and right tell classes apart
    sound: bool = True  # SpecAugment (arXiv 1904.08779): its masks, without the warping
    time_masks: int = 2
    time_share: float = 0.1  # of the steps in time, the widest mask (ours)
    band_masks: int = 2
    band_share: float = 0.2  # of the mel bands, the widest mask (ours: 27 of 80 there)

    def __post_init__(self) -> None:
        if not 0 < self.least_crop <= 1:
            raise ConfigError(f"augment.least_crop is {self.least_crop}; it must be above 0 and at most 1")
        for name in ("time_masks", "band_masks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("time_share", "band_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; a share lies in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All sections that decide about a fine-tuning."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    width: float = 1.0  # of ResNet-18s, 1: whole

    def __post_init__(self) -> None:
        mode = self.balancing.mslr.mode
        if self.finetune.balancing == "mslr" and mode != "dynamic" and not self.optim.modality_lr:
            raise ConfigError(
                f"balancing.mslr.mode = {mode} begins with the rates of optim.modality_lr, and there are none; give "
                "some with --set 'optim.modality_lr=[\"audio=0.1\"]', or take the mode dynamic"
            )


def check_schedule(config: TrainConfig) -> list[str]:
    """Tell what never begins, or never ends, in so few epochs: one sentence for each."""
    chosen, optim, balancing = config.finetune, config.optim, config.balancing
    epochs, found = chosen.epochs, []
    if chosen.sampling in CURRICULA and (share := config.order.share(epochs)) < 1:
        found.append(
            f"--sampling {chosen.sampling} sees {math.floor(1000 * share) / 10:g}% of the training samples in the last "
            f"one, and never the others; it sees all from epoch {config.order.grow_epochs} on (order.grow_epochs)"
        )
    begins = {
        "smv": (chosen.sampling, config.sampling.smv.warmup_epochs + 1, "sampling.smv.warmup_epochs", "uniform"),
        "gmm": (chosen.balancing, balancing.gmm.warmup_epochs + 1, "balancing.gmm.warmup_epochs", "sum"),
        "ogm": (chosen.balancing, balancing.ogm.first_epoch, "balancing.ogm.first_epoch", "joint"),
        "ogm-ge": (chosen.balancing, balancing.ogm.first_epoch, "balancing.ogm.first_epoch", "joint"),
    }
    for name, (taken, first, setting, instead) in begins.items():
        if taken == name and epochs < first:
            found.append(f"{name} begins in epoch {first} ({setting}), and until then it is {instead}")
    if epochs <= optim.warmup_epochs:
        found.append(f"the learning rate is whole in epoch {optim.warmup_epochs + 1} only (optim.warmup_epochs)")
    elif optim.schedule == "step" and epochs <= optim.lr_step:
        found.append(f"the learning rate falls after epoch {optim.lr_step} only (optim.lr_step), and so is constant")
    return [f"{epochs} epochs are too few: {each}" for each in found]
