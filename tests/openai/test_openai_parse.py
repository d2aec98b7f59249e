"""Reading requests: every parameter's types and ranges, the forms of prompts and messages, and hostile JSON."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import MESSAGES

from engine.calls import CHAT, COMPLETIONS, Call, parse
from engine.errors import InvalidRequest
from engine.types import Grammar, Tenant
from engine.wire import decode

CHAT_BODY = {"messages": MESSAGES}
TEXT_BODY = {"prompt": "a"}


def refused(url: str, body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(url, body)
    return caught.value


# name, what is accepted (value on the wire, value in SamplingParams), what is refused
PARAMETERS: list[tuple[str, list[tuple[Any, Any]], list[Any]]] = [
    ("temperature", [(0, 0), (2, 2), (0.5, 0.5)], [-0.1, 2.1, "1", True, float("nan"), float("inf"), [], 10**400]),
    ("top_p", [(1, 1), (0.1, 0.1)], [0, -1, 1.1, "x", False]),
    ("top_k", [(-1, -1), (0, 0), (40, 40)], [-2, 1.5, 2**63, True, "3"]),
    ("min_p", [(0, 0), (1, 1)], [-0.1, 1.1, True]),
    ("repetition_penalty", [(1, 1), (10, 10)], [0, -1, 11, True]),
    ("presence_penalty", [(-2, -2), (2, 2)], [-2.1, 2.1, "0"]),
    ("frequency_penalty", [(-2, -2), (2, 2)], [-2.1, 2.1, "0"]),
    ("seed", [(0, 0), (-(2**63), -(2**63)), (2**63 - 1, 2**63 - 1)], [2**63, 10**5000, 1.5, True]),
    ("n", [(1, 1), (128, 128)], [0, -1, 129, 10**9, 2**63, True, 1.5, "1"]),
    ("max_tokens", [(1, 1), (10**6, 10**6)], [0, -1, 2**63, True, 1.5, "1"]),
    ("min_tokens", [(0, 0), (5, 5)], [-1, 2**63, True]),
    ("stop", [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ())], ["", [""], ["x"] * 17, ["x" * 257], 5, [None], "\ud800"]),
    ("stop_token_ids", [([1, 2], (1, 2))], [[-1], ["1"], [True], 5, [2**64], [0] * 1025]),
    ("logit_bias", [({"5": 1}, ((5, 1),)), ({"7": -100}, ((7, -100),))],
     [{"x": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, {"9" * 5000: 1}, [], {"²": 1}, {str(i): 0 for i in range(1025)}]),
    ("ignore_eos", [(True, True), (False, False)], [1, "true"]),
    ("include_stop_str_in_output", [(True, True)], [0]),
    ("prompt_logprobs", [(0, 0), (20, 20)], [-1, 21, True]),
]  # fmt: skip


@pytest.mark.parametrize("url, base", [(CHAT, CHAT_BODY), (COMPLETIONS, TEXT_BODY)], ids=["chat", "text"])
@pytest.mark.parametrize("name, good, bad", PARAMETERS, ids=[row[0] for row in PARAMETERS])
def test_parameter(url: str, base: dict[str, Any], name: str, good: list[tuple[Any, Any]], bad: list[Any]) -> None:
    extra = {"max_tokens": 20} if name == "min_tokens" else {}
    for value, expected in good:
        assert getattr(parse(url, base | extra | {name: value}).params, name) == expected
    for value in bad:
        error = refused(url, base | {name: value})
        assert (error.param or "").split("[")[0] == name, (value, error)
        assert len(str(error)) < 400
    assert parse(url, base | {name: None}) == parse(url, base), "null means absent"


@pytest.mark.parametrize("value", [0, -1, True, 2**63, "5"])
def test_the_newer_name_of_max_tokens_is_the_one_in_its_errors(value: Any) -> None:
    error = refused(CHAT, CHAT_BODY | {"max_completion_tokens": value})

    assert error.param == "max_completion_tokens"
    assert "max_completion_tokens" in str(error)


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert parse(CHAT, CHAT_BODY | {"max_tokens": 7, "max_completion_tokens": 9}).params.max_tokens == 9


def test_defaults_of_max_tokens() -> None:
    assert parse(CHAT, CHAT_BODY).params.max_tokens is None
    assert parse(COMPLETIONS, TEXT_BODY).params.max_tokens == 16


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("ab", ("ab",)),
        (["ab", "c"], ("ab", "c")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_forms_of_prompts(prompt: Any, expected: Any) -> None:
    assert parse(COMPLETIONS, {"prompt": prompt}).prompts == expected


@pytest.mark.parametrize(
    "prompt, param",
    [
        ("", "prompt"),
        ([], "prompt"),
        (None, "prompt"),
        ([[]], "prompt[0]"),
        (["a", ""], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([True], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([2**31], "prompt[0]"),
        ([[1], 2], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([1.5], "prompt[0]"),
        ({"a": 1}, "prompt"),
        (5, "prompt"),
        ("\ud800", "prompt"),
        (["a"] * 1025, "prompt"),
    ],
)
def test_bad_prompts(prompt: Any, param: str) -> None:
    assert refused(COMPLETIONS, {"prompt": prompt}).param == param


def test_choices_in_all_are_bounded() -> None:
    assert refused(COMPLETIONS, {"prompt": ["a"] * 100, "n": 11}).param == "n"


def test_messages_become_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "kim"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]

    assert parse(CHAT, {"messages": messages}).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "kim"},
        {"role": "assistant", "content": "c"},
    )


@pytest.mark.parametrize(
    "messages, param",
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "tool"}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "\udfff"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([*MESSAGES, {"role": "user", "content": None}], "messages[1].content"),
        (MESSAGES * 4097, "messages"),
    ],
)
def test_bad_messages(messages: Any, param: str) -> None:
    assert refused(CHAT, {"messages": messages}).param == param


@pytest.mark.parametrize(
    "name, value",
    [
        ("functions", [{}]),
        ("guided_decoding_backend", "outlines"),
        ("ebnf", 'root ::= "a"'),
        ("best_of", 2),
        ("use_beam_search", True),
        ("logits_processors", ["x"]),
        ("prompt_embeds", "x"),
        ("chat_template", "{{ x }}"),
        ("skip_special_tokens", False),
        ("skip_special_tokens", 1),
        ("echo", True),
        ("audio", {}),
        ("modalities", ["audio"]),
    ],
)
def test_what_is_not_supported_is_said(name: str, value: Any) -> None:
    error = refused(CHAT, CHAT_BODY | {name: value})

    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"best_of": 1},
        {"n": 3, "best_of": 3},
        {"guided_json": None, "structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "disable_fallback": True}},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "verbosity": "low"},
        {"parallel_tool_calls": True, "prompt_cache_key": "k"},
        {"a_field_of_next_year": {"deep": [1]}},
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_asks_for_nothing_passes(extra: dict[str, Any]) -> None:
    assert parse(CHAT, CHAT_BODY | extra).messages == tuple(MESSAGES)


def test_unknown_fields_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    for _ in range(3):
        parse(CHAT, CHAT_BODY | {"reported_once\n": 1})

    assert [record.getMessage() for record in caplog.records] == [
        "ignoring the unknown request field 'reported_once\\n' (reported once)"
    ]


@pytest.mark.parametrize(
    "tier, tenant",
    [
        (None, None),
        ("auto", None),
        ("default", Tenant.ONLINE),
        ("priority", Tenant.ONLINE),
        ("flex", Tenant.OFFLINE),
    ],
)
def test_service_tier(tier: str | None, tenant: Tenant | None) -> None:
    assert parse(CHAT, CHAT_BODY | {"service_tier": tier}).tenant is tenant
    assert parse(CHAT, CHAT_BODY | {"service_tier": tier}, tenant=Tenant.OFFLINE).tenant is Tenant.OFFLINE


@pytest.mark.parametrize(
    "extra, param",
    [
        ({"service_tier": "gold"}, "service_tier"),
        ({"service_tier": 1}, "service_tier"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"model": 5}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"priority": True}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_other_bad_chat_fields(extra: dict[str, Any], param: str) -> None:
    assert refused(CHAT, CHAT_BODY | extra).param == param


@pytest.mark.parametrize("value", [True, -1, 21, "1", 1.5])
def test_completion_logprobs_is_a_small_integer(value: Any) -> None:
    assert refused(COMPLETIONS, TEXT_BODY | {"logprobs": value}).param == "logprobs"


def test_no_output_needs_an_echo() -> None:
    assert parse(COMPLETIONS, TEXT_BODY | {"max_tokens": 0, "echo": True}).shape.no_output
    assert refused(COMPLETIONS, TEXT_BODY | {"max_tokens": 0}).param == "max_tokens"


def test_unknown_url() -> None:
    assert refused("/v1/embeddings", {}).code == "unsupported_url"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "extra, kind, text, param",
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}', "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
            "json_schema",
            json.dumps(SCHEMA),
            "response_format",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", json.dumps(SCHEMA), "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}', "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "é"]}}, "choice", '["a", "é"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"', "structured_outputs.grammar"),
        ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA), "guided_json"),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a"]}, "choice", '["a"]', "guided_choice"),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"', "guided_grammar"),
    ],
)
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_constraints(url: str, extra: dict[str, Any], kind: str, text: str, param: str) -> None:
    call = parse(url, (CHAT_BODY if url == CHAT else TEXT_BODY) | extra)

    assert call.params.grammar == Grammar(kind, text)  # type: ignore[arg-type]
    assert call.constraint is not None and call.constraint.param == param


@pytest.mark.parametrize(
    "extra, param",
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"guided_json": json.loads('{"not":' * 70 + "{}" + "}" * 70)}, "guided_json"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
    ],
)
def test_constraints_that_cannot_be(extra: dict[str, Any], param: str) -> None:
    assert refused(CHAT, CHAT_BODY | extra).param == param


def test_tools_and_what_came_of_them() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    call = parse(CHAT, {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]})

    assert call.messages == tuple(messages)
    assert call.offer is not None and [tool.name for tool in call.offer.tools] == ["f"]
    assert refused(COMPLETIONS, TEXT_BODY | {"tools": [{"type": "function"}]}).code == "unsupported_parameter"


@pytest.mark.parametrize(
    "raw, param, code",
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b'"x"', None, "invalid_json"),
        (b'{"a":1}x', None, "invalid_json"),
        (b'\xef\xbb\xbf{"a":1}', None, "invalid_json"),
        (b'{"a":"\xff"}', None, "invalid_json"),
        (b'{"a":"\\ud800"}', None, "invalid_json"),
        (b'{"a":NaN}', None, "invalid_json"),
        (b'{"a":Infinity}', None, "invalid_json"),
        (b'{"a":' + b"9" * 100_000 + b"}", "a", "invalid_value"),
        (b'{"a":1,"b":1e999}', "b", "invalid_value"),
        (b'{"a":' + b"[" * 1_000_000, None, "invalid_json"),
        (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", None, "invalid_json"),
        (b'{"a":[' + b"[]," * 300_000 + b"1]}", None, "invalid_json"),
        (b'{"a":[' + b"1," * 1_100_000 + b"1]}", None, "invalid_json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None, "invalid_json"),
    ],
)
def test_hostile_json(raw: bytes, param: str | None, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(raw)

    assert (caught.value.param, caught.value.code) == (param, code)
    assert len(str(caught.value)) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [row[0] for row in PARAMETERS]
FIELDS += ["messages", "prompt", "model", "stream", "stream_options", "service_tier", "logprobs", "top_logprobs", "tools"]
FIELDS += ["max_completion_tokens", "chat_template_kwargs", "echo", "best_of", "priority", "cache_salt", "response_format"]
FIELDS += ["structured_outputs", "guided_json", "guided_choice", "tool_choice", "bad_words", "allowed_token_ids"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6), st.sampled_from([CHAT, COMPLETIONS]), st.booleans())
def test_any_object_is_understood_or_refused(body: dict[str, Any], url: str, valid_prompt: bool) -> None:
    if valid_prompt:
        body = body | (CHAT_BODY if url == CHAT else TEXT_BODY)
    try:
        assert isinstance(parse(url, body), Call)
    except InvalidRequest as error:
        assert len(str(error)) < 1000


@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(decode(raw), dict)
