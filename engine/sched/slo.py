"""What online requests feel, against what they would feel alone; and the control of the step budget by it (HyGen's profiler).

A budget per step is not the promise: that is a mean or a 99th percentile over whole requests. `OnlineMeter` knows both sides as
the engine runs: what a request took, and by `Alone` what it would have taken without offline work. `SloControl` scales the step
budget until the metric just meets its target. `Delays` is a clock of the seconds that offline work cost whoever was waiting.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from statistics import fmean

from engine.sched.alone import Alone
from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow
from engine.types import Tenant, TokenOut

_LEAST, _MOST = 1 / 32, 16.0  # of the scale
_BEGIN = 0.5  # with nothing known of this target: it takes some requests to see a violation
_SUSPECT = 3  # requests that are enough to see a violation
_FRESH = 8  # requests that must be known before it grows
_RECENT, _SUDDEN = 8, 4.0  # requests that tell of a sudden change, and the violation that they see then
_REMEMBERED = {"mean": 128, "p99": 256}
_FORGET = 0.99  # weight of a step after one more, for the pace
_AIM = 0.9  # of what the target allows
_UP, _DOWN, _DEEPEST = 1.2, 0.9, 0.25  # at one request
_FLOOR = 0.25  # what offline work costs online whatever the budget (the layer that a pass stops after), as if it were scale
_VERSION = 1  # of what is saved


@dataclass(frozen=True, slots=True)
class _Seen:
    """A request: what it took and would have taken alone, in seconds, and the scale under which it ran."""

    real: float
    alone: float
    scale: float

    def under(self, scale: float) -> float:
        """What it would have taken under another scale."""
        return self.alone + (self.real - self.alone) * (scale + _FLOOR) / (self.scale + _FLOOR)


class SloControl:
    """One metric, one target: seconds, or a share by which it may be above what it would be alone.

    `scale` multiplies the step budget. What offline work adds to a request is taken to grow with it, so every request that is
    remembered says what it would have taken under another scale. Pure over what it is told.
    """

    def __init__(self, metric: str = "mean-tpot", *, seconds: float | None = None, increase: float = 0.05) -> None:
        self.kind, self.what = metric.split("-")
        self.scale = _BEGIN
        self._seconds = seconds
        self._increase = max(increase, 1e-6)
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED[self.kind])

    def observe(self, real: float, alone: float, delayed: bool = True) -> None:
        """One more request: what it took, and what it would have taken alone, in seconds. `delayed`: it met offline work; one
        that did not says nothing in favour of a higher budget."""
        if not delayed and self.scale >= _BEGIN:
            return
        self._seen.append(_Seen(real, alone, self.scale))
        if len(self._seen) < _SUSPECT:
            return
        if len(self._seen) > _RECENT and self._used(self.scale, _RECENT) > _SUDDEN:
            for _ in range(len(self._seen) - _RECENT):
                self._seen.popleft()
        if self._used(self.scale) > 1:
            lowest = max(_LEAST, self.scale * _DEEPEST)
            while self.scale > lowest and self._used(self.scale) > _AIM:
                self.scale = max(lowest, self.scale * _DOWN)
        elif len(self._seen) >= _FRESH:
            higher = min(_MOST if delayed else _BEGIN, self.scale * _UP)
            if higher > self.scale and self._used(higher) <= _AIM:
                self.scale = higher

    @property
    def increase(self) -> float | None:
        """By how much, as a share, the metric of the remembered requests is above what it would have been alone. None while
        too little is known."""
        if len(self._seen) < _SUSPECT:
            return None
        return (
            self._metric([seen.real for seen in self._seen]) / max(self._metric([seen.alone for seen in self._seen]), 1e-9) - 1
        )

    def _used(self, scale: float, last: int = 0) -> float:
        """The metric, had the last requests (0: all) run under this scale, as a share of what the target allows; above 1 is a
        violation."""
        seen = list(self._seen)[-last:]
        real = self._metric([one.under(scale) for one in seen])
        if self._seconds is not None:
            return real / self._seconds
        return max(0.0, real / max(self._metric([one.alone for one in seen]), 1e-9) - 1) / self._increase

    def _metric(self, values: Sequence[float]) -> float:
        if self.kind == "mean":
            return fmean(values)
        return nlargest(1 + len(values) // 100, values)[-1]

    # -- from one run to the next

    @property
    def _target(self) -> str:
        target = f"+{self._increase:g}" if self._seconds is None else f"{self._seconds:g}s"
        return f"{self.kind}-{self.what} {target}"

    def save(self, path: Path) -> None:
        """Keep the scale that was found for this target beside those for others. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps({"version": _VERSION, "scales": _saved(path) | {self._target: self.scale}}))
        scratch.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what an earlier run found for this target, if there is such a file and it fits."""
        self.scale = min(_MOST, max(_LEAST, _saved(path).get(self._target, _BEGIN)))


def _saved(path: Path) -> dict[str, float]:
    """Scales by target; none if the file is not there or not one of these."""
    try:
        state = json.loads(path.read_text())
        if state["version"] == _VERSION:
            return {str(target): float(scale) for target, scale in state["scales"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


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
class _Live:
    """An online request on its way."""

    arrival: float
    foreseen: float  # the clock of foreseen time when it came, later when it had its first token
    delay: float  # the clock of delays when it came
    first: float | None = None
    tokens: int = 0
    took: float = 0.0  # to the first token, or from there to the last, once that is over
    foretold: float = 0.0  # the same by the clock of foreseen time
    delayed: bool = False  # until then, by offline work


class OnlineMeter:
    """Feeds a control with the requests that an engine core runs.

    What a request would have taken alone is what it took, times its foreseen time alone over the foreseen time of the steps
    that really ran: what makes all steps longer than foreseen leaves that ratio as it is.
    """

    def __init__(self, control: SloControl, delays: Delays, step_time: StepTime, max_tokens: int) -> None:
        self.control = control
        self._delays = delays
        self._step_time = step_time
        self._alone = Alone(step_time, max_tokens)
        self._foreseen = Delays()  # a clock of what steps should have taken
        self._measured = self._predicted = 0.0  # seconds of recent steps with online rows
        self._live: dict[str, _Live] = {}

    def arrived(self, request_id: str, arrival: float, prompt: int) -> None:
        if self._step_time.ready:
            self._live[request_id] = _Live(arrival, self._foreseen.at(arrival), self._delays.at(arrival))
            self._alone.arrived(request_id, arrival, prompt)

    def gone(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._alone.ended(request_id)

    def ran(self, rows: Sequence[PlanRow], began: float, ended: float) -> None:
        """A step, or what there was of it."""
        share = 1.0
        if self._step_time.ready and any(row.tenant is Tenant.ONLINE for row in rows):
            predicted, took = self._step_time.predict(Load.of(rows)), max(ended - began, 1e-9)
            self._measured = self._measured * _FORGET + took
            self._predicted = self._predicted * _FORGET + predicted
            self._alone.pace = self._measured / max(self._predicted, 1e-9)
            share = self._alone.pace * predicted / took
        self._foreseen.ran(began, ended, share)

    @property
    def work(self) -> float | None:
        """Predicted seconds of the steps that all online requests until now would have taken alone; None while not known."""
        return self._alone.work if self._alone.idle else None

    def saw(self, outs: Iterable[TokenOut], began: float, now: float) -> None:
        """What came of the latest step."""
        for out in outs:
            live = self._live.get(out.id)
            if out.token is not None:
                self._alone.token(out.id, out.num_cached)
                if live is not None:
                    self._token(live, now)
            if out.finish_reason is not None:
                self._alone.ended(out.id)
                if live is not None and (out.token is None or not self._ended(live, now)):
                    del self._live[out.id]
        for felt in self._alone.catch_up(began):
            if felt.what == self.control.what and (known := self._live.pop(felt.id, None)) is not None:
                self._compare(known, felt.seconds)

    def _token(self, live: _Live, now: float) -> None:
        live.tokens += 1
        if live.first is None:
            live.first = now
            if self.control.what == "ttft":
                self._measure(live, now - live.arrival, now)
            else:
                live.foreseen = self._foreseen.at(now)

    def _ended(self, live: _Live, now: float) -> bool:
        """Whether the request, which is over, has anything to be compared."""
        if self.control.what == "tpot" and live.first is not None and live.tokens > 1:
            self._measure(live, now - live.first, now)
        return live.took > 0

    def _measure(self, live: _Live, took: float, now: float) -> None:
        live.took, live.foretold = took, self._foreseen.at(now) - live.foreseen
        live.delayed = self._delays.at(now) > live.delay

    def _compare(self, live: _Live, alone: float) -> None:
        took = live.took if self.control.what == "ttft" else live.took / (live.tokens - 1)
        foretold = live.foretold * took / live.took
        self.control.observe(took, took * alone / max(foretold, 1e-9), live.delayed)
