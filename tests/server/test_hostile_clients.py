"""Clients that break off, stand still, or send too slowly or too much: each costs its own connection and nobody else's."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import tiny_checkpoint
from serving import LONG_CONTEXT, MESSAGES, HeldTokenizer, Server, make_engine, serving

from bench.fake_server import fake_engine
from engine import Engine
from engine.types import Tenant

CHAT = "/v1/chat/completions"
SHORT = {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "


async def has_metric(server: Server, line: str) -> bool:
    async with server.client.get(server.url + "/metrics") as response:
        return line in (await response.text()).splitlines()


async def test_a_client_that_leaves_while_its_prompt_is_computed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=32_768)
    with fake_engine(folder, step_seconds=0.01, max_num_batched_tokens=16) as engine:
        async with serving(engine) as server:
            body = json.dumps({"prompt": [7] * 30_000, "max_tokens": 5, "stream": True}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HEAD.replace("chat/", "").encode() + f"{len(body)}\r\n\r\n".encode() + body)
            while not engine.stats().tenants[Tenant.ONLINE].counters.computed_tokens:
                await asyncio.sleep(0.005)

            writer.close()

            await server.idle()
            assert engine.stats().tenants[Tenant.ONLINE].counters.computed_tokens < 30_000
            stats = engine.stats()
            assert stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages
            assert await has_metric(server, 'sluice_client_disconnects_total{phase="prefill"} 1.0')


STOPPED = """
import json, os, signal, socket, sys
port, body = int(sys.argv[1]), sys.argv[2].encode()
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
sock.connect(("127.0.0.1", port))
sock.sendall(sys.argv[3].encode() + str(len(body)).encode() + b"\\r\\n\\r\\n" + body)
sock.recv(10)
os.kill(os.getpid(), signal.SIGSTOP)
"""


async def test_a_client_process_that_is_stopped(tmp_path: Path) -> None:
    """Its connection stays open and takes nothing more: at the write deadline it is given up."""
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=32_768)
    with fake_engine(folder) as engine:
        async with serving(engine, sse_write_timeout=0.2) as server:
            # Even merged, a megabyte of text; the system takes an eighth of that.
            body = {"messages": MESSAGES, "max_tokens": 30_000, "ignore_eos": True, "stream": True, "n": 8}
            command = [sys.executable, "-c", STOPPED, str(server.port), json.dumps(body), HEAD]
            with subprocess.Popen(command) as client:
                try:
                    _, status = await asyncio.to_thread(os.waitpid, client.pid, os.WUNTRACED)
                    assert os.WIFSTOPPED(status)
                    assert (await server.post(CHAT, SHORT))[0] == 200
                    while not await has_metric(server, "sluice_sse_backpressure_aborts_total 1.0"):
                        await asyncio.sleep(0.02)
                    await server.idle()
                    assert not await has_metric(server, 'sluice_client_disconnects_total{phase="decode"} 1.0')
                finally:
                    client.kill()


async def test_a_stream_whose_end_nobody_reads(tmp_path: Path) -> None:
    """The last bytes have the same deadline as those before them."""
    with make_engine(tmp_path, context=LONG_CONTEXT, held=True) as engine:
        tokenizer = engine.tokenizer()
        assert isinstance(tokenizer, HeldTokenizer)
        async with serving(engine, sse_write_timeout=0.2) as server:
            assert server.service.connections is not None
            question = [{"role": "user", "content": "all work and no play " * 300}]
            body = json.dumps(SHORT | {"messages": question, "stream": True}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            writer.write(f"{HEAD}{len(body)}\r\n\r\n".encode() + body)
            assert await asyncio.to_thread(tokenizer.entered.wait, 30)
            ((connection, *_),) = (server.service.connections._server.connections,)
            assert connection.transport is not None
            connection.transport.write(b" " * 2**24)  # written before, and not read
            tokenizer.go_on.set()
            while not await has_metric(server, "sluice_sse_backpressure_aborts_total 1.0"):
                await asyncio.sleep(0.02)
            await server.idle()
            done = 'sluice_request_success_total{finished_reason="length",model_name="org/tiny",tenant="online"} 1.0'
            assert await has_metric(server, done), "all of it was computed"
            writer.close()


async def test_a_body_that_trickles(engine: Engine) -> None:
    """A byte now and then does not keep a body alive beyond its time."""
    async with serving(engine, body_timeout=0.2) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"{HEAD}100000\r\n\r\n".encode())

        async def trickle() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.01)

        task = asyncio.create_task(trickle())
        try:
            assert b" 408 " in await reader.readline()
        finally:
            task.cancel()
            writer.close()


async def test_the_memory_of_all_bodies_together(engine: Engine) -> None:
    """Bodies that are each small enough, and too much together."""
    async with serving(engine, max_body_size=1000, max_body_memory=1000, body_timeout=30) as server:
        _, first = await asyncio.open_connection("127.0.0.1", server.port)
        first.write(f"{HEAD}800\r\n\r\n".encode() + b" " * 700)
        while server.service.bodies.held < 700:
            await asyncio.sleep(0.005)
        async with server.client.post(server.url + CHAT, json=SHORT | {"user": "x" * 400}) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert (await response.json())["error"]["code"] == "server_overloaded"
        assert (await server.post(CHAT, SHORT))[0] == 200, "what fits is served"
        first.close()
        while server.service.bodies.held:
            await asyncio.sleep(0.005)
        assert (await server.post(CHAT, SHORT | {"user": "x" * 400}))[0] == 200
