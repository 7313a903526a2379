"""Configs of the balancers; importing them does not load torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...audit.errors import ConfigError, choices

MSLR_MODES = ("keep", "smooth", "dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Where a method lives, `module:Class`, and what it needs.

    fusions: those it works with, its usual one first. learns_alone: it has a loss of each modality's own, which learns
    from samples that only that modality has. least: modalities it needs. own_heads: its unimodal losses want heads
    that the fused answer does not share. sets_rates: it gives modalities learning rates of their own.
    """

    home: str
    fusions: tuple[str, ...] = ("concat", "late", "gated", "film", "mmtm")
    has_unimodal_loss: bool = False
    least: int = 2
    own_heads: bool = False
    sets_rates: bool = False


# Adding a method is one file and one line.
BALANCERS = {
    "joint": Method(home="joint:Joint", least=1),
    "sum": Method(home="joint:Sum", has_unimodal_loss=True, least=1),
    "modality-dropout": Method(home="modality_dropout:ModalityDropout"),
    "gmm": Method(home="gmm:Gmm", has_unimodal_loss=True),
    "ogm": Method(home="ogm:Ogm"),
    "ogm-ge": Method(home="ogm:OgmGe"),
    "gblend": Method(home="gblend:Gblend", has_unimodal_loss=True),
    "greedy": Method(home="greedy:Greedy", fusions=("mmtm",)),
    "pmr": Method(home="pmr:Pmr", has_unimodal_loss=True),
    "agm": Method(home="agm:Agm"),
    "mmpareto": Method(home="mmpareto:MmPareto", has_unimodal_loss=True, own_heads=True),
    "mses": Method(home="mses:Mses", has_unimodal_loss=True),
    "mslr": Method(home="mslr:Mslr", has_unimodal_loss=True, sets_rates=True),
    "mla": Method(home="mla:Mla", fusions=("shared",), has_unimodal_loss=True),
}


def _in_range(section: str, config: object, **bounds: tuple[float, float]) -> None:
    """Raise ConfigError for a number outside [low, high] (NaN is outside)."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"balancing.{section}.{name} is {value}; it lies in [{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class GmmConfig:
    """The adaptive loss of arXiv 2510.21797, in mmaudit's form; all constants but the two stages are ours."""

    warmup_epochs: int = 10
    lam_gap: float = 1.0
    lam_align: float = 0.1
    stop_strong: bool = True  # no gradient of the gap through the stronger branch: it is not closed by spoiling that
    fit_rows: int = 1_024  # training samples, always the same, that the mixture is refitted to before every epoch

    def __post_init__(self) -> None:
        _in_range("gmm", self, warmup_epochs=(0, 1e9), lam_gap=(0, 1e9), lam_align=(0, 1e9), fit_rows=(10, 1e12))


@dataclass(frozen=True, slots=True, kw_only=True)
class OgmConfig:
    """OGM-GE (CVPR 2022). alpha is 0.1 to 0.8 in its code; the one here is ours."""

    alpha: float = 0.3
    first_epoch: int = 1
    last_epoch: int = 50

    def __post_init__(self) -> None:
        _in_range("ogm", self, alpha=(0, 1e3), first_epoch=(1, 1e9), last_epoch=(1, 1e9))
        if self.last_epoch < self.first_epoch:
            raise ConfigError(
                f"balancing.ogm.first_epoch is {self.first_epoch}, after the last_epoch, {self.last_epoch}: "
                "nothing would be modulated"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GblendConfig:
    """G-Blending (CVPR 2020)."""

    super_epoch: int = 10  # epochs between two measurements of the weights
    trial_epochs: int = 1  # epochs that the copies are trained for (ours: as many as a super-epoch there)

    def __post_init__(self) -> None:
        _in_range("gblend", self, super_epoch=(1, 1e9), trial_epochs=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyConfig:
    """Greedy (ICML 2022); the constants are ours."""

    alpha: float = 0.1  # difference of conditional learning speeds, in powers of ten, that starts a rebalancing
    window: int = 5  # rebalancing steps
    rest: int = 3  # ordinary steps after them, before the speeds are compared again

    def __post_init__(self) -> None:
        _in_range("greedy", self, alpha=(0, 1e3), window=(1, 1e9), rest=(0, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class PmrConfig:
    """PMR (CVPR 2023). The momentum is its code's, the rest ours."""

    alpha: float = 1.0
    momentum: float = 0.5  # of the prototypes
    last_epoch: int = 50

    def __post_init__(self) -> None:
        _in_range("pmr", self, alpha=(0, 1e3), momentum=(0, 1), last_epoch=(0, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class AgmConfig:
    """AGM (ICCV 2023). The constant is ours."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _in_range("agm", self, alpha=(0, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class MmParetoConfig:
    """MMPareto (ICML 2024). The constant is its code's."""

    gamma: float = 1.5

    def __post_init__(self) -> None:
        _in_range("mmpareto", self, gamma=(0, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class MsesConfig:
    """Modality-specific early stopping (2019), in mmaudit's form."""

    patience: int = 5  # epochs without a lower validation loss of its own after which a modality is frozen

    def __post_init__(self) -> None:
        _in_range("mses", self, patience=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class MslrConfig:
    """Modality-specific learning rates (ACL Findings 2022), in mmaudit's form."""

    mode: str = "dynamic"
    strength: float = 1.0  # of dynamic
    least: float = 0.1  # bounds of a modality's factor
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.mode not in MSLR_MODES:
            raise ConfigError(f"balancing.mslr.mode is {self.mode}: {choices(self.mode, MSLR_MODES)}")
        _in_range("mslr", self, strength=(0, 1e3), least=(1e-9, 1), most=(1, 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """MLA (CVPR 2024). The constant is ours."""

    ridge: float = 1e-3  # of the projection: how much of a direction that was seen is left

    def __post_init__(self) -> None:
        _in_range("mla", self, ridge=(1e-12, 1e3))


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutConfig:
    """Modality dropout (Neverova et al., ModDrop, arXiv 1501.00102); the probability is ours."""

    probability: float = 0.2  # that a modality of a sample is dropped; one is always left

    def __post_init__(self) -> None:
        _in_range("dropout", self, probability=(0, 1))


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
