"""OpenAI request bodies, read: bytes or dictionaries in, a `Call` or an InvalidRequest that names the field out.

Types are strict (a bool is no int, "1" is no number) and null means absent. Fields that nobody knows are ignored and
logged once; fields that are known but would change the output in a way this engine does not support are refused. Ranges
of sampling parameters belong to `engine.types`; here they are only renamed to what the caller wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.errors import InvalidRequest
from engine.formats import Constraint, read_constraint
from engine.replies import Shape
from engine.tools import Offer, read_calls, read_offer
from engine.types import MAX_LOGIT_BIAS, SamplingParams, Tenant
from engine.wire import clean_text, convert, required, unsupported

log = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
COMPLETION_TOKENS = 16  # default max_tokens of the completions API
MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # n times the number of prompts
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_PROMPT_TOKENS = 1 << 20
SMALL_PROMPT = 4096  # characters, or token ids
FEW_PIECES = 16  # messages or prompts

_TENANTS: dict[str, Tenant | None] = {
    "auto": None,
    "default": Tenant.ONLINE,
    "priority": Tenant.ONLINE,
    "scale": Tenant.ONLINE,
    "fast": Tenant.ONLINE,
    "flex": Tenant.OFFLINE,
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Prompts = tuple[str | tuple[int, ...], ...]
Messages = tuple[Mapping[str, Any], ...]


class Body(msgspec.Struct):
    """The fields that both endpoints share, as they appear on the wire."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    service_tier: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_colocation: bool | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    temperature: float | None = None
    top_k: Int64 | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int64 | None = None
    n: Int64 | None = None
    best_of: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int64] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Int64 | None = None
    allowed_token_ids: list[Int64] | None = None
    bad_words: list[str] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatBody(Body):
    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Body):
    prompt: str | list[Any] | None = None
    echo: bool | None = None
    logprobs: Int64 | None = None


# Fields of `Body` that are fields of SamplingParams by the same name and type.
_COPIED = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
)

# Fields whose effect is missing here, each with the values that ask for nothing and therefore pass.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "regex": (),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
# Known, and without effect on what this engine puts out.
_INERT = {
    "include_reasoning",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "spaces_between_special_tokens",
    "store",
    "user",
    "verbosity",
}
_MAX_REPORTED = 256
_reported: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was understood. One of `messages` and `prompts` is set; `tenant` None lets the model say."""

    shape: Shape
    params: SamplingParams
    model: str | None
    tenant: Tenant | None
    stream: bool
    messages: Messages | None = None
    prompts: Prompts = ()
    template_kwargs: Mapping[str, Any] | None = None
    priority: int = 0
    cache_salt: str = ""
    constraint: Constraint | None = None  # what `params.grammar` was made from
    offer: Offer | None = None
    chars: int = 0  # characters to render and tokenize

    @property
    def small(self) -> bool:
        """Whether it can be started within a millisecond or so."""
        ids = sum(len(prompt) for prompt in self.prompts if not isinstance(prompt, str))
        return self.chars + ids <= SMALL_PROMPT and len(self.messages or self.prompts) <= FEW_PIECES


def _size(messages: Messages | None = None, prompts: Prompts = (), offer: Offer | None = None, **_: Any) -> int:
    """Characters of a call's content."""
    if messages is None:
        return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    offered = sum(len(str(tool.body)) for tool in offer.tools) if offer is not None else 0
    return offered + sum(map(_chars, messages))


def _chars(message: Mapping[str, Any]) -> int:
    calls = message.get("tool_calls", ())
    return len(message["content"] or "") + sum(len(call["function"]["arguments"]) for call in calls)


def parse(url: str, body: Mapping[str, Any], *, tenant: Tenant | None = None) -> Call:
    """Understand the body of a request to `url`. A `tenant` given here wins over the body's `service_tier`."""
    if url == CHAT:
        return _parse_chat(body, tenant)
    if url == COMPLETIONS:
        return _parse_completion(body, tenant)
    raise InvalidRequest(f"url must be {CHAT} or {COMPLETIONS}", param="url", code="unsupported_url")


