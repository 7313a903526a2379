"""Methods of a fine-tuning by name: their configs, what they need of each other, and the table of all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..audit.errors import ConfigError, RunError, choices
from ..audit.parsing import build_config, plain
from ..audit.registry import Registry, read_arguments
from . import FUSIONS
from .balancing import BALANCERS
from .config import OWN_FUSION, REGRESSION_LOSSES, FinetuneConfig, TrainConfig
from .sampling import SAMPLERS

if TYPE_CHECKING:
    from .balancing.balancer import Balancer
    from .batches import Method
    from .fusion import Fusion
    from .sampling.sampler import Sampler

log = logging.getLogger("mmaudit")

REGISTRIES: dict[str, Registry] = {"sampler": SAMPLERS, "balancer": BALANCERS, "fusion": FUSIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """Classes and constants of the methods of a fine-tuning.

    config: All settings, with the names of the methods in place of "auto" and every constant of the methods in use.
    """

    config: TrainConfig
    sampler: type[Sampler]
    sampler_config: Any
    balancer: type[Balancer]
    balancer_config: Any
    fusion: type[Fusion]

    @property
    def has_own_heads(self) -> bool:
        """Whether each modality gets a separate head even where the fused classifier can be split by modality."""
        return self.config.finetune.own_heads or self.balancer.needs_own_heads(self.balancer_config)


def resolve(config: TrainConfig) -> Methods:
    """Resolve the methods of a fine-tuning by name, and check that they work together.

    Sections of methods that are not used are checked and left out of the result. Packages are imported only where a
    method or a section is theirs. A resolved config resolves to itself.

    Raises:
        ConfigError: A method, section or key does not exist, a value is out of range, or two settings contradict each
            other.
    """
    settings = config.finetune
    sampler: type[Sampler] = SAMPLERS.load(settings.sampling)
    balancing = _usual_balancing(settings, sampler) if settings.balancing == "auto" else settings.balancing
    balancer: type[Balancer] = BALANCERS.load(balancing)
    fusion_name, fusion = _resolve_fusion(settings, balancing, balancer)
    resolved = replace(settings, fusion=fusion_name, balancing=balancing)
    if sampler.selects_per_modality and not balancer.has_unimodal_loss:
        supported = [name for name in BALANCERS if BALANCERS.load(name).has_unimodal_loss]
        raise ConfigError(
            f"--sampling {settings.sampling} selects samples per modality, and --balancing {balancing} has no "
            f"unimodal loss that trains on them; use --balancing {', '.join(supported)}"
        )
    if settings.only is not None:
        _check_single_modality(resolved, sampler, balancer, fusion)
    sampler_config, sampling = _resolve_sections(SAMPLERS, sampler, config.sampling, axis="sampling")
    balancer_config, balancing_sections = _resolve_sections(BALANCERS, balancer, config.balancing, axis="balancing")
    config = replace(config, finetune=resolved, sampling=sampling, balancing=balancing_sections)
    sampler.check(sampler_config, config)
    balancer.check(balancer_config, config)
    if settings.accumulate > 1 and (reason := _accumulation_reason(balancing, balancer)):
        raise ConfigError(
            f"--balancing {balancing} does not train with finetune.accumulate = {settings.accumulate}: {reason}"
        )
    methods = Methods(
        config=config,
        sampler=sampler,
        sampler_config=sampler_config,
        balancer=balancer,
        balancer_config=balancer_config,
        fusion=fusion,
    )
    _check_answer(methods)
    if fusion.encodes_jointly and methods.has_own_heads:
        raise ConfigError(
            f"finetune.own_heads does not work with --fusion {fusion_name}: its features are not of one modality "
            "alone, and its unimodal logits have heads already"
        )
    return methods


def check_custom(name: str, method: type[Balancer]) -> None:
    """Raise ConfigError where a balancer needs more than a network of the user's has: a fusion of its own."""
    if "concat" not in method.fusions:
        raise ConfigError(f"balancing {name} does not work with a network of your own: {method.fusion_reason}")


def check_task(methods: Methods, task: str) -> None:
    """Raise ConfigError where the sampler, the balancer or a setting works with classes only, and the task has none."""
    settings = methods.config.finetune
    if task == "classification":
        return
    for option, method, config in (
        (f"--sampling {settings.sampling}", methods.sampler, methods.sampler_config),
        (f"--balancing {settings.balancing}", methods.balancer, methods.balancer_config),
    ):
        if reason := method.needs_classes(config):
            raise ConfigError(f"{option} needs classes, and the task is {task}: {reason}")
    if task == "regression" and settings.answer != "fused":
        raise ConfigError(
            f"finetune.answer = {settings.answer} adds logits, which of a regression each predict the whole number; "
            "use fused"
        )


