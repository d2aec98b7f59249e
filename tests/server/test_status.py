"""The line that the server logs while it works."""

from __future__ import annotations

import asyncio

import pytest
from serving import MESSAGES

from engine import Engine, SamplingParams
from server.status import report_status, status_line


async def test_a_line_only_where_there_was_work(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="server.status")
    reporter = asyncio.create_task(report_status(engine, interval=0.02))
    await asyncio.sleep(0.1)
    assert caplog.text == "", "idle is silent"

    await engine.submit_chat(MESSAGES, SamplingParams(max_tokens=60, ignore_eos=True), tenant="offline").completion()

    while not caplog.records:
        await asyncio.sleep(0.01)
    reporter.cancel()
    lines = [record.getMessage() for record in caplog.records]
    assert all("online run 0 wait 0" in line and "| offline run" in line and "| KV online" in line for line in lines)
    assert not any("hi" in line.replace("hits", "") for line in lines), "prompts are never logged"


def test_rates_are_per_second(engine: Engine) -> None:
    before = engine.stats()
    engine.generate([[97, 98, 99]], SamplingParams(max_tokens=11, ignore_eos=True), tenant="online", progress=False)

    line = status_line(before, engine.stats(), seconds=10.0)

    assert line.startswith("online run 0 wait 0 in 1 out 1 tok/s")
