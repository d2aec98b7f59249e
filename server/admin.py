"""What operators and their machines ask: is it alive, is it ready, what does it serve, how is it doing."""

from __future__ import annotations

import asyncio
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import UnknownModel
from engine.types import ModelCard, Tenant
from server.http import json_response
from server.metrics import text_of
from server.service import SERVICE


def sluice_version() -> str:
    """The version of these very sources: a checkout's own, else that of the installed package."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    try:
        facts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if facts["name"] == "sluice":
            return str(facts["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass
    try:
        return version("sluice")
    except PackageNotFoundError:
        return "unknown"


async def health(request: web.Request) -> web.StreamResponse:
    """GET /health, /ping: 200 while requests in flight can finish, also while draining; 503 while loading, stuck or dead."""
    service = request.app[SERVICE]
    _ = service.engine  # raises while there is none, or a dead one
    service.check_moving()
    return json_response({"status": service.phase.value})


async def ready(request: web.Request) -> web.StreamResponse:
    """GET /ready: 200 while new requests are taken."""
    service = request.app[SERVICE]
    service.engine_for_work()
    service.check_moving()
    return json_response({"status": service.phase.value})


async def load(request: web.Request) -> web.StreamResponse:
    """GET /load: for routers. Requests in flight, and the online tenant's; offline work gives way and is no load."""
    service = request.app[SERVICE]
    stats = service.engine.stats()
    online = stats.tenants[Tenant.ONLINE]
    return json_response(
        {
            "server_load": service.in_flight.total,
            "num_requests_running": online.running,
            "num_requests_waiting": online.waiting,
            "kv_cache_usage_perc": online.kv_pages / max(1, stats.kv_pages),
        }
    )


async def show_version(request: web.Request) -> web.StreamResponse:
    """GET /version"""
    return json_response({"version": sluice_version()})


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics: Prometheus text."""
    body = await asyncio.to_thread(text_of, request.app[SERVICE].metrics.collect())
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models: every name, aliases included."""
    engine = request.app[SERVICE].engine
    data = [_model(card, name) for card in engine.models for name in (card.id, *card.aliases)]
    return json_response({"object": "list", "data": data})


async def model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{id}; ids may contain slashes."""
    engine = request.app[SERVICE].engine
    name = request.match_info["id"]
    for card in engine.models:
        if name in (card.id, *card.aliases):
            return json_response(_model(card, name))
    raise UnknownModel(f"the model {name!r} does not exist here", param="model")


def _model(card: ModelCard, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "sluice",
        "root": card.id,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
