"""What online requests feel, against what they would feel alone; and the control of the step budget by it (HyGen's profiler).

A budget per step is not the promise: that is a mean or a 99th percentile over whole requests. `OnlineMeter` measures both sides
as the engine runs: `Delays` is a clock of the seconds that offline work cost whoever was waiting, so a request's own share is
the difference between two readings, and its time alone is what is left. `SloControl` scales the step budget until the metric
just meets its target: up slowly and only on fresh evidence, down at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow
from engine.types import Tenant, TokenOut

_LEAST, _MOST = 1 / 32, 16.0  # of the scale
_FRESH = {"mean": 16, "p99": 32}  # requests under one scale before it may grow
_SUSPECT = 3  # requests that are enough to see a violation
_RECENT = 8  # requests that tell of a sudden change
_REMEMBERED = 256


class SloControl:
    """One metric, one target: seconds, or a share by which it may be above what it would be alone.

    `scale` multiplies the step budget. Pure over what it is told.
    """

    def __init__(self, metric: str = "mean-tpot", *, seconds: float | None = None, increase: float = 0.05) -> None:
        self.kind, self.what = metric.split("-")
        self.scale = 1.0
        self._seconds = seconds
        self._increase = max(increase, 1e-6)
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # under the present scale: real, alone

    def observe(self, real: float, alone: float) -> None:
        """One more request: what it took, and what it would have taken alone, in seconds."""
        self._seen.append((real, alone))
        used = self.used()
        if used is None:
            return
        recent = self.used(_RECENT) or 0.0
        if used > 1 or recent > 2:
            self._set(self.scale * max(0.25, 0.9 / max(used, recent)))
        elif used < 0.9 and len(self._seen) >= _FRESH[self.kind]:
            self._set(self.scale * (1 + 0.5 * (1 - used)))

    def used(self, last: int = _REMEMBERED) -> float | None:
        """The metric, over this many requests, as a share of what the target allows; above 1 is a violation. None while too
        little is known."""
        if len(self._seen) < _SUSPECT:
            return None
        seen = list(self._seen)[-last:]
        real = self._metric([real for real, _ in seen])
        if self._seconds is not None:
            return real / self._seconds
        alone = self._metric([alone for _, alone in seen])
        return max(0.0, real / max(alone, 1e-9) - 1) / self._increase

    def _metric(self, values: list[float]) -> float:
        if self.kind == "mean":
            return fmean(values)
        return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]

    def _set(self, scale: float) -> None:
        scale = min(_MOST, max(_LEAST, scale))
        if scale != self.scale:
            self.scale = scale
            self._seen.clear()


class Delays:
    """A clock that runs while, and as far as, offline work holds up online requests."""

    def __init__(self) -> None:
        self.total = 0.0  # the reading at the end of the latest step
        self._ended = 0.0
        self._share = 0.0

    def ran(self, began: float, ended: float, share: float) -> None:
        """A step of which this share was offline work's doing."""
        self.total += (ended - began) * share
        self._ended, self._share = ended, share

    def at(self, moment: float) -> float:
        """The reading at a moment in or after the latest step."""
        return self.total - max(0.0, self._ended - moment) * self._share


def offline_share(rows: Sequence[PlanRow], step_time: StepTime) -> float:
    """The share of a step's time that is its offline rows' doing: what it would have been shorter without them."""
    online = [row for row in rows if row.tenant is Tenant.ONLINE]
    if not online:
        return 1.0
    if len(online) == len(rows) or not step_time.ready:
        return 0.0
    both = max(step_time.predict(Load.of(rows)), 1e-9)
    return max(0.0, 1 - step_time.predict(Load.of(online)) / both)


@dataclass(slots=True)
class _Felt:
    """An online request on its way."""

    arrival: float
    delay: float  # the reading when it came, later when it had its first token
    first: float | None = None
    tokens: int = 0


class OnlineMeter:
    """Feeds a control with the requests that an engine core runs."""

    def __init__(self, control: SloControl, delays: Delays) -> None:
        self.control = control
        self._delays = delays
        self._live: dict[str, _Felt] = {}

    def arrived(self, request_id: str, arrival: float) -> None:
        self._live[request_id] = _Felt(arrival, self._delays.at(arrival))

    def gone(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def saw(self, out: TokenOut, now: float) -> None:
        """A request got a token, or ended."""
        felt = self._live.get(out.id)
        if felt is None:
            return
        if out.token is not None:
            felt.tokens += 1
            if felt.first is None:
                felt.first = now
                if self.control.what == "ttft":
                    self._observe(now - felt.arrival, felt, now)
                felt.delay = self._delays.at(now)
        if out.finish_reason is not None:
            self.gone(out.id)
            if self.control.what == "tpot" and felt.first is not None and felt.tokens > 1:
                self._observe(now - felt.first, felt, now, felt.tokens - 1)

    def _observe(self, took: float, felt: _Felt, now: float, count: int = 1) -> None:
        alone = max(0.0, took - (self._delays.at(now) - felt.delay))
        self.control.observe(took / count, alone / count)
