"""Tools and structured output over HTTP, asked for by the OpenAI SDK as everybody asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from helpers import tiny_checkpoint
from openai import AsyncOpenAI
from pydantic import BaseModel
from serving import Server, serving

from engine import Engine, EngineConfig

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nCall tools in <tool_call></tool_call>.\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"celsius": {"type": "boolean"}},
            "required": ["celsius"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
TOOLS = [WEATHER, CLOCK]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 350, "seed": 1}
SAYS_SO = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"celsius": true}}\n</tool_call>'


@pytest.fixture(scope="module")
def tool_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    config = EngineConfig(model=str(folder), served_model_name=("tiny",), threads=1, kv_cache_memory=1 << 25)
    with Engine(config=config, progress=False) as engine:
        yield engine


def client_of(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)


def forced(text: str) -> dict[str, Any]:
    """A model that happens to say this."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


async def gathered(stream: Any) -> tuple[str, list[dict[str, str]], str]:
    """Content, calls and finish reason of a stream, put together as the SDK's documentation does."""
    content, calls, reason = "", [], ""
    async for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                if part.index == len(calls):
                    assert part.id and part.type == "function" and part.function.name
                    calls.append({"id": part.id, "name": part.function.name, "arguments": ""})
                else:
                    assert part.id is None and part.function.name is None
                calls[part.index]["arguments"] += part.function.arguments or ""
    return content, calls, reason


@pytest.mark.parametrize("stream", [False, True])
async def test_required_calls(tool_engine: Engine, stream: bool) -> None:
    ask = ASK | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "stream": stream}
    async with serving(tool_engine) as server, client_of(server) as client:
        for seed in range(4):
            reply = await client.chat.completions.create(**ask | {"seed": seed})
            if stream:
                content, calls, reason = await gathered(reply)
            else:
                (choice,) = reply.choices
                content, reason = choice.message.content or "", choice.finish_reason
                calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls]
            assert (content, reason, len(calls)) == ("", "tool_calls", 1)
            arguments = json.loads(calls[0]["arguments"])
            assert arguments == {} if calls[0]["name"] == "clock" else arguments["celsius"] in (True, False)


async def test_a_named_function(tool_engine: Engine) -> None:
    choice = {"type": "function", "function": {"name": "clock"}}
    async with serving(tool_engine) as server, client_of(server) as client:
        reply = await client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice)
        assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["clock"]
        assert reply.choices[0].message.content is None
        stream = await client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice, stream=True)
        assert [(call["name"], json.loads(call["arguments"])) for call in (await gathered(stream))[1]] == [("clock", {})]


async def test_a_call_and_its_answer(tool_engine: Engine) -> None:
    async with serving(tool_engine) as server, client_of(server) as client:
        reply = await client.chat.completions.create(**ASK, tools=TOOLS, **forced(SAYS_SO))
        message = reply.choices[0].message
        assert (message.content, reply.choices[0].finish_reason) == ("I look.", "tool_calls")
        stream = await client.chat.completions.create(**ASK, tools=TOOLS, stream=True, **forced(SAYS_SO))
        content, calls, reason = await gathered(stream)
        assert (content, reason) == ("I look.", "tool_calls")
        assert [(c["name"], c["arguments"]) for c in calls] == [("weather", '{"celsius": true}')]

        messages = [*ASK["messages"], message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 C"}]
        extra = {"return_token_ids": True, "ignore_eos": True}
        after = await client.chat.completions.create(
            **ASK | {"messages": messages, "max_tokens": 4}, tools=TOOLS, extra_body=extra
        )
        prompt = tool_engine.tokenizer().decode(after.prompt_token_ids, skip_special=False)
        assert '<tool_call>{"name": "weather", "arguments": {"celsius": true}}</tool_call>' in prompt
        assert "<|im_start|>tool\n21 C<|im_end|>" in prompt
        assert '"clock"' in prompt


async def test_the_model_decides_whether_to_call_a_strict_tool(tool_engine: Engine) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    async with serving(tool_engine) as server, client_of(server) as client:
        reply = await client.chat.completions.create(**ASK | {"max_tokens": 20}, tools=[strict], extra_body={"min_tokens": 5})
        (choice,) = reply.choices
        assert choice.message.content or choice.message.tool_calls
        # Its schema is not looked at where nothing depends on it.
        loose = {"type": "function", "function": {"name": "f", "parameters": {"if": {}}}}
        assert (await client.chat.completions.create(**ASK | {"max_tokens": 2}, tools=[loose])).choices


async def test_no_tools_are_shown_where_none_may_be_called(tool_engine: Engine) -> None:
    async with serving(tool_engine) as server, client_of(server) as client:
        extra = {"return_token_ids": True, **forced(SAYS_SO)["extra_body"]}
        reply = await client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="none", extra_body=extra)
        assert reply.choices[0].message.content == SAYS_SO
        assert reply.choices[0].finish_reason == "stop"
        assert "clock" not in tool_engine.tokenizer().decode(reply.prompt_token_ids)


async def test_calls_or_an_answer_in_json(tool_engine: Engine) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    async with serving(tool_engine) as server, client_of(server) as client:
        for seed in range(6):
            reply = await client.chat.completions.create(
                **ASK | {"seed": seed, "temperature": 2}, tools=TOOLS, parallel_tool_calls=False, response_format=wanted
            )
            message = reply.choices[0].message
            assert message.tool_calls or json.loads(message.content) == {"a": 1}


class Answer(BaseModel):
    yes: bool


async def test_a_pydantic_model_as_the_format(tool_engine: Engine) -> None:
    async with serving(tool_engine) as server, client_of(server) as client:
        reply = await client.chat.completions.parse(**ASK, response_format=Answer)
        assert isinstance(reply.choices[0].message.parsed, Answer)
        async with client.chat.completions.stream(**ASK, response_format=Answer) as stream:
            async for _ in stream:
                pass
            assert isinstance((await stream.get_final_completion()).choices[0].message.parsed, Answer)


async def test_formats_of_text_completions(tool_engine: Engine) -> None:
    async with serving(tool_engine) as server, client_of(server) as client:
        reply = await client.completions.create(
            model="tiny", prompt=["a", "b"], max_tokens=300, extra_body={"structured_outputs": {"regex": "[xy]{3}"}}
        )
        assert all(set(choice.text) <= set("xy") and len(choice.text) == 3 for choice in reply.choices)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"guided_json": {"type": "sting"}}, "guided_json", "sting"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format", "not"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"if": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "if",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"if": {}}, "strict": True}}]}, "tools", "if"),
    ],
)
async def test_what_cannot_be_compiled(tool_engine: Engine, extra: dict[str, Any], param: str, words: str) -> None:
    async with serving(tool_engine) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            await client.chat.completions.create(**ASK, extra_body=extra)
        assert refused.value.param == param


async def test_a_model_that_knows_no_tools(engine: Engine) -> None:
    async with serving(engine) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="tool-call-parser") as refused:
            await client.chat.completions.create(**ASK, tools=TOOLS)
        assert refused.value.param == "tools"
