"""The time that files and batches go by: Unix seconds that do not jump when somebody sets the system's clock.

A window is a length of time. So time goes on evenly here, and where the system's clock and this one come apart, `jump` says how
far: whoever owns stored times moves them all, then calls `follow`. What is left of each window stays as it was, and what is
stored is in the system's new time, also for the next process (`Store.move_times`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.clock import Clock

TOLERANCE = 2.0  # seconds; less is the clocks' own business


class BootClock:
    """Seconds since the machine was started, in which it slept included: the same for all of its processes."""

    def now(self) -> float:
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))  # the first is Linux's


def boot_id() -> str:
    """Names the time since the machine was started; empty where nobody knows."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


@dataclass(frozen=True, slots=True)
class Known:
    """What stored times were written by: the system's clock less the machine's running time, in this boot, and when."""

    boot: str
    offset: float
    at: float


class WallClock:
    """Unix seconds. Any thread may ask for them; `jump` and `follow` are one thread's."""

    def __init__(
        self,
        known: Known | None = None,
        *,
        wall: Callable[[], float] = time.time,
        steady: Clock | None = None,
        boot: str | None = None,
    ) -> None:
        """`known`: what an earlier process went by. In another boot the system's clock is believed, unless it went back."""
        self._wall = wall
        self._steady = steady or BootClock()
        self._boot = boot_id() if boot is None else boot
        self._offset = self._told()
        if known is not None and known.boot == self._boot != "":
            self._offset = known.offset
        elif known is not None:
            self._offset = max(self._offset, known.at - self._steady.now())

    def __call__(self) -> float:
        return self._offset + self._steady.now()

    @property
    def known(self) -> Known:
        return Known(self._boot, self._offset, self())

    def jump(self) -> float:
        """How far the system's clock was set since it was last followed, in seconds; 0 where it was not."""
        seconds = self._told() - self._offset
        return seconds if abs(seconds) > TOLERANCE else 0.0

    def after(self, jump: float) -> Known:
        """What `follow` will go by."""
        return Known(self._boot, self._offset + jump, self() + jump)

    def follow(self, jump: float) -> None:
        """Stored times have been moved by so much."""
        self._offset += jump

    def _told(self) -> float:
        return self._wall() - self._steady.now()
