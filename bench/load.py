"""Does the server hold? `python -m bench.load`: ten times what it can do, clients that leave, clients that do not read.

The real server, engine and scheduler around a fake runner whose steps take `--step-ms`. Each part writes its numbers down; the
first two say what must hold as well, and the exit status is 1 if something did not. Times are for people to compare.

overload      ten times its capacity for `--seconds`: who is refused is told when to come back, memory is bounded, it recovers
aborts        `--cycles` clients that connect and leave: descriptors, threads, pages and memory as before
slow-readers  streams beside others that nobody reads: the time between tokens before, meanwhile and after
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.loopback import Reply, ServerProcess, fetch, request_bytes, send

BODY = {"messages": [{"role": "user", "content": "What is a sluice?"}], "ignore_eos": True, "stream": True}
MIB = 2**20


async def metric(port: int, name: str) -> float:
    """The sum of a metric's series."""
    lines = (await fetch(port, "/metrics")).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))


async def idle(port: int) -> None:
    while await metric(port, "sluice_num_requests_running") or await metric(port, "sluice_num_requests_waiting"):
        await asyncio.sleep(0.05)


def footprint(server: ServerProcess) -> dict[str, float]:
    usage = server.usage
    return {"rss_mib": usage.memory_info().rss / MIB, "fds": usage.num_fds(), "threads": usage.num_threads()}


# -- ten times too much


async def overload(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    request = request_bytes(BODY | {"max_tokens": 32})
    alone = await send(server.port, request)
    start = time.perf_counter()
    await asyncio.gather(*(send(server.port, request) for _ in range(4 * args.seqs)))
    capacity = 4 * args.seqs / (time.perf_counter() - start)
    before, peak, waiting = footprint(server), 0.0, 0.0
    pending: set[asyncio.Task[Reply]] = set()
    replies: list[Reply] = []
    rate, begin = 10 * capacity, time.perf_counter()
    sent, looked = 0, begin
    while (now := time.perf_counter()) < begin + args.seconds:
        while sent < (now - begin) * rate:
            task = asyncio.create_task(send(server.port, request))
            pending.add(task)
            task.add_done_callback(lambda done: (pending.discard(done), replies.append(done.result())))
            sent += 1
        if now > looked + 1.0:
            looked = now
            peak = max(peak, footprint(server)["rss_mib"])
            waiting = max(waiting, await metric(server.port, "sluice_num_requests_waiting"))
        await asyncio.sleep(0.01)
    took, ended = time.perf_counter() - begin, time.perf_counter()
    after = await _until_served(server.port, request, alone)
    await asyncio.gather(*pending)
    statuses = Counter(reply.status for reply in replies)
    refused = [reply for reply in replies if reply.status == 503]
    return {
        "capacity_per_s": capacity,
        "offered_per_s": sent / took,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "waiting_most": waiting,
        "rss_before_mib": before["rss_mib"],
        "rss_most_mib": peak,
        "ttft_alone_ms": 1e3 * (alone.first - alone.sent),
        "ttft_served_p50_ms": 1e3 * statistics.median(r.first - r.sent for r in replies if r.status == 200),
        "recovered_after_s": after - ended,
        "holds": {
            "only 200 and 503": set(statuses) <= {200, 503},
            "every 503 says when to come back": all(b"Retry-After: " in reply.data for reply in refused),
            "every 200 came to its end": all(reply.whole for reply in replies if reply.status == 200),
            "the queue is bounded": waiting <= args.queue,
            "memory is bounded": peak - before["rss_mib"] < 256,
        },
    }


async def _until_served(port: int, request: bytes, alone: Reply) -> float:
    """When a new request is served nearly as soon as it would be alone."""
    while True:
        reply = await send(port, request)
        if reply.status == 200 and reply.first - reply.sent < 2 * (alone.first - alone.sent) + 0.1:
            return reply.sent
        await asyncio.sleep(0.05)


# -- clients that leave


async def aborts(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    request = request_bytes(BODY | {"max_tokens": 4096})
    random_source = random.Random(1)

    async def cycles(count: int) -> None:
        left = count

        async def one() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await send(server.port, request, leave_after=random_source.choice((0.0, 0.005, 0.02, 0.1)))

        await asyncio.gather(*(one() for _ in range(64)))
        await idle(server.port)

    await cycles(args.cycles)  # pools, caches and the heap have their size now: a leak goes on growing
    pages = await metric(server.port, "sluice_kv_pages")
    before = footprint(server)
    start = time.perf_counter()
    await cycles(args.cycles)
    took = time.perf_counter() - start
    after = footprint(server)
    return {
        "cycles": args.cycles,
        "cycles_per_s": args.cycles / took,
        "before": before,
        "after": after,
        "holds": {
            "descriptors": after["fds"] <= before["fds"] + 2,
            "threads": after["threads"] <= before["threads"] + 2,  # those that tokenize may have begun
            "pages": await metric(server.port, "sluice_kv_pages") == pages,
            "memory": after["rss_mib"] - before["rss_mib"] < 32,
        },
    }


# -- clients that do not read


async def slow_readers(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    steps = max(40, int(5e3 / args.step_ms))
    request = request_bytes(BODY | {"max_tokens": steps})

    async def gaps() -> list[float]:
        replies = await asyncio.gather(*(send(server.port, request) for _ in range(8)))
        return [gap for reply in replies for gap in reply.gaps]

    greedy = request_bytes(BODY | {"max_tokens": 8192, "n": 4, "logprobs": True, "top_logprobs": 20})
    alone = await gaps()
    sockets = []
    for _ in range(8):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(greedy)
        sockets.append(sock)  # and never read
    while await metric(server.port, "sluice_num_requests_running") < 8:
        await asyncio.sleep(0.02)
    beside = await gaps()
    stuck = await metric(server.port, "sluice_sse_backpressure_aborts_total")
    for sock in sockets:
        sock.close()
    await idle(server.port)
    again = await gaps()

    def tell(values: list[float]) -> dict[str, float]:
        values.sort()
        return {"p50_ms": 1e3 * values[len(values) // 2], "p99_ms": 1e3 * values[int(0.99 * len(values))]}

    return {
        "alone": tell(alone),
        "beside 8 that do not read": tell(beside),
        "alone again": tell(again),
        "aborted": stuck,
        "holds": {},
    }


PARTS = {"overload": overload, "aborts": aborts, "slow-readers": slow_readers}


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    result: dict[str, Any] = {"command": "python -m bench.load", "step_ms": args.step_ms}
    for name in args.parts:
        flags = ["--step-ms", str(args.step_ms), "--max-num-seqs", str(args.seqs), "--max-num-queued-reqs", str(args.queue)]
        flags += ["--model", args.model] if args.model else []
        if name == "aborts":  # the fake runner remembers what lies in each page, and must have seen them all
            flags += ["--pages", "8192"]
        if name == "slow-readers":  # places for all, or the others would wait for a place and not for a token
            flags += ["--max-num-seqs", "64"]
        with ServerProcess("sluice", *flags, "--sse-write-timeout", "5") as server:
            result[name] = asyncio.run(PARTS[name](server, args))
        print(name, json.dumps(result[name], indent=1), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(held for name in args.parts for held in result[name]["holds"].values()) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--step-ms", type=float, default=20.0, help="time of a step")
    parser.add_argument("--seqs", type=int, default=16, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait")
    parser.add_argument("--model", help="folder whose tokenizer and sizes to use (default: the demo model)")
    parser.add_argument("--out", type=Path, help="write the numbers to this file as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
