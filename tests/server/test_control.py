"""What administrators see and do while work runs: the requests that are not over, pause and resume, abort; a deep check."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import FormData
from helpers import tiny_checkpoint
from serving import ENDLESS, MESSAGES, Server, make_engine, serving

from bench.fake_server import fake_engine
from engine import Engine
from engine.types import Tenant
from server.app import ROUTES
from server.auth import ANYBODY, Access

CHAT = "/v1/chat/completions"
FLEX = {"service_tier": "flex"}
SHORT = {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}


async def listed(server: Server, query: str = "") -> list[dict[str, Any]]:
    status, body = await server.get("/debug/requests" + query)
    assert status == 200, body
    data: list[dict[str, Any]] = body["data"]
    return data


@asynccontextmanager
async def asking(server: Server, body: dict[str, Any], **headers: str) -> AsyncIterator[asyncio.Task[tuple[int, Any]]]:
    """A request that is under way: known to the server, its end perhaps never to come."""
    known = {view["id"] for view in await listed(server)}
    task = asyncio.create_task(server.post(CHAT, body, headers=headers))
    try:
        while not {view["id"] for view in await listed(server)} - known:
            await asyncio.sleep(0.005)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_what_only_administrators_may_do() -> None:
    closed = {route.path for route in ROUTES if route.path.startswith(("/admin/", "/debug/"))}
    assert {"/admin/pause", "/admin/resume", "/admin/abort", "/debug/requests"} <= closed
    assert {route.path for route in ROUTES if route.access is Access.ADMIN} == closed


async def test_a_user_may_neither_look_nor_touch(engine: Engine) -> None:
    async with serving(engine, api_key=("user",), admin_api_key=("root",)) as server:
        for key, status in (("user", 403), ("root", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await server.get("/debug/requests", headers=headers))[0] == status
            for path in ("/admin/pause", "/admin/resume", "/admin/abort?tenant=offline"):
                assert (await server.post(path, b"", headers=headers))[0] == status
        assert (await server.get("/health_generate"))[0] == 401
        assert (await server.get("/health_generate", headers={"Authorization": "Bearer user"}))[0] == 200
    assert not engine.paused


async def test_the_deep_check(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine) as server:
        assert await server.get("/health_generate") == (200, {"status": "ready"})
        engine.pause(Tenant.ONLINE)
        status, body = await server.get("/health_generate")
        engine.resume()
        assert (status, body["error"]["code"]) == (503, "paused")
        await server.idle()
    with fake_engine(tiny_checkpoint(tmp_path), step_seconds=0.3) as slow:
        async with serving(slow, health_generate_timeout=0.001) as server:
            status, body = await server.get("/health_generate")
            assert (status, body["error"]["code"]) == (503, "health_generate_timeout")
            await server.idle()


async def test_every_request_that_is_not_over(long_engine: Engine) -> None:
    secret = [{"role": "user", "content": "nobody but me"}]
    async with serving(long_engine) as server:
        two = ENDLESS | {"messages": secret, "n": 2}
        async with asking(server, two, **{"X-Request-Id": "mine"}), asking(server, ENDLESS | FLEX):
            while not all(view["completion_tokens"] for view in await listed(server, "?tenant=online")):
                await asyncio.sleep(0.005)
            async with server.client.get(server.url + "/debug/requests") as response:
                text = await response.text()
            assert "nobody but me" not in text
            body = json.loads(text)
            mine, other = body["data"]
            assert (body["total"], body["paused"]) == (2, [])
            assert (mine["request_id"], mine["tenant"], mine["state"], mine["choices"]) == ("mine", "online", "running", 2)
            assert mine["id"].startswith("chatcmpl-") and mine["model"] == "org/tiny" and mine["client"] == ANYBODY.name
            assert mine["age"] >= mine["first_token_after"] > 0 and mine["since_token"] >= 0
            assert (other["tenant"], other["completion_tokens"], other["first_token_after"]) == ("offline", 0, None)
            assert other["state"] in ("waiting", "running", "parked"), "it stands back"
            assert [view["id"] for view in await listed(server, "?tenant=offline")] == [other["id"]]
            assert len(await listed(server, "?limit=1")) == 1
            for bad in ("?tenant=both", "?limit=0", "?limit=x"):
                assert (await server.get("/debug/requests" + bad))[0] == 400
        await server.idle()
        assert await listed(server) == []


async def test_pause_and_resume(engine: Engine) -> None:
    async with serving(engine) as server:
        assert await server.post("/admin/pause?tenant=offline", b"") == (200, {"paused": ["offline"]})
        async with asking(server, SHORT | FLEX) as waiting:
            for _ in range(3):
                assert (await server.post(CHAT, SHORT))[0] == 200, "online goes on"
            (view,) = await listed(server)
            assert (view["state"], view["completion_tokens"]) == ("waiting", 0)
            assert (await server.get("/debug/requests"))[1]["paused"] == ["offline"]
            async with server.client.get(server.url + "/metrics") as response:
                assert 'sluice_paused{tenant="offline"} 1.0' in await response.text()
            assert await server.post("/admin/resume", b"") == (200, {"paused": []})
            assert (await waiting)[0] == 200
        assert (await server.post("/admin/pause?tenant=nobody", b""))[0] == 400


async def test_both_paused_with_work_under_way(long_engine: Engine) -> None:
    """It keeps what it has, and goes on where it was."""
    async with serving(long_engine) as server:
        body = {"messages": MESSAGES, "max_tokens": 600, "ignore_eos": True, "temperature": 0}
        _, alone = await server.post(CHAT, body)
        async with asking(server, body) as first, asking(server, body | FLEX) as second:
            long_engine.pause()
            kept = [long_engine.stats().kv_pages_free]
            while len(kept) < 3:  # until nothing of it moves any more
                await asyncio.sleep(0.01)
                free = long_engine.stats().kv_pages_free
                kept = [*kept, free] if free == kept[-1] and not long_engine.step_age() else [free]
            assert not first.done() and not second.done()
            long_engine.resume()
            for task in (first, second):
                status, answer = await task
                assert status == 200
                assert answer["choices"][0]["message"] == alone["choices"][0]["message"]
        await server.idle()


async def test_aborted_by_an_administrator(long_engine: Engine) -> None:
    async with serving(long_engine) as server:
        async with asking(server, ENDLESS, **{"X-Request-Id": "mine"}) as unary:
            assert await server.post("/admin/abort?request_id=mine", b"") == (200, {"aborted": 1})
            status, body = await unary
            assert (status, body["error"]["code"]) == (503, "request_aborted")
        async with server.client.post(server.url + CHAT, json=ENDLESS | {"stream": True}) as response:
            first = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
            assert await server.post(f"/admin/abort?request_id={first['id']}", b"") == (200, {"aborted": 1})
            assert b'"code":"request_aborted"' in await response.read()
        flex = ENDLESS | FLEX
        async with asking(server, flex) as one, asking(server, flex) as two, asking(server, ENDLESS) as online:
            assert await server.post("/admin/abort?tenant=offline", b"") == (200, {"aborted": 2})
            assert [(await task)[0] for task in (one, two)] == [503, 503]
            assert not online.done()
        for query, status in (("request_id=mine", 404), ("", 400), ("request_id=a&tenant=online", 400)):
            assert (await server.post(f"/admin/abort?{query}", b""))[0] == status
        await server.idle()


async def test_clients_are_told_not_to_send_an_aborted_request_again(long_engine: Engine) -> None:
    async with serving(long_engine) as server:
        sent = asyncio.create_task(server.client.post(server.url + CHAT, json=ENDLESS))
        while not (views := await listed(server)):
            await asyncio.sleep(0.005)
        await server.post(f"/admin/abort?request_id={views[0]['id']}", b"")
        async with await sent as response:
            assert (response.status, response.headers["x-should-retry"]) == (503, "false")
        await server.idle()


async def test_lines_of_a_batch_that_are_aborted_with_their_tenant_run_again(tmp_path: Path) -> None:
    with make_engine(tmp_path / "model") as engine:
        async with serving(engine, data_dir=str(tmp_path / "data")) as server:
            engine.pause(Tenant.OFFLINE)
            body = SHORT | {"model": "tiny"}
            lines = [{"custom_id": str(number), "method": "POST", "url": CHAT, "body": body} for number in range(3)]
            form = FormData({"purpose": "batch"})
            form.add_field("file", "\n".join(map(json.dumps, lines)).encode(), filename="in.jsonl")
            async with server.client.post(server.url + "/v1/files", data=form) as response:
                file = (await response.json())["id"]
            batch = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
            _, made = await server.post("/v1/batches", batch)
            while len(views := await listed(server)) < 3:
                await asyncio.sleep(0.01)
            assert {view["id"] for view in views} == {f"{made['id'].removeprefix('batch_')}:{number}" for number in (1, 2, 3)}

            assert await server.post("/admin/abort?tenant=offline", b"") == (200, {"aborted": 3})
            engine.resume()

            while (current := (await server.get(f"/v1/batches/{made['id']}"))[1])["status"] != "completed":
                await asyncio.sleep(0.02)
            assert current["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_a_paused_worker_and_the_one_after_it(pair: Engine) -> None:
    """Two models: the offline worker runs nothing although the device is idle; nor does the worker that comes after it."""
    async with serving(pair) as server:
        pair.pause("offline")
        async with asking(server, SHORT | {"model": "night"}) as waiting:

            async def stands() -> None:
                while pair.stats().tenants[Tenant.OFFLINE].waiting != 1 or pair.stats().sharing.state != "offline":
                    await asyncio.sleep(0.01)

            await stands()
            sharing = pair._sharing
            assert sharing is not None and sharing._pid is not None
            os.kill(sharing._pid, signal.SIGKILL)
            while not pair.stats().sharing.worker_restarts:
                await asyncio.sleep(0.01)
            assert (await server.post(CHAT, SHORT | {"model": "tiny"}))[0] == 200
            assert sharing.wait_ready()
            await stands()
            assert not waiting.done()
            (view,) = await listed(server)
            assert (view["model"], view["state"]) == ("night", "waiting")
            pair.resume()
            assert (await waiting)[0] == 200
        await server.idle()
