"""The process: its command line, its config file, its port before its model, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from serving import LONG_CONTEXT

from engine.errors import InvalidConfig
from server.cli import make_parser, parse_args
from server.config import ServerConfig, is_loopback, server_config

ROOT = Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine.server", *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from server.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'aiohttp', 'numpy', 'transformers', 'tokenizers', 'prometheus_client', 'yaml', 'msgspec'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines()[-1] == "HEAVY []"
    flags = "model served-model-name host port dtype max-model-len max-num-seqs max-num-batched-tokens api-key config device"
    for flag in [*flags.split(), "kv-cache-memory", "shutdown-timeout", "insecure-no-auth", "log-format"]:
        assert f"--{flag}" in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prot", "1"], "did you mean 'port'"),
        (["--max-model-length", "5"], "did you mean 'max_model_len'"),
        (["--port", "99999"], "--port must be between"),
        (["--port", "x"], "invalid int value"),
        (["--host", "0.0.0.0"], "--insecure-no-auth"),
        (["--host", "::"], "--insecure-no-auth"),
        (["--api-key", ""], "--api-key must be"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--shutdown-timeout", "-1"], "must not be negative"),
    ],
)
def test_wrong_usage_is_told(args: list[str], message: str) -> None:
    done = run(*args)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there() -> None:
    done = run("/no/such/folder", "--port", "0")

    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--port", str(taken.getsockname()[1]))

    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1" in done.stderr


def parsed(tmp_path: Path, text: str, *args: str) -> dict[str, Any]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return vars(parse_args(make_parser(), ["--config", str(file), *args]))


def test_config_file(tmp_path: Path) -> None:
    text = """
model: /models/a
port: 9000
max-num-seqs: 7
enable_prefix_caching: false
served-model-name: [a, b]
api-key: [one, two]
sse_keep_alive_interval: 5
"""
    args = parsed(tmp_path, text, "--port", "9001")

    assert args["port"] == 9001, "the command line wins"
    assert (args["model"], args["max_num_seqs"], args["enable_prefix_caching"]) == ("/models/a", 7, False)
    assert args["served_model_name"] == ["a", "b"]
    assert server_config(args).api_key == ("one", "two")
    assert server_config(args).sse_keep_alive_interval == 5.0
    assert parsed(tmp_path, "model: a", "b")["model"] == "b"
    assert parsed(tmp_path, "api-key: a", "--api-key", "b")["api_key"] == ["b"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("prot: 1", "did you mean 'port'"),
        ("- a", "name: value"),
        ("a: [", "config.yaml"),
        ("port: {a: 1}", "port"),
        ("port: [1, 2]", "takes one value"),
        ("public_models: 1", "true or false"),
        ("port: true", "port"),
        ("help: 1", "unknown option"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        parsed(tmp_path, text)


def test_who_can_reach_what() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example", "")))
    ServerConfig(host="0.0.0.0", insecure_no_auth=True).check_exposure()
    ServerConfig(host="0.0.0.0", api_key=("k",)).check_exposure()


def test_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\none\n\n two \n")

    assert server_config({"api_key_file": str(file), "api_key": ["zero"]}).api_key == ("zero", "one", "two")


class Process:
    """A server process on a tiny model, its log in a file."""

    def __init__(self, folder: Path, *args: str, context: int = 512) -> None:
        self.log = folder / "log"
        checkpoint = tiny_checkpoint(folder, max_position_embeddings=context)
        command = [sys.executable, "-m", "engine.server", str(checkpoint), "--port", "0", "--threads", "1", *args]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)

    async def url(self) -> str:
        """The address, once the socket is bound."""
        while not (found := re.search(r"listening on (http://\S+:\d+)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(0.01)
        return found[1]

    async def ready(self) -> str:
        url = await self.url()
        while await asyncio.to_thread(get, url + "/ready") != 200:
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(0.05)
        return url

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait, 60)


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.process.kill()
        process.process.wait()


LONG = {"prompt": "abc", "max_tokens": 450, "ignore_eos": True, "n": 8, "stream": True}
ENDLESS = LONG | {"max_tokens": 32_000, "n": 2}


async def test_from_first_answer_to_sigterm(tmp_path: Path, started: list[Process]) -> None:
    """The port answers before the model is there; SIGTERM refuses new work, finishes what runs and exits with 0."""
    server = Process(tmp_path, "--api-key", "sesame", "--public-models")
    started.append(server)
    url = await server.url()
    assert await asyncio.to_thread(get, url + "/health") in (200, 503)
    await server.ready()
    assert await asyncio.to_thread(get, url + "/v1/models") == 200
    log = server.log.read_text()
    assert "non-default arguments: {'model': " in log
    assert "sesame" not in log
    server.process.send_signal(signal.SIGTERM)

    assert await server.wait() == 0


async def test_sigterm_drains(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path)
    started.append(server)
    url = await server.ready()
    running = asyncio.create_task(asyncio.to_thread(post, url, LONG))
    while "sluice_http_in_flight 1.0" not in await asyncio.to_thread(metrics, url):
        await asyncio.sleep(0.01)

    server.process.send_signal(signal.SIGTERM)
    while "SIGTERM" not in server.log.read_text():
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(get, url + "/ready") == 503
    assert "shutting_down" in await asyncio.to_thread(post, url, LONG)

    text = await running
    assert text.count('"finish_reason":"length"') == 8
    assert text.endswith("data: [DONE]\n\n")
    assert await server.wait() == 0


async def test_a_drain_is_bounded(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path, "--shutdown-timeout", "0", context=LONG_CONTEXT)
    started.append(server)
    url = await server.ready()
    running = asyncio.create_task(asyncio.to_thread(post, url, ENDLESS))
    while "sluice_http_in_flight 1.0" not in await asyncio.to_thread(metrics, url):
        await asyncio.sleep(0.01)

    server.process.send_signal(signal.SIGINT)

    text = await running
    assert '"code":"request_failed"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert await server.wait() == 0


async def test_a_second_signal_is_immediate(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path, context=LONG_CONTEXT)
    started.append(server)
    url = await server.ready()
    running = asyncio.create_task(asyncio.to_thread(post, url, ENDLESS))
    while "sluice_http_in_flight 1.0" not in await asyncio.to_thread(metrics, url):
        await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    while "draining 1 requests" not in server.log.read_text():
        await asyncio.sleep(0.01)

    server.process.send_signal(signal.SIGTERM)

    assert await server.wait() == 128 + signal.SIGTERM
    with pytest.raises(Exception, match=r"IncompleteRead|Connection|closed|reset"):
        await running


async def test_sigterm_while_loading(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path)
    started.append(server)
    await server.url()

    server.process.send_signal(signal.SIGTERM)

    assert await server.wait() == 0


def metrics(url: str) -> str:
    with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
        return str(response.read().decode())


def test_the_entry_is_guarded() -> None:
    """A spawned child imports the main module again: that must not load the server."""
    code = "import sys; import engine.server; print(sorted(m for m in sys.modules if m.split('.')[0] in ('server', 'aiohttp')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    assert done.stdout.strip() == "[]"
