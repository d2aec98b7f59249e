"""The table of routes and the aiohttp application made from it.

The table is also the access list: a route is closed unless its row opens it, and a path without a row is closed too.
"""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web

from server import admin, batches, completions, control, dashboard, files, openapi, tokens
from server.auth import Access
from server.http import Handler, border, name_response
from server.service import SERVICE, Service


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler
    access: Access = Access.KEY


ROUTES = (
    Route("POST", "/v1/chat/completions", completions.chat),
    Route("POST", "/v1/completions", completions.completions),
    Route("POST", "/v1/files", files.create),
    Route("GET", "/v1/files", files.index),
    Route("GET", "/v1/files/{id}", files.show),
    Route("DELETE", "/v1/files/{id}", files.delete),
    Route("GET", "/v1/files/{id}/content", files.content),
    Route("POST", "/v1/batches", batches.create),
    Route("GET", "/v1/batches", batches.index),
    Route("GET", "/v1/batches/{id}", batches.show),
    Route("POST", "/v1/batches/{id}/cancel", batches.cancel),
    Route("POST", "/v1/batches/{id}/pause", batches.pause),
    Route("POST", "/v1/batches/{id}/resume", batches.resume),
    Route("POST", "/v1/batches/{id}/priority", batches.prioritize),
    Route("GET", "/v1/models", admin.models, Access.MODELS),
    Route("GET", "/v1/models/{id:.+}", admin.model, Access.MODELS),
    Route("POST", "/tokenize", tokens.tokenize),
    Route("POST", "/v1/tokenize", tokens.tokenize),
    Route("POST", "/detokenize", tokens.detokenize),
    Route("POST", "/v1/detokenize", tokens.detokenize),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info),
    Route("GET", "/v1/tokenizer_info", tokens.tokenizer_info),
    Route("GET", "/health", admin.health, Access.PUBLIC),
    Route("GET", "/ready", admin.ready, Access.PUBLIC),
    Route("GET", "/ping", admin.health, Access.PUBLIC),
    Route("GET", "/health_generate", control.health_generate),
    Route("GET", "/version", admin.show_version, Access.PUBLIC),
    Route("GET", "/metrics", admin.metrics, Access.METRICS),
    Route("GET", "/load", admin.load, Access.METRICS),
    Route("GET", "/openapi.json", openapi.show, Access.PUBLIC),
    Route("GET", "/dashboard", dashboard.dashboard, Access.PUBLIC),  # a page that knows nothing until it has a key
    Route("GET", "/debug/state", dashboard.state, Access.ADMIN),
    Route("GET", "/debug/timeline", dashboard.timeline, Access.ADMIN),
    Route("GET", "/debug/requests", control.requests, Access.ADMIN),
    Route("POST", "/admin/pause", control.pause, Access.ADMIN),
    Route("POST", "/admin/resume", control.resume, Access.ADMIN),
    Route("POST", "/admin/abort", control.abort, Access.ADMIN),
    Route("POST", "/admin/drain", control.drain, Access.ADMIN),
)
_ACCESS = {(route.method, route.path): route.access for route in ROUTES}


def app_of(service: Service) -> web.Application:
    """The application around a service whose engine may still be loading.

    Run it with `handler_cancellation=True`, or clients that leave go unnoticed until their answer is complete.
    """
    app = web.Application(middlewares=[border(_access_of)], client_max_size=service.config.max_body_size)
    app[SERVICE] = service
    app[openapi.DOCUMENT] = openapi.document(ROUTES)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, route.handler)
    app.on_response_prepare.append(name_response)
    return app


def _access_of(request: web.Request) -> Access:
    """From the route that was resolved, never from the URL as a client wrote it."""
    resource = request.match_info.route.resource
    method = "GET" if request.method == "HEAD" else request.method
    return _ACCESS.get((method, resource.canonical), Access.KEY) if resource is not None else Access.KEY
