"""Where the server listens: unix sockets, TLS, client certificates, and what SIGHUP reads again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from helpers import tiny_checkpoint

from engine.errors import InvalidConfig
from server.config import ServerConfig, server_config
from server.listen import bind, tls, unbind

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


class Listening:
    """A server process on a tiny model."""

    def __init__(self, started: list[subprocess.Popen[bytes]], folder: Path, *args: str) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-m", "engine.server", str(tiny_checkpoint(folder)), "--threads", "1", *args]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
        started.append(self.process)

    async def says(self, what: str, times: int = 1) -> str:
        while (text := self.log.read_text()).count(what) < times:
            assert self.process.poll() is None, text
            await asyncio.sleep(0.02)
        return text

    async def port(self) -> int:
        text = await self.says("listening on https://127.0.0.1:")
        return int(text.partition("listening on https://127.0.0.1:")[2].partition(",")[0])


async def test_a_unix_socket(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    path = tmp_path / "s"
    server = Listening(started, tmp_path, "--uds", str(path), "--uds-mode", "660")
    await server.says(f"listening on unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client:
        async with client.get("http://localhost/version") as response:
            assert response.status == 200
        async with client.post("http://localhost/admin/drain") as response:
            assert response.status == 202
    assert await asyncio.to_thread(server.process.wait, 60) == 0
    assert not path.exists()


def test_the_name_of_a_dead_server_is_taken_over_and_nothing_else(tmp_path: Path) -> None:
    config = ServerConfig(uds=str(tmp_path / "s"))
    dead = bind(config)
    dead.close()  # as after kill -9: the name is still there
    living = bind(config)
    living.listen()
    with pytest.raises(OSError, match="in use"):
        bind(config)
    unbind(living, config)
    (tmp_path / "s").write_text("mine")
    with pytest.raises(OSError, match="in use"):
        bind(config)
    assert (tmp_path / "s").read_text() == "mine"


def test_modes_of_a_unix_socket() -> None:
    from server.cli import make_parser

    parser = make_parser()
    assert server_config(vars(parser.parse_args(["--uds", "s", "--uds-mode", "0770"]))).uds_mode == 0o770
    for wrong in ("432", "1777", "abc", "-1"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--uds-mode={wrong}"])


def test_who_can_reach_a_server_with_certificates(tmp_path: Path) -> None:
    ServerConfig(uds="s", host="0.0.0.0").check_exposure()
    ServerConfig(host="0.0.0.0", ssl_certfile="c", ssl_ca_certs="a").check_exposure()
    with pytest.raises(InvalidConfig, match="--insecure-no-auth"):
        ServerConfig(host="0.0.0.0", ssl_certfile="c").check_exposure()
    with pytest.raises(InvalidConfig, match="--ssl-certfile"):
        ServerConfig(ssl_keyfile="k")


def write_certificate(folder: Path, authority: trustme.CA) -> bytes:
    """New `cert` and `key` for 127.0.0.1; returns the certificate as the other side will see it."""
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert")
    issued.private_key_pem.write_to_path(folder / "key")
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


def seen_certificate(port: int, context: ssl.SSLContext) -> bytes | None:
    raw = socket.create_connection(("127.0.0.1", port))
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as secure:
        return secure.getpeercert(binary_form=True)


async def test_tls_client_certificates_and_sighup(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    first = write_certificate(tmp_path, authority)
    files = [f"--{flag}={tmp_path / name}" for flag, name in (("ssl-certfile", "cert"), ("ssl-keyfile", "key"))]
    (tmp_path / "clients").write_text("- {name: a, key: one}")
    clients = f"--api-keys-file={tmp_path / 'clients'}"
    server = Listening(started, tmp_path, "--port", "0", *files, f"--ssl-ca-certs={tmp_path / 'ca'}", clients)
    port = await server.port()
    url = f"https://127.0.0.1:{port}"

    stranger, friend = ssl.create_default_context(), ssl.create_default_context()
    for context in (stranger, friend):
        authority.configure_trust(context)
    authority.issue_cert("a@client.example").configure_cert(friend)

    async def get(path: str, key: str, context: ssl.SSLContext = friend) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as client, client.get(url + path, ssl=context) as response:
            return response.status

    assert await get("/version", "") == 200
    assert await asyncio.to_thread(seen_certificate, port, friend) == first
    with pytest.raises((aiohttp.ClientError, OSError)):
        await get("/version", "", stranger)

    await server.says("ready after")
    assert [await get("/v1/models", key) for key in ("one", "two")] == [200, 401]
    second = write_certificate(tmp_path, authority)
    (tmp_path / "clients").write_text("- {name: a, key: two}")
    server.process.send_signal(signal.SIGHUP)
    await server.says("certificates and clients read again")
    assert await asyncio.to_thread(seen_certificate, port, friend) == second != first
    assert [await get("/v1/models", key) for key in ("one", "two")] == [401, 200]

    (tmp_path / "key").write_text("nonsense")
    server.process.send_signal(signal.SIGHUP)
    await server.says("kept what was there")
    assert await asyncio.to_thread(seen_certificate, port, friend) == second
    assert await get("/v1/models", "two") == 200


@pytest.mark.parametrize("broken", ["missing", "nonsense", "foreign key", "encrypted key"])
def test_certificates_that_cannot_be_used(tmp_path: Path, broken: str) -> None:
    authority = trustme.CA()
    write_certificate(tmp_path, authority)
    if broken == "missing":
        os.unlink(tmp_path / "cert")
    elif broken == "nonsense":
        (tmp_path / "cert").write_text("x")
    elif broken == "foreign key":
        authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "key")
    else:
        (tmp_path / "key").write_bytes(encrypted((tmp_path / "key").read_bytes()))
    config: dict[str, Any] = {"ssl_certfile": str(tmp_path / "cert"), "ssl_keyfile": str(tmp_path / "key")}
    with pytest.raises(InvalidConfig, match="--ssl-certfile"):
        tls(ServerConfig(**config))


def test_old_versions_of_tls_are_refused(tmp_path: Path) -> None:
    write_certificate(tmp_path, trustme.CA())
    context = tls(ServerConfig(ssl_certfile=str(tmp_path / "cert"), ssl_keyfile=str(tmp_path / "key")))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def encrypted(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(pem, None)
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
