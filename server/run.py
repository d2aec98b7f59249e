"""The life of a server process: port, model, requests, drain, exit.

Order: the port is bound first, so that a mistake shows at once and probes get an honest 503; then the model loads in a
thread; on the first SIGTERM or SIGINT new work is refused and what is in flight may finish; on the second everything ends.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from aiohttp import web

from engine.config import EngineConfig
from engine.errors import InvalidConfig, SluiceError
from server.admission import Connections
from server.app import app_of
from server.clients import read_clients
from server.config import ServerConfig
from server.jobs import Jobs, open_jobs
from server.listen import address, bind, load_certificates, tls, unbind
from server.service import Phase, Service
from server.status import report_status, sample_memory, watch_jobs, watch_loop_lag
from server.watchdog import watch_steps

if TYPE_CHECKING:
    from engine import Engine

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_SETUP = 0, 1, 2
_JOB_GRACE = 2.0  # seconds that lines of jobs in flight get to finish
_DEATH_GRACE = 1.0  # seconds in which streams hear that the engine died


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal ends it. Returns the exit status."""
    try:
        context = tls(config)
        listener = bind(config)
    except InvalidConfig as error:
        log.error("%s", error)
        return EXIT_SETUP
    except OSError as error:
        where = config.uds or f"{config.host} port {config.port}"
        log.error("cannot listen on %s: %s", where, error)
        return EXIT_SETUP
    try:
        batches = open_jobs(config)
        return asyncio.run(_Process(engine_config, config, listener, context, batches).run())
    except InvalidConfig as error:
        log.error("%s", error)
        return EXIT_SETUP
    finally:
        unbind(listener, config)


class _Process:
    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        listener: socket.socket,
        context: ssl.SSLContext | None,
        batches: Jobs | None,
    ) -> None:
        self.engine_config = engine_config
        self.config = config
        self.listener = listener
        self.context = context
        self.service = Service(config, batches=batches)
        self.stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self.service.leave = self.stop.set
        app = app_of(self.service)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self.config.keep_alive_timeout,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        assert runner.server is not None
        self.service.connections = Connections(runner.server, self.config)
        options: dict[str, Any] = {"ssl": self.context, "backlog": 1024}
        if self.context is not None and self.config.header_timeout:
            options["ssl_handshake_timeout"] = self.config.header_timeout
        create = loop.create_unix_server if self.listener.family == socket.AF_UNIX else loop.create_server
        server = await create(self.service.connections, sock=self.listener, **options)
        try:
            return await self._live()
        finally:
            server.close()
            await runner.cleanup()

    def _on_signal(self, number: int) -> None:
        if self.stop.is_set():
            log.warning("second signal: leaving at once")
            self._leave(128 + number)
        log.info("%s: shutting down", signal.Signals(number).name)
        self.stop.set()

    def _reload(self) -> None:
        """Certificates and clients from their files. What cannot be read leaves everything as it was."""
        try:
            clients = read_clients(self.config.api_keys_file) if self.config.api_keys_file is not None else ()
            if self.context is not None:
                load_certificates(self.context, self.config)
        except InvalidConfig as error:
            log.error("SIGHUP: kept what was there: %s", error)
            return
        self.service.keys.load(clients)
        log.info("SIGHUP: certificates and clients read again")

    def _leave(self, status: int) -> NoReturn:
        unbind(self.listener, self.config)
        logging.shutdown()
        os._exit(status)

    async def _live(self) -> int:
        log.info("listening on %s, loading %s", address(self.listener, self.config), self.engine_config.model)
        stop = asyncio.create_task(self.stop.wait())
        loading = self._load()
        await asyncio.wait((stop, loading), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("stopped while loading")
            self._leave(EXIT_OK)  # the loading thread cannot be asked to stop, and nothing depends on it
        try:
            engine = loading.result()
        except SluiceError as error:
            log.error("cannot load the model: %s", error)
            return EXIT_SETUP
        except Exception:
            log.exception("cannot load the model")
            return EXIT_FAILED
        self.service.start(engine)
        try:
            return await self._serve(engine, stop)
        finally:
            if self.service.batches is not None:
                await asyncio.to_thread(self.service.batches.close)
            await asyncio.to_thread(engine.close)

    def _load(self) -> asyncio.Future[Engine]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Engine] = loop.create_future()

        def load() -> None:
            try:
                from engine import Engine

                engine = Engine(config=self.engine_config)
            except BaseException as error:  # whatever it is, the process waits for this thread
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, engine)

        threading.Thread(target=load, name="load", daemon=True).start()
        return future

    async def _serve(self, engine: Engine, stop: asyncio.Task[bool]) -> int:
        seconds = time.monotonic() - self.service.started
        self.service.metrics.startup.set(seconds)
        settle_garbage()
        log.info("ready after %.1f s: %s", seconds, ", ".join(card.id for card in engine.models))
        dead = asyncio.create_task(_death(engine))
        helpers = [
            dead,
            asyncio.create_task(report_status(engine, self.config.status_interval)),
            asyncio.create_task(watch_loop_lag(self.service.metrics)),
            asyncio.create_task(watch_steps(self.service, engine, self.config.stuck_step_timeout)),
            asyncio.create_task(sample_memory(engine)),
        ]
        if self.service.batches is not None:
            helpers.append(asyncio.create_task(watch_jobs(self.service.batches, engine)))
        try:
            await asyncio.wait((stop, dead), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for helper in helpers:
                helper.cancel()
        if not stop.done():
            log.critical("the engine died; leaving")
            await asyncio.sleep(_DEATH_GRACE)
            return EXIT_FAILED
        self.service.phase = Phase.DRAINING
        log.info("draining %d requests, for %g s at most", self.service.in_flight.total, self.config.shutdown_timeout)
        await asyncio.gather(self._stop_jobs(), self.service.drain(self.config.shutdown_timeout))
        log.info("bye")
        return EXIT_OK

    async def _stop_jobs(self) -> None:
        """Jobs are not drained: what they have is on disk, and the next server goes on."""
        if self.service.batches is not None:
            await asyncio.to_thread(self.service.batches.close, min(_JOB_GRACE, self.config.shutdown_timeout))


def settle_garbage() -> None:
    """What was loaded stays: looking at it again and again would cost single steps tens of milliseconds.

    What requests leave behind is looked at less often than the interpreter would: that costs a tenth of a streamed token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


async def _death(engine: Engine) -> None:
    while engine.alive:
        await asyncio.sleep(0.25)
