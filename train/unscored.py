"""Training on data without scores: all usable samples, in place of a manifest's selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.dataset.columns import SPLITS
from ..audit.engine.row_data import EncodedData
from ..audit.errors import ConfigError
from ..audit.features.encoded_samples import digest_texts, usable_rows
from ..audit.features.left_out import QuarantineTable
from ..audit.row_arrays import slices
from ..rebalance.manifest import COLUMNS, Manifest
from .config import TrainConfig
from .methods import resolve


def unscored_manifest(encoded: EncodedData, *, keep_duplicates: bool) -> tuple[Manifest, QuarantineTable]:
    """Return a manifest of all usable samples, without scores, and the samples that cannot be used, with the reasons.

    It is not written. Its digest identifies the samples: ids, labels, splits, groups and contents, whatever the order
    of the rows. All samples share rank 0; discrepancy, gap, balance and p_balanced are null.
    """
    rows, left_out = usable_rows(encoded, keep_duplicates=keep_duplicates)
    tables = _manifest_tables(encoded, encoded.samples.canonical_order(rows))
    return Manifest(table=pa.concat_tables(tables), provenance={}), QuarantineTable(left_out.sorted().table)


def _manifest_tables(encoded: EncodedData, rows: NDArray[np.integer]) -> Iterator[pa.Table]:
    """Yield some rows as tables with the columns of a manifest, in their order."""
    data, (high, low) = encoded.samples, (encoded.content_word(number) for number in (0, 1))
    names = ["sample_id", *(["group"] if data.group is not None else [])]
    texts = {name: data.texts({"sample_id": "id"}.get(name, name)) for name in names}
    class_names, split_names = pa.array(data.class_names, pa.string()), pa.array(SPLITS, pa.string())
    for part in slices(len(rows)):
        own = rows[part]
        values = {name: column.take(pa.array(own)) for name, column in texts.items()}
        values |= {
            "label": data.label[own],
            "label_name": class_names.take(pa.array(data.label[own])),
            "split": split_names.take(pa.array(data.split[own])),
            "subset": pa.repeat("all", len(own)),
            "rank": np.zeros(len(own), np.int32),
            "weight": np.ones(len(own), np.float32),
            "content": pa.array(digest_texts(np.stack([high[own], low[own]], axis=1))).cast(pa.string()),
        }
        columns = {
            name: pa.array(values[name]).cast(type_) if name in values else pa.nulls(len(own), type_)
            for name, type_ in COLUMNS.items()
        }
        yield pa.table(columns)


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
