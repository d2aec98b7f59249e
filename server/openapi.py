"""GET /openapi.json: what every route takes and answers, as an OpenAPI 3.1 document.

Bodies are described by the very types that read them. A route without an `Operation` here, or an operation without a route,
fails a test; so does an answer that is not described.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from aiohttp import web

from engine.calls import ChatBody, CompletionBody
from server.admin import sluice_version
from server.auth import Access
from server.batches import BatchPriority, CreateBatch
from server.http import json_response
from server.tokens import DetokenizeBody, TokenizeBody

Json = dict[str, Any]

JSON, TEXT, EVENTS, HTML = "application/json", "text/plain", "text/event-stream", "text/html"
FORM, BYTES = "multipart/form-data", "application/octet-stream"
DOCUMENT = web.AppKey("document", dict[str, Any])
_REF = "#/components/schemas/{name}"
_REQUIRED = {"ChatBody": ["messages"], "CompletionBody": ["prompt"], "DetokenizeBody": ["tokens"]}


class Row(Protocol):
    """What of a row in the table of routes stands here."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def access(self) -> Access: ...


@dataclass(frozen=True, slots=True)
class Operation:
    """One route: what it is for, the type of its body, its good answer, and the errors it may give beyond those of all."""

    summary: str
    answer: str | None = None  # name of a schema; None: any JSON object
    body: type[msgspec.Struct] | None = None
    media: tuple[str, ...] = (JSON,)
    status: int = 200
    errors: tuple[int, ...] = ()
    query: Mapping[str, Json] = field(default_factory=dict)
    form: Json | None = None  # the schema of a multipart body


_WORK = (400, 404, 408, 413, 415, 429, 500, 503)  # of routes that use the engine
_BODY = (400, 404, 408, 413, 415, 503)
_JOBS = (400, 404, 503)
_NUMBER = {"type": "number"}
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_WHOSE: dict[str, Json] = {"tenant": {"enum": ["online", "offline"]}}
_PAGE: dict[str, Json] = {"limit": {"type": "integer", "minimum": 1}, "after": _TEXT}


def _object(**properties: Json) -> Json:
    """An object that has these properties, and perhaps others."""
    return {"type": "object", "required": list(properties), "properties": properties}


_TENANTS: Json = {"type": "array", "items": {"enum": ["online", "offline"]}}
_UPLOAD = _object(purpose={"const": "batch"}, file={"type": "string", "format": "binary"})

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "An answer to a conversation, whole or as a stream", "Completion", ChatBody, (JSON, EVENTS), errors=_WORK
    ),
    ("POST", "/v1/completions"): Operation(
        "A continuation of one or several prompts, whole or as a stream",
        "Completion",
        CompletionBody,
        (JSON, EVENTS),
        errors=_WORK,
    ),
    ("POST", "/v1/files"): Operation("Store the input of a batch", "File", errors=(*_JOBS, 408, 413, 415, 507), form=_UPLOAD),
    ("GET", "/v1/files"): Operation(
        "The files of this client", "List", errors=_JOBS, query=_PAGE | {"purpose": _TEXT, "order": _TEXT}
    ),
    ("GET", "/v1/files/{id}"): Operation("One of them", "File", errors=_JOBS),
    ("DELETE", "/v1/files/{id}"): Operation("Delete it", errors=(*_JOBS, 409, 507)),
    ("GET", "/v1/files/{id}/content"): Operation("Its bytes", media=(BYTES,), errors=_JOBS),
    ("POST", "/v1/batches"): Operation("Start a batch", "Batch", CreateBatch, errors=(*_JOBS, 408, 413, 415, 429, 507)),
    ("GET", "/v1/batches"): Operation("The batches of this client, newest first", "List", errors=_JOBS, query=_PAGE),
    ("GET", "/v1/batches/{id}"): Operation("One of them", "Batch", errors=_JOBS),
    ("POST", "/v1/batches/{id}/cancel"): Operation("End it; what is finished is kept", "Batch", errors=(*_JOBS, 409, 507)),
    ("POST", "/v1/batches/{id}/pause"): Operation("Start no more of its lines", "Batch", errors=(*_JOBS, 409, 507)),
    ("POST", "/v1/batches/{id}/resume"): Operation("Go on with it", "Batch", errors=(*_JOBS, 409, 507)),
    ("POST", "/v1/batches/{id}/priority"): Operation(
        "Change its place among the others", "Batch", BatchPriority, errors=(*_JOBS, 408, 409, 413, 415, 507)
    ),
    ("GET", "/v1/models"): Operation("Every name that a request may call", "List", errors=(503,)),
    ("GET", "/v1/models/{id:.+}"): Operation("One of them", "Model", errors=(404, 503)),
    ("POST", "/tokenize"): Operation("Text or a conversation as token ids", "Tokens", TokenizeBody, errors=_BODY),
    ("POST", "/v1/tokenize"): Operation("The same", "Tokens", TokenizeBody, errors=_BODY),
    ("POST", "/detokenize"): Operation("Token ids as text", "Prompt", DetokenizeBody, errors=_BODY),
    ("POST", "/v1/detokenize"): Operation("The same", "Prompt", DetokenizeBody, errors=_BODY),
    ("GET", "/tokenizer_info"): Operation("Special tokens and chat template", query={"model": _TEXT}, errors=(404, 503)),
    ("GET", "/v1/tokenizer_info"): Operation("The same", query={"model": _TEXT}, errors=(404, 503)),
    ("GET", "/health"): Operation("Whether requests in flight can finish", "Status", errors=(503,)),
    ("GET", "/ready"): Operation("Whether new requests are taken", "Status", errors=(503,)),
    ("GET", "/ping"): Operation("The same as /health", "Status", errors=(503,)),
    ("GET", "/health_generate"): Operation(
        "Whether the online model gives a token in time", "Status", errors=(429, 500, 503)
    ),
    ("GET", "/version"): Operation("The version of the server"),
    ("GET", "/metrics"): Operation("Prometheus text", media=(TEXT,)),
    ("GET", "/load"): Operation("How much there is to do, for load balancers", errors=(503,)),
    ("GET", "/openapi.json"): Operation("This document"),
    ("GET", "/dashboard"): Operation("Who owns the device, as a page", media=(HTML,)),
    ("GET", "/debug/state"): Operation("What the page shows", query={"after": {"type": "string"}}, errors=(400, 503)),
    ("GET", "/debug/timeline"): Operation(
        "The last seconds as a Chrome trace, for Perfetto", query={"seconds": _NUMBER}, errors=(400, 503)
    ),
    ("GET", "/debug/requests"): Operation(
        "The requests that are not over", "Requests", errors=(400, 503), query=_WHOSE | {"limit": _PAGE["limit"]}
    ),
    ("POST", "/admin/pause"): Operation("Have a tenant's requests stand still", "Paused", errors=(400, 503), query=_WHOSE),
    ("POST", "/admin/resume"): Operation("Have them go on", "Paused", errors=(400, 503), query=_WHOSE),
    ("POST", "/admin/abort"): Operation(
        "End a request, or all of a tenant", errors=(400, 404, 503), query=_WHOSE | {"request_id": _TEXT}
    ),
    ("POST", "/admin/drain"): Operation("Take no new requests, finish those in flight, leave", status=202),
}

