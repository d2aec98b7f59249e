"""Fail open: a lease on the frozen state, and the thread that looks after it.

A frozen channel stays frozen until somebody enables it, whoever died in between. So a freeze is held only on a lease,
and this thread, in a process that may enable the channels, ends it when the lease is not renewed.
"""

import logging
import threading
from collections.abc import Callable

from nvdriver.device import Clock

logger = logging.getLogger(__name__)


class Lease:
    """Lapses `ttl` seconds after the last sign of life: a renewal, or a change of the word that `beat` reads.

    `beat` may read a heartbeat that another process writes; an error in it counts as silence. Not thread-safe.
    """

    def __init__(self, ttl: float, clock: Clock, beat: Callable[[], int] | None = None) -> None:
        self._ttl = ttl
        self._clock = clock
        self._beat = beat
        self._seen = self._read()
        self._last = clock.now()

    def renew(self) -> None:
        self._last = self._clock.now()

    def has_lapsed(self) -> bool:
        seen = self._read()
        if seen is not None and seen != self._seen:
            self._seen = seen
            self.renew()
        return self._clock.now() - self._last > self._ttl

    def _read(self) -> int | None:
        if self._beat is None:
            return None
        try:
            return self._beat()
        except Exception:
            logger.exception("the heartbeat cannot be read; taking it for silence")
            return None


class Watchdog:
    """Calls `tick` every `period` seconds until stopped. A tick that fails is logged and tried again."""

    def __init__(self, tick: Callable[[], None], period: float) -> None:
        self._tick = tick
        self._period = period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvdriver-watchdog", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            try:
                self._tick()
            except Exception:
                logger.exception("could not enable the channels; trying again in %g s", self._period)
