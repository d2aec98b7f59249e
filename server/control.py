"""What administrators see and do while work runs: requests that are not over, pause, resume, abort, drain; a deep check."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from aiohttp import web

from engine.errors import InvalidRequest
from engine.openai import Answer, Job, error_body
from engine.types import SamplingParams, Tenant
from server.admission import Refused
from server.http import json_response
from server.service import CLIENT, SERVICE, Phase, Service, unavailable

MAX_LISTED = 1000


async def health_generate(request: web.Request) -> web.StreamResponse:
    """GET /health_generate: 200 if the online model gives a token within `--health-generate-timeout` seconds."""
    service = request.app[SERVICE]
    engine = service.engine_for_work()
    service.check_moving()
    if Tenant.ONLINE in engine.paused:
        raise unavailable("online work is paused", "paused", 5.0)
    seconds = service.config.health_generate_timeout
    with service.in_flight.hold(request[CLIENT], Tenant.ONLINE), engine.arriving():
        generation = engine.submit("Hello", SamplingParams(max_tokens=1, temperature=0.0))
        try:
            async with asyncio.timeout(seconds or None):
                await generation.completion()
        except TimeoutError:
            raise unavailable(f"no token came within {seconds:g} s", "health_generate_timeout", 5.0) from None
    return json_response({"status": service.phase.value})


async def requests(request: web.Request) -> web.StreamResponse:
    """GET /debug/requests?tenant=T&limit=N: what is not over, oldest first; lines of batches too. Nothing of what it says."""
    service = request.app[SERVICE]
    engine = service.engine
    tenant, limit = _tenant(request), _limit(request.query.get("limit", str(MAX_LISTED)))
    askers = {generation.request_id: (asker, job) for job, asker in service.jobs.items() for generation in job.generations}
    views = [view for view in engine.requests() if tenant is None or view.tenant is tenant]
    data: list[dict[str, Any]] = []
    for view in views[:limit]:
        asker, job = askers.get(view.id, (None, None))
        known: dict[str, Any] = {"request_id": None, "client": None, "stream": False}
        if asker is not None and job is not None:
            known = {"request_id": asker.request_id, "client": asker.client, "stream": job.call.stream}
        data.append(asdict(view) | known)
    paused = sorted(tenant.value for tenant in engine.paused)
    return json_response({"object": "list", "paused": paused, "total": len(views), "data": data})


async def pause(request: web.Request) -> web.StreamResponse:
    """POST /admin/pause?tenant=T: requests of that tenant (default: of both) stand still and keep what they have."""
    engine = request.app[SERVICE].engine
    engine.pause(*filter(None, [_tenant(request)]))
    return json_response({"paused": sorted(engine.paused)})


async def resume(request: web.Request) -> web.StreamResponse:
    """POST /admin/resume?tenant=T: undo it."""
    engine = request.app[SERVICE].engine
    engine.resume(*filter(None, [_tenant(request)]))
    return json_response({"paused": sorted(engine.paused)})


async def abort(request: web.Request) -> web.StreamResponse:
    """POST /admin/abort?request_id=ID, or ?tenant=T: end that request, or all of the tenant's. Their clients get an error.

    A line of a batch that is ended by its id fails; one of those that are ended with their tenant is run again.
    """
    service = request.app[SERVICE]
    request_id, tenant = request.query.get("request_id"), _tenant(request)
    if (request_id is None) == (tenant is None):
        raise InvalidRequest("give a request_id or a tenant", param="request_id")
    aborted = _abort_tenant(service, tenant) if tenant is not None else _abort_one(service, request_id or "")
    if request_id is not None and not aborted:
        body = error_body(f"no unfinished request {request_id!r}", "invalid_request_error", "not_found", "request_id")
        raise Refused(Answer(404, body))
    return json_response({"aborted": aborted})


def _abort_one(service: Service, request_id: str) -> int:
    """By the id of the answer, by that of the HTTP request, or by the engine's own name of it."""
    jobs = [job for job, asker in service.jobs.items() if request_id in (job.head.id, asker.request_id)]
    return sum(_revoke(service, job) for job in jobs) or int(service.engine.abort(request_id))


def _abort_tenant(service: Service, tenant: Tenant) -> int:
    revoked = sum(_revoke(service, job) for job in tuple(service.jobs) if job.tenant is tenant)
    return revoked + service.engine.abort_all(tenant)


def _revoke(service: Service, job: Job) -> int:
    return sum(service.engine.abort(generation.request_id) for generation in job.generations)


async def drain(request: web.Request) -> web.StreamResponse:
    """POST /admin/drain: take no new requests, let those in flight finish, then leave; what SIGTERM does."""
    service = request.app[SERVICE]
    service.leave()
    return json_response({"status": Phase.DRAINING.value, "in_flight": service.in_flight.total}, status=202)


def _tenant(request: web.Request) -> Tenant | None:
    text = request.query.get("tenant")
    if text is None:
        return None
    try:
        return Tenant(text)
    except ValueError:
        raise InvalidRequest(f"tenant must be one of {', '.join(Tenant)}", param="tenant") from None


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 0 < int(text) <= MAX_LISTED):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_LISTED}", param="limit")
    return int(text)
