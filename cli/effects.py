"""Settings that have no effect in a command, named in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..audit.dataset.modalities import Modality
from ..audit.errors import ConfigError
from ..audit.features.encoders import ENCODERS, is_network, is_pretrained
from ..audit.media.files import MediaConfig
from ..audit.parsing import build_config, plain, provenance_section
from ..rebalance.curriculum import OrderConfig
from ..rebalance.manifest import Manifest, ManifestFile, states_split
from ..train.examples import Examples
from ..train.sampling import SAMPLERS
from .config import NETWORK_FIELDS, Given, RunConfig, without_none

log = logging.getLogger("mmaudit")

HasEffect = Callable[[str], bool]
_OF_MLP = ("hidden", "epochs", "lr", "dropout", "batch_size", "decays")
_OF_LINEAR = ("l2_penalties", "gaussian", "choice_rows", "max_steps", "tolerance")
_OF_OWN_NETWORKS = ("hidden", "dropout", "initialisation")  # of mmaudit's networks, not of the user's
_OF_NETWORKS = ("folds", "repeats", "learn_from", "control")  # of the section probe, also where all probes are networks


def warn_without_effect(
    command: str, given: Given, has_effect: HasEffect, *, recorded: Mapping[str, Any] | None = None
) -> None:
    """Log one line that names the settings made by the user that have no effect in a command.

    recorded: Config of the scores that the command uses. A setting equal to it was in effect there, and is not named.
    """
    unused: dict[str, list[str]] = {}
    for key, setting in given.items():
        if not (has_effect(key) or setting.is_default or (recorded and _is_recorded(recorded, key, setting.value))):
            unused.setdefault(setting.source, []).append(key)
    if unused:
        listed = "; ".join(f"{', '.join(keys)} ({source})" for source, keys in unused.items())
        log.warning("settings without effect in mmaudit %s: %s", command, listed)


def _is_recorded(recorded: Mapping[str, Any], key: str, value: Any) -> bool:
    """Return whether a config as plain values holds this value of a key."""
    content: Any = recorded
    for name in key.split("."):
        if not isinstance(content, Mapping) or name not in content:
            return False
        content = content[name]
    return bool(content == value)


def with_engine(has_effect: HasEffect, ray: object | None) -> HasEffect:
    """Return whether a setting has an effect in a command that uses Ray, if `ray` is not None."""
    return lambda key: ray is not None if key.startswith("ray.") else has_effect(key)


def effects_in_scoring(config: RunConfig, modalities: Sequence[Modality]) -> HasEffect:
    """Return whether a setting has an effect in `score`."""
    networks = [is_network(modality) for modality in modalities]
    without = {f"probe.{name}" for name in (_OF_LINEAR if config.probe.kind == "mlp" else _OF_MLP)}
    if any(networks):
        without.add("probe.joint")
    media = _media_keys(config, modalities)

    def has_effect(key: str) -> bool:
        section, _, name = key.partition(".")
        if section == "media":
            return key in media
        if section == "network":
            return any(networks)
        if section == "probe" and all(networks):
            return name in _OF_NETWORKS
        return key not in without and section in ("seed", "data", "probe", "mixture", "parts")

    return has_effect


def effects_in_checking(config: RunConfig, modalities: Sequence[Modality]) -> HasEffect:
    """Return whether a setting has an effect in `check`."""
    media = _media_keys(config, modalities)
    return lambda key: key in media or key.partition(".")[0] in ("seed", "data", "leakage")


def _media_keys(config: RunConfig, modalities: Sequence[Modality]) -> set[str]:
    return {f"media.{name}" for modality in modalities for name in media_settings(modality, config.media)}


def effects_in_splitting(config: RunConfig, *, balanced: bool, gmm: bool) -> HasEffect:
    """Return whether a setting has an effect in `split`."""
    by_weight = config.split.by == "weight"

    def has_effect(key: str) -> bool:
        if key == "split.max_weight":
            return balanced and by_weight
        return key == "seed" or (key == "posterior" and gmm) or (key.startswith("split.") and balanced)

    return has_effect


def effects_in_order(config: RunConfig) -> HasEffect:
    """Return whether a setting has an effect in `order`."""
    used = {"seed", "order.order", *(f"order.{name}" for name in _order_fields(config.order))}
    used |= {f"finetune.{name}" for name in ("batch_size", "validation_fraction", "keep_posterior")}
    return lambda key: key in used


def _order_fields(order: OrderConfig) -> tuple[str, ...]:
    """Return the names of the fields that an order depends on."""
    if order.order == "weighted":
        return "draw", "weight"
    if order.order == "shuffled":
        return ()
    return ("pacing", "start", "grow_epochs", *(("steps",) if order.pacing == "step" else ()))


def effects_in_training(
    config: RunConfig, manifest: Manifest | ManifestFile, examples: Examples, *, modalities: Sequence[Modality] = ()
) -> HasEffect:
    """Return whether a setting has an effect in `finetune`; the methods of the config are resolved.

    modalities: Those of data without scores, which the training reads by the sections data and media.
    """
    from ..train.store import fit_on_device

    optim, augment, shapes = config.optim, config.augment, examples.shapes
    pictures, sound = any(len(shape) > 2 for shape in shapes), any(len(shape) == 2 for shape in shapes)
    stored = [view.stored for view in examples.views if view is not None and view.stored is not None]
    used = {"seed", *(f"order.{name}" for name in SAMPLERS.load(config.finetune.sampling).order_fields)}
    used |= {f"finetune.{field.name}" for field in fields(config.finetune)}
    used |= (lora := {f"finetune.lora.{field.name}" for field in fields(config.finetune.lora)})
    backbones = any(examples.backbones)
    on_device = fit_on_device(examples.inputs, max_bytes=config.finetune.resident_mib << 20)
    used |= {f"optim.{field.name}" for field in fields(optim)}
    masks = {f"augment.{name}" for name in ("time_masks", "time_share", "band_masks", "band_share")}
    for keys, has_effect in (
        ({"finetune.validation_fraction"}, not states_split(manifest, "validation")),
        ({"optim.momentum"}, optim.optimizer == "sgd"),
        ({"optim.lr_step", "optim.lr_fall"}, optim.schedule == "step"),
        ({"augment.pictures", "network.normalise_pictures"}, pictures),
        ({"augment.min_crop", "augment.flip"}, pictures and augment.pictures),
        ({"augment.frames"}, any(form.num_choices > 1 for form in stored)),
        ({"augment.sound", "network.normalise_sound"}, sound),
        (masks, sound and augment.sound),
        ({"finetune.read_ahead_mib"}, not all(on_device)),
        ({"finetune.gradient_checkpointing", "finetune.lora.rank"}, backbones),
        (lora - {"finetune.lora.rank"}, backbones and config.finetune.lora.rank > 0),
        ({"network.width"}, (pictures or sound) and config.finetune.model is None),
        ({f"finetune.{name}" for name in _OF_OWN_NETWORKS}, config.finetune.model is None),
    ):
        used = used | keys if has_effect else used - keys
    sections = {f"{axis}.{name}" for axis in ("sampling", "balancing") for name in getattr(config, axis)}
    if modalities:
        used |= _media_keys(config, modalities)
        sections.add("data")
    return lambda key: key in used or key.rpartition(".")[0] in sections


def with_scored_network(config: RunConfig, given: Given, recorded: Mapping[str, Any]) -> RunConfig:
    """Return the config with the width and normalisation of the scores' networks, unless they are given."""
    network = provenance_section(dict(recorded), "network")
    taken = {name: network[name] for name in NETWORK_FIELDS if name in network and f"network.{name}" not in given}
    return replace(config, network=replace(config.network, **taken))


