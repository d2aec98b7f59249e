"""The HTTP edge: shapes, errors, keys, limits, hostile bodies."""

from __future__ import annotations

import asyncio
import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import MESSAGES, make_engine, serving

from engine import Engine
from engine.types import Tenant
from server.app import ROUTES
from server.logs import escape, setup_logging

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHORT = {"messages": MESSAGES, "max_tokens": 2}
LONG = {"messages": MESSAGES, "max_tokens": 450, "ignore_eos": True}


def is_error(body: Any, code: str) -> bool:
    return (
        set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["code"] == code
    )


async def test_the_quiet_routes(engine: Engine) -> None:
    async with serving(engine) as server:
        for path in ("/health", "/ping", "/ready"):
            assert await server.get(path) == (200, {"status": "ready"})
        status, body = await server.get("/version")
        assert (status, list(body)) == (200, ["version"])
        async with server.client.head(server.url + "/health") as response:
            assert (response.status, await response.read()) == (200, b"")


async def test_models(engine: Engine) -> None:
    async with serving(engine) as server:
        status, body = await server.get("/v1/models")
        assert (status, [card["id"] for card in body["data"]]) == (200, ["org/tiny", "tiny"])
        assert body["data"][1]["root"] == "org/tiny"
        assert body["data"][0]["max_model_len"] == 512
        assert (await server.get("/v1/models/org/tiny"))[1]["id"] == "org/tiny"
        status, body = await server.get("/v1/models/org/other")
        assert (status, is_error(body, "model_not_found")) == (404, True)


async def test_tokenize_and_back(engine: Engine) -> None:
    async with serving(engine) as server:
        for prefix in ("", "/v1"):
            status, body = await server.post(prefix + "/tokenize", {"prompt": "hé", "return_token_strs": True})
            assert status == 200
            assert body == {
                "count": 3,
                "max_model_len": 512,
                "tokens": [104, 195, 169],
                "token_strs": ["h", "\ufffd", "\ufffd"],
            }
            assert await server.post(prefix + "/detokenize", {"tokens": body["tokens"]}) == (200, {"prompt": "hé"})
        status, body = await server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})
        assert body["tokens"] == engine.tokenizer().render_chat(MESSAGES, add_generation_prompt=False)
        for path, bad in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": 5}),
            ("/tokenize", {"prompt": "x" * 100_000}),
            ("/tokenize", {"messages": []}),
            ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": False}}),
            ("/detokenize", {}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": [True]}),
            ("/detokenize", {"tokens": [2**70]}),
            ("/detokenize", {"tokens": [1] * 1000}),
        ):
            assert (await server.post(path, bad))[0] == 400, (path, bad)


async def test_what_lm_eval_asks_of_a_tokenizer(engine: Engine) -> None:
    """Its remote tokenizer: special tokens by name, a template to render, and ids of an empty prefix."""
    async with serving(engine) as server:
        for path in ("/tokenizer_info", "/v1/tokenizer_info"):
            status, info = await server.get(path)
            assert status == 200
            assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", "<|endoftext|>")
            assert "im_start" in info["chat_template"]
        ask = {"prompt": info["eos_token"], "add_special_tokens": False}
        assert (await server.post("/tokenize", ask))[1]["tokens"] == [258]
        assert (await server.get("/tokenizer_info?model=nobody"))[0] == 404


async def test_the_version_is_that_of_the_sources(engine: Engine) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    async with serving(engine) as server:
        assert await server.get("/version") == (200, {"version": project["version"]})


async def test_routes_that_are_not_there_answer_in_json(engine: Engine) -> None:
    async with serving(engine) as server:
        status, body = await server.get("/v1/nothing")
        assert (status, is_error(body, "not_found")) == (404, True)
        status, body = await server.get(CHAT)
        assert (status, is_error(body, "method_not_allowed")) == (405, True)
        status, body = await server.post("/health", {})
        assert (status, is_error(body, "method_not_allowed")) == (405, True)


