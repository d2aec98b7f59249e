"""One event stream to one client: events out, comments while it is silent, an end in every case.

The engine never waits for a socket: a generation merges what its reader has not taken, the transport's buffer is bounded by
aiohttp's high-water mark, and a client that reads nothing for `sse_write_timeout` loses its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_ROOM = 16 * 1024  # bytes; asyncio lets writers go on below a buffer of this size
_encode = msgspec.json.Encoder().encode


class SlowReader(Exception):
    """The client has not read for too long; its connection is gone."""


class EventStream:
    """Use `open_stream`. Events are sent by one task at a time or by several: each write is whole."""

    def __init__(self, request: web.Request, response: web.StreamResponse, write_timeout: float) -> None:
        self.response = response
        self._request = request
        self._write_timeout = write_timeout
        self._chunked = request.version >= HttpVersion11
        self._begun = False  # aiohttp has sent the headers and the first event
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def send(self, *events: Any) -> None:
        """Send each of `events` as one `data:` line. Raises SlowReader or ConnectionError when nobody is there."""
        if events:
            await self._write(b"".join(b"data: " + _encode(event) + b"\n\n" for event in events))

    async def send_json(self, event: bytes) -> None:
        """`send` for an event that is JSON already."""
        await self._write(b"data: %b\n\n" % event)

    async def end(self) -> None:
        """The last event, and the end of the answer. Raises as `send` does."""
        await self.fall_silent()
        await self._write(_DONE, last=True)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        self._last_write = self._loop.time()
        write = self.response.write_eof if last else self.response.write
        transport = self._request.transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() + len(data) >= _ROOM:
            await self._patiently(write(data))
        elif self._begun and self._chunked and not last:  # as aiohttp would, without what it does for other kinds of answers
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            await write(data)  # cannot wait, so it needs no timer
            self._begun = True

    async def _patiently(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout or None):
                await writing
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise SlowReader from None

    def keep_alive(self, interval: float) -> None:
        """Send a comment whenever nothing else was sent for `interval` seconds. Most streams end before there is a need."""
        self._timer = self._loop.call_later(interval, self._start_ticker, interval)

    async def fall_silent(self) -> None:
        """No more comments."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ticker is not None:
            self._ticker.cancel()
            # A write that failed has closed the connection, of which this task hears by being cancelled.
            await asyncio.gather(self._ticker, return_exceptions=True)

    def _start_ticker(self, interval: float) -> None:
        self._ticker = asyncio.create_task(self._tick(interval))

    async def _tick(self, interval: float) -> None:
        while True:
            idle = self._loop.time() - self._last_write
            if idle < interval:
                await asyncio.sleep(interval - idle)
            else:
                await self._write(_KEEP_ALIVE)


@contextlib.asynccontextmanager
async def open_stream(
    request: web.Request, *, headers: dict[str, str], keep_alive_interval: float, write_timeout: float
) -> AsyncIterator[EventStream]:
    """Send the headers and keep the stream alive inside the block. Its end stays the caller's business."""
    response = web.StreamResponse(headers=HEADERS | headers)
    stream = EventStream(request, response, write_timeout)
    await response.prepare(request)
    if keep_alive_interval:
        stream.keep_alive(keep_alive_interval)
    try:
        yield stream
    finally:
        await stream.fall_silent()
