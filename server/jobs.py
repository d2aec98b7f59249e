"""The jobs of the offline tenant: a thread with an event loop of its own, in which every unfinished batch has its life.

A slow disk, a long line or a damaged file is met there, never by the loop that serves people. Every second the jobs are put in
order (`server.jobs_plan`); the first few have their files open and share what may be in flight, the rest wait.
`summary()` is what others may know of them at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.config import state_dir
from engine.errors import InvalidConfig, Overloaded
from engine.joblines import MAX_LINE_BYTES, JobLine
from engine.jobrun import EngineBackend, Harvest, Slots
from engine.types import Tenant
from server.config import ServerConfig
from server.jobs_clock import WallClock
from server.jobs_life import Life, Shared, Totals
from server.jobs_plan import Load, Place, Rate, plan
from server.jobs_store import BatchRecord, Store, StoreFull

if TYPE_CHECKING:
    from engine import Engine
    from engine.openai import Answer

log = logging.getLogger(__name__)

MAX_OPEN = 16  # jobs whose files are open and whose lines may run
TICK_SECONDS = 1.0
_SAVE_SECONDS = 10.0
_SWEEP_SECONDS = 60.0
_POLITE_SECONDS = 0.005  # between a few lines read while people are being answered: reading takes the interpreter from them
_CLOSE_SECONDS = 5.0
_NUM_ENDED = 16  # ended jobs still shown
_RETRY_SECONDS = (1.0, 30.0, 600.0)  # after which a client may find its share free: at least, if nothing is known, at most

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobView:
    """One job at one moment: what the API, the metrics and the dashboard tell of it.

    `state` is the batch's status in OpenAI's words, or "paused"; `reason` says why. `done` counts lines that have a record,
    `failed` those of them in the error file. Seconds are None while nothing is known about the rate.
    """

    id: str
    state: str
    done: int
    failed: int
    total: int
    priority: int  # lower goes first
    tokens_s: float  # prompt and output tokens of its finished lines, lately
    eta_s: float | None
    slack_s: float | None  # until the deadline once it is done; negative: it will miss its window
    reason: str | None = None  # why it stands still: by_request, disk_full, …
    input_tokens: int = 0
    output_tokens: int = 0
    created_at: int = 0  # Unix seconds
    expires_at: int = 0

    @property
    def progress(self) -> float:
        """0 to 1."""
        return self.done / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """How much of one owner may be unfinished at a time. 0: no limit."""

    batches: int = 0
    lines: int = 0


class ShareUsed(Overloaded):
    """The owner's share is in use: nothing was accepted."""


