"""Numbers of the report that are computed from the scores, as plain values for report.json."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...audit.errors import short
from ...audit.metrics import (
    BALANCED_WITHIN,
    Groups,
    assign_bins,
    group_codes,
    is_dominated,
    mean_interval,
    share_interval,
)
from ...audit.metrics import discrepancy as all_discrepancies
from ...audit.scores.mixture import Mixture
from ...audit.scores.table import ScoreTable

Numbers = dict[str, Any]
Array = NDArray[Any]

DISCREPANCY_BINS = 40  # of width 0.05, so that 0.2 is an edge
GAP_BINS = 50
MAP_BINS = (10, 25)  # bounds of the number of bins, which gives about 10 samples per cell
TRAINING_BINS = (20, 50)  # of confidence and of variability; 0.1 is an edge
AMBIGUOUS = 0.1  # variability above which a sample counts as ambiguous; mmaudit's own
GRID = 401  # points of the drawn densities of the mixture
MAX_PAIRS = 6  # modality maps
MAX_EXAMPLES = 3  # quarantined samples listed per reason
CLASS_BINS = 20
MAX_CLASSES = 40
MAX_SPLITS = 6
MAX_SAMPLES = 20  # per side of two modalities; half as many per modality if there are more
MAX_SIDES = 6  # modalities whose samples are listed


def facts(record: Mapping[str, Any], scores: ScoreTable) -> Numbers:
    """Return the source, counts and settings of a run, without values that differ between runs of the same config."""
    probe = record["config"]["probe"]
    spread = scores.discrepancy_sd
    return {
        "source": record["source"],
        "version": record["version"],
        "fingerprint": record["fingerprint"],
        "seed": record["seed"],
        "counts": record["counts"],
        "num_classes": record["num_classes"],
        "num_groups": record["num_groups"],
        "group_column": record["columns"].get("group"),
        "num_folds": record["num_folds"],
        "repeats": probe["repeats"],
        "learn_from": probe["learn_from"],
        "task": record["config"]["data"]["task"],
        "modalities": [
            {key: modality.get(key) for key in ("name", "kind", "column", "length", "encoder")}
            for modality in record["modalities"]
        ],
        "balanced_margin": BALANCED_WITHIN,
        "median_sd": None if spread is None else finite(np.nanmedian(spread)),
    }


def probe_report_numbers(record: Mapping[str, Any]) -> Numbers:
    """Return the probe report: out-of-fold metrics of each probe, gains of each modality, and controls."""
    probe_report = record["probe_report"]
    calibrated = [probe["calibration"] for probe in probe_report["probe_metrics"] if probe["calibration"]]
    return {**probe_report, "calibrated": any(probe["ece_before"] is not None for probe in calibrated)}


def training(scores: ScoreTable) -> list[Numbers] | None:
    """Return, by modality, the 2-D histogram of confidence and variability over training, and the share of each region.

    counts[row][column]: rows are bins of confidence, columns bins of variability. Easy, ambiguous and hard are the
    regions of dataset cartography (Swayamdipta et al., 2020); their borders are mmaudit's own.
    """
    if scores.training_confidence is None or scores.training_variability is None:
        return None
    groups, rows = group_codes(scores.group), []
    for index, name in enumerate(scores.modalities):
        confidence, variability = scores.training_confidence[:, index], scores.training_variability[:, index]
        variability = variability[~np.isnan(confidence)]
        confidence, groups_valid = _valid(confidence, groups)
        counts, _, _ = np.histogram2d(confidence, variability, bins=TRAINING_BINS, range=((0, 1), (0, 0.5)))
        ambiguous = variability > AMBIGUOUS
        rows.append(
            {
                "name": name,
                "counts": counts.astype(int).tolist(),
                "easy": share_interval(~ambiguous & (confidence > 0.5), groups_valid),
                "ambiguous": share_interval(ambiguous, groups_valid),
                "hard": share_interval(~ambiguous & (confidence <= 0.5), groups_valid),
                "border": AMBIGUOUS,
            }
        )
    return rows


def values(scores: ScoreTable) -> list[Numbers] | None:
    """Return by modality the mean Shapley value, and the shares of samples with phi above 1 and below 0 (misleads)."""
    if scores.shapley is None:
        return None
    groups, m = group_codes(scores.group), len(scores.modalities)
    rows = []
    for index, name in enumerate(scores.modalities):
        phi, groups_valid = _valid(scores.shapley[:, index].astype(np.float64), groups)
        rows.append(
            {
                "name": name,
                "mean": mean_interval(phi, groups_valid, low=(1 - m) / 2, high=(1 + m) / 2),
                "carries": share_interval(phi > 1, groups_valid),
                "misleads": share_interval(phi < 0, groups_valid),
            }
        )
    return rows


def agreement(scores: ScoreTable) -> list[Numbers] | None:
    """Count the samples that are predicted correctly by all probes, by only one, by several, and by none."""
    if scores.prediction is None or scores.prediction.dtype.kind == "f":
        return None  # predictions of a regression are not correct or wrong
    is_correct = scores.prediction == scores.label[:, None]
    num_correct, groups = is_correct.sum(axis=1), group_codes(scores.group)
    m = len(scores.modalities)
    kinds = {"both" if m == 2 else f"all {m}": num_correct == m}
    kinds |= {f"only {name}": is_correct[:, index] & (num_correct == 1) for index, name in enumerate(scores.modalities)}
    if m > 2:
        kinds["several, not all"] = (num_correct > 1) & (num_correct < m)
    kinds["neither" if m == 2 else "none"] = num_correct == 0
    return [{"name": name, **share_interval(rows, groups)} for name, rows in kinds.items()]


def discrepancies(scores: ScoreTable, *, bisections: Numbers | None = None) -> list[Numbers]:
    """Return the histogram of each discrepancy: of the pair for two modalities, else of each against the rest.

    `of_sets` has the intervals of the shares and the lean for other samples, by bisections; None without them.
    """
    groups = group_codes(scores.group)
    rows = [_discrepancy(scores.discrepancy(side[0]), groups, side) for side in sides(scores)]
    if bisections is None:
        return [{**row, "of_sets": None} for row in rows]
    from ...audit.scores.stability import intervals_of_sets  # needs torch

    errors = {error["modality"]: error for error in bisections["errors"]}
    for row in rows:
        error = errors.get(row["positive_side"])
        shares = {"share_ahead": row["share_ahead"]["share"], "share_behind": row["share_behind"]["share"]}
        row["of_sets"] = None if error is None else intervals_of_sets(error, **shares)
    return rows


def sides(scores: ScoreTable) -> list[tuple[str, str, str]]:
    """Return the discrepancies that are shown, each with the names of its positive and its negative side."""
    first, second = scores.modalities[:2]
    if len(scores.modalities) == 2:
        return [(f"{first}:{second}", first, second)]
    return [(name, name, "the others") for name in scores.modalities]


def standing_out(scores: ScoreTable) -> Numbers | None:
    """Return the share of samples on which no modality is ahead of the others; None for two modalities."""
    if len(scores.modalities) == 2:
        return None
    highest = np.fmax.reduce(all_discrepancies(scores.confidence), axis=1)
    return share_interval(np.asarray(highest <= BALANCED_WITHIN), group_codes(scores.group))


def gaps(scores: ScoreTable, mixture: Mixture, *, class_check: str) -> Numbers:
    """Return the histogram of the gap, the densities of the mixture scaled to it, and the verdict with its numbers.

    The mixture is fitted without test samples; the densities are scaled to `fitted`, the histogram without them.
    """
    values = scores.gap
    is_fitted = np.ones(len(scores), bool) if scores.split is None else scores.split != "test"
    grid = np.linspace(0, 1, GRID)
    low, high = mixture.density(grid) * int(is_fitted.sum()) / GAP_BINS
    has_curves = mixture.components is not None
    verdict, p = mixture.to_json(), scores.p_balanced
    derived = ("bimodal", "rule", "reasons", "threshold", "dip", "dip_p", "ashman_d", "bic_one", "bic_two")
    return {
        "edges": np.linspace(0, 1, GAP_BINS + 1).tolist(),
        "counts": _bins(values, GAP_BINS),
        "fitted": _bins(values[is_fitted], GAP_BINS),
        "grid": grid.tolist(),
        "curve_balanced": low.tolist() if has_curves else None,
        "curve_imbalanced": high.tolist() if has_curves else None,
        "border": _border(mixture),
        "share_balanced": None if p is None else share_interval(p >= 0.5, group_codes(scores.group)),
        "class_check": class_check,
        **{key: verdict[key] for key in (*derived, "components", "num_samples")},
    }


def maps(scores: ScoreTable) -> list[Numbers]:
    """Return the 2-D histograms of confidence for the pairs of modalities that differ most.

    counts[row][column]: rows are bins of y, columns are bins of x.
    """
    num_bins = int(np.clip(np.sqrt(len(scores) / 10), *MAP_BINS))
    bins = np.clip((np.nan_to_num(scores.confidence) * num_bins).astype(np.int64), 0, num_bins - 1)
    histograms: list[Numbers] = []
    for a, b in combinations(range(len(scores.modalities)), 2):
        rows = scores.present[:, a] & scores.present[:, b]
        if rows.any():
            distance = float(np.abs(scores.confidence[rows, a] - scores.confidence[rows, b]).mean())
            cells = np.bincount(bins[rows, b] * num_bins + bins[rows, a], minlength=num_bins**2)
            names = {"x": scores.modalities[a], "y": scores.modalities[b]}
            counts = cells.reshape(num_bins, num_bins).tolist()
            histograms.append({**names, "mean_distance": distance, "counts": counts})
    return sorted(histograms, key=lambda pair: -pair["mean_distance"])[:MAX_PAIRS]


def quarantined(table: pa.Table) -> list[Numbers]:
    """Count quarantine.parquet by reason and modality, most frequent first, with up to three examples each."""
    if len(table) == 0:
        return []
    cells: dict[tuple[str, str], list[int]] = {}
    reasons, modalities = table["reason"].to_pylist(), table["modality"].to_pylist()
    for row, key in enumerate(zip(reasons, [name or "" for name in modalities], strict=True)):
        cells.setdefault(key, []).append(row)
    reports = []
    for (reason, modality), rows in sorted(cells.items(), key=lambda cell: (-len(cell[1]), cell[0])):
        example_rows = table.take(rows[:MAX_EXAMPLES]).select(["sample_id", "detail"]).to_pylist()
        examples = [{key: short(text) for key, text in row.items()} for row in example_rows]
        reports.append({"reason": reason, "modality": modality or None, "count": len(rows), "examples": examples})
    return reports


def class_numbers(scores: ScoreTable) -> Numbers:
    """Return counts by split, mean confidences and discrepancies of the least balanced classes, at most 40."""
    codes = np.unique(scores.label, return_inverse=True)[1]
    size = np.bincount(codes)
    signed = all_discrepancies(scores.confidence).reshape(len(scores), -1).astype(np.float64)
    means = _by_class(signed, codes, size)
    spread = np.sqrt(np.nanmean((signed - means[codes]) ** 2, axis=0))
    shown = _least_balanced_classes(means, 1.96 * spread / np.sqrt(size)[:, None])
    return {
        "num_classes": len(size),
        "num_omitted": len(size) - len(shown),
        "names": [side[1] for side in sides(scores)],
        "edges": np.linspace(-1, 1, CLASS_BINS + 1).round(4).tolist(),
        "splits": _split_names(scores),
        "rows": _class_rows(scores, shown, codes, size, means),
    }


def sample_lists(scores: ScoreTable) -> list[Numbers]:
    """Return the samples of largest discrepancy on each side, then the most balanced ones; ties sorted by id."""
    several = len(scores.modalities) > 2
    max_rows = MAX_SAMPLES // 2 if several else MAX_SAMPLES
    lists: list[Numbers] = []
    for between, positive_side, negative_side in sides(scores)[:MAX_SIDES]:
        values = scores.discrepancy(between)
        lists.append({"side": positive_side, "rows": _list(scores, values, values > 0, values, max_rows)})
        if not several:
            lists.append({"side": negative_side, "rows": _list(scores, -values, values < 0, values, max_rows)})
    imbalance = scores.gap if scores.balance is None else -scores.balance
    all_rows = np.ones(len(scores), bool)
    lists.append({"side": None, "rows": _list(scores, -imbalance, all_rows, scores.discrepancy(), max_rows)})
    return lists


def finite(value: Any) -> float | None:
    """Return a number as a float; None if it is missing, not finite, or beyond the range of floats."""
    if value is None or (isinstance(value, int) and abs(value) > sys.float_info.max):  # integers of JSON are unbounded
        return None
    return float(value) if np.isfinite(float(value)) else None


def _valid(values: Array, groups: Groups) -> tuple[Array, Groups]:
    """Return the values (n,) that are not NaN, and their groups."""
    is_valid = ~np.isnan(values)
    return values[is_valid], None if groups is None else groups[is_valid]


def _discrepancy(discrepancy: Array, groups: Groups, side: tuple[str, str, str]) -> Numbers:
    values, groups = _valid(discrepancy, groups)
    is_ahead, is_behind = is_dominated(values, BALANCED_WITHIN), is_dominated(-values, BALANCED_WITHIN)
    counts = np.bincount(assign_bins(values, num_bins=DISCREPANCY_BINS), minlength=DISCREPANCY_BINS)
    return {
        **dict(zip(("between", "positive_side", "negative_side"), side, strict=True)),
        "edges": np.linspace(-1, 1, DISCREPANCY_BINS + 1).round(4).tolist(),
        "counts": counts.tolist(),
        "share_ahead": share_interval(is_ahead, groups),
        "share_behind": share_interval(is_behind, groups),
        "share_level": share_interval(~is_ahead & ~is_behind, groups),
        "positive": share_interval(values > 0, groups),
        "mean": mean_interval(values.astype(np.float64), groups),
        "lean": mean_interval(is_ahead.astype(np.float64) - is_behind, groups),
    }


def _bins(values: Array, num_bins: int) -> list[int]:
    """Count values (n,) in [0, 1] in equal bins; 1 is in the last bin."""
    bin_index = np.minimum((values.astype(np.float64) * num_bins).astype(np.int64), num_bins - 1)
    return list(np.bincount(bin_index, minlength=num_bins).tolist())


def _border(mixture: Mixture) -> float:
    """Return the gap up to which a sample counts as balanced: where the posterior is 0.5, or the threshold."""
    if not mixture.bimodal:
        return mixture.threshold
    grid = np.linspace(0, 1, 10 * (GRID - 1) + 1)
    return float(grid[max(int((mixture.posterior(grid) >= 0.5).sum()) - 1, 0)])


def _by_class(values: Array, codes: Array, size: Array) -> Array:
    """Return the mean of each column of values (n, c) by class, (k, c); NaN is ignored, and all-NaN gives 0."""
    is_valid = ~np.isnan(values)
    counts = [np.bincount(codes, weights=column, minlength=len(size)) for column in is_valid.T]
    sums = [np.bincount(codes, weights=column, minlength=len(size)) for column in np.where(is_valid, values, 0).T]
    return np.stack([total / np.maximum(count, 1) for total, count in zip(sums, counts, strict=True)], axis=1)


def _least_balanced_classes(means: Array, error: Array) -> Array:
    """Return the classes to show, in order, given means and interval half-widths `error` (k, c).

    They are the classes whose interval lies farthest from 0, by its nearer end, so that a class of two samples does not
    precede one of a thousand. For c = 1 each side has as many classes.
    """
    k = len(means)
    if means.shape[1] > 1:
        shown = np.argsort(-(np.abs(means) - error).max(axis=1), kind="stable")[:MAX_CLASSES]
        best = means[shown].argmax(axis=1)
        return np.asarray(shown[np.lexsort((shown, -means[shown].max(axis=1), best))])
    highest = np.argsort(-(means - error)[:, 0], kind="stable")
    lowest = np.argsort((means + error)[:, 0], kind="stable")
    half = MAX_CLASSES // 2
    shown = np.arange(k) if k <= MAX_CLASSES else np.r_[highest[:half], lowest[~np.isin(lowest, highest[:half])][:half]]
    return np.asarray(shown[np.lexsort((shown, -means[shown, 0]))])


def _split_names(scores: ScoreTable) -> list[str]:
    """Return the names of the six largest splits, in the order train, validation, test, others."""
    if scores.split is None:
        return []
    common = [str(name) for name, _ in Counter(scores.split.tolist()).most_common(MAX_SPLITS)]
    return sorted(common, key=split_order)


def split_order(name: str) -> tuple[int, str]:
    """Return the sort key of a split: train, validation, test, then the others by name."""
    return {"train": 0, "validation": 1, "test": 2}.get(name, 3), name


def _class_rows(scores: ScoreTable, shown: Array, codes: Array, size: Array, means: Array) -> list[Numbers]:
    confidence = _by_class(scores.confidence.astype(np.float64), codes, size)
    names = scores.label_name[np.unique(codes, return_index=True)[1]]
    in_split = [
        np.bincount(codes, weights=scores.split == name, minlength=len(size)).astype(int)
        for name in _split_names(scores)
    ]
    histogram = _class_histogram(scores, codes, len(size)) if len(scores.modalities) == 2 else None
    return [
        {
            "name": short(names[row], 80),
            "n": int(size[row]),
            "splits": [int(counts[row]) for counts in in_split],
            "confidence": confidence[row].tolist(),
            "discrepancy": means[row].tolist(),
            "counts": None if histogram is None else histogram[row].tolist(),
        }
        for row in shown
    ]


def _class_histogram(scores: ScoreTable, codes: Array, num_classes: int) -> Array:
    # With two modalities none is missing.
    bins = assign_bins(scores.discrepancy(), num_bins=CLASS_BINS).astype(np.int64)
    cells = np.bincount(codes * CLASS_BINS + bins, minlength=num_classes * CLASS_BINS)
    return cells.reshape(num_classes, CLASS_BINS)


def _list(scores: ScoreTable, key: Array, rows: Array, signed: Array, max_rows: int) -> list[Numbers]:
    """Return the `max_rows` samples of `rows` (n,) with the highest key (n,); `signed` is the discrepancy to show."""
    labels, first = np.unique(scores.label, return_index=True)
    names = {int(label): short(scores.label_name[row], 32) for label, row in zip(labels, first, strict=True)}
    candidates = np.flatnonzero(rows)
    if len(candidates) > max_rows:
        threshold = np.partition(key[candidates], len(candidates) - max_rows)[len(candidates) - max_rows]
        candidates = candidates[key[candidates] >= threshold]  # more than `max_rows` if keys are tied: ids decide
    order = np.lexsort((scores.sample_id[candidates].astype(str), -key[candidates]))
    highest = candidates[order[:max_rows]].tolist()
    return [_sample(scores, row, names, float(signed[row])) for row in highest]


def _sample(scores: ScoreTable, row: int, names: dict[int, str], signed: float) -> Numbers:
    paths = [] if scores.paths is None else [scores.paths[name][row].as_py() for name in scores.paths.column_names]
    predicted = None if scores.prediction is None else [_predicted(value, names) for value in scores.prediction[row]]
    return {
        "sample_id": short(scores.sample_id[row]),
        "paths": [short(path) for path in dict.fromkeys(paths) if path is not None],
        "label": names[int(scores.label[row])],
        "split": None if scores.split is None else short(scores.split[row], 20),
        "confidence": [finite(value) for value in scores.confidence[row]],
        "predicted": predicted,
        "discrepancy": finite(signed),  # NaN if a balanced sample lacks a modality of the pair
        "gap": float(scores.gap[row]),
        "balance": None if scores.balance is None else finite(scores.balance[row]),
    }


def _predicted(value: Any, names: dict[int, str]) -> str | None:
    """Format a probe's prediction, a class or a number; None if the modality is missing."""
    if isinstance(value, np.floating):
        return None if np.isnan(value) else f"{value:.3g}"
    return None if value < 0 else names.get(int(value), str(value))
