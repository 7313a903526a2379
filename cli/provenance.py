"""Provenance of runs and manifests, and opening of the data that they were made from."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..audit.dataset.dataset import DataConfig, Dataset, open_dataset
from ..audit.dataset.formats.saved import looks_like_hub_name
from ..audit.errors import ConfigError, ManifestError, MmauditError, RunError, choices, printable
from ..audit.features.encoders import IMPORT_NOTHING, check_encoder, encoder_location, preprocessing
from ..audit.parsing import build
from ..audit.scores.mixture import Mixture
from ..audit.scores.score_dataset import Audit
from ..audit.scores.table import RANGES, SCHEMA_VERSION
from ..rebalance.checks import section
from ..rebalance.manifest import Manifest
from .config import RunConfig, without_none
from .run import Run
from .trust import Origin, scores_section

_LIBRARIES = ("numpy", "scipy", "torch", "scikit-learn", "pyarrow", "av", "pillow")  # those that numbers depend on


def check_config(place: Run, done: dict[str, Any], dataset: Dataset, config: RunConfig) -> None:
    """Refuse to go on in a run of another config, naming the first key that differs."""
    differing = [
        f"{section}.{key} is {done['config'][section].get(key)!r} there and {value!r} here"
        for section, content in config.scoring().items()
        if isinstance(content, dict)
        for key, value in content.items()
        if done["config"][section].get(key) != value
    ]
    if done["modalities"] != (modalities := _modalities(dataset, config)):
        differing.append(f"the modalities are {_names(done['modalities'])} there and {_names(modalities)} here")
    if done["config"]["seed"] != config.seed:
        differing.insert(0, f"seed is {done['config']['seed']} there and {config.seed} here")
    if differing:
        raise RunError(f"{place.folder} is another run: {differing[0]}; name another with --run, or pass --overwrite")


def record_of(dataset: Dataset, audit: Audit, config: RunConfig, *, seconds: dict[str, float]) -> dict[str, Any]:
    """Give the content of run.json."""
    out = len({row.sample_id for row in audit.quarantined})
    return {
        "schema": "mmaudit.run/1",
        "version": __version__,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "source": _absolute(dataset.source),
        "fingerprint": audit.fingerprint,
        "seed": config.seed,
        "config": config.scoring(),
        "modalities": _modalities(dataset, config),
        "columns": asdict(dataset.columns),
        "code": {modality.encoder: encoder_location(modality.encoder) for modality in dataset.modalities},
        "counts": {"input": dataset.num_rows, "scored": len(audit.scores), "quarantined": out},
        "quarantine": dict(Counter(row.reason.value for row in audit.quarantined).most_common()),
        "classes": len(set(audit.scores.label.tolist())),
        "groups": None if audit.scores.group is None else len(set(audit.scores.group.tolist())),
        "folds": int(audit.scores.fold.max()) + 1 if audit.scores.fold is not None else None,
        "probe_report": audit.probe_report.to_json(),
        "verdict": _verdict(audit.mixture),
        "class_check": audit.class_check.to_json(),
        "seconds": seconds,
    }


def score_provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the score table carries of run.json in its metadata: no path, and nothing that differs by run."""
    ranges = {name: {"range": span, "meaning": meaning} for name, (span, meaning) in RANGES.items()}
    return {"schema": f"mmaudit.scores/{SCHEMA_VERSION}", **scores_section(record), "ranges": ranges}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What the user names for a manifest: its data, its encoders (MODALITY=NAME), and whether paths may lead outside.

    A manifest that this user made on this machine needs none of it; all others need whatever they would open or run.
    """

    data: str | Path | None = None
    encoder: Sequence[str] = ()
    allow_outside: bool = False


def open_encodable(data: str | Path, config: DataConfig) -> Dataset:
    """Open a dataset, and check that the encoder of each modality exists and reads its kind."""
    dataset = open_dataset(data, config)
    for modality in dataset.modalities:
        check_encoder(modality)
    return dataset


def open_source(origin: Origin, named: Named, *, encoders: bool = True) -> tuple[Dataset, RunConfig]:
    """Open the data a manifest was made from as they were read then, and return the config of that score.

    Without `encoders` none is looked up, and nothing is imported. Raises ManifestError for a manifest that this user
    did not make on this machine, unless the data, and the encoders that are code or models, are named.
    """
    about = origin.scores
    if "modalities" not in about or "config" not in about:
        raise ManifestError(
            f"{origin.path} does not say how its data were read, so its scores were not mmaudit's; "
            "score the data with mmaudit score, and split that run"
        )
    modalities = _scored_modalities(origin)
    made = build(RunConfig, without_none(section(about, "config")), where="")
    chosen = _scored_encoders(origin, named) if encoders else {}
    _check_named(origin, named, chosen)
    source = named.data if named.data is not None or origin.record is None else origin.record["source"]
    config = replace(
        made.data,
        modality=tuple(f"{m['name']}={m['column']}:{m['kind']}" for m in modalities),
        encoder=tuple(f"{name}={encoder}" for name, encoder in chosen.items()),
        allow_outside=named.allow_outside or (origin.record is not None and made.data.allow_outside),
    )
    try:
        return open_encodable(str(source), config), made
    except MmauditError as error:
        mend = "" if named.data is not None else "; if it moved, pass --data"
        raise ManifestError(f"the manifest's source cannot be opened: {error}{mend}") from error


def _scored_modalities(origin: Origin) -> list[dict[str, str]]:
    """Return name, column, kind and encoder of each modality that a manifest names."""
    keys = ("name", "column", "kind", "encoder")
    stated = origin.scores["modalities"]
    if isinstance(stated, list) and all(isinstance(entry, dict) for entry in stated):
        modalities = [{key: entry.get(key) for key in keys} for entry in stated]
        if all(isinstance(value, str) for entry in modalities for value in entry.values()):
            return modalities
    raise ManifestError(f"{origin.path}: its metadata name no modalities that mmaudit score wrote: split the run again")


def _check_named(origin: Origin, named: Named, encoders: dict[str, str]) -> None:
    """Raise ManifestError where the user must name the data, or encoders that are code or models, and has not."""
    scored = _scored_modalities(origin)
    doubts = {m["name"]: _doubt(m["encoder"], origin) for m in scored if encoders and m["name"] not in _again(named)}
    refused = [f"--encoder {printable(f'{name}={encoders[name]}')}" for name, doubt in doubts.items() if doubt]
    unnamed = [f"--data {origin.source or 'DATA'}"] if named.data is None and origin.record is None else []
    if not unnamed and not refused:
        return
    doubt = origin.doubt or next(filter(None, doubts.values()))
    source = f"its source was {origin.source}: " if unnamed and origin.source else ""
    trust = ", if you trust what it names" if refused else ""
    raise ManifestError(
        f"{origin.path} is not trusted to name data or code, since {doubt}; "
        f"{source}pass {' '.join(unnamed + refused)}{trust}"
    )


def _again(named: Named) -> dict[str, str]:
    """Return the encoders that the user names again, by modality."""
    return dict(text.partition("=")[::2] for text in named.encoder)


def _scored_encoders(origin: Origin, named: Named) -> dict[str, str]:
    """Return the encoders that the samples were scored with, by modality; ConfigError where others are named."""
    scored = {m["name"]: m["encoder"] for m in _scored_modalities(origin)}
    for modality, encoder in _again(named).items():
        if modality not in scored:
            raise ConfigError(f"--encoder {modality}={encoder}: no modality {modality!r}; {choices(modality, scored)}")
        if encoder != scored[modality]:
            raise ConfigError(
                f"--encoder {modality}={encoder}: the samples were scored with {printable(scored[modality])}: "
                "name that one, or score the data again"
            )
    return scored


def _doubt(encoder: str, origin: Origin) -> str:
    """Return why an encoder that is code or a model must be named again; "" where it need not be."""
    if encoder in IMPORT_NOTHING:
        return ""
    if origin.record is None:
        return origin.doubt
    then, now = origin.record["code"].get(encoder), encoder_location(encoder)
    return "" if then == now else f"{encoder} was {then} when it was scored, and is {now} here"


def saw_test_labels(manifest: Manifest) -> bool:
    """Tell whether the probes whose scores chose these samples also learned from test samples."""
    config = manifest.provenance.get("scores", {}).get("config", {})
    return bool(config.get("probe", {}).get("learn_from") != "train")


def _modalities(dataset: Dataset, config: RunConfig) -> list[dict[str, Any]]:
    return [{**asdict(each), "preprocessing": preprocessing(each, config.media)} for each in dataset.modalities]


def _names(modalities: list[dict[str, Any]]) -> str:
    """Name modalities as --modality takes them, and the start of their preprocessing's fingerprint."""
    return ", ".join(f"{m['name']}={m['column']}:{m['kind']} ({m['preprocessing'][:6]})" for m in modalities)


def _verdict(mixture: Mixture) -> str:
    if mixture.bimodal:
        return "bimodal; p_balanced is its posterior"
    return f"not bimodal ({'; '.join(mixture.reasons)}); p_balanced is the rule gap <= {mixture.threshold:g}"


def _absolute(source: str) -> str:
    """Name a source so that it is found from anywhere: a dataset of the hub has its name already."""
    on_disk = Path(source).exists() or not looks_like_hub_name(source)
    return str(Path(source).absolute()) if on_disk else source