class Jobs:
    """All batches of a server. Its methods may be called from any thread; the coroutines from any event loop."""

    def __init__(
        self,
        store: Store,
        *,
        max_inflight: int = 0,
        max_line_bytes: int = MAX_LINE_BYTES,
        max_batches: int = 1000,
        min_priority: int = 0,
        clock: WallClock | None = None,
        tick: float = TICK_SECONDS,
    ) -> None:
        """`max_inflight` 0: twice what the engine runs at once. `min_priority`: the most urgent a line may ask to be."""
        self.store = store
        self.now = clock or WallClock(store.known_clock())
        self.max_line_bytes = max_line_bytes
        self.totals = Totals()
        self._max_inflight = max_inflight
        self._max_batches = max_batches
        self._min_priority = min_priority
        self._tick_seconds = tick
        self._engine: Engine | None = None
        self._views: tuple[JobView, ...] = ()
        self._lives: dict[str, Life] = {}
        self._ended: deque[JobView] = deque(maxlen=_NUM_ENDED)
        self._closing = False
        self._io = ThreadPoolExecutor(4, thread_name_prefix="files")  # a disk that hangs takes these, and nobody else's
        self._shared = Shared(store, self.now, max_line_bytes, Slots(max_inflight or 1), self._breathe, totals=self.totals)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rate = Rate()  # tokens per second of all jobs
        self._seen: Harvest | None = None
        self._ticked, self._saved, self._swept = time.monotonic(), 0.0, 0.0
        try:
            self._follow_clock()
            store.set_clock(self.now.known)
        except StoreFull as error:
            log.warning("%s", error)
        if strays := store.sweep():
            log.info("removed %d files that nothing speaks of", strays)
        self._loop = asyncio.new_event_loop()
        self._poked = asyncio.Event()
        self._creating = asyncio.Lock()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()
        self._begun.wait()

    # -- from any thread

    def summary(self) -> list[JobView]:
        """Every unfinished job in the order in which they are served, then those that ended lately. Costs nothing."""
        return [*self._views, *self._ended]

    def current(self, record: BatchRecord) -> tuple[BatchRecord, JobView]:
        """The batch as it is now, where the store knows it only as it was lately."""
        life = self._lives.get(record.id)
        if life is None:
            return record, _view(record)
        place = next((view for view in self._views if view.id == record.id), None)
        record = life.now()
        eta, slack = (None, None) if place is None else (place.eta_s, place.slack_s)
        return record, _view(record, life, eta, slack)

    def attach(self, engine: Engine) -> None:
        """The model is loaded: batches may run."""
        self._loop.call_soon_threadsafe(self._attach, engine)

    async def io(self, function: Callable[..., T], *args: Any) -> T:
        """Run what may wait for the disk, away from every event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._io, partial(function, *args))

    def later(self, function: Callable[[], None]) -> None:
        """Run it away from every event loop, even if whoever asks is cancelled now."""
        try:
            self._io.submit(function)
        except RuntimeError:  # it is closed already
            function()

    @property
    def closed(self) -> bool:
        """Whether the server is leaving."""
        return self._closing

    async def create(self, record: BatchRecord, share: Share) -> BatchRecord:
        """Accept a batch, within its owner's share. Raises StoreFull, ShareUsed, Overloaded; KeyError if its input is gone."""
        return await self._ask(self._create(record, share))

    async def cancel(self, batch_id: str) -> BatchRecord | None:
        """Cancel an unfinished batch; None if it has ended. Raises StoreFull."""
        return await self._ask(self._change(batch_id, Life.cancel))

    async def pause(self, batch_id: str, paused: bool) -> BatchRecord | None:
        """Pause or resume an unfinished batch; None if it has ended. Raises StoreFull."""
        return await self._ask(self._change(batch_id, partial(Life.pause, paused=paused)))

    async def prioritize(self, batch_id: str, priority: int) -> BatchRecord | None:
        """Change the place of an unfinished batch; None if it has ended. Raises StoreFull."""
        return await self._ask(self._change(batch_id, partial(Life.prioritize, priority=priority)))

    def close(self, grace: float = 0.0) -> None:
        """Stop; lines in flight get `grace` seconds, and the rest runs when a server takes up the folder again."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon_threadsafe(self._stop_all, grace)
        elif not self._thread.is_alive():
            return
        self._thread.join(grace + _CLOSE_SECONDS)
        self._io.shutdown(wait=False)
        if self._thread.is_alive():
            log.warning("the jobs' thread hangs, perhaps in the disk; what is on it is safe")
            return
        self.store.close()

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Whoever asks may be cancelled, say because its client left: what has begun is done to its end all the same."""
        answer = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question, self._loop))
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # there may be nobody left to hear it
        return await asyncio.shield(answer)

    # -- in the jobs' event loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception:  # nothing online depends on it
            log.exception("the jobs stopped")
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _main(self) -> None:
        try:
            for record in self.store.active_batches():
                log.info("taking up %s (%s)", record.id, record.status)
                self._begin(record)
        finally:
            self._begun.set()
        while not self._closing:
            self._poked.clear()
            try:
                await self._tick()
            except StoreFull as error:
                log.warning("%s", error)
            try:
                async with asyncio.timeout(self._tick_seconds):
                    await self._poked.wait()
            except TimeoutError:
                continue
        await self._settle()

    def _begin(self, record: BatchRecord) -> None:
        life = self._lives[record.id] = Life(record, self._shared)
        task = self._tasks[record.id] = asyncio.create_task(life.live())
        task.add_done_callback(lambda _: self._over(life))

    def _over(self, life: Life) -> None:
        self._tasks.pop(life.record.id, None)
        if life.record.ended:
            self._lives.pop(life.record.id, None)
            self._ended.appendleft(_view(life.record))
            self._publish([Place(view.id, False, view.eta_s, view.slack_s) for view in self._views])
        self._poked.set()

    def _attach(self, engine: Engine) -> None:
        self._engine = engine
        self._shared.engine = engine
        self._shared.backend = _Lines(engine, self._min_priority)
        if not self._max_inflight:
            self._shared.slots.resize(2 * engine.config.max_num_seqs)
        for life in self._lives.values():
            life.look()
        self._poked.set()

    async def _create(self, record: BatchRecord, share: Share) -> BatchRecord:
        async with self._creating:  # so that two at once do not both see room for one
            self._check_share(record, share)
            await asyncio.to_thread(self.store.add_batch, record, self._max_batches)
            self._begin(record)
        self._poked.set()
        return record

    def _check_share(self, record: BatchRecord, share: Share) -> None:
        mine = [life for life in self._lives.values() if life.record.owner == record.owner]
        least, unknown, most = _RETRY_SECONDS
        ids = {life.record.id for life in mine}
        eta = min((view.eta_s for view in self._views if view.id in ids and view.eta_s is not None), default=unknown)
        retry_after = min(max(eta, least), most)
        if share.batches and len(mine) >= share.batches:
            message = f"this key has {len(mine)} unfinished batches already; cancel one or wait"
            raise ShareUsed(message, retry_after=retry_after)
        lines = sum(life.lines_left for life in mine)
        if share.lines and lines + record.lines > share.lines:
            message = f"{lines} lines of this key wait already, and {record.lines} more would exceed {share.lines}; wait"
            raise ShareUsed(message, retry_after=retry_after)

    async def _change(self, batch_id: str, change: Callable[[Life], Coroutine[Any, Any, BatchRecord]]) -> BatchRecord | None:
        life = self._lives.get(batch_id)
        if life is None:
            return None
        record = await change(life)
        self._poked.set()
        return record

    async def _breathe(self) -> None:
        engine = self._engine
        busy = engine is not None and engine.stats().tenants[Tenant.ONLINE].running > 0
        await asyncio.sleep(_POLITE_SECONDS if busy else 0)

    async def _tick(self) -> None:
        """Look at the clock and at what was done, and put the jobs in order."""
        if self.now.jump():
            jump = await asyncio.to_thread(self._follow_clock)
            for life in self._lives.values():
                life.moved(jump)
        now, at = self.now(), time.monotonic()
        seconds, self._ticked = at - self._ticked, at
        for life in self._lives.values():
            if now >= life.record.expires_at and life.record.status in ("validating", "in_progress") and not life.ending:
                log.warning("%s: its completion window is over", life.record.id)
                life.end("expired")
        self._observe(seconds)
        loads = [
            Load(life.record.id, life.record.priority, life.record.expires_at, life.tokens_left, life.held)
            for life in self._lives.values()
        ]
        places = plan(loads, self._rate.value, now)
        for rank, place in enumerate(places):
            life = self._lives[place.id]
            life.rank = rank
            life.allow(self._engine is not None and not place.held and rank < MAX_OPEN)
            self._tell_if_late(life, place)
        self._publish(places)
        if at - self._saved >= _SAVE_SECONDS:
            self._saved = at
            for life in list(self._lives.values()):
                await life.save_progress()
            if self._lives:
                await asyncio.to_thread(self.store.set_clock, self.now.known)
        if at - self._swept >= _SWEEP_SECONDS:
            self._swept = at
            for file_id in await asyncio.to_thread(self.store.expired_files, now):
                await asyncio.to_thread(self.store.delete_file, file_id)

    def _follow_clock(self) -> float:
        """If somebody set the system's clock, all stored times move along, so that windows keep their length. By how much."""
        if jump := self.now.jump():
            self.store.move_times(jump, self.now.after(jump))
            self.now.follow(jump)
            log.warning("the system's clock was set by %+.0f s; what is left of batches' windows and files' lives stays", jump)
        return jump

    def _observe(self, seconds: float) -> None:
        """What was done since the last look, by whom, and what it took."""
        running = [life for life in self._lives.values() if life.in_flight and life.trouble is None]
        done = 0
        for life in self._lives.values():
            tokens = life.usage.total_tokens
            if life.seen_tokens is not None:
                done += tokens - life.seen_tokens
                life.rate.observe(tokens - life.seen_tokens, seconds)
            if life.in_flight or life.seen_tokens is not None:
                life.seen_tokens = tokens
        if running or done:
            self._rate.observe(done, seconds)
        backend = self._shared.backend
        if backend is None:
            return
        harvest = backend.harvest()
        if self._seen is not None and running:
            in_flight = sum(life.in_flight for life in running)
            for life in running:
                life.harvested(harvest - self._seen, life.in_flight / in_flight, seconds)
        self._seen = harvest

    def _tell_if_late(self, life: Life, place: Place) -> None:
        late = place.slack_s is not None and place.slack_s < 0 and not place.held
        if late and not life.late and life.record.status == "in_progress":
            left = life.record.expires_at - self.now()
            log.warning("%s will miss its window: %.0f s of work, %.0f s left", place.id, place.eta_s, left)
        life.late = late

    def _publish(self, places: list[Place]) -> None:
        lives = ((self._lives.get(place.id), place) for place in places)
        self._views = tuple(_view(life.now(), life, place.eta_s, place.slack_s) for life, place in lives if life is not None)

    def _stop_all(self, grace: float) -> None:
        self._poked.set()
        for life in self._lives.values():
            life.shut(grace)

    async def _settle(self) -> None:
        """Every run ends by itself, and is written; then nothing is left to wait for."""
        while any(life.run is not None for life in self._lives.values()):
            await asyncio.sleep(0.02)
        for life in self._lives.values():
            await life.save_progress()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(StoreFull):
            await asyncio.to_thread(self.store.set_clock, self.now.known)


