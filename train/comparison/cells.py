"""Cells of a comparison: methods as text, controls, and epochs at equal samples seen."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...audit.errors import ConfigError, choices
from ...audit.hashing import digest, hash_rank
from .. import FUSIONS
from ..balancing import BALANCERS
from ..config import TrainConfig
from ..examples import Examples
from ..presets import PRESETS
from ..sampling import SAMPLERS
from ..sampling.sampler import Paced
from .metrics import CLASS_PREFIX, MISSING_PREFIX

log = logging.getLogger("mmaudit")

MAX_CLASSES = 30  # of which there are subsets; ours
CURRICULA = ("bss-h", "balanced-first")  # samplers that anti-curriculum controls
_SHUFFLED = "shuffled:"
_METHOD = re.compile(r"(?P<head>(?:preset:)?[^:\s]+)\s*(?::\s*(?P<settings>\S.*))?")
_NEXT_SETTING = re.compile(r"[,\s]\s*(?=[a-z_]+\.[\w.-]+=)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A method of a comparison: names of its parts, or a preset, and settings such as balancing.ogm.alpha=0.8.

    only: train on one modality. shuffled: train on shuffled labels.
    """

    name: str
    preset: str | None = None
    sampling: str | None = None
    balancing: str | None = None
    fusion: str | None = None
    settings: tuple[str, ...] = ()
    only: str | None = None
    shuffled: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder, unique among methods."""
        return folder_name(self.name)

    def keywords(self) -> dict[str, str | None]:
        """Return the parts as settings."""
        parts = {name: getattr(self, name) for name in ("sampling", "balancing", "fusion", "only")}
        return {f"finetune.{name}": value for name, value in parts.items()}


def folder_name(text: str) -> str:
    """Return a name of a folder for a text: itself where it is plain, else made of its plain part and a digest."""
    plain = re.sub(r"[^A-Za-z0-9.+=-]+", "-", text)[:60].strip("-.")
    return plain if plain == text else f"{plain}-{digest(text.encode())[:8]}"


def parse_method(text: str) -> MethodSpec:
    """Parse PART+PART: SETTING SETTING, where parts are a sampler, a balancer and a fusion, or preset:NAME.

    After `shuffled:` it is the same method on shuffled labels of the training samples, a control.

    Raises:
        ConfigError: A part does not exist (the message names the nearest), or two parts are of the same kind.

    Example:
        >>> parse_method("bss-h+sum: finetune.hidden=64").sampling
        'bss-h'
    """
    if text.strip().startswith(_SHUFFLED):
        return replace(parse_method(text.strip().removeprefix(_SHUFFLED)), name=text.strip(), shuffled=True)
    match = _METHOD.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--method {text!r}: not of the form NAME+NAME: SECTION.KEY=VALUE, such as bss-h+sum")
    settings = tuple(_NEXT_SETTING.split(match["settings"].strip())) if match["settings"] else ()
    wrong = [setting for setting in settings if "=" not in setting]
    if wrong:
        raise ConfigError(f"--method {text!r}: {wrong[0]!r} is not of the form SECTION.KEY=VALUE")
    kind, _, preset = match["head"].rpartition("preset:")
    if preset != match["head"] and not kind:
        if preset not in PRESETS:
            raise ConfigError(f"--method {text!r}: no preset {preset}; {choices(preset, PRESETS)}")
        return MethodSpec(name=text.strip(), preset=preset, settings=settings)
    parts: dict[str, str] = {}
    for part in match["head"].split("+"):
        axis = _axis(part, text)
        if axis in parts:
            raise ConfigError(f"--method {text!r}: {parts[axis]} and {part} are both of the kind {axis}")
        parts[axis] = part
    return MethodSpec(
        name=text.strip(),
        sampling=parts.get("sampling"),
        balancing=parts.get("balancing"),
        fusion=parts.get("fusion"),
        settings=settings,
    )


def _axis(part: str, text: str) -> str:
    registries = {"sampling": SAMPLERS, "balancing": BALANCERS, "fusion": FUSIONS}
    for axis, registry in registries.items():
        if part in registry.names():
            return axis
    names = [name for registry in registries.values() for name in registry.names()]
    raise ConfigError(f"--method {text!r}: no method {part}; {choices(part, names)}; mmaudit methods lists them")


def anti_curriculum(method: MethodSpec, *, sampling: str) -> MethodSpec | None:
    """Return the control of a method by its sampler: the same in the opposite order; None where there is no such."""
    if sampling not in CURRICULA:
        return None
    name = f"anti-curriculum for {method.name}"
    return replace(method, name=name, sampling="anti-curriculum")


def planned_epochs(config: TrainConfig, *, num_train: int, budget: int) -> int:
    """Return the smallest number of epochs in which a training reads at least `budget` samples.

    Of a curriculum, epochs are the share of the samples that its pacing uses. Other samplers read `num_train` samples
    per epoch, or as their method has it: `finetune_on` ends at the budget in any case.
    """
    if num_train < 1 or budget < 1:
        return 1
    if not issubclass(SAMPLERS.load(config.finetune.sampling), Paced):
        return -(-budget // num_train)
    num_seen, epoch = 0, 0
    while num_seen < budget and config.order.share(epoch + 1) < 1:
        epoch += 1
        num_seen += max(1, int(num_train * config.order.share(epoch)))
    return max(1, epoch + -(-max(0, budget - num_seen) // num_train))


def class_and_missing_subsets(examples: Examples, rows: NDArray[np.intp]) -> dict[str, NDArray[np.bool_]]:
    """Return masks of test rows (b,): `class:NAME` of each class, and `missing:MODALITY` where some lack a modality.

    Of more than MAX_CLASSES classes only the rarest and the most frequent among the test samples, half of each.
    """
    counts = np.bincount(examples.label[rows], minlength=len(examples.class_names))
    by_count = [index for index in np.argsort(counts, kind="stable").tolist() if counts[index]]
    if len(by_count) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        log.info(
            "subsets of classes: the %d rarest and the %d most frequent of %d among the test samples",
            half, half, len(by_count),
        )  # fmt: skip
        by_count = by_count[:half] + by_count[-half:]
    masks = {
        f"{CLASS_PREFIX}{examples.class_names[index]}": examples.label[rows] == index for index in sorted(by_count)
    }
    is_missing = ~examples.present[rows]
    for column, modality in enumerate(examples.modalities):
        if is_missing[:, column].any():
            masks[f"{MISSING_PREFIX}{modality}"] = is_missing[:, column]
    return masks


def shuffle_labels(examples: Examples, *, seed: int) -> Examples:
    """Permute the labels of the training samples, and those of the validation samples, independently of their order."""
    label = examples.label.copy()
    for split in ("train", "validation"):
        rows = examples.rows(split)
        order = np.argsort(hash_rank(examples.ids(rows), seed=seed, purpose="shuffled labels"), kind="stable")
        label[rows] = label[rows][order]
    return replace(examples, label=label)
