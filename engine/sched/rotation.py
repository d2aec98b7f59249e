"""When host copies pay: how long a turn must last, and whether pages are better copied back or computed again.

With copies in host memory a request that gives way loses next to nothing, so more offline requests may be started than the
KV memory holds at their ends: some wait in host memory while others run, and take turns (PipeMax rotates batches so). A turn is
worth its copies only if a larger batch makes tokens faster; where it does not, a turn is endless and nobody is started who
could have to give way. Pure functions, and one running measurement.
"""

from __future__ import annotations

import math

from engine.memory.manager import KVManager
from engine.sched.latency import Load, StepTime
from engine.types import Request, Tenant

_LEAST_GAIN = 0.01  # of a batch with one row more; less than this cannot be told from noise
_MARGIN = 4.0  # a turn gains this many times what its copies cost
_LEAST_TURN = 32  # steps
_WEIGHT = 0.1  # of a new measurement


class CopyTime:
    """How long it takes to copy a page back: in all, and of that the time in which no step can run. Seconds."""

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


def batch_gain(rows: int, alone: float, together: float) -> float:
    """How much faster tokens come (a share) when a step of `rows` rows and `alone` seconds takes one more and `together`."""
    return (rows + 1) * alone / (rows * together) - 1.0 if rows and together > 0 else math.inf


def turn_steps(pages: int, copy_time: CopyTime, step_seconds: float, gain: float) -> float:
    """Steps that a request with so many pages must be able to stay, once copied back; infinite if that never pays.

    Within a turn the copies for the next one must find time, and it must gain more than its own copies cost.
    """
    if copy_time.elapsed is None or step_seconds <= 0 or gain < _LEAST_GAIN:
        return math.inf
    hidden = pages * copy_time.elapsed / step_seconds
    paid = 0.0 if math.isinf(gain) else _MARGIN * pages * copy_time.blocked / (gain * step_seconds)
    return max(_LEAST_TURN, hidden, paid)


def copying_pays(pages: int, copy_time: CopyTime, compute_seconds: float) -> bool:
    """Whether to copy pages back rather than to compute them again. Unmeasured, a copy is taken to be cheap."""
    return copy_time.elapsed is None or pages * copy_time.elapsed < compute_seconds


class Rotation:
    """The rules over what the engine has measured of its steps and copies. Changes nothing."""

    def __init__(self, kv: KVManager, step_time: StepTime) -> None:
        self.copy_time = CopyTime()
        self._kv = kv
        self._step_time = step_time

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
        copies = self._kv.copies
        if copies is None or request.tenant is Tenant.ONLINE or not self._step_time.ready:
            return math.inf
        rows = [other for other in others if other.tenant is Tenant.OFFLINE]
        bare = sum(max(0, self._pages(one) - copies.tier.num_safe(one.id)) for one in (*rows, request))
        if bare > copies.tier.room:
            return math.inf  # not all of them could be copied before they give way
        count, context = len(rows), sum(len(row.tokens) for row in rows)
        alone = self._step_time.predict(_decode(count, context))
        together = self._step_time.predict(_decode(count + 1, context + len(request.tokens)))
        return turn_steps(self._pages(request), self.copy_time, together, batch_gain(count, alone, together))

    def _pages(self, request: Request) -> int:
        return self._kv.pages_for(len(request.tokens))


def _decode(rows: int, context: int) -> Load:
    return Load(rows, min(rows, 16), context)
