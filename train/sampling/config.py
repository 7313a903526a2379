"""Configs of the samplers; importing them does not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...audit.errors import ConfigError, choices

# Where each sampler lives: adding one is one file and one line.
SAMPLERS = {
    "uniform": "ordered:Uniform",
    "bss-h": "ordered:BssH",
    "anti-curriculum": "ordered:AntiCurriculum",
    "bss-l": "bss_l:BssL",
    "dus-h": "dus:DusH",
    "dus-rl": "dus:DusRl",
    "smv": "smv:Smv",
    "class-balanced": "weighted:ClassBalanced",
    "posterior": "weighted:PosteriorWeighted",
}
ALONE = ("dus-h", "dus-rl")  # choose samples of one modality, which only losses of its own learn from
BETWEEN = (*ALONE, "smv")  # choose between modalities, so that there must be two
CURRICULA = ("bss-h", "anti-curriculum")  # begin with a share of the samples
SCORE_SOURCES = ("manifest", "model")
POLICIES = ("reinforce", "ppo")


@dataclass(frozen=True, slots=True, kw_only=True)
class BssConfig:
    """Balance scores of BSS (arXiv 2501.01470). Orders and draws are those of `order.*`.

    beta is the paper's; every_epochs = 8 is ours, so that scoring takes a twentieth of the time (its code has 1, with
    beta = 1).
    """

    score_source: str = "model"  # of bss-l: the model in training; or the manifest's probes, once
    every_epochs: int = 8  # E: epochs between two readings of the model
    beta: float = 0.6  # s_hat <- (1 - beta) s_hat + beta s
    alpha: float = 1.0  # weight of the fused term of the loss; the unimodal ones have weight 1

    def __post_init__(self) -> None:
        if self.score_source not in SCORE_SOURCES:
            raise ConfigError(
                f"sampling.bss.score_source is {self.score_source}: {choices(self.score_source, SCORE_SOURCES)}"
            )
        if self.every_epochs < 1:
            raise ConfigError(f"sampling.bss.every_epochs is {self.every_epochs}; it must be at least 1")
        if not 0 < self.beta <= 1:
            raise ConfigError(f"sampling.bss.beta is {self.beta}; it lies in (0, 1]")
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"sampling.bss.alpha is {self.alpha}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DusConfig:
    """Quantities of DUS (arXiv 2503.03792). What is sampled is the paper's; all constants are ours."""

    kappa: float = 1.0  # how strongly a modality that lags is given more
    dead_zone: float = 0.02  # spread of the cumulative confidences up to which all are given the batch size
    least: float = 0.25  # of the batch size
    most: float = 2.0
    paired: bool = True  # modalities share their samples as far as they go; otherwise each draws its own
    policy: str = "reinforce"  # of dus-rl, as all that follow; or ppo
    every_steps: int = 4  # between two choices, and of each reward
    hidden: int = 64
    lr: float = 1e-3
    eta: float = 1.0  # weight of the change of the fused confidence in the reward
    baseline: float = 0.9  # decay of the running mean of rewards
    clip: float = 0.2  # of ppo
    horizon: int = 16  # choices of ppo between two updates ...
    passes: int = 4  # ... and passes over them
    multipliers: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"sampling.dus.policy is {self.policy}: {choices(self.policy, POLICIES)}")
        if not 0 < self.least <= 1 <= self.most < math.inf:
            raise ConfigError("sampling.dus: least lies in (0, 1], and most is a number from 1 up")
        if not self.multipliers or not all(0 < each < math.inf for each in self.multipliers):
            raise ConfigError(f"sampling.dus.multipliers are {list(self.multipliers)}; give one or more, all above 0")
        for name in ("hidden", "every_steps", "horizon", "passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kappa", "dead_zone", "eta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be a number not below 0")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be a number above 0")
        if not 0 <= self.baseline < 1:
            raise ConfigError(f"sampling.dus.baseline is {self.baseline}; it lies in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmvConfig:
    """Resampling of SMV (CVPR 2024): 1 to 3 extra copies; when it is done is ours."""

    every_epochs: int = 5  # epochs between two readings of the model
    warmup_epochs: int = 5  # epochs before the first
    most_copies: int = 3

    def __post_init__(self) -> None:
        for name, least in (("every_epochs", 1), ("warmup_epochs", 0), ("most_copies", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"sampling.smv.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Constants of the samplers, by method."""

    bss: BssConfig = field(default_factory=BssConfig)
    dus: DusConfig = field(default_factory=DusConfig)
    smv: SmvConfig = field(default_factory=SmvConfig)
