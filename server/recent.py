"""What online clients felt lately: the last first-token and per-token times, for the dashboard and the status line.

Also counts who missed a target, and why.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from engine.types import Tenant

WINDOW = 60.0  # seconds
_KEPT = 4096
CAUSES = ("colocation", "load", "other")


class Recent:
    """Times of requests by tenant and kind ("ttft", "tpot"), and how many of them missed their target."""

    def __init__(self) -> None:
        self.targets: dict[str, float] = {}  # seconds that an online request should not exceed, by kind, where one is set
        self.missed = {(kind, cause): 0 for kind in ("ttft", "tpot") for cause in CAUSES}
        self._times: dict[tuple[Tenant, str], deque[tuple[float, float]]] = {
            (tenant, kind): deque(maxlen=_KEPT) for tenant in Tenant for kind in ("ttft", "tpot")
        }

    def add(self, tenant: Tenant, kind: str, seconds: float, delayed: float = 0.0, queued: float = 0.0) -> None:
        """Enter what a request felt, and how much of it was spent on offline work, and in the queue."""
        self._times[tenant, kind].append((time.monotonic(), seconds))
        target = self.targets.get(kind, float("inf"))
        if tenant is Tenant.ONLINE and seconds > target:
            self.missed[kind, cause_of(seconds - target, delayed, queued)] += 1

    def summary(self, tenant: Tenant, kind: str, window: float = WINDOW) -> dict[str, Any]:
        """Median, 99th percentile (seconds; None where nothing came) and number of the last `window` seconds."""
        since = time.monotonic() - window
        times = sorted(seconds for at, seconds in self._times[tenant, kind] if at >= since)
        if not times:
            return {"p50": None, "p99": None, "count": 0}
        return {"p50": _rank(times, 0.5), "p99": _rank(times, 0.99), "count": len(times)}


def cause_of(excess: float, delayed: float, queued: float) -> str:
    """Why a target was missed by `excess` seconds: what alone would have had to be away for it to be met."""
    if delayed >= excess:
        return "colocation"
    return "load" if queued >= excess else "other"


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
