"""Which job is next, when each will be done, and whether that is in time. Pure arithmetic on a moment's numbers.

A job's work is told in tokens: those its lines took so far say what the others will take, and before any is done its input
does. The device's rate is what all jobs together were given lately, so online traffic is in it. Jobs run one after the other in
the order of the plan, so a job's ETA is the time for its own work and for all that goes before it.

Order: `priority` first (lower goes first). Within a priority those that can still make their window, least slack first (Mok,
1983: least laxity first); then those that cannot, by deadline: they get what the others leave, and run until they expire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE = 30.0  # seconds after which a measured rate counts half
PRIOR_LINES = 8  # done lines that weigh as much as the estimate made from the input


@dataclass(frozen=True, slots=True)
class Load:
    """An unfinished job as the plan sees it. `deadline` is on the clock of `now`."""

    id: str
    priority: int
    deadline: float
    tokens_left: float
    held: bool = False  # paused, by its owner or by a fault: it does not run


@dataclass(frozen=True, slots=True)
class Place:
    """A job's place. Times are None while nothing is known about the rate; for held jobs they say: if resumed now."""

    id: str
    held: bool
    eta_s: float | None  # until its last line is done
    slack_s: float | None  # between then and its deadline; negative: it will miss its window


def plan(loads: Iterable[Load], rate: float | None, now: float) -> list[Place]:
    """Places in the order in which the jobs are served, held ones last. `rate` is in tokens per second."""
    ordered = sorted(loads, key=lambda load: (load.held, _urgency(load, rate, now)))
    places, ahead = [], 0.0
    for load in ordered:
        work = load.tokens_left if load.held else ahead + load.tokens_left
        ahead += 0.0 if load.held else load.tokens_left
        eta = work / rate if rate else None
        places.append(Place(load.id, load.held, eta, None if eta is None else load.deadline - now - eta))
    return places


def _urgency(load: Load, rate: float | None, now: float) -> tuple[int, bool, float, str]:
    own_slack = load.deadline - now - (load.tokens_left / rate if rate else 0.0)
    late = own_slack < 0
    return load.priority, late, load.deadline if late else own_slack, load.id


def tokens_per_line(done: int, tokens: int, estimate: float) -> float:
    """What a line takes, from `done` lines that took `tokens`, and from the estimate while they are few."""
    return (estimate * PRIOR_LINES + tokens) / (PRIOR_LINES + done)


class Rate:
    """Amount per second, lately: an exponential mean over time that knows how little it has seen."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._amount = self._seconds = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """`amount` was done within the last `seconds`."""
        keep = math.exp2(-seconds / self._half_life)
        # A constant flow, weighted by age within the interval itself.
        weight = (1.0 - keep) / (seconds * math.log(2) / self._half_life) if seconds > 0 else 1.0
        self._amount = self._amount * keep + amount * weight
        self._seconds = self._seconds * keep + seconds * weight

    @property
    def value(self) -> float | None:
        """None until something was done."""
        return self._amount / self._seconds if self._amount > 0 and self._seconds > 0 else None
