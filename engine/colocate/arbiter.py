"""Arbiter: the state machine that says who owns the device now. Pure over the times it is given; the driver acts on it.

    OFFLINE -> (online arrival) PREEMPTING -> (frozen) ONLINE -> (last online request done) COOLING -> (T_cool) OFFLINE

"Busy" is exact: the arbiter counts unfinished online requests, so a gap between decode steps is never taken for idle. Hence an
online request causes at most one preemption, by arriving while OFFLINE (Valve, section on the preemption bound).
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum


class State(StrEnum):
    OFFLINE = "offline"  # the worker may run
    PREEMPTING = "preempting"  # the freeze has been decided, the gate not yet closed
    ONLINE = "online"  # the worker stands still, online requests are unfinished
    COOLING = "cooling"  # the worker stands still, no online request, perhaps one comes soon


class CoolDown:
    """How long to stay frozen after the last online request.

    With the idle gaps seen lately, waiting T costs T of the device in each longer gap and the whole gap in each shorter one,
    and saves a preemption in each shorter one. The T with the least cost wins; never below the cost of one preemption, and a
    fixed time if one is given.
    """

    def __init__(
        self, preemption_cost: float, *, fixed: float | None = None, longest: float = 1.0, weight: float = 20.0
    ) -> None:
        self._cost = preemption_cost
        self._fixed = fixed
        self._longest = longest
        self._weight = weight  # a preemption is felt by an online request, idle time only by offline ones
        self._gaps: deque[float] = deque(maxlen=64)
        self._best = max(preemption_cost, 1e-3)

    def set_cost(self, preemption_cost: float) -> None:
        """The cost is known better now."""
        self._cost = preemption_cost
        self._best = max(self._best, preemption_cost)

    @property
    def seconds(self) -> float:
        return self._best if self._fixed is None else self._fixed

    def observe(self, gap: float) -> None:
        """An idle gap between online requests ended after this many seconds."""
        self._gaps.append(gap)
        floor = max(self._cost, 1e-3)
        candidates = [floor, *(gap * 1.05 for gap in self._gaps if floor < gap * 1.05 <= self._longest)]
        self._best = min(candidates, key=self._cost_of)

    def _cost_of(self, wait: float) -> float:
        return sum(gap if gap <= wait else wait + self._weight * self._cost for gap in self._gaps)


class Arbiter:
    """Who owns the device. Calls must not overlap; `now` never goes back."""

    def __init__(self, cool_down: CoolDown, now: float) -> None:
        self.state = State.OFFLINE
        self.cool_down = cool_down
        self.preemptions = 0  # caused by online requests
        self.false_alarms = 0  # caused by requests that turned out to be none
        self._unfinished: set[object] = set()
        self._preempted_by: set[object] = set()
        self._since = now
        self._cooling_since = now
        self._idle_since: float | None = None
        self._gap: float | None = None  # idle time before the present busy period, once that is known to be one
        self._before: tuple[State, float, float | None] | None = None  # what a withdrawn arrival goes back to
        self._seconds = dict.fromkeys(State, 0.0)

    @property
    def frozen(self) -> bool:
        """Whether the worker must stand still."""
        return self.state is not State.OFFLINE

    @property
    def unfinished(self) -> int:
        return len(self._unfinished)

    def arrive(self, request: object, now: float, *, offline_busy: bool) -> bool:
        """An online request is here. True if the caller must freeze the worker now and then say so with `froze`.

        The same request may arrive twice (its head, then its body): the second time changes nothing.
        """
        if request in self._unfinished:
            return False
        if not self._unfinished:
            self._before = self.state, self._cooling_since, self._idle_since
        self._unfinished.add(request)
        if self._idle_since is not None:
            self._gap, self._idle_since = now - self._idle_since, None
        if self.state is State.COOLING:
            self._move(State.ONLINE, now)
        if self.state is not State.OFFLINE:
            return False
        self._move(State.PREEMPTING, now)
        if offline_busy:
            self.preemptions += 1
            self._preempted_by.add(request)
        return True

    def froze(self, now: float) -> None:
        """The gate is closed."""
        if self.state is State.PREEMPTING:
            self._cooling_since = now
            self._move(State.ONLINE if self._unfinished else State.COOLING, now)

    def finish(self, request: object, now: float) -> int:
        """An online request is over. Returns the preemptions it caused: 0 or 1."""
        if request not in self._unfinished:
            return 0
        self._unfinished.remove(request)
        self._before = None
        if self._gap is not None:
            self.cool_down.observe(self._gap)
            self._gap = None
        if not self._unfinished:
            self._idle_since = self._cooling_since = now
            if self.state is State.ONLINE:
                self._move(State.COOLING, now)
        caused = request in self._preempted_by
        self._preempted_by.discard(request)
        return int(caused)

    def withdraw(self, request: object, now: float) -> bool:
        """The request turned out to be no online work: as if it had never come. True if the caller must thaw the worker now."""
        if request not in self._unfinished:
            return False
        if request in self._preempted_by:
            self._preempted_by.remove(request)
            self.preemptions -= 1
            self.false_alarms += 1
        if len(self._unfinished) > 1 or self._before is None or self._before[0] is State.PREEMPTING:
            self.finish(request, now)
            return False
        self._unfinished.remove(request)
        state, self._cooling_since, self._idle_since = self._before
        self._before = self._gap = None
        self._move(state, now)
        return state is State.OFFLINE

    def deadline(self) -> float | None:
        """When `poll` will have something to do, or None."""
        return self._cooling_since + self.cool_down.seconds if self.state is State.COOLING else None

    def poll(self, now: float) -> bool:
        """True if the caller must thaw the worker now."""
        deadline = self.deadline()
        if deadline is None or now < deadline:
            return False
        self._move(State.OFFLINE, now)
        return True

    def seconds(self, now: float) -> dict[State, float]:
        """Time spent in each state so far; sums to the arbiter's whole life."""
        spent = dict(self._seconds)
        spent[self.state] += now - self._since
        return spent

    def _move(self, state: State, now: float) -> None:
        self._seconds[self.state] += now - self._since
        self.state, self._since = state, now
