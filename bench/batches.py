"""A batch under random `kill -9`: is each line answered exactly once, and what do people notice meanwhile?

A real server (two models: the batch runs in the offline worker) is given a batch. Each time so many more lines are done, one of
its processes, chosen by a seed, is killed: the server itself, which is then started again on the same folder, its offline
worker, or the guardian. Beside it short online requests come at a steady pace; their latency is told with kills and, in the
same run, without. A request that was in flight in a killed server is lost to that kill, and counted apart.

    python -m bench.batches                       # 2,000 lines, 50 kills
    python -m bench.batches --lines 100 --kills 4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120.0  # seconds that anything may take before the run is given up
VICTIMS = ("server", "worker", "guardian")
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    model: str
    offline_model: str
    lines: int
    kills: int
    seed: int
    online_every: float = 0.1  # seconds between online requests
    max_tokens: int = 16
    # A steady pace of online requests teaches the adaptive cool-down to keep the device between them: fixed, or offline waits.
    flags: tuple[str, ...] = ("--cooldown-ms", "5")


@dataclass(slots=True)
class Outcome:
    """What came of it. Latencies are those of online requests, in milliseconds."""

    lines: int
    kills: dict[str, int]
    answered: int
    failed: int
    missing: int
    twice: int
    status: str
    seconds: float
    online_ms: list[float] = field(default_factory=list)
    online_lost: int = 0  # in flight in a server that was killed, or sent while it was away
    online_errors: int = 0  # refused or failed by a server that was there

    @property
    def exactly_once(self) -> bool:
        return self.status == "completed" and self.answered == self.lines and not (self.missing or self.twice or self.failed)

    def summary(self) -> dict[str, Any]:
        """For people and for JSON."""
        told = {key: value for key, value in asdict(self).items() if key != "online_ms"}
        ordered = sorted(self.online_ms)
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            told[f"online_{name}_ms"] = round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 2) if ordered else None
        return told | {"online_answered": len(ordered), "seconds": round(self.seconds, 1), "exactly_once": self.exactly_once}


class Server:
    """A server process that can be killed and started again on the same port and folder."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._log = (folder / "server.log").open("ab")

    async def start(self, session: aiohttp.ClientSession) -> None:
        """Until it takes requests."""
        plan = self._plan
        command = [sys.executable, "-m", "engine.server", plan.model, "--offline-model", plan.offline_model]
        command += ["--port", str(self.port), "--data-dir", str(self._folder / "data"), "--threads", "1", *plan.flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log, env=environment)
        deadline = time.monotonic() + PATIENCE
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.tail()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(self.url + "/ready", timeout=aiohttp.ClientTimeout(total=5)) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)

    def tail(self) -> str:
        return (self._folder / "server.log").read_text(errors="replace")[-3000:]

    def children(self) -> dict[str, psutil.Process]:
        """The worker and the guardian, as far as they are there."""
        found = {}
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = " ".join(child.cmdline())
                    for name in ("worker", "guardian"):
                        if f"colocate.{name}" in words or f"colocate/{name}" in words:
                            found[name] = child
        return found

    async def kill(self, victim: str, session: aiohttp.ClientSession) -> bool:
        """`kill -9`. False if there is no such process at the moment."""
        assert self.process is not None
        if victim != "server":
            child = self.children().get(victim)
            if child is None:
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
            return True
        orphans = list(self.children().values())
        self.process.kill()
        self.process.wait()
        await asyncio.to_thread(psutil.wait_procs, orphans, PATIENCE)  # they must end by themselves
        await self.start(session)
        return True

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            orphans = list(self.children().values())
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.process.kill()
            self.process.wait()
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        self._log.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)


