"""Log lines: text or JSON, one line each whatever is in them, and nothing that a client could forge."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import unicodedata
from contextvars import ContextVar
from typing import NamedTuple

_MAX_CHARS = 8192


def escape(text: str) -> str:
    """`text` with control, format and line-separating characters spelled out, so that it stays one line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if unicodedata.category(char)[0] not in "CZ" or char == " " else char.encode("unicode_escape").decode()
        for char in text
    )


class Trace(NamedTuple):
    """Whose doing a log line is: a request, and the trace and span of its client where it told them."""

    request_id: str
    trace_id: str | None = None
    span_id: str | None = None


TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def trace_of(request_id: str, traceparent: str | None) -> Trace:
    """From the header of https://www.w3.org/TR/trace-context; one that is not as it says counts as none."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if (
        match is None
        or match[1] == "ff"
        or (match[1] == "00" and match[4])
        or not (match[2].strip("0") and match[3].strip("0"))
    ):
        return Trace(request_id)
    return Trace(request_id, match[2], match[3])


def _context() -> dict[str, str]:
    trace = TRACE.get()
    return {} if trace is None else {name: value for name, value in trace._asdict().items() if value is not None}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} {record.name}: "
        line += escape(record.getMessage()[:_MAX_CHARS])
        line += "".join(f" {name}={value}" for name, value in _context().items() if value not in line)
        if record.exc_info:
            # A traceback keeps its lines, yet its end may quote a client: none of them can look like a line of its own.
            line += "".join("\n  | " + escape(part) for part in self.formatException(record.exc_info).split("\n"))
        return line


class _JsonFormatter(logging.Formatter):
    """A log call may give more fields: `log.info(..., extra={"fields": {...}})`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MAX_CHARS],
        }
        entry |= _context() | getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _NoTraceback(logging.Filter):
    """aiohttp logs a traceback for each malformed request; a line says enough, and a client chooses how many there are."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True


def setup_logging(form: str, level: str) -> None:
    """Send all log lines to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    quiet = logging.getLogger("aiohttp.server")
    quiet.addFilter(_NoTraceback())
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
