"""Scoring without a run folder, which several tests share: all stages in one process, their results in memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa

from mmaudit.audit.dataset.dataset import Dataset
from mmaudit.audit.engine.fitting import NetworkSettings
from mmaudit.audit.engine.merging import Audit
from mmaudit.audit.engine.part_store import MemoryStore
from mmaudit.audit.engine.plan import PartsConfig, plan_parts
from mmaudit.audit.engine.stages import ScoringJob, finished_parts, run_all
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.scores.mixture import MixtureConfig
from mmaudit.audit.scores.table import ScoreTable, scores_of_table
from mmaudit.audit.workers import Progress, no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Audit):
    """All results of scoring, the score table among them."""

    scores: ScoreTable


def score_in_memory(
    dataset: Dataset,
    *,
    features: Path,
    probe: ProbeConfig,
    networks: NetworkSettings,
    mixture: MixtureConfig | None = None,
    parts: PartsConfig | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    keep_duplicates: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Scored:
    """Score a dataset; only the feature cache, in the folder `features`, is written. See ScoringJob."""
    job = ScoringJob(
        dataset=dataset,
        plan=plan_parts(dataset.shards, config=parts or PartsConfig(), depends_on=()),
        store=MemoryStore(),
        features=features,
        probes=features / "probes",
        probe=probe,
        networks=networks,
        mixture=mixture or MixtureConfig(),
        seed=seed,
        test_fraction=test_fraction,
        keep_duplicates=keep_duplicates,
        device=device,
        num_workers=0,
        progress=progress,
    )
    results, merged, _ = run_all(job)
    finished = list(finished_parts(job, merged.whole))
    audit = Audit.of(results.selection, merged, halves=results.halves, bisections=results.bisections)
    audit = audit.with_balanced([counts for _, _, counts in finished])
    table = pa.concat_tables([table for _, table, _ in finished])
    scores = scores_of_table(table, {"paths": dataset.path_columns}, where="the score table")
    return Scored(**{field.name: getattr(audit, field.name) for field in fields(Audit)}, scores=scores)