async def run(plan: Plan, folder: Path) -> Outcome:
    """One batch from its upload to its files, with the kills that the plan asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(plan.seed)
    async with aiohttp.ClientSession() as session, Server(plan, folder) as server:
        await server.start(session)
        batch_id = await _submit(session, server.url, plan)
        began, outcome = time.monotonic(), Outcome(plan.lines, {}, 0, 0, 0, 0, "", 0.0)
        online = asyncio.create_task(_online(server, outcome, plan.online_every))
        try:
            batch, kills = await _kill_along(session, server, plan, batch_id, rng)
        finally:
            online.cancel()
            await asyncio.gather(online, return_exceptions=True)
        outcome.seconds, outcome.kills, outcome.status = time.monotonic() - began, dict(kills), batch["status"]
        await _count(session, server.url, batch, outcome)
        return outcome


async def _submit(session: aiohttp.ClientSession, url: str, plan: Plan) -> str:
    body = {"max_tokens": plan.max_tokens, "ignore_eos": True, "temperature": 0.5}
    lines = (
        {"custom_id": f"line-{n}", "method": "POST", "url": "/v1/completions", "body": body | {"prompt": f"line {n}"}}
        for n in range(plan.lines)
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", text.encode(), filename="lines.jsonl")
    async with session.post(url + "/v1/files", data=form) as response:
        file = await response.json()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    async with session.post(url + "/v1/batches", json=wanted) as response:
        return str((await response.json())["id"])


async def _kill_along(
    session: aiohttp.ClientSession, server: Server, plan: Plan, batch_id: str, rng: random.Random
) -> tuple[dict[str, Any], Counter[str]]:
    """Kills spread over the batch's life: one each time another share of its lines is done."""
    kills: Counter[str] = Counter()
    moved, seen = time.monotonic(), -1
    while True:
        batch = await _ask(session, f"{server.url}/v1/batches/{batch_id}")
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        if done != seen:
            moved, seen = time.monotonic(), done
        if time.monotonic() - moved > PATIENCE:
            raise RuntimeError(f"the batch stands still at {counts}, {batch['sluice']}:\n{server.tail()}")
        if batch["status"] in ENDED:
            return batch, kills
        if kills.total() < plan.kills and done >= (kills.total() + 0.5) * plan.lines / plan.kills:
            await asyncio.sleep(rng.uniform(0, 0.05))
            victim = rng.choice(VICTIMS)
            if await server.kill(victim, session):
                kills[victim] += 1
                moved = time.monotonic()
        else:
            await asyncio.sleep(0.01)


async def _ask(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as response:
        body: dict[str, Any] = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {body}")
        return body


async def _online(server: Server, outcome: Outcome, every: float) -> None:
    """Short requests at a steady pace, whatever became of the ones before."""
    body = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    tasks: set[asyncio.Task[None]] = set()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one() -> None:
            process, began = server.process, time.perf_counter()
            try:
                async with session.post(server.url + "/v1/completions", json=body) as response:
                    await response.read()
            except (aiohttp.ClientError, OSError):
                outcome.online_lost += 1
                return
            if response.status == 200:
                outcome.online_ms.append((time.perf_counter() - began) * 1e3)
            elif response.status == 503 and process is not None and time.monotonic() - _started(process) < PATIENCE / 4:
                outcome.online_lost += 1  # it is loading
            else:
                outcome.online_errors += 1

        try:
            while True:
                task = asyncio.create_task(one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(every)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _started(process: subprocess.Popen[bytes]) -> float:
    """On the monotonic clock; long ago if it is gone."""
    try:
        return time.monotonic() - (time.time() - psutil.Process(process.pid).create_time())
    except psutil.NoSuchProcess:
        return time.monotonic()


async def _count(session: aiohttp.ClientSession, url: str, batch: dict[str, Any], outcome: Outcome) -> None:
    """Each custom_id, in both files."""
    seen: Counter[str] = Counter()
    for key, name in (("output_file_id", "answered"), ("error_file_id", "failed")):
        if batch[key] is None:
            continue
        async with session.get(f"{url}/v1/files/{batch[key]}/content") as response:
            records = [json.loads(text) for text in (await response.text()).splitlines()]
        seen.update(str(record["custom_id"]) for record in records)
        setattr(outcome, name, len(records))
    outcome.twice = sum(1 for count in seen.values() if count > 1)
    outcome.missing = sum(1 for n in range(outcome.lines) if f"line-{n}" not in seen)


def tiny_model(folder: Path) -> Path:
    """A Llama of 6 million random weights with the demo model's tokenizer: small enough to be loaded again and again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.demo import resolve_model

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=49152, **sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    demo = resolve_model("demo")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (demo / name).is_file():
            shutil.copy(demo / name, folder / name)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.batches", description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--model", help="a checkpoint for both tenants (default: a tiny random one)")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-batches-") as name:
        folder = Path(name)
        model = args.model or str(tiny_model(folder / "model"))
        arms = {}
        for arm, kills in (("without kills", 0), ("with kills", args.kills)):
            plan = Plan(model, model, args.lines, kills, args.seed, max_tokens=args.max_tokens)
            outcome = asyncio.run(run(plan, folder / arm.replace(" ", "-")))
            arms[arm] = outcome.summary()
            print(f"{arm}: {json.dumps(arms[arm])}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"arguments": {**vars(args), "out": None}, **arms}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(arm["exactly_once"] for arm in arms.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
