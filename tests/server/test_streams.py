"""Streams: the order of events, clients that leave or stop reading, failures half-way, and a loop that is never blocked."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from serving import ENDLESS, LONG_CONTEXT, MESSAGES, HeldTokenizer, Server, make_engine, parse_events, serving

from engine import Engine
from engine.types import Tenant

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"messages": MESSAGES, "max_tokens": 450, "ignore_eos": True}
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


async def raw_post(server: Server, path: str, body: Any, receive_buffer: int | None = None) -> Any:
    """A connection of our own, to be left or neglected: reader and writer after the request was sent."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


def text_of(events: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for event in events[:-1] for choice in event["choices"])


async def test_order_of_a_chat_stream(engine: Engine) -> None:
    async with serving(engine) as server:
        body = {"messages": MESSAGES, "stream_options": {"include_usage": True}} | GREEDY
        events = await server.events(CHAT, body)
        _, whole = await server.post(CHAT, {"messages": MESSAGES} | GREEDY)

    *chunks, usage, done = events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["id"] for chunk in events[:-1]} == {usage["id"]}
    assert {chunk["object"] for chunk in events[:-1]} == {"chat.completion.chunk"}
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert "".join(choice["delta"]["content"] for choice in middle) == whole["choices"][0]["message"]["content"]


async def test_usage_only_where_it_was_asked_for(engine: Engine) -> None:
    async with serving(engine) as server:
        events = await server.events(CHAT, {"messages": MESSAGES} | GREEDY)
        continuous = await server.events(
            CHAT,
            {"messages": MESSAGES, "stream_options": {"include_usage": True, "continuous_usage_stats": True}} | GREEDY,
        )

    assert not any("usage" in event for event in events[:-1])
    counts = [event["usage"]["completion_tokens"] for event in continuous[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 12


async def test_choices_of_a_stream_are_those_of_the_whole(engine: Engine) -> None:
    body = {"prompt": ["ab", "cd"], "n": 2, "seed": 3, "logprobs": 1, "echo": True, "max_tokens": 8, "return_token_ids": True}
    async with serving(engine) as server:
        events = await server.events(TEXT, body)
        _, whole = await server.post(TEXT, body)

    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            else:
                assert len(joined) == len(values)
    assert events[-1] == "[DONE]"


async def test_chat_logprobs_in_a_stream(engine: Engine) -> None:
    async with serving(engine) as server:
        events = await server.events(CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1} | GREEDY)

    parts = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert sum(len(part["content"]) for part in parts if part) == 12


async def test_no_output_in_a_stream(engine: Engine) -> None:
    async with serving(engine) as server:
        events = await server.events(TEXT, {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0})

    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == "abc"
    assert choices[-1]["finish_reason"] == "length"


async def test_errors_before_the_first_token_have_a_status(engine: Engine) -> None:
    async with serving(engine) as server:
        assert (await server.post(CHAT, LONG | {"stream": True, "model": "x"}))[0] == 404
        assert (await server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 600}], "stream": True}))[0] == 400


async def test_a_silent_stream_gets_comments(engine: Engine) -> None:
    """With the only place taken, a stream waits in the queue and is kept alive meanwhile."""
    async with serving(engine, sse_keep_alive_interval=0.02) as server:
        busy = [asyncio.create_task(server.post(CHAT, LONG | {"n": 64})) for _ in range(1)]
        while engine.stats().tenants[Tenant.ONLINE].running < 64:
            await asyncio.sleep(0.005)
        events = await server.events(CHAT, {"messages": MESSAGES} | GREEDY)
        assert (await busy[0])[0] == 200

    assert events[0] == ": keep-alive"
    assert events[-1] == "[DONE]"
    comments = [index for index, event in enumerate(events) if event == ": keep-alive"]
    role = next(i for i, event in enumerate(events) if isinstance(event, dict))
    assert comments[0] < role, "the role chunk comes with the first token, not before"