async def test_bodies_that_are_refused_before_they_are_read(engine: Engine) -> None:
    async with serving(engine, max_body_size=1000, body_timeout=0.2) as server:
        status, body = await server.post(CHAT, b" " * 1001)
        assert (status, is_error(body, "request_too_large")) == (413, True)

        async def chunks() -> Any:
            for _ in range(20):
                yield b" " * 100

        async with server.client.post(
            server.url + CHAT, data=chunks(), headers={"Content-Type": "application/json"}
        ) as response:
            assert (response.status, is_error(await response.json(), "request_too_large")) == (413, True)
        status, body = await server.post(CHAT, b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert (status, is_error(body, "unsupported_media_type")) == (415, True)

        async def never() -> Any:
            yield b"{"
            await asyncio.sleep(60)

        async with server.client.post(
            server.url + CHAT, data=never(), headers={"Content-Type": "application/json"}
        ) as response:
            assert (response.status, is_error(await response.json(), "request_timeout")) == (408, True)


async def test_request_ids(engine: Engine) -> None:
    async with serving(engine) as server:
        for path, given_id, kept in (
            ("/health", "abc-1.2:3_X", True),
            ("/nothing", "mine", True),
            ("/health", "x" * 65, False),
            ("/health", "a b", False),
            ("/health", 'x"\\u2028', False),
        ):
            async with server.client.get(server.url + path, headers={"X-Request-Id": given_id}) as response:
                echoed = response.headers["x-request-id"]
                assert (echoed == given_id) is kept
                assert echoed
        async with server.client.post(
            server.url + CHAT, json=SHORT | {"stream": True}, headers={"X-Request-Id": "stream-1"}
        ) as response:
            assert response.headers["x-request-id"] == "stream-1"


async def test_keys_close_every_route_that_is_not_opened(engine: Engine) -> None:
    public = {"/health", "/ready", "/ping", "/version", "/openapi.json", "/dashboard"}
    async with serving(engine, api_key=("sesame", "other"), admin_api_key=("root",)) as server:
        for route in ROUTES:
            path = route.path.replace("{id:.+}", "org/tiny")
            async with server.client.request(route.method, server.url + path) as response:
                if route.path in public:
                    assert response.status == 200
                    continue
                assert response.status == 401, route
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert is_error(await response.json(), "invalid_api_key")
        assert (await server.get("/nothing"))[0] == 401
        assert (await server.get("/health/"))[0] == 401
        assert (await server.get("/v1/models", headers={"Host": "localhost/health"}))[0] == 401
        for header in ("sesame", "Bearer", "Bearer ", "Bearer wrong", "Basic sesame", "Bearer sesame2", "Bearer sésame"):
            assert (await server.get("/v1/models", headers={"Authorization": header}))[0] == 401
        for header in ("Bearer sesame", "bearer other"):
            assert (await server.get("/v1/models", headers={"Authorization": header}))[0] == 200
        assert (await server.post(CHAT, SHORT, headers={"Authorization": "Bearer sesame"}))[0] == 200


async def test_routes_that_may_be_opened(engine: Engine) -> None:
    async with serving(engine, api_key=("k",), public_models=True, public_metrics=True) as server:
        assert (await server.get("/v1/models"))[0] == 200
        async with server.client.get(server.url + "/metrics") as response:
            assert response.status == 200
        assert (await server.post(CHAT, SHORT))[0] == 401


async def test_no_engine_yet() -> None:
    async with serving(None) as server:
        for path in ("/health", "/ready", "/v1/models"):
            async with server.client.get(server.url + path) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "2"
                assert response.headers["retry-after-ms"] == "2000"
                assert is_error(await response.json(), "model_loading")
        assert (await server.post(CHAT, SHORT))[0] == 503
        assert (await server.get("/version"))[0] == 200
        async with server.client.get(server.url + "/metrics") as response:
            assert response.status == 200


async def test_a_full_key_and_a_full_flex_tier(engine: Engine) -> None:
    async with serving(engine, max_inflight_flex=1, max_inflight_per_key=2) as server:
        flex = LONG | {"service_tier": "flex"}
        first = asyncio.create_task(server.post(CHAT, flex))
        while server.service.in_flight.total < 1:
            await asyncio.sleep(0.005)
        async with server.client.post(server.url + CHAT, json=flex) as response:
            assert response.status == 429
            assert "Retry-After" in response.headers
            assert is_error(await response.json(), "resource_unavailable")
        second = asyncio.create_task(server.post(CHAT, LONG))
        while server.service.in_flight.total < 2:
            await asyncio.sleep(0.005)
        status, body = await server.post(CHAT, SHORT)
        assert (status, is_error(body, "rate_limit_exceeded")) == (429, True)
        assert (await first)[0] == (await second)[0] == 200
        assert (await server.post(CHAT, flex | {"max_tokens": 1}))[0] == 200


async def test_a_full_engine_says_when_to_come_back(tmp_path: Any) -> None:
    with make_engine(tmp_path, max_num_queued_reqs=1, max_num_seqs=1) as engine:
        async with serving(engine) as server:
            online = lambda: engine.stats().tenants[Tenant.ONLINE]  # noqa: E731
            running = [asyncio.create_task(server.post(CHAT, LONG))]
            while online().running < 1:  # both at once might meet in the queue, which has one place
                await asyncio.sleep(0.005)
            running.append(asyncio.create_task(server.post(CHAT, LONG)))
            while online().waiting < 1:
                await asyncio.sleep(0.005)
            async with server.client.post(server.url + CHAT, json=SHORT) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert is_error(await response.json(), "server_overloaded")
            assert [(await task)[0] for task in running] == [200, 200]


async def test_connections_are_bounded(engine: Engine) -> None:
    async with serving(engine, max_connections=2) as server:
        holders = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        reply = await reader.read()
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert is_error(json.loads(body), "server_overloaded")
        for _, open_writer in [*holders, (reader, writer)]:
            open_writer.close()
            await open_writer.wait_closed()
        while len(server.service.connections._server.connections):  # type: ignore[union-attr]
            await asyncio.sleep(0.005)
        assert (await server.get("/health"))[0] == 200


async def test_headers_must_arrive(engine: Engine) -> None:
    async with serving(engine, header_timeout=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.3)
        writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n"), "a connection that spoke in time stays open"
        writer.close()


async def test_metrics(engine: Engine) -> None:
    async with serving(engine) as server:
        await server.post(CHAT, SHORT)
        await server.events(CHAT, SHORT | {"max_tokens": 5, "ignore_eos": True})
        await server.post(CHAT, SHORT | {"service_tier": "flex"})
        async with server.client.get(server.url + "/metrics") as response:
            assert response.content_type == "text/plain"
            lines = (await response.text()).splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    labels = '{engine="0",model_name="org/tiny"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert values[f"vllm:{name}{labels}"] == 0
    assert values[f"vllm:time_to_first_token_seconds_count{labels}"] == 2, "also those that are not streamed"
    assert values[f"vllm:e2e_request_latency_seconds_count{labels}"] == 2
    assert values[f"vllm:generation_tokens_total{labels}"] >= 7
    assert values['vllm:request_success_total{engine="0",finished_reason="length",model_name="org/tiny"}'] >= 1
    assert any(name.startswith("vllm:cache_config_info") and 'block_size="16"' in name for name in values)
    assert values['sluice_e2e_request_latency_seconds_count{model_name="org/tiny",tenant="offline"}'] == 1
    assert not any("vllm:" in name and "offline" in name for name in values)
    assert values['sluice_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}'] == 3
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {line for line in lines if line.startswith("# TYPE")}
    )


