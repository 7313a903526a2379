"""Provenance: what was a run made from, and how is the same data opened again?"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..audit.encoding.encoders import preprocessing
from ..audit.errors import ManifestError, MmauditError, RunError
from ..audit.gap.mixture import Mixture
from ..audit.score import RANGES, SCHEMA_VERSION
from ..audit.scoring import Audit
from ..audit.source.dataset import Dataset, open_dataset
from ..audit.source.hub import looks_like_hub_name
from ..rebalance.manifest import Manifest
from .config import RunConfig, build, without_none
from .run import Run

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
        "counts": {"input": dataset.num_rows, "scored": len(audit.scores), "quarantined": out},
        "quarantine": dict(Counter(row.reason.value for row in audit.quarantined).most_common()),
        "classes": len(set(audit.scores.label.tolist())),
        "groups": None if audit.scores.group is None else len(set(audit.scores.group.tolist())),
        "folds": int(audit.scores.fold.max()) + 1 if audit.scores.fold is not None else None,
        "ledger": audit.ledger.to_json(),
        "verdict": _verdict(audit.mixture),
        "class_check": audit.class_check.to_json(),
        "seconds": seconds,
    }


def score_provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Give what the score table carries of run.json in its metadata: nothing that differs from run to run."""
    about = {key: record[key] for key in ("version", "source", "fingerprint", "config", "modalities", "columns")}
    ranges = {name: {"range": span, "meaning": meaning} for name, (span, meaning) in RANGES.items()}
    return {"schema": f"mmaudit.scores/{SCHEMA_VERSION}", **about, "ranges": ranges}


def source_of(provenance: Mapping[str, Any], data: str | Path | None) -> tuple[Dataset, RunConfig]:
    """Open the data a manifest was made from as they were read then, and give the config of that score."""
    about = provenance.get("scores", {})
    if "source" not in about:
        raise ManifestError(
            "the manifest does not say which data it was made from, so its scores were not mmaudit's; "
            "score the data with mmaudit score, and split that run"
        )
    named = tuple(f"{m['name']}={m['column']}:{m['kind']}" for m in about["modalities"])
    made = build(RunConfig, without_none(about["config"]), where="")
    source = str(data) if data is not None else about["source"]
    try:
        dataset = open_dataset(source, replace(made.data, modality=named))
    except MmauditError as error:
        raise ManifestError(f"the manifest's source cannot be opened: {error}; if it moved, pass --data") from error
    return dataset, made


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
