"""`python -m engine.top` against a real server, as people run it, and its words."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import MESSAGES, make_engine, serving

from engine import Engine, SamplingParams
from engine.top import cost_of, duration, folded, main, seconds_by_owner, strip

ROOT = Path(__file__).parents[2]
CHAT = {"messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with make_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine


async def top(*arguments: str) -> tuple[int, str, str]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "engine.top", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await child.communicate()
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


async def test_once(engine: Engine) -> None:
    async with serving(engine, ttft_slo_ms=600_000) as server:
        for _ in range(3):
            assert (await server.post("/v1/chat/completions", CHAT))[0] == 200
        await engine.submit("x", SamplingParams(max_tokens=20, ignore_eos=True), tenant="offline").completion()
        engine.timeline.event("reclaim", "[bold]not markup[/bold]", slabs=3)
        engine.pause("offline")
        try:
            status, out, err = await top(server.url, "--once")
        finally:
            engine.resume()
    assert (status, err) == (0, "")
    assert "Sluice ready, offline paused" in out and "org/tiny (online)" in out
    assert re.search(r"^online +0 +0 +3 .* ms, .* ms", out, re.MULTILINE)
    assert re.search(r"^target +10 min *$", out, re.MULTILINE)
    assert any(level in out for level in "▁▂▃▄▅▆▇█")
    assert "memory taken" in out and "slabs 3" in out and "[bold]not markup" in out


async def test_with_a_key(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("geheim\n")
    async with serving(engine, api_key=("k",), admin_api_key=("geheim",)) as server:
        status, _, err = await top(server.url, "--once")
        assert status == 1 and "asks for the admin key" in err and "Traceback" not in err
        status, out, _ = await top(server.url, "--once", "--admin-api-key-file", str(file))
        assert status == 0 and "Sluice ready" in out


async def test_nobody_there_and_somebody_else(engine: Engine) -> None:
    status, _, err = await top("http://127.0.0.1:9", "--once")
    assert status == 1 and "refused" in err and "Traceback" not in err
    async with serving(None) as server:
        status, _, err = await top(server.url, "--once")
        assert status == 1 and "being loaded" in err


@pytest.mark.parametrize("arguments", [["ftp://x"], ["--interval", "0"], ["--admin-api-key-file", "/nowhere"], ["--nonsense"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_words_for_people() -> None:
    assert [duration(s) for s in (None, 0.0012, 0.25, 3.14, 300, 7500, -7500)] == [
        *("-", "1.2 ms", "250 ms", "3.1 s", "5 min", "2 h 5 min", "-2 h 5 min"),
    ]
    assert cost_of({"cost": {"latency_us": 170, "stood_still_ms": 2500, "lost_tokens": 1200}}) == (
        "latency 170 µs, stood still 2.5 s, lost tokens 1,200"
    )


def test_a_preemption_is_told_with_what_came_of_it() -> None:
    def event(kind: str, **cost: float) -> dict[str, object]:
        return {"kind": kind, "cause": "", "at": 0, "cost": cost}

    told = folded(
        [
            event("thaw", stood_still_ms=1),  # of a preemption before the window
            event("preemption", latency_us=3),
            event("withdrawn", stood_still_ms=2),
            event("preemption", latency_us=4),
            event("reclaim", slabs=1),
            event("thaw", stood_still_ms=50),
            event("preemption", latency_us=5),
        ]
    )
    assert [(e["kind"], e["cost"]) for e in told] == [
        ("preemption", {"latency_us": 4, "stood_still_ms": 50}),
        ("reclaim", {"slabs": 1}),
        ("preemption", {"latency_us": 5}),
    ]


def test_numbers_of_a_window() -> None:
    """Ten seconds, of which online had 2 and half of a mixed second, offline the other half, and switching a tenth."""
    second = 1_000_000
    state = {
        "now": 100 * second,
        "began": 0,
        "window": 10.0,
        "spans": [[91 * second, 2 * second, 5, 0, 0, 0, 1], [95 * second, second, 0, 2, 0, 2, 4]],
        "switches": [[93 * second, second // 10, 0, 0, 0, 0, 0]],
    }
    shares = seconds_by_owner(state)
    assert shares == pytest.approx(
        {"online_prefill": 2, "online_decode": 0.5, "offline_prefill": 0, "offline_decode": 0.5, "switch": 0.1, "idle": 6.9}
    )
    assert strip(state, "online", 10) == pytest.approx([0, 1, 1, 0, 0, 0.5, 0, 0, 0, 0])
    assert strip(state, "offline", 5) == pytest.approx([0, 0, 0.25, 0, 0])
