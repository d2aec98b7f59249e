"""How much may wait, and for how long: who is refused is told at once, who waited too long is told so, nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from serving import MESSAGES, serving

from bench.fake_server import fake_engine
from engine import Engine, SamplingParams
from engine.errors import Overloaded
from engine.generation import Generation
from engine.types import Tenant
from server.admission import patience

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHORT = {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}
LONG = SamplingParams(max_tokens=30_000, ignore_eos=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """One request at a time, and few tokens in the queue."""
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=32_768)
    with fake_engine(folder, step_seconds=0.001, max_num_seqs=1, max_num_queued_tokens=100) as engine:
        yield engine


@pytest.fixture
def running(engine: Engine) -> Iterator[Generation]:
    """The one that has the place until it is aborted."""
    with_place = engine.submit([7] * 500, LONG)
    assert next(iter(with_place)).tokens, "a first prompt may be of any length"
    yield with_place
    with_place.abort()


def test_tokens_that_wait_are_bounded(engine: Engine, running: Generation) -> None:
    waiting = engine.submit([7] * 60, LONG)
    with pytest.raises(Overloaded, match="prompts of 60 tokens wait already, 60 more would exceed 100"):
        engine.submit([7] * 60, LONG)
    engine.submit([7] * 40, LONG).abort()
    engine.submit([7] * 60, LONG, tenant=Tenant.OFFLINE).abort()  # offline work may wait in any number
    waiting.abort()
    list(waiting)
    second = engine.submit([7] * 500, LONG)  # nothing waits
    running.abort()
    assert next(iter(second)).tokens
    engine.submit([7] * 60, LONG).abort()  # nor does it now that it has begun
    second.abort()
    list(second)
    assert not engine._backlog.tokens and not engine._backlog._num_sequences


async def test_a_refusal_by_tokens_says_when_to_come_back(engine: Engine, running: Generation) -> None:
    waiting = engine.submit([7] * 60, LONG)
    async with serving(engine) as server:
        async with server.client.post(server.url + TEXT, json={"prompt": [7] * 60}) as response:
            assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["code"] == "server_overloaded"
        waiting.abort()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waited_too_long_is_told(engine: Engine, running: Generation, stream: bool) -> None:
    async with serving(engine, max_queue_time=0.2) as server:
        flex = asyncio.create_task(server.post(CHAT, SHORT | {"service_tier": "flex"}))
        if stream:
            error, done = (await server.events(CHAT, SHORT))[-2:]
            assert done == "[DONE]"
        else:
            async with server.client.post(server.url + CHAT, json=SHORT) as response:
                assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
                error = await response.json()
        assert error["error"]["code"] == "server_overloaded"
        assert error["error"]["message"].startswith("the request waited for 0.2 s and its turn did not come")
        while engine.stats().tenants[Tenant.ONLINE].waiting:
            await asyncio.sleep(0.005)
        assert not running.finished, "who has its place keeps it"
        running.abort()
        assert (await flex)[0] == 200, "offline requests may wait"
        await server.idle()


async def test_who_has_begun_is_left_alone() -> None:
    looked = asyncio.Event()

    def waits() -> bool:
        looked.set()
        return False

    async with patience(0.01, waits):
        await looked.wait()
        await asyncio.sleep(0)


async def test_a_client_that_leaves_is_no_refusal() -> None:
    """Also if it does so in the moment in which its time is over."""
    here = asyncio.current_task()
    assert here is not None

    def waits() -> bool:
        here.cancel()
        return True

    with pytest.raises(asyncio.CancelledError):
        async with patience(0.01, waits):
            await asyncio.Event().wait()
    here.uncancel()
