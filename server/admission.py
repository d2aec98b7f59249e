"""Who may come in: API keys, the access of each route, limits on what is in flight, and limits on connections."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from engine.errors import Overloaded
from engine.openai import Answer, error_answer, error_body
from engine.types import Tenant
from server.config import ServerConfig

ANYBODY = "-"  # the key of a client where no keys are set


class Refused(Exception):
    """A request that ends here, with the answer to give."""

    def __init__(self, answer: Answer, **headers: str) -> None:
        super().__init__(answer.body["error"]["message"])
        self.answer = answer
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Access(enum.Enum):
    """What a route asks of a client. A route that says nothing asks for a key."""

    KEY = "key"
    PUBLIC = "public"
    MODELS = "models"  # public by --public-models
    METRICS = "metrics"  # public by --public-metrics


class Keys:
    """The API keys, as digests, compared in constant time."""

    def __init__(self, config: ServerConfig) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in config.api_key]
        self._open = {Access.PUBLIC}
        self._open |= {Access.MODELS} if config.public_models else set()
        self._open |= {Access.METRICS} if config.public_metrics else set()

    def check(self, access: Access, authorization: str | None) -> str:
        """The name of the client's key (never the key). Raises Refused without a valid one where the route asks for it."""
        if not self._digests or access in self._open:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = ""
        for known in self._digests:  # all of them, whichever matches
            if hmac.compare_digest(known, digest):
                found = known.hex()[:8]
        if not found or scheme.lower() != "bearer":
            message = "incorrect API key" if authorization else "an API key is required: Authorization: Bearer KEY"
            body = error_body(message, "authentication_error", "invalid_api_key")
            raise Refused(Answer(401, body), WWW_Authenticate="Bearer")
        return found


class InFlight:
    """Counts requests being answered, and refuses those beyond a key's or the flex tier's share."""

    def __init__(self, config: ServerConfig) -> None:
        self._per_key = config.max_inflight_per_key
        self._flex = config.max_inflight_flex
        self._keys: Counter[str] = Counter()
        self._tenants: Counter[Tenant] = Counter()

    @property
    def total(self) -> int:
        return self._tenants.total()

    @contextlib.contextmanager
    def hold(self, key: str, tenant: Tenant) -> Iterator[None]:
        """Hold a place while a request is answered. Raises Refused if there is none."""
        if self._per_key and self._keys[key] >= self._per_key:
            raise _full(f"this key has {self._per_key} requests in flight already", "rate_limit_exceeded")
        if tenant is Tenant.OFFLINE and self._flex and self._tenants[tenant] >= self._flex:
            raise _full(f"{self._flex} flex requests are in flight already", "resource_unavailable")
        self._keys[key] += 1
        self._tenants[tenant] += 1
        try:
            yield
        finally:
            self._tenants[tenant] -= 1
            self._keys[key] -= 1
            if not self._keys[key]:
                del self._keys[key]  # keys that are idle cost nothing


def _full(message: str, code: str) -> Refused:
    answer = error_answer(Overloaded(message, retry_after=1.0), Tenant.OFFLINE)
    answer.body["error"]["code"] = code
    return Refused(answer)


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


def clamp_priority(priority: int, config: ServerConfig) -> int:
    """A client may ask to be later, not to be earlier than the server allows."""
    return max(priority, config.min_priority)
