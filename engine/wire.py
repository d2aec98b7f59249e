"""JSON from strangers: bytes to objects within bounds, and objects to types, strictly; errors name the field.

Shared by everything that reads a request. Types are strict (a bool is no int, "1" is no number) and null means absent.
"""

from __future__ import annotations

import random
import re
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest

Json = dict[str, Any]

MAX_VALUES = 1 << 20  # JSON values of a body, about
MAX_CONTAINERS = 1 << 18  # lists and objects of a body, about
_SMALL = 1 << 18  # bytes of JSON that decode fast enough whatever they hold
_CHUNK = 1 << 20
_T = TypeVar("_T")
_numbers = random.Random()
_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")


def decode(raw: bytes) -> Json:
    """The JSON object in `raw`. Raises InvalidRequest for anything else, naming the field where one is to blame."""
    _check_density(raw)
    try:
        body = msgspec.json.decode(raw)
    except msgspec.ValidationError as error:  # well-formed, but a number is beyond what can be carried
        raise InvalidRequest(str(error).split(" - at ")[0], param=_culprit(raw)) from None
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply", param=_culprit(raw), code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json")
    return body


def _check_density(raw: bytes) -> None:
    """Refuse a body that would become millions of objects: decoding it would stop every other thread for seconds.

    Counts separators, those inside strings too: so many do not fit any model's context either.
    """
    if len(raw) <= _SMALL:
        return
    values = containers = 0
    for start in range(0, len(raw), _CHUNK):
        part = raw[start : start + _CHUNK]
        values += part.count(b",")
        containers += part.count(b"[") + part.count(b"{")
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            raise InvalidRequest("the body has too many values", code="invalid_json")


def _culprit(raw: bytes) -> str | None:
    """The top-level field of `raw` that cannot be decoded."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return None
    for name, value in fields.items():
        try:
            msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return name
    return None


def convert(value: Any, kind: type[_T], prefix: str = "") -> _T:
    """`value` as a `kind`, strictly; InvalidRequest names the field, below `prefix` if given."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        param = ".".join(part for part in (prefix, found[1] if found else "") if part).replace(".[", "[") or None
        reason = _PATH.sub("", text)
        raise InvalidRequest(f"{param}: {reason}" if param else reason, param=param, code="invalid_type") from None
    except RecursionError:
        raise InvalidRequest("the value is nested too deeply", param=prefix or None) from None


def clean_text(text: str, param: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which no encoding of it can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} contains a lone surrogate", param=param) from None
    return text


def fresh_id() -> str:
    """32 digits that no other request has. They are no secret: asking the kernel would lend away the interpreter lock."""
    return f"{_numbers.getrandbits(128):032x}"


def required(param: str) -> InvalidRequest:
    """The error for a field that is missing or empty."""
    return InvalidRequest(f"{param} is required and must not be empty", param=param, code="missing_required_parameter")


def unsupported(param: str, what: str = "") -> InvalidRequest:
    """The error for something the API has and this engine has not."""
    return InvalidRequest(what or f"{param} is not supported", param=param, code="unsupported_parameter")
