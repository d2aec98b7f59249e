"""/v1/files: bytes in and out, streamed. What a client calls its file is told back to it and used for nothing else."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from engine.errors import InvalidRequest
from engine.openai import Answer, error_body
from server.admission import Refused
from server.http import json_response
from server.jobs import Jobs
from server.jobs_store import FILE_ID, Download, FileRecord, StoreFull, Upload
from server.service import CLIENT, SERVICE

PURPOSE = "batch"
MAX_PAGE = 10_000
MIN_LIFE, MAX_LIFE = 3600, 30 * 86_400  # seconds
_CHUNK = 1 << 18
_MAX_FIELD = 4096  # bytes of a form field that is no file
_MAX_PARTS = 16
_MAX_NAME = 255


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/files: a multipart form with `file`, `purpose` and perhaps `expires_after`, in any order."""
    jobs = jobs_of(request)
    if request.content_type != "multipart/form-data":
        raise refused(415, "send the file as multipart/form-data, with a part named file", "unsupported_media_type")
    config = request.app[SERVICE].config
    if (request.content_length or 0) > config.max_file_size + (_MAX_FIELD << 4):
        _too_large(config.max_file_size)
    count, size = await jobs.io(jobs.store.totals)
    for stored, limit, what in ((size, config.data_quota, "bytes"), (count, config.max_files, "files")):
        if limit and stored >= limit:
            raise refused(507, f"the stored files reach their limit of {limit} {what}; delete some", "storage_full")
    form = _Form(request, jobs)
    try:
        with full_disk():
            await form.read()
            record = form.record(request[CLIENT].name, int(jobs.now()))
            await jobs.io(jobs.store.keep, form.upload, record)
    finally:
        if form.upload is not None:
            jobs.later(form.upload.close)
    return json_response(file_body(record))


class _Form:
    """An upload being read. At most a chunk of it is in memory."""

    def __init__(self, request: web.Request, jobs: Jobs) -> None:
        self._request = request
        self._jobs = jobs
        self._config = request.app[SERVICE].config
        self._fields: dict[str, str] = {}
        self._name = ""
        self.upload: Upload | None = None

    async def read(self) -> None:
        """Raises InvalidRequest, Refused and StoreFull."""
        try:
            reader = await self._request.multipart()
            for _ in range(_MAX_PARTS):
                part = await self._patiently(reader.next())
                if part is None:
                    return
                if not isinstance(part, BodyPartReader) or part.name is None:
                    raise InvalidRequest("each part of the form needs a name, and none may be a form itself")
                if part.name == "file":
                    await self._file(part)
                else:
                    self._fields[part.name] = await self._field(part)
        except (ValueError, AssertionError, web.RequestPayloadError, HttpProcessingError):  # aiohttp, of a form that is none
            raise InvalidRequest("the form could not be read as its headers describe it", code="invalid_body") from None
        raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")

    async def _file(self, part: BodyPartReader) -> None:
        if self.upload is not None:
            raise InvalidRequest("the form has two files; send one", param="file")
        self._name = (part.filename or "upload.jsonl")[:_MAX_NAME]
        self.upload = self._jobs.store.upload()
        while chunk := await self._patiently(part.read_chunk(_CHUNK)):
            if self.upload.size + len(chunk) > self._config.max_file_size:
                _too_large(self._config.max_file_size)
            await self._jobs.io(self._write, self.upload, bytes(chunk))

    def _write(self, upload: Upload, data: bytes) -> None:
        """What is left of the disk is for the answers of batches."""
        if self._jobs.store.free_bytes() < self._config.min_free_disk + len(data):
            raise StoreFull("the upload cannot be written: little is left of the disk", "disk_full")
        upload.write(data)

    async def _field(self, part: BodyPartReader) -> str:
        content = b""
        while chunk := await self._patiently(part.read_chunk(_MAX_FIELD)):
            content += chunk
            if len(content) > _MAX_FIELD:
                raise InvalidRequest(f"the field is longer than {_MAX_FIELD} bytes", param=part.name)
        return content.decode("utf-8", "replace")

    async def _patiently(self, reading: Any) -> Any:
        """An upload may take its time, as long as something comes."""
        try:
            async with asyncio.timeout(self._config.body_timeout or None):
                return await reading
        except TimeoutError:
            message = f"nothing of the body came for {self._config.body_timeout:g} s"
            raise refused(408, message, "request_timeout") from None

    def record(self, owner: str, now: int) -> FileRecord:
        """Raises InvalidRequest where the form is incomplete."""
        if self.upload is None:
            raise InvalidRequest("the form has no file", param="file")
        if self._fields.get("purpose") != PURPOSE:
            raise InvalidRequest(f"purpose must be {PURPOSE!r}: files are the input of batches here", param="purpose")
        return FileRecord(
            id=self.upload.id,
            owner=owner,
            filename=self._name,
            purpose=PURPOSE,
            bytes=self.upload.size,
            created_at=now,
            expires_at=self._expires(now),
            sha256=self.upload.sha256,
            lines=self.upload.num_lines,
        )

    def _expires(self, now: int) -> int | None:
        anchor, seconds = self._fields.get("expires_after[anchor]"), self._fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        return now + life(anchor, int(seconds) if seconds and seconds.isdecimal() and len(seconds) < 12 else None)


