"""Kill -9 of every process of a server at chosen moments, and the command that watches a batch from outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from serving import serving

from bench.batches import Plan, run
from engine import Engine

ROOT = Path(__file__).resolve().parents[2]


async def test_each_line_once_whoever_is_killed(tmp_path: Path) -> None:
    """The short form of `python -m bench.batches`: server, worker and guardian, at moments chosen by a seed."""
    model = str(tiny_checkpoint(tmp_path))
    flags = ("--cooldown-ms", "0", "--kv-cache-memory", "32MiB")
    plan = Plan(model, model, lines=100, kills=4, seed=4, online_every=0.5, flags=flags)
    outcome = await run(plan, tmp_path / "run")
    assert outcome.exactly_once, outcome.summary()
    assert outcome.kills, "the last lines may be done before the last kill, but never all before the first"
    assert outcome.online_errors == 0


def write_lines(path: Path, number: int, **body: object) -> None:
    with path.open("w") as file:
        for n in range(number):
            item = {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"hi {n}"} | body}
            file.write(json.dumps(item) + "\n")


class Command:
    """`python -m engine.batch --url` in a process of its own."""

    def __init__(self, url: str, *words: str) -> None:
        command = [sys.executable, "-m", "engine.batch", "--url", url, *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SLUICE_API_KEY": "k"}
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)

    async def end(self) -> tuple[int, str]:
        said = (await asyncio.to_thread(self.process.communicate, timeout=60))[1]
        return self.process.returncode, said

    async def says(self, text: str) -> None:
        assert self.process.stderr is not None
        while text not in (line := await asyncio.to_thread(self.process.stderr.readline)):
            assert line, "it ended without saying so"


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "in.jsonl"


async def test_a_file_becomes_a_batch_of_a_server(engine: Engine, tmp_path: Path, lines: Path) -> None:
    write_lines(lines, 12, max_tokens=4)
    out = tmp_path / "out.jsonl"
    async with serving(engine, data_dir=str(tmp_path / "data"), api_key=("k",)) as server:
        status, said = await Command(server.url, "-i", str(lines), "-o", str(out)).end()
        assert status == 0, said
        assert "completed: 12 lines, 12 ok, 0 failed" in said and "receipt: input tokens" in said
        assert {json.loads(text)["custom_id"] for text in out.read_text().splitlines()} == {f"id-{n}" for n in range(12)}
        status, said = await Command(server.url, "-i", str(lines), "-o", str(out)).end()
        assert status == 2 and "exists; choose another -o" in said


async def test_an_interrupt_leaves_the_batch_running_and_says_how_to_get_back(
    engine: Engine, tmp_path: Path, lines: Path
) -> None:
    write_lines(lines, 300, max_tokens=60, ignore_eos=True)
    out = tmp_path / "out.jsonl"
    async with serving(engine, data_dir=str(tmp_path / "data"), api_key=("k",), max_inflight=1) as server:
        command = Command(server.url, "-i", str(lines), "-o", str(out))
        await command.says("created batch_")
        command.process.send_signal(signal.SIGINT)
        status, said = await command.end()
        assert status == 130, said
        (batch_id,) = re.findall(r"get back to it with: .*--batch-id (batch_\w+)", said)
        headers = {"Authorization": "Bearer k"}
        _, batch = await server.get(f"/v1/batches/{batch_id}", headers=headers)
        assert batch["status"] in ("validating", "in_progress"), batch
        status, _ = await server.post(f"/v1/batches/{batch_id}/cancel", {}, headers=headers)
        assert status == 200
        status, said = await Command(server.url, "--batch-id", batch_id, "-o", str(out)).end()
        assert status == 1 and "cancelled: 300 lines" in said
        assert (tmp_path / "out.errors.jsonl").exists()


async def test_a_full_share_is_waited_for(engine: Engine, tmp_path: Path, lines: Path) -> None:
    """And who gives up meanwhile leaves no file behind."""
    write_lines(lines, 3, max_tokens=4)
    key = {"headers": {"Authorization": "Bearer k"}}
    async with serving(None, data_dir=str(tmp_path / "data"), api_key=("k",), max_batches_per_key=1) as server:
        first = Command(server.url, "-i", str(lines), "-o", str(tmp_path / "first.jsonl"))
        await first.says("created batch_")
        for last in (False, True):
            second = Command(server.url, "-i", str(lines), "-o", str(tmp_path / "second.jsonl"))
            await second.says("waiting: this key has 1 unfinished batches already")
            if not last:
                second.process.send_signal(signal.SIGINT)
                status, said = await second.end()
                assert status == 130 and "before the batch was created" in said
                assert len((await server.get("/v1/files", **key))[1]["data"]) == 1
        server.service.start(engine)
        assert (await first.end())[0] == 0
        status, said = await second.end()
        assert status == 0 and "completed: 3 lines, 3 ok" in said


async def test_bad_lines_and_wrong_keys_are_told(engine: Engine, tmp_path: Path, lines: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    lines.write_text('{"url": "/v1/completions"}\n')
    async with serving(engine, data_dir=str(tmp_path / "data"), api_key=("k",)) as server:
        status, said = await Command(server.url, "-i", str(lines), "-o", out, "--on-bad-line", "error").end()
        assert status == 2 and "line 1: custom_id is missing" in said, said
        status, said = await Command(server.url, "-i", str(lines), "-o", out, "--api-key", "wrong").end()
        assert status == 2 and "answered 401" in said and "Traceback" not in said
    status, said = await Command("http://127.0.0.1:9", "-i", str(lines), "-o", out).end()
    assert status == 2 and "cannot upload" in said and "Traceback" not in said