def scored_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a manifest's scores as plain values, {} if it is not recorded."""
    return provenance_section(provenance_section(dict(provenance), "scores"), "config")


def check_media_settings(given: Given, manifest: Manifest | ManifestFile) -> None:
    """Raise ConfigError for a media setting other than that of the scores, by which the features were encoded.

    A setting that no modality of the scores depends on is not refused: it has no effect, see `warn_without_effect`.
    """
    recorded = scored_settings(manifest.provenance)
    scored = plain(MediaConfig()) | provenance_section(recorded, "media")
    entries = provenance_section(manifest.provenance, "scores").get("modalities")
    modalities = [_modality_of(entry) for entry in entries] if isinstance(entries, list) else [None]
    for key, setting in given.items():
        section, _, name = key.partition(".")
        if section != "media" or scored.get(name) == setting.value:
            continue
        media = build_config(MediaConfig, without_none({**scored, name: setting.value}), where="media.")
        if any(modality is None or name in media_settings(modality, media) for modality in modalities):
            raise ConfigError(
                f"media.{name} is {setting.value!r} ({setting.source}), and the features of this manifest were encoded "
                f"with {scored.get(name)!r}, by which it is trained and tested; remove the setting, or score again "
                f"with: mmaudit score DATA --set media.{name}={setting.value} --overwrite"
            )


def _modality_of(entry: Any) -> Modality | None:
    """Return the modality of an entry of the metadata, None if it is malformed."""
    values = [entry.get(name) if isinstance(entry, dict) else None for name in ("name", "kind", "encoder")]
    if not all(isinstance(value, str) for value in values):
        return None
    return Modality(name=str(values[0]), column="", kind=str(values[1]), encoder=str(values[2]))


_READ_BY_DECODERS = {
    "audio": ("max_seconds", "max_clipped", "max_packets", "max_sound_values"),
    "image": ("max_image_pixels", "max_image_bytes"),
    "video": ("max_seconds", "max_packets", "max_frame_pixels", "max_video_pixels", "max_video_bytes"),
    "frames": ("max_image_pixels", "max_image_bytes"),
}
_READ_BY_STATISTICS = {
    "audio": ("sample_rate", "mel_bins"),
    "image": ("image_size",),
    "video": ("num_frames", "frame_size"),
    "frames": ("num_frames", "frame_size"),
    "text": ("text_buckets",),
}


def media_settings(modality: Modality, media: MediaConfig) -> set[str]:
    """Return the names of the media settings that the vectors of a modality depend on; code of others may read all."""
    if modality.kind == "features":
        return set()
    names = {*_READ_BY_DECODERS.get(modality.kind, ())}
    if is_network(modality):
        return names | _network_settings(modality.kind, media)
    if is_pretrained(modality):
        return names | ({"num_frames"} if modality.kind in ("video", "frames") else set())
    if modality.encoder in ENCODERS:
        return names | {*_READ_BY_STATISTICS[modality.kind]}
    return {field.name for field in fields(MediaConfig) if not field.name.startswith("network_")}


def _network_settings(kind: str, media: MediaConfig) -> set[str]:
    """Return the names of the media settings that the inputs of a network depend on, beside those of the decoder."""
    if kind == "audio":
        by_spectrogram = {
            "log-mel": {"network_mel_bins"},
            "log-magnitude": {"network_linear_bins", "network_padding", "network_epsilon"},
        }[media.network_spectrogram]
        names = ("seconds", "spectrogram", "n_fft", "window", "hop", "extend")
        return {"sample_rate", *by_spectrogram, *(f"network_{name}" for name in names)}
    names_of_clips = {"network_frames", "network_frame_choices"} if kind != "image" else set()
    rate = {"network_fps"} if kind == "video" else set()
    return {"network_size", "network_stored_size"} | names_of_clips | rate
