"""Configs of the samplers; importing them does not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...audit.errors import ConfigError, choices

# `module:Class` of each sampler. A new sampler is one file and one line.
SAMPLERS = {
    "uniform": "ordered:Uniform",
    "bss-h": "ordered:BssH",
    "anti-curriculum": "ordered:AntiCurriculum",
    "bss-l": "bss_l:BssL",
    "dus-h": "dus:DusH",
    "dus-rl": "dus:DusRl",
    "smv": "smv:Smv",
    "class-balanced": "ordered:ClassBalanced",
    "posterior": "ordered:PosteriorWeighted",
}
UNIMODAL_SAMPLERS = ("dus-h", "dus-rl")  # select samples per modality, which only unimodal losses train on
CROSS_MODAL_SAMPLERS = (*UNIMODAL_SAMPLERS, "smv")  # compare modalities, so at least two are needed
CURRICULUM_SAMPLERS = ("bss-h", "anti-curriculum")  # start with a share of the samples
SCORE_SOURCES = ("manifest", "model")
POLICIES = ("reinforce", "ppo")


@dataclass(frozen=True, slots=True, kw_only=True)
class BssConfig:
    """Balance scores of BSS (arXiv 2501.01470). Orders and draws are set by `order.*`.

    Args:
        score_source: Scores that bss-l draws by, one of SCORE_SOURCES: those of the model in training, or the
            manifest's probe scores, read once.
        every_epochs: E, epochs between two evaluations of the model. 8 is ours, so that scoring takes a twentieth of
            the time; the authors' code has 1, with beta = 1.
        beta: Weight of new scores in the running score, s_hat <- (1 - beta) s_hat + beta s; the paper's value.
        alpha: Weight of the fused term of the loss; the unimodal terms have weight 1.
    """

    score_source: str = "model"
    every_epochs: int = 8
    beta: float = 0.6
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.score_source not in SCORE_SOURCES:
            raise ConfigError(
                f"sampling.bss.score_source is {self.score_source}: {choices(self.score_source, SCORE_SOURCES)}"
            )
        if self.every_epochs < 1:
            raise ConfigError(f"sampling.bss.every_epochs is {self.every_epochs}; it must be at least 1")
        if not 0 < self.beta <= 1:
            raise ConfigError(f"sampling.bss.beta is {self.beta}; it must lie in (0, 1]")
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"sampling.bss.alpha is {self.alpha}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DusConfig:
    """Quantities of DUS (arXiv 2503.03792). What is sampled is the paper's; all constants are ours.

    Args:
        kappa: How strongly a weaker modality gets more samples.
        dead_zone: Spread of the cumulative confidences up to which every modality gets the batch size.
        min_share: Fewest samples of a modality per step, as a share of the batch size.
        max_share: Most samples of a modality per step, as a multiple of the batch size.
        paired: Modalities share their samples as far as their quantities allow; otherwise each draws independently.
        policy: Learning rule of dus-rl, one of POLICIES; the fields below are of dus-rl too.
        every_steps: Steps between two actions, and the span of each reward.
        hidden: Hidden units of the policy network.
        lr: Learning rate of the policy.
        eta: Weight of the change of the fused confidence in the reward.
        baseline: Decay of the running mean of rewards.
        clip: Clipping range of ppo.
        horizon: Actions between two updates of ppo.
        passes: Passes over them in each update of ppo.
        multipliers: Multiples of the batch size that the policy chooses from.
    """

    kappa: float = 1.0
    dead_zone: float = 0.02
    min_share: float = 0.25
    max_share: float = 2.0
    paired: bool = True
    policy: str = "reinforce"
    every_steps: int = 4
    hidden: int = 64
    lr: float = 1e-3
    eta: float = 1.0
    baseline: float = 0.9
    clip: float = 0.2
    horizon: int = 16
    passes: int = 4
    multipliers: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"sampling.dus.policy is {self.policy}: {choices(self.policy, POLICIES)}")
        if not 0 < self.min_share <= 1 <= self.max_share < math.inf:
            raise ConfigError(
                "sampling.dus: min_share must lie in (0, 1], and max_share must be a number of at least 1"
            )
        if not self.multipliers or not all(0 < multiplier < math.inf for multiplier in self.multipliers):
            raise ConfigError(f"sampling.dus.multipliers are {list(self.multipliers)}; give one or more, all above 0")
        for name in ("hidden", "every_steps", "horizon", "passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kappa", "dead_zone", "eta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be a number of at least 0")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"sampling.dus.{name} is {getattr(self, name)}; it must be a number above 0")
        if not 0 <= self.baseline < 1:
            raise ConfigError(f"sampling.dus.baseline is {self.baseline}; it must lie in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmvConfig:
    """Resampling of SMV (CVPR 2024): 1 to 3 extra copies; when it takes place is ours.

    Args:
        every_epochs: Epochs between two evaluations of the model.
        warmup_epochs: Epochs before the first evaluation.
        max_copies: Most extra copies of a sample in a modality.
    """

    every_epochs: int = 5
    warmup_epochs: int = 5
    max_copies: int = 3

    def __post_init__(self) -> None:
        for name, minimum in (("every_epochs", 1), ("warmup_epochs", 0), ("max_copies", 1)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"sampling.smv.{name} is {getattr(self, name)}; it must be at least {minimum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Constants of the samplers, by method."""

    bss: BssConfig = field(default_factory=BssConfig)
    dus: DusConfig = field(default_factory=DusConfig)
    smv: SmvConfig = field(default_factory=SmvConfig)
