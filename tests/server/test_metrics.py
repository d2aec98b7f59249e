"""What /metrics tells, by Prometheus' own parser: names that others look for, stages that add up, targets, refusals."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ENDLESS, LONG_CONTEXT, MESSAGES, Server, make_engine, serving

from engine import Engine, SamplingParams, Tenant
from server.auth import ANYBODY
from server.recent import Recent, cause_of

CHAT = "/v1/chat/completions"
SHORT = {"messages": MESSAGES, "max_tokens": 6, "ignore_eos": True}

# Names of vLLM 0.33 that dashboards, autoscalers, routers and benchmarks look for (gauges, counters, histograms).
VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "cache_config_info": "gauge",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "prompt_tokens_by_source": "counter",
    "corrupted_requests": "counter",
    "generation_tokens": "counter",
    "num_preemptions": "counter",
    "request_success": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_prefill_kv_computed_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "request_num_preemptions": "histogram",
    "iteration_tokens_total": "histogram",
}


async def scrape(server: Server) -> tuple[dict[str, str], dict[str, dict[tuple[str, ...], float]]]:
    """Types by family, and values by sample name and labels (in the order of their names)."""
    async with server.client.get(server.url + "/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    values: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in families:
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in values[sample.name], f"{sample.name} {labels} twice"
            values[sample.name][labels] = sample.value
    return {family.name: family.type for family in families}, values


async def test_names_that_others_look_for(engine: Engine) -> None:
    async with serving(engine) as server:
        await server.post(CHAT, SHORT)
        await server.events(CHAT, SHORT)
        types, values = await scrape(server)
    assert {name: types.get(f"vllm:{name}") for name in VLLM} == VLLM
    assert not any("offline" in labels for name in values if name.startswith("vllm:") for labels in values[name])
    for name, kind in VLLM.items():
        if kind == "histogram":
            buckets = values[f"vllm:{name}_bucket"].values()
            assert buckets, name
            assert max(buckets) == sum(values[f"vllm:{name}_count"].values()), name


async def test_every_request_has_a_first_token_and_stages_that_add_up(engine: Engine) -> None:
    async with serving(engine) as server:
        await server.post(CHAT, SHORT)
        await server.events(CHAT, SHORT)
        _, values = await scrape(server)
    mine = ("org/tiny", "online")
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert values[f"sluice_{name}_seconds_count"][mine] == 2, name
    assert values["sluice_request_time_per_output_token_seconds_count"][mine] == 2
    apart = values["sluice_inter_token_latency_seconds_count"].get(mine, 0)
    assert apart <= 5, "of the stream alone, whose first tokens may have come together"
    seconds = {stage: values[f"sluice_request_{stage}_time_seconds_sum"][mine] for stage in ("prefill", "decode", "inference")}
    assert seconds["inference"] == pytest.approx(seconds["prefill"] + seconds["decode"])
    assert seconds["inference"] <= values["sluice_e2e_request_latency_seconds_sum"][mine]


async def test_device_time_sums_to_the_time_that_passed(engine: Engine) -> None:
    async with serving(engine) as server:
        began = engine.timeline.clock.now()
        _, before = await scrape(server)
        earliest = engine.timeline.clock.now()
        await engine.submit("x", SamplingParams(max_tokens=30, ignore_eos=True), tenant="offline").completion()
        await server.post(CHAT, SHORT)
        latest = engine.timeline.clock.now()
        _, after = await scrape(server)
        ended = engine.timeline.clock.now()
    name = "sluice_device_time_seconds_total"
    passed = {owner: value - before[name][owner] for owner, value in after[name].items()}
    assert passed.keys() == {("online",), ("offline",), ("switch",), ("idle",)}
    assert passed["offline",] > 0 and passed["online",] > 0
    assert latest - earliest <= sum(passed.values()) + 1e-6 <= ended - began + 2e-6
    parts = after["sluice_computing_seconds_total"]
    assert parts.keys() == {(phase, tenant) for tenant in ("online", "offline") for phase in ("prefill", "decode")}
    for tenant in ("online", "offline"):
        own = sum(seconds for (_, who), seconds in parts.items() if who == tenant)
        assert own == pytest.approx(after[name][tenant,])


async def test_targets_and_those_who_missed_them(engine: Engine) -> None:
    async with serving(engine, ttft_slo_ms=0.001) as server:
        await server.post(CHAT, SHORT)
        await server.post(CHAT, SHORT | {"service_tier": "flex"})
        _, values = await scrape(server)
    assert values["sluice_slo_target_seconds"] == {("ttft",): 1e-6}
    missed = values["sluice_slo_violations_total"]
    assert missed.keys() == {(cause, "ttft") for cause in ("colocation", "load", "other")}
    assert sum(missed.values()) == 1.0, "offline work has no target"


def test_a_missed_target_has_one_cause() -> None:
    """What alone would have had to be away for it to be met."""
    assert cause_of(0.2, delayed=0.2, queued=9.0) == "colocation"
    assert cause_of(0.2, delayed=0.1, queued=0.2) == "load"
    assert cause_of(0.2, delayed=0.1, queued=0.1) == "other"
    recent = Recent()
    recent.targets = {"ttft": 0.5, "tpot": 0.1}
    recent.add(Tenant.ONLINE, "ttft", 0.5, delayed=0.4)
    recent.add(Tenant.ONLINE, "ttft", 0.75, delayed=0.5)
    recent.add(Tenant.ONLINE, "ttft", 0.75, queued=0.5)
    recent.add(Tenant.ONLINE, "tpot", 0.25)
    recent.add(Tenant.OFFLINE, "tpot", 0.25)
    counted = {kind_and_cause for kind_and_cause, count in recent.missed.items() if count}
    assert counted == {("ttft", "colocation"), ("ttft", "load"), ("tpot", "other")}
    assert sum(recent.missed.values()) == 3


async def test_who_waits_for_what_and_who_uses_the_memory(tmp_path: Path) -> None:
    with make_engine(tmp_path, context=LONG_CONTEXT, max_num_seqs=1) as engine:
        async with serving(engine) as server:
            flex = ENDLESS | {"service_tier": "flex"}
            tasks: list[asyncio.Task[tuple[int, Any]]] = []
            reached = {("org/tiny", "capacity", "online"): 1.0}
            for bodies in ([ENDLESS] * 2, [flex] * 3):
                tasks += [asyncio.create_task(server.post(CHAT, body)) for body in bodies]
                async with asyncio.timeout(60):
                    while True:
                        _, values = await scrape(server)
                        waiting = values["sluice_num_requests_waiting_by_reason"]
                        if {labels: count for labels, count in waiting.items() if count} == reached:
                            break
                        await asyncio.sleep(0.02)
                reached["org/tiny", "deferred", "offline"] = 3.0
            assert values["vllm:num_requests_waiting_by_reason"]["0", "org/tiny", "capacity"] == 1.0
            memory = values["sluice_kv_bytes"]
            assert memory.keys() == {("online",), ("offline",), ("cached",), ("free",)}
            assert sum(memory.values()) == pytest.approx(engine.stats().kv_bytes)
            assert memory["online",] > 0
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.idle()


async def test_what_was_refused_and_why(engine: Engine) -> None:
    async with serving(engine, max_inflight_flex=1) as server:
        with server.service.in_flight.hold(ANYBODY, Tenant.OFFLINE):
            assert (await server.post(CHAT, SHORT | {"service_tier": "flex"}))[0] == 429
        _, values = await scrape(server)
    assert values["sluice_admission_rejections_total"] == {("resource_unavailable",): 1.0}


async def test_where_prompt_tokens_come_from(engine: Engine) -> None:
    """The second request finds the first one's pages: sums over the sources are all prompt tokens."""
    name, mine = "sluice_prompt_tokens_by_source_total", ("org/tiny", "online")
    body = {"prompt": [7] * 50, "max_tokens": 1, "cache_salt": "of this test alone"}
    async with serving(engine) as server:
        _, before = await scrape(server)
        for _ in range(2):
            assert (await server.post("/v1/completions", body))[0] == 200
        _, after = await scrape(server)
    computed, cached = (
        after[name]["org/tiny", source, "online"] - before[name]["org/tiny", source, "online"]
        for source in ("local_compute", "local_cache_hit")
    )
    assert (computed, cached) == (100 - 48, 48), "three pages of 16"
    assert sum(after[name].values()) == sum(after["sluice_prompt_tokens_total"].values())
    assert after["sluice_request_prefill_kv_computed_tokens_sum"][mine] == computed
    assert after["vllm:prompt_tokens_by_source_total"]["0", "org/tiny", "local_cache_hit"] >= 48


