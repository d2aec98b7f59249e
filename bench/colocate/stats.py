"""Small statistics of the colocation benchmark: quantiles, covered time, ratios between arms, spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours; nan if there is nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def covered(intervals: Iterable[tuple[float, float]], seconds: float) -> float:
    """How much of [0, seconds] lies in at least one interval."""
    total, reached = 0.0, 0.0
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached), min(end, seconds)
        if end > begin:
            total += end - begin
            reached = end
    return total


def middle(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """Median [lowest-highest] of the finite values; a dash if there is none."""
    known = [scale * value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.median(known):.{digits}f} [{min(known):.{digits}f}-{max(known):.{digits}f}]"


def ratio(part: float, whole: float) -> float:
    """part / whole; nan if that means nothing."""
    return part / whole if whole and math.isfinite(whole) else math.nan
