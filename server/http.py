"""Between aiohttp and the rest: bodies read within limits, answers written, and every error turned into the error object."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from engine.errors import InvalidRequest, SluiceError
from engine.openai import Answer, decode, error_answer, error_body
from engine.replies import Json
from engine.wire import fresh_id
from server import cors
from server.admission import Body, Refused
from server.auth import Access
from server.config import ServerConfig
from server.logs import TRACE, trace_of
from server.service import CLIENT, REQUEST_ID, SERVICE, Phase, Service

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LARGE_BODY = 1 << 16  # bytes; a larger one is read off the event loop
_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_encode = msgspec.json.Encoder().encode


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(body=_encode(body), status=status, headers=headers, content_type="application/json")


def answer_response(answer: Answer, headers: dict[str, str] | None = None) -> web.Response:
    """An answer with what tells SDKs when to try again, and whether to."""
    headers = dict(headers or {})
    if answer.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(answer.retry_after)))
        headers["retry-after-ms"] = str(round(answer.retry_after * 1000))
    if answer.should_retry is not None:
        headers["x-should-retry"] = str(answer.should_retry).lower()
    return json_response(answer.body, answer.status, headers)


async def read_json(request: web.Request, understand: Callable[[Json], T]) -> T:
    """What `understand` makes of the request's JSON object, off the event loop if it is large.

    Raises Refused, InvalidRequest, and what `understand` raises.
    """
    config = request.app[SERVICE].config
    if "Content-Type" in request.headers and not request.content_type.endswith("json"):
        raise _refused(415, "send the body as Content-Type: application/json", "unsupported_media_type")
    if (request.content_length or 0) > config.max_body_size:
        raise _too_large(config.max_body_size)
    with request.app[SERVICE].bodies.reading() as body:
        await _read(request, body, config)
        raw = bytes(body.data)
        if len(raw) <= LARGE_BODY:
            return understand(decode(raw))
        return await asyncio.to_thread(lambda: understand(decode(raw)))


async def _read(request: web.Request, body: Body, config: ServerConfig) -> None:
    try:
        here = request.content.is_eof()  # as small ones are, which come with their headers
        async with asyncio.timeout(None if here else config.body_timeout or None):
            while chunk := await request.content.readany():
                body.add(chunk)
                if len(body.data) > config.max_body_size:
                    raise _too_large(config.max_body_size)
    except TimeoutError:
        raise _refused(408, f"the body did not arrive within {config.body_timeout:g} s", "request_timeout") from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body could not be read as its headers describe it", code="invalid_body") from None


def _refused(status: int, message: str, code: str) -> Refused:
    return Refused(Answer(status, error_body(message, "invalid_request_error", code)))


def _too_large(limit: int) -> Refused:
    return _refused(413, f"the body is larger than {limit} bytes", "request_too_large")


def border(access_of: Callable[[web.Request], Access]) -> Any:
    """The middleware around every route: names the request, asks for the key, counts, and answers errors as JSON."""

    @web.middleware
    async def run(request: web.Request, handler: Handler) -> web.StreamResponse:
        service = request.app[SERVICE]
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _SAFE_ID.fullmatch(given) else "req-" + fresh_id()
        TRACE.set(trace_of(request[REQUEST_ID], request.headers.get("traceparent")))
        if service.connections is not None:
            service.connections.heard(request.protocol)
        started = time.monotonic()
        status = 499  # the client left
        try:
            response = await _answered(service, request, handler, access_of(request))
            status = response.status
        finally:
            _count(service, request, status, time.monotonic() - started)
            TRACE.set(None)  # the task goes on with the connection's next request
        return response

    return run


async def _answered(service: Service, request: web.Request, handler: Handler, access: Access) -> web.StreamResponse:
    try:
        if cors.is_preflight(request) and cors.allowed(request, service.config):
            return cors.preflight_answer()
        request[CLIENT] = service.keys.check(access, request.headers)
        return await handler(request)
    except Refused as refused:
        if refused.answer.status in (429, 503):
            service.metrics.rejections.labels(refused.answer.body["error"]["code"]).inc()
        return answer_response(refused.answer, refused.headers)
    except web.HTTPException as error:
        return _routing_error(request, error)
    except ConnectionError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        return web.Response(status=499)  # the client left and gets nothing; raised, it would be logged as a failure of ours
    except SluiceError as error:
        return answer_response(error_answer(error))
    except Exception as error:
        log.exception("request %s failed", request[REQUEST_ID])
        return answer_response(error_answer(error))


def _routing_error(request: web.Request, error: web.HTTPException) -> web.Response:
    if error.status == 404:
        return answer_response(_refused(404, f"no route {request.method} {request.path}", "not_found").answer)
    if isinstance(error, web.HTTPMethodNotAllowed):
        message = f"{request.path} takes {', '.join(sorted(error.allowed_methods))}, not {request.method}"
        return answer_response(_refused(405, message, "method_not_allowed").answer, {"Allow": error.headers["Allow"]})
    return answer_response(_refused(error.status, error.reason, "http_error").answer)


def _count(service: Service, request: web.Request, status: int, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "none"  # never the path: labels are kept forever
    method = request.method if request.method in ("GET", "POST", "HEAD", "DELETE", "PUT", "OPTIONS") else "other"
    service.metrics.http.labels(route, method, str(status)).inc()
    if route in ("/metrics", "/health", "/ready", "/ping", "/load", "/debug/state"):
        return
    service.metrics.http_seconds.labels(route).observe(seconds)
    if service.config.enable_log_requests:
        fields = {"route": route, "method": method, "status": status, "seconds": round(seconds, 6)}
        log.info("%s %s %d in %.1f ms", method, route, status, seconds * 1e3, extra={"fields": fields})


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: headers that every response carries, streams included."""
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.pop("Server", None)
    if (origin := cors.allowed(request, request.app[SERVICE].config)) is not None:
        cors.name(origin, response)
    if request.app[SERVICE].phase is Phase.DRAINING:
        response.headers["Connection"] = "close"
        response.force_close()
