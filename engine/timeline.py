"""Timeline: what the device did lately, in bounded memory: spans of work, and events with their cause and their cost.

Every ring has one writer and any number of readers, and nobody waits: a reader copies what there is. A step with rows of both
tenants, or of both phases, is one span that holds its tokens by part. Its time belongs to the parts in proportion to those
tokens; it is never cut into pieces that follow each other, since they did not.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import msgspec

from engine.clock import Clock, MonotonicClock
from engine.sched.plan import PlanRow, StepPlan, StepResult
from engine.types import Tenant

PARTS = ("online_prefill", "online_decode", "offline_prefill", "offline_decode")
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HOLD_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SPANS = 16384  # a minute and a half of steps of 5 ms
_EVENTS = 1024
_HOLDS = 256

T = TypeVar("T")


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One launch on the device, by the monotonic clock; tokens computed by part. Without tokens it is a change of owner.

    `cut`: it was stopped before its end, and the span that finishes it counts the tokens again.
    """

    start: float
    seconds: float
    online_prefill: int = 0
    online_decode: int = 0
    offline_prefill: int = 0
    offline_decode: int = 0
    rows: int = 0
    cut: bool = False

    @property
    def end(self) -> float:
        return self.start + self.seconds

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Tokens in the order of PARTS."""
        return self.online_prefill, self.online_decode, self.offline_prefill, self.offline_decode


class Event(msgspec.Struct, frozen=True):
    """Something that happened at one moment: what, why, and what it cost (numbers by name, units in the names)."""

    at: float
    kind: str  # preemption, thaw, withdrawn (was none), parked, gave_way, reclaim, worker, stuck, job, paused, resumed
    cause: str
    cost: dict[str, float] = {}


class Served(msgspec.Struct, frozen=True, gc=False):
    """One answered request: when it came, was admitted, had its first token and its last."""

    id: str
    tenant: Tenant
    submitted: float
    admitted: float
    first: float
    last: float


class Memory(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Shares of the KV memory at one moment, 0 to 1; what is left of it is free."""

    at: float
    online: float
    offline: float
    cached: float


class Ring(Generic[T]):
    """The last `size` items of one writer, numbered from 0. `append` is for that writer alone, the rest for anybody."""

    def __init__(self, size: int) -> None:
        self._items: list[T | None] = [None] * size
        self.count = 0

    def append(self, item: T) -> None:
        self._items[self.count % len(self._items)] = item
        self.count += 1

    def since(self, number: int = 0) -> tuple[list[T], int]:
        """The items from `number` on that are still here, oldest first, and the number to ask for next."""
        size, count = len(self._items), self.count
        first = max(number if 0 <= number <= count else 0, count - size)
        items = [self._items[at % size] for at in range(first, count)]
        kept = max(first, self.count + 1 - size) if self.count > count else first  # the rest was overwritten meanwhile
        return [item for item in items[kept - first :] if item is not None], count


def span_of(plan: StepPlan, result: StepResult, end: float, since: float) -> Span:
    """A launch that ended at `end`, of which what came before `since` was the launch before it.

    A row decodes if it computes one token beyond its prompt; all else is prefill.
    """
    start = max(end - result.seconds, since)
    return Span(start, end - start, *tokens_by_part(plan.rows), len(plan.rows), result.checkpoint is not None)


def tokens_by_part(rows: Iterable[PlanRow]) -> tuple[int, int, int, int]:
    """Tokens that the rows compute, in the order of PARTS."""
    online_prefill = online_decode = offline_prefill = offline_decode = 0
    online = Tenant.ONLINE
    for row in rows:
        count = row.count
        if count == 1 and row.start >= row.num_prompt:
            if row.tenant is online:
                online_decode += 1
            else:
                offline_decode += 1
        elif row.tenant is online:
            online_prefill += count
        else:
            offline_prefill += count
    return online_prefill, online_decode, offline_prefill, offline_decode


def seconds_by_part(span: Span) -> tuple[float, float, float, float]:
    """The span's time, divided among PARTS in proportion to their tokens."""
    tokens = sum(span.parts) or 1
    a, b, c, d = span.parts
    each = span.seconds / tokens
    return a * each, b * each, c * each, d * each