def load_fusion(name: str) -> type[Fusion]:
    """Import the fusion that a model was trained with: one of FUSIONS, or that of a balancer.

    Raises RunError where there is none, as for a balancer of a package that is not installed.
    """
    if name in FUSIONS:
        fusion: type[Fusion] = FUSIONS.load(name)
        return fusion
    own_fusion: type[Fusion] | None = BALANCERS.load(name).own_fusion if BALANCERS.offers(name) else None
    if own_fusion is None:
        raise RunError(f"the model was trained with the fusion {name}, which is not installed")
    return own_fusion


def check_schedule(methods: Methods) -> list[str]:
    """Return one warning for each setting that never starts or never ends in so few epochs, or has no effect."""
    config = methods.config
    warnings = (
        methods.sampler.late_start(methods.sampler_config, config),
        methods.balancer.late_start(methods.balancer_config, config),
        config.optim.late_start(config.finetune.epochs),
    )
    too_few = [f"{config.finetune.epochs} epochs are too few: {warning}" for warning in warnings if warning]
    return too_few + config.optim.without_effect()


def list_unused(methods: Methods) -> list[str]:
    """Return one warning for each constant that was changed from its default and has no effect beside the others."""
    warnings = []
    for method, config in ((methods.sampler, methods.sampler_config), (methods.balancer, methods.balancer_config)):
        default = method.default_config()
        for name, reason in method.unused(config).items():
            if (value := getattr(config, name)) != getattr(default, name):
                warnings.append(f"{config.section}.{name} = {value} has no effect: {reason}")
    return warnings


def _accumulation_reason(name: str, balancer: type[Balancer]) -> str:
    """Return why a balancer does not accumulate gradients; one of a package must state that it does."""
    if name not in BALANCERS and "accumulation_reason" not in vars(balancer):
        return 'it does not state that it may, accumulation_reason = ""'
    return balancer.accumulation_reason


def list_ineffective(methods: Methods, *, task: str) -> list[str]:
    """Return one warning for each setting that another one makes ineffective."""
    settings = methods.config.finetune
    warnings = []
    if settings.regression_loss != REGRESSION_LOSSES[0] and task != "regression":
        warnings.append(f"finetune.regression_loss has no effect: the task is {task}")
    if settings.drop_last and methods.sampler.adaptive:
        warnings.append(
            f"finetune.drop_last has no effect: --sampling {settings.sampling} chooses the size of every step"
        )
    if settings.initialisation != "default" and settings.init is not None:
        warnings.append(f"finetune.initialisation has no effect: --init {settings.init} replaces all weights")
    return warnings


def _usual_balancing(settings: FinetuneConfig, sampler: type[Sampler]) -> str:
    """Return the balancer of `--balancing auto`, and log the reason where it is not joint."""
    option, name = f"--sampling {settings.sampling}", sampler.usual_balancing
    reason = sampler.balancing_reason
    is_chosen = settings.fusion != "auto" and settings.model is None
    fusion: type[Fusion] | None = FUSIONS.load(settings.fusion) if is_chosen else None
    if fusion is not None and fusion.usual_balancing != "joint":
        option, name, reason = f"--fusion {settings.fusion}", fusion.usual_balancing, fusion.balancing_reason
    if name != "joint" and os.environ.get("RANK", "0") == "0":  # torchrun: the first process only
        log.info("%s takes --balancing %s: %s", option, name, reason)
    return name


def _resolve_fusion(settings: FinetuneConfig, balancing: str, balancer: type[Balancer]) -> tuple[str, type[Fusion]]:
    """Return the fusion's name and type; ConfigError where the balancer does not work with it."""
    if settings.model is not None:
        from .custom_network import CustomFusion

        check_custom(balancing, balancer)
        return OWN_FUSION, CustomFusion
    names = _fusion_names(balancing, balancer)
    name = names[0] if settings.fusion == "auto" else settings.fusion
    fusion: type[Fusion] = balancer.own_fusion if balancer.own_fusion and name == balancing else FUSIONS.load(name)
    if name not in names:
        reason = balancer.fusion_reason or fusion.balancing_reason
        raise ConfigError(
            f"--balancing {balancing} does not support --fusion {name}: {reason}; use --fusion {' or '.join(names)}"
        )
    return name, fusion


def _fusion_names(balancing: str, balancer: type[Balancer]) -> tuple[str, ...]:
    """Return the fusions that a balancer works with, the usual one first."""
    return balancer.fusions if balancer.own_fusion is None else (balancing, *balancer.fusions)


