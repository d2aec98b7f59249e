"""How much of one key may wait: batches and their lines; and what becomes of a batch whose client left too early."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from serving import Server, serving

from engine import Engine
from server.clients import client_of

PATIENCE = 60.0  # seconds; only a failing test waits that long


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def upload(server: Server, lines: int, key: str) -> str:
    item = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
    form = FormData({"purpose": "batch"})
    data = "".join(json.dumps({"custom_id": str(n)} | item) + "\n" for n in range(lines))
    form.add_field("file", data.encode(), filename="in.jsonl")
    async with server.client.post(server.url + "/v1/files", data=form, headers=bearer(key)) as response:
        assert response.status == 200
        return str((await response.json())["id"])


async def create(server: Server, lines: int, key: str) -> tuple[int, Any, Any]:
    """Status, headers and body."""
    body = {"input_file_id": await upload(server, lines, key), "endpoint": "/v1/completions", "completion_window": "24h"}
    async with server.client.post(server.url + "/v1/batches", json=body, headers=bearer(key)) as response:
        return response.status, response.headers, await response.json()


async def ended(server: Server, batch_id: str, key: str) -> Any:
    async with asyncio.timeout(PATIENCE):
        while True:
            _, batch = await server.get(f"/v1/batches/{batch_id}", headers=bearer(key))
            if batch["status"] in ("completed", "cancelled"):
                return batch
            await asyncio.sleep(0.02)


def is_refused(answer: tuple[int, Any, Any], why: str) -> bool:
    status, headers, body = answer
    error = body["error"]
    told = (status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    return told and 1 <= int(headers["Retry-After"]) <= 600 and why in error["message"]


@pytest.mark.parametrize("by_flag", [True, False])
async def test_batches_of_one_key(engine: Engine, tmp_path: Path, by_flag: bool) -> None:
    """Nothing runs: the model is being loaded. Two at once do not both get the last place."""
    options: dict[str, Any] = {"clients": (client_of("a"), client_of("b")), "max_batches_per_key": 2}
    if not by_flag:
        options = {"clients": (dataclasses.replace(client_of("a"), max_batches=2), client_of("b")), "max_batches_per_key": 9}
    async with serving(None, data_dir=str(tmp_path), **options) as server:
        answers = await asyncio.gather(*(create(server, 1, "a") for _ in range(5)))
        accepted = [body["id"] for status, _, body in answers if status == 200]
        assert len(accepted) == 2
        assert all(is_refused(answer, "2 unfinished batches") for answer in answers if answer[0] != 200)
        assert (await create(server, 1, "b"))[0] == 200, "others have their own"
        status, _ = await server.post(f"/v1/batches/{accepted[0]}/cancel", {}, headers=bearer("a"))
        assert status == 200
        await ended(server, accepted[0], "a")
        assert (await create(server, 1, "a"))[0] == 200


async def test_lines_of_one_key(engine: Engine, tmp_path: Path) -> None:
    """Counted from the moment they are accepted, validated or not; a restart knows them; what is answered counts no more."""
    options = {"clients": (client_of("a"), client_of("b")), "max_queued_lines_per_key": 10, "data_dir": str(tmp_path)}
    async with serving(None, **options) as server:
        status, _, first = await create(server, 8, "a")
        assert status == 200
        assert is_refused(await create(server, 3, "a"), "8 lines of this key wait already, and 3 more would exceed 10")
        assert (await create(server, 2, "a"))[0] == 200
        assert (await create(server, 8, "b"))[0] == 200, "others have their own"
        status, _, body = await create(server, 11, "b")
        assert (status, body["error"]["param"]) == (400, "input_file_id") and "split it" in body["error"]["message"]
    async with serving(None, **options) as server:
        assert is_refused(await create(server, 1, "a"), "10 lines")
        server.service.start(engine)
        assert (await ended(server, first["id"], "a"))["request_counts"]["completed"] == 8
        assert (await create(server, 8, "a"))[0] == 200


async def test_a_batch_is_accepted_whole_or_not_at_all(engine: Engine, tmp_path: Path) -> None:
    """Its client leaves while it is being stored: it must not stand there without anybody who runs it."""
    async with serving(engine, data_dir=str(tmp_path)) as server:
        jobs = server.service.batches
        assert jobs is not None
        body = {"input_file_id": await upload(server, 3, "-"), "endpoint": "/v1/completions", "completion_window": "24h"}
        entered, go_on, store = threading.Event(), threading.Event(), jobs.store.add_batch

        def slow_disk(*args: Any) -> None:
            entered.set()
            assert go_on.wait(PATIENCE)
            store(*args)

        jobs.store.add_batch = slow_disk  # type: ignore[method-assign]
        request = asyncio.create_task(server.post("/v1/batches", body))
        assert await asyncio.to_thread(entered.wait, PATIENCE)
        request.cancel()
        left = server.service.metrics.http.labels("/v1/batches", "POST", "499")
        async with asyncio.timeout(PATIENCE):
            while not left._value.get():
                await asyncio.sleep(0.01)
            go_on.set()
            while [batch["status"] for batch in (await server.get("/v1/batches"))[1]["data"]] != ["completed"]:
                await asyncio.sleep(0.02)