class StepHistogram:
    """Counts by a bound; the last count holds what is beyond the largest one. One writer."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Enter `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class Timeline:
    """The recorder of one engine. Each method says whose it is."""

    def __init__(self, clock: Clock | None = None, spans: int = _SPANS) -> None:
        self.clock = clock or MonotonicClock()
        self.began = self.clock.now()
        self.steps: Ring[Span] = Ring(spans)  # of the engine's own core
        self.offline_steps: Ring[Span] = Ring(spans)  # of the offline worker, without the time in which it stood still
        self.switches: Ring[Span] = Ring(_EVENTS)
        self.memory: Ring[Memory] = Ring(_EVENTS)  # of the server's event loop, as the next one
        self.served: Ring[Served] = Ring(_EVENTS)
        self.step_seconds = {tenant: StepHistogram(STEP_SECONDS) for tenant in Tenant}  # by who was served; mixed: online
        self.step_tokens = StepHistogram(STEP_TOKENS)
        self.hold_seconds = StepHistogram(HOLD_SECONDS)  # of whoever holds the arbiter's lock
        self.parked_seconds = StepHistogram(HOLD_SECONDS)  # of the engine's thread, as all else about its own core
        self._parked: dict[int, float] = {}  # number of a plan -> since when its pass is parked
        self._busy_until = self.began
        self._own = [0.0] * len(PARTS)
        self._worker = [0.0] * len(PARTS)
        self._events: Ring[Event] = Ring(_EVENTS)
        self._event_lock = threading.Lock()
        self._holds: deque[tuple[float, float | None]] = deque(maxlen=_HOLDS)  # when the worker stood still

    # -- the engine's thread

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """A launch of the engine's own core has ended."""
        span = span_of(plan, result, self.clock.now(), self._busy_until)
        self._busy_until = span.end
        self.steps.append(span)
        for index, seconds in enumerate(seconds_by_part(span)):
            if seconds:
                self._own[index] += seconds
        self._park(plan.step, span, result)
        self.step_seconds[Tenant.OFFLINE if plan.preemptible else Tenant.ONLINE].add(span.seconds)
        if not span.cut:
            self.step_tokens.add(plan.num_tokens)

    def _park(self, step: int, span: Span, result: StepResult) -> None:
        since = self._parked.pop(step, None)
        if since is not None:
            self.parked_seconds.add(max(0.0, span.start - since))
        if result.checkpoint is not None:
            self._parked[step] = span.end
            if len(self._parked) > _HOLDS:
                del self._parked[next(iter(self._parked))]  # a pass that was given up

    # -- whoever holds the arbiter's lock

    def switched(self, start: float, end: float) -> None:
        """The device changed hands between these times."""
        self.switches.append(Span(start, end - start))
        self._holds.append((start, None))

    def released(self, at: float) -> float:
        """The worker runs again. Returns how long it stood still."""
        if not self._holds or self._holds[-1][1] is not None:
            return 0.0
        start = self._holds[-1][0]
        self._holds[-1] = start, at
        self.hold_seconds.add(at - start)
        return at - start

    # -- the thread that hears from the offline worker

    def worker_steps(self, spans: Iterable[Span]) -> None:
        """Steps of the offline worker as it saw them: what it took for computing while it stood still is taken out."""
        for span in spans:
            for piece in self._moving(span):
                self.offline_steps.append(piece)
                for index, seconds in enumerate(seconds_by_part(piece)):
                    self._worker[index] += seconds

    def _moving(self, span: Span) -> list[Span]:
        """The pieces of a span in which the worker was not held; all but the last one are cut."""
        start, pieces = span.start, []
        for held, freed in tuple(self._holds):
            if held >= span.end or (freed is not None and freed <= start):
                continue
            if held > start:
                pieces.append((start, held))
            start = span.end if freed is None else freed
        if start < span.end:
            pieces.append((start, span.end))
        last = len(pieces) - 1
        return [
            msgspec.structs.replace(span, start=begin, seconds=end - begin, cut=span.cut or index < last)
            for index, (begin, end) in enumerate(pieces)
        ]

    # -- any thread

    def holds(self, now: float) -> list[tuple[float, float]]:
        """When the worker was held: from, to; the last one to `now` if it still is."""
        return [(start, now if end is None else end) for start, end in tuple(self._holds)]

    def event(self, kind: str, cause: str, **cost: float) -> None:
        """Enter an event that happens now."""
        with self._event_lock:
            self._events.append(Event(self.clock.now(), kind, cause, cost))

    def events(self, number: int = 0) -> tuple[list[Event], int]:
        """The events from `number` on, as Ring.since."""
        return self._events.since(number)

    def seconds(self) -> dict[str, float]:
        """Computing time by part since the start."""
        return {part: self._own[index] + self._worker[index] for index, part in enumerate(PARTS)}
