"""Who owns the device: the page at /dashboard, the JSON it polls (/debug/state) and the trace for Perfetto (/debug/timeline).

The page is one file without a foreign byte, and says nothing by itself: it may be read without a key, what it shows may not.
Its policy allows its own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
import time
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine.errors import InvalidRequest
from engine.timeline import PARTS, Ring, Span
from engine.types import Tenant
from server.admin import sluice_version
from server.http import json_response
from server.recent import WINDOW
from server.service import SERVICE, Service
from server.trace import chrome_trace

if TYPE_CHECKING:
    from engine import Engine
    from engine.stats import Stats

Json = dict[str, Any]

MAX_SECONDS = 3600.0


async def dashboard(request: web.Request) -> web.StreamResponse:
    """GET /dashboard: the page."""
    body, policy = _page()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return web.Response(body=body, headers=headers, content_type="text/html", charset="utf-8")


@functools.cache
def _page() -> tuple[bytes, str]:
    body = (files("server") / "static" / "dashboard.html").read_bytes()
    allowed = {}
    for tag in ("script", "style"):
        text = re.search(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), body, re.DOTALL)
        assert text is not None, tag
        allowed[tag] = base64.b64encode(hashlib.sha256(text[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return body, policy


async def timeline(request: web.Request) -> web.StreamResponse:
    """GET /debug/timeline?seconds=N: the last N seconds (default 30) as Chrome-trace JSON."""
    engine = request.app[SERVICE].engine
    seconds = _seconds(request.query.get("seconds", "30"))
    headers = {"Content-Disposition": 'attachment; filename="sluice-timeline.json"'}
    return json_response(await asyncio.to_thread(chrome_trace, engine.timeline, seconds), headers=headers)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidRequest(f"seconds must be a number above 0 and at most {MAX_SECONDS:g}", param="seconds")
    return seconds


async def state(request: web.Request) -> web.StreamResponse:
    """GET /debug/state?after=CURSOR: all that the dashboard shows; of spans and events those after the cursor of an earlier
    answer. Seconds, but spans and events in microseconds of the engine's clock, whose present is `now`.
    """
    service = request.app[SERVICE]
    engine = service.engine
    after = _cursor(request.query.get("after", ""))
    stats = engine.stats()
    body = {
        "version": sluice_version(),
        "status": service.status,
        "paused": sorted(stats.paused),
        "uptime": time.monotonic() - service.started,
        "models": [{"id": card.id, "tenant": card.tenant.value} for card in engine.models],
        "tenants": {tenant.value: _tenant(stats, tenant) for tenant in Tenant},
        "device": _device(stats),
        "kv": await asyncio.to_thread(_kv, engine, stats),
        "latency": {
            tenant.value: {kind: service.metrics.recent.summary(tenant, kind) for kind in ("ttft", "tpot")} for tenant in Tenant
        },
        "slo": {kind: service.metrics.recent.targets.get(kind) for kind in ("ttft", "tpot")},
        "jobs": jobs_of(service),
    }
    return json_response(body | await asyncio.to_thread(_recorded, engine, after))


def _cursor(text: str) -> list[int]:
    """Numbers of the rings, as `cursor` told them. Anything else means: from the beginning."""
    parts = text.split(".")
    known = len(parts) == 4 and all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts)
    return [int(part) for part in parts] if known else [0] * 4


def _recorded(engine: Engine, after: list[int]) -> Json:
    recorded = engine.timeline
    now = recorded.clock.now()
    steps, at_steps = _spans(recorded.steps, after[0], now)
    offline, at_offline = _spans(recorded.offline_steps, after[1], now)
    switches, at_switches = _spans(recorded.switches, after[2], now)
    events, at_events = recorded.events(after[3])
    return {
        "began": round(recorded.began * 1e6),
        "now": round(now * 1e6),
        "window": WINDOW,
        "cursor": f"{at_steps}.{at_offline}.{at_switches}.{at_events}",
        "parts": PARTS,
        "steps": steps,
        "offline_steps": offline,
        "switches": switches,
        "holds": [(round(start * 1e6), round(end * 1e6)) for start, end in recorded.holds(now) if end >= now - WINDOW],
        "events": [{"at": round(e.at * 1e6), "kind": e.kind, "cause": e.cause, "cost": e.cost} for e in events[-100:]],
    }


def _spans(ring: Ring[Span], after: int, now: float) -> tuple[list[tuple[int, ...]], int]:
    """[start, duration, tokens by part..., rows], of the window that the page shows."""
    spans, number = ring.since(after)
    since = now - WINDOW - 1
    return [
        (round(span.start * 1e6), round(span.seconds * 1e6), *span.parts, span.rows) for span in spans if span.end >= since
    ], number


def _tenant(stats: Stats, tenant: Tenant) -> Json:
    part = stats.tenants[tenant]
    counters = part.counters
    return {
        "running": part.running,
        "waiting": part.waiting,
        "finished": counters.finished,
        "computed_tokens": counters.computed_tokens,
        "generated_tokens": counters.generated_tokens,
        "recomputed_tokens": counters.recomputed_tokens,
        "preemptions": counters.preemptions,
        "prefix_hit_rate": part.prefix_hits / max(1, part.prefix_queries),
    }


def _device(stats: Stats) -> Json:
    sharing = stats.sharing
    told: Json = {"seconds": stats.device_seconds, "computing": stats.part_seconds}
    if sharing is None:
        return told | {"sharing": "one model"}
    return told | {
        "sharing": "two models",
        "state": sharing.state.value,
        "gate": sharing.gate,
        "cooldown": sharing.cooldown_seconds,
        "preemptions": sharing.preemptions,
        "preemption_seconds": sharing.preemption_seconds,
        "reclaims": sharing.reclaims,
        "reclaimed_slabs": sharing.reclaimed_slabs,
        "headroom_slabs": sharing.headroom_slabs,
        "worker_restarts": sharing.worker_restarts,
        "worker_failure": sharing.worker_failure,
    }


def _kv(engine: Engine, stats: Stats) -> Json:
    """Percent of each slab in use, and whose slab it is; a slab without an owner is everybody's."""
    slabs = [
        (
            None if use.owner is None else use.owner.value,
            round(use.online * 100),
            round(use.offline * 100),
            round(use.cached * 100),
        )
        for use in engine.slab_use()
    ]
    return {"slabs": slabs, "pages": stats.kv_pages, "free": stats.kv_pages_free, "page_size": stats.page_size}


def jobs_of(service: Service) -> list[Json]:
    """Jobs with their progress, in the order in which they are served, then those that ended lately."""
    return [] if service.batches is None else [asdict(view) for view in service.batches.summary()]