def _parse_chat(body: Mapping[str, Any], tenant: Tenant | None) -> Call:
    wire = convert(body, ChatBody)
    _check_fields(body, wire, _UNSUPPORTED | {"echo": (False,)})
    if wire.top_logprobs is not None and not wire.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    newer = wire.max_completion_tokens is not None
    params = _params(
        wire,
        {"logprobs": "top_logprobs", "max_tokens": "max_completion_tokens" if newer else "max_tokens"},
        max_tokens=wire.max_completion_tokens if newer else wire.max_tokens,
        logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
    )
    shape = _shape(wire, chat=True, logprobs=bool(wire.logprobs))
    messages = read_messages(wire.messages)
    offer = read_offer(wire.tools, wire.tool_choice, wire.parallel_tool_calls)
    return _call(wire, params, shape, tenant, messages=messages, template_kwargs=_template_kwargs(wire), offer=offer)


def _parse_completion(body: Mapping[str, Any], tenant: Tenant | None) -> Call:
    wire = convert(body, CompletionBody)
    _check_fields(body, wire, _UNSUPPORTED | {"tools": ([],), "tool_choice": ("none", "auto")})
    limit = COMPLETION_TOKENS if wire.max_tokens is None else wire.max_tokens
    echo = bool(wire.echo)
    no_output = echo and limit == 0
    extra: dict[str, Any] = {}
    if echo and wire.logprobs is not None:  # one forward pass serves both; the echo shows at least what was asked for
        extra["prompt_logprobs"] = max(wire.logprobs, wire.prompt_logprobs or 0)
    params = _params(wire, {}, max_tokens=1 if no_output else limit, logprobs=wire.logprobs, **extra)
    shape = _shape(wire, chat=False, logprobs=wire.logprobs is not None, echo=echo, no_output=no_output)
    prompts = read_prompts(wire.prompt)
    if params.n * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(f"n times the number of prompts must not exceed {MAX_CHOICES}", param="n")
    return _call(wire, params, shape, tenant, prompts=prompts)


def _call(wire: Body, params: SamplingParams, shape: Shape, tenant: Tenant | None, **content: Any) -> Call:
    constraint = read_constraint(wire)
    return Call(
        shape=shape,
        params=params if constraint is None else replace(params, grammar=constraint.grammar),
        constraint=constraint,
        model=None if wire.model is None else clean_text(wire.model, "model"),
        tenant=tenant or _tenant(wire.service_tier),
        stream=bool(wire.stream),
        priority=wire.priority or 0,
        cache_salt=clean_text(wire.cache_salt or "", "cache_salt"),
        chars=_size(**content),
        **content,
    )


def _tenant(tier: str | None) -> Tenant | None:
    if tier is None:
        return None
    if tier not in _TENANTS:
        raise InvalidRequest(f"service_tier must be one of {', '.join(_TENANTS)}", param="service_tier")
    return _TENANTS[tier]