async def test_metrics_without_other_peoples_names(engine: Engine) -> None:
    async with serving(engine, metrics_compat="none") as server, server.client.get(server.url + "/metrics") as response:
        assert "vllm:" not in await response.text()


async def test_paths_do_not_become_labels(engine: Engine) -> None:
    async with serving(engine) as server:
        for index in range(5):
            await server.get(f"/nothing/{index}")
            await server.get(f"/v1/models/unknown-{index}")
        async with server.client.get(server.url + "/metrics") as response:
            text = await response.text()
    assert 'route="none",status="404"} 5.0' in text
    assert "unknown-" not in text


async def test_a_bug_in_a_handler_is_a_plain_500(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(engine) as server:
        server.service.in_flight = None  # type: ignore[assignment]
        async with server.client.post(server.url + CHAT, json=SHORT) as response:
            assert response.status == 500
            assert response.headers["x-should-retry"] == "false"
            body = await response.json()
        assert body["error"]["message"] == "internal error"
        assert "Traceback" in caplog.text


HOSTILE = [
    b'{"messages":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    b'{"n":' + b"9" * 100_000 + b"}",
    b'{"temperature":1e99999}',
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"prompt":"\xff"}',
    b'{"messages":[{"role":"user","content":' + b'[{"type":"text","text":"x"},' * 500 + b"1" + b"]" * 500 + b"}]}",
    b'{"messages":[' + b'{"role":"user"},' * 1_000_000 + b"{}]}",
    b"\x00" * 1000,
    b"[" * 100,
    b"null",
]


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_hostile_json(engine: Engine, path: str) -> None:
    async with serving(engine) as server:
        for body in HOSTILE:
            status, reply = await server.post(path, body)
            assert status == 400, body[:60]
            assert len(json.dumps(reply)) < 1500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([0, 1, 5, "a", True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "ignore_eos",
    "echo",
    "stream",
    "stream_options",
    "service_tier",
    "priority",
    "cache_salt",
    "return_token_ids",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop_token_ids",
    "prompt_logprobs",
    "prompt",
    "messages",
    "model",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "bad_words",
    "allowed_token_ids",
    "chat_template_kwargs",
]


async def test_fuzzed_bodies_never_cause_a_500(engine: Engine) -> None:
    """Whatever the fields hold, the answer is a result or a refusal."""
    async with serving(engine) as server:
        loop = asyncio.get_running_loop()

        async def one(path: str, body: dict[str, Any]) -> None:
            base: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "ab"}
            async with server.client.post(server.url + path, data=json.dumps(base | {"max_tokens": 2} | body).encode(),
                                          headers={"Content-Type": "application/json"}) as response:  # fmt: skip
                text = (await response.read()).decode()
                assert response.status in (200, 400, 404), (body, text)
                if response.content_type == "text/event-stream":
                    assert text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in text, (body, text)

        @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.sampled_from([CHAT, TEXT]), st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
        def fuzz(path: str, body: dict[str, Any]) -> None:
            asyncio.run_coroutine_threadsafe(one(path, body), loop).result(timeout=60)

        await asyncio.to_thread(fuzz)
        await server.idle()


# Any mix of settings that are each valid: combinations have killed engines, not values.
params = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 4)},
    optional={
        "temperature": st.sampled_from([0, 0.0001, 1, 2]),
        "top_p": st.sampled_from([0.0001, 0.5, 1]),
        "top_k": st.sampled_from([-1, 0, 1, 5, 10**6]),
        "min_p": st.sampled_from([0, 0.5, 1]),
        "repetition_penalty": st.sampled_from([0.01, 1, 10]),
        "presence_penalty": st.sampled_from([-2, 2]),
        "frequency_penalty": st.sampled_from([-2, 2]),
        "logit_bias": st.sampled_from([{"0": 100}, {"5": -100, "258": 100}]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "n": st.integers(1, 3),
        "stop": st.sampled_from(["a", ["\n", "b"]]),
        "stop_token_ids": st.sampled_from([[0], [258, 1]]),
        "min_tokens": st.sampled_from([0, 1]),
        "ignore_eos": st.booleans(),
        "stream": st.booleans(),
        "service_tier": st.sampled_from(["default", "flex"]),
        "return_token_ids": st.booleans(),
    },
)
shapes = st.sampled_from([{}, {"logprobs": 0}, {"logprobs": 20}, {"echo": True}, {"echo": True, "logprobs": 2}])


