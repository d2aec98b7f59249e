"""The load: online requests at their times, streamed, and offline requests as many as wanted at once. One event loop.

While a window is measured the client takes stamps and keeps bytes; what they mean is worked out afterwards. Every request has
a connection of its own, as strangers have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.colocate.workload import Backlog, Planned, body_of

_HEADERS = {"Content-Type": "application/json"}
_OFFLINE_HEADERS = _HEADERS | {"X-Sluice-Tier": "flex"}  # or the gate closes until the body has told
_RETRY_SECONDS = 0.2


@dataclass(slots=True)
class Answer:
    """One online request as its client saw it; seconds since the start of the window."""

    arrival: float  # when it was due
    sent: float
    prompt_tokens: int
    output_tokens: int
    times: list[float] = field(default_factory=list)  # of each piece of text: the first token's, ..., the last token's
    end: float = 0.0
    usage: dict[str, Any] | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float:
        """Mean time per token after the first."""
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def cost(self) -> dict[str, int] | None:
        """What colocation cost it, as the server's answer says."""
        return (self.usage or {}).get("colocation")


@dataclass(slots=True)
class OfflineLog:
    """What came back of the offline backlog: (seconds, prompt tokens, output tokens) of each request, and failures."""

    done: list[tuple[float, int, int]] = field(default_factory=list)
    errors: int = 0
    last_error: str = ""


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as client:
        yield client


async def replay(client: aiohttp.ClientSession, url: str, model: str, plan: Sequence[Planned], start: float) -> list[Answer]:
    """Send every request at its time after `start` (of time.perf_counter) and wait for all answers."""
    bodies = [online_body(model, request) for request in plan]
    tasks = [
        _at(start + request.arrival_s, client, url, body, request, start) for request, body in zip(plan, bodies, strict=True)
    ]
    return list(await asyncio.gather(*tasks))


def online_body(model: str, request: Planned) -> bytes:
    more = {"stream": True, "stream_options": {"include_usage": True}, "return_colocation": True}
    return body_of(model, request.prompt, request.output_tokens, **more)


async def _at(due: float, client: aiohttp.ClientSession, url: str, body: bytes, request: Planned, start: float) -> Answer:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return await ask(client, url, body, request, start)


async def ask(client: aiohttp.ClientSession, url: str, body: bytes, request: Planned, start: float) -> Answer:
    """One streamed request."""
    answer = Answer(request.arrival_s, time.perf_counter() - start, len(request.prompt), request.output_tokens)
    pieces: list[tuple[float, bytes]] = []
    try:
        async with client.post(f"{url}/v1/completions", data=body, headers=_HEADERS) as response:
            while piece := await response.content.readany():
                pieces.append((time.perf_counter() - start, piece))
            answer.end = time.perf_counter() - start
            read_stream(pieces, answer)
            if response.status != 200:
                answer.error = f"status {response.status}: {b''.join(piece for _, piece in pieces)[:200]!r}"
    except (aiohttp.ClientError, OSError) as error:
        answer.end = time.perf_counter() - start
        answer.error = f"{type(error).__name__}: {error}"
    made = (answer.usage or {}).get("completion_tokens")
    if answer.error is None and (made != request.output_tokens or not answer.times):
        answer.error = f"{made} of {request.output_tokens} tokens"
    return answer


def read_stream(pieces: Sequence[tuple[float, bytes]], answer: Answer) -> None:
    """Enter the events of a stream, each with the time of the piece that completed it.

    The first token always makes an event, the last one's is that of the finish reason; a token between them may make none.
    """
    buffer = b""
    for at, piece in pieces:
        buffer += piece
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            chunk = json.loads(event[6:])
            if "error" in chunk:
                answer.error = str(chunk["error"].get("message"))
            answer.usage = chunk.get("usage") or answer.usage
            if chunk.get("choices"):
                answer.times.append(at)


class Pressure:
    """The offline backlog: `concurrency` requests in flight from `start` to `stop`."""

    def __init__(self, client: aiohttp.ClientSession, url: str, model: str, backlog: Backlog, concurrency: int) -> None:
        self.log = OfflineLog()
        self._client, self._url, self._model, self._backlog = client, url, model, backlog
        self._concurrency = concurrency
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._pump()) for _ in range(self._concurrency)]

    async def stop(self) -> None:
        """Close all connections; the server aborts what was under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self) -> None:
        while True:
            prompt, wanted = self._backlog.next()
            body = body_of(self._model, prompt, wanted, service_tier="flex")
            try:
                async with self._client.post(f"{self._url}/v1/completions", data=body, headers=_OFFLINE_HEADERS) as response:
                    raw = await response.read()
                    if response.status == 200:
                        usage = json.loads(raw)["usage"]
                        self.log.done.append((time.perf_counter(), usage["prompt_tokens"], usage["completion_tokens"]))
                        continue
                    failure = f"status {response.status}: {raw[:200]!r}"
            except (aiohttp.ClientError, OSError) as error:
                failure = f"{type(error).__name__}: {error}"
            self.log.errors += 1
            self.log.last_error = failure
            await asyncio.sleep(_RETRY_SECONDS)