def _check_fields(body: Mapping[str, Any], wire: Body, refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what would be lost silently; report once what nobody knows."""
    known = wire.__struct_fields__
    for name, value in body.items():
        if name in refused:
            if value is not None and not any(type(value) is type(ok) and value == ok for ok in refused[name]):
                raise unsupported(name)
        elif name not in known and name not in _INERT and name not in _reported and len(_reported) < _MAX_REPORTED:
            _reported.add(name)
            log.info("ignoring the unknown request field %r (reported once)", name[:64])
    if wire.best_of is not None and wire.best_of != (wire.n or 1):
        raise unsupported("best_of", "best_of other than n is not supported")


def _shape(wire: Body, *, chat: bool, logprobs: bool, echo: bool = False, no_output: bool = False) -> Shape:
    options = wire.stream_options or {}
    if options and not wire.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    wanted = {
        name: convert(options.get(name), bool | None, f"stream_options.{name}")  # type: ignore[arg-type]
        for name in ("include_usage", "continuous_usage_stats")
    }
    return Shape(
        chat=chat,
        n=wire.n or 1,
        logprobs=logprobs,
        prompt_logprobs=wire.prompt_logprobs is not None,
        echo=echo,
        no_output=no_output,
        token_ids=bool(wire.return_token_ids),
        colocation=bool(wire.return_colocation),
        include_usage=bool(wanted["include_usage"]),
        continuous_usage=bool(wanted["include_usage"] and wanted["continuous_usage_stats"]),
    )


def _params(wire: Body, names: Mapping[str, str], **values: Any) -> SamplingParams:
    """The sampling parameters; `names` maps our field names to those the caller used."""
    fields = {name: value for name in _COPIED if (value := getattr(wire, name)) is not None} | values
    stop = [wire.stop] if isinstance(wire.stop, str) else wire.stop or []
    params = SamplingParams(
        stop=tuple(clean_text(text, "stop") for text in stop),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
        logit_bias=_logit_bias(wire.logit_bias or {}),
        allowed_token_ids=None if wire.allowed_token_ids is None else tuple(wire.allowed_token_ids),
        bad_words=tuple(clean_text(text, "bad_words") for text in wire.bad_words or ()),
        **fields,
    )
    try:
        params.validate()
    except InvalidRequest as error:
        if error.param is None or error.param not in names:
            raise
        name = names[error.param]
        raise InvalidRequest(str(error).replace(error.param, name, 1), param=name, code=error.code) from None
    return params


def _logit_bias(table: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if len(table) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} entries", param="logit_bias")
    for key in table:
        if len(key) > 10 or not (key.isascii() and key.isdigit()):
            raise InvalidRequest(f"logit_bias: {key[:20]!r} is not a token id", param="logit_bias")
    return tuple((int(key), bias) for key, bias in table.items())


def _template_kwargs(wire: ChatBody) -> Mapping[str, Any] | None:
    """Switches of the chat template; which of them a request may set is the business of `engine.chat_template`."""
    kwargs = dict(wire.chat_template_kwargs or {})
    for name in ("reasoning_effort", "add_generation_prompt", "continue_final_message"):
        if (value := getattr(wire, name)) is not None:
            kwargs[name] = value
    return kwargs or None


def read_messages(messages: list[dict[str, Any]] | None) -> Messages:
    """Chat messages with their content as one string each, or none beside tool calls."""
    if not messages:
        raise required("messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages takes at most {MAX_MESSAGES} entries", param="messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        if role == "function":
            raise unsupported(f"{where}.role", "function messages are not supported; use tools")
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    for name in ("function_call", "audio"):
        if message.get(name):
            raise unsupported(f"{where}.{name}")
    read: dict[str, Any] = {"role": _ROLES[role]}
    if role == "assistant" and message.get("tool_calls"):
        read["tool_calls"] = read_calls(message["tool_calls"], f"{where}.tool_calls")
    content = message.get("content")
    read["content"] = None if content is None and "tool_calls" in read else _content(content, f"{where}.content")
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            read[name] = clean_text(convert(message[name], str, f"{where}.{name}"), f"{where}.{name}")
    return read


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return clean_text(content, where)
    if content is None:
        raise required(where)
    parts = convert(content, list[dict[str, Any]], where)
    if not 0 < len(parts) <= MAX_PARTS:
        raise InvalidRequest(f"{where} must have 1 to {MAX_PARTS} parts", param=where)
    texts = []
    for index, part in enumerate(parts):
        if part.get("type") != "text":
            raise unsupported(f"{where}[{index}].type", "only text content is supported")
        texts.append(convert(part.get("text"), str, f"{where}[{index}].text"))
    return clean_text("\n".join(texts), where)


def read_prompts(prompt: str | list[Any] | None) -> Prompts:
    """The prompts of a completion: one string, several, one list of token ids, or several."""
    if not prompt:
        raise required("prompt")
    if isinstance(prompt, str):
        return (clean_text(prompt, "prompt"),)
    if isinstance(prompt[0], int):
        return (_token_ids(prompt, "prompt"),)
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MAX_PROMPTS} prompts", param="prompt")
    if isinstance(prompt[0], list):
        rows = convert(prompt, list[list[Any]], "prompt")
        return tuple(_token_ids(row, f"prompt[{index}]") for index, row in enumerate(rows))
    texts = convert(prompt, list[str], "prompt")
    if not all(texts):
        raise required(f"prompt[{texts.index('')}]")
    return tuple(clean_text(text, "prompt") for text in texts)


def _token_ids(tokens: list[Any], where: str) -> tuple[int, ...]:
    if not tokens:
        raise required(where)
    if len(tokens) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"{where} has too many tokens", param=where, code="context_length_exceeded")
    return convert(tokens, tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], where)
