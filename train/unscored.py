"""Training on data without scores: all usable samples, in place of a manifest's selection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..audit.errors import ConfigError, Quarantined
from ..audit.features.encoded_samples import EncodedSamples, select_usable, sort_quarantined
from ..audit.hashing import canonical_order
from ..rebalance.manifest import COLUMNS, Manifest
from .config import TrainConfig
from .methods import resolve


def unscored_manifest(encoded: EncodedSamples, *, keep_duplicates: bool) -> tuple[Manifest, tuple[Quarantined, ...]]:
    """Return a manifest of all usable samples, without scores, and the samples that cannot be used, with the reasons.

    It is not written. Its digest identifies the samples: ids, labels, splits, groups and contents, whatever the order
    of the rows. All samples share rank 0; discrepancy, gap, balance and p_balanced are null.
    """
    rows, left_out = select_usable(encoded, keep_duplicates=keep_duplicates)
    samples = encoded.samples
    rows = rows[canonical_order(samples.sample_id[rows])]
    label = samples.label[rows]
    values = {
        "sample_id": samples.sample_id[rows],
        "label": label,
        "label_name": np.array(samples.class_names, dtype=object)[label],
        "split": samples.split[rows],
        "subset": ["all"] * len(rows),
        "rank": np.zeros(len(rows), np.int32),
        "weight": np.ones(len(rows), np.float32),
        "content": encoded.content[rows],
    }
    if samples.group is not None:
        values["group"] = samples.group[rows]
    columns = {
        name: pa.array(values[name], type_) if name in values else pa.nulls(len(rows), type_)
        for name, type_ in COLUMNS.items()
    }
    return Manifest(table=pa.table(columns), provenance={}), sort_quarantined(left_out, samples.sample_id)


def check_without_scores(config: TrainConfig, *, commands: Sequence[str]) -> None:
    """Raise ConfigError for a method or setting that reads scores; `commands` make a manifest that has them."""
    methods, settings = resolve(config), config.finetune
    reason = advice = ""
    if settings.keep_posterior is not None:
        reason = f"--keep-posterior {settings.keep_posterior:g} selects samples by P(balanced)"
    elif methods.sampler.reads_scores(methods.sampler_config):
        reason = f"--sampling {methods.config.finetune.sampling} orders samples by their scores"
        if hasattr(methods.sampler_config, "score_source"):
            advice = ", or score them by the model in training with --set sampling.bss.score_source=model"
    elif methods.balancer.reads_scores(methods.balancer_config):
        reason = f"--balancing {methods.config.finetune.balancing} reads the samples' scores"
    if reason:
        raise ConfigError(
            f"{reason}, and data without a manifest have none; make one with: {' && '.join(commands)}; then pass "
            f"--manifest all in place of --data{advice}"
        )
