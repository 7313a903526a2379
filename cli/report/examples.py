"""Numbers of the classes and samples that the report lists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...audit.metrics import assign_bins, discrepancy
from ...audit.scores.table import ScoreTable
from .findings import Numbers, finite, short, sides

Array = NDArray[Any]

CLASS_BINS = 20
MAX_CLASSES = 40
MAX_SPLITS = 6
MAX_SAMPLES = 20  # per side of two modalities; half as many per modality if there are more
MAX_SIDES = 6  # modalities whose samples are listed


def class_numbers(scores: ScoreTable) -> Numbers:
    """Return counts by split, mean confidences and discrepancies of the least balanced classes, at most 40."""
    codes = np.unique(scores.label, return_inverse=True)[1]
    size = np.bincount(codes)
    signed = discrepancy(scores.confidence).reshape(len(scores), -1).astype(np.float64)
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
    first = np.unique(codes, return_index=True)[1]
    names, splits = scores.label_name[first], _split_names(scores)
    in_split = {
        name: np.bincount(codes, weights=scores.split == name, minlength=len(size)).astype(int)
        for name in splits
        if scores.split is not None
    }
    histogram = _class_histogram(scores, codes, len(size)) if len(scores.modalities) == 2 else None
    return [
        {
            "name": short(names[row], 80),
            "n": int(size[row]),
            "splits": [int(in_split[name][row]) for name in splits],
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
    names = _class_names(scores)
    return [_sample(scores, row, names, float(signed[row])) for row in _highest(scores, key, rows, max_rows)]


def _highest(scores: ScoreTable, key: Array, rows: Array, max_rows: int) -> list[int]:
    candidates = np.flatnonzero(rows)
    if len(candidates) > max_rows:
        threshold = np.partition(key[candidates], len(candidates) - max_rows)[len(candidates) - max_rows]
        candidates = candidates[key[candidates] >= threshold]  # more than `max_rows` if keys are tied: ids decide
    order = np.lexsort((scores.sample_id[candidates].astype(str), -key[candidates]))
    return list(candidates[order[:max_rows]].tolist())


def _class_names(scores: ScoreTable) -> dict[int, str]:
    labels, first = np.unique(scores.label, return_index=True)
    return {int(label): short(scores.label_name[row], 32) for label, row in zip(labels, first, strict=True)}


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
