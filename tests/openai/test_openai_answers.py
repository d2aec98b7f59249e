"""Answers of a real engine: bodies, log-probabilities as lm-eval reads them, and every error as an Answer."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving import ENDLESS, LONG_CONTEXT, MESSAGES, HeldTokenizer, make_engine

import engine.replies as replies
from engine import Engine
from engine.errors import ContextTooLong, EngineDead, Overloaded, RequestFailed, ShuttingDown
from engine.openai import CHAT, COMPLETIONS, answer, error_answer, next_chunks, parse, submit
from engine.replies import Chunks, Head, Prompt, Shape
from engine.types import Delta, FinishReason, Tenant

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


async def body_of(engine: Engine, url: str, body: dict[str, Any], **options: Any) -> Any:
    reply = await answer(engine, url, body, **options)
    assert reply.status == 200, reply.body
    return reply.body


async def test_chat_body(engine: Engine) -> None:
    body = await body_of(engine, CHAT, {"messages": MESSAGES, "return_token_ids": True} | GREEDY)

    choice = body["choices"][0]
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"], body["service_tier"]) == ("chat.completion", "org/tiny", "default")
    assert body["system_fingerprint"].startswith("fp_")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == engine.tokenizer().decode(choice["token_ids"])
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("length", None, 0)
    assert list(body["prompt_token_ids"]) == engine.tokenizer().render_chat(MESSAGES)
    prompt = len(body["prompt_token_ids"])
    assert body["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
        "prompt_tokens_details": None,
    }


async def test_cached_tokens_are_told(engine: Engine) -> None:
    body = {"prompt": "the same long beginning of a prompt, again and again, and again", "max_tokens": 1}

    await body_of(engine, COMPLETIONS, body)
    again = await body_of(engine, COMPLETIONS, body)

    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


async def test_chat_logprobs(engine: Engine) -> None:
    body = await body_of(
        engine, CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True} | GREEDY
    )

    tokens = body["choices"][0]["token_ids"]
    entries = body["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in entries] == [engine.tokenizer().token_bytes(token) for token in tokens]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0, "greedy takes the likeliest"
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]


async def test_chat_logprobs_without_alternatives(engine: Engine) -> None:
    body = await body_of(engine, CHAT, {"messages": MESSAGES, "logprobs": True} | GREEDY)

    assert all(entry["top_logprobs"] == [] for entry in body["choices"][0]["logprobs"]["content"])


async def test_several_prompts_and_choices(engine: Engine) -> None:
    body = await body_of(engine, COMPLETIONS, {"prompt": [[97], [98, 99]], "n": 2, "return_token_ids": True} | GREEDY)

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [list(choice["prompt_token_ids"]) for choice in body["choices"]] == [[97], [97], [98, 99], [98, 99]]
    assert body["choices"][0]["text"] == body["choices"][1]["text"]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_loglikelihood_as_lm_eval_asks_for_it(engine: Engine, max_tokens: int) -> None:
    """Token ids, echo, logprobs 1: the entries of the prompt come first, the first without a value."""
    prompt = [104, 105, 32, 116, 104]
    request = {
        "prompt": [prompt, prompt[:3]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 1234,
    }

    body = await body_of(engine, COMPLETIONS, request)

    first, second = (choice["logprobs"] for choice in body["choices"])
    assert first["tokens"][:5] == ["h", "i", " ", "t", "h"]
    assert len(first["tokens"]) == len(first["token_logprobs"]) == len(first["top_logprobs"]) == 5 + max_tokens
    assert first["token_logprobs"][0] is None
    assert first["top_logprobs"][0] is None
    assert first["text_offset"][:5] == [0, 1, 2, 3, 4]
    for token, value, top in zip(first["tokens"], first["token_logprobs"], first["top_logprobs"], strict=True):
        if value is not None:
            assert top[token] == value <= max(top.values())
    assert first["token_logprobs"][1:3] == pytest.approx(second["token_logprobs"][1:3], abs=1e-4)
    assert body["choices"][0]["text"].startswith("hi th")
    assert body["usage"]["completion_tokens"] == 2 * max_tokens
    if max_tokens == 0:
        assert body["choices"][0]["text"] == "hi th"
        assert body["choices"][0]["finish_reason"] == "length"


async def test_echo_values_are_those_of_the_model(engine: Engine) -> None:
    """Generating greedily and scoring the same tokens as a prompt give the same log-probabilities."""
    made = await body_of(engine, COMPLETIONS, {"prompt": "abc", "logprobs": 0, "return_token_ids": True} | GREEDY)
    tokens = [97, 98, 99, *made["choices"][0]["token_ids"]]

    scored = await body_of(engine, COMPLETIONS, {"prompt": tokens, "echo": True, "logprobs": 0, "max_tokens": 0})

    values = scored["choices"][0]["logprobs"]["token_logprobs"]
    assert values[3:] == pytest.approx(made["choices"][0]["logprobs"]["token_logprobs"], abs=1e-3)


async def test_prompt_logprobs_of_their_own(engine: Engine) -> None:
    body = await body_of(engine, COMPLETIONS, {"prompt": "abc", "prompt_logprobs": 1} | GREEDY)

    table = body["choices"][0]["prompt_logprobs"]
    assert table[0] is None
    assert len(table) == 3
    assert table[1]["98"]["decoded_token"] == "b"
    assert any(entry["rank"] == 1 for entry in table[1].values())


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
async def test_a_stream_tells_of_its_prompt_first(engine: Engine, url: str) -> None:
    """Per choice, with its first chunk: `prompt_logprobs` as in a whole answer."""
    body = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT else {"prompt": ["abc", "d"]}
    body |= {"prompt_logprobs": 1, "n": 2, "max_tokens": 4, "temperature": 0}
    whole = await body_of(engine, url, body)
    job = await submit(engine, parse(url, body | {"stream": True}))
    chunks, told = job.chunks(), {}
    for number, generation in enumerate(job.generations):
        async for delta in generation:
            for chunk in chunks.push(number, delta):
                (choice,) = chunk["choices"]
                if "prompt_logprobs" in choice:
                    assert choice["index"] not in told
                    told[choice["index"]] = choice["prompt_logprobs"]
                assert choice["index"] in told
    expected = [whole["prompt_logprobs"]] * 2 if url == CHAT else [choice["prompt_logprobs"] for choice in whole["choices"]]
    for index, table in enumerate(expected):
        assert [entry and entry.keys() for entry in told[index]] == [entry and entry.keys() for entry in table]


async def test_a_streamed_echo_is_the_whole_one_in_pieces(engine: Engine) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    (whole,) = (await body_of(engine, COMPLETIONS, body))["choices"]
    job = await submit(engine, parse(COMPLETIONS, body | {"stream": True}))
    chunks = job.chunks()
    choices = [c["choices"][0] async for delta in job.generations[0] for c in chunks.push(0, delta)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == whole["logprobs"][name]
    values = [value for part in parts for value in part["token_logprobs"]]
    assert values[0] is None
    assert values[1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)


async def test_stop_string_is_told(engine: Engine) -> None:
    text = (await body_of(engine, COMPLETIONS, {"prompt": "abc"} | GREEDY | {"max_tokens": 40}))["choices"][0]["text"]
    stop = next(char for char in text[1:] if char.isascii() and char not in text[0])

    body = await body_of(engine, COMPLETIONS, {"prompt": "abc", "stop": stop} | GREEDY | {"max_tokens": 40})

    choice = body["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]


async def test_a_format_in_a_line_of_a_job(engine: Engine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 300, "seed": 1}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    made = await answer(engine, CHAT, body | wanted, tenant=Tenant.OFFLINE)
    assert made.status == 200
    assert json.loads(made.body["choices"][0]["message"]["content"])["a"] in (True, False)
    wrong = await answer(engine, CHAT, body | {"structured_outputs": {"regex": "("}}, tenant=Tenant.OFFLINE)
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "structured_outputs.regex")


async def test_flex_runs_offline(engine: Engine) -> None:
    before = engine.stats().tenants[Tenant.OFFLINE].counters.submitted

    body = await body_of(engine, CHAT, {"messages": MESSAGES, "service_tier": "flex"} | GREEDY)

    assert body["service_tier"] == "flex"
    assert engine.stats().tenants[Tenant.OFFLINE].counters.submitted == before + 1


async def test_a_given_tenant_wins(engine: Engine) -> None:
    body = await body_of(engine, CHAT, {"messages": MESSAGES} | GREEDY, tenant=Tenant.OFFLINE)

    assert body["service_tier"] == "flex"


async def test_the_tenant_does_not_change_the_output(engine: Engine) -> None:
    request = {"messages": MESSAGES, "seed": 7, "max_tokens": 8}

    texts = {
        (await body_of(engine, CHAT, request | {"service_tier": tier}))["choices"][0]["message"]["content"]
        for tier in ("default", "flex")
    }

    assert len(texts) == 1


@pytest.mark.parametrize(
    "url, body, status, param, code",
    [
        (CHAT, {}, 400, "messages", "missing_required_parameter"),
        (CHAT, {"messages": MESSAGES, "stream": True}, 400, "stream", "unsupported_parameter"),
        (CHAT, {"messages": MESSAGES, "model": "gpt-4"}, 404, "model", "model_not_found"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 60_000}]}, 400, "messages", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "x" * 600}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [1] * 100_000}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [300]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"300": 1}}, 400, "logit_bias", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", "x" * 600]}, 400, "prompt", "context_length_exceeded"),
        (
            CHAT,
            {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}},
            400,
            "chat_template_kwargs",
            "invalid_value",
        ),
        ("/v1/embeddings", {}, 400, "url", "unsupported_url"),
    ],
)
async def test_errors_are_answers(engine: Engine, url: str, body: Any, status: int, param: str, code: str) -> None:
    reply = await answer(engine, url, body)

    error = reply.body["error"]
    assert reply.status == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)


async def test_a_prompt_that_fails_takes_its_siblings_with_it(engine: Engine) -> None:
    reply = await answer(engine, COMPLETIONS, {"prompt": ["a", "x" * 600], "max_tokens": 400, "ignore_eos": True})

    assert reply.status == 400
    while engine.stats().tenants[Tenant.ONLINE].running or engine.stats().tenants[Tenant.ONLINE].waiting:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "error, tenant, status, code",
    [
        (Overloaded("full", retry_after=2), Tenant.ONLINE, 503, "server_overloaded"),
        (Overloaded("full", retry_after=2), Tenant.OFFLINE, 429, "resource_unavailable"),
        (ShuttingDown("bye"), Tenant.OFFLINE, 503, "shutting_down"),
        (RequestFailed("NaN"), None, 500, "request_failed"),
        (RequestFailed("lost", retryable=True), None, 503, "request_failed"),
        (EngineDead("gone: /secret/path"), None, 503, "engine_dead"),
        (ValueError("/secret/path 0x7f00"), None, 500, "internal_error"),
    ],
)
def test_error_answers(error: Exception, tenant: Tenant | None, status: int, code: str) -> None:
    reply = error_answer(error, tenant)

    assert (reply.status, reply.body["error"]["code"]) == (status, code)
    assert "secret" not in reply.body["error"]["message"]
    assert (reply.retry_after is not None) == (status in (429, 503))
    assert reply.should_retry is (False if status == 500 else None)


def test_error_messages_are_bounded() -> None:
    assert len(error_answer(RequestFailed("x" * 10**6)).body["error"]["message"]) <= 500


async def test_a_cancelled_answer_stops_its_generation(long_engine: Engine) -> None:
    engine = long_engine
    task = asyncio.create_task(answer(engine, CHAT, ENDLESS))
    while not engine.stats().tenants[Tenant.ONLINE].running:
        await asyncio.sleep(0.005)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    while engine.stats().tenants[Tenant.ONLINE].running:
        await asyncio.sleep(0.005)


async def test_an_aborted_request_never_looks_complete(long_engine: Engine) -> None:
    engine = long_engine
    task = asyncio.create_task(answer(engine, CHAT, ENDLESS, request_id="mine"))
    while not engine.stats().tenants[Tenant.ONLINE].running:
        await asyncio.sleep(0.005)

    assert engine.abort("mine")

    reply = await task
    assert (reply.status, reply.body["error"]["code"]) == (503, "request_aborted")
    assert reply.should_retry is False


async def test_a_dead_engine_escapes(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.close()

    with pytest.raises(EngineDead):
        await answer(engine, CHAT, {"messages": MESSAGES})


async def test_a_draining_engine_answers(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        engine.drain(0)

        reply = await answer(engine, CHAT, {"messages": MESSAGES})

    assert (reply.status, reply.body["error"]["code"]) == (503, "shutting_down")


async def test_a_call_that_is_cancelled_while_it_is_tokenized(tmp_path: Path) -> None:
    """The worker thread submits all the same, and what it submits is aborted: nothing stays in the engine."""
    with make_engine(tmp_path, held=True, context=LONG_CONTEXT) as engine:
        tokenizer = engine.tokenizer()
        assert isinstance(tokenizer, HeldTokenizer)
        call = parse(COMPLETIONS, {"prompt": "a" * 5000, "max_tokens": 20_000, "ignore_eos": True})
        task = asyncio.create_task(submit(engine, call))
        assert await asyncio.to_thread(tokenizer.entered.wait, 30)

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tokenizer.go_on.set()

        while not (counters := engine.stats().tenants[Tenant.ONLINE].counters).submitted:
            await asyncio.sleep(0.005)
        while engine.stats().tenants[Tenant.ONLINE].running or engine.stats().tenants[Tenant.ONLINE].waiting:
            await asyncio.sleep(0.005)
        assert counters.submitted == 1


@pytest.mark.parametrize("more", [{}, {"structured_outputs": {"choice": ["yes", "no"]}}], ids=["long", "constrained"])
async def test_an_online_prompt_never_stands_in_line_behind_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Whatever the lines of a job take to be made tokens, and however many of them there are."""
    with make_engine(tmp_path, context=LONG_CONTEXT) as engine:
        encode, entered, go_on = engine.tokenizer().encode, threading.Event(), threading.Event()

        def slow_for_jobs(text: str, *args: Any, **options: Any) -> list[int]:
            if text.startswith("job"):
                entered.set()
                assert go_on.wait(60), "the online prompt came behind the job's"
            return encode(text, *args, **options)

        monkeypatch.setattr(engine.tokenizer(), "encode", slow_for_jobs)
        body = {"max_tokens": 2} | more
        try:
            lines = [
                asyncio.create_task(answer(engine, COMPLETIONS, body | {"prompt": "job " * 1500}, tenant=Tenant.OFFLINE))
                for _ in range(12)
            ]
            assert await asyncio.to_thread(entered.wait, 30)

            online = await answer(engine, COMPLETIONS, body | {"prompt": "people " * 1000})

            assert online.status == 200
            assert not any(line.done() for line in lines)
        finally:
            go_on.set()
        assert {line.status for line in await asyncio.gather(*lines)} == {200}


