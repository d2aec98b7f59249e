"""How much may come in: limits on what is in flight, on rates, on the memory of bodies, and on connections."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from engine.errors import Overloaded
from engine.openai import Answer, error_answer, error_body
from engine.types import Tenant
from server.clients import Client
from server.config import ServerConfig

_LONGEST_RETRY = 30.0  # seconds; who has waited long is not sent away for longer


class Refused(Exception):
    """A request that ends here, with the answer to give."""

    def __init__(self, answer: Answer, **headers: str) -> None:
        super().__init__(answer.body["error"]["message"])
        self.answer = answer
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Rate:
    """So much a minute: fills evenly up to a minute's worth. What is known only afterwards may overdraw it."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0 if it can be now."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60.0)
        self._at = now
        return max(0.0, (amount - self._level) * 60.0 / self.per_minute)

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass(slots=True)
class Place:
    """A request's place among those in flight. `tokens` is what it used, told before it ends."""

    tokens: int = 0


class InFlight:
    """Counts requests being answered, and refuses those beyond a key's share or rate, or the flex tier's share."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_key = config.max_inflight_per_key
        self._flex = config.max_inflight_flex
        self._clock = clock
        self._clients: Counter[str] = Counter()
        self._tenants: Counter[Tenant] = Counter()
        self._requests: dict[str, Rate] = {}
        self._tokens: dict[str, Rate] = {}

    @property
    def total(self) -> int:
        return self._tenants.total()

    @contextlib.contextmanager
    def hold(self, client: Client, tenant: Tenant) -> Iterator[Place]:
        """Hold a place while a request is answered. Raises Refused if there is none."""
        check_tenant(client, tenant)
        most = client.max_inflight or self._per_key
        if most and self._clients[client.name] >= most:
            raise full(f"this key has {most} requests in flight already", "rate_limit_exceeded")
        if tenant is Tenant.OFFLINE and self._flex and self._tenants[tenant] >= self._flex:
            raise full(f"{self._flex} flex requests are in flight already", "resource_unavailable")
        tokens = self._rate(self._tokens, client.name, client.tokens_per_minute)
        self._check_rate(tokens, f"this key may use {client.tokens_per_minute} tokens a minute")
        self.count(client)
        self._clients[client.name] += 1
        self._tenants[tenant] += 1
        place = Place()
        try:
            yield place
        finally:
            if tokens is not None:
                tokens.take(place.tokens)
            self._tenants[tenant] -= 1
            self._clients[client.name] -= 1
            if not self._clients[client.name]:
                del self._clients[client.name]  # clients that are idle cost nothing

    def count(self, client: Client) -> None:
        """Take one of the requests that the key may send. Raises Refused if there is none."""
        requests = self._rate(self._requests, client.name, client.requests_per_minute)
        self._check_rate(requests, f"this key may send {client.requests_per_minute} requests a minute")
        if requests is not None:
            requests.take(1)

    def _rate(self, rates: dict[str, Rate], name: str, per_minute: int) -> Rate | None:
        if not per_minute:
            return None
        rate = rates.get(name)
        if rate is None or rate.per_minute != per_minute:  # the clients file was read again
            rate = rates[name] = Rate(per_minute, self._clock())
        return rate

    def _check_rate(self, rate: Rate | None, message: str) -> None:
        if rate is not None and (seconds := rate.wait(1.0, self._clock())):
            raise full(message, "rate_limit_exceeded", seconds)


def check_tenant(client: Client, tenant: Tenant) -> None:
    """Raise Refused unless `client` may send work of `tenant`."""
    if tenant not in client.tenants:
        hint = "send service_tier: flex" if tenant is Tenant.ONLINE else "leave service_tier out"
        message = f"this key may not send {tenant.value} requests; {hint}, or use another key"
        raise Refused(Answer(403, error_body(message, "permission_error", "tenant_not_allowed")))


def full(message: str, code: str, retry_after: float = 1.0) -> Refused:
    """A client's share is in use: 429, and when to come back."""
    answer = error_answer(Overloaded(message, retry_after=retry_after), Tenant.OFFLINE)
    answer.body["error"]["code"] = code
    return Refused(answer)


class Bodies:
    """The memory of request bodies, from their first byte until they are understood: bounded for all of them together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Body]:
        """A body to be filled; its memory counts inside the block."""
        body = Body(self)
        try:
            yield body
        finally:
            self.held -= len(body.data)

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises Refused if there is no room."""
        if self.held + size > self._most:
            raise Refused(error_answer(Overloaded("too many request bodies are being read at once", retry_after=1.0)))
        self.held += size


class Body:
    """One request's body as far as it has come."""

    def __init__(self, bodies: Bodies) -> None:
        self.data = bytearray()
        self._bodies = bodies

    def add(self, chunk: bytes) -> None:
        """Take in what has come. Raises Refused."""
        self._bodies.take(len(chunk))
        self.data += chunk


class Connections:
    """Makes the protocol of each new connection: bounded in number, and in how long the first headers may take.

    aiohttp bounds the wait for later requests by its keep-alive timeout, and sizes of headers by itself.
    """

    def __init__(self, server: web.Server, config: ServerConfig) -> None:
        self._server = server
        self._config = config
        self._silent: dict[Any, asyncio.TimerHandle] = {}

    def __call__(self) -> asyncio.Protocol:
        if len(self._server.connections) >= self._config.max_connections:
            return _TooMany()
        protocol = self._server()
        if self._config.header_timeout:
            loop = asyncio.get_running_loop()
            self._silent[protocol] = loop.call_later(self._config.header_timeout, self._give_up, protocol)
        return protocol

    def heard(self, protocol: Any) -> None:
        """The first request of a connection has arrived."""
        if timer := self._silent.pop(protocol, None):
            timer.cancel()

    def _give_up(self, protocol: Any) -> None:
        self._silent.pop(protocol, None)
        if protocol.transport is not None:
            protocol.transport.abort()


class _TooMany(asyncio.Protocol):
    """Answers 503 and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        body = b'{"error":{"message":"too many connections","type":"server_error","param":null,"code":"server_overloaded"}}'
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()


@contextlib.asynccontextmanager
async def patience(seconds: float, waits: Callable[[], bool]) -> AsyncIterator[None]:
    """End what goes on in the block if after `seconds` it still `waits` for its turn. Raises Overloaded then."""
    task, given_up = asyncio.current_task(), False
    assert task is not None

    def look() -> None:
        nonlocal given_up
        if waits():
            given_up = True
            task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, look) if seconds else None
    try:
        yield
    except asyncio.CancelledError:
        if not given_up or task.uncancel():  # its client left as well
            raise
        message = f"the request waited for {seconds:g} s and its turn did not come; try again later"
        raise Overloaded(message, retry_after=min(seconds, _LONGEST_RETRY)) from None
    finally:
        if timer is not None:
            timer.cancel()


def clamp_priority(priority: int, config: ServerConfig) -> int:
    """A client may ask to be later, not to be earlier than the server allows."""
    return max(priority, config.min_priority)
