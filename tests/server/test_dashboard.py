"""The dashboard: its page and policy, the state it polls, the trace, and all of it in a real browser where there is one."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browsing, find_browser
from helpers import tiny_checkpoint
from openai import AsyncOpenAI
from serving import LONG_CONTEXT, MESSAGES, Server, make_engine, serving

from engine import Engine, SamplingParams
from engine.types import Tenant
from server.status import sample_memory, watch_jobs

CHAT = {"messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}
PAGE = Path(__file__).parents[2] / "server" / "static" / "dashboard.html"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), "qwen3", seed=3, max_position_embeddings=LONG_CONTEXT)
    options: dict[str, Any] = {"offline_model": str(other), "offline_served_model_name": "night", "kv_cache_memory": 48 << 20}
    with make_engine(tmp_path_factory.mktemp("model"), context=LONG_CONTEXT, **options) as engine:
        yield engine


async def traffic(server: Server) -> None:
    """Offline work of which some is done, and online requests that stopped it."""
    engine = server.service.engine
    before = engine.timeline.offline_steps.count + engine.timeline.steps.count
    for prompt in ("one", "two", "three"):
        engine.submit(prompt, SamplingParams(max_tokens=LONG_CONTEXT - 50, ignore_eos=True), tenant="offline")
    while engine.timeline.offline_steps.count + engine.timeline.steps.count < before + 5:
        await asyncio.sleep(0.005)
    for _ in range(3):
        status, body = await server.post("/v1/chat/completions", CHAT)
        assert status == 200, body


def test_the_page_brings_all_it_needs() -> None:
    text = PAGE.read_text(encoding="utf-8").replace("xmlns='http://www.w3.org/2000/svg'", "")
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)|url\(([^)]+)\)|@import|https?://[^\s\"'%]+", text)
    assert [item for item in loaded if not item[0].startswith("data:")] == []
    assert not re.search(r"\sstyle=|\son\w+=", text), "the policy forbids inline styles and handlers"
    assert "innerHTML" not in text, "what is shown is text, never markup"


async def test_the_page_is_public_and_its_policy_strict(engine: Engine) -> None:
    async with serving(engine, api_key=("k",)) as server, server.client.get(server.url + "/dashboard") as response:
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


async def test_what_it_shows_needs_a_key(engine: Engine) -> None:
    async with serving(engine, api_key=("k",), admin_api_key=("a",)) as server:
        for path in ("/debug/state", "/debug/timeline"):
            assert (await server.get(path))[0] == 401
            assert (await server.get(path, headers={"Authorization": "Bearer k"}))[0] == 403, "not for every client"
            assert (await server.get(path, headers={"Authorization": "Bearer a"}))[0] == 200


async def test_the_state_of_one_model(engine: Engine) -> None:
    async with serving(engine, ttft_slo_ms=60_000) as server:
        await server.post("/v1/chat/completions", CHAT)
        _, first = await server.get("/debug/state")
        await server.post("/v1/chat/completions", CHAT)
        _, second = await server.get("/debug/state?after=" + first["cursor"])

    assert first["status"] == "ready"
    assert first["latency"]["online"]["ttft"]["count"] == 1
    assert first["latency"]["online"]["tpot"]["p99"] > 0, "also of requests that are not streamed"
    assert first["slo"] == {"ttft": 60.0, "tpot": None}
    steps = [tuple(step) for step in second["steps"]]
    assert steps and not set(steps) & {tuple(step) for step in first["steps"]}, "only what is new"
    assert sum(step[3] for step in steps) == CHAT["max_tokens"] - 1, "online decode tokens: all but the first"
    assert sum(step[2] for step in steps) > 0
    assert all(slab[0] is None for slab in second["kv"]["slabs"])
    assert second["device"]["seconds"]["online"] > 0
    assert second["tenants"]["online"]["generated_tokens"] - first["tenants"]["online"]["generated_tokens"] == 12


@pytest.mark.parametrize("cursor", ["", "x", "1.2.3", "9.9.9.99999999999999999999", "-1.0.0.0", "٣.1.1.1"])
async def test_a_cursor_of_another_server_means_from_the_beginning(engine: Engine, cursor: str) -> None:
    async with serving(engine) as server:
        await server.post("/v1/chat/completions", CHAT)
        status, body = await server.get("/debug/state", params={"after": cursor})
    assert status == 200
    assert body["steps"]


async def test_the_state_of_two_models(pair: Engine) -> None:
    async with serving(pair) as server:
        await traffic(server)
        while not (await server.get("/debug/state"))[1]["offline_steps"]:
            await asyncio.sleep(0.01)
        _, state = await server.get("/debug/state")
        pair.abort("")
    assert state["device"]["sharing"] == "two models"
    assert {slab[0] for slab in state["kv"]["slabs"]} == {"online", "offline"}
    assert any(slab[2] for slab in state["kv"]["slabs"]), "pages of the offline model"
    assert all(span[2] == span[3] == 0 for span in state["offline_steps"])
    preemptions = [event for event in state["events"] if event["kind"] == "preemption"]
    assert preemptions and preemptions[-1]["cost"]["latency_us"] > 0
    assert state["switches"]


async def test_offline_steps_are_told_without_the_time_they_stood_still(pair: Engine) -> None:
    async with serving(pair) as server:
        await traffic(server)
        await traffic(server)
    timeline = pair.timeline
    holds = timeline.holds(timeline.clock.now())
    assert holds
    for span in timeline.offline_steps.since()[0]:
        assert not any(start < span.end - 1e-9 and end > span.start + 1e-9 for start, end in holds)


# -- the trace


def check_trace(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What Perfetto needs of the format. Returns the complete events by name of their track."""
    tracks: dict[tuple[int, int], str] = {}
    spans = defaultdict(list)
    open_stages: dict[tuple[int, str], list[tuple[str, int]]] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M", "C", "i", "b", "e"), event
        assert isinstance(event["ts"], int) and event["ts"] >= 0
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M" and event["name"] == "thread_name":
            tracks[event["pid"], event["tid"]] = event["args"]["name"]
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            spans[tracks[event["pid"], event["tid"]]].append(event)
        if event["ph"] in "be":
            open_stages.setdefault((event["id"], event["name"]), []).append((event["ph"], event["ts"]))
        if event["ph"] == "C":
            assert all(0 <= value <= 1 for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    for (_, begin), (last, end) in open_stages.values():
        assert (_, last) == ("b", "e") and begin <= end
    for track, events in spans.items():
        starts = [event["ts"] for event in events]
        assert starts == sorted(starts), track
        if track != "gate":  # there the closing lies inside the time closed
            assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(events)), track
    return spans


