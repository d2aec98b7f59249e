"""A few hours of `python -m bench.day`: everything that clients do, and in the end nothing of it is left in the server."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from helpers import tiny_checkpoint
from serving import Server, serving

from bench.day import Day
from bench.fake_server import fake_engine
from engine import Engine
from server.clients import client_of


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=8192)
    with fake_engine(folder, step_seconds=0.0005, pages=4096, max_num_seqs=32) as engine:
        async with serving(engine, data_dir=str(tmp_path / "data"), sse_write_timeout=5) as server:
            yield server


def engine_of(server: Server) -> Engine:
    return server.service.engine


async def left(server: Server) -> tuple[int, int, int, int]:
    """(descriptors, threads, tasks, pages in use) once nothing is going on."""
    await server.idle()
    assert server.service.connections is not None and server.service.batches is not None
    while server.service.connections._server.connections or server.service.batches._lives:
        await asyncio.sleep(0.01)
    gc.collect()
    stats = engine_of(server).stats()
    used = stats.kv_pages - stats.kv_pages_free - stats.kv_pages_cached
    return psutil.Process().num_fds(), threading.active_count(), len(asyncio.all_tasks()), used


async def fill_pools(server: Server) -> None:
    """Pools make a thread when none is idle, up to their size: now, rather than in the middle of the day."""

    async def many() -> None:
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(40)))

    jobs = server.service.batches
    assert jobs is not None
    await asyncio.gather(many(), jobs._ask(many()), *(jobs.io(time.sleep, 0.05) for _ in range(8)))


async def test_a_day_leaves_nothing(server: Server, tmp_path: Path) -> None:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        day = Day(server.port, session, seed=1)
        for _ in range(2):
            await day.hour(200, 0)
        await day.night()
        await fill_pools(server)
        warm = await left(server)
        for hour in range(4):
            server.service.keys.load((client_of(f"key-{hour}"),) if hour % 2 else ())  # what SIGHUP does
            server.service.keys.load(())
            await day.hour(200, 0)
        await day.night()
        async with asyncio.timeout(60):  # a client's own socket may be closed a moment later
            while any(now > then for now, then in zip(await left(server), warm, strict=True)):
                await asyncio.sleep(0.05)
    assert day.faults == []
    assert {"batch completed", "batch cancelled", "left", "flex 200", "bad 404", "broken upload"} <= set(day.counts)
    assert warm[3] == 0
    service, engine = server.service, engine_of(server)
    assert not engine._live and not engine._backlog.tokens and not engine._backlog._num_sequences
    assert not service.in_flight.total and not service.jobs and not service.bodies.held
    async with asyncio.timeout(60):  # what is left of an upload goes after its answer
        while any((tmp_path / "data" / "files").iterdir()):
            await asyncio.sleep(0.01)
