"""Classes and samples that the report lists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...audit.metrics import discrepancy
from ...audit.scores.table import ScoreTable
from ...rebalance.binning import bin_of
from .findings import Numbers, finite, short, sides

Array = NDArray[Any]

CLASS_BINS = 20
MOST_CLASSES = 40
MOST_SPLITS = 6
MOST_SAMPLES = 20  # of each side of two modalities; half as many of each of more
MOST_SIDES = 6  # modalities whose samples are listed


def class_numbers(scores: ScoreTable) -> Numbers:
    """Describe the classes, of many the most lopsided: counts by split, mean confidences, discrepancies."""
    codes = np.unique(scores.label, return_inverse=True)[1]
    size = np.bincount(codes)
    signed = discrepancy(scores.confidence).reshape(len(scores), -1).astype(np.float64)
    means = _by_class(signed, codes, size)
    within = np.sqrt(np.nanmean((signed - means[codes]) ** 2, axis=0))
    shown = _most_lopsided(means, 1.96 * within / np.sqrt(size)[:, None])
    return {
        "num_classes": len(size),
        "left_out": len(size) - len(shown),
        "names": [side[1] for side in sides(scores)],
        "edges": np.linspace(-1, 1, CLASS_BINS + 1).round(4).tolist(),
        "splits": _split_names(scores),
        "rows": _class_rows(scores, shown, codes, size, means),
    }


def sample_lists(scores: ScoreTable) -> list[Numbers]:
    """List the most lopsided samples of each side, then the most balanced ones; ties by id."""
    several = len(scores.modalities) > 2
    most = MOST_SAMPLES // 2 if several else MOST_SAMPLES
    found: list[Numbers] = []
    for between, right, left in sides(scores)[:MOST_SIDES]:
        values = scores.discrepancy(between)
        found.append({"side": right, "rows": _list(scores, values, values > 0, values, most)})
        if not several:
            found.append({"side": left, "rows": _list(scores, -values, values < 0, values, most)})
    badness = scores.gap if scores.balance is None else -scores.balance
    everything = np.ones(len(scores), bool)
    found.append({"side": None, "rows": _list(scores, -badness, everything, scores.discrepancy(), most)})
    return found


def _by_class(values: Array, codes: Array, size: Array) -> Array:
    """Give the mean of each column of values (n, c) by class, (k, c); NaN counts for nothing, and 0 where all is."""
    there = ~np.isnan(values)
    held = [np.bincount(codes, weights=column, minlength=len(size)) for column in there.T]
    sums = [np.bincount(codes, weights=column, minlength=len(size)) for column in np.where(there, values, 0).T]
    return np.stack([total / np.maximum(count, 1) for total, count in zip(sums, held, strict=True)], axis=1)


def _most_lopsided(means: Array, error: Array) -> Array:
    """Give the classes to show, in order, from means and half intervals (k, c): for c = 1 as many of either side.

    They are those farthest from 0, counted from the near end of the interval, so that a class of two samples does not
    come before one of a thousand.
    """
    k = len(means)
    if means.shape[1] > 1:
        shown = np.argsort(-(np.abs(means) - error).max(axis=1), kind="stable")[:MOST_CLASSES]
        best = means[shown].argmax(axis=1)
        return np.asarray(shown[np.lexsort((shown, -means[shown].max(axis=1), best))])
    right = np.argsort(-(means - error)[:, 0], kind="stable")
    left = np.argsort((means + error)[:, 0], kind="stable")
    half = MOST_CLASSES // 2
    shown = np.arange(k) if k <= MOST_CLASSES else np.r_[right[:half], left[~np.isin(left, right[:half])][:half]]
    return np.asarray(shown[np.lexsort((shown, -means[shown, 0]))])


def _split_names(scores: ScoreTable) -> list[str]:
    """Name the splits, those that people order first in their order."""
    if scores.split is None:
        return []
    common = [str(name) for name, _ in Counter(scores.split.tolist()).most_common(MOST_SPLITS)]
    return sorted(common, key=split_place)


def split_place(name: str) -> tuple[int, str]:
    """Give the key by which splits are ordered for reading."""
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
    bins = bin_of(scores.discrepancy(), num_bins=CLASS_BINS).astype(np.int64)  # of two modalities none is missing
    cells = np.bincount(codes * CLASS_BINS + bins, minlength=num_classes * CLASS_BINS)
    return cells.reshape(num_classes, CLASS_BINS)


def _list(scores: ScoreTable, key: Array, rows: Array, signed: Array, most: int) -> list[Numbers]:
    """Describe the `most` samples of `rows` (n,) with the highest key (n,); `signed` is the discrepancy to tell."""
    names = _class_names(scores)
    return [_sample(scores, row, names, float(signed[row])) for row in _highest(scores, key, rows, most)]


def _highest(scores: ScoreTable, key: Array, rows: Array, most: int) -> list[int]:
    places = np.flatnonzero(rows)
    if len(places) > most:
        least = np.partition(key[places], len(places) - most)[len(places) - most]
        places = places[key[places] >= least]  # more than `most` where several are level: the ids decide
    order = np.lexsort((scores.sample_id[places].astype(str), -key[places]))
    return list(places[order[:most]].tolist())


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
        "discrepancy": finite(signed),  # of a balanced sample one of the pair may be missing
        "gap": float(scores.gap[row]),
        "balance": None if scores.balance is None else finite(scores.balance[row]),
    }


def _predicted(value: Any, names: dict[int, str]) -> str | None:
    """Name what a probe named: a class, or a number; None where it has nothing to go by."""
    if isinstance(value, np.floating):
        return None if np.isnan(value) else f"{value:.3g}"
    return None if value < 0 else names.get(int(value), str(value))
