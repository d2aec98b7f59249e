"""The input of a batch job: one OpenAI batch request a line, read as a stream and checked line by line.

A line is either a `JobLine` that may run or a `BadLine` that says what is wrong and what to do about it; nothing in the
file can stop the reading of the rest. Memory does not grow with the file, but for 12 to 24 bytes a line that remember the
custom_ids seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from engine.calls import CHAT, COMPLETIONS
from engine.errors import SluiceError

URLS = (CHAT, COMPLETIONS)
MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 128  # of nested arrays and objects
MAX_CUSTOM_ID = 512  # characters
MAX_INT_DIGITS = 20  # 64 bits
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JobError(SluiceError):
    """The job cannot start, or go on, as asked: the message names the remedy."""


@dataclass(frozen=True, slots=True)
class InputFacts:
    """What identifies an input file, and how long it is."""

    size: int  # bytes
    mtime_ns: int
    sha256: str
    lines: int  # blank ones included


@dataclass(frozen=True, slots=True)
class JobLine:
    """A request that may run. `number` counts from 1, `size` is in bytes."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]
    size: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request: a short stable code, and a message with the remedy."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None
    size: int = 0


class _Fault(Exception):
    """Why a line is bad."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class SeenIds:
    """A set of strings kept as 64-bit hashes in one flat table: 12 to 24 bytes each.

    Two different ids are taken for one with probability n^2 / 2^65: 3 in a million for ten million lines.
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, text: str) -> bool:
        """Remember `text`. False if it was there already."""
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1
        slot = self._slot(value)
        if self._table[slot]:
            return False
        self._table[slot] = value
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            self._grow()
        return True

    def _slot(self, value: int) -> int:
        """Where `value` is, or the free place where it belongs."""
        table, mask = self._table, len(self._table) - 1
        slot = value & mask
        while table[slot] and table[slot] != value:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._table
        self._table = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._table[self._slot(value)] = value


def survey(path: Path) -> InputFacts:
    """Read the whole file once for its hash and its number of lines. Raises JobError if it cannot be a job's input."""
    digest = hashlib.sha256()
    lines, last, blank, first = 0, b"\n", True, b""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise JobError(f"{path} is not a regular file; a job is resumed from its input, so save it to a file first")
            while chunk := file.read(_CHUNK):
                first = first or chunk[:2]
                digest.update(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:]
                blank = blank and not chunk.strip()
    except OSError as error:
        raise JobError(f"cannot read the input {path}: {error.strerror}") from None
    if first in (b"\xff\xfe", b"\xfe\xff"):
        raise JobError(f"{path} is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
    if blank:
        raise JobError(f"{path} is empty; write one request a line")
    return InputFacts(status.st_size, status.st_mtime_ns, digest.hexdigest(), lines + (last != b"\n"))


def read_lines(path: Path, facts: InputFacts, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[JobLine | BadLine]:
    """All lines in order; blank ones are passed over. Raises JobError at the end if the file changed meanwhile."""
    seen = SeenIds()
    with path.open("rb", buffering=1 << 18) as file:
        for number, raw in enumerate(_raw_lines(file, max_line_bytes), start=1):
            if raw is None:
                yield BadLine(
                    number,
                    None,
                    "line_too_long",
                    f"the line is longer than {max_line_bytes} bytes; shorten it or raise --max-line-bytes",
                )
                continue
            content = raw.removeprefix(_BOM) if number == 1 else raw
            if content.strip():
                yield _check(number, content, seen)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (facts.size, facts.mtime_ns):
            raise JobError(f"{path} changed while the job was reading it; start it anew with --restart")


def _raw_lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines without their end; None for one longer than `limit` bytes, which is never held in memory whole."""
    while line := file.readline(limit + 2):
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK)  # the rest of one that is too long; or the end of the file
        yield content if len(content) <= limit else None


def _check(number: int, raw: bytes, seen: SeenIds) -> JobLine | BadLine:
    custom_id: str | None = None
    try:
        item = _parse(raw)
        if not isinstance(item, dict):
            raise _Fault("invalid_request", 'the line must be a JSON object: {"custom_id": …, "method": "POST", …}')
        custom_id = _custom_id(item)
        body = _body(item)
        if not seen.add(custom_id):
            raise _Fault(
                "duplicate_custom_id", f"the custom_id {custom_id!r} was used by an earlier line; make it unique", "custom_id"
            )
        return JobLine(number, custom_id, item["url"], body, len(raw))
    except _Fault as fault:
        return BadLine(number, custom_id, fault.code, fault.message, fault.param, len(raw))


def _parse(raw: bytes) -> Any:
    """Strict JSON: no duplicate keys, NaN, infinities, endless integers, bottomless nesting or half surrogate pairs."""
    if b"\0" in raw:
        raise _Fault("invalid_json_line", "the line contains NUL bytes; was the file written whole, and as UTF-8?")
    if raw.startswith(_BOM):
        raise _Fault("invalid_json_line", "the line begins with a byte-order mark; remove it (were files concatenated?)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault("invalid_json_line", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if _too_deep(raw):
        raise _Fault("invalid_json_line", f"the JSON is nested deeper than {MAX_DEPTH} levels; flatten it")
    try:
        item = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(raw):
            json.dumps(item, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _Fault(
            "invalid_json_line", f"not valid JSON: {error.msg} at character {error.pos + 1}; write one JSON object a line"
        ) from None
    except UnicodeEncodeError:
        raise _Fault(
            "invalid_json_line", "the text holds half of a surrogate pair (\\ud800…); write the whole character"
        ) from None
    except RecursionError:
        raise _Fault("invalid_json_line", "the JSON is nested too deeply; flatten it") from None
    return item


def _too_deep(raw: bytes) -> bool:
    if raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _BRACKETS.finditer(raw):
        token = match.group()
        depth += 1 if token in b"[{" else -1 if token in b"]}" else 0
        if depth > MAX_DEPTH:
            return True
    return False


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise _Fault("invalid_json_line", f"the key {name[:100]!r} occurs twice in one object; keep one", name[:100])
    return table


def _no_constant(name: str) -> NoReturn:
    raise _Fault("invalid_json_line", f"{name} is not JSON; use a number or null")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise _Fault("invalid_json_line", f"an integer of {len(digits)} digits; none may exceed 64 bits")
    return int(digits)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Fault("invalid_json_line", f"the number {text[:20]} is too large for a float")
    return value


def _custom_id(item: dict[str, Any]) -> str:
    custom_id = item.get("custom_id")
    if custom_id is None:
        raise _Fault("missing_custom_id", "custom_id is missing; give each line a unique string", "custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise _Fault("invalid_custom_id", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    return custom_id


def _body(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("method") != "POST":
        raise _Fault("invalid_method", 'method must be "POST"', "method")
    if item.get("url") not in URLS:
        raise _Fault("invalid_url", f"url must be one of {', '.join(URLS)}", "url")
    body = item.get("body")
    if not isinstance(body, dict):
        raise _Fault("invalid_body", "body must be a JSON object with the request's parameters", "body")
    if body.get("stream"):
        raise _Fault("stream_not_allowed", "a batch answers in one piece; remove stream from the body", "stream")
    return body
