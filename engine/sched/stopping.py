"""StopRule: whether a pass of offline rows makes way at the next layer for the online requests that wait.

It does if one of them would miss its time to first token behind the rest of the pass (ConServe section 2.2), and always where
no time is given. The rest is told by the layers already done, since all layers of a pass take the same time; the requests' own
prefill by the model of step times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engine.clock import Clock
from engine.sched.latency import Load, StepTime

LAYER_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True, slots=True)
class Waiting:
    """An online request that came while a step ran. `layer`: the one being computed then."""

    tokens: int
    since: float
    layer: int


class Responses:
    """How many layers it took from a reason to stop to the stop; counts per bucket, the last one for what is beyond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(LAYER_BUCKETS) + 1)
        self.total = 0

    def book(self, layers: int) -> None:
        self.counts[bisect_left(LAYER_BUCKETS, layers)] += 1
        self.total += layers


class StopRule:
    """Asked between the layers of one pass after another. `ttft`: seconds within which a first token is due, if any."""

    def __init__(self, step_time: StepTime, clock: Clock, *, num_layers: int, max_tokens: int, ttft: float | None) -> None:
        self.ttft = ttft
        self.responses = Responses()
        self.layer = 0  # being computed now; read by whoever hands over an online request
        self._step_time = step_time
        self._clock = clock
        self._num_layers = num_layers
        self._max_tokens = max_tokens
        self._first = 0
        self._began = 0.0
        self._went_on = 0  # the last layer at which the waiting ones had time enough

    def begin(self, layer: int) -> None:
        """A pass starts, or goes on, at this layer."""
        self.layer = self._first = self._went_on = layer
        self._began = self._clock.now()

    def stops(self, layer: int, waiting: Sequence[Waiting]) -> bool:
        """Whether the pass stops before this layer, as these requests wait, first come first."""
        if not waiting or self._can_wait(layer, waiting):
            self._went_on = layer
            return not waiting  # somebody else has a reason
        came = min(request.layer if request.since >= self._began else self._first for request in waiting)
        self.responses.book(layer - max(self._went_on, came))
        return True

    def _can_wait(self, layer: int, waiting: Sequence[Waiting]) -> bool:
        if self.ttft is None or not self._step_time.ready:
            return False
        now = self._clock.now()
        done = max(1, layer - self._first)
        ahead = (now - self._began) / done * (self._num_layers - layer)
        for request in waiting:
            ahead += self._prefill(request.tokens)
            if now + ahead > request.since + self.ttft:
                return False
        return True

    def _prefill(self, tokens: int) -> float:
        """Seconds until a prompt of so many tokens has its first one, none of it cached."""
        seconds, start = 0.0, 0
        while start < tokens:
            count = min(self._max_tokens, tokens - start)
            seconds += self._step_time.predict(Load().plus(start, count))
            start += count
        return seconds
