"""When host copies pay: how long a turn must last, and whether pages are better copied back or computed again.

With copies in host memory a request that gives way loses next to nothing, so more offline requests may be started than the
KV memory holds at their ends: some wait in host memory while others run, and take turns (PipeMax rotates batches so). A turn is
worth its copies only if a larger batch makes tokens faster; where it does not, a turn is endless and nobody is started who
could have to give way. The rules are pure functions; `Rotation` asks them for the scheduler.
"""

from __future__ import annotations

import math

from engine.memory.manager import KVManager
from engine.sched.latency import Load, StepTime
from engine.sched.plan import StepPlan
from engine.types import Request, Tenant

_LEAST_GAIN = 0.01  # of a batch with one row more; less than this cannot be told from noise
_MARGIN = 2.0  # a turn gains this many times what it costs
_LEAST_TURN = 8  # steps: half a page on average, which is what giving way computes again
_WEIGHT = 0.1  # of a new measurement of copies
_FORGET = 0.995  # weight of a decode step after one more


class CopyTime:
    """How long it takes to copy a page: in all, and of that the time in which no step can run. Seconds."""

    def __init__(self) -> None:
        self.elapsed: float | None = None
        self.blocked = 0.0

    def observe(self, pages: int, elapsed: float, blocked: float) -> None:
        """A transfer of so many pages took `elapsed` seconds, `blocked` of them the engine's own."""
        if self.elapsed is None:
            self.elapsed, self.blocked = elapsed / pages, blocked / pages
        else:
            self.elapsed += _WEIGHT * (elapsed / pages - self.elapsed)
            self.blocked += _WEIGHT * (blocked / pages - self.blocked)


class DecodeTime:
    """Seconds of a step of single tokens as a line over its rows, from recent steps.

    Beside the model of all steps, which says little about a batch larger than any it has seen; here this is the question.
    Until batches of different sizes were seen, a row more is taken to cost nothing, so that one is tried.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._both = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        values = (1.0, rows, seconds, rows * rows, rows * seconds)
        sums = (self._weight, self._rows, self._seconds, self._rows2, self._both)
        self._weight, self._rows, self._seconds, self._rows2, self._both = (
            _FORGET * total + value for total, value in zip(sums, values, strict=True)
        )

    @property
    def per_row(self) -> float:
        """What one row more costs: between nothing and its share of the step."""
        if not self._weight:
            return 0.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows2 / self._weight - rows * rows
        if variance < 0.05:
            return 0.0
        return min(max((self._both / self._weight - rows * seconds) / variance, 0.0), seconds / rows)

    def of(self, rows: int) -> float:
        """Of a step with so many rows; 0 before the first observation."""
        if not self._weight:
            return 0.0
        return self._seconds / self._weight + self.per_row * (rows - self._rows / self._weight)


def batch_gain(rows: int, alone: float, together: float) -> float:
    """How much faster tokens come (a share) when a step of `rows` rows and `alone` seconds takes one more and `together`."""
    return (rows + 1) * alone / (rows * together) - 1.0 if rows and together > 0 else math.inf


def turn_steps(elapsed: float, blocked: float, step_seconds: float, gain: float) -> float:
    """Steps for which a request must be able to stay, once started or copied back; infinite if that never pays.

    `elapsed` seconds pass until its pages are back; in a turn the copies for the next one must find that time. And the turn
    must gain more than the `blocked` seconds of computing that giving way and coming back cost.
    """
    if step_seconds <= 0 or gain < _LEAST_GAIN:
        return math.inf
    paid = 0.0 if math.isinf(gain) else _MARGIN * blocked / (gain * step_seconds)
    return max(_LEAST_TURN, elapsed / step_seconds, paid)


def copying_pays(pages: int, copy_time: CopyTime, compute_seconds: float) -> bool:
    """Whether to copy pages back rather than to compute them again. Unmeasured, a copy is taken to be cheap."""
    return copy_time.elapsed is None or pages * copy_time.elapsed < compute_seconds


class Rotation:
    """The rules over what the engine has measured of its steps and copies."""

    def __init__(self, kv: KVManager, step_time: StepTime) -> None:
        self.copy_time = CopyTime()
        self.decode_time = DecodeTime()
        self._kv = kv
        self._step_time = step_time

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A plan ran from its first layer to its last in so many seconds."""
        if all(row.count == 1 for row in plan.rows):
            self.decode_time.observe(len(plan.rows), seconds)

    def slots(self, request: Request, prefix: list[int]) -> list[int]:
        """Host slots with what follows the request's cached prefix; none if computing it is faster than copying."""
        slots = self._kv.find_copies(request, prefix)
        if slots and self._step_time.ready:
            alone, page = Load(), self._kv.page_size
            chunk = alone.plus(len(prefix) * page, len(slots) * page)
            seconds = self._step_time.predict(chunk) - self._step_time.predict(alone)
            return slots if copying_pays(len(slots), self.copy_time, seconds) else []
        return slots

    def turn(self, request: Request, others: list[Request]) -> float:
        """Steps for which an offline request must find room beside those that run; infinite if its turn would not pay."""
        copies, copy_time, decode_time = self._kv.copies, self.copy_time, self.decode_time
        if copies is None or copy_time.elapsed is None or request.tenant is Tenant.ONLINE:
            return math.inf
        rows = [other for other in others if other.tenant is Tenant.OFFLINE]
        bare = sum(max(0, self._pages(one) - copies.tier.num_safe(one.id)) for one in (*rows, request))
        if bare > copies.tier.room:
            return math.inf  # not all of them could be copied before they give way
        pages, count = self._pages(request), len(rows)
        again = decode_time.per_row * self._kv.page_size / 2  # the page that was not full is computed again
        gain = batch_gain(count, decode_time.of(count), decode_time.of(count + 1))
        return turn_steps(pages * copy_time.elapsed, pages * copy_time.blocked + again, decode_time.of(count + 1), gain)

    def _pages(self, request: Request) -> int:
        return self._kv.pages_for(len(request.tokens))
