"""Auditing and rebalancing of multimodal datasets for modality imbalance, sample by sample."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit.dataset.dataset import Dataset, open_dataset
    from .audit.downloads.ingest import Ingested
    from .audit.errors import MmauditError
    from .audit.scores.mixture import Mixture, fit_mixture
    from .audit.scores.sample_scores import score_probabilities
    from .audit.scores.table import ScoreTable, read_scores, write_scores
    from .cli.applying import ApplyResult, apply
    from .cli.checking import CheckResult, check, ingest
    from .cli.comparison.compare import compare
    from .cli.config import RunConfig, load_config
    from .cli.demo import DemoResult, demo
    from .cli.evaluating import EvaluationResult, evaluate
    from .cli.manifests import Card, Epoch, ExportResult, card, diff, export, order
    from .cli.methods import MethodTable, methods
    from .cli.planning import PlanResult, plan
    from .cli.reporting import ReportResult, report
    from .cli.scoring import ScoreResult, score
    from .cli.splitting import ReplayResult, SplitSummary, replay, split
    from .cli.staging import StageResult
    from .cli.study.study import StudyResult, study
    from .cli.training import FinetuneResult, finetune
    from .cli.verifying import verify
    from .rebalance.diff import ManifestDiff
    from .rebalance.keep import Keep, keep
    from .rebalance.manifest import Manifest, read_manifest
    from .rebalance.score_agreement import ScoreAgreement
    from .rebalance.verify import Verification
    from .train.comparison.arrays import compare_predictions
    from .train.comparison.verdicts import Comparison
    from .train.custom_loop import Balanced, balance
    from .train.custom_network import MultimodalModel
    from .train.manifest_sampler import ManifestBatchSampler, ManifestSampler

__version__ = "0.1.0"

# The public names by module. A module is imported at the first access, because torch and scikit-learn take seconds.
_NAMES = {
    "audit.dataset.dataset": ["Dataset", "open_dataset"],
    "audit.downloads.ingest": ["Ingested"],
    "audit.errors": ["MmauditError"],
    "audit.scores.mixture": ["Mixture", "fit_mixture"],
    "audit.scores.sample_scores": ["score_probabilities"],
    "audit.scores.table": ["ScoreTable", "read_scores", "write_scores"],
    "cli.applying": ["ApplyResult", "apply"],
    "cli.checking": ["CheckResult", "check", "ingest"],
    "cli.comparison.compare": ["compare"],
    "cli.config": ["RunConfig", "load_config"],
    "cli.demo": ["DemoResult", "demo"],
    "cli.evaluating": ["EvaluationResult", "evaluate"],
    "cli.manifests": ["Card", "Epoch", "ExportResult", "card", "diff", "export", "order"],
    "cli.methods": ["MethodTable", "methods"],
    "cli.planning": ["PlanResult", "plan"],
    "cli.reporting": ["ReportResult", "report"],
    "cli.scoring": ["ScoreResult", "score"],
    "cli.staging": ["StageResult"],
    "cli.splitting": ["ReplayResult", "SplitSummary", "replay", "split"],
    "cli.study.study": ["StudyResult", "study"],
    "cli.training": ["FinetuneResult", "finetune"],
    "cli.verifying": ["verify"],
    "rebalance.diff": ["ManifestDiff"],
    "rebalance.keep": ["Keep", "keep"],
    "rebalance.manifest": ["Manifest", "read_manifest"],
    "rebalance.score_agreement": ["ScoreAgreement"],
    "rebalance.verify": ["Verification"],
    "train.comparison.arrays": ["compare_predictions"],
    "train.comparison.verdicts": ["Comparison"],
    "train.custom_loop": ["Balanced", "balance"],
    "train.custom_network": ["MultimodalModel"],
    "train.manifest_sampler": ["ManifestBatchSampler", "ManifestSampler"],
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ApplyResult",
    "Balanced",
    "Card",
    "CheckResult",
    "Comparison",
    "Dataset",
    "DemoResult",
    "Epoch",
    "EvaluationResult",
    "ExportResult",
    "FinetuneResult",
    "Ingested",
    "Keep",
    "Manifest",
    "ManifestBatchSampler",
    "ManifestDiff",
    "ManifestSampler",
    "MethodTable",
    "Mixture",
    "MmauditError",
    "MultimodalModel",
    "PlanResult",
    "ReplayResult",
    "ReportResult",
    "RunConfig",
    "ScoreAgreement",
    "ScoreResult",
    "ScoreTable",
    "SplitSummary",
    "StageResult",
    "StudyResult",
    "Verification",
    "__version__",
    "apply",
    "balance",
    "card",
    "check",
    "compare",
    "compare_predictions",
    "demo",
    "diff",
    "evaluate",
    "export",
    "finetune",
    "fit_mixture",
    "ingest",
    "keep",
    "load_config",
    "methods",
    "open_dataset",
    "order",
    "plan",
    "read_manifest",
    "read_scores",
    "replay",
    "report",
    "score",
    "score_probabilities",
    "split",
    "study",
    "verify",
    "write_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
