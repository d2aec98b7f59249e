"""Pages of other sites: which of them a browser lets call the API (`--allowed-origins`; none unless told)."""

from __future__ import annotations

from aiohttp import web

from server.config import ServerConfig

_METHODS = "GET, POST, DELETE"
_HEADERS = "authorization, content-type, x-request-id, x-sluice-tier"
_SHOWN = "x-request-id, x-sluice-colocation, retry-after"


def allowed(request: web.Request, config: ServerConfig) -> str | None:
    """The origin of the page that sends this request, if it is one of those allowed."""
    origin = request.headers.get("Origin")
    if origin is None or not config.allowed_origins:
        return None
    return origin if origin in config.allowed_origins or "*" in config.allowed_origins else None


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks if a page may send a request. It carries no key, and does nothing."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def preflight_answer() -> web.Response:
    """What may be sent; `name` adds the origin."""
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": _HEADERS}
    return web.Response(status=204, headers=headers | {"Access-Control-Max-Age": "600"})


def name(origin: str, response: web.StreamResponse) -> None:
    """Let the page at `origin` read this response. Credentials that browsers add by themselves stay out."""
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = _SHOWN
    response.headers.add("Vary", "Origin")
