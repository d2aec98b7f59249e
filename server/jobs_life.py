"""The life of one batch, from its validation to its output files, as one task in the event loop of the jobs.

Whatever it does may be cut off at any moment by `kill -9`: what it has said in the store and in the records is where the next
process takes it up. A full disk only makes it wait, and it says so (`trouble`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from engine.errors import UnknownModel
from engine.joblines import BadLine, InputFacts, JobError, JobLine, read_lines
from engine.joblog import Blocked, Record, Records, Usage, fault_record
from engine.jobrun import Backend, Halt, Harvest, Run, Slots
from engine.openai import COMPLETIONS
from engine.timeline import StepHistogram
from engine.types import Tenant
from server.jobs_plan import Rate, tokens_per_line
from server.jobs_store import BatchRecord, FileRecord, Harvested, LineError, Store, StoreFull

if TYPE_CHECKING:
    from engine import Engine

log = logging.getLogger(__name__)

MAX_ERRORS = 100  # told of a batch that fails its validation
PAUSE_GRACE = 5.0  # seconds that lines in flight get to finish when a job is paused
_SYNC_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_AT_ONCE = 256  # records written at once for lines that will never run
_FIRST_NAP, _LONGEST_NAP = 0.2, 10.0  # seconds between attempts while the disk refuses
_GUESSED_ANSWER = {COMPLETIONS: 16}  # tokens, where a line does not say how many it wants
_UNFINISHED = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered"),
    "expired": ("batch_expired", "the batch's completion window ended before this line was answered"),
}


@dataclass(slots=True)
class Totals:
    """Of all jobs since this process started. Written by the jobs' event loop alone, but for what `synced` enters."""

    completed: int = 0
    failed: int = 0
    resume_skipped: int = 0  # lines that had their record when a job was taken up again
    write_errors: int = 0
    sync_seconds: StepHistogram = field(default_factory=lambda: StepHistogram(_SYNC_SECONDS))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def synced(self, seconds: float) -> None:
        """Any thread: each job has its own."""
        with self.lock:
            self.sync_seconds.add(seconds)


@dataclass(slots=True)
class Shared:
    """What all jobs of a server use."""

    store: Store
    now: Callable[[], float]  # Unix seconds, never going back
    max_line_bytes: int
    slots: Slots
    breathe: Callable[[], Awaitable[None]]
    engine: Engine | None = None
    backend: Backend | None = None
    totals: Totals = field(default_factory=Totals)
    validating: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


