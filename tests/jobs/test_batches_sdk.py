"""The OpenAI SDK, unmodified: files up, batches run, results down."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from serving import Server, serving

from engine import Engine

OPEN = ("validating", "in_progress", "finalizing", "cancelling")


def client_of(server: Server, key: str = "k") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def line(number: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": f"hello {number}", "max_tokens": 6} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in lines)


async def submit(client: AsyncOpenAI, data: bytes, **options: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    options = {"endpoint": "/v1/completions", "completion_window": "24h"} | options
    return await client.batches.create(input_file_id=file.id, **options)


async def ended(client: AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(60):
        while (batch := await client.batches.retrieve(batch_id)).status in OPEN:
            await asyncio.sleep(0.02)
    return batch


async def records(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """By custom_id; none may come twice."""
    if file_id is None:
        return {}
    found = [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]
    table = {item["custom_id"]: item for item in found}
    assert len(table) == len(found)
    return table


async def test_a_batch_from_upload_to_results(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(*(line(n) for n in range(20)), line(20, temperature=9))
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.status) == (len(data), "in.jsonl", "batch", "processed")
        assert (await client.files.content(file.id)).content == data
        created = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"night": "one"}
        )
        assert created.status == "validating" and created.metadata == {"night": "one"}
        assert created.expires_at - created.created_at == 86_400
        batch = await ended(client, created.id)
        output, errors = await records(client, batch.output_file_id), await records(client, batch.error_file_id)
        listed = await client.files.retrieve(batch.output_file_id)

    assert (batch.status, batch.model) == ("completed", "org/tiny")
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
    assert output.keys() == {f"id-{n}" for n in range(20)} and errors.keys() == {"id-20"}
    answer = output["id-0"]
    assert answer["error"] is None and answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["service_tier"] == "flex"
    assert errors["id-20"]["response"]["status_code"] == 400
    used = [item["response"]["body"]["usage"] for item in output.values()]
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in used)
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in used)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert listed.purpose == "batch_output" and listed.filename == f"{batch.id}_output.jsonl"
    receipt = batch.sluice["receipt"]
    assert receipt["output_tokens"] == batch.usage.output_tokens and receipt["wall_s"] >= 0


async def test_bad_lines_fail_the_whole_batch_and_are_told_by_number(engine: Engine, tmp_path: Path) -> None:
    chat = line(4) | {"url": "/v1/chat/completions"}
    data = jsonl(line(1), b"{", line(1), chat, line(5, model="gpt-9"), line(6))
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        batch = await ended(client, (await submit(client, data)).id)

    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "url_mismatch"),
        (5, "model_not_found"),
    ]


async def test_bad_lines_may_be_passed_over(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(line(1), b"{", b"", line(1), line(2, model="gpt-9"), line(3))
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        batch = await ended(client, (await submit(client, data, extra_body={"on_bad_line": "skip"})).id)
        output = await records(client, batch.output_file_id)
        errors = [json.loads(text) for text in (await client.files.content(batch.error_file_id)).text.splitlines()]

    assert batch.status == "completed" and (batch.request_counts.total, batch.request_counts.failed) == (5, 3)
    assert batch.model == "org/tiny", "the one that lines without a model are answered by"
    assert output.keys() == {"id-1", "id-3"}
    assert sorted(item["error"]["line"] for item in errors if item["error"]) == [2, 4]


async def test_cancel_keeps_what_is_finished(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(*(line(n, max_tokens=2) for n in range(8)), *(line(n, max_tokens=400, ignore_eos=True) for n in range(8, 300)))
    async with serving(engine, data_dir=str(tmp_path), max_inflight=8) as server, client_of(server) as client:
        created = await submit(client, data)
        while (await client.batches.retrieve(created.id)).request_counts.completed < 8:
            await asyncio.sleep(0.01)
        cancelling = await client.batches.cancel(created.id)
        assert cancelling.status in ("cancelling", "cancelled") and cancelling.cancelling_at
        batch = await ended(client, created.id)
        output, errors = await records(client, batch.output_file_id), await records(client, batch.error_file_id)
        with pytest.raises(openai.ConflictError) as again:
            await client.batches.cancel(created.id)

    assert batch.status == "cancelled" and batch.cancelled_at
    assert {f"id-{n}" for n in range(8)} <= output.keys()
    assert output.keys() | errors.keys() == {f"id-{n}" for n in range(300)} and not output.keys() & errors.keys()
    assert {item["error"]["code"] for item in errors.values()} == {"batch_cancelled"}
    assert again.value.code == "batch_not_cancellable"


async def test_a_window_that_ends_keeps_what_is_finished(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(line(0, max_tokens=2), *(line(n, max_tokens=400, ignore_eos=True) for n in range(1, 2000)))
    async with serving(engine, data_dir=str(tmp_path), max_inflight=4) as server, client_of(server) as client:
        batch = await ended(client, (await submit(client, data, completion_window="2s")).id)
        output, errors = await records(client, batch.output_file_id), await records(client, batch.error_file_id)

    assert batch.status == "expired" and batch.expired_at >= batch.expires_at
    assert len(output) + len(errors) == 2000 and len(errors) > 0
    assert {item["error"]["code"] for item in errors.values()} == {"batch_expired"}
    assert batch.request_counts.failed == len(errors)


async def test_pause_and_resume(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(*(line(n) for n in range(30)))
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "1h"}
        _, created = await server.post("/v1/batches", body)
        status, paused = await server.post(f"/v1/batches/{created['id']}/pause", {})
        if status == 200:  # else it was over already
            assert paused["sluice"]["paused"] and paused["sluice"]["paused_reason"] == "by_request"
            status, resumed = await server.post(f"/v1/batches/{created['id']}/resume", {})
            assert status == 200 and not resumed["sluice"]["paused"]
        batch = await ended(client, created["id"])
    assert batch.request_counts.completed == 30


async def test_pages(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        files = [(await client.files.create(file=(f"{n}.jsonl", jsonl(line(n))), purpose="batch")).id for n in range(7)]
        batches = []
        for file in files:
            created = await client.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h")
            batches.append(created.id)
        assert [batch.id async for batch in client.batches.list(limit=3)] == batches[::-1]
        assert [file.id async for file in client.files.list(limit=2, purpose="batch", order="asc")] == files
        first = await client.batches.list(limit=3)
        assert first.has_more and [batch.id for batch in first.data] == batches[:3:-1]
        for batch_id in batches:
            await ended(client, batch_id)
        assert len([file async for file in client.files.list(purpose="batch_output")]) == 7


async def test_files_come_and_go(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server, client_of(server) as client:
        file = await client.files.create(
            file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.files.create(file=("a.jsonl", b"{}"), purpose="vision")
        assert bad.value.param == "purpose"
        async with asyncio.timeout(60):  # what is left of an upload goes after its answer
            while any((tmp_path / "files").iterdir()):
                await asyncio.sleep(0.01)


async def test_a_key_sees_its_own_alone(engine: Engine, tmp_path: Path) -> None:
    async with (
        serving(engine, data_dir=str(tmp_path), api_key=("one", "two")) as server,
        client_of(server, "one") as mine,
        client_of(server, "two") as other,
    ):
        batch = await submit(mine, jsonl(line(1)))
        for attempt in (
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            other.files.content(batch.input_file_id),
            other.files.delete(batch.input_file_id),
            other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt
        assert [item async for item in other.batches.list()] == []
        assert [item async for item in other.files.list()] == []
        assert (await ended(mine, batch.id)).status == "completed"