async def test_valid_settings_work_in_every_combination(engine: Engine) -> None:
    async with serving(engine) as server:
        loop = asyncio.get_running_loop()

        async def one(body: dict[str, Any]) -> None:
            async with server.client.post(server.url + TEXT, json=body) as response:
                text = (await response.read()).decode()
                assert response.status == 200, (body, text)
                assert '"error"' not in text, (body, text)

        @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(params, shapes, st.sampled_from(["ab", ["a", "bc"], [97], [[97], [98, 99, 100]]]))
        def fuzz(settings: dict[str, Any], shape: dict[str, Any], prompt: Any) -> None:
            asyncio.run_coroutine_threadsafe(one({"prompt": prompt} | settings | shape), loop).result(timeout=60)

        await asyncio.to_thread(fuzz)
        await server.idle()


def test_log_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    try:
        for form in ("text", "json"):
            setup_logging(form, "info")
            logging.getLogger("x").info("path %s", "a\r\nfake: line\x1b[31m\u2028\x00\x85z")
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert line.endswith("\n")
            assert all(char.isprintable() for char in line[:-1])
    finally:
        root.handlers[:], root.level = handlers, level


def test_escape_keeps_ordinary_text() -> None:
    assert escape("café 漢字 ok") == "café 漢字 ok"
    assert escape("a\tb\u202e") == "a\\tb\\u202e"


async def test_nothing_a_client_sends_is_logged_raw(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(engine) as server:
        secret = {"messages": [{"role": "user", "content": "my secret prompt"}], "max_tokens": 2}
        async with server.client.post(
            server.url + CHAT, json=secret, headers={"Authorization": "Bearer hidden-key"}
        ) as response:
            assert response.status == 200
        await server.post(CHAT, secret | {"temperature": 5})
    assert "secret" not in caplog.text
    assert "hidden-key" not in caplog.text


async def test_malformed_http(engine: Engine) -> None:
    async with serving(engine) as server:
        for raw in (
            b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 500 + b"\r\n",
            b"nonsense\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw)
            assert b" 400 " in await reader.readline()
            writer.close()
        assert (await server.get("/health"))[0] == 200
