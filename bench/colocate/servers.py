"""Real servers: started with an arm's flags, watched through their log and /metrics, asked what processor time they used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
_LISTENING = re.compile(r"listening on (http://\S+?),")
_PROBE = re.compile(
    r"gate (\w+): freeze p50 ([\d.]+) ms, p99 ([\d.]+) ms; thaw p50 ([\d.]+) ms, p99 ([\d.]+) ms \((\d+) trials\)"
)
_WANTED = re.compile(
    "sluice_(device_time|preemption|request_preemptions|reclaim|slabs|online_headroom|recomputed|computed|generation_tokens"
    "|prompt_tokens|num_|kv_)"
)


class ServerError(RuntimeError):
    """A server did not start or ended; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the gate's start-up probe measured, in milliseconds."""

    gate: str
    freeze_p50: float
    freeze_p99: float
    thaw_p50: float
    thaw_p99: float
    trials: int

    @classmethod
    def find(cls, log: str) -> Probe | None:
        """The last probe that a log tells of."""
        found = _PROBE.findall(log)
        if not found:
            return None
        gate, freeze_p50, freeze_p99, thaw_p50, thaw_p99, trials = found[-1]
        return cls(gate, float(freeze_p50), float(freeze_p99), float(thaw_p50), float(thaw_p99), int(trials))


@dataclass(frozen=True, slots=True)
class Scrape:
    """/metrics at one moment: (name, labels, value) of the samples that say something about sharing."""

    samples: tuple[tuple[str, Mapping[str, str], float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Scrape:
        return cls(
            tuple(
                (sample.name, sample.labels, sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if _WANTED.match(sample.name) and not sample.name.endswith("_created")
            )
        )

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the samples of that name with these labels; None if there is none."""
        found = [value for key, has, value in self.samples if key == name and labels.items() <= has.items()]
        return sum(found) if found else None

    def buckets(self, name: str) -> dict[float, float]:
        """Cumulative counts of a histogram by upper bound."""
        counts: dict[float, float] = {}
        for key, labels, value in self.samples:
            if key == f"{name}_bucket":
                bound = float(labels["le"])
                counts[bound] = counts.get(bound, 0.0) + value
        return counts


class Server:
    """One `python -m engine.server`. Idle between its turns: then it uses next to no processor time."""

    def __init__(self, name: str, flags: list[str], log: Path) -> None:
        self.name = name
        self.flags = flags
        self.url = ""
        self.models: list[str] = []  # online, offline
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        """Start it and wait until it serves. Raises ServerError."""
        command = [sys.executable, "-m", "engine.server", *self.flags, "--port", "0", "--data-dir", "none"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            await self._ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        if process is None:
            return
        tree = self._tree()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(15):
                while process.poll() is None:
                    await asyncio.sleep(0.05)
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        self._process = None

    async def _ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        async with aiohttp.ClientSession() as session:
            while True:
                if self._running().poll() is not None:
                    raise self._failed("it ended while starting")
                if time.monotonic() > deadline:
                    raise self._failed(f"not ready after {START_SECONDS:g} s")
                if not self.url and (found := _LISTENING.search(self.log())):
                    self.url = found[1]
                if self.url and (models := await self._models(session)):
                    break
                await asyncio.sleep(0.2)
        self.models = models
        if "--offline-model" in self.flags and "serving without the offline model" in self.log():
            raise self._failed("its offline model did not start")

    async def _models(self, session: aiohttp.ClientSession) -> list[str]:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{self.url}/v1/models") as answer:
                if answer.status == 200:
                    return list(dict.fromkeys(str(model["root"]) for model in (await answer.json())["data"]))
        return []

    # -- what it says

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def probe(self) -> Probe | None:
        return Probe.find(self.log())

    async def scrape(self, session: aiohttp.ClientSession) -> Scrape:
        async with session.get(f"{self.url}/metrics") as answer:
            return Scrape.parse(await answer.text())

    def cpu_seconds(self) -> float:
        """Processor time of the whole tree so far."""
        total = 0.0
        for member in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                total += times.user + times.system
        return total

    def resident_mb(self) -> float:
        return sum(member.memory_info().rss for member in self._tree()) / 1e6

    # -- inside

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._running().pid)
            return [*top.children(recursive=True), top]
        return []

    def _failed(self, reason: str) -> ServerError:
        return ServerError(f"server {self.name!r}: {reason}\n{self.log()[-3000:]}")


@dataclass(frozen=True, slots=True)
class Clock:
    """Processor time of the machine, of this process and of a server, if there is one, at one moment."""

    at: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def read(cls, server: Server | None = None) -> Clock:
        times = psutil.cpu_times()
        own = sum(os.times()[:2]) + (0.0 if server is None else server.cpu_seconds())
        busy = float(times.user + times.nice + times.system + times.irq + times.softirq)
        return cls(time.perf_counter(), busy, float(getattr(times, "steal", 0.0)), own)

    def since(self, before: Clock) -> dict[str, Any]:
        """Cores used meanwhile: by the server and the client, by others, by the hypervisor."""
        wall = self.at - before.at
        own = (self.own - before.own) / wall
        return {
            "own": own,
            "others": max(0.0, (self.busy - before.busy) / wall - own),
            "stolen": (self.stolen - before.stolen) / wall,
        }
