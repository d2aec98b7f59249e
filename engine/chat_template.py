"""Chat messages to the text that a model was trained on, by the Jinja template in its folder.

Owns the sandbox that a template runs in, the shape that messages must have, and the guard that keeps text typed by a
client from turning into control tokens. Knows no tokenizer and no ids.

Templates come with the checkpoint, never with a request. They are programs all the same: what one writes is bounded, and
so is the time it takes, which is looked at in every turn of its loops and macros. On an event loop it gets no more than a
moment; who is told TemplateTooSlow there tries again in a worker thread.

The guard puts a random mark behind the first character of every control token's spelling in the client's text, before
the template sees it: whatever the template does with that text, the spelling stays broken. The tokenizer then encodes
what lies between marks apart, and the marks vanish. The usual text has no such spelling, no mark, and its usual
encoding.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import ContextTooLong, InvalidCheckpoint, InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a request may set. `messages`, `tools`, the special tokens' names and helpers of the template stay out of reach.
OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "enable_thinking": bool,
    "thinking": bool,
    "thinking_budget": int,
    "reasoning_effort": (str, int),
    "date_string": str,
}
DEFAULT_MAX_CHARS = 1 << 24
BUDGET = 10.0  # seconds of processor time, which a busy machine does not use up, for a template; and on an event loop:
QUICK_BUDGET = 0.02
_MAX_DEPTH = 64
_MAX_REASON = 500
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Written by the application or by the model itself, whose own markup (<think>, <tool_call>) must come back as tokens.
_TRUSTED_ROLES = frozenset({"system", "developer", "assistant"})


class TemplateTooSlow(InvalidRequest):
    """The template did not come to its end in the time it has."""


class _Deadline(threading.local):
    """When the template that this thread renders must be done."""

    at = float("inf")

    def check(self) -> None:
        """Called by the template itself, in every turn of a loop and at every call of a macro."""
        if time.thread_time() > self.at:
            raise TemplateTooSlow("the model's chat template takes too long over these messages", param="messages")


_deadline = _Deadline()


class ChatTemplate:
    """The chat templates of one model, compiled. Safe to use from several threads.

    `sources` maps names to template texts: `default`, and perhaps `tool_use` for requests with tools. `names` are the
    special tokens as templates refer to them (`bos_token` and so on). `control` are the spellings of control tokens
    that no text of a request may form; `markup` those of tokens that belong to the template's structure although they
    are ordinary output of the model, closed to users and tools only. Raises InvalidCheckpoint for a template with a
    syntax error.
    """

    def __init__(
        self, sources: Mapping[str, str], names: Mapping[str, str], control: Iterable[str], markup: Iterable[str]
    ) -> None:
        self._templates = {name: _compile(name, source) for name, source in sources.items()}
        self._names = dict(names)
        self.slow = False  # it was too slow for an event loop once: render it elsewhere
        self._mark = f"\ue000{secrets.randbelow(10**16):016}\ue001"  # nobody outside can type it
        control = set(control)
        self._control = _any_of(control)
        self._closed = _any_of(control | set(markup))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
        max_chars: int = DEFAULT_MAX_CHARS,
    ) -> list[str]:
        """The rendered text, in pieces that are to be encoded apart (almost always one).

        Raises InvalidRequest naming `messages`, `tools` or `chat_template_kwargs`, with the template's own words where
        it refuses; ContextTooLong when the input or the output has more than `max_chars` characters.
        """
        chosen = _checked_options(options or {})
        add_generation_prompt = chosen.pop("add_generation_prompt", add_generation_prompt)
        resume = chosen.pop("continue_final_message", False)
        reader = _Reader(self, max_chars)
        conversation = reader.messages(messages)
        end = f"{self._mark[:-1]}\ue002"
        if resume:
            _mark_end(conversation, end)
        variables = self._names | chosen | {"messages": conversation, "tools": reader.tools(tools)}
        variables["add_generation_prompt"] = add_generation_prompt and not resume
        text = self._generate(self._choose(bool(tools)), variables, max_chars)
        if resume:
            text = _cut_at(text, end)
        return text.split(self._mark)

    def _choose(self, with_tools: bool) -> Template:
        wanted = ("tool_use", "default") if with_tools else ("default",)
        for name in wanted:
            if name in self._templates:
                return self._templates[name]
        raise InvalidRequest(
            f"this model has chat templates {sorted(self._templates)} and none is the default", param="messages"
        )

    def _generate(self, template: Template, variables: Mapping[str, Any], max_chars: int) -> str:
        pieces: list[str] = []
        left = max_chars
        on_loop = asyncio._get_running_loop() is not None
        _deadline.at = time.thread_time() + (QUICK_BUDGET if on_loop else BUDGET)
        try:
            for piece in template.generate(variables):
                left -= len(piece)
                if left < 0:
                    _too_long(max_chars)
                pieces.append(piece)
        except ContextTooLong:
            raise
        except TemplateTooSlow:
            self.slow = self.slow or on_loop
            raise
        except Exception as error:  # a template is a program: anything can come out of it
            reason = str(error).replace(self._mark, "")[:_MAX_REASON]
            raise InvalidRequest(f"the model's chat template refuses these messages: {reason}", param="messages") from error
        finally:
            _deadline.at = float("inf")
        return "".join(pieces)

    def guard(self, text: str, *, trusted: bool) -> str:
        """`text` with a mark inside every spelling of a control token, overlapping ones included."""
        pattern = self._control if trusted else self._closed
        pieces: list[str] = []
        start = 0
        while found := pattern.search(text, start):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
        return self._mark.join([*pieces, text[start:]]) if pieces else text


class _Reader:
    """Rebuilds one request's messages and tools out of guarded, plain JSON values, counting characters."""

    def __init__(self, template: ChatTemplate, max_chars: int) -> None:
        self._template = template
        self._max_chars = max_chars
        self._left = max_chars

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise InvalidRequest("messages must be a list of at least one message", param="messages")
        return [self._message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
        if not tools:
            return None  # templates ask `if tools`
        if isinstance(tools, str) or not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
            raise InvalidRequest("tools must be a list of objects", param="tools")
        return [self._value(tool, "tools", trusted=True) for tool in tools]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{where} must be an object", param="messages")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InvalidRequest(f"{where}.role must be a word such as user, assistant, system or tool", param="messages")
        trusted = role in _TRUSTED_ROLES
        plain: dict[str, Any] = {"role": role}
        for field in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if (text := message.get(field)) is not None:
                if not isinstance(text, str):
                    raise InvalidRequest(f"{where}.{field} must be a string", param="messages")
                plain[field] = self._text(text, where, trusted=trusted)
        if "reasoning" in plain:
            plain.setdefault("reasoning_content", plain["reasoning"])
        if calls := message.get("tool_calls"):
            plain["tool_calls"] = self._tool_calls(calls, f"{where}.tool_calls", trusted=trusted)
        content = _joined(message.get("content"), where)
        if content is None and "tool_calls" not in plain:
            raise InvalidRequest(
                f"{where}.content must be text; only an assistant message with tool_calls may go without",
                param="messages",
            )
        # None stays None: some templates tell a message with tool calls by it.
        plain["content"] = content if content is None else self._text(content, where, trusted=trusted)
        return plain

    def _tool_calls(self, calls: object, where: str, *, trusted: bool) -> list[Any]:
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise InvalidRequest(f"{where} must be a list of objects", param="messages")
        return [self._value(_with_parsed_arguments(call, where), where, trusted=trusted) for call in calls]

    def _value(self, value: object, where: str, *, trusted: bool, depth: int = 0) -> Any:
        """A copy of a JSON value: plain types only, because the sandbox does not know the methods of any others."""
        if depth > _MAX_DEPTH:
            raise InvalidRequest(f"{where} is nested more than {_MAX_DEPTH} levels deep", param=_root(where))
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self._text(value, where, trusted=trusted)
        if isinstance(value, Mapping):
            return {
                self._text(str(key), where, trusted=trusted): self._value(item, where, trusted=trusted, depth=depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._value(item, where, trusted=trusted, depth=depth + 1) for item in value]
        raise InvalidRequest(f"{where} contains a {type(value).__name__}, which is no JSON value", param=_root(where))

    def _text(self, text: str, where: str, *, trusted: bool) -> str:
        self._left -= len(text)
        if self._left < 0:
            _too_long(self._max_chars, _root(where))
        return self._template.guard(str(text), trusted=trusted)


def _root(where: str) -> str:
    return "tools" if where.startswith("tools") else "messages"


def _too_long(max_chars: int, param: str = "messages") -> NoReturn:
    raise ContextTooLong(f"the conversation has more than {max_chars} characters, too many to fit", param=param)


def _joined(content: object, where: str) -> str | None:
    """Message content as one string: text parts on lines of their own, as other servers join them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where}.content must be a string or a list of text parts", param="messages")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = repr(part.get("type"))[:64] if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequest(
                f'{where}.content: this model reads text only, {{"type": "text", "text": "..."}}; got a part of type {kind}',
                param="messages",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _with_parsed_arguments(call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The OpenAI API carries a call's arguments as JSON text; templates want the object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: function.arguments is not JSON: {error}", param="messages") from error
    return {**call, "function": {**function, "arguments": parsed}}


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidRequest(
                f"chat_template_kwargs takes {', '.join(OPTIONS)}; got {str(name)[:64]!r}", param="chat_template_kwargs"
            )
        kind = OPTIONS[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidRequest(f"chat_template_kwargs.{name} has the wrong type", param="chat_template_kwargs")
        if isinstance(value, str) and not re.fullmatch(r"[\w .,:/+-]{0,64}", value):
            raise InvalidRequest(f"chat_template_kwargs.{name} must be a short plain word", param="chat_template_kwargs")
    return dict(options)


def _mark_end(conversation: list[dict[str, Any]], end: str) -> None:
    last = conversation[-1]
    if last["role"] != "assistant" or not last["content"]:
        raise InvalidRequest("continue_final_message needs a last message by the assistant, with content", param="messages")
    last["content"] += end


def _cut_at(text: str, end: str) -> str:
    """`text` up to where the last message's content ends, without the end-of-turn tokens that the template adds."""
    head, found, _ = text.rpartition(end)
    if not found:
        raise InvalidRequest("this model's chat template does not show the last message's content", param="messages")
    return head


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds where any of `words` starts, branching letter by letter: the cost of a search does not grow
    with their number. Words of one letter are left out: nothing can be put inside them.
    """

    def branches(tails: Iterable[str]) -> str:
        by_letter: dict[str, set[str]] = {}
        for tail in tails:
            by_letter.setdefault(tail[0], set()).add(tail[1:])
        # Where a word ends the search can end too: a longer word with this beginning starts at the same place.
        parts = [re.escape(c) + ("" if "" in rest else branches(rest)) for c, rest in sorted(by_letter.items())]
        return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"

    words = [word for word in words if len(word) > 1]
    return re.compile(branches(words) if words else r"(?!)")


def _compile(name: str, source: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise InvalidCheckpoint(f"chat template {name!r}: {error.message} in line {error.lineno}") from error


def _is_large(operator: str, left: Any, right: Any) -> bool:
    """Whether `left * right` or `left ** right` could take for ever, or all memory: no look at the time would come between."""
    numbers = [side for side in (left, right) if isinstance(side, int | float)]
    if operator == "**":
        return len(numbers) < 2 or abs(left) > 1e6 or abs(right) > 16
    if len(numbers) == 2:
        return sum(number.bit_length() for number in numbers if isinstance(number, int)) > 4096
    text = right if numbers and numbers[0] is left else left
    return any(len(text) * number > 1 << 20 for number in numbers)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the helpers and whitespace rules that Hugging Face chat templates are written for."""
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what a trainer learns from; here its body is just text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PublicNamespace(Namespace):
        """A namespace object without attributes that Python itself would look up."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> PublicNamespace:
        made = PublicNamespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON for a prompt; Jinja's own filter escapes it for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Watched(CodeGenerator):
        """Compiles templates whose every block (of a loop, a macro, a condition) first looks at the time."""

        def blockvisit(self, nodes: Iterable[Node], frame: Frame) -> None:
            self.writeline("environment.check_time()")
            super().blockvisit(nodes, frame)

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = Watched
        intercepted_binops = frozenset(["*", "**"])

        def check_time(self) -> None:
            _deadline.check()

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _is_large(operator, left, right):
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": namespace}
    return environment