async def test_a_client_of_http_1_0_gets_the_events_without_chunks(engine: Engine) -> None:
    async with serving(engine) as server:
        expected = await server.events(CHAT, {"messages": MESSAGES} | GREEDY)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps({"messages": MESSAGES, "stream": True} | GREEDY).encode()
        writer.write(f"POST {CHAT} HTTP/1.0\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()

    assert "chunked" not in head.lower()
    events = parse_events(body)
    assert (text_of(events), events[-1]) == (text_of(expected), "[DONE]")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tier", ["default", "flex"])
async def test_a_client_that_leaves_ends_its_request(
    long_engine: Engine, stream: bool, tier: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with serving(long_engine) as server:
        _, writer = await raw_post(server, CHAT, ENDLESS | {"stream": stream, "service_tier": tier})
        while not any(job.generations[0].usage.completion_tokens for job in server.service.jobs):
            await asyncio.sleep(0.002)

        writer.close()

        await server.idle()
        assert not server.service.jobs
        assert "aborted by its client" in caplog.text
        async with server.client.get(server.url + "/metrics") as response:
            assert 'sluice_client_disconnects_total{phase="decode"} 1.0' in await response.text()


async def test_a_client_that_leaves_the_queue(tmp_path: Path) -> None:
    with make_engine(tmp_path, max_num_seqs=1, context=LONG_CONTEXT) as engine:
        async with serving(engine) as server:
            _, first = await raw_post(server, CHAT, ENDLESS)
            while not engine.stats().tenants[Tenant.ONLINE].running:
                await asyncio.sleep(0.002)
            _, writer = await raw_post(server, CHAT, ENDLESS | {"stream": True})
            while not engine.stats().tenants[Tenant.ONLINE].waiting:
                await asyncio.sleep(0.002)

            writer.close()

            while engine.stats().tenants[Tenant.ONLINE].waiting:
                await asyncio.sleep(0.002)
            assert engine.stats().tenants[Tenant.ONLINE].running == 1
            first.close()
            await server.idle()


async def test_many_clients_that_leave_leave_nothing(long_engine: Engine) -> None:
    engine = long_engine
    async with serving(engine) as server:
        await server.idle()
        pages = engine.stats().kv_pages_free + engine.stats().kv_pages_cached
        for _ in range(40):
            _, writer = await raw_post(server, CHAT, ENDLESS | {"stream": True, "n": 2})
            await asyncio.sleep(0.002)
            writer.close()
        while server.service.connections is not None and server.service.connections._silent:
            await asyncio.sleep(0.005)
        await server.idle()

        stats = engine.stats()
        assert stats.kv_pages_free + stats.kv_pages_cached == pages
        assert not engine._live


async def test_a_slow_reader_is_aborted_and_harms_nobody(long_engine: Engine) -> None:
    """A client that never reads: its stream ends at the write deadline, and others are served meanwhile."""
    engine = long_engine
    async with serving(engine, sse_write_timeout=0.2) as server:
        body = ENDLESS | {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20, "service_tier": "flex"}
        _, writer = await raw_post(server, CHAT, body, receive_buffer=4096)
        while not server.service.in_flight.total:
            await asyncio.sleep(0.005)
        status, _ = await server.post(CHAT, {"messages": MESSAGES} | GREEDY)
        assert status == 200

        assert server.service.connections is not None
        fullest = 0
        while server.service.in_flight.total:
            for protocol in server.service.connections._server.connections:
                if protocol.transport is not None:
                    fullest = max(fullest, protocol.transport.get_write_buffer_size())
            await asyncio.sleep(0.005)
        assert 0 < fullest < 1 << 20, "what nobody reads waits in the engine's mailbox, merged, not in the socket's buffer"
        await server.idle()

        async with server.client.get(server.url + "/metrics") as response:
            assert "sluice_sse_backpressure_aborts_total 1.0" in await response.text()
        writer.close()


async def test_a_failure_half_way_is_an_event(long_engine: Engine) -> None:
    body = ENDLESS | {"stream": True}
    async with serving(long_engine) as server, server.client.post(server.url + CHAT, json=body) as response:
        await response.content.readuntil(b"\n\n")
        (job,) = server.service.jobs
        long_engine.abort(job.generations[0].request_id)
        events = parse_events("data: {}\n\n" + (await response.read()).decode())

    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "request_aborted"
    assert set(events[-2]["error"]) == {"message", "type", "param", "code"}


async def test_an_engine_that_stops_ends_its_streams(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, context=LONG_CONTEXT)
    async with serving(engine) as server:
        unary = asyncio.create_task(server.post(CHAT, ENDLESS))
        async with server.client.post(server.url + CHAT, json=ENDLESS | {"stream": True}) as response:
            await response.content.readuntil(b"\n\n")
            await asyncio.to_thread(engine.close)
            events = parse_events("data: {}\n\n" + (await response.read()).decode())
        assert [event["error"]["code"] for event in events[-2:-1]] == ["engine_dead"]
        assert events[-1] == "[DONE]"
        status, body = await unary
        assert (status, body["error"]["code"]) == (503, "engine_dead")
        for path in ("/health", "/ready"):
            assert (await server.get(path))[0] == 503


async def test_draining(engine: Engine) -> None:
    async with serving(engine) as server:
        stream = asyncio.create_task(server.events(CHAT, LONG))
        while not server.service.jobs:
            await asyncio.sleep(0.005)
        drain = asyncio.create_task(server.service.drain(60))
        await asyncio.sleep(0)

        assert (await server.get("/ready"))[0] == 503
        async with server.client.get(server.url + "/health") as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        status, body = await server.post(CHAT, {"messages": MESSAGES})
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert await drain
        assert (await stream)[-2]["choices"][0]["finish_reason"] == "length"


async def test_a_drain_that_takes_too_long(long_engine: Engine) -> None:
    async with serving(long_engine) as server:
        stream = asyncio.create_task(server.events(CHAT, ENDLESS))
        while not server.service.jobs:
            await asyncio.sleep(0.005)

        assert not await server.service.drain(0)

        assert (await stream)[-2]["error"]["code"] == "request_failed"


LARGE = [
    (CHAT, {"messages": [{"role": "user", "content": "all work and no play " * 300}]}),
    (CHAT, {"messages": [{"role": "user", "content": "all work and no play"}] * 100}),
    (TEXT, {"prompt": ["ab"] * 99 + ["all work and no play " * 30]}),
]


@pytest.mark.parametrize(("path", "body"), LARGE, ids=["long", "many messages", "many prompts"])
async def test_a_long_prompt_does_not_block_the_loop(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    """While it is being tokenized, other requests are answered."""
    with make_engine(tmp_path, held=True) as engine:
        tokenizer = engine.tokenizer()
        assert isinstance(tokenizer, HeldTokenizer)
        async with serving(engine) as server:
            big = asyncio.create_task(server.post(path, body))
            assert await asyncio.to_thread(tokenizer.entered.wait, 30)

            assert (await server.get("/health"))[0] == 200
            assert not big.done()

            tokenizer.go_on.set()
            status, reply = await big
            assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


async def test_every_token_id_is_streamed_even_while_its_text_is_held_back(engine: Engine) -> None:
    """Random bytes are seldom whole characters, so many tokens have no text of their own yet."""
    async with serving(engine) as server:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "ignore_eos": True, "temperature": 2, "seed": 1}
        events = await server.events("/v1/completions", body | {"return_token_ids": True})
        _, whole = await server.post("/v1/completions", body | {"return_token_ids": True})
    streamed = [token for event in events[:-1] for choice in event["choices"] for token in choice.get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    assert len(streamed) == 40
