"""/v1/batches: the front door of the offline tenant, in OpenAI's words.

What is ours beyond them stands under `sluice` in the batch object: priority, pause, speed, ETA, slack, the receipt at the end.
`pause`, `resume` and `priority` are routes of our own; `priority` and `on_bad_line` are fields of the request, or texts in
`metadata`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from engine.errors import InvalidRequest
from engine.openai import CHAT, COMPLETIONS
from engine.replies import Json
from engine.types import Tenant
from server.admission import check_tenant, clamp_priority, full
from server.files import PURPOSE, find, full_disk, jobs_of, life, list_body, page_size, refused
from server.http import json_response, read_json
from server.jobs import JobView, Share, ShareUsed
from server.jobs_store import BATCH_ID, BatchRecord, new_id
from server.service import CLIENT, SERVICE

DEFAULT_PAGE, MAX_PAGE = 20, 100
MAX_WINDOW = 30 * 86_400  # seconds
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Text = Annotated[str, Meta(max_length=512)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Body = TypeVar("Body", bound=msgspec.Struct)


class CreateBatch(msgspec.Struct):
    """The fields of POST /v1/batches, as they appear on the wire."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], Text], Meta(max_length=16)] | None = None
    output_expires_after: dict[str, Any] | None = None
    priority: Priority | None = None
    on_bad_line: str | None = None


class BatchPriority(msgspec.Struct):
    """The body of POST /v1/batches/{id}/priority. Lower goes first."""

    priority: Priority


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/batches"""
    service, jobs = request.app[SERVICE], jobs_of(request)
    check_tenant(request[CLIENT], Tenant.OFFLINE)
    wanted = await read_json(request, lambda body: _understand(body, CreateBatch))
    seconds = window_seconds(wanted.completion_window)
    if wanted.endpoint not in (CHAT, COMPLETIONS):
        raise InvalidRequest(f"endpoint must be {CHAT} or {COMPLETIONS}", param="endpoint")
    output = wanted.output_expires_after
    output_seconds = None if output is None else life(output.get("anchor"), output.get("seconds"))
    file = await find(request, wanted.input_file_id)
    if file.purpose != PURPOSE:
        raise InvalidRequest(f"{file.id} has the purpose {file.purpose!r}; it must be {PURPOSE!r}", param="input_file_id")
    if file.lines > service.config.max_batch_lines:
        raise InvalidRequest(
            f"{file.id} has {file.lines} lines, at most {service.config.max_batch_lines} are taken; split it",
            param="input_file_id",
        )
    client = request[CLIENT]
    share = Share(
        client.max_batches or service.config.max_batches_per_key,
        client.max_queued_lines or service.config.max_queued_lines_per_key,
    )
    if share.lines and file.lines > share.lines:
        raise InvalidRequest(
            f"{file.id} has {file.lines} lines, and this key may have {share.lines} at a time; split it", param="input_file_id"
        )
    metadata, now = wanted.metadata or {}, int(jobs.now())
    record = BatchRecord(
        id=new_id("batch_"),
        owner=client.name,
        endpoint=wanted.endpoint,
        input_file_id=file.id,
        output_id=new_id("file-"),
        error_id=new_id("file-"),
        completion_window=wanted.completion_window,
        created_at=now,
        expires_at=now + seconds,
        metadata=wanted.metadata,
        output_seconds=output_seconds,
        priority=clamp_priority(_priority(wanted.priority, metadata), service.config),
        lines=file.lines,
        skip_bad_lines=_skip_bad_lines(wanted.on_bad_line or metadata.get("on_bad_line")),
    )
    service.in_flight.count(client)  # one request, whatever its lines: those have the time that others leave
    try:
        with full_disk():
            record = await jobs.create(record, share)
    except ShareUsed as error:
        raise full(str(error), "rate_limit_exceeded", error.retry_after) from None
    except KeyError:
        raise refused(404, f"no file {file.id!r}", "not_found", "input_file_id") from None
    return json_response(batch_body(*jobs.current(record)))


def _understand(body: Json, kind: type[Body]) -> Body:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        param = re.search(r"\$\.(\w+)", text) or re.search(r"field `(\w+)`", text)
        raise InvalidRequest(text.replace("`$.", "`"), param=param and param[1]) from None


def window_seconds(window: str) -> int:
    """'24h' and the like. Raises InvalidRequest."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", window)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= MAX_WINDOW:
        raise InvalidRequest(
            'completion_window must be a number with s, m, h or d, and at most 30d, such as "24h"', param="completion_window"
        )
    return seconds


def _priority(given: int | None, metadata: dict[str, str]) -> int:
    if given is not None:
        return given
    text = metadata.get("priority", "0")
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise InvalidRequest("the priority in metadata must be a whole number; lower goes first", param="metadata")
    return int(text)


def _skip_bad_lines(given: str | None) -> bool:
    if given not in (None, "error", "skip"):
        raise InvalidRequest(
            'on_bad_line must be "error" (nothing runs, the default) or "skip" (the others run)', param="on_bad_line"
        )
    return given == "skip"


async def show(request: web.Request) -> web.StreamResponse:
    """GET /v1/batches/{id}"""
    return json_response(batch_body(*jobs_of(request).current(await _find(request))))


