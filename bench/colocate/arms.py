"""Arms: what is compared with what, and how one window of one arm is measured."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from bench.colocate.client import Answer, Pressure, replay, session
from bench.colocate.servers import Clock, Scrape, Server
from bench.colocate.stats import covered
from bench.colocate.workload import Backlog, Planned

ALONE, AGAIN, SLUICE, OFFLINE_ALONE = "online alone", "alone again", "Sluice", "offline alone"
NO_GATE, OS_ONLY, NO_COOL_DOWN = "no gate", "OS priorities", "no cool-down"
STATIC, NO_RESERVE, FIXED, MIAD, FIFO, LIFO = "static split", "no reserve", "fixed", "MIAD", "FIFO", "LIFO"
OVERLOAD = "overload"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the same traffic. `on` names the arm whose server it uses (default: one of its own)."""

    name: str
    flags: tuple[str, ...] = ()
    online: bool = True
    offline: bool = True
    on: str = ""

    @property
    def server(self) -> str:
        return self.on or self.name


# The same requests with and without offline work beside them. The second run alone shows what difference means nothing.
SHARING = (
    Arm(ALONE, offline=False),
    Arm(NO_GATE, ("--gate", "none")),
    Arm(OS_ONLY, ("--gate", "none", "--offline-nice", "19")),
    Arm(NO_COOL_DOWN, ("--cooldown-ms", "0")),
    Arm(SLUICE),
    Arm(OFFLINE_ALONE, online=False, on=SLUICE),
    Arm(AGAIN, offline=False),
)
# With little KV memory. Rules for victims are compared without a reserve, where every shortage is a reclaim.
TIGHT = (
    Arm(STATIC, ("--reserve", "static")),
    Arm(NO_RESERVE, ("--reserve", "none")),
    Arm(FIXED, ("--reserve", "fixed")),
    Arm(MIAD),
    Arm(FIFO, ("--reserve", "none", "--victims", "fifo")),
    Arm(LIFO, ("--reserve", "none", "--victims", "lifo")),
)
MEMORY_ARMS, VICTIM_ARMS = (STATIC, NO_RESERVE, FIXED, MIAD), (FIFO, LIFO, NO_RESERVE)


@dataclass(slots=True)
class Run:
    """One window of one arm, raw."""

    arm: str
    round: int
    seconds: float
    answers: list[Answer] = field(default_factory=list)
    offline_done: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, prompt tokens, output tokens
    offline_errors: int = 0
    offline_last_error: str = ""
    before: Scrape = field(default_factory=Scrape)
    after: Scrape = field(default_factory=Scrape)  # at the end of the window
    drained: Scrape = field(default_factory=Scrape)  # when all online requests have been answered
    samples: list[tuple[float, Scrape]] = field(default_factory=list)
    cores: dict[str, float] = field(default_factory=dict)

    def grew(self, name: str, *, drained: bool = False, **labels: str) -> float | None:
        """By how much a counter grew in the window (or until everything online was answered); None if there is none."""
        before, after = self.before.value(name, **labels), (self.drained if drained else self.after).value(name, **labels)
        return None if after is None else after - (before or 0.0)

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    @property
    def busy_share(self) -> float:
        """Share of the window with an online request in flight, as the client saw it."""
        return covered(((answer.sent, answer.end) for answer in self.answers), self.seconds) / self.seconds

    def offline_tokens(self) -> tuple[float, float]:
        """(output tokens, all tokens) that offline work got done: nothing counted twice that was computed again."""
        outputs = self.grew("sluice_generation_tokens_total", tenant="offline")
        computed = self.grew("sluice_computed_tokens_total", tenant="offline")
        again = self.grew("sluice_recomputed_tokens_total", tenant="offline")
        if outputs is not None and computed:
            return outputs, computed - (again or 0.0)
        inside = [(prompt, output) for at, prompt, output in self.offline_done if 0.0 <= at < self.seconds]
        return float(sum(o for _, o in inside)), float(sum(p + o for p, o in inside))

    def record(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Load:
    """What does not change from window to window."""

    backlog: Backlog
    concurrency: int
    warm_seconds: float
    warm_up: Sequence[Planned]
    sample_seconds: float | None = None  # read /metrics this often, for what changes within a window
    after_seconds: float = 0.0  # go on so long with offline work when all online requests have been answered


async def measure(server: Server, arm: Arm, number: int, plan: Sequence[Planned], seconds: float, load: Load) -> Run:
    """One window: warm up with the same kinds of work, replay, read the counters, let everything end."""
    run = Run(arm.name, number, seconds)
    async with session() as client:
        pressure = None
        if arm.offline:
            pressure = Pressure(client, server.url, server.models[1], load.backlog, load.concurrency)
            pressure.start()
        try:
            warm_end = time.perf_counter() + load.warm_seconds
            await replay(client, server.url, server.models[0], load.warm_up, time.perf_counter())
            await asyncio.sleep(max(0.0, warm_end - time.perf_counter()))
            await _window(client, server, arm, plan, run, load)
        finally:
            if pressure is not None:
                await pressure.stop()
    if pressure is not None:
        run.offline_errors, run.offline_last_error = pressure.log.errors, pressure.log.last_error
        run.offline_done = [(at - run.cores["start"], prompt, output) for at, prompt, output in pressure.log.done]
    await asyncio.sleep(0.3)
    return run


async def _window(
    client: aiohttp.ClientSession, server: Server, arm: Arm, plan: Sequence[Planned], run: Run, load: Load
) -> None:
    gc.collect()
    gc.disable()
    try:
        run.before = await server.scrape(client)
        clock = Clock.read(server)
        start = time.perf_counter()
        online = asyncio.create_task(replay(client, server.url, server.models[0], plan if arm.online else (), start))
        sampler = asyncio.create_task(_sample(client, server, run, start, load.sample_seconds))
        await asyncio.sleep(max(0.0, start + run.seconds - time.perf_counter()))
        run.after = await server.scrape(client)
        run.cores = Clock.read(server).since(clock) | {"start": start}
        run.answers = await online
        run.drained = await server.scrape(client)
        await asyncio.sleep(load.after_seconds)
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
    finally:
        gc.enable()


async def _sample(client: aiohttp.ClientSession, server: Server, run: Run, start: float, every: float | None) -> None:
    while every is not None:
        run.samples.append((time.perf_counter() - start, await server.scrape(client)))
        await asyncio.sleep(every)
