"""Numbers of the report that follow from the scores.

Each function takes the score table and gives plain values for report.json; figures and page are drawn from these alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...audit.intervals import Groups, group_codes, mean, share
from ...audit.metrics import discrepancy as all_discrepancies
from ...audit.scores.mixture import Mixture
from ...audit.scores.table import ScoreTable
from ...rebalance.binning import bin_of
from ...rebalance.subsets import BALANCED_WITHIN

Numbers = dict[str, Any]
Array = NDArray[Any]

DISCREPANCY_BINS = 40  # of 0.05: the border of 0.2 lies between two of them
GAP_BINS = 50
MAP_BINS = (10, 25)  # few samples in many cells are noise: about 10 a cell, between these
TRAINING_BINS = (20, 20)  # of confidence and of variability
AMBIGUOUS = 0.1  # variability from which a sample counts as ambiguous; ours
GRID = 401  # points at which the mixture's densities are drawn
MOST_PAIRS = 6  # modality maps
MOST_EXAMPLES = 3  # quarantined samples named for each reason
MOST_TEXT = 160  # characters of a name or path of the user's data


def facts(record: Mapping[str, Any], scores: ScoreTable) -> Numbers:
    """Tell what was scored and how; nothing that differs between two runs of the same data and config."""
    probe = record["config"]["probe"]
    spread = scores.discrepancy_sd
    return {
        "source": record["source"],
        "version": record["version"],
        "fingerprint": record["fingerprint"],
        "seed": record["seed"],
        "counts": record["counts"],
        "classes": record["classes"],
        "groups": record["groups"],
        "group_column": record["columns"].get("group"),
        "folds": record["folds"],
        "repeats": probe["repeats"],
        "learn_from": probe["learn_from"],
        "task": record["config"]["data"]["task"],
        "modalities": [
            {key: modality.get(key) for key in ("name", "kind", "column", "length", "encoder")}
            for modality in record["modalities"]
        ],
        "within": BALANCED_WITHIN,
        "median_sd": None if spread is None else finite(np.nanmedian(spread)),
    }


def probe_report_numbers(record: Mapping[str, Any]) -> Numbers:
    """Give the probe_report: each probe's standing out of fold, what each modality adds, and the controls."""
    found = record["probe_report"]
    calibrated = [each["calibration"] for each in found["probe_metrics"] if each["calibration"]]
    return {**found, "calibrated": any(each["ece_before"] is not None for each in calibrated)}


def training(scores: ScoreTable) -> list[Numbers] | None:
    """Give, by modality, the 2-D histogram of confidence and variability over training, and where samples stand.

    counts[row][column]: rows are bins of confidence, columns bins of variability. Easy, ambiguous and hard to learn are
    the regions of dataset cartography (Swayamdipta et al., 2020); their borders here are mmaudit's.
    """
    if scores.training_confidence is None or scores.training_variability is None:
        return None
    groups, found = group_codes(scores.group), []
    for index, name in enumerate(scores.modalities):
        sure, moved = scores.training_confidence[:, index], scores.training_variability[:, index]
        there = ~np.isnan(sure)
        sure, moved = sure[there], moved[there]
        part = None if groups is None else groups[there]
        counts, _, _ = np.histogram2d(sure, moved, bins=TRAINING_BINS, range=((0, 1), (0, 0.5)))
        ambiguous = moved > AMBIGUOUS
        found.append(
            {
                "name": name,
                "counts": counts.astype(int).tolist(),
                "easy": share(~ambiguous & (sure > 0.5), part),
                "ambiguous": share(ambiguous, part),
                "hard": share(~ambiguous & (sure <= 0.5), part),
                "border": AMBIGUOUS,
            }
        )
    return found


