"""A day of load, a hundred times as fast: all that clients do, more by day than by night, and what is left of it at the end.

Against the real HTTP side, jobs and scheduler on the fake runner, in a process of its own. The first hours warm everything up;
the promise is that the last hour leaves what the warm-up left: descriptors, threads, pages, memory, and nothing unfinished.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from bench.load import footprint, metric
from bench.loopback import CHAT, ServerProcess, fetch, request_bytes, send

COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "What is a sluice?"}]
HOURS = 24
_ENDED = ("completed", "failed", "expired", "cancelled")
_MANY = 64  # clients at once at most, whatever the hour


class Day:
    """Clients of one server. What they met that they must not meet stands in `faults`."""

    def __init__(self, port: int, session: aiohttp.ClientSession, seed: int) -> None:
        self.counts: Counter[str] = Counter()  # by kind and status
        self.faults: list[str] = []
        self._port = port
        self._url = f"http://127.0.0.1:{port}"
        self._session = session
        self._random = random.Random(seed)
        self._room = asyncio.Semaphore(_MANY)
        self._batches: list[tuple[str, int]] = []  # id, and its lines
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self._chat: 30, self._stream: 30, self._text: 15, self._flex: 10, self._leave: 25, self._bad: 15, self._look: 10,
            self._malformed: 5, self._batch: 4, self._broken_upload: 3,
        }  # fmt: skip

    async def hour(self, count: int, seconds: float) -> None:
        """`count` clients, evenly over `seconds`, or as fast as there is room for them."""
        kinds = self._random.choices(list(self._kinds), list(self._kinds.values()), k=count)
        began = time.perf_counter()
        tasks = []
        for number, kind in enumerate(kinds):
            await asyncio.sleep(max(0.0, began + number * seconds / count - time.perf_counter()))
            await self._room.acquire()
            task = asyncio.create_task(kind())  # type: ignore[arg-type]
            task.add_done_callback(lambda _: self._room.release())
            tasks.append(task)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                self.faults.append(repr(result))

    async def night(self) -> None:
        """Every batch comes to its end, each line of it once; then all files are deleted."""
        for batch_id, lines in self._batches:
            while (batch := await self._json("GET", f"/v1/batches/{batch_id}"))["status"] not in _ENDED:
                await asyncio.sleep(0.05)
            await self._check_lines(batch, lines)
        self._batches.clear()
        for file in (await self._json("GET", "/v1/files"))["data"]:
            await self._json("DELETE", f"/v1/files/{file['id']}")

    async def _check_lines(self, batch: dict[str, Any], lines: int) -> None:
        found: list[str] = []
        for key in ("output_file_id", "error_file_id"):
            if batch[key] is not None:
                async with self._session.get(f"{self._url}/v1/files/{batch[key]}/content") as response:
                    found += [json.loads(line)["custom_id"] for line in (await response.text()).splitlines()]
        self.counts[f"batch {batch['status']}"] += 1
        if batch["in_progress_at"] is not None and sorted(found) != sorted(map(str, range(lines))):
            self.faults.append(f"{batch['id']} ({batch['status']}): {len(found)} records of {lines} lines")

    # -- what a client may do

    async def _chat(self) -> None:
        body = {"messages": MESSAGES, "max_tokens": self._random.randint(1, 60), "n": self._random.choice((1, 1, 1, 3))}
        await self._expect("chat", CHAT, body)

    async def _stream(self) -> None:
        body = {"messages": MESSAGES, "max_tokens": self._random.randint(1, 120), "ignore_eos": True, "stream": True}
        reply = await send(self._port, request_bytes(body))
        self.counts[f"stream {reply.status}"] += 1
        if reply.status not in (200, 503) or not reply.whole:
            self.faults.append(f"stream: {reply.status}, {reply.size} bytes, whole: {reply.whole}")

    async def _text(self) -> None:
        prompts = ["a long story " * self._random.randint(1, 50) for _ in range(self._random.choice((1, 1, 4)))]
        await self._expect("text", COMPLETIONS, {"prompt": prompts, "max_tokens": 20, "echo": self._random.random() < 0.3})

    async def _flex(self) -> None:
        await self._expect("flex", CHAT, {"messages": MESSAGES, "max_tokens": 100, "service_tier": "flex"}, 429)

    async def _leave(self) -> None:
        body = {"messages": MESSAGES, "max_tokens": 4000, "ignore_eos": True, "stream": self._random.random() < 0.7}
        await send(self._port, request_bytes(body), leave_after=self._random.choice((0.0, 0.003, 0.03, 0.3)))
        self.counts["left"] += 1

    async def _bad(self) -> None:
        path, body, status = self._random.choice([
            (CHAT, {"messages": MESSAGES, "n": 10**9}, 400),
            (CHAT, {"messages": "no"}, 400),
            (CHAT, {"messages": MESSAGES, "model": "gpt-9"}, 404),
            (COMPLETIONS, {"prompt": ""}, 400),
            (COMPLETIONS, {"prompt": [1] * 100_000}, 400),
            ("/v1/nothing", {}, 404),
            ("/v1/batches", {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}, 404),
        ])  # fmt: skip
        async with self._session.post(self._url + path, json=body) as response:
            self._saw("bad", response.status, status)
            await response.read()

    async def _look(self) -> None:
        path = self._random.choice(("/metrics", "/health", "/ready", "/v1/models", "/load", "/debug/state", "/openapi.json"))
        async with self._session.get(self._url + path) as response:
            self._saw("look", response.status, 200)
            await response.read()

    async def _malformed(self) -> None:
        endless = b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000
        raw = self._random.choice((b"nonsense\r\n\r\n", endless, b"POST /v1/files HTTP/1.1\r\n", b""))
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(raw)
        await asyncio.sleep(0.01)
        writer.transport.abort()
        self.counts["malformed"] += 1

    async def _batch(self) -> None:
        lines = self._random.randint(3, 12)
        rows = [
            {"custom_id": str(n), "method": "POST", "url": CHAT, "body": {"messages": MESSAGES, "max_tokens": 10}}
            for n in range(lines)
        ]
        rows[-1]["body"] = {"messages": MESSAGES, "temperature": -1}
        file = await self._upload("".join(json.dumps(row) + "\n" for row in rows).encode())
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = await self._json("POST", "/v1/batches", body)
        self._batches.append((batch["id"], lines))
        for wish in self._random.choice(((), (), ("cancel",), ("pause", "resume"))):
            async with self._session.post(f"{self._url}/v1/batches/{batch['id']}/{wish}") as response:
                self._saw(wish, response.status, 200, 409)

    async def _broken_upload(self) -> None:
        head = "POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        head += "Content-Length: 99999\r\n\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + "y" * 5000
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write((head + part).encode())
        await asyncio.sleep(0.02)
        writer.transport.abort()
        self.counts["broken upload"] += 1

    # -- how

    async def _upload(self, data: bytes) -> dict[str, Any]:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", data, filename="in.jsonl")
        async with self._session.post(self._url + "/v1/files", data=form) as response:
            self._saw("upload", response.status, 200)
            answer: dict[str, Any] = await response.json()
            return answer

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        async with self._session.request(method, self._url + path, json=body) as response:
            self._saw(f"{method} {path.rpartition('/')[0]}", response.status, 200)
            return await response.json()

    async def _expect(self, kind: str, path: str, body: dict[str, Any], *refusals: int) -> None:
        """An answer, or a refusal that says when to come back."""
        async with self._session.post(self._url + path, json=body) as response:
            self._saw(kind, response.status, 200, 503, *refusals)
            if response.status != 200 and "Retry-After" not in response.headers:
                self.faults.append(f"{kind}: {response.status} without Retry-After")
            await response.read()

    def _saw(self, kind: str, status: int, *expected: int) -> None:
        self.counts[f"{kind} {status}"] += 1
        if status not in expected:
            self.faults.append(f"{kind}: {status}")


def share(hour: int) -> float:
    """Of the busiest hour's clients: few at four in the morning, most at four in the afternoon."""
    return 0.55 - 0.45 * math.cos((hour - 4) / HOURS * 2 * math.pi)


