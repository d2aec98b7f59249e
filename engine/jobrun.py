"""The running of a batch job: lines in, a bounded number of them in flight, records to one writer; and what is told of it.

Everything ends in one of two ways: the last line has its record, or the run halts for a named reason and whatever has
finished is written and synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from engine.clock import Clock, MonotonicClock
from engine.errors import EngineDead
from engine.joblines import BadLine, JobError, JobLine
from engine.joblog import JobLog, Record, answer_record, fault_record

if TYPE_CHECKING:
    from tqdm import tqdm

    from engine.openai import Answer

logger = logging.getLogger(__name__)

INFLIGHT_BYTES = 32 << 20  # of input lines, however many may be in flight
ATTEMPTS = 8  # at one line, where its answer says to try again later
LONGEST_RETRY = 30.0  # seconds
REPORT_SECONDS = 5.0


class Backend(Protocol):
    """What answers the lines."""

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        """Raises EngineDead; every other failure is an answer."""
        ...

    def close(self) -> None: ...


class Slots:
    """Bounds what is in flight, in lines and in bytes. One taker."""

    def __init__(self, lines: int, size: int) -> None:
        self._lines, self._size = lines, size
        self._taken = self._bytes = 0
        self.changed = asyncio.Event()

    def fits(self, size: int) -> bool:
        return self._taken == 0 or (self._taken < self._lines and self._bytes + size <= self._size)

    def take(self, size: int) -> None:
        self._taken += 1
        self._bytes += size

    def give(self, size: int) -> None:
        self._taken -= 1
        self._bytes -= size
        self.changed.set()


class Halt(enum.Enum):
    """Why a run ended before its last line."""

    INTERRUPTED = "interrupted"
    ENGINE = "the engine stopped"
    OUTPUT = "the output cannot be written"
    INPUT = "the input changed"


class Run:
    """One pass over the lines that have no record yet: feeds the backend, hands records to one writer."""

    def __init__(self, backend: Backend, log: JobLog, progress: Progress, *, max_inflight: int, grace: float) -> None:
        self._backend = backend
        self._log = log
        self._progress = progress
        self._grace = grace  # seconds that lines in flight get to finish after an interrupt
        self._slots = Slots(max_inflight, INFLIGHT_BYTES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()  # no task is left
        self._halted = asyncio.Event()
        self._hurry = asyncio.Event()  # a second interrupt
        self._outbox: list[Record] = []
        self._filled = asyncio.Event()
        self._closing = False
        self.halt: Halt | None = None
        self.cause = ""

    async def __call__(self, lines: Iterable[JobLine | BadLine]) -> None:
        """Run `lines` to the end or to a halt; what finished is written and synced in either case."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        writer = asyncio.create_task(self._write())
        reporter = asyncio.create_task(self._report())
        try:
            await self._feed(lines)
            await self._settle()
        finally:
            reporter.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(reporter, *self._tasks, return_exceptions=True)
            self._closing = True
            self._filled.set()
            await writer

    def _interrupt(self) -> None:
        if self._halted.is_set():
            self._hurry.set()
        self._stop(Halt.INTERRUPTED)

    def _stop(self, halt: Halt, cause: object = "") -> None:
        if self.halt is None:
            self.halt, self.cause = halt, str(cause)
        self._log.stop.set()
        self._halted.set()
        self._slots.changed.set()

    async def _feed(self, lines: Iterable[JobLine | BadLine]) -> None:
        try:
            for count, line in enumerate(lines):
                if count % 64 == 0:
                    await asyncio.sleep(0)  # a long stretch of lines already done must not hold up the others
                if line.number in self._log.done:
                    continue
                if not await self._slot(line.size):
                    return
                self._start(line)
        except JobError as error:
            self._stop(Halt.INPUT, error)

    async def _slot(self, size: int) -> bool:
        """Wait for room in flight. False once the run has halted."""
        while self.halt is None:
            if self._slots.fits(size):
                self._slots.take(size)
                return True
            self._slots.changed.clear()
            await self._slots.changed.wait()
        return False

    def _start(self, line: JobLine | BadLine) -> None:
        if isinstance(line, BadLine):
            self._put(fault_record(self._log.job, line))
            return
        task = asyncio.create_task(self._one(line))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()

    async def _one(self, line: JobLine) -> None:
        try:
            reply = await self._ask(line)
            if reply.retry_after is not None and self.halt is not None:
                return  # no verdict on the line: it runs again on resume
            record = answer_record(self._log.job, line, reply.status, reply.body)
            self._progress.count(reply.body)
        except EngineDead as error:
            self._stop(Halt.ENGINE, error.__cause__ or error)
            return
        except Exception:  # a border: a bug that one line meets must not end a long job
            logger.exception("line %d failed", line.number)
            message = "the line met an internal error; see the log, then try --retry-errors"
            record = fault_record(
                self._log.job, BadLine(line.number, line.custom_id, "internal_error", message, size=line.size)
            )
        self._put(record)

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
        if self._tasks and self.halt is Halt.INTERRUPTED:
            self._progress.say(f"interrupted: {len(self._tasks)} lines in flight get {self._grace:g} s to finish")
            self._idle.clear()
            await _first(self._idle, self._hurry, timeout=self._grace)

    # -- records out

    def _put(self, record: Record) -> None:
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
                return
            for record in records:
                self._slots.give(record.size)
            if last:
                return

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._progress.interval)
            self._progress.show()


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

    def __init__(self, name: str, total: int, log: JobLog, clock: Clock | None = None) -> None:
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

    def count(self, body: Mapping[str, Any]) -> None:
        usage = body.get("usage")
        if isinstance(usage, Mapping):
            self.tokens += int(usage.get("completion_tokens") or 0)

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