async def test_requests_whose_logits_are_no_numbers_are_counted(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        runner: Any = engine._core.runner
        runner._model._embedding[100] = float("nan")
        async with serving(engine) as server:
            assert (await server.post("/v1/completions", {"prompt": [3, 100, 5], "max_tokens": 2}))[0] == 500
            _, values = await scrape(server)
    assert values["sluice_corrupted_requests_total"] == {("org/tiny", "online"): 1.0, ("org/tiny", "offline"): 0.0}


async def test_what_offline_work_cost_with_one_model(long_engine: Engine) -> None:
    """An arrival in the midst of an offline pass waits for its layer: its answer says so, and the pass stands still."""
    async with serving(long_engine) as server:
        flex = asyncio.create_task(server.post(CHAT, ENDLESS | {"service_tier": "flex"}))
        told: list[int] = []
        while not told or not told[-1]:
            async with server.client.post(server.url + CHAT, json=SHORT | {"return_colocation": True}) as response:
                cost = (await response.json())["usage"]["colocation"]
                told.append(cost["waited_us"])
                waited = f"waited_us={cost['waited_us']};preemptions=0;slabs_reclaimed=0"
                assert response.headers["x-sluice-colocation"] == waited
        _, values = await scrape(server)
        assert values["sluice_online_interference_seconds_total"][()] == pytest.approx(sum(told) / 1e6, abs=1e-6 * len(told))
        while not (await scrape(server))[1]["sluice_preempted_duration_seconds_count"][()]:
            await server.post(CHAT, SHORT)
        flex.cancel()
        await asyncio.gather(flex, return_exceptions=True)
        await server.idle()
