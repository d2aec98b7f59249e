"""The OpenAI SDK against a running server."""

from __future__ import annotations

import openai
import pytest
from openai import AsyncOpenAI
from serving import MESSAGES, Server, serving

from engine import Engine


def client_of(server: Server, **options: object) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.url + "/v1", **{"api_key": "k", "max_retries": 0} | options)  # type: ignore[arg-type]


async def test_chat(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        reply = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2
        )  # type: ignore[call-overload]

    assert reply.choices[0].message.role == "assistant"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    assert reply.service_tier == "default"
    assert reply._request_id


async def test_stream_with_usage(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        stream = await client.chat.completions.create(
            model="org/tiny",
            messages=MESSAGES,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            service_tier="flex",
            extra_body={"ignore_eos": True},
        )  # type: ignore[call-overload]
        chunks = [chunk async for chunk in stream]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[0].service_tier == "flex"


async def test_completions(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        reply = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=1, n=2)
        stream = await client.completions.create(model="tiny", prompt=[97, 98], max_tokens=3, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is not None and choice.logprobs.token_logprobs[0] is None for choice in reply.choices)
    assert isinstance(text, str)


async def test_models(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny", "tiny"]
        assert (await client.models.retrieve("org/tiny")).id == "org/tiny"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/other")


async def test_error_classes(engine: Engine) -> None:
    async with serving(engine, api_key=("k",)) as server:
        async with client_of(server) as client:
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)  # type: ignore[call-overload]
            assert (bad.value.param, bad.value.code, bad.value.type) == (
                "temperature",
                "invalid_value",
                "invalid_request_error",
            )
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="gpt", messages=MESSAGES)  # type: ignore[call-overload]
            assert missing.value.code == "model_not_found"
        async with client_of(server, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


async def test_an_error_in_a_stream_raises(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=450, stream=True, extra_body={"ignore_eos": True}
        )  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="aborted"):
            async for _ in stream:
                for job in server.service.jobs:
                    job.abort()


async def test_the_sdk_waits_for_a_server_that_loads(engine: Engine) -> None:
    """503 with Retry-After is retried by itself."""
    async with serving(None) as server, client_of(server, max_retries=1) as client:
        server.service.started -= 1
        task_reply = client.models.list()
        server.service.start(engine)
        assert (await task_reply).data[0].id == "org/tiny"
