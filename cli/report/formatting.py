"""Numbers and names as text, for the page and the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

MAX_SHORT = 16  # characters of a name that never breaks
MAX_UNBROKEN = 24  # characters of a name without a line break; words of no language are much longer


def breakable(name: object) -> Markup:
    """Return a name as HTML that may break at spaces, after / _ . - and within parts of more than 24 characters.

    A word of up to 16 characters never breaks. Longer names are in a span of the class `long`, which has a minimum
    width.
    """
    words = re.split(r"( +)", str(name))
    text = Markup("").join(Markup("<wbr>").join(escape(part) for part in _parts(word)) for word in words)
    return text if len(str(name)) <= MAX_SHORT else Markup('<span class="long">{}</span>').format(text)


def _parts(word: str) -> list[str]:
    """Cut a word where a line may break."""
    if len(word) <= MAX_SHORT:
        return [word]
    parts = re.findall(r"[^/_.\-]*[/_.\-]+|[^/_.\-]+$", word)
    return [part[start : start + MAX_UNBROKEN] for part in parts for start in range(0, len(part), MAX_UNBROKEN)]


def percent(value: float) -> str:
    """Format a share, 0.361 as 36%: with a decimal near 0 and 1; 0% and 100% only if exact."""
    if 1e-9 < value < 0.0005:
        return "<0.1%"
    if 0.9995 < value < 1 - 1e-9:
        return ">99.9%"
    near = 0.0005 <= value < 0.0995 or 0.9905 < value <= 0.9995
    return f"{100 * value:.{1 if near else 0}f}%"


def interval(numbers: Mapping[str, Any]) -> str:
    """Format a share with its interval."""
    return f"{percent(numbers['share'])} [{percent(numbers['low'])}, {percent(numbers['high'])}]"


def signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign; the minus sign is U+2212."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def small(p: float) -> str:
    """Format a p value; the table of the dip test ends at 0.001."""
    return "≤ 0.001" if p < 0.0015 else f"{p:.3f}"


def accuracy(metrics: Mapping[str, Any]) -> str:
    """Format an accuracy with its interval, in percent."""
    low, high = 100 * metrics["accuracy_low"], 100 * metrics["accuracy_high"]
    return f"{100 * metrics['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def probe_metric(probe: Mapping[str, Any], metric: str) -> str:
    """Format a probe's metric with its interval: a share in percent, R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (f"{scale * probe[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def gain(numbers: Mapping[str, Any], metric: str) -> str:
    """Format a gain with its interval: of a share in points, of R^2 unscaled."""
    scale, digits = (1, 2) if metric == "R^2" else (100, 1)
    value, low, high = (signed(scale * numbers[key], digits) for key in ("gain", "low", "high"))
    return f"{value}{'' if metric == 'R^2' else ' points'} [{low}, {high}]"


def amount(value: float) -> str:
    """Format a fractional count, below 10 with one decimal."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def edge(value: float) -> str:
    """Format the edge of a bin with at most four decimals, and a minus sign U+2212."""
    return f"{round(value, 4) + 0.0:g}".replace("-", "−")
