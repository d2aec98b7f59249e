"""ModeChooser: whether offline rows of the online model ride in online steps now, or wait for online to be idle.

Riding costs online requests a few percent, so it must be worth it. While online is idle offline work gets the whole device;
while it is busy it gets what rides along. Where the idle time is long (bursts, code completion) the second is next to nothing,
and online may as well be left alone; where there is hardly any (steady chat) it is all there is.
"""

from __future__ import annotations

import math
from enum import StrEnum


class Mode(StrEnum):
    EXCLUSIVE = "exclusive"  # offline only while no online request is unfinished
    STEP = "step"  # also in online steps


_MEMORY_SECONDS = 10.0  # over which idle time and rates are averaged
_LEAST_SECONDS = 5.0  # in one mode
_RETRY_SECONDS = 30.0  # without riding, after which what it is worth is learned again
_WORTH, _NOT_WORTH = 0.03, 0.015  # of offline throughput: what riding must add to begin, and to go on
_LONGEST_GAP = 1.0  # seconds between two looks; in a longer one the engine slept


class ModeChooser:
    """Pure over the times it is given. Begins with riding, to learn what it is worth."""

    def __init__(self, now: float) -> None:
        self.mode = Mode.STEP
        self._since = self._looked = now
        self._was_busy = False
        self._busy = 0.5  # share of time with unfinished online requests
        self._rates: dict[bool, float] = {}  # offline tokens per second, by whether online rows are in the step

    @property
    def idle_share(self) -> float:
        return 1 - self._busy

    def look(self, now: float, busy: bool) -> Mode:
        """The mode from now on. `busy`: there are unfinished online requests."""
        gap = now - self._looked
        was_busy = self._was_busy and gap <= _LONGEST_GAP
        self._busy += (was_busy - self._busy) * (1 - math.exp(-gap / _MEMORY_SECONDS))
        self._looked, self._was_busy = now, busy
        if now - self._since >= _LEAST_SECONDS:
            self._choose(now)
        return self.mode

    def ran(self, seconds: float, offline_tokens: int, *, shared: bool) -> None:
        """A step took so long and computed so many offline tokens. `shared`: beside online rows."""
        rate = offline_tokens / max(seconds, 1e-6)
        known = self._rates.setdefault(shared, rate)
        self._rates[shared] = known + (rate - known) * (1 - math.exp(-seconds / _MEMORY_SECONDS))

    def _choose(self, now: float) -> None:
        if len(self._rates) < 2:
            return
        idle = self.idle_share * self._rates[False]
        riding = self._busy * self._rates[True]
        mode = self.mode
        if self.mode is Mode.STEP and riding < _NOT_WORTH * idle:
            mode = Mode.EXCLUSIVE
        elif self.mode is Mode.EXCLUSIVE and (riding > _WORTH * idle or now - self._since >= _RETRY_SECONDS):
            mode = Mode.STEP
            del self._rates[True]
        if mode is not self.mode:
            self.mode, self._since = mode, now
