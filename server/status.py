"""What the server says about itself while it runs: lines now and then, the use of memory, how late its event loop is."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from engine.timeline import Memory
from engine.types import Tenant
from server.metrics import Metrics

if TYPE_CHECKING:
    from engine import Engine
    from engine.stats import Stats
    from server.jobs import Jobs

log = logging.getLogger(__name__)

_LAG_INTERVAL = 0.5
_MEMORY_INTERVAL = 0.25


async def report_status(engine: Engine, interval: float) -> None:
    """Log a line per tenant, and one of the device, every `interval` seconds in which there was work. 0: never."""
    before, since = engine.stats(), time.monotonic()
    while interval:
        await asyncio.sleep(interval)
        now, at = engine.stats(), time.monotonic()
        if _busy(before, now):
            for line, fields in status_lines(before, now, at - since):
                log.info("%s", line, extra={"fields": fields})
        before, since = now, at


def _busy(before: Stats, now: Stats) -> bool:
    return any(
        now.tenants[tenant].running
        or now.tenants[tenant].waiting
        or now.tenants[tenant].counters != before.tenants[tenant].counters
        for tenant in Tenant
    )


def status_lines(before: Stats, now: Stats, seconds: float) -> list[tuple[str, dict[str, Any]]]:
    """What happened between two looks, for people and as fields: each tenant, then the device and the KV memory."""
    owned = {owner: max(0.0, now.device_seconds[owner] - before.device_seconds[owner]) for owner in now.device_seconds}
    shares = {owner: time / (sum(owned.values()) or 1.0) for owner, time in owned.items()}
    lines = [_tenant_line(tenant, before, now, seconds, shares[tenant.value]) for tenant in Tenant]
    free = now.kv_pages_free / max(1, now.kv_pages)
    fields = {"device": {owner: round(share, 4) for owner, share in shares.items()}, "kv_free": round(free, 4)}
    text = " ".join(f"{owner} {share:.0%}" for owner, share in shares.items())
    return [*lines, (f"device: {text} | KV free {free:.0%}", fields)]


def _tenant_line(tenant: Tenant, before: Stats, now: Stats, seconds: float, share: float) -> tuple[str, dict[str, Any]]:
    part, counters, old = now.tenants[tenant], now.tenants[tenant].counters, before.tenants[tenant].counters
    fields: dict[str, Any] = {
        "tenant": tenant.value,
        "running": part.running,
        "waiting": part.waiting,
        "computed_per_second": round((counters.computed_tokens - old.computed_tokens) / seconds, 1),
        "generated_per_second": round((counters.generated_tokens - old.generated_tokens) / seconds, 1),
        "prefix_hit_rate": round(part.prefix_hits / max(1, part.prefix_queries), 4),
        "kv_usage": round(part.kv_pages / max(1, now.kv_pages), 4),
        "preemptions": counters.preemptions - old.preemptions,
        "device_share": round(share, 4),
    }
    line = (
        f"{tenant.value}: run {part.running} wait {part.waiting} in {fields['computed_per_second']:.0f} "
        f"out {fields['generated_per_second']:.0f} tok/s hits {fields['prefix_hit_rate']:.0%} "
        f"KV {fields['kv_usage']:.0%} gave way {fields['preemptions']} device {share:.0%}"
    )
    return line, fields


async def sample_memory(engine: Engine) -> None:
    """Enter the use of the KV memory in the timeline, now and then."""
    while True:
        engine.timeline.memory.append(Memory(engine.timeline.clock.now(), *engine.kv_shares()))
        await asyncio.sleep(_MEMORY_INTERVAL)


async def watch_jobs(jobs: Jobs, engine: Engine) -> None:
    """Enter what becomes of each job in the timeline."""
    known = {view.id: view.state for view in jobs.summary()}
    while True:
        await asyncio.sleep(_LAG_INTERVAL)
        for view in jobs.summary():
            if known.get(view.id) != view.state:
                cause = f"{view.id}: {view.state.replace('_', ' ')}" + (f" ({view.reason})" if view.reason else "")
                engine.timeline.event("job", cause, lines_done=view.done, lines_failed=view.failed)
        known = {view.id: view.state for view in jobs.summary()}


async def watch_loop_lag(metrics: Metrics) -> None:
    """Measure how late a timer runs: what blocks the loop delays every stream."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.loop_lag.observe(max(0.0, loop.time() - due))