async def test_the_trace_of_two_models(pair: Engine) -> None:
    sampling = asyncio.create_task(sample_memory(pair))
    async with serving(pair) as server:
        await traffic(server)
        _, trace = await server.get("/debug/timeline?seconds=600")
    sampling.cancel()
    spans = check_trace(trace)
    assert {"online", "offline model", "gate"} <= spans.keys()
    assert {"online prefill", "online decode"} <= {event["name"] for event in spans["online"]}
    assert {"closing", "closed"} == {event["name"] for event in spans["gate"]}
    assert {"queue", "prefill", "decode"} <= {event["name"] for event in trace["traceEvents"] if event["ph"] == "b"}
    assert any(event["ph"] == "C" for event in trace["traceEvents"])
    assert any(event["ph"] == "i" and event["name"] == "preemption" for event in trace["traceEvents"])


async def test_the_trace_of_one_model_shows_parked_steps(long_engine: Engine) -> None:
    async with serving(long_engine) as server:
        while not any(event.kind == "parked" for event in long_engine.timeline.events()[0]):
            await traffic(server)
            for generation in list(long_engine._live.values()):
                generation.abort()
        _, trace = await server.get("/debug/timeline?seconds=600")
    spans = check_trace(trace)
    assert any(event["name"].endswith("(parked)") for event in spans["offline"])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9", "x", ""])
