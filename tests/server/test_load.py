"""Load, in short: far more than there is room for, and clients that come and go. `bench/load.py` is the long form."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import psutil
import pytest
from helpers import tiny_checkpoint
from serving import MESSAGES, Server, serving

from bench.fake_server import fake_engine
from bench.loopback import Reply, request_bytes, send
from engine.types import Tenant

BODY = {"messages": MESSAGES, "ignore_eos": True, "stream": True}


async def test_ten_times_too_much(tmp_path: Path) -> None:
    """Who fits is served to the end, who does not is told when to come back, offline work stands back, and then all is well."""
    places, queue = 8, 16
    options = {"max_num_seqs": places, "max_num_queued_reqs": queue, "step_seconds": 0.002}
    with fake_engine(tiny_checkpoint(tmp_path, max_position_embeddings=32_768), **options) as engine:
        async with serving(engine) as server:
            stats = lambda tenant: engine.stats().tenants[tenant]  # noqa: E731
            flex = asyncio.create_task(send(server.port, request_bytes(BODY | {"service_tier": "flex", "max_tokens": 30_000})))
            while not stats(Tenant.OFFLINE).counters.generated_tokens:
                await asyncio.sleep(0.005)

            request = request_bytes(BODY | {"max_tokens": 200})
            crowd = [asyncio.create_task(send(server.port, request, keep=True)) for _ in range(10 * (places + queue))]
            while stats(Tenant.ONLINE).waiting < queue // 2:
                await asyncio.sleep(0.002)
            offline = stats(Tenant.OFFLINE).counters.generated_tokens
            most = 0
            while (waiting := stats(Tenant.ONLINE).waiting) and not crowd[-1].done():
                assert stats(Tenant.OFFLINE).counters.generated_tokens == offline or not stats(Tenant.ONLINE).waiting
                most = max(most, waiting)
                await asyncio.sleep(0.002)
            replies = await asyncio.gather(*crowd)

            served = [reply for reply in replies if reply.status == 200]
            refused = [reply for reply in replies if reply.status != 200]
            assert len(served) >= places + queue // 2
            assert all(reply.whole for reply in served)
            assert refused
            assert all(is_refusal(reply) for reply in refused)
            assert most <= queue
            assert (await send(server.port, request)).whole, "and then it serves again"
            flex.cancel()
            await asyncio.gather(flex, return_exceptions=True)
            await server.idle()


def is_refusal(reply: Reply) -> bool:
    return reply.status == 503 and b"\r\nRetry-After: " in reply.data and b'"server_overloaded"' in reply.data


async def settled(server: Server) -> tuple[int, int, int, int]:
    """(descriptors, threads, tasks, pages in use) once nothing is going on."""
    await server.idle()
    assert server.service.connections is not None
    while server.service.connections._server.connections:
        await asyncio.sleep(0.01)
    gc.collect()
    stats = server.service.engine.stats()
    used = stats.kv_pages - stats.kv_pages_free - stats.kv_pages_cached
    return psutil.Process().num_fds(), threading.active_count(), len(asyncio.all_tasks()), used


@pytest.mark.parametrize("stream", [True, False])
async def test_clients_that_come_and_go_leave_nothing(tmp_path: Path, stream: bool) -> None:
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=32_768)
    with fake_engine(folder, step_seconds=0.002, max_num_seqs=64) as engine:
        async with serving(engine) as server:
            request = request_bytes(BODY | {"max_tokens": 30_000, "stream": stream})

            async def come_and_go(count: int) -> None:
                for _ in range(count):
                    await asyncio.gather(*(send(server.port, request, leave_after=i % 4 * 0.003) for i in range(25)))

            await come_and_go(4)
            before = await settled(server)
            await come_and_go(20)
            after = await settled(server)
            assert after[3] == 0
            assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
            assert not engine._live
            assert not server.service.in_flight.total