def values(scores: ScoreTable) -> list[Numbers] | None:
    """Give the mean Shapley value of each modality and the share of samples that it misleads (phi below 0)."""
    if scores.shapley is None:
        return None
    groups, m = group_codes(scores.group), len(scores.modalities)
    found = []
    for index, name in enumerate(scores.modalities):
        phi = scores.shapley[:, index]
        there = ~np.isnan(phi)
        part = None if groups is None else groups[there]
        phi = phi[there].astype(np.float64)
        found.append(
            {
                "name": name,
                "mean": mean(phi, part, low=(1 - m) / 2, high=(1 + m) / 2),
                "carries": share(phi > 1, part),
                "misleads": share(phi < 0, part),
            }
        )
    return found


def agreement(scores: ScoreTable) -> list[Numbers] | None:
    """Count the samples by which probes name the true class: all, one alone, some, none."""
    if scores.prediction is None or scores.prediction.dtype.kind == "f":
        return None  # numbers are not right or wrong
    right = scores.prediction == scores.label[:, None]
    num_right, groups = right.sum(axis=1), group_codes(scores.group)
    m = len(scores.modalities)
    kinds = {"both" if m == 2 else f"all {m}": num_right == m}
    kinds |= {f"only {name}": right[:, index] & (num_right == 1) for index, name in enumerate(scores.modalities)}
    if m > 2:
        kinds["several, not all"] = (num_right > 1) & (num_right < m)
    kinds["neither" if m == 2 else "none"] = num_right == 0
    return [{"name": name, **share(rows, groups)} for name, rows in kinds.items()]


def discrepancies(scores: ScoreTable) -> list[Numbers]:
    """Give the histogram of each discrepancy: one of two modalities, else each modality against the rest."""
    groups = group_codes(scores.group)
    return [
        _discrepancy(scores.discrepancy(between), groups, between=between, right=right, left=left)
        for between, right, left in sides(scores)
    ]


def sides(scores: ScoreTable) -> list[tuple[str, str, str]]:
    """List the discrepancies that are shown, each with the name of its positive and of its negative side."""
    first, second = scores.modalities[:2]
    if len(scores.modalities) == 2:
        return [(f"{first}:{second}", first, second)]
    return [(name, name, "the others") for name in scores.modalities]


def standing_out(scores: ScoreTable) -> Numbers | None:
    """Of more than two modalities: give the share of samples in which none is ahead of the others, or None."""
    if len(scores.modalities) == 2:
        return None
    highest = np.fmax.reduce(all_discrepancies(scores.confidence), axis=1)
    return share(np.asarray(highest <= BALANCED_WITHIN), group_codes(scores.group))


def gaps(scores: ScoreTable, mixture: Mixture, *, class_check: str) -> Numbers:
    """Give the histogram of the gap, the mixture's densities scaled to it, and the verdict with its numbers.

    The mixture is fitted without test samples, so their histogram `fitted` is what the densities belong to.
    """
    values = scores.gap
    fits = np.ones(len(scores), bool) if scores.split is None else scores.split != "test"
    grid = np.linspace(0, 1, GRID)
    low, high = mixture.density(grid) * int(fits.sum()) / GAP_BINS
    drawn = mixture.components is not None
    verdict = mixture.to_json()
    balanced = None if scores.p_balanced is None else share(scores.p_balanced >= 0.5, group_codes(scores.group))
    return {
        "edges": np.linspace(0, 1, GAP_BINS + 1).tolist(),
        "counts": _bins(values, GAP_BINS),
        "fitted": _bins(values[fits], GAP_BINS),
        "grid": grid.tolist(),
        "curve_balanced": low.tolist() if drawn else None,
        "curve_imbalanced": high.tolist() if drawn else None,
        "border": _border(mixture),
        "share_balanced": balanced,
        "class_check": class_check[:1].upper() + class_check[1:],
        **{key: verdict[key] for key in ("bimodal", "rule", "reasons", "threshold", "dip", "dip_p")},
        **{key: verdict[key] for key in ("ashman_d", "bic_one", "bic_two", "components", "num_samples")},
    }


