"""The lines that the server logs while it works: one per tenant, and one of the device."""

from __future__ import annotations

import asyncio

import pytest
from serving import MESSAGES

from engine import Engine, SamplingParams
from server.status import report_status, sample_memory, status_lines


async def test_lines_only_where_there_was_work(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="server.status")
    reporter = asyncio.create_task(report_status(engine, interval=0.02))
    await asyncio.sleep(0.1)
    assert caplog.text == "", "idle is silent"

    await engine.submit_chat(MESSAGES, SamplingParams(max_tokens=60, ignore_eos=True), tenant="offline").completion()

    while len(caplog.records) < 3:
        await asyncio.sleep(0.01)
    reporter.cancel()
    online, offline, device = [record.getMessage() for record in caplog.records[:3]]
    assert online.startswith("online: run 0 wait 0") and offline.startswith("offline: run")
    assert device.startswith("device: online ") and "| KV free" in device
    assert not any("hi" in line.replace("hits", "") for line in caplog.messages), "prompts are never logged"


async def test_zero_means_never(engine: Engine) -> None:
    await asyncio.wait_for(report_status(engine, 0), 30)


def test_rates_are_per_second_and_shares_sum_to_one(engine: Engine) -> None:
    before = engine.stats()
    engine.generate([[97, 98, 99]], SamplingParams(max_tokens=11, ignore_eos=True), tenant="online", progress=False)

    (line, fields), (_, offline), (_, device) = status_lines(before, engine.stats(), seconds=10.0)

    assert line.startswith("online: run 0 wait 0 in 1 out 1 tok/s")
    assert (fields["tenant"], fields["computed_per_second"], fields["generated_per_second"]) == ("online", 1.3, 1.1)
    assert fields["device_share"] > 0 and offline["device_share"] == 0
    assert sum(device["device"].values()) == pytest.approx(1, abs=1e-3)


async def test_memory_is_sampled(engine: Engine) -> None:
    before = engine.timeline.memory.count
    sampling = asyncio.create_task(sample_memory(engine))
    while engine.timeline.memory.count == before:
        await asyncio.sleep(0.01)
    sampling.cancel()
    last = engine.timeline.memory.since(before)[0][-1]
    assert 0 <= last.online + last.offline + last.cached <= 1
