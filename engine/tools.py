"""Tools that a request offers and the calls it may ask for: `tools`, `tool_choice`, `parallel_tool_calls`, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from engine.formats import schema_grammar
from engine.wire import clean_text, convert, required, unsupported

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `body` is what the client wrote, for the chat template."""

    name: str
    parameters: Mapping[str, Any]  # JSON schema of its arguments
    body: Mapping[str, Any]
    strict: bool = False  # its arguments must fit, whoever decides to call it


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The tools of a request. `must`: the answer is calls, of `callable` only, and one alone unless `parallel`."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must: bool = False
    parallel: bool = True

    @property
    def constrains(self) -> bool:
        """Whether the answer needs a grammar."""
        return self.must or any(tool.strict for tool in self.tools)


def read_offer(tools: list[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> Offer | None:
    """What is offered; None if nothing is, or `tool_choice` is none: then the model sees no tools either."""
    offered = tuple(_tool(body, f"tools[{index}]") for index, body in enumerate(tools or ()))
    if len(offered) > MAX_TOOLS:
        raise InvalidRequest(f"tools takes at most {MAX_TOOLS} entries", param="tools")
    if len({tool.name for tool in offered}) < len(offered):
        raise InvalidRequest("tools must have different names", param="tools")
    if choice in (None, "auto", "none"):
        return Offer(tools=offered, callable=offered, parallel=parallel is not False) if offered and choice != "none" else None
    if not offered:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if choice == "required":
        return Offer(tools=offered, callable=offered, must=True, parallel=parallel is not False)
    named = _named(choice)
    found = tuple(tool for tool in offered if tool.name == named)
    if not found:
        raise InvalidRequest(f"tool_choice names {named[:64]!r}, which is not among the tools", param="tool_choice")
    return Offer(tools=offered, callable=found, must=True, parallel=False)


def _named(choice: Any) -> str:
    if not isinstance(choice, dict):
        raise InvalidRequest(
            "tool_choice must be none, auto, required or the name of a function as an object", param="tool_choice"
        )
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type")
    function = convert(choice.get("function"), dict[str, Any], "tool_choice.function")
    return convert(function.get("name"), str, "tool_choice.function.name")


def _tool(body: Mapping[str, Any], where: str) -> Tool:
    if body.get("type") != "function":
        raise unsupported(f"{where}.type", f"{where}.type must be function")
    function = convert(body.get("function"), dict[str, Any], f"{where}.function")
    name = convert(function.get("name"), str, f"{where}.function.name")
    if not name:
        raise required(f"{where}.function.name")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where}.function.name must match {_NAME.pattern}", param=f"{where}.function.name")
    if (description := function.get("description")) is not None:
        clean_text(convert(description, str, f"{where}.function.description"), f"{where}.function.description")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{where}.function.parameters must be a JSON schema", param=f"{where}.function.parameters")
    schema_grammar(parameters, f"{where}.function.parameters")  # bounds its size and depth
    strict = convert(function.get("strict"), bool | None, f"{where}.function.strict")  # type: ignore[arg-type]
    return Tool(name, parameters, body, bool(strict))


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The `tool_calls` of an assistant message, as a chat template wants them."""
    read = []
    for index, call in enumerate(convert(calls, list[dict[str, Any]], where)):
        place = f"{where}[{index}]"
        if call.get("type", "function") != "function":
            raise unsupported(f"{place}.type")
        function = convert(call.get("function"), dict[str, Any], f"{place}.function")
        name = clean_text(convert(function.get("name"), str, f"{place}.function.name"), f"{place}.function.name")
        arguments = convert(function.get("arguments") or "{}", str, f"{place}.function.arguments")
        clean_text(arguments, f"{place}.function.arguments")
        entry: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            entry["id"] = clean_text(convert(call["id"], str, f"{place}.id"), f"{place}.id")
        read.append(entry)
    return read
