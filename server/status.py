"""What the server says about itself while it runs: one line now and then, and how late its event loop is."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from engine.types import Tenant
from server.metrics import Metrics

if TYPE_CHECKING:
    from engine import Engine
    from engine.engine import Stats

log = logging.getLogger(__name__)

_INTERVAL = 10.0
_LAG_INTERVAL = 0.5


async def report_status(engine: Engine, interval: float = _INTERVAL) -> None:
    """Log a line every `interval` seconds in which there was work."""
    before, since = engine.stats(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now, at = engine.stats(), time.monotonic()
        if _busy(before, now):
            log.info("%s", status_line(before, now, at - since))
        before, since = now, at


def _busy(before: Stats, now: Stats) -> bool:
    return any(
        now.tenants[tenant].running
        or now.tenants[tenant].waiting
        or now.tenants[tenant].counters != before.tenants[tenant].counters
        for tenant in Tenant
    )


def status_line(before: Stats, now: Stats, seconds: float) -> str:
    """One part per tenant, then the KV memory."""
    parts = []
    for tenant in Tenant:
        part, old = now.tenants[tenant], before.tenants[tenant].counters
        computed = (part.counters.computed_tokens - old.computed_tokens) / seconds
        generated = (part.counters.generated_tokens - old.generated_tokens) / seconds
        parts.append(
            f"{tenant.value} run {part.running} wait {part.waiting} in {computed:.0f} out {generated:.0f} tok/s "
            f"hits {part.prefix_hits / max(1, part.prefix_queries):.0%}"
        )
    shares = [f"{tenant.value} {now.tenants[tenant].kv_pages / max(1, now.kv_pages):.0%}" for tenant in Tenant]
    return " | ".join((*parts, f"KV {' '.join(shares)} free {now.kv_pages_free / max(1, now.kv_pages):.0%}"))


async def watch_loop_lag(metrics: Metrics) -> None:
    """Measure how late a timer runs: what blocks the loop delays every stream."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.loop_lag.observe(max(0.0, loop.time() - due))
