"""Configs of the balancers; importing them does not load torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...audit.errors import ConfigError, choices

MSLR_MODES = ("keep", "smooth", "dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Class of a balancing method and what it needs of the network.

    Args:
        class_path: `module:Class` within this package.
        fusions: Fusions it works with, the usual one first.
        has_unimodal_loss: It has one loss per modality, which trains on samples that only that modality has.
        min_modalities: Fewest modalities it works with.
        own_heads: Its unimodal losses need heads that the fused prediction does not share.
        sets_rates: It sets one learning rate per modality.
    """

    class_path: str
    fusions: tuple[str, ...] = ("concat", "late", "gated", "film", "mmtm")
    has_unimodal_loss: bool = False
    min_modalities: int = 2
    own_heads: bool = False
    sets_rates: bool = False


BALANCERS = {  # a new method is one file and one line
    "joint": Method(class_path="balancer:Joint", min_modalities=1),
    "sum": Method(class_path="balancer:Sum", has_unimodal_loss=True, min_modalities=1),
    "modality-dropout": Method(class_path="modality_dropout:ModalityDropout"),
    "gmm": Method(class_path="gmm:Gmm", has_unimodal_loss=True),
    "ogm": Method(class_path="ogm:Ogm"),
    "ogm-ge": Method(class_path="ogm:OgmGe"),
    "gblend": Method(class_path="gblend:Gblend", has_unimodal_loss=True),
    "greedy": Method(class_path="greedy:Greedy", fusions=("mmtm",)),
    "pmr": Method(class_path="pmr:Pmr", has_unimodal_loss=True),
    "agm": Method(class_path="agm:Agm"),
    "mmpareto": Method(class_path="mmpareto:MmPareto", has_unimodal_loss=True, own_heads=True),
    "mses": Method(class_path="mses:Mses", has_unimodal_loss=True),
    "mslr": Method(class_path="mslr:Mslr", has_unimodal_loss=True, sets_rates=True),
    "mla": Method(class_path="mla:Mla", fusions=("shared",), has_unimodal_loss=True),
}


