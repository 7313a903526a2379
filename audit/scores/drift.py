"""Drift: how the scores of other data differ from those of a run, in distribution.

Both were computed by probes that were not trained on the samples that they score, so that no difference follows from
training. Standard errors are those of the jackknife over groups; the difference of two means has Welch's interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import ks_2samp

from ..metrics import Groups, group_codes, jackknife, mean_interval, share_interval
from .table import ScoreTable

Array = NDArray[np.float64]
Numbers = dict[str, Any]


def compare_distributions(first: ScoreTable, second: ScoreTable) -> Numbers:
    """Compare the scores of other data (`second`) with those of a run (`first`).

    Args:
        first: Scores of the run.
        second: Scores of the data, with the same modalities.

    Returns:
        `num_samples` of both; of the columns `gap`, `discrepancy` and `confidence` by modality the means with 95%
        intervals (`run`, `data`), their `difference` (data minus run), and the distance of Kolmogorov and Smirnov in
        [0, 1] (`ks`) with its p value, null where samples form groups, which it cannot take into account; `balanced`:
        the share of samples with p_balanced of at least 1/2, with intervals.
    """
    tables = (first, second)
    groups = tuple(group_codes(table.group) for table in tables)
    columns = {"gap": [table.gap for table in tables]}
    between = first.default_between()
    columns["discrepancy"] = [table.discrepancy(between) for table in tables]
    numbers: Numbers = {"num_samples": {"run": len(first), "data": len(second)}, "between": between}
    numbers |= {name: _column(values, groups, low=-1.0) for name, values in columns.items()}
    numbers["confidence"] = {
        name: _column([table.confidence[:, index] for table in tables], groups, low=0.0)
        for index, name in enumerate(first.modalities)
    }
    if all(table.p_balanced is not None for table in tables):
        balanced = [np.asarray(table.p_balanced) >= 0.5 for table in tables]
        numbers["balanced"] = dict(zip(("run", "data"), map(share_interval, balanced, groups), strict=True))
    return numbers


def _column(columns: list[NDArray[Any]], groups: tuple[Groups, ...], *, low: float) -> Numbers:
    """Compare a column of both tables; rows of a missing modality, NaN, are left out."""
    present = [~np.isnan(values) for values in columns]
    values = [column[rows].astype(np.float64) for column, rows in zip(columns, present, strict=True)]
    codes = [None if group is None else group[rows] for group, rows in zip(groups, present, strict=True)]
    if not all(map(len, values)):
        return {"run": None, "data": None, "difference": None, "ks": None, "p": None}
    run, data = (mean_interval(own, group, low=low) for own, group in zip(values, codes, strict=True))
    test = ks_2samp(*values, method="asymp")  # the exact p is not defined with ties, such as saturated gaps
    return {
        "run": run,
        "data": data,
        "difference": _difference(values, codes),
        "ks": float(test.statistic),
        "p": float(test.pvalue) if all(group is None for group in codes) else None,
    }


def _difference(values: list[Array], groups: list[Groups]) -> Numbers:
    """Compute the difference of two means and its 95% interval, with Satterthwaite's degrees of freedom."""
    centre = float(values[1].mean() - values[0].mean())
    sizes = [len(own) if group is None else len(np.unique(group)) for own, group in zip(values, groups, strict=True)]
    if min(sizes) < 2:
        return {"mean": centre, "low": -1.0, "high": 1.0}
    errors, freedom = zip(*(jackknife(own, group) for own, group in zip(values, groups, strict=True)), strict=True)
    variance = [error**2 for error in errors]
    total = sum(variance)
    if total == 0:
        return {"mean": centre, "low": centre, "high": centre}
    df = total**2 / sum(part**2 / own for part, own in zip(variance, freedom, strict=True))
    half_width = float(stdtrit(df, 0.975) * np.sqrt(total))
    return {"mean": centre, "low": max(-1.0, centre - half_width), "high": min(1.0, centre + half_width)}
