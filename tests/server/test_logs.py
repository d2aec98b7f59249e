"""Log lines: whose they are, in both forms, and nothing that a client could forge."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from serving import MESSAGES, serving

from engine import Engine
from server.logs import TRACE, Trace, escape, setup_logging, trace_of

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """As before after the test."""
    root, quiet = logging.getLogger(), logging.getLogger("aiohttp.server")
    before = root.handlers[:], root.level, quiet.filters[:]
    yield
    root.handlers[:], level, quiet.filters[:] = before
    root.setLevel(level)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "x",
        PARENT[:-1],
        PARENT.upper(),
        PARENT + "-more",
        "ff" + PARENT[2:],
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        PARENT + "\n",
        PARENT.replace("4bf", "4b\u0664"),
    ],
)
def test_a_bad_traceparent_is_none(header: str | None) -> None:
    assert trace_of("r", header) == Trace("r")


def test_a_traceparent() -> None:
    assert trace_of("r", PARENT) == ("r", TRACE_ID, SPAN_ID)
    assert trace_of("r", "cc" + PARENT[2:] + "-what-the-future-brings") == ("r", TRACE_ID, SPAN_ID)


def test_one_line_whatever_is_in_it() -> None:
    hostile = "a\r\n2026-01-01 critical forged\x1b[31m \u2028 \u202e \x00 \x85 ok é"
    shown = escape(hostile)
    assert shown == "a\\r\\n2026-01-01 critical forged\\x1b[31m \\u2028 \\u202e \\x00 \\x85 ok é"
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_hostile_message_stays_one_line(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(form, "info")
    logging.getLogger("x").info("model %s", 'a"}\n{"level":"critical","message":"forged')
    try:
        raise ValueError("told by a client\n2026-01-01T00:00:00.000Z critical root: forged")
    except ValueError:
        logging.getLogger("x").exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith(('{"level"', "2026-01-01T00:00:00.000Z critical")) for line in lines)
    if form == "json":
        assert [json.loads(line)["level"] for line in lines] == ["info", "error"]


def test_json_lines_carry_request_trace_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("json", "info")
    token = TRACE.set(trace_of("r-1", PARENT))
    logging.getLogger("x").info("hello", extra={"fields": {"tenant": "online", "running": 3}})
    TRACE.reset(token)
    logging.getLogger("x").info("nobody's")
    told = capsys.readouterr().err
    first, second = (json.loads(line) for line in told.splitlines())
    assert (first["request_id"], first["trace_id"], first["span_id"]) == ("r-1", TRACE_ID, SPAN_ID)
    assert (first["tenant"], first["running"], first["message"]) == ("online", 3, "hello")
    assert not {"request_id", "trace_id"} & second.keys()


async def test_requests_are_logged_where_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("json", "info")
    body = {"messages": [{"role": "user", "content": "a secret of mine"}], "max_tokens": 2}
    async with serving(engine, enable_log_requests=True) as server:
        await server.post("/v1/chat/completions", body, headers={"traceparent": PARENT, "X-Request-Id": "mine"})
        await server.post("/v1/chat/completions", {"messages": 3}, headers={"X-Request-Id": "a\tb"})
        await server.get("/health")
    async with serving(engine) as server:
        await server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1})
    told = capsys.readouterr().err
    first, second = (json.loads(line) for line in told.splitlines())
    assert (first["request_id"], first["trace_id"], first["status"]) == ("mine", TRACE_ID, 200)
    assert first["route"] == "/v1/chat/completions" and first["seconds"] > 0
    assert second["status"] == 400 and second["request_id"].startswith("req-") and "trace_id" not in second
    assert "secret" not in told, "prompts are never logged"
