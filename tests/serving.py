"""A real engine on a tiny checkpoint, and a real server around it on a free port, for the tests of both."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig
from engine.build import load_model
from engine.tokenizer import Tokenizer
from server.admission import Connections
from server.app import app_of
from server.config import ServerConfig
from server.jobs import Jobs, open_jobs
from server.listen import bind
from server.service import Service

MESSAGES = [{"role": "user", "content": "hi"}]
LONG_CONTEXT = 32_768
ENDLESS = {"messages": MESSAGES, "max_tokens": 32_000, "ignore_eos": True}  # only an abort ends it


class HeldTokenizer(Tokenizer):
    """A tokenizer that stands still while it encodes, until the test lets it go on."""

    entered: threading.Event
    go_on: threading.Event

    @classmethod
    def load(cls, path: Path | str) -> Self:
        tokenizer = super().load(path)
        tokenizer.entered, tokenizer.go_on = threading.Event(), threading.Event()
        return tokenizer

    def encode(self, text: str, add_special: bool = True, **options: Any) -> list[int]:
        self.entered.set()
        assert self.go_on.wait(30), "nobody let the tokenizer go on: the event loop waits for it"
        return super().encode(text, add_special, **options)


def make_engine(folder: Path, *, context: int = 512, held: bool = False, **options: Any) -> Engine:
    """An engine on a random model, named `org/tiny` and `tiny`, with room for eight requests of its whole context."""
    checkpoint = tiny_checkpoint(folder, max_position_embeddings=context)
    options = {"served_model_name": ("org/tiny", "tiny"), "threads": 1, "kv_cache_memory": 2**25 + 8 * 768 * context} | options
    config = EngineConfig(model=str(checkpoint), **options)
    if not held:
        return Engine(config=config, progress=False)
    return Engine(config=config, built=load_model(config, progress=False), tokenizer=HeldTokenizer.load(checkpoint))


class Server:
    """A running server as a test sees it."""

    def __init__(self, service: Service, port: int, client: aiohttp.ClientSession) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = client

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and decoded JSON of a POST. `body` is sent as JSON, or as it is if it is bytes."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.client.post(self.url + path, data=data, headers=headers, **options) as response:
            return response.status, json.loads(await response.read())

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client.get(self.url + path, **options) as response:
            return response.status, json.loads(await response.read())

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream: decoded JSON, and the strings `[DONE]` and `: comment`."""
        async with self.client.post(self.url + path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return parse_events((await response.read()).decode())

    async def idle(self) -> None:
        """Wait until neither the server nor the engine has anything to do."""
        engine = self.service.engine
        while self.service.in_flight.total or any(t.running or t.waiting for t in engine.stats().tenants.values()):
            await asyncio.sleep(0.01)


def parse_events(text: str) -> list[Any]:
    """Server-sent events; every one must end in an empty line."""
    assert text.endswith("\n\n")
    events: list[Any] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        assert "\n" not in block
        if block.startswith(":"):
            events.append(block)
            continue
        assert block.startswith("data: ")
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


@contextlib.asynccontextmanager
async def serving(engine: Engine | None, *, jobs: Jobs | None = None, **options: Any) -> AsyncIterator[Server]:
    """Serve `engine` with the server options given; files and batches only with a `data_dir`, or with `jobs`."""
    config = ServerConfig(**{"data_dir": "none", "port": 0} | options)
    batches = jobs or open_jobs(config)
    service = Service(config, engine, batches)
    runner = web.AppRunner(app_of(service), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    assert runner.server is not None
    service.connections = Connections(runner.server, config)
    listener = await asyncio.get_running_loop().create_server(service.connections, sock=bind(config))
    port = listener.sockets[0].getsockname()[1]
    async with aiohttp.ClientSession() as client:
        try:
            yield Server(service, port, client)
        finally:
            listener.close()
            await runner.cleanup()
            if batches is not None:
                await asyncio.to_thread(batches.close)
