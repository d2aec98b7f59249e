"""The running of batch jobs: lines in, a bounded number of them in flight, records to one writer; and what is told of it.

A run ends in one of two ways: the last line has its record, or it halts for a named reason and whatever has finished is
written and synced. Several runs may share one `Slots`; then the rank of each says whose line is next.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from engine.clock import Clock, MonotonicClock
from engine.errors import EngineDead
from engine.joblines import BadLine, JobError, JobLine
from engine.joblog import Record, Records, Usage, answer_record, fault_record
from engine.types import Tenant

if TYPE_CHECKING:
    from tqdm import tqdm

    from engine.engine import Engine
    from engine.openai import Answer

logger = logging.getLogger(__name__)

INFLIGHT_BYTES = 32 << 20  # of input lines, however many may be in flight
ATTEMPTS = 8  # at one line, where its answer says to try again later
LONGEST_RETRY = 30.0  # seconds
REPORT_SECONDS = 5.0


# -- who answers


@dataclass(frozen=True, slots=True)
class Harvest:
    """What the engine knows of the offline tenant's share so far; running totals. None: this engine does not count it."""

    requests_preempted: int = 0  # times a running request gave way
    recomputed_tokens: int = 0
    worker_stops: int | None = None  # times the offline model was stopped
    device_seconds: float | None = None  # owned by the offline model

    def __sub__(self, other: Harvest) -> Harvest:
        return Harvest(
            self.requests_preempted - other.requests_preempted,
            self.recomputed_tokens - other.recomputed_tokens,
            None if self.worker_stops is None else self.worker_stops - (other.worker_stops or 0),
            None if self.device_seconds is None else self.device_seconds - (other.device_seconds or 0.0),
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a job took. Tokens are exact, from its records; the harvest is the offline tenant's while the job ran."""

    usage: Usage
    wall_seconds: float
    harvest: Harvest

    def lines(self) -> list[str]:
        """For people."""
        usage, harvest = self.usage, self.harvest
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        told = [
            f"tokens: {usage.prompt_tokens} in{cached}, {usage.completion_tokens} out",
            f"offline work meanwhile: {harvest.requests_preempted} requests preempted, "
            f"{harvest.recomputed_tokens} tokens computed again",
        ]
        if harvest.device_seconds is not None:
            told.append(
                f"device: {harvest.device_seconds:.1f} s of {self.wall_seconds:.1f} s, stopped {harvest.worker_stops} times"
            )
        return told


class Backend(Protocol):
    """What answers the lines."""

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        """Raises EngineDead; every other failure is an answer."""
        ...

    def down(self) -> str | None:
        """Why it can answer nothing until something changes; None while it can."""
        ...

    def harvest(self) -> Harvest: ...

    def close(self) -> None: ...


class EngineBackend:
    """An engine in this process, its lines the offline tenant's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        from engine.openai import answer

        body = seeded(line.body, self._engine.config.seed, line.number)
        return await answer(self._engine, line.url, body, tenant=Tenant.OFFLINE, request_id=request_id)

    def down(self) -> str | None:
        sharing = self._engine.stats().sharing
        return None if sharing is None else sharing.worker_failure

    def harvest(self) -> Harvest:
        stats = self._engine.stats()
        counters = stats.tenants[Tenant.OFFLINE].counters
        if stats.sharing is None:
            return Harvest(counters.preemptions, counters.recomputed_tokens)
        seconds = stats.sharing.device_seconds.get("offline", 0.0)
        return Harvest(counters.preemptions, counters.recomputed_tokens, stats.sharing.preemptions, seconds)

    def close(self) -> None:
        self._engine.close()


def seeded(body: Mapping[str, Any], seed: int, number: int) -> Mapping[str, Any]:
    """`body` with a seed that depends on its line alone, so that a resumed job samples what an uninterrupted one would.

    Left as it is where it has a seed, or several prompts: one seed would make equal prompts give equal outputs.
    """
    prompt = body.get("prompt")
    if body.get("seed") is not None or (isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)):
        return body
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return {**body, "seed": int.from_bytes(digest, "big") >> 1}


# -- what is in flight


class Slots:
    """Bounds what is in flight, in lines and in bytes, over all runs that share it. The lowest rank goes first.

    Nobody overtakes the first in line, however large its line is.
    """

    def __init__(self, lines: int, size: int = INFLIGHT_BYTES) -> None:
        self._lines, self._size = lines, size
        self._taken = self._bytes = 0
        self._waiting: list[tuple[Run, int, asyncio.Future[bool]]] = []

    def resize(self, lines: int) -> None:
        """From now on as many lines."""
        self._lines = lines
        self._grant()

    def fits(self, size: int) -> bool:
        return self._taken == 0 or (self._taken < self._lines and self._bytes + size <= self._size)

    async def take(self, run: Run, size: int) -> bool:
        """Wait for room for a line of `run`. False if it was told to wait no longer."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (run, size, future)
        self._waiting.append(entry)
        self._grant()
        try:
            return await future
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif future.result():
                self.give(size)
            raise

    def give(self, size: int) -> None:
        self._taken -= 1
        self._bytes -= size
        self._grant()

    def dismiss(self, run: Run) -> None:
        """`run` waits no longer."""
        for entry in [entry for entry in self._waiting if entry[0] is run]:
            self._waiting.remove(entry)
            if not entry[2].done():
                entry[2].set_result(False)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            first = min(self._waiting, key=lambda entry: entry[0].rank)
            _, size, future = first
            if not future.done() and not self.fits(size):
                return
            self._waiting.remove(first)
            if future.done():  # its task was cancelled
                continue
            self._taken += 1
            self._bytes += size
            future.set_result(True)


class Halt(enum.Enum):
    """Why a run ended before its last line."""

    INTERRUPTED = "interrupted"
    ENGINE = "the engine stopped"
    BACKEND = "nothing can answer now"
    OUTPUT = "the output cannot be written"
    INPUT = "the input changed"


async def _breathe() -> None:
    """A long stretch of lines already done must not hold up the others."""
    await asyncio.sleep(0)


class Run:
    """One pass over the lines that have no record yet: feeds the backend, hands records to one writer."""

    def __init__(
        self,
        backend: Backend,
        log: Records,
        slots: Slots,
        *,
        say: Callable[[str], None],
        on_record: Callable[[Record], None] = lambda _: None,
        breathe: Callable[[], Awaitable[None]] = _breathe,
    ) -> None:
        """`on_record` is told of each record before it is written; `breathe` is awaited every few lines read."""
        self.rank = 0
        self._backend = backend
        self._log = log
        self._slots = slots
        self._say = say
        self._on_record = on_record
        self._breathe = breathe
        self._grace = 0.0  # seconds that lines in flight get to finish after an interrupt
        self._tasks: set[asyncio.Task[Record | None]] = set()
        self._idle = asyncio.Event()  # no task is left
        self._halted = asyncio.Event()
        self._hurry = asyncio.Event()  # a second interrupt
        self._outbox: list[Record] = []
        self._filled = asyncio.Event()
        self._closing = False
        self.halt: Halt | None = None
        self.cause = ""

    @property
    def in_flight(self) -> int:
        """Lines that are being answered."""
        return len(self._tasks)

    async def __call__(self, lines: Iterable[JobLine | BadLine]) -> None:
        """Run `lines` to the end or to a halt; what finished is written and synced in either case."""
        writer = asyncio.create_task(self._write())
        try:
            await self._feed(lines)
            await self._settle()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._closing = True
            self._filled.set()
            await writer
            for record in self._outbox:  # a writer that gave up
                self._slots.give(record.size)

    def interrupt(self, grace: float = 0.0) -> None:
        """Start no more lines; those in flight get `grace` seconds. A second call ends the grace."""
        if self._halted.is_set():
            self._hurry.set()
        else:
            self._grace = grace
        self._stop(Halt.INTERRUPTED)

    def _stop(self, halt: Halt, cause: object = "") -> None:
        if self.halt is None:
            self.halt, self.cause = halt, str(cause)
        self._log.stop.set()
        self._halted.set()
        self._slots.dismiss(self)

    async def _feed(self, lines: Iterable[JobLine | BadLine]) -> None:
        try:
            for count, line in enumerate(lines):
                if count % 16 == 0:
                    await self._breathe()
                if self.halt is not None:
                    return
                if line.number in self._log.done:
                    continue
                if not await self._slots.take(self, line.size):
                    return
                self._start(line)
        except JobError as error:
            self._stop(Halt.INPUT, error)

    def _start(self, line: JobLine | BadLine) -> None:
        if isinstance(line, BadLine):
            self._put(fault_record(self._log.job, line))
            return
        task = asyncio.create_task(self._answer(line))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, line))

    def _ended(self, task: asyncio.Task[Record | None], line: JobLine) -> None:
        """Also of a task that was cancelled before it began."""
        self._tasks.discard(task)
        record = None if task.cancelled() else task.result()
        if record is None:
            self._slots.give(line.size)
        else:
            self._put(record)
        if not self._tasks:
            self._idle.set()

    async def _answer(self, line: JobLine) -> Record | None:
        """The record of a line; None where there is no verdict on it, so that it runs again."""
        try:
            reply = await self._ask(line)
            if reply.retry_after is not None and self.halt is not None:
                return None
            if reply.status >= 500 and (reason := self._backend.down()):
                self._stop(Halt.BACKEND, reason)
                return None
            return answer_record(self._log.job, line, reply.status, reply.body)
        except EngineDead as error:
            self._stop(Halt.ENGINE, error.__cause__ or error)
            return None
        except Exception:  # a border: a bug that one line meets must not end a long job
            logger.exception("line %d failed", line.number)
            message = "the line met an internal error; see the log, then send it again"
            return fault_record(self._log.job, BadLine(line.number, line.custom_id, "internal_error", message, size=line.size))

    async def _ask(self, line: JobLine) -> Answer:
        request_id = f"{self._log.job}:{line.number}"
        for attempt in range(ATTEMPTS):
            reply = await self._backend.answer(line, request_id)
            if reply.retry_after is None or self.halt is not None:
                break
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(min(reply.retry_after * 2**attempt, LONGEST_RETRY))
        return reply

    async def _settle(self) -> None:
        """Wait for the lines in flight: for all of them, unless halted; after an interrupt for a short grace."""
        while self._tasks and self.halt is None:
            self._idle.clear()
            await _first(self._idle, self._halted)
        if self._tasks and self.halt is Halt.INTERRUPTED and self._grace > 0:
            self._say(f"interrupted: {len(self._tasks)} lines in flight get {self._grace:g} s to finish")
            self._idle.clear()
            await _first(self._idle, self._hurry, timeout=self._grace)

    # -- records out

    def _put(self, record: Record) -> None:
        self._on_record(record)
        self._outbox.append(record)
        self._filled.set()

    async def _write(self) -> None:
        """The one writer. A slot is free again when its record is in the file."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), self._log.sync_due())
            self._filled.clear()
            last, records = self._closing, self._outbox
            self._outbox = []
            try:
                await asyncio.to_thread(self._log.commit, records, sync=last)
            except Exception as error:  # the feed waits for this writer: it must learn of any end
                self._stop(Halt.OUTPUT, error)
                self._outbox[:0] = records
                return
            for record in records:
                self._slots.give(record.size)
            if last:
                return


async def _first(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Wait for the first of the events."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


# -- telling


class Progress:
    """What the person at the terminal sees: a bar on a terminal, else a line every few seconds. All of it on stderr."""

    def __init__(self, name: str, total: int, log: Records, clock: Clock | None = None) -> None:
        self._name, self._total, self._log = name, total, log
        self._clock = clock or MonotonicClock()
        self._began = self._clock.now()
        self._before = len(log.done)
        self.tokens = 0  # generated in this run
        self._bar: tqdm[NoReturn] | None = None
        self.interval = 0.5 if sys.stderr.isatty() else REPORT_SECONDS

    def start(self) -> None:
        """The engine is loaded: rates count from now."""
        self._began = self._clock.now()
        self._before = len(self._log.done)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self._name, total=self._total, initial=self._before, unit="line", dynamic_ncols=True)

    def count(self, record: Record) -> None:
        self.tokens += record.usage.completion_tokens

    async def report(self) -> None:
        """Show progress until cancelled."""
        while True:
            await asyncio.sleep(self.interval)
            self.show()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def show(self) -> None:
        done = len(self._log.done)
        counts = f"ok={self._log.out.count} err={self._log.errors.count}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{counts} {self._speed()} tok/s", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        percent = 100 * done // self._total
        self.say(f"{percent}% {done}/{self._total} lines, {counts}, {self._speed()} tok/s, ETA {self._eta(done)}")

    def close(self) -> None:
        if self._bar is not None:
            self.show()
            self._bar.close()
            self._bar = None

    def receipt(self, harvest: Harvest) -> Receipt:
        """What the whole job took in tokens, and this run in the rest."""
        return Receipt(self._log.usage, self._clock.now() - self._began, harvest)

    def summary(self) -> str:
        ran = self._clock.now() - self._began
        ok, failed = self._log.out.count, self._log.errors.count
        text = f"{ok + failed} lines, {ok} ok, {failed} failed"
        if failed:
            text += f" (see {self._log.errors.path})"
        return f"{text}; {self.tokens} tokens in {_duration(ran)} ({self._speed()} tok/s)"

    def _speed(self) -> str:
        rate = self.tokens / max(self._clock.now() - self._began, 1e-3)
        return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"

    def _eta(self, done: int) -> str:
        if done <= self._before:
            return "unknown"
        return _duration((self._clock.now() - self._began) * (self._total - done) / (done - self._before))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