def maps(scores: ScoreTable) -> list[Numbers]:
    """Give the 2-D histograms of one modality's confidence against another's, of the most discrepant pairs.

    counts[row][column]: rows are bins of y, columns are bins of x.
    """
    both = {
        (a, b): scores.present[:, a] & scores.present[:, b] for a, b in combinations(range(len(scores.modalities)), 2)
    }
    pairs = [
        (float(np.abs(scores.confidence[rows, a] - scores.confidence[rows, b]).mean()), a, b)
        for (a, b), rows in both.items()
        if rows.any()
    ]
    num_bins = int(np.clip(np.sqrt(len(scores) / 10), *MAP_BINS))
    bins = np.clip((np.nan_to_num(scores.confidence) * num_bins).astype(np.int64), 0, num_bins - 1)
    found = []
    for distance, a, b in sorted(pairs, key=lambda pair: -pair[0])[:MOST_PAIRS]:
        rows = both[a, b]
        cells = np.bincount(bins[rows, b] * num_bins + bins[rows, a], minlength=num_bins**2)
        counts = cells.reshape(num_bins, num_bins).tolist()
        found.append(
            {"x": scores.modalities[a], "y": scores.modalities[b], "mean_distance": distance, "counts": counts}
        )
    return found


def quarantined(table: pa.Table) -> list[Numbers]:
    """Count quarantine.parquet by reason and modality, the most frequent first, with a few examples of each."""
    if len(table) == 0:
        return []
    cells: dict[tuple[str, str], list[int]] = {}
    reasons, modalities = table["reason"].to_pylist(), table["modality"].to_pylist()
    for row, key in enumerate(zip(reasons, [name or "" for name in modalities], strict=True)):
        cells.setdefault(key, []).append(row)
    found = []
    for (reason, modality), rows in sorted(cells.items(), key=lambda cell: (-len(cell[1]), cell[0])):
        named = table.take(rows[:MOST_EXAMPLES]).select(["sample_id", "detail"]).to_pylist()
        examples = [{key: short(text) for key, text in row.items()} for row in named]
        found.append({"reason": reason, "modality": modality or None, "count": len(rows), "examples": examples})
    return found


def finite(value: Any) -> float | None:
    """Give a number that JSON can hold, None for one that is missing or not finite."""
    if value is None or (isinstance(value, int) and abs(value) > sys.float_info.max):  # an integer has any size
        return None
    return float(value) if np.isfinite(float(value)) else None


def short(text: object, most: int = MOST_TEXT) -> str:
    """Give a text of the user's data in one line of at most `most` characters, the end kept: there files differ."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return line if len(line) <= most else f"{line[: most // 3]}…{line[most // 3 + 1 - most :]}"


def _discrepancy(everyone: Array, groups: Groups, *, between: str, right: str, left: str) -> Numbers:
    there = ~np.isnan(everyone)
    values, groups = everyone[there], None if groups is None else groups[there]
    ahead, behind = values > BALANCED_WITHIN, values < -BALANCED_WITHIN
    counts = np.bincount(bin_of(values, num_bins=DISCREPANCY_BINS), minlength=DISCREPANCY_BINS)
    return {
        "between": between,
        "right": right,
        "left": left,
        "edges": np.linspace(-1, 1, DISCREPANCY_BINS + 1).round(4).tolist(),
        "counts": counts.tolist(),
        "share_right": share(ahead, groups),
        "share_left": share(behind, groups),
        "share_level": share(~ahead & ~behind, groups),
        "positive": share(values > 0, groups),
        "mean": mean(values.astype(np.float64), groups),
        "lean": mean(ahead.astype(np.float64) - behind, groups),
    }


def _bins(values: Array, num_bins: int) -> list[int]:
    """Count values (n,) in [0, 1] in equal bins; 1 is in the last."""
    places = np.minimum((values.astype(np.float64) * num_bins).astype(np.int64), num_bins - 1)
    return list(np.bincount(places, minlength=num_bins).tolist())


def _border(mixture: Mixture) -> float:
    """Give the gap up to which a sample counts as balanced: posterior 0.5, or the rule's threshold."""
    if not mixture.bimodal:
        return mixture.threshold
    grid = np.linspace(0, 1, 10 * (GRID - 1) + 1)
    return float(grid[max(int((mixture.posterior(grid) >= 0.5).sum()) - 1, 0)])
