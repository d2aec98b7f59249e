"""Every sentence of a tool grammar is understood by the reader of the same format, and its arguments fit the schema."""

from __future__ import annotations

import json
import random

import pytest

from engine.grammar import Grammars
from engine.tool_calls import FORMATS, whole_calls
from engine.tools import read_offer
from engine.types import Grammar

EOS = 258
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 5},
                    "where": {"$ref": "#/$defs/place"},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["where"],
                "additionalProperties": False,
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]


def write(grammars: Grammars, text: str, seed: int) -> str:
    rng, guide, tokens = random.Random(seed), grammars.open(Grammar("lark", text)), [0]
    grammars.check(Grammar("lark", text))
    while len(tokens) < 4000:
        guide.prepare(tokens, 1)
        mask = guide.allowed()
        choices = [i for i in range(264) if mask[i >> 3] >> (i & 7) & 1]
        if EOS in choices and (len(choices) == 1 or rng.random() < 0.5):
            return bytes(tokens[1:]).decode()
        if len(choices) > 100 and "</parameter>" in text and rng.random() < 0.3:
            tokens += b"\n</parameter>\n"  # nobody finds that by chance
            continue
        closing = [i for i in choices if i < 256 and i in b'"}<\n']  # keep strings short
        plain = [i for i in choices if 32 <= i < 127] or [i for i in choices if i < 256]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.3 else plain))
    raise AssertionError("no end")


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("seed", range(6))
def test_required_calls(grammars, name, seed):
    offer = read_offer(TOOLS, "required", None)
    text = write(grammars, FORMATS[name].grammar(offer), seed)
    found = FORMATS[name].reader(offer).push(text, last=True)
    assert found.content == "", text
    calls = whole_calls(found.parts)
    assert calls, text
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "stop":
            assert arguments == {}
            continue
        assert set(arguments) <= {"city", "where", "unit"}
        assert 0 <= arguments["where"]["x"] <= 99
        assert arguments.get("unit", "C") in ("C", "F")
        assert isinstance(arguments.get("city", ""), str)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_one_call_alone(grammars, name):
    for choice, parallel in (({"type": "function", "function": {"name": "stop"}}, None), ("required", False)):
        offer = read_offer(TOOLS, choice, parallel)
        for seed in range(4):
            found = FORMATS[name].reader(offer).push(write(grammars, FORMATS[name].grammar(offer), seed), last=True)
            calls = whole_calls(found.parts)
            assert len(calls) == 1
            if parallel is None:
                assert calls[0]["function"]["name"] == "stop"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_or_an_answer(grammars, name):
    offer = read_offer(TOOLS, "auto", False)
    schema = {"type": "object", "properties": {"answer": {"const": 42}}, "required": ["answer"], "additionalProperties": False}
    kinds = set()
    for seed in range(12):
        text = write(grammars, FORMATS[name].grammar(offer, schema), seed)
        found = FORMATS[name].reader(offer).push(text, last=True)
        kinds.add(bool(found.parts))
        if not found.parts:
            assert json.loads(found.content) == {"answer": 42}
    assert kinds == {True, False}


STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
SPOKEN = {
    "hermes": ('Well. <tool_call>\n{"name": "weather", "arguments": {"where": {"x": 5}}}\n</tool_call> So.', '{"wh', '{"xy'),
    "llama3_json": ('{"name": "weather", "parameters": {"where": {"x": 5}}}', '{"wh', '{"xy'),
    "qwen3_coder": (
        'Well. <tool_call>\n<function=weather>\n<parameter=where>\n{"x": 5}\n</parameter>\n</function>\n</tool_call>',
        "=where",
        "=there",
    ),
}


def accepts(grammars: Grammars, text: str, grammar: str) -> bool:
    guide, tokens = grammars.open(Grammar("lark", grammar)), [0]
    grammars.check(Grammar("lark", grammar))
    for token in [*text.encode(), EOS]:
        guide.prepare(tokens, 1)
        if not guide.allowed()[token >> 3] >> (token & 7) & 1:
            return False
        tokens.append(token)
    return True


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_of_strict_tools_are_right_and_other_text_is_free(grammars, name):
    offer = read_offer(STRICT, "auto", None)
    assert offer.constrains and not read_offer(TOOLS, "auto", None).constrains
    grammar = FORMATS[name].grammar(offer)
    said, right, wrong = SPOKEN[name]
    for text in ("", "Hi", "a < b, <tool> {x}", said):
        assert accepts(grammars, text, grammar), text
    assert not accepts(grammars, said.replace(right, wrong), grammar)
    found = FORMATS[name].reader(offer).push(said, last=True)
    assert [json.loads(call["function"]["arguments"]) for call in whole_calls(found.parts)] == [{"where": {"x": 5}}]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "NAME", "arguments": {"any": "1"}}\n</tool_call>'),
        ("llama3_json", '{"name": "NAME", "parameters": {"any": "1"}}'),
        ("qwen3_coder", "<tool_call>\n<function=NAME>\n<parameter=any>\n1\n</parameter>\n</function>\n</tool_call>"),
    ],
)
def test_tools_that_are_not_strict_may_have_any_arguments_beside_strict_ones(grammars, name, call):
    grammar = FORMATS[name].grammar(read_offer([STRICT[1], TOOLS[0]], "auto", None))
    assert accepts(grammars, call.replace("NAME", "weather"), grammar)
    assert not accepts(grammars, call.replace("NAME", "stop"), grammar)
