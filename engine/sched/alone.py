"""Alone: the online requests of an engine once more, as if there had been no offline work; on predicted step times.

What offline rows cost an online request is more than their share of its own steps: a request that takes longer is beside more
others, and those after it wait longer. So its time alone cannot be read off its own steps. Here the same arrivals, prompts and
outputs are scheduled without offline rows, a little behind the engine, since how long an output is shows only there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine.sched.latency import Load, StepTime


@dataclass(slots=True)
class _Copy:
    """A request: how far it is here, and what is known of it from the engine."""

    id: str
    arrival: float
    prompt: int
    computed: int = 0
    outputs: int = 0
    first: float = 0.0  # when it had its first token
    known: int = 0  # tokens that it has had in the engine
    over: bool = False  # there are no more

    @property
    def waits(self) -> bool:
        """Whether its next token has not come in the engine, so that nobody knows if there is one."""
        return self.outputs == self.known and not self.over


@dataclass(frozen=True, slots=True)
class Felt:
    """What a request would have felt: `ttft` when it would have had its first token, `tpot` at the end. In seconds."""

    id: str
    what: str
    seconds: float


class Alone:
    """Pure over what it is told. Knows no limits of memory or of running requests, which online requests alone hardly meet."""

    def __init__(self, step_time: StepTime, max_tokens: int) -> None:
        """`max_tokens`: of a step."""
        self.pace = 1.0  # by which steps take longer than predicted, all of them
        self.work = 0.0  # predicted seconds of all steps until now
        self._step_time = step_time
        self._max_tokens = max_tokens
        self._now = 0.0
        self._coming: deque[_Copy] = deque()
        self._running: list[_Copy] = []
        self._copies: dict[str, _Copy] = {}

    @property
    def idle(self) -> bool:
        """Whether all requests that came are over here too."""
        return not self._copies

    def arrived(self, request_id: str, arrival: float, prompt: int) -> None:
        copy = self._copies[request_id] = _Copy(request_id, arrival, prompt)
        self._coming.append(copy)

    def token(self, request_id: str, num_cached: int) -> None:
        """The engine has one more token of it; so much of its prompt was not computed."""
        if (copy := self._copies.get(request_id)) is not None:
            copy.known += 1
            copy.computed = max(copy.computed, num_cached)

    def ended(self, request_id: str) -> None:
        """There are no more tokens; none at all if it was aborted before the first."""
        if (copy := self._copies.get(request_id)) is not None:
            copy.over = True

    def catch_up(self, until: float) -> Iterator[Felt]:
        """Run the steps that begin before `until` and whose requests are known well enough."""
        while self._now <= until:
            while self._coming and self._coming[0].arrival <= self._now:
                self._running.append(self._coming.popleft())
            self._leave()
            if not self._running:
                if not self._coming:
                    return
                self._now = max(self._now, self._coming[0].arrival)
            elif any(copy.waits for copy in self._running):
                return
            else:
                yield from self._step()

    def _step(self) -> Iterator[Felt]:
        left, context, attention = self._max_tokens, 0, 0
        rows: list[tuple[_Copy, int]] = []
        for copy in self._running:
            count = min(left, max(1, copy.prompt - copy.computed))
            if not count:
                break
            if count == 1:
                context += copy.computed + 1
            else:
                attention += count * (2 * copy.computed + count) // 2
            left -= count
            rows.append((copy, count))
        tokens = self._max_tokens - left
        seconds = self._step_time.predict(Load(tokens, min(16, tokens), context, attention))
        self._now += self.pace * seconds
        self.work += seconds
        for copy, count in rows:
            copy.computed += count
            if copy.computed >= copy.prompt:
                copy.outputs += 1
                yield from self._felt(copy)

    def _felt(self, copy: _Copy) -> Iterator[Felt]:
        if copy.outputs == 1:
            copy.first = self._now
            yield Felt(copy.id, "ttft", self._now - copy.arrival)
        if copy.over and copy.outputs == copy.known > 1:
            yield Felt(copy.id, "tpot", (self._now - copy.first) / (copy.outputs - 1))

    def _leave(self) -> None:
        """Those that have had all their tokens, or will have none."""
        done = [copy for copy in self._running if copy.over and copy.outputs >= copy.known]
        for copy in done:
            del self._copies[copy.id]
        if done:
            self._running = [copy for copy in self._running if copy.id in self._copies]
