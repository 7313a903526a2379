"""Uniformity: how evenly is the discrepancy of a manifest distributed, before and after, and where is it short?

All from NAME.balance.json, the numbers that a split leaves beside its manifest: no row is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from ...audit.settings import build
from ...rebalance.balanced import BalancedConfig
from .examples import split_place
from .findings import Numbers, short

Found = Mapping[str, Any]

MOST_CLASSES = 12  # of a manifest, the least uniform first
MOST_SHORTAGES = 8
MOST_RANGES = 6  # of empty bins
_SAME = 5e-4  # distances are told to three places


def uniformity(found: Found, splits: Mapping[str, int]) -> Numbers:
    """Give what the page tells of one split from its numbers; `splits` are the kept samples by split.

    `made` is None where the split was not made to be uniform: then there is no curve, no class and nothing is short.
    """
    recipe = found["recipe"].get("balanced")
    config = None if recipe is None else build(BalancedConfig, recipe, where="recipe.balanced.")
    edges = np.linspace(-1, 1, found["bins"] + 1).round(6).tolist()
    ranges, measures = _ranges(found["empty_bins"], edges), ("distance", "ks", "positive")
    return {
        "made": None if config is None else _made(config, bins=found["bins"]),
        "edges": edges,
        "before": found["counts_before"],
        "after": found["counts_after"],
        **{f"{name}_{when}": found[when][name] for name in measures for when in ("before", "after")},
        "effective_size": found["effective_size"],
        "empty_bins": len(found["empty_bins"]),
        "empty_ranges": ranges[:MOST_RANGES],
        "empty_cut": len(ranges) > MOST_RANGES,
        "distances": [
            {"split": short(name), "kept": splits.get(name, 0), "distance": distance}
            for name, distance in sorted(found["distances"].items(), key=lambda pair: split_place(pair[0]))
        ],
        "curve": [] if config is None else found.get("curve", []),
        "more": None if config is None else _more(found, config),
        "classes": None if config is None else _classes(found["classes"]),
        "shortages": _shortages(found["shortages"], edges) if _cuts_bins(config) else [],
    }


def _made(config: BalancedConfig, *, bins: int) -> Numbers:
    """Say what was made uniform, and how."""
    return {
        "bins": bins,
        "tolerance": config.tolerance if config.size is not None or config.by == "weight" else config.allowed,
        "size": config.size,
        "weighted": config.by == "weight",
        "most_weight": config.most_weight,
        "grid": config.grid,
        "per_class": config.per_class,
    }


def _cuts_bins(config: BalancedConfig | None) -> bool:
    """Tell whether bins of the discrepancy were cut to a level, of which every class has an even share."""
    return config is not None and not config.grid and config.by != "weight"


def _ranges(bins: Sequence[int], edges: Sequence[float]) -> list[list[float]]:
    """Give the stretches [low, high] of the discrepancy that these bins cover, neighbours joined."""
    found: list[list[float]] = []
    for place in bins:
        if found and found[-1][1] == edges[place]:
            found[-1][1] = edges[place + 1]
        else:
            found.append([edges[place], edges[place + 1]])
    return found


def _more(found: Found, config: BalancedConfig) -> Numbers | None:
    """Give the next point of the curve that keeps more: what a larger tolerance would buy."""
    if config.by == "weight" or config.per_class or config.size is not None:
        return None
    larger = [point for point in found.get("curve", []) if point["tolerance"] > config.allowed]
    return next((point for point in larger if point["size"] > found["kept"]), None)


def _classes(classes: Sequence[Found]) -> Numbers:
    """Count the classes that came nearer to uniform, and give those that stand worst: first what keeps nothing."""
    there = [each for each in classes if each["before"]]
    kept = [each for each in there if each["after"]]
    moved = [each["distance_after"] - each["distance_before"] for each in kept]
    worst = sorted(there, key=lambda each: (bool(each["after"]), -each["distance_after"], each["name"]))
    return {
        "number": len(there),
        "lost": len(there) - len(kept),
        "nearer": sum(change < -_SAME for change in moved),
        "farther": sum(change > _SAME for change in moved),
        "median_before": median(each["distance_before"] for each in there) if there else 0.0,
        "median_after": median(each["distance_after"] for each in kept) if kept else 0.0,
        "worst": [_class(each) for each in worst[:MOST_CLASSES]],
    }


def _class(found: Found) -> Numbers:
    """Describe a class; one of which nothing is kept has no distance afterwards."""
    after = ("distance_after", "ks_after")
    return {
        **found,
        "name": short(found["name"], 80),
        **{name: found[name] if found["after"] else None for name in after},
    }


def _shortages(shortages: Sequence[Found], edges: Sequence[float]) -> list[Numbers]:
    """Give the bins and classes that lack most of an even share, with edges that are not 0.09999."""
    return [
        {
            "class": short(each["class"], 80),
            "bin": each["bin"],
            "low": edges[each["bin"]],
            "high": edges[each["bin"] + 1],
            "has": each["has"],
            "even": each["even"],
        }
        for each in shortages[:MOST_SHORTAGES]
        if round(each["even"]) > each["has"]  # half a sample is nothing to look for
    ]