async def run(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    """The day, between two looks at what the server holds."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        day = Day(server.port, session, args.seed)
        warm: dict[str, float] = {}
        told: list[dict[str, float]] = []
        for hour in range(-args.warm_up, HOURS):
            if hour == 0:
                await day.night()
                warm = await _settled(server)
            await day.hour(max(1, round(args.rate * 3600 / args.speed * share(hour % HOURS))), 3600 / args.speed)
            told.append({"hour": hour, **footprint(server)})
            print(json.dumps(told[-1]), flush=True)
        await day.night()
        left = await _settled(server)
    return {
        "command": "python -m bench.day",
        "speed": args.speed,
        "clients": sum(day.counts.values()),
        "counts": dict(sorted(day.counts.items())),
        "hours": told,
        "warm": warm,
        "left": left,
        "faults": day.faults[:20],
        "holds": {
            "nobody met what they must not meet": not day.faults,
            "descriptors": left["fds"] <= warm["fds"] + 2,
            "threads": left["threads"] <= warm["threads"] + 8,  # pools may still have been growing to their size
            "pages": left["pages"] == 0,
            "unfinished": left["unfinished"] == 0,
            "memory": left["rss_mib"] - warm["rss_mib"] < args.memory,
        },
    }


async def _settled(server: ServerProcess) -> dict[str, float]:
    """What the server holds once nothing is going on."""
    requests, batches = ("sluice_num_requests_running", "sluice_num_requests_waiting"), "sluice_batch_jobs"
    while (unfinished := sum([await metric(server.port, name) for name in (*requests, batches)])) > 0:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # connections that were just closed
    pages = dict(re.findall(r'sluice_kv_pages\{.*?state="(\w+)".*?\} (\S+)', await fetch(server.port, "/metrics")))
    used = float(pages["total"]) - float(pages["free"]) - float(pages["cached"])
    return {**footprint(server), "unfinished": unfinished, "pages": used}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.day", description=__doc__.split("\n")[0])
    parser.add_argument("--speed", type=float, default=100.0, help="how much faster than a day the day is")
    parser.add_argument("--rate", type=float, default=20.0, help="clients a second in the busiest hour, on the server's clock")
    parser.add_argument("--warm-up", type=int, default=12, help="hours before the first look")
    parser.add_argument("--memory", type=float, default=48.0, help="MiB that the day may leave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers to this file as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--data-dir", folder, "--step-ms", "5", "--pages", "8192", "--max-num-seqs", "64")
        with ServerProcess("sluice", *flags) as server:
            result = asyncio.run(run(server, args))
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(result["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
