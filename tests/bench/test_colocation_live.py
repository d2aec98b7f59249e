"""The colocation benchmark against real servers with tiny models: its client, and a whole run of the command."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from serving import make_engine, serving

from bench.colocate.client import Pressure, replay, session
from bench.colocate.workload import Backlog, Planned
from bench.colocation import main


async def test_every_request_is_answered_with_the_tokens_it_asked_for(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        async with serving(engine) as server, session() as client:
            pressure = Pressure(client, server.url, "tiny", Backlog(256, 20, 8, seed=1), 3)
            pressure.start()
            plan = [Planned(0.01 * n, tuple(range(n + 1, n + 20)), 12) for n in range(5)]
            answers = await replay(client, server.url, "tiny", plan, time.perf_counter())
            while not pressure.log.done:
                await asyncio.sleep(0.01)
            await pressure.stop()
    assert [answer.error for answer in answers] == [None] * 5
    for answer, planned in zip(answers, plan, strict=True):
        assert answer.usage is not None
        assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (19, 12)
        assert answer.sent >= planned.arrival_s
        assert answer.sent < answer.times[0] <= answer.times[-1] <= answer.end
    assert pressure.log.errors == 0


async def test_refusals_are_errors_with_their_reason(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        async with serving(engine) as server, session() as client:
            (answer,) = await replay(client, server.url, "nobody", [Planned(0.0, (1, 2), 3)], time.perf_counter())
    assert answer.error is not None
    assert "404" in answer.error
    assert "nobody" in answer.error


@pytest.mark.slow
def test_a_whole_run_leaves_tables_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    online, offline = tiny_checkpoint(tmp_path, max_position_embeddings=1024), tiny_checkpoint(tmp_path, "qwen3", seed=1)
    out = tmp_path / "out"
    options = {
        "--online-model": online,
        "--offline-model": offline,
        "--kv-memory": "64MiB",
        "--minutes": 0.03,
        "--rounds": 1,
        "--warm": 0.5,
        "--patience": 0,
        "--scale-rate": 3,
        "--prompt-tokens": 20,
        "--output-tokens": 4,
        "--offline-prompt-tokens": 20,
        "--offline-output-tokens": 8,
        "--out": out,
    }
    flags = [str(word) for option in options.items() for word in option]
    tables = ["--tables", "interference", "harvest", "bounds", "--arms", "online alone", "offline alone", "Sluice"]

    assert main([*flags, *tables]) == 0

    said = capsys.readouterr().out
    assert said == (out / "colocation.md").read_text(encoding="utf-8")
    assert "wanted at most 1: met" in said
    record = json.loads((out / "colocation.json").read_text(encoding="utf-8"))
    assert {run["arm"] for run in record["runs"]} == {"online alone", "Sluice", "offline alone"}
    assert all(answer["error"] is None for run in record["runs"] for answer in run["answers"])
    assert (out / "colocation.png").read_bytes().startswith(b"\x89PNG")
