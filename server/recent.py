"""What online clients felt lately: the last first-token and per-token times, for the dashboard and the status line."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from engine.types import Tenant

WINDOW = 60.0  # seconds
_KEPT = 4096


class Recent:
    """Times of requests by tenant and kind ("ttft", "tpot"), and how many of them missed their target."""

    def __init__(self) -> None:
        self.targets: dict[str, float] = {}  # seconds that an online request should not exceed, by kind, where one is set
        self.missed = {"ttft": 0, "tpot": 0}
        self._times: dict[tuple[Tenant, str], deque[tuple[float, float]]] = {
            (tenant, kind): deque(maxlen=_KEPT) for tenant in Tenant for kind in ("ttft", "tpot")
        }

    def add(self, tenant: Tenant, kind: str, seconds: float) -> None:
        self._times[tenant, kind].append((time.monotonic(), seconds))
        if tenant is Tenant.ONLINE and seconds > self.targets.get(kind, float("inf")):
            self.missed[kind] += 1

    def summary(self, tenant: Tenant, kind: str, window: float = WINDOW) -> dict[str, Any]:
        """Median, 99th percentile (seconds; None where nothing came) and number of the last `window` seconds."""
        since = time.monotonic() - window
        times = sorted(seconds for at, seconds in self._times[tenant, kind] if at >= since)
        if not times:
            return {"p50": None, "p99": None, "count": 0}
        return {"p50": _rank(times, 0.5), "p99": _rank(times, 0.99), "count": len(times)}


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
