"""The other end of `bench.fake_server`: the process started and watched, and clients that cost as little as they can."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"


class ServerProcess:
    """A fake server in a process of its own."""

    def __init__(self, arm: str, *flags: str, chunks: Sequence[bytes] = ()) -> None:
        command = [sys.executable, "-m", "bench.fake_server", arm, *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if chunks:
            self._say(json.dumps([chunk.hex() for chunk in chunks]))
        self.port: int = self._hear()["port"]
        self.usage = psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def lag(self) -> dict[str, float]:
        """How late its event loop was since this was last asked: p50, p99 and max in seconds."""
        self._say("")
        return self._hear()

    @property
    def cpu_seconds(self) -> float:
        times = self.usage.cpu_times()
        return times.user + times.system

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server process ended")
        return json.loads(line)


def request_bytes(body: dict[str, Any], path: str = CHAT, *, close: bool = True) -> bytes:
    """One POST as it goes over the wire."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + (b"Connection: close\r\n\r\n" if close else b"\r\n") + data


@dataclass(slots=True)
class Reply:
    """What came back: the status, how many events, when the first and the last, and the bytes if they were wanted."""

    status: int = 0
    events: int = 0
    size: int = 0
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    whole: bool = False  # the stream came to its proper end, or the body is complete
    data: bytearray = field(default_factory=bytearray)
    gaps: list[float] = field(default_factory=list)


class _Client(asyncio.Protocol):
    """Sends one request, counts what comes, and resolves `done` at the end of the connection."""

    def __init__(self, request: bytes, keep: bool) -> None:
        self.reply = Reply()
        self.done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._request = request
        self._keep = keep
        self._tail = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.reply.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, reply = time.perf_counter(), self.reply
        if not reply.status:
            reply.status = int(data[9:12])
        events = data.count(b"data: ")
        if events:
            if reply.events:
                reply.gaps.append(now - reply.last)
            else:
                reply.first = now
            reply.last = now
        reply.events += events
        reply.size += len(data)
        self._tail = (self._tail + data)[-64:]
        if self._keep or reply.status != 200:
            reply.data += data

    def connection_lost(self, error: Exception | None) -> None:
        self.reply.whole = error is None and (
            b"data: [DONE]" in self._tail or (self.reply.status != 200 and bool(self.reply.data))
        )
        if not self.done.done():
            self.done.set_result(self.reply)


async def send(port: int, request: bytes, *, keep: bool = False, leave_after: float | None = None) -> Reply:
    """Send one request and read to the end, or hang up after `leave_after` seconds."""
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(lambda: _Client(request, keep), "127.0.0.1", port)
    if leave_after is not None:
        await asyncio.sleep(leave_after)
        transport.abort()
    try:
        return await client.done
    finally:
        transport.close()


async def fetch(port: int, path: str, patience: float = 30.0) -> str:
    """The body of a GET, asked for again while the server has too many connections."""
    deadline = time.perf_counter() + patience
    while True:
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
                reply = await reader.read()
            finally:
                writer.close()
            if reply.startswith(b"HTTP/1.1 200 "):
                return reply.partition(b"\r\n\r\n")[2].decode()
        if time.perf_counter() > deadline:
            raise RuntimeError(f"no answer from {path} within {patience:g} s")
        await asyncio.sleep(0.1)


def events_of(reply: Reply) -> list[bytes]:
    """The events of a kept stream, each as it was written."""
    body = bytes(reply.data).partition(b"\r\n\r\n")[2]
    plain = bytearray()
    while body:  # chunked encoding undone
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        plain += rest[:length]
        body = rest[length + 2 :]
    return [event + b"\n\n" for event in bytes(plain).split(b"\n\n") if event]