def _check_single_modality(
    settings: FinetuneConfig, sampler: type[Sampler], balancer: type[Balancer], fusion: type[Fusion]
) -> None:
    """Raise ConfigError for a method that needs more than the modality of --only."""
    for option, method, advice in (
        (f"--balancing {settings.balancing}", balancer, "; use --balancing joint"),
        (f"--sampling {settings.sampling}", sampler, ""),
    ):
        if (minimum := method.min_modalities) > 1:
            raise ConfigError(
                f"--only {settings.only} leaves one modality, and {option} needs at least {minimum}{advice}"
            )
    if fusion.min_modalities > 1:
        raise ConfigError(f"--only {settings.only} leaves nothing to fuse: remove --fusion {settings.fusion}")


def _check_answer(methods: Methods) -> None:
    """Raise ConfigError for a tested answer that is the fused one in any case."""
    settings = methods.config.finetune
    if settings.answer != "fused" and methods.fusion.is_sum and not methods.has_own_heads:
        raise ConfigError(
            f"finetune.answer = {settings.answer} has no effect: the fused logits of --fusion {settings.fusion} are "
            "the sum of the unimodal ones; give the modalities heads of their own with --set finetune.own_heads=true"
        )


def _resolve_sections(
    registry: Registry, method: type[Method], sections: Mapping[str, Mapping[str, Any]], *, axis: str
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Check all sections of an axis; return the config of the method in use, and its section with all constants."""
    config_types = _config_types([method], axis=axis)
    own_section = next(iter(config_types), None)
    if not sections.keys() <= config_types.keys():
        config_types = _config_types([method, *map(registry.load, registry)], axis=axis)
    if not sections.keys() <= config_types.keys():
        installed = [registry.load(name) for name in registry.installed() if name in sections]
        config_types = _config_types([method, *map(registry.load, registry), *installed], axis=axis)
    config = method.default_config()
    for section, values in sections.items():
        if section not in config_types:
            names = [f"{axis}.{name}" for name in config_types]
            raise ConfigError(f"no config key {axis}.{section}; {choices(f'{axis}.{section}', names)}")
        built = build_config(config_types[section], values, where=f"{axis}.{section}.")
        config = built if section == own_section else config
    return config, {} if own_section is None else {own_section: plain(config)}


def _config_types(methods: Sequence[type[Method]], *, axis: str) -> dict[str, type[Any]]:
    """Return the config types of methods by section."""
    types = [method.config_type for method in methods if method.config_type is not None]
    return {type_.section.removeprefix(f"{axis}."): type_ for type_ in types}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    """One constant of a method: its key in the config, its default, and its meaning."""

    key: str
    default: Any
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method of a registry: paper, what it needs, and its constants."""

    kind: str
    name: str
    help: str
    paper: str = ""
    needs: tuple[str, ...] = ()
    keys: tuple[ConfigKey, ...] = ()


def list_methods(registries: Mapping[str, Registry] = REGISTRIES, *, details: bool = True) -> list[MethodRow]:
    """Return one row for each method of some registries, built in and installed.

    Args:
        registries: Registries by the kind of their methods.
        details: Import the built-in methods, for paper, needs and keys. Installed ones are not imported.

    Example:
        >>> [row.name for row in list_methods(details=False) if row.kind == "fusion"]
        ['concat', 'late', 'gated', 'gated-unit', 'film', 'film-projected', 'mmtm', 'mmtm-stages', 'shared']
    """
    rows = []
    for kind, registry in registries.items():
        for name, entry in registry.items():
            row = MethodRow(kind=kind, name=name, help=entry.help)
            rows.append(_with_details(row, registry.load(name)) if details else row)
        for name, point in sorted(registry.installed().items()):
            rows.append(MethodRow(kind=kind, name=name, help=f"installed: {point.value}"))
    return rows


def _with_details(row: MethodRow, method: Any) -> MethodRow:
    config_type = getattr(method, "config_type", None)
    keys = [] if config_type is None else _config_keys(config_type, section=config_type.section)
    if order_fields := getattr(method, "order_fields", ()):
        order_keys = _config_keys(type(TrainConfig().order), section="order")
        keys += [key for key in order_keys if key.key.removeprefix("order.") in order_fields]
    needs = method.needs() if hasattr(method, "needs") else ()
    return replace(row, paper=getattr(method, "paper", ""), needs=needs, keys=tuple(keys))


def _config_keys(config_type: type[Any], *, section: str) -> list[ConfigKey]:
    """Return the fields of a config, with their meaning from the section Args of its docstring."""
    meaning, defaults = read_arguments(config_type.__doc__ or ""), config_type()
    return [
        ConfigKey(key=f"{section}.{field.name}", default=getattr(defaults, field.name), meaning=meaning[field.name])
        for field in fields(config_type)
    ]