def open_jobs(config: ServerConfig) -> Jobs | None:
    """The jobs in the server's data folder; None where it shall keep none. Raises InvalidConfig.

    A folder that was asked for must be there; without the default one, because another server has it or it cannot be
    written, this one serves requests all the same.
    """
    if config.data_dir == "none":
        return None
    try:
        store = Store(state_dir() if config.data_dir is None else Path(config.data_dir).expanduser())
    except InvalidConfig as error:
        if config.data_dir is not None:
            raise
        log.warning("no files and batches: %s", error)
        return None
    return Jobs(
        store,
        max_inflight=config.max_inflight,
        max_line_bytes=config.max_line_bytes,
        max_batches=config.max_batches,
        min_priority=config.min_priority,
    )


class _Lines(EngineBackend):
    """Lines of clients: as urgent as the server lets them be."""

    def __init__(self, engine: Engine, min_priority: int) -> None:
        super().__init__(engine)
        self._min_priority = min_priority

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        priority = line.body.get("priority")
        if isinstance(priority, int) and priority < self._min_priority:
            line.body["priority"] = self._min_priority
        return await super().answer(line, request_id)


def _view(record: BatchRecord, life: Life | None = None, eta: float | None = None, slack: float | None = None) -> JobView:
    trouble = None if life is None else life.trouble
    reason = "by_request" if record.paused else trouble.code if trouble else None
    rate = None if life is None else life.rate.value
    return JobView(
        id=record.id,
        state="paused" if reason and not record.ended else record.status,
        done=record.completed + record.failed,
        failed=record.failed,
        total=record.total,
        priority=record.priority,
        tokens_s=rate or 0.0,
        eta_s=eta,
        slack_s=slack,
        reason=None if record.ended else reason,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        created_at=record.created_at,
        expires_at=record.expires_at,
    )
