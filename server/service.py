"""The state that all handlers share: the engine once it is there, where the server stands, and what is in flight."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from engine.openai import Answer, Job, error_body
from server.admission import Bodies, Connections, InFlight, Refused
from server.auth import Keys
from server.clients import Client
from server.config import ServerConfig
from server.jobs import Jobs
from server.jobs_metrics import JobNumbers
from server.metrics import Metrics
from server.turns import Turns

if TYPE_CHECKING:
    from engine import Engine

log = logging.getLogger(__name__)


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Asker(NamedTuple):
    """Who waits for a job: an HTTP request, by its name, of a client, by its name."""

    request_id: str
    client: str


class Service:
    """One server. `engine` is None until the model is loaded."""

    def __init__(self, config: ServerConfig, engine: Engine | None = None, batches: Jobs | None = None) -> None:
        self.config = config
        self.metrics = Metrics(config.metrics_compat)
        self.stuck = 0.0  # seconds for which a step has been running, once that is too long
        self.keys = Keys(config)
        self.in_flight = InFlight(config)
        self.bodies = Bodies(config.max_body_memory)
        self.turns = Turns()
        self.metrics.in_flight.set_function(lambda: self.in_flight.total)
        self.jobs: dict[Job, Asker] = {}
        if batches is not None:
            self.metrics.registry.register(JobNumbers(batches))
        self.batches = batches  # None: this server keeps no files and batches. Closing them stays the caller's business
        self.connections: Connections | None = None  # where the server owns its socket
        self.leave: Callable[[], None] = self._refuse_work  # drain and end, as on SIGTERM
        self.phase = Phase.LOADING
        self.started = time.monotonic()
        self._engine: Engine | None = None
        if engine is not None:
            self.start(engine)

    def _refuse_work(self) -> None:
        self.phase = Phase.DRAINING

    def start(self, engine: Engine) -> None:
        """The model is loaded: serve it."""
        self._engine = engine
        targets = {"ttft": self.config.ttft_slo_ms, "tpot": engine.config.tpot_slo_ms}
        self.metrics.recent.targets = {kind: ms / 1e3 for kind, ms in targets.items() if ms}
        self.metrics.watch(engine)
        if self.batches is not None:
            self.batches.attach(engine)
        self.phase = Phase.READY

    @property
    def status(self) -> str:
        """In one word: loading, ready, draining, stuck or dead."""
        if self._engine is not None and not self._engine.alive:
            return "dead"
        return "stuck" if self.stuck else self.phase.value

    def check_moving(self) -> None:
        """Raise Refused (503) while a step has been running for too long."""
        if self.stuck:
            raise unavailable(f"a step of the engine has been running for {self.stuck:.0f} s", "engine_stuck", 5.0)

    @property
    def engine(self) -> Engine:
        """The engine. Raises Refused (503) while it loads and after it died."""
        if self._engine is None:
            seconds = time.monotonic() - self.started
            raise unavailable(f"the model is being loaded, for {seconds:.0f} s so far", "model_loading", 2.0)
        if not self._engine.alive and self.phase is not Phase.DRAINING:
            raise unavailable("the engine stopped", "engine_dead", 5.0)
        return self._engine

    def engine_for_work(self) -> Engine:
        """The engine, if it takes new requests."""
        engine = self.engine
        if self.phase is Phase.DRAINING:
            raise unavailable("the server is shutting down", "shutting_down", 5.0)
        return engine

    async def drain(self, timeout: float) -> bool:
        """Take no new work, wait for what is in flight, and abort what is left after `timeout` seconds."""
        self.phase = Phase.DRAINING
        if await self._idle_within(timeout):
            return True
        log.warning("aborting %d requests still in flight after %g s", self.in_flight.total, timeout)
        for job in tuple(self.jobs):
            job.abort()
        await self._idle_within(2.0)
        return False

    async def _idle_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.in_flight.total and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.in_flight.total


def unavailable(message: str, code: str, retry_after: float) -> Refused:
    """503, with when to ask again."""
    return Refused(Answer(503, error_body(message, "server_error", code), retry_after))


SERVICE = web.AppKey("service", Service)
REQUEST_ID = web.RequestKey("request_id", str)
CLIENT = web.RequestKey("client", Client)
