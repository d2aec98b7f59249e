"""ModeChooser: whether offline rows of the online model ride in online steps now, or wait for online to be idle.

Riding costs online requests a few percent, so it must be worth it. It is not all gain for offline work either: what rides
makes online steps longer, so that online is busy for longer and idle for less. Where steps mostly wait for the weights a row
that rides costs next to nothing; where they mostly compute, as much as it would have while online was idle.
"""

from __future__ import annotations

import math
from enum import StrEnum


class Mode(StrEnum):
    EXCLUSIVE = "exclusive"  # offline only while no online request is unfinished
    STEP = "step"  # also in online steps


_MEMORY_SECONDS = 10.0  # over which idle time and rates are averaged
_LEAST_SECONDS = 5.0  # in one mode
_EVIDENCE_SECONDS = 4.0  # of online work, before what riding is worth is known
_RETRY_SECONDS, _LONGEST_RETRY = 30.0, 240.0  # without riding, after which what it is worth is learned again; longer each time
_WORTH, _NOT_WORTH = 0.02, 0.01  # of offline throughput: what riding must add to begin, and to go on
_LONGEST_GAP = 1.0  # seconds between two looks; in a longer one the engine slept


class _Average:
    """A rate that forgets: units per second, by whole spans of time."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.seconds = 0.0  # that it has seen

    def add(self, amount: float, seconds: float) -> None:
        rate = amount / max(seconds, 1e-6)
        if self.value is None:
            self.value = rate
        self.value += (rate - self.value) * (1 - math.exp(-seconds / _MEMORY_SECONDS))
        self.seconds += seconds


class ModeChooser:
    """Pure over the times it is given. Begins with riding, to learn what it is worth.

    Offline work is told in seconds by which its rows make a large step longer: a decoding row with a long context is more than
    a token of a prompt, and one that rides is one less to be computed in idle time.
    """

    def __init__(self, now: float) -> None:
        self.mode = Mode.STEP
        self._since = self._looked = now
        self._retry = _RETRY_SECONDS
        self._was_busy = False
        self._busy = 0.5  # share of time with unfinished online requests
        self._alone = _Average()  # offline work done in a second of steps without online rows
        self._riding = _Average()  # and beside a second of online work
        self._longer = _Average()  # seconds by which that makes it longer
        self._done = self._seconds = 0.0  # what rode, and how long those steps took, since they were last settled
        self._settled = 0.0  # of online work, until then
        self._whole = True  # whether as many rode as the mode allows

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

    def ran_alone(self, seconds: float, done: float) -> None:
        """A step of offline rows only took so long and did so much offline work."""
        self._alone.add(done, seconds)

    def ran_online(self, seconds: float, done: float, *, could_ride: bool) -> None:
        """A step with online rows took so long and did so much offline work. `could_ride`: there was some to be done."""
        self._seconds += seconds
        self._done += done
        self._whole = self._whole and could_ride

    def settle(self, work: float) -> None:
        """All online requests until now would have taken so many seconds of steps without offline rows, since the start."""
        seconds, self._settled = work - self._settled, work
        if seconds > 0 and self._whole and self.mode is Mode.STEP:
            self._riding.add(self._done, seconds)
            self._longer.add(self._seconds - seconds, seconds)
        self._done = self._seconds = 0.0
        self._whole = True

    def _choose(self, now: float) -> None:
        mode, worth = self.mode, self._worth()
        if worth is not None and mode is Mode.STEP and worth < _NOT_WORTH:
            mode = Mode.EXCLUSIVE
        elif mode is Mode.EXCLUSIVE and worth is not None and worth > _WORTH:
            mode, self._retry = Mode.STEP, _RETRY_SECONDS
        elif mode is Mode.EXCLUSIVE and now - self._since >= self._retry:
            mode, self._retry = Mode.STEP, min(2 * self._retry, _LONGEST_RETRY)
            self._riding, self._longer = _Average(), _Average()
        if mode is not self.mode:
            self.mode, self._since = mode, now

    def _worth(self) -> float | None:
        """What riding adds, as a share of what offline work has of the idle time that online would leave it without riding."""
        alone, riding, longer = self._alone.value, self._riding.value, self._longer.value
        if alone is None or riding is None or longer is None or self._riding.seconds < _EVIDENCE_SECONDS:
            return None
        work = self._busy if self.mode is Mode.EXCLUSIVE else self._busy / max(1.0, 1 + longer)
        idle = 1 - work
        gained, lost = riding * work, alone * min(longer * work, idle)
        return (gained - lost) / max(alone * idle, 1e-9)