async def index(request: web.Request) -> web.StreamResponse:
    """GET /v1/batches, a page at a time, newest first."""
    jobs = jobs_of(request)
    limit, after = page_size(request, DEFAULT_PAGE, MAX_PAGE), request.query.get("after")
    found, more = await jobs.io(lambda: jobs.store.batches(request[CLIENT].name, after=after, limit=limit))
    return json_response(list_body([batch_body(*jobs.current(record)) for record in found], more))


async def cancel(request: web.Request) -> web.StreamResponse:
    """POST /v1/batches/{id}/cancel: what is finished is kept."""
    record = await _find(request)
    jobs = jobs_of(request)
    with full_disk():
        changed = await jobs.cancel(record.id)
    if changed is None or changed.status not in ("cancelling", "cancelled"):
        status = (changed or await _find(request)).status
        raise refused(409, f"the batch is {status} and cannot be cancelled", "batch_not_cancellable")
    return json_response(batch_body(*jobs.current(changed)))


async def pause(request: web.Request) -> web.StreamResponse:
    """POST /v1/batches/{id}/pause: no more lines start until it is resumed; its window goes on."""
    return await _pause(request, True)


async def resume(request: web.Request) -> web.StreamResponse:
    """POST /v1/batches/{id}/resume"""
    return await _pause(request, False)


async def prioritize(request: web.Request) -> web.StreamResponse:
    """POST /v1/batches/{id}/priority: its place among the unfinished ones, from now on."""
    record, jobs = await _find(request), jobs_of(request)
    wanted = await read_json(request, lambda body: _understand(body, BatchPriority))
    with full_disk():
        changed = await jobs.prioritize(record.id, clamp_priority(wanted.priority, request.app[SERVICE].config))
    if changed is None or changed.status not in ("validating", "in_progress"):
        status = (changed or await _find(request)).status
        raise refused(409, f"the batch is {status} and has no place in the order any more", "batch_not_running")
    return json_response(batch_body(*jobs.current(changed)))


async def _pause(request: web.Request, paused: bool) -> web.StreamResponse:
    record = await _find(request)
    jobs = jobs_of(request)
    with full_disk():
        changed = await jobs.pause(record.id, paused)
    if changed is None or changed.status not in ("validating", "in_progress"):
        status = (changed or await _find(request)).status
        raise refused(409, f"the batch is {status} and cannot be paused or resumed", "batch_not_running")
    return json_response(batch_body(*jobs.current(changed)))


async def _find(request: web.Request) -> BatchRecord:
    jobs, batch_id = jobs_of(request), request.match_info["id"]
    record = await jobs.io(jobs.store.batch, batch_id) if BATCH_ID.fullmatch(batch_id) else None
    if record is None or record.owner != request[CLIENT].name:
        raise refused(404, f"no batch {batch_id[:64]!r}", "not_found", "id")
    return record


def batch_body(record: BatchRecord, view: JobView) -> dict[str, Any]:
    """The batch object."""
    counted = record.input_tokens + record.output_tokens
    errors = [{"code": e.code, "line": e.line, "message": e.message, "param": e.param} for e in record.errors]
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.models[0] if record.models else None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_id if record.ended and record.completed else None,
        "error_file_id": record.error_id if record.ended and record.failed else None,
        "created_at": record.created_at,
        "in_progress_at": record.in_progress_at,
        "expires_at": record.expires_at,
        "finalizing_at": record.finalizing_at,
        "completed_at": record.completed_at,
        "failed_at": record.failed_at,
        "expired_at": record.expired_at,
        "cancelling_at": record.cancelling_at,
        "cancelled_at": record.cancelled_at,
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "usage": {
            "input_tokens": record.input_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": record.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted,
        }
        if counted
        else None,
        "metadata": record.metadata,
        "sluice": _extension(record, view),
    }


def _extension(record: BatchRecord, view: JobView) -> dict[str, Any]:
    known = view.slack_s is not None and not record.ended
    return {
        "priority": record.priority,
        "on_bad_line": "skip" if record.skip_bad_lines else "error",
        "paused": view.state == "paused",
        "paused_reason": view.reason,
        "tokens_per_s": round(view.tokens_s, 3),
        "eta_s": _rounded(view.eta_s),
        "slack_s": _rounded(view.slack_s),
        "on_time": (view.slack_s or 0.0) >= 0 if known else None,
        "receipt": _receipt(record) if record.ended and record.in_progress_at is not None else None,
    }


def _receipt(record: BatchRecord) -> dict[str, Any]:
    """What the job took. Tokens are exact; the rest is what the engine counted meanwhile, shared with its neighbours."""
    end = record.completed_at or record.expired_at or record.cancelled_at or record.created_at
    harvested = record.harvested
    return {
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "wall_s": end - (record.in_progress_at or end),
        "running_s": round(record.running_seconds, 3),
        "device_s": _rounded(harvested.device_seconds),
        "requests_preempted": round(harvested.requests_preempted, 1),
        "recomputed_tokens": round(harvested.recomputed_tokens),
        "worker_stops": _rounded(harvested.worker_stops),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