async def test_seconds_out_of_range(engine: Engine, seconds: str) -> None:
    async with serving(engine) as server:
        status, body = await server.get("/debug/timeline", params={"seconds": seconds})
    assert (status, body["error"]["param"]) == (400, "seconds")


# -- in a browser

ENTER = "document.getElementById('key').value = '{}', document.querySelector('#gate form').requestSubmit()"
browser = pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed")


@browser
async def test_the_page_in_a_browser(pair: Engine, tmp_path: Path) -> None:
    async with serving(pair, ttft_slo_ms=250) as server, browsing(tmp_path) as page:
        await page.open(server.url + "/dashboard")
        await traffic(server)
        await page.until("document.getElementById('status').textContent === 'ready'")
        await traffic(server)
        await page.until("/ms|s$/.test(document.getElementById('ttft').textContent)")
        await page.until("events.some(e => e.kind === 'preemption') && document.querySelector('#events .event') !== null")
        shares = await page.value("[...document.querySelectorAll('#legend b')].map(b => b.textContent)")
        words = await page.value("document.body.innerText")
        painted = await page.until(
            "(() => { const c = document.getElementById('strip'); draw();"
            " return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 8; })()"
        )
        for width, dark in ((1280, True), (390, False)):
            await page.resize(width, 900, dark=dark)
            assert await page.until("new Promise(done => requestAnimationFrame(() => done(true)))")
            assert await page.value("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        state = await page.value("last")
        pair.pause("offline")
        await page.until("document.getElementById('status').textContent === 'ready, offline paused'")
        pair.resume()
        await page.until("document.getElementById('status').textContent === 'ready'")
        assert page.problems == []
    assert len(shares) == 6 and sum(float(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=3)
    assert painted
    assert "offline model stopped" in words and "org/tiny" in words
    assert state["tenants"]["online"]["finished"] == pair.stats().tenants[Tenant.ONLINE].counters.finished


@browser
async def test_jobs_in_the_page_and_in_the_timeline(engine: Engine, tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hello", "max_tokens": 4}}
    async with (
        serving(engine, data_dir=str(tmp_path)) as server,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="k") as client,
    ):
        assert server.service.batches is not None
        watching = asyncio.create_task(watch_jobs(server.service.batches, engine))
        file = await client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        async with browsing(tmp_path) as page:
            await page.open(server.url + "/dashboard")
            shown = await page.until("(t => t.includes('completed') && t)(document.getElementById('jobs').textContent)")
            assert batch.id in shown and "1 of 1" in shown
            await page.until("marks.some(e => e.kind === 'job' && e.cause.endsWith('completed'))")
            assert page.problems == []
        watching.cancel()


@browser
async def test_the_page_asks_for_a_key_and_keeps_it_in_its_tab(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, api_key=("k",), admin_api_key=("geheim",)) as server, browsing(tmp_path) as page:
        await page.open(server.url + "/dashboard")
        await page.until("!document.getElementById('gate').hidden")
        await page.value(ENTER.format("falsch"))
        await page.until("!document.getElementById('gate').hidden && key === 'falsch' && document.activeElement.id === 'key'")
        assert await page.value("last") is None
        await page.value(ENTER.format("geheim"))
        await page.until("document.getElementById('status').textContent === 'ready'")
        kept = json.loads(await page.value("JSON.stringify([{...localStorage}, document.cookie, {...sessionStorage}])"))
    assert kept == [{}, "", {"sluice-key": "geheim"}]
    assert all("401" in problem or "403" in problem for problem in page.problems), page.problems


@browser
async def test_names_are_text_in_the_page(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    with make_engine(tmp_path, served_model_name=(hostile,)) as engine:
        async with serving(engine) as server, browsing(tmp_path) as page:
            await page.open(server.url + "/dashboard")
            await page.until("document.getElementById('status').textContent === 'ready'")
            assert await page.value("document.querySelectorAll('main img').length") == 0
            assert hostile in await page.value("document.getElementById('models').textContent")
            assert page.problems == []
