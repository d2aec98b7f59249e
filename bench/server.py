"""What does the HTTP side cost? `python -m bench.server`: the real server on a fake runner beside a bare aiohttp echo.

The echo sends the very bytes that the server sent, in as many writes, so it is what aiohttp and the kernel cost alone. Arms
take turns (A B, A B, ...) and only one process runs at a time. Three questions, each at several numbers of streams:

full   steps take no time: tokens per second, when everything is late that can be
paced  a step every `--step-ms`: processor time per token, and how late the event loop is
short  requests of one token one after the other: processor time per request
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.loopback import Reply, ServerProcess, events_of, request_bytes, send

BODY = {"messages": [{"role": "user", "content": "What is a sluice?"}], "ignore_eos": True, "stream": True, "seed": 1}


async def _record(port: int, tokens: int) -> list[bytes]:
    return events_of(await send(port, request_bytes(BODY | {"max_tokens": tokens}), keep=True))


async def _crowd(port: int, streams: int, tokens: int, requests: int) -> list[Reply]:
    """`requests` in all, `streams` at a time."""
    request, left, replies = request_bytes(BODY | {"max_tokens": tokens}), requests, []

    async def one() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            replies.append(await send(port, request))

    await asyncio.gather(*(one() for _ in range(streams)))
    return replies


def measure(server: ServerProcess, streams: int, tokens: int, requests: int) -> dict[str, float]:
    """One window: `requests` of `tokens`, `streams` of them at a time."""
    asyncio.run(_crowd(server.port, streams, 2, streams))
    server.lag()
    cpu, start = server.cpu_seconds, time.perf_counter()
    replies = asyncio.run(_crowd(server.port, streams, tokens, requests))
    wall, cpu = time.perf_counter() - start, server.cpu_seconds - cpu
    bad = [reply for reply in replies if reply.status != 200 or not reply.whole]
    if bad:
        raise RuntimeError(
            f"{len(bad)} of {len(replies)} streams failed, the first with status {bad[0].status}: {bad[0].data!r}"
        )
    lag = server.lag()
    return {
        "tokens_per_s": len(replies) * tokens / wall,
        "cpu_us_per_token": 1e6 * cpu / (len(replies) * tokens),
        "cpu_us_per_request": 1e6 * cpu / len(replies),
        "lag_p50_ms": 1e3 * lag.get("p50", 0.0),
        "lag_p99_ms": 1e3 * lag.get("p99", 0.0),
        "lag_max_ms": 1e3 * lag.get("max", 0.0),
    }


def windows(args: argparse.Namespace) -> list[tuple[str, float, int, int, int]]:
    """(name, step in ms, streams, tokens, requests) of every window."""
    rows: list[tuple[str, float, int, int, int]] = []
    for streams in args.streams:
        tokens = max(16, min(512, args.tokens // streams))
        rows.append((f"full {streams}", 0.0, streams, tokens, max(streams, args.tokens // tokens)))
    for streams in args.streams:
        tokens = max(8, int(args.seconds * 1e3 / args.step_ms))
        rows.append((f"paced {streams}", args.step_ms, streams, tokens, streams))
    rows.append(("short 1", 0.0, 1, 1, max(20, args.tokens // 100)))
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, step, streams, tokens, requests in windows(args):
        arms = found[name] = {"sluice": [], "echo": []}
        flags = ["--step-ms", str(step), *(["--model", args.model] if args.model else [])]
        with ServerProcess("sluice", *flags) as server:
            chunks = asyncio.run(_record(server.port, tokens))
            with ServerProcess("echo", *flags, chunks=chunks) as echo:
                for _ in range(args.rounds):
                    for arm, process in (("sluice", server), ("echo", echo)):
                        arms[arm].append(measure(process, streams, tokens, requests))
        print(_line(name, arms), flush=True)
    return {name: {arm: _summary(rounds) for arm, rounds in arms.items()} for name, arms in found.items()}


def _summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        key: {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for key in rounds[0]
        if (values := [each[key] for each in rounds])
    }


def _line(name: str, arms: dict[str, list[dict[str, float]]]) -> str:
    parts = [f"{name:10}"]
    for arm, rounds in arms.items():
        s = _summary(rounds)
        parts.append(
            f"{arm}: {s['tokens_per_s']['median']:8.0f} tok/s  {s['cpu_us_per_token']['median']:7.1f} us/tok  "
            f"{s['cpu_us_per_request']['median']:8.0f} us/req  lag p99 {s['lag_p99_ms']['median']:7.2f} ms"
        )
    return "  |  ".join(parts)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.server", description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a full window, all streams together")
    parser.add_argument("--step-ms", type=float, default=50.0, help="time of a step in paced windows")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a paced window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="folder whose tokenizer and sizes to use (default: the demo model)")
    parser.add_argument("--out", type=Path, help="write the numbers to this file as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    result = {"command": "python -m bench.server", "windows": run(args)}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
