"""Auditing and rebalancing of multimodal datasets for modality imbalance, sample by sample."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit.dataset.dataset import Dataset, open_dataset
    from .audit.errors import MmauditError
    from .audit.scores.mixture import Mixture, fit_mixture
    from .audit.scores.sample_scores import score_probabilities
    from .audit.scores.table import ScoreTable, read_scores, write_scores
    from .cli.config import RunConfig
    from .cli.demo import demo
    from .cli.manifests import card, diff, export, order, replay, split
    from .cli.stages import check, ingest, report, score
    from .cli.training import evaluate, finetune
    from .cli.verification import verify
    from .rebalance.manifest import Manifest, read_manifest

__version__ = "0.1.0"

# The module of each public name. It is imported at the first access, because torch and scikit-learn take seconds.
_MODULE_OF_NAME = {
    "Dataset": "audit.dataset.dataset",
    "open_dataset": "audit.dataset.dataset",
    "MmauditError": "audit.errors",
    "Mixture": "audit.scores.mixture",
    "fit_mixture": "audit.scores.mixture",
    "score_probabilities": "audit.scores.sample_scores",
    "ScoreTable": "audit.scores.table",
    "read_scores": "audit.scores.table",
    "write_scores": "audit.scores.table",
    "Manifest": "rebalance.manifest",
    "read_manifest": "rebalance.manifest",
    "RunConfig": "cli.config",
    "ingest": "cli.stages",
    "check": "cli.stages",
    "score": "cli.stages",
    "split": "cli.manifests",
    "verify": "cli.verification",
    "diff": "cli.manifests",
    "replay": "cli.manifests",
    "card": "cli.manifests",
    "export": "cli.manifests",
    "order": "cli.manifests",
    "finetune": "cli.training",
    "evaluate": "cli.training",
    "report": "cli.stages",
    "demo": "cli.demo",
}

__all__ = [
    "Dataset",
    "Manifest",
    "Mixture",
    "MmauditError",
    "RunConfig",
    "ScoreTable",
    "__version__",
    "card",
    "check",
    "demo",
    "diff",
    "evaluate",
    "export",
    "finetune",
    "fit_mixture",
    "ingest",
    "open_dataset",
    "order",
    "read_manifest",
    "read_scores",
    "replay",
    "report",
    "score",
    "score_probabilities",
    "split",
    "verify",
    "write_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