async def show(request: web.Request) -> web.StreamResponse:
    """GET /v1/files/{id}"""
    return json_response(file_body(await find(request, request.match_info["id"])))


async def index(request: web.Request) -> web.StreamResponse:
    """GET /v1/files, a page at a time."""
    jobs, query = jobs_of(request), request.query
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    limit, after, purpose = page_size(request, MAX_PAGE, MAX_PAGE), query.get("after"), query.get("purpose")

    def read() -> dict[str, Any]:
        found, more = jobs.store.files(
            request[CLIENT].name, after=after, limit=limit, newest_first=order == "desc", purpose=purpose
        )
        return list_body([file_body(record) for record in found], more)

    return json_response(await jobs.io(read))


async def delete(request: web.Request) -> web.StreamResponse:
    """DELETE /v1/files/{id}"""
    record = await find(request, request.match_info["id"])
    jobs = jobs_of(request)
    with full_disk():
        user = await jobs.io(jobs.store.delete_file, record.id)
    if user is not None:
        raise refused(409, f"{user} reads this file; cancel it, or wait for its end", "file_in_use")
    return json_response({"id": record.id, "object": "file", "deleted": True})


async def content(request: web.Request) -> web.StreamResponse:
    """GET /v1/files/{id}/content: the bytes as they are, never as anything that a browser would run."""
    record = await find(request, request.match_info["id"])
    jobs = jobs_of(request)
    file = jobs.store.download(record.id)
    try:
        return await _send(request, record, file)
    except FileNotFoundError:
        raise _missing(record.id) from None
    finally:
        jobs.later(file.close)


async def _send(request: web.Request, record: FileRecord, file: Download) -> web.StreamResponse:
    jobs = jobs_of(request)
    chunk = await jobs.io(file.read, _CHUNK)
    headers = {"Content-Disposition": f'attachment; filename="{record.id}.jsonl"', "Cache-Control": "no-store"}
    response = web.StreamResponse(headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = record.bytes
    try:
        await response.prepare(request)
        if request.method != "HEAD":
            while chunk:
                async with asyncio.timeout(request.app[SERVICE].config.body_timeout or None):
                    await response.write(chunk)
                chunk = await jobs.io(file.read, _CHUNK)
        await response.write_eof()
    except TimeoutError:  # it reads nothing: what is half sent cannot be completed
        if request.transport is not None:
            request.transport.abort()
    return response


# -- what files and batches share


def jobs_of(request: web.Request) -> Jobs:
    """The jobs. Raises Refused (503) where this server keeps none."""
    jobs = request.app[SERVICE].batches
    if jobs is not None and jobs.closed:
        raise Refused(Answer(503, error_body("the server is shutting down", "server_error", "shutting_down"), 5.0))
    if jobs is None:
        message = "this server keeps no files and batches: its data folder is off, or in use by another server"
        raise Refused(Answer(503, error_body(message, "server_error", "batches_unavailable"), should_retry=False))
    return jobs


async def find(request: web.Request, file_id: str) -> FileRecord:
    """A file of this client. Raises Refused (404)."""
    jobs = jobs_of(request)
    record = await jobs.io(jobs.store.file, file_id) if FILE_ID.fullmatch(file_id) else None
    if record is None or record.owner != request[CLIENT].name:
        raise _missing(file_id)
    return record


def _missing(file_id: str) -> Refused:
    return refused(404, f"no file {file_id[:64]!r}", "not_found", "id")


def page_size(request: web.Request, default: int, most: int) -> int:
    """The query's `limit`. Raises InvalidRequest."""
    given = request.query.get("limit")
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 1 <= int(given) <= most):
        raise InvalidRequest(f"limit must be a number from 1 to {most}", param="limit")
    return int(given)


def life(anchor: Any, seconds: Any) -> int:
    """Seconds that a file lives. Raises InvalidRequest."""
    valid = isinstance(seconds, int) and not isinstance(seconds, bool) and MIN_LIFE <= seconds <= MAX_LIFE
    if anchor != "created_at" or not valid:
        raise InvalidRequest(
            f'expires_after must be {{"anchor": "created_at", "seconds": {MIN_LIFE} to {MAX_LIFE}}}', param="expires_after"
        )
    return int(seconds)


class full_disk:
    """StoreFull inside it is answered 507."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, StoreFull):
            answer = Answer(507, error_body(f"{error}; nothing was stored", "server_error", error.code), should_retry=False)
            raise Refused(answer) from None


def refused(status: int, message: str, code: str, param: str | None = None) -> Refused:
    """An answer that says why not."""
    return Refused(Answer(status, error_body(message, "invalid_request_error", code, param)))


def _too_large(limit: int) -> NoReturn:
    raise refused(413, f"the file is larger than {limit} bytes", "request_too_large", "file")


def list_body(items: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more}


def file_body(record: FileRecord) -> dict[str, Any]:
    """The file object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }
