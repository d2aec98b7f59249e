"""Calls of tools as models write them: the grammar that has a model write some, and the reader that finds them in growing text.

A format is what a family of models was trained on:

    hermes        <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>     Hermes 2 Pro, Qwen2.5, Qwen3
    llama3_json   {"name": "f", "parameters": {...}}, several behind ";"            Llama 3.1 and later
    qwen3_coder   <tool_call>\\n<function=f>\\n<parameter=x>\\n...\\n</parameter>\\n</function>\\n</tool_call>     Qwen3-Coder

The same reader makes a whole answer and a stream. Text that turns out to be no call is content, word for word; white space
beside a call is neither.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.tools import Offer, Tool

Json = dict[str, Any]

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of call number `index`: its id and name first, then its arguments as JSON text, bit by bit."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def body(self) -> Json:
        """As an entry of a delta's `tool_calls`."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Found:
    """What new text turned out to be."""

    content: str = ""
    parts: list[CallPart] = field(default_factory=list)


class Reader(Protocol):
    """One choice's text, read as it grows."""

    @property
    def num_calls(self) -> int: ...

    def push(self, text: str, *, last: bool = False) -> Found: ...


def whole_calls(parts: list[CallPart]) -> list[Json]:
    """The `tool_calls` of a finished message."""
    calls: list[Json] = []
    for part in parts:
        if part.name is not None:
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}})
        else:
            calls[part.index]["function"]["arguments"] += part.arguments
    return calls


class _Calls:
    """Numbers calls and gathers what was found; holds white space back until it is known what stands beside it."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._found = Found()
        self._space = ""
        self._said = False  # content since the last call

    def _say(self, text: str) -> None:
        stripped = text.rstrip()
        if stripped:
            space = self._space if self._said or not self.num_calls else ""
            self._found.content += space + (stripped if self._said or not self.num_calls else stripped.lstrip())
            self._said, self._space = True, ""
        self._space += text[len(stripped) :]

    def _start(self, name: str) -> None:
        self._space, self._said = "", False
        self._found.parts.append(CallPart(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.num_calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._found.parts.append(CallPart(self.num_calls - 1, arguments=text))

    def _take(self, *, last: bool) -> Found:
        if last and not self.num_calls:
            self._found.content += self._space
        found, self._found = self._found, Found()
        return found


class _CallObject:
    """`{"name": "f", "arguments": {...}}`, read character by character; arguments are handed on as they come."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.done = False
        self.bad = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._word = ""  # the string being read between the outermost braces
        self._key: str | None = None
        self._capturing = False
        self._captured = ""  # arguments not taken yet
        self._taken = False

    def push(self, text: str) -> int:
        """Read on; how many characters of `text` belong to the object."""
        for place, letter in enumerate(text):
            self._read(letter)
            if self.bad:
                return place
            self.raw += letter
            if self.done:
                return place + 1
        return len(text)

    def take_arguments(self) -> str:
        """Arguments that came since the last time. What is no object is told when it is whole."""
        text = self._captured
        if not self._taken and not text.startswith("{"):
            if not self.done:
                return ""
            if text.startswith('"'):  # an object in a string, which some models write
                text = _unquoted(text)
            text = "{}" if text in ("", "null") else text
        self._taken = self._taken or bool(text)
        self._captured = ""
        return text

    def _read(self, letter: str) -> None:
        if self._in_string:
            self._read_string(letter)
        elif letter == '"':
            self.bad = not self._depth
            self._in_string, self._word = True, letter
            self._keep(letter)
        elif letter in "{[":
            self.bad = not self._depth and letter != "{"
            self._depth += 1
            self._keep(letter)
        elif letter in "}]":
            self._close(letter)
        elif self._depth == 1 and letter == ",":
            self._key, self._capturing = None, False
        elif self._depth == 1 and letter == ":":
            self._capturing = self._key in ("arguments", "parameters")
        elif letter.isspace():
            if self._depth > 1:
                self._keep(letter)
        else:
            self.bad = not self._depth
            self._keep(letter)

    def _read_string(self, letter: str) -> None:
        self._keep(letter)
        if self._depth == 1 and not self._capturing:
            self._word += letter
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            self._in_string = False
            if self._depth == 1 and not self._capturing:
                if self._key is None:
                    self._key = _unquoted(self._word)
                elif self._key == "name":
                    self.name = _unquoted(self._word)

    def _close(self, letter: str) -> None:
        if self._depth == 1:
            self.done, self.bad = letter == "}", letter != "}"
        elif self._depth > 1:
            self._depth -= 1
            self._keep(letter)
        else:
            self.bad = True

    def _keep(self, letter: str) -> None:
        if self._capturing:
            self._captured += letter


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return text[1:-1]
    return value if isinstance(value, str) else text


class _Tagged(_Calls):
    """Text with calls between tags; what stands between them is the subclass's to read."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = ""
        self._inside = False

    def push(self, text: str, *, last: bool = False) -> Found:
        self._rest += text
        while self._rest:
            before = len(self._rest), self._inside
            if self._inside:
                self._read_call(last)
            else:
                self._read_content(last)
            if (len(self._rest), self._inside) == before:
                break
        if last:
            self._end()
        return self._take(last=last)

    def _read_content(self, last: bool) -> None:
        at = self._opening()
        if at < 0:
            keep = 0 if last else overlap(self._rest, OPEN)
            self._say(self._rest[: len(self._rest) - keep])
            self._rest = self._rest[len(self._rest) - keep :]
            return
        self._say(self._rest[:at])
        self._rest = self._rest[at:].removeprefix(OPEN)
        self._inside = True

    def _opening(self) -> int:
        return self._rest.find(OPEN)

    def _read_call(self, last: bool) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """The output is over."""


class HermesReader(_Tagged):
    """A JSON object between the tags. What is none, or has no name, is content with its tags."""

    def __init__(self) -> None:
        super().__init__()
        self._object: _CallObject | None = _CallObject()
        self._started = False

    def _read_call(self, last: bool) -> None:
        if self._object is None:
            self._skip_to_close(last)
            return
        call = self._object
        self._rest = self._rest[call.push(self._rest) :]
        if call.bad:
            if not self._started:
                self._say(OPEN + call.raw)
                self._object, self._started, self._inside = _CallObject(), False, False
            else:
                self._object = None
            return
        if call.name is not None and not self._started:
            self._start(call.name)
            self._started = True
        if self._started:
            self._argue(call.take_arguments())
        if call.done:
            if not self._started:  # JSON, but not of a call
                self._say(OPEN + call.raw)
                self._inside, self._object = False, _CallObject()
            else:
                self._object = None

    def _skip_to_close(self, last: bool) -> None:
        at = self._rest.find(CLOSE)
        if at >= 0:
            self._rest = self._rest[at + len(CLOSE) :]
            self._inside, self._object, self._started = False, _CallObject(), False
        else:
            self._rest = "" if last else self._rest[len(self._rest) - overlap(self._rest, CLOSE) :]

    def _end(self) -> None:
        if self._inside and not self._started and self._object is not None:
            self._say(OPEN + self._object.raw)


class Llama3Reader(_Calls):
    """The answer is calls from its first letter on, or none at all. Only names that were offered make one."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self._held = ""  # white space or a separator before a call
        self._object: _CallObject | None = None
        self._started = False
        self._plain = False

    def push(self, text: str, *, last: bool = False) -> Found:
        while text and not self._plain:
            text = self._read_between(text) if self._object is None else self._read_object(self._object, text)
        if self._plain:
            self._say(text)
        elif last and self._object is not None and not self._started:
            self._say(self._held + self._object.raw)
        return self._take(last=last)

    def _read_between(self, text: str) -> str:
        head = text.lstrip("; \n\t\r" if self.num_calls else None)
        self._held += text[: len(text) - len(head)]
        if head.startswith("{"):
            self._object, self._started = _CallObject(), False
        elif head:
            self._plain, head, self._held = True, self._held + head if not self.num_calls else head, ""
        return head

    def _read_object(self, call: _CallObject, text: str) -> str:
        text = text[call.push(text) :]
        if not self._started and call.name in self._names:
            assert call.name is not None
            self._start(call.name)
            self._started = True
        if self._started:
            self._argue(call.take_arguments())
        elif call.done or call.bad or call.name is not None:
            self._plain, text = True, self._held + call.raw + text
        if (call.done or call.bad) and self._started:
            self._object, self._held = None, ""
            self._plain = call.bad
        return text


class Qwen3CoderReader(_Tagged):
    """Values are text; what the schema says is no string is read as JSON."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        super().__init__()
        self._tools = tools
        self._name: str | None = None
        self._num_arguments = 0
        self._searched = 0  # of `_rest`, without finding the end of a value

    def _opening(self) -> int:
        places = [at for mark in (OPEN, "<function=") if (at := self._rest.find(mark)) >= 0]
        return min(places, default=-1)

    def _read_content(self, last: bool) -> None:
        if not last and self._opening() < 0 and (keep := overlap(self._rest, "<function=")):
            held = self._rest[len(self._rest) - keep :]
            self._say(self._rest[: len(self._rest) - keep])
            self._rest = held
            return
        super()._read_content(last)

    def _read_call(self, last: bool) -> None:
        if self._name is None:
            self._read_name(last)
        else:
            self._read_argument(last)

    def _read_name(self, last: bool) -> None:
        head = self._rest.lstrip()
        if head.startswith(CLOSE):  # the end of the call before, or of nothing
            self._rest, self._inside = head[len(CLOSE) :], False
            return
        if head.startswith("<function=") and (end := head.find(">")) > 0:
            self._name = head[len("<function=") : end].strip().strip('"')
            self._start(self._name)
            self._argue("{")
            self._num_arguments, self._searched = 0, 0
            self._rest = head[end + 1 :]
        elif last or not (head.startswith("<function=") or "<function=".startswith(head) or CLOSE.startswith(head)):
            self._say(OPEN + self._rest if not self.num_calls else self._rest)
            self._rest, self._inside = "", False

    def _read_argument(self, last: bool) -> None:
        head = self._rest.lstrip() if not self._searched else self._rest
        if head.startswith("</function>"):
            self._finish_call()
            self._rest = head[len("</function>") :]
        elif head.startswith("<parameter=") and (end := head.find(">")) > 0:
            self._rest = head
            self._read_value(head[len("<parameter=") : end].strip().strip('"'), end + 1, last)
        elif last or (head and not any(_may_start(head, mark) for mark in ("</function>", "<parameter="))):
            self._rest = "" if last else head[1:]  # nothing that belongs here

    def _read_value(self, key: str, start: int, last: bool) -> None:
        marks = ("</parameter>", "</function>", "<parameter=")
        begin = max(start, self._searched)
        at, mark = min(((at, mark) for mark in marks if (at := self._rest.find(mark, begin)) >= 0), default=(-1, ""))
        if at < 0:
            self._searched = max(start, len(self._rest) - len("</parameter>"))
            return
        value = self._rest[start:at].removeprefix("\n").removesuffix("\n")
        self._argue((", " if self._num_arguments else "") + f"{json.dumps(key)}: {self._converted(key, value)}")
        self._num_arguments += 1
        self._searched = 0
        self._rest = self._rest[at + len(mark) if mark == "</parameter>" else at :]

    def _converted(self, key: str, value: str) -> str:
        tool = self._tools.get(self._name or "")
        schema = (tool.parameters.get("properties") or {}).get(key) if tool is not None else None
        if not isinstance(schema, dict) or _is_text(schema):
            return json.dumps(value, ensure_ascii=False)
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            return json.dumps(value, ensure_ascii=False)

    def _finish_call(self) -> None:
        self._argue("}")
        self._name = None


def _may_start(text: str, mark: str) -> bool:
    return text.startswith(mark) or mark.startswith(text)


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether values of this schema are written as they are, without quotes."""
    return schema.get("type") == "string" or (
        "type" not in schema and all(isinstance(value, str) for value in schema.get("enum", ())) and "enum" in schema
    )


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` and is not all of it."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


# -- grammars


def _hermes(tool: Tool, number: int) -> tuple[str, list[str]]:
    head = _literal(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
    return f"{head} args_{number} {_literal('}' + chr(10) + CLOSE)}", [_json_rule(f"args_{number}", tool.parameters)]


def _llama3(tool: Tool, number: int) -> tuple[str, list[str]]:
    head = _literal(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
    return f"{head} args_{number} {_literal('}')}", [_json_rule(f"args_{number}", tool.parameters)]


def _qwen3_coder(tool: Tool, number: int) -> tuple[str, list[str]]:
    properties = tool.parameters.get("properties") or {}
    needed = tool.parameters.get("required") or ()
    definitions = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
    words, rules = [_literal(f"\n<function={tool.name}>\n")], []
    for place, (key, schema) in enumerate(properties.items()):
        name = f"value_{number}_{place}"
        schema = schema if isinstance(schema, dict) else {}
        one = f"{_literal(f'<parameter={key}>' + chr(10))} {name}"
        if _is_text(schema):
            tail = _literal("\n</parameter>\n")
            if schema.get("enum"):
                rules.append(f"{name}: ({' | '.join(_literal(str(value)) for value in schema['enum'])}) {tail}")
            else:
                rules.append(f"{name}[suffix={tail}]: /(?s:.*)/")
        else:
            rules.append(f"{name}: {name}_json {_literal(chr(10) + '</parameter>' + chr(10))}")
            rules.append(_json_rule(f"{name}_json", schema | definitions))
        words.append(one if key in needed else f"({one})?")
    if "properties" not in tool.parameters and tool.parameters.get("additionalProperties") is not False:
        words.append(f"any_{number}*")
        rules.append(f'any_{number}: "<parameter=" /[^<>\\s]{{1,64}}/ {_literal(">" + chr(10))} text_{number}')
        rules.append(f"text_{number}[suffix={_literal(chr(10) + '</parameter>' + chr(10))}]: /(?s:.*)/")
    words.append(_literal(f"</function>\n{CLOSE}"))
    return " ".join(words), rules


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_rule(name: str, schema: Mapping[str, Any]) -> str:
    options = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    reader: Callable[[Offer], Reader]
    opening: str  # a call, and nothing else begins so; empty where calls are told from an answer by its first letter
    call: Callable[[Tool, int], tuple[str, list[str]]]  # tool number i -> what follows the opening, and rules for that
    between: str  # two calls

    def grammar(self, offer: Offer, answer: Mapping[str, Any] | None = None) -> str:
        """Lark: calls as the offer wants them; or else JSON that fits `answer` if that is given; or, where nothing must be
        called, any text in which the calls of strict tools are right."""
        free = not offer.must and answer is None
        lines = self._free(offer) if free else [f"start: calls{' | answer' if answer is not None else ''}"]
        if not (free and self.opening):
            more = f" ({_literal(self.between)} call)*" if offer.parallel else ""
            opening = f"{_literal(self.opening)} " if self.opening else ""
            lines += [f"calls: call{more}", f"call: {opening}body"]
        tools = [replace(tool, parameters={"type": "object"}) if free and not tool.strict else tool for tool in offer.callable]
        lines.append("body: " + " | ".join(f"call_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            words, rules = self.call(tool, number)
            lines += [f"call_{number}: {words}", *rules]
        if answer is not None:
            lines.append(_json_rule("answer", answer))
        return "\n".join(lines)

    def _free(self, offer: Offer) -> list[str]:
        if not self.opening:
            return ["start: calls | PLAIN", r"PLAIN: /(?s:\s*([^{\s].*)?)/"]
        opening = re.escape(self.opening)
        return [
            f"start: (lead body){'*' if offer.parallel else '?'} REST",
            f"lead[suffix={_literal(self.opening)}]: /(?s:.*)/",
            f"REST: /(?s:.*)/ & ~/(?s:.*{opening}.*)/",
        ]


FORMATS = {
    "hermes": ToolFormat("hermes", lambda offer: HermesReader(), OPEN, _hermes, "\n"),
    "llama3_json": ToolFormat(
        "llama3_json", lambda offer: Llama3Reader(frozenset(tool.name for tool in offer.tools)), "", _llama3, "; "
    ),
    "qwen3_coder": ToolFormat(
        "qwen3_coder", lambda offer: Qwen3CoderReader({tool.name: tool for tool in offer.tools}), OPEN, _qwen3_coder, "\n"
    ),
}


def detect(template: str) -> ToolFormat | None:
    """The format in which a chat template shows calls; None if it shows none."""
    if "tools" not in template:
        return None
    if "<function=" in template and "<parameter=" in template:
        return FORMATS["qwen3_coder"]
    if OPEN in template:
        return FORMATS["hermes"]
    if '"name"' in template and '"parameters"' in template:
        return FORMATS["llama3_json"]
    return None