async def test_an_error_from_another_thread_goes_with_its_reader(engine: Engine) -> None:
    """A circle of references would keep the prompt with it, however large, until somebody looks for circles."""
    call = parse(COMPLETIONS, {"prompt": "too long " * 2000})
    gc.disable()
    try:
        with pytest.raises(ContextTooLong) as caught:
            await submit(engine, call)
        left = weakref.ref(caught.value)
        del caught
        deadline = time.monotonic() + 30
        while left() is not None:  # the thread lets go of it when it is done
            assert time.monotonic() < deadline, "only the collector can free it"
            await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_many_logprobs_are_written_down_off_the_loop(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def watched(function: Any) -> Any:
        def run(*args: Any) -> Any:
            threads.append(threading.current_thread())
            return function(*args)

        return run

    monkeypatch.setattr(replies, "completion_body", watched(replies.completion_body))
    monkeypatch.setattr(Chunks, "push", watched(Chunks.push))
    body = {"prompt": "ab" * 100, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    (whole,) = (await body_of(engine, COMPLETIONS, body))["choices"]
    job = await submit(engine, parse(COMPLETIONS, body | {"stream": True}))
    chunks = job.chunks()
    (first,) = await job.generations[0].read()
    parts = [chunk["choices"][0] for chunk in await next_chunks(job, chunks, 0, first)]

    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[0]["logprobs"]["tokens"] == whole["logprobs"]["tokens"]
    assert len(threads) == 2
    assert threading.current_thread() not in threads


class NoWords:
    def token_text(self, token: int) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return b""


SHAPES: list[dict[str, Any]] = [
    {"chat": True},
    {"chat": False},
    {"chat": True, "include_usage": True},
    {"chat": False, "include_usage": True, "n": 3},
    {"chat": True, "include_usage": True, "continuous_usage": True},
    {"chat": True, "logprobs": True},
    {"chat": False, "token_ids": True},
    {"chat": False, "no_output": True},
    {"chat": False, "echo": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_of_text_made_the_short_way_is_the_same(shape: dict[str, Any]) -> None:
    head = Head(id='""', created=1, model='m "" \0 é', tier="default", fingerprint="")
    long, short = (Chunks(head, Shape(**shape), [Prompt((1,), "p")] * 2, NoWords()) for _ in range(2))
    texts = ["a", "", '"', "\0", "\\n\n", "\u2028\U0001f600\x7f", "b"]
    deltas = [Delta(index=i % shape.get("n", 1), text=text, tokens=(i,)) for i, text in enumerate(texts * 3)]
    deltas.append(Delta(index=0, text="end", tokens=(9,), finish_reason=FinishReason.STOP))
    made = 0
    for prompt in (0, 1):
        for delta in deltas:
            expected = [msgspec.json.encode(chunk) for chunk in long.push(prompt, delta)]
            if (text := short.push_text(prompt, delta)) is not None:
                made += 1
                assert [text] == expected
            else:
                assert [msgspec.json.encode(chunk) for chunk in short.push(prompt, delta)] == expected

    plain = not {"continuous_usage", "logprobs", "token_ids", "no_output"} & shape.keys()
    assert bool(made) is plain, "the short way is taken where there is nothing but text"