_ANSWERS: Mapping[str, Json] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    ),
    "Status": _object(status={"enum": ["loading", "ready", "draining"]}),
    "Usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
    "Choice": _object(index=_COUNT, finish_reason={"enum": ["stop", "length", "tool_calls", "content_filter"]}),
    "Completion": _object(
        id=_TEXT,
        object={"enum": ["chat.completion", "text_completion"]},
        created=_COUNT,
        model=_TEXT,
        choices={"type": "array", "items": {"$ref": _REF.format(name="Choice")}},
        usage={"$ref": _REF.format(name="Usage")},
    ),
    "Model": _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT),
    "List": _object(object={"const": "list"}, data={"type": "array", "items": {"type": "object"}}),
    "File": _object(id=_TEXT, object={"const": "file"}, bytes=_COUNT, created_at=_COUNT, filename=_TEXT, purpose=_TEXT),
    "Batch": _object(id=_TEXT, object={"const": "batch"}, endpoint=_TEXT, status=_TEXT, request_counts={"type": "object"}),
    "Tokens": _object(count=_COUNT, max_model_len=_COUNT, tokens={"type": "array", "items": _COUNT}),
    "Prompt": _object(prompt=_TEXT),
    "Paused": _object(paused=_TENANTS),
    "Requests": _object(
        object={"const": "list"},
        paused=_TENANTS,
        total=_COUNT,
        data={"type": "array", "items": _object(id=_TEXT, model=_TEXT, tenant=_TEXT, state=_TEXT, age=_NUMBER)},
    ),
}


async def show(request: web.Request) -> web.StreamResponse:
    """GET /openapi.json"""
    return json_response(request.app[DOCUMENT])


def document(routes: Iterable[Row]) -> Json:
    """The document of the routes that are there. A route that nobody described says so."""
    paths: Json = {}
    for route in routes:
        operation = OPERATIONS.get((route.method, route.path), Operation("Not described yet"))
        paths.setdefault(plain_path(route.path), {})[route.method.lower()] = _operation(route, operation)
    bodies = {operation.body for operation in OPERATIONS.values() if operation.body is not None}
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    for name, required in _REQUIRED.items():
        schemas[name] = schemas[name] | {"required": required}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sluice", "version": sluice_version()},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "admin": {"type": "http", "scheme": "bearer"}},
        },
    }


def plain_path(path: str) -> str:
    """A route's path as OpenAPI writes it, without the patterns of its parameters."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)


def _operation(route: Row, operation: Operation) -> Json:
    errors = (*operation.errors, *(() if route.access is Access.PUBLIC else (401, 403)))
    schema = {"type": "object"} if operation.answer is None else {"$ref": _REF.format(name=operation.answer)}
    shapes = {JSON: schema, EVENTS: _object(data=_TEXT)}
    good = {media: {"schema": shapes.get(media, _TEXT)} for media in operation.media}
    made: Json = {
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in re.findall(r"\{(\w+)", route.path)
        ]
        + [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()],
        "responses": {
            str(operation.status): {"description": "done", "content": good},
            **{str(status): _error(status) for status in sorted(set(errors))},
        },
    }
    if operation.body is not None:
        body = {"$ref": _REF.format(name=operation.body.__name__)}
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    if operation.form is not None:
        made["requestBody"] = {"required": True, "content": {FORM: {"schema": operation.form}}}
    if route.access is not Access.PUBLIC:
        made["security"] = [{"admin" if route.access is Access.ADMIN else "key": []}]
    return made


def _error(status: int) -> Json:
    texts = {400: "fix the request", 401: "a key is missing or wrong", 403: "the key does not allow this", 404: "not here"}
    texts |= {
        408: "too slow",
        413: "too large",
        415: "not JSON",
        409: "not as things stand",
        429: "your share is in use; wait",
        507: "the disk is full",
        503: "not now; wait",
    }
    return {
        "description": texts.get(status, "error"),
        "content": {JSON: {"schema": {"$ref": _REF.format(name="Error")}}},
    }
