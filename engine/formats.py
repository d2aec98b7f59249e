"""What an output must look like, as clients say it: `response_format`, vLLM's `structured_outputs` and its older `guided_*`.

Each becomes one `types.Grammar`. Whether a schema or an expression makes sense is for `engine.grammar`, which compiles it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from engine.errors import InvalidRequest
from engine.types import MAX_GRAMMAR_CHARS, Grammar
from engine.wire import clean_text, convert, required, unsupported

MAX_CHOICES = 4096
MAX_DEPTH = 64  # of a schema


class Wire(Protocol):
    """The fields read here."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: str | dict[str, Any] | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar, and the field that asked for it."""

    grammar: Grammar
    param: str


def read_constraint(wire: Wire) -> Constraint | None:
    """The one constraint of a request. Raises InvalidRequest for two of them."""
    found: list[Constraint] = []
    if wire.response_format is not None:
        found += _response_format(wire.response_format)
    if wire.structured_outputs is not None:
        found += _structured(wire.structured_outputs, "structured_outputs.")
    older = {name: getattr(wire, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    found += _structured(older, "guided_")
    if len(found) > 1:
        names = " and ".join(constraint.param for constraint in found)
        raise InvalidRequest(f"{names} cannot be asked for together", param=found[1].param)
    return found[0] if found else None


def _response_format(body: Mapping[str, Any]) -> list[Constraint]:
    kind = body.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Constraint(Grammar.json_object(), "response_format")]
    if kind != "json_schema":
        raise InvalidRequest("response_format.type must be text, json_object or json_schema", param="response_format.type")
    where = "response_format.json_schema"
    entry = convert(body.get("json_schema"), dict[str, Any] | None, where)  # type: ignore[arg-type]
    if entry is None or entry.get("schema") is None:
        raise required(f"{where}.schema")
    return [Constraint(schema_grammar(entry["schema"], f"{where}.schema"), "response_format")]


def _structured(body: Mapping[str, Any], prefix: str) -> list[Constraint]:
    """`body` holds at most one of vLLM's ways to say it; null and false stand for absence."""
    found: list[Constraint] = []
    for name, value in body.items():
        where = prefix + name
        if value is None or value is False:
            continue
        match name:
            case "json":
                found.append(Constraint(_schema_of(value, where), where))
            case "json_object":
                found.append(Constraint(Grammar.json_object(), where))
            case "regex":
                found.append(Constraint(Grammar("regex", _text(value, where)), where))
            case "choice":
                found.append(Constraint(_choice(value, where), where))
            case "grammar":
                found.append(Constraint(Grammar("lark", _text(value, where)), where))
            case "disable_fallback":
                continue  # there is one backend
            case _:
                raise unsupported(where)
    return found


def _schema_of(value: Any, where: str) -> Grammar:
    """A schema as an object, or as its JSON text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(clean_text(value, where))
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"{where} is not JSON: {error}", param=where) from None
    return schema_grammar(value, where)


def schema_grammar(schema: Any, where: str) -> Grammar:
    """JSON that fits `schema`. Raises InvalidRequest for what is no schema, or is too large to be looked at."""
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{where} must be a JSON schema: an object", param=where)
    _check_depth(schema, where)
    grammar = Grammar.json_schema(schema)
    return Grammar(grammar.kind, _bounded(clean_text(grammar.text, where), where))


def _choice(value: Any, where: str) -> Grammar:
    options: Sequence[str] = convert(value, list[str], where)
    if not 0 < len(options) <= MAX_CHOICES or not all(options):
        raise InvalidRequest(f"{where} must have 1 to {MAX_CHOICES} strings, none of them empty", param=where)
    grammar = Grammar.choice([clean_text(option, where) for option in options])
    return Grammar(grammar.kind, _bounded(grammar.text, where))


def _text(value: Any, where: str) -> str:
    text = clean_text(convert(value, str, where), where)
    if not text:
        raise required(where)
    return _bounded(text, where)


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"{where} has more than {MAX_GRAMMAR_CHARS} characters", param=where)
    return text


def _check_depth(value: Any, where: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} levels deep", param=where)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, where, depth + 1)
