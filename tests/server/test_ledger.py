"""Two models behind one server: who serves what, and what colocation cost, told on responses and in /metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from serving import MESSAGES, serving

from engine import Engine, SamplingParams

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True, "temperature": 0}
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_models_in_order_and_who_serves_flex(pair: Engine) -> None:
    async with serving(pair) as server:
        _, models = await server.get("/v1/models")
        ids = [model["id"] for model in models["data"]]
        assert (ids[0], ids[-1]) == ("org/tiny", "night")
        for extra, model, tier in (
            ({"service_tier": "flex", "model": None}, "night", "flex"),
            ({"model": "night"}, "night", "flex"),
            ({"model": "tiny"}, "org/tiny", "default"),
        ):
            status, body = await server.post("/v1/completions", COMPLETION | extra)
            assert status == 200, body
            assert (body["model"], body["service_tier"]) == (model, tier)


async def test_the_ledger_on_an_online_response(pair: Engine) -> None:
    async with serving(pair) as server:
        offline = [pair.submit([1, 2, 3], LONG, tenant="offline") for _ in range(4)]
        status, body = await server.post("/v1/completions", COMPLETION | {"return_colocation": True})
        assert status == 200
        cost = body["usage"]["colocation"]
        counted = pair.stats().sharing.request_preemptions
        assert sum(number * count for number, count in counted.items()) >= cost["preemptions"]
        assert cost.keys() == {"waited_us", "preemptions", "slabs_reclaimed"}
        assert cost["preemptions"] in (0, 1)
        for generation in offline:
            generation.abort()


async def test_the_header_is_for_online_responses_only(pair: Engine) -> None:
    async with serving(pair) as server:
        for model, told in (("tiny", True), ("night", False)):
            async with server.client.post(server.url + "/v1/completions", json=COMPLETION | {"model": model}) as response:
                assert ("x-sluice-colocation" in response.headers) == told
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "stream": True, "return_colocation": True}
        body["stream_options"] = {"include_usage": True}
        events = await server.events("/v1/chat/completions", body)
        assert "colocation" in events[-2]["usage"]


async def test_each_online_request_is_counted_once(pair: Engine) -> None:
    async with serving(pair) as server:
        before = sum(pair.stats().sharing.request_preemptions.values())
        await server.post("/v1/completions", COMPLETION | {"prompt": ["a", "b", "c"]})
        await server.post("/v1/completions", COMPLETION)
        pair.submit("direct", SamplingParams(max_tokens=2)).result(60)
        await server.idle()
        assert sum(pair.stats().sharing.request_preemptions.values()) - before == 3


async def test_usage_says_nothing_unless_asked(pair: Engine) -> None:
    async with serving(pair) as server:
        _, body = await server.post("/v1/completions", COMPLETION)
        assert "colocation" not in body["usage"]


async def test_offline_over_http_is_no_online_request(pair: Engine) -> None:
    """Its head stops the worker for as long as it takes to read what it is; the ledger counts no preemption for it."""
    async with serving(pair) as server:
        before = pair.stats().sharing
        for _ in range(3):
            status, _ = await server.post("/v1/completions", COMPLETION | {"model": "night"})
            assert status == 200
        after = pair.stats().sharing
        assert after.preemptions == before.preemptions
        assert after.request_preemptions == before.request_preemptions


async def test_metrics_of_two_tenants(pair: Engine) -> None:
    async with serving(pair) as server:
        await server.post("/v1/completions", COMPLETION)
        await server.post("/v1/completions", COMPLETION | {"model": "night"})
        async with server.client.get(server.url + "/metrics") as response:
            found = samples(await response.text())
    owners = {key[1] for key in found if key[0] == "sluice_device_time_seconds_total"}
    assert owners == {"online", "offline", "switch", "idle"}
    stats = pair.stats().sharing
    assert found["sluice_slabs", "online"] + found["sluice_slabs", "offline"] == sum(stats.slabs.values())
    assert found["sluice_online_headroom_slabs",] >= 1
    histograms = ("reclaim_seconds", "preempted_duration_seconds", "preemption_latency_seconds", "request_preemptions")
    for name in ("reclaims_total", *(f"{histogram}_count" for histogram in histograms)):
        assert (f"sluice_{name}",) in found
    for reason in ("arrival", "false_alarm"):
        assert ("sluice_preemptions_total", reason) in found
    assert found["sluice_request_preemptions_bucket", "1.0"] == found["sluice_request_preemptions_count",]
    assert found["sluice_recomputed_tokens_total", "night", "offline"] >= 0
    aliases = [key for key in found if key[0].startswith("vllm:")]
    assert aliases
    weights = {key[2]: value for key, value in found.items() if key[:2] == ("sluice_memory_bytes", "weights")}
    assert weights.keys() == {"org/tiny", "night"} and min(weights.values()) > 0
    assert found["sluice_memory_bytes", "kv", ""] == pair.stats().kv_bytes
    assert not any("night" in key for key in aliases)