def _check_ranges(section: str, config: object, **bounds: tuple[float, float]) -> None:
    """Raise ConfigError for a number outside [low, high] (NaN is outside)."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"balancing.{section}.{name} is {value}; it must lie in [{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class GmmConfig:
    """Adaptive loss of arXiv 2510.21797 in mmaudit's form; all constants except the two stages are ours.

    Args:
        warmup_epochs: Epochs with the ordinary summed loss before the mixture is fitted.
        lam_gap: Weight of the modality gap.
        lam_align: Weight of the alignment term A.
        stop_strong: Pass no gradient of the gap through the stronger branch, so that weakening it closes no gap.
        fit_rows: Training samples, the same ones every time, that the mixture is refitted to before every epoch.
    """

    warmup_epochs: int = 10
    lam_gap: float = 1.0
    lam_align: float = 0.1
    stop_strong: bool = True
    fit_rows: int = 1_024

    def __post_init__(self) -> None:
        _check_ranges("gmm", self, warmup_epochs=(0, 1e9), lam_gap=(0, 1e9), lam_align=(0, 1e9), fit_rows=(10, 1e12))


@dataclass(frozen=True, slots=True, kw_only=True)
class OgmConfig:
    """OGM-GE (CVPR 2022).

    Args:
        alpha: Strength of the modulation; 0.1 to 0.8 in its code, the default is ours.
        first_epoch: First epoch with modulation, from 1.
        last_epoch: Last epoch with modulation.
    """

    alpha: float = 0.3
    first_epoch: int = 1
    last_epoch: int = 50

    def __post_init__(self) -> None:
        _check_ranges("ogm", self, alpha=(0, 1e3), first_epoch=(1, 1e9), last_epoch=(1, 1e9))
        if self.last_epoch < self.first_epoch:
            raise ConfigError(
                f"balancing.ogm.first_epoch is {self.first_epoch}, after last_epoch {self.last_epoch}: "
                "no epoch would be modulated"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GblendConfig:
    """G-Blending (CVPR 2020).

    Args:
        super_epoch: Epochs between two measurements of the loss weights.
        trial_epochs: Epochs for which the copies are trained (ours; the paper trains them for a super-epoch).
    """

    super_epoch: int = 10
    trial_epochs: int = 1

    def __post_init__(self) -> None:
        _check_ranges("gblend", self, super_epoch=(1, 1e9), trial_epochs=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyConfig:
    """Greedy (ICML 2022); the constants are ours.

    Args:
        alpha: Difference of conditional learning speeds, in powers of ten, that starts rebalancing.
        window: Number of rebalancing steps.
        rest: Ordinary steps after them, before the speeds are compared again.
    """

    alpha: float = 0.1
    window: int = 5
    rest: int = 3

    def __post_init__(self) -> None:
        _check_ranges("greedy", self, alpha=(0, 1e3), window=(1, 1e9), rest=(0, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class PmrConfig:
    """PMR (CVPR 2023).

    Args:
        alpha: Weight of the prototype loss (ours).
        momentum: Momentum of the prototypes, as in its code.
        last_epoch: Last epoch with the prototype loss (ours).
    """

    alpha: float = 1.0
    momentum: float = 0.5
    last_epoch: int = 50

    def __post_init__(self) -> None:
        _check_ranges("pmr", self, alpha=(0, 1e3), momentum=(0, 1), last_epoch=(0, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class AgmConfig:
    """AGM (ICCV 2023).

    Args:
        alpha: Strength of the modulation (ours).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_ranges("agm", self, alpha=(0, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class MmParetoConfig:
    """MMPareto (ICML 2024).

    Args:
        gamma: Factor on the combined gradient, as in its code.
    """

    gamma: float = 1.5

    def __post_init__(self) -> None:
        _check_ranges("mmpareto", self, gamma=(0, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class MsesConfig:
    """Modality-specific early stopping (2019), in mmaudit's form.

    Args:
        patience: Epochs without a lower unimodal validation loss after which a modality is frozen.
    """

    patience: int = 5

    def __post_init__(self) -> None:
        _check_ranges("mses", self, patience=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class MslrConfig:
    """Modality-specific learning rates (ACL Findings 2022), in mmaudit's form.

    Args:
        mode: One of MSLR_MODES.
        strength: Exponent of the mode "dynamic".
        min_factor: Smallest factor of a modality.
        max_factor: Largest factor of a modality.
    """

    mode: str = "dynamic"
    strength: float = 1.0
    min_factor: float = 0.1
    max_factor: float = 10.0

    def __post_init__(self) -> None:
        if self.mode not in MSLR_MODES:
            raise ConfigError(f"balancing.mslr.mode is {self.mode}: {choices(self.mode, MSLR_MODES)}")
        _check_ranges("mslr", self, strength=(0, 1e3), min_factor=(1e-9, 1), max_factor=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """MLA (CVPR 2024).

    Args:
        ridge: Ridge of the projection: how much of an earlier direction remains (ours).
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        _check_ranges("mla", self, ridge=(1e-12, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutConfig:
    """Modality dropout (Neverova et al., ModDrop, arXiv 1501.00102).

    Args:
        probability: Probability that a modality of a sample is dropped; one always remains (ours).
    """

    probability: float = 0.2

    def __post_init__(self) -> None:
        _check_ranges("dropout", self, probability=(0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancingConfig:
    """Constants of the balancers, by method."""

    gmm: GmmConfig = field(default_factory=GmmConfig)
    ogm: OgmConfig = field(default_factory=OgmConfig)
    gblend: GblendConfig = field(default_factory=GblendConfig)
    greedy: GreedyConfig = field(default_factory=GreedyConfig)
    pmr: PmrConfig = field(default_factory=PmrConfig)
    agm: AgmConfig = field(default_factory=AgmConfig)
    mmpareto: MmParetoConfig = field(default_factory=MmParetoConfig)
    mses: MsesConfig = field(default_factory=MsesConfig)
    mslr: MslrConfig = field(default_factory=MslrConfig)
    mla: MlaConfig = field(default_factory=MlaConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
