"""Calls of tools found in text, cut anywhere; and grammars whose every sentence the reader of the same format understands."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.tool_calls import FORMATS, detect, whole_calls
from engine.tools import Offer, read_offer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
OFFER = read_offer(TOOLS, None, None)
assert OFFER is not None


def read(name: str, text: str, cuts: list[int] | None = None, offer: Offer = OFFER) -> tuple[str, list[tuple[str, str]]]:
    """Content and (name, arguments) of an output that comes in pieces."""
    reader = FORMATS[name].reader(offer)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or ())})
    content, parts = "", []
    for start, end in itertools.pairwise(places):
        found = reader.push(text[start:end])
        content += found.content
        parts += found.parts
    found = reader.push("", last=True)
    content += found.content
    calls = whole_calls([*parts, *found.parts])
    assert reader.num_calls == len(calls)
    assert all(call["id"].startswith("call_") for call in calls)
    return content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


ARGUMENTS = '{"city": "Bo\\"nn</tool_call>", "days": [1, {"a": "}"}]}'
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bo\\"nn</tool_call>", "days": [1, {"a": "}"}]}}\n</tool_call>'
QWEN = """<tool_call>
<function=weather>
<parameter=city>
New
York <3
</parameter>
<parameter=days>
3
</parameter>
</function>
</tool_call>"""
CASES = [
    ("hermes", HERMES, "", [("weather", ARGUMENTS)]),
    ("hermes", f"Let me look. \n{HERMES}\n{HERMES}\n", "Let me look.", [("weather", ARGUMENTS)] * 2),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "stop"}</tool_call>', "", [("stop", "{}")]),
    ("hermes", '<tool_call>{"name": "stop", "arguments": null}</tool_call>done', "done", [("stop", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", " no call <tool> <tool_call", " no call <tool> <tool_call", []),
    ("hermes", "<tool_call>weather</tool_call> x", "<tool_call>weather</tool_call> x", []),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "B', "", [("weather", '{"city": "B')]),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Rom"}}', "", [("weather", '{"city": "Rom"}')]),
    (
        "llama3_json",
        ' \n{"name": "weather", "parameters": {"city": "Rom"}}; {"name": "stop", "parameters": {}}',
        "",
        [("weather", '{"city": "Rom"}'), ("stop", "{}")],
    ),
    ("llama3_json", '{"type": "function", "name": "stop"}', "", [("stop", "{}")]),
    ("llama3_json", '{"name": "Rom", "country": "Italy"}', '{"name": "Rom", "country": "Italy"}', []),
    ("llama3_json", '{"a": 1} and {"name": "stop"}', '{"a": 1} and {"name": "stop"}', []),
    ("llama3_json", "Rome is {big}.", "Rome is {big}.", []),
    ("llama3_json", "  plain  ", "  plain  ", []),
    ("qwen3_coder", QWEN, "", [("weather", '{"city": "New\\nYork <3", "days": 3}')]),
    ("qwen3_coder", f"Sure.\n\n{QWEN}\n{QWEN}", "Sure.", [("weather", '{"city": "New\\nYork <3", "days": 3}')] * 2),
    ("qwen3_coder", QWEN.removeprefix("<tool_call>\n"), "", [("weather", '{"city": "New\\nYork <3", "days": 3}')]),
    ("qwen3_coder", "<tool_call>\n<function=stop>\n</function>\n</tool_call>", "", [("stop", "{}")]),
    ("qwen3_coder", "a < b <func", "a < b <func", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_whole(name, text, content, calls):
    assert read(name, text) == (content, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 400), max_size=30))
@settings(max_examples=300, deadline=None)
def test_where_the_text_is_cut_does_not_matter(case, cuts):
    name, text, content, calls = case
    assert read(name, text, cuts) == (content, calls)
    assert read(name, text, list(range(len(text)))) == (content, calls)


@given(st.sampled_from(sorted(FORMATS)), st.text('<>{}/"\\: \nabtool_cl=functionparme', max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_read(name, text):
    assert read(name, text) == read(name, text, list(range(len(text))))


def test_arguments_are_told_while_they_come():
    reader = FORMATS["hermes"].reader(OFFER)
    parts = [part for letter in HERMES for part in reader.push(letter).parts]
    assert parts[0].name == "weather" and parts[0].arguments == ""
    assert len(parts) > 20
    assert {part.index for part in parts} == {0}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function=f><parameter=x>{% endif %}", "qwen3_coder"),
        ('{% if tools %}{"name": {{ name }}, "parameters": {{ a }}}{% endif %}', "llama3_json"),
        ("{{ messages }}", None),
    ],
)
def test_the_chat_template_tells_the_format(template, name):
    found = detect(template)
    assert (found and found.name) == name


def test_offers():
    assert read_offer(None, None, None) is None
    assert read_offer([], "auto", None) is None
    assert read_offer(TOOLS, "none", None) is None
    named = read_offer(TOOLS, {"type": "function", "function": {"name": "stop"}}, None)
    assert [tool.name for tool in named.callable] == ["stop"] and named.must and not named.parallel
    assert read_offer(TOOLS, "required", False).parallel is False
    assert not read_offer(TOOLS, "auto", None).must


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "code"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].function"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], None, "tools[0].function.parameters"),
        (TOOLS + TOOLS, None, "tools"),
        ([{"type": "function", "function": {"name": f"f{i}"}} for i in range(200)], None, "tools"),
        (None, "required", "tool_choice"),
        (TOOLS, "always", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "tool_choice"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice.type"),
    ],
)
def test_offers_that_cannot_be(tools, choice, param):
    with pytest.raises(InvalidRequest) as refused:
        read_offer(tools, choice, None)
    assert refused.value.param == param