class Life:
    """One unfinished batch. All of it belongs to the jobs' event loop; others may look at `record`, `counts` and `trouble`."""

    def __init__(self, record: BatchRecord, shared: Shared) -> None:
        self.record = record
        self.rate = Rate()  # tokens per second, lately
        self.seen_tokens: int | None = None  # when its rate was last looked at
        self.rank = 0
        self.late = False  # it was said that it will miss its window
        self.run: Run | None = None
        self.ending = "cancelled" if record.status == "cancelling" else None
        self._shared = shared
        self._records: Records | None = None
        self._fault: Blocked | None = None  # it stands still until somebody resumes it, or until a retry works
        self._stuck = False  # of these, the former
        self._may_run = False
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()

    # -- what others see

    @property
    def counts(self) -> tuple[int, int]:
        """Lines answered, and lines in the error file."""
        records = self._records
        if records is None:
            return self.record.completed, self.record.failed
        return records.out.count, records.errors.count

    @property
    def usage(self) -> Usage:
        records = self._records
        if records is None:
            return Usage(self.record.input_tokens, self.record.output_tokens)
        return records.usage

    @property
    def trouble(self) -> Blocked | None:
        """Why it stands still, although nobody asked for it."""
        return self._fault or (self._records.blocked if self._records is not None else None)

    @property
    def held(self) -> bool:
        """Whether the plan must do without it until somebody resumes it."""
        return self.record.paused or self._stuck

    @property
    def tokens_left(self) -> float:
        """The work that is left, as far as it can be known."""
        done = sum(self.counts)
        return (self.record.total - done) * tokens_per_line(done, self.usage.total_tokens, self.record.estimate)

    @property
    def lines_left(self) -> int:
        """Lines without an answer; before they are validated, all of the file's."""
        return max(0, (self.record.total or self.record.lines) - sum(self.counts))

    @property
    def in_flight(self) -> int:
        return 0 if self.run is None else self.run.in_flight

    # -- what others ask for

    def allow(self, may_run: bool) -> None:
        """The plan says whether it is among those that run."""
        if may_run != self._may_run:
            self._may_run = may_run
            self._changed.set()
            if not may_run and self.run is not None:
                self.run.interrupt(PAUSE_GRACE)
        if self.run is not None:
            self.run.rank = self.rank

    def end(self, how: str) -> None:
        """Cancelled or expired: what is finished is kept."""
        self.ending = how
        self.stop()

    def stop(self, grace: float = 0.0) -> None:
        if self.run is not None:
            self.run.interrupt(grace)
        self._changed.set()

    def shut(self, grace: float) -> None:
        """The server leaves: nothing more is started here."""
        self._may_run = False
        self.stop(grace)

    def look(self) -> None:
        """Something that it may be waiting for has changed."""
        self._changed.set()

    def moved(self, seconds: float) -> None:
        """The clock was set; the store knows already."""
        self.record = self.record.moved(seconds)

    async def cancel(self) -> BatchRecord:
        """Raises StoreFull: then it was not cancelled."""
        if self.record.status in ("validating", "in_progress"):
            await self._save_now(status="cancelling", cancelling_at=self._stamp(), paused=False)
            self._stuck = False
            self.end("cancelled")
        return self.record

    async def pause(self, paused: bool) -> BatchRecord:
        """Raises StoreFull: then nothing was changed."""
        if self.record.status in ("validating", "in_progress"):
            await self._save_now(paused=paused)
            if not paused:
                self._stuck, self._fault = False, None
            self._changed.set()
        return self.record

    async def prioritize(self, priority: int) -> BatchRecord:
        """Raises StoreFull: then nothing was changed."""
        if self.record.status in ("validating", "in_progress"):
            await self._save_now(priority=priority)
        return self.record

    async def save_progress(self) -> None:
        """So that a restart knows about where it stood. Lost progress of this kind costs nothing."""
        if self.record.ended or self._records is None:
            return
        try:
            await self._save_now()
        except StoreFull as error:
            self._shared.totals.write_errors += 1
            log.warning("%s: %s", self.record.id, error)

    def harvested(self, part: Harvest, share: float, seconds: float) -> None:
        """While `seconds` passed in which it ran, the engine counted `part`; `share` of it is this job's."""
        old = self.record.harvested
        new = Harvested(
            old.requests_preempted + share * part.requests_preempted,
            old.recomputed_tokens + share * part.recomputed_tokens,
            _add(old.worker_stops, part.worker_stops, share),
            _add(old.device_seconds, part.device_seconds, share),
        )
        self.record = replace(self.record, harvested=new, running_seconds=self.record.running_seconds + seconds)

    # -- its life

    async def live(self) -> None:
        """To its end. May be cancelled anywhere."""
        try:
            while not self.record.ended:
                try:
                    await self._go_on()
                except Exception as error:  # a border: one damaged job must not stop the others
                    log.exception("%s", self.record.id)
                    self._hold("damaged_file" if isinstance(error, JobError | OSError) else "internal_error", str(error))
                    await asyncio.sleep(_LONGEST_NAP)
        finally:
            self._close_records()

    async def _go_on(self) -> None:
        if self.record.status == "validating":
            await self._validate()
        elif self.ending is not None or self.record.status == "finalizing":
            await self._finish(self.ending or "completed")
        else:
            await self._work()

    def _close_records(self) -> None:
        if self._records is not None:
            self.record = self.now()
            self._records.close()
            self._records = None

    async def _validate(self) -> None:
        """All lines or none, unless the batch says otherwise: then only that there is one."""
        await self._until(lambda: self.ending is not None or (self._shared.engine is not None and not self.record.paused))
        errors: list[LineError] = []
        models: set[str | None] = set()
        total, guessed = 0, 0.0
        async with self._shared.validating:
            try:
                for count, line in enumerate(self._lines()):
                    if count % 16 == 0:
                        await self._shared.breathe()
                    if self.ending is not None or len(errors) >= MAX_ERRORS:
                        break
                    total += 1
                    guessed += _guess(line)
                    found = self._errors_of(line, models)
                    errors += [] if self.record.skip_bad_lines else found
            except (JobError, OSError) as error:
                errors.append(LineError("invalid_input_file", f"the input file cannot be read: {error}"))
        if not total and not errors:
            errors.append(LineError("empty_file", "the input file has no lines; write one request a line"))
        if self.ending is not None:
            await self._finish(self.ending)
        elif errors:
            await self._save(status="failed", failed_at=self._stamp(), errors=tuple(errors), total=total)
        else:
            names = tuple(sorted(name for name in models if name is not None))[:16]
            started = self._stamp()
            await self._save(status="in_progress", in_progress_at=started, total=total, estimate=guessed / total, models=names)

    def _errors_of(self, line: JobLine | BadLine, models: set[str | None]) -> list[LineError]:
        """What is wrong with a line, if anything is; a model that is served goes to `models`."""
        if isinstance(line, BadLine):
            return [LineError(line.code, line.message, line.param, line.number)]
        assert self._shared.engine is not None
        model = line.body.get("model") or self._shared.engine.resolve(None, Tenant.OFFLINE).id
        if not isinstance(model, str) or model in models:
            return []  # a model of another type is the line's own error, like every other parameter
        if self._serves(model):
            models.add(model)
            return []
        return [LineError("model_not_found", f"the model {model[:100]!r} is not served here", "model", line.number)]

    def _serves(self, model: str) -> bool:
        assert self._shared.engine is not None
        try:
            self._shared.engine.resolve(model, Tenant.OFFLINE)
        except UnknownModel:
            return False
        return True

    def _lines(self) -> Iterator[JobLine | BadLine]:
        """The input's lines. Raises JobError and OSError."""
        file = self._shared.store.file(self.record.input_file_id)
        if file is None:
            raise JobError("the input file is gone")
        path = self._shared.store.path(file.id)
        status = path.stat()
        if status.st_size != file.bytes:
            raise JobError(f"the input file has {status.st_size} bytes where {file.bytes} were uploaded")
        facts = InputFacts(status.st_size, status.st_mtime_ns, file.sha256, file.lines)
        for line in read_lines(path, facts, self._shared.max_line_bytes):
            if isinstance(line, JobLine) and line.url != self.record.endpoint:
                message = f"the batch's endpoint is {self.record.endpoint}, this line's url {line.url}"
                yield BadLine(line.number, line.custom_id, "url_mismatch", message, "url", line.size)
            else:
                yield line

    async def _work(self) -> None:
        """Run what has no record, as long as the plan lets it."""
        await self._until(lambda: self.ending is not None or (self._may_run and not self.held))
        if self.ending is not None:
            return
        if missing := [name for name in self.record.models if not self._serves(name)]:
            self._hold("model_not_found", f"the model {missing[0]!r} is not served here; resume the job once it is")
            return
        records = await self._open_records()
        if len(records.done) < self.record.total and self._may_run and self.ending is None:
            await self._run(records)
        if len(records.done) >= self.record.total and self.ending is None:
            await self._save(status="finalizing", finalizing_at=self._stamp())
        else:
            self._close_records()

    async def _run(self, records: Records) -> None:
        assert self._shared.backend is not None
        self.run = run = Run(
            self._shared.backend,
            records,
            self._shared.slots,
            say=self._say,
            on_record=self._count,
            breathe=self._shared.breathe,
        )
        run.rank = self.rank
        try:
            await run(self._lines())
        finally:
            self.run = None
            self._shared.totals.write_errors += records.num_refusals
        if run.halt is Halt.INPUT:
            self._hold("damaged_file", run.cause)
        elif run.halt in (Halt.BACKEND, Halt.ENGINE):
            self._hold("engine_unavailable", run.cause)
        elif run.halt is Halt.OUTPUT and not self.held and self.ending is None:
            self._hold("disk_error", run.cause)

    async def _finish(self, how: str) -> None:
        """Every line has its record: then the files are there for the client."""
        records = await self._open_records()
        if how in _UNFINISHED and len(records.done) < self.record.total:
            await self._answer_the_rest(records, *_UNFINISHED[how])
        await self._commit(records, [], sync=True)
        self._close_records()
        files, stamp = await asyncio.to_thread(self._output_files), self._stamp()
        await self._save(files, **{"status": how, f"{how}_at": stamp})

    async def _answer_the_rest(self, records: Records, code: str, message: str) -> None:
        batch: list[Record] = []
        for count, line in enumerate(self._lines()):
            if count % 16 == 0:
                await self._shared.breathe()
            if line.number not in records.done:
                fault = line if isinstance(line, BadLine) else BadLine(line.number, line.custom_id, code, message)
                batch.append(fault_record(self.record.job, fault))
            if len(batch) >= _AT_ONCE:
                await self._commit(records, batch)
                batch = []
        await self._commit(records, batch)

    def _output_files(self) -> list[FileRecord]:
        """The files with records in them; empty ones go."""
        batch, store, made = self.record, self._shared.store, []
        for file_id, count, name in (
            (batch.output_id, batch.completed, f"{batch.id}_output.jsonl"),
            (batch.error_id, batch.failed, f"{batch.id}_error.jsonl"),
        ):
            path = store.path(file_id)
            if not count:
                path.unlink(missing_ok=True)
                continue
            now, size = self._stamp(), path.stat().st_size
            expires = None if batch.output_seconds is None else now + batch.output_seconds
            made.append(
                FileRecord(
                    id=file_id,
                    owner=batch.owner,
                    filename=name,
                    purpose="batch_output",
                    bytes=size,
                    created_at=now,
                    expires_at=expires,
                    lines=count,
                )
            )
        return made

    # -- its records

    async def _open_records(self) -> Records:
        """Waits while the disk refuses. Raises JobError for records of something else."""
        if self._records is not None and not self._records.stop.is_set():
            return self._records
        self._close_records()
        await self._insist(self._take_up)
        assert self._records is not None
        self._shared.totals.resume_skipped += len(self._records.done)
        return self._records

    async def _take_up(self) -> None:
        store = self._shared.store
        records = Records(store.path(self.record.output_id), store.path(self.record.error_id), say=self._say)
        records.on_sync = self._shared.totals.synced
        try:
            await asyncio.to_thread(records.open, self.record.job)
        except BaseException:
            records.close()
            raise
        self._records = records

    async def _commit(self, records: Records, batch: list[Record], *, sync: bool = False) -> None:
        for record in batch:
            self._count(record)
        await asyncio.to_thread(records.commit, batch, sync=sync)

    def _count(self, record: Record) -> None:
        if record.ok:
            self._shared.totals.completed += 1
        else:
            self._shared.totals.failed += 1

    # -- its state

    async def _save(self, files: list[FileRecord] | None = None, **changes: Any) -> None:
        """Change the batch for good. Waits while the disk refuses."""
        await self._insist(lambda: self._save_now(files, **changes))
        log.info("%s: %s", self.record.id, self.record.status)

    async def _save_now(self, files: list[FileRecord] | None = None, **changes: Any) -> None:
        async with self._saving:
            await asyncio.to_thread(self._shared.store.save_batch, replace(self.now(), **changes), files or [])
            self.record = replace(self.now(), **changes)

    def now(self) -> BatchRecord:
        """The batch with what its records say at this moment."""
        if self._records is None:
            return self.record
        (completed, failed), usage = self.counts, self.usage
        return replace(
            self.record,
            completed=completed,
            failed=failed,
            input_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
        )

    async def _insist(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Until the disk takes it."""
        nap = _FIRST_NAP
        while True:
            try:
                await attempt()
            except (StoreFull, OSError) as error:
                code = error.code if isinstance(error, StoreFull) else "disk_error"
                if self._fault is None:
                    self._say(f"paused: {error}. Nothing is lost; the job goes on as soon as it can write")
                self._fault = Blocked(code, str(error))
                self._shared.totals.write_errors += 1
                await asyncio.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)
                continue
            self._fault = None
            return

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _hold(self, code: str, reason: str) -> None:
        """Stand still until somebody resumes the job, cancels it, or starts the server again."""
        self._fault, self._stuck = Blocked(code, reason), True
        self._say(f"stands still: {reason}")
        self._close_records()

    def _say(self, text: str) -> None:
        log.warning("%s: %s", self.record.id, text)

    def _stamp(self) -> int:
        return int(self._shared.now())


def _add(total: float | None, more: float | None, share: float) -> float | None:
    return total if more is None else (total or 0.0) + share * more


def _guess(line: JobLine | BadLine) -> float:
    """The tokens of a line, before it has run: four bytes of input a token, and as many out as it allows."""
    if isinstance(line, BadLine):
        return 0.0
    wanted = line.body.get("max_completion_tokens", line.body.get("max_tokens"))
    if not isinstance(wanted, int) or not 0 < wanted < 1 << 20:
        wanted = _GUESSED_ANSWER.get(line.url, 256)
    return line.size / 4 + wanted
