"""SteadyClock: the time that would have passed on a machine whose pace never changes.

Neighbours on shared hardware make equal steps take a third longer within seconds, far more than what most measurements of
sharing are about. So each step counts as long as a model of step times says that stays as it was calibrated; what lies
between steps counts as it is. Traffic comes by this clock too, so that a slow spell is no higher load.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable

from engine.sched.latency import Load, StepTime
from engine.sched.plan import StepPlan, StepResult

_RECENT = 0.1  # weight of a step in the pace by which a step under way is counted


class SteadyClock:
    """Told of steps by the thread that runs them; any thread may read it. `busy`: a step runs now."""

    def __init__(
        self, model: StepTime, num_layers: int, busy: Callable[[], bool], now: Callable[[], float] = time.perf_counter
    ) -> None:
        """`model` is not learned from any more."""
        self._model, self._num_layers, self._busy, self._now = model, num_layers, busy, now
        self._times, self._readings = [now()], [0.0]
        self._last = (self._times[0], 0.0)  # the ends of both, in one piece for other threads
        self._pace = 1.0  # readings per second in recent steps
        self._stopped: dict[int, int] = {}  # the layer before which a pass was stopped, by its step

    def ran(self, plan: StepPlan, result: StepResult) -> None:
        """A step, or some of its layers, has just ended."""
        first, last = self._stopped.pop(plan.step, 0), self._num_layers
        if result.checkpoint is not None:
            last = self._stopped[plan.step] = result.checkpoint.layer
        foreseen = self._model.predict(Load.of(plan.rows)) * (last - first) / self._num_layers
        took = max(result.seconds, 1e-6)
        self._pace += _RECENT * (foreseen / took - self._pace)
        ended, (before, reading) = self._now(), self._last
        began = max(before, ended - took)
        reading += began - before
        self._times += [began, ended]
        self._readings += [reading, reading + foreseen]
        self._last = (ended, reading + foreseen)

    def now(self) -> float:
        """The reading, as far as can be told while a step runs."""
        last, reading = self._last
        return reading + (self._now() - last) * (self._pace if self._busy() else 1.0)

    def at(self, moment: float) -> float:
        """What it read at a moment, by what is known of the steps since."""
        after = bisect_right(self._times, moment)
        if after == 0:
            return self._readings[0] - (self._times[0] - moment)
        if after == len(self._times):
            return self._readings[-1] + moment - self._times[-1]
        start, end = self._times[after - 1], self._times[after]
        share = (moment - start) / max(end - start, 1e-9)
        return self._readings[after - 1] + share * (self._readings[after] - self._readings[after - 1])
