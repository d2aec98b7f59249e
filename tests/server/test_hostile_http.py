"""Requests that are meant to be read in two ways, or to be larger than they look; and what other machines can reach at all."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import tiny_checkpoint
from serving import Server, serving

from engine import Engine

ROOT = Path(__file__).parents[2]
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
KEY = b"Authorization: Bearer k\r\nContent-Type: application/json\r\n"
REST = b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


async def answer(server: Server, raw: bytes) -> bytes:
    """The beginning of what the server says to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(raw)
        return await reader.readline() + await reader.read(1000)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost/health?" + REST,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost/health#" + REST,
        b"POST http://a/health/../v1/chat/completions HTTP/1.1\r\nHost: a" + REST,
        b"POST /health/../v1/chat/completions HTTP/1.1\r\nHost: a" + REST,
        b"POST /health/%2e%2e/v1/chat/completions HTTP/1.1\r\nHost: a" + REST,
        b"POST //v1/chat/completions HTTP/1.1\r\nHost: a" + REST,
        b"POST /v1%2fchat/completions HTTP/1.1\r\nHost: a" + REST,
        b"POST /v1/chat/completions;/health HTTP/1.1\r\nHost: a" + REST,
        b"POST /v1/chat/completions#/health HTTP/1.1\r\nHost: a" + REST,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health" + REST,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-HTTP-Method-Override: OPTIONS" + REST,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 127.0.0.1" + REST,
    ],
)
async def test_the_route_decides_however_its_url_is_dressed_up(engine: Engine, raw: bytes) -> None:
    async with serving(engine, api_key=("k",)) as server:
        assert b" 401 " in (await answer(server, raw)).partition(b"\r\n")[0]
        assert b" 200 " in await answer(server, b"GET http://a/health HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    "raw",
    [
        CHAT + KEY + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        CHAT + KEY + b"Content-Length: -2\r\n\r\n{}",
        CHAT + KEY + b"Content-Length: +2\r\n\r\n{}",
        CHAT + KEY + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        CHAT + KEY + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHAT + KEY + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        CHAT + KEY + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
        CHAT + b"Host: b\r\n" + KEY + b"Content-Length: 2\r\n\r\n{}",
        CHAT + KEY + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
        CHAT + KEY + b"X: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
        CHAT.replace(b"Host: a\r\n", b"") + KEY + b"Content-Length: 2\r\n\r\n{}",
        CHAT + KEY + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde",
    ],
)
async def test_no_request_has_two_lengths_or_two_hosts(engine: Engine, raw: bytes) -> None:
    async with serving(engine, api_key=("k",)) as server:
        assert b" 400 " in (await answer(server, raw)).partition(b"\r\n")[0]
        assert (await server.get("/health"))[0] == 200


@pytest.mark.parametrize("name", ["gzip", "deflate"])
async def test_a_body_is_as_large_as_it_gets(engine: Engine, name: str) -> None:
    """A packed body of spaces is a thousandth of what it becomes."""
    pack = gzip.compress if name == "gzip" else zlib.compress
    async with serving(engine, max_body_size=2**20, max_body_memory=2**23) as server:
        bomb = pack(b" " * 2**24)
        assert len(bomb) < 2**15
        head = CHAT + KEY + f"Content-Encoding: {name}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
        reply = await answer(server, head + bomb)
        assert b" 413 " in reply.partition(b"\r\n")[0] and b"request_too_large" in reply
        while server.service.bodies.held:
            await asyncio.sleep(0.005)


@pytest.fixture
def two_models(tmp_path: Path) -> Iterator[psutil.Process]:
    """A server process that has loaded an online and an offline model."""
    online, offline = tiny_checkpoint(tmp_path), tiny_checkpoint(tmp_path, seed=1)
    command = [sys.executable, "-m", "engine.server", str(online), "--offline-model", str(offline), "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data"), "--threads", "1"], cwd=ROOT, stderr=file)
    try:
        process = psutil.Process(server.pid)
        while "ready after" not in log.read_text():
            assert server.poll() is None, log.read_text()
            process.is_running()
            psutil.wait_procs([process], timeout=0.05)
        yield process
    finally:
        server.kill()
        server.wait()


def listening_unix_sockets() -> set[int]:
    """Their inodes."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {int(row[6]) for row in rows if int(row[3], 16) & 0x10000}


def sockets_of(process: psutil.Process) -> set[int]:
    links = [path.readlink().name for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


def test_one_socket_listens_and_no_other(two_models: psutil.Process) -> None:
    """Of all its processes together: what passes between them goes through pairs that nobody else can reach."""
    family = [two_models, *two_models.children(recursive=True)]
    assert len(family) >= 3, "server, worker, guardian"
    listening = [c.laddr for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    assert not listening_unix_sockets() & set().union(*map(sockets_of, family))
    udp = [c for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_NONE]
    assert udp == []
