"""A step that does not end: told with its place in the code, unhealthy while it lasts, and over when it is over."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from serving import MESSAGES, serving

from engine import Engine, EngineConfig
from engine.build import load_model
from engine.sched.plan import Runner, StepResult
from server.watchdog import watch_steps


class HeldRunner:
    """A runner whose steps stand still until the test lets them go on."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.num_layers, self.asynchronous = inner.num_layers, inner.asynchronous
        self.asynchronous = False
        self.go_on = threading.Event()
        self.go_on.set()

    def launch(self, *arguments: Any) -> Any:
        return self._inner.launch(*arguments)

    def resume(self, *arguments: Any) -> Any:
        return self._inner.resume(*arguments)

    def collect(self, in_flight: Any) -> StepResult:
        result = self._inner.collect(in_flight)
        assert self.go_on.wait(60)
        return result

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Engine, HeldRunner]]:
    config = EngineConfig(model=str(tiny_checkpoint(tmp_path)), threads=1, kv_cache_memory=2**25)
    built = load_model(config, progress=False)
    runner = HeldRunner(built.runner)
    with Engine(config=config, built=replace(built, runner=runner)) as engine:
        yield engine, runner
        runner.go_on.set()


async def status_of(server: Any, path: str, wanted: int) -> Any:
    """Wait for a status of `path`, and return the body."""
    while (found := await server.get(path))[0] != wanted:
        await asyncio.sleep(0.01)
    return found[1]


async def test_a_stuck_step_and_its_end(held: tuple[Engine, HeldRunner], caplog: pytest.LogCaptureFixture) -> None:
    engine, runner = held
    async with serving(engine) as server:
        watching = asyncio.create_task(watch_steps(server.service, engine, 0.05))
        assert (await server.get("/health"))[0] == 200
        runner.go_on.clear()
        answer = asyncio.create_task(server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}))

        body = await status_of(server, "/health", 503)

        assert body["error"]["code"] == "engine_stuck"
        assert (await server.get("/ready"))[0] == 503
        assert (await server.get("/debug/state"))[1]["status"] == "stuck"
        told = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert len(told) == 1, "once per step"
        assert "collect" in told[0].getMessage() and "test_watchdog.py" in told[0].getMessage(), "where it stands"
        async with server.client.get(server.url + "/metrics") as response:
            assert "sluice_stuck_steps_total 1.0" in await response.text()

        runner.go_on.set()

        assert (await answer)[0] == 200, "nothing was lost"
        await status_of(server, "/health", 200)
        while "the step that was stuck has ended" not in caplog.text:
            await asyncio.sleep(0.01)
        assert [event.kind for event in engine.timeline.events()[0]].count("stuck") == 2
        watching.cancel()


async def test_nothing_is_stuck_where_there_is_nothing_to_do(held: tuple[Engine, HeldRunner]) -> None:
    engine, _ = held
    async with serving(engine) as server:
        assert engine.step_age() == 0.0
        await asyncio.wait_for(watch_steps(server.service, engine, 0), 30)  # 0: never, so it ends at once
        assert (await server.get("/health"))[0] == 200


async def test_draining_is_healthy_and_not_ready(held: tuple[Engine, HeldRunner]) -> None:
    engine, runner = held
    async with serving(engine) as server:
        runner.go_on.clear()
        answer = asyncio.create_task(server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}))
        while not server.service.in_flight.total:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(server.service.drain(60))
        assert await status_of(server, "/ready", 503)
        status, body = await server.get("/health")
        assert (status, body) == (200, {"status": "draining"})
        assert (await server.post("/v1/chat/completions", {"messages": MESSAGES}))[0] == 503
        assert (await server.get("/load"))[1]["server_load"] == 1
        runner.go_on.set()
        assert (await answer)[0] == 200
        assert await draining is True
