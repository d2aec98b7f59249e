"""SlabLender: moves slabs between the online pool and the offline worker, and bounds how often it must.

Called in the online engine's thread only. Online takes at once, while the worker stands still: owner and epoch are flipped in
the control page, the slab joins online's pool, and in host memory what the worker still has there is punched out by a thread
off the online path (on a GPU the worker lets go first; the window waits for that). What online does not need goes back in
quiet periods, down to the reserve's headroom.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable

from engine.clock import Clock
from engine.memory.manager import KVManager
from engine.memory.pages import PageState
from engine.memory.reserve import Reserve
from engine.memory.slabs import SlabPool
from engine.memory.victims import Holdings, Victims
from engine.memory.window import Window
from engine.timeline import StepHistogram
from engine.types import Request, Tenant

logger = logging.getLogger(__name__)

_RECLAIM_SECONDS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.2, 1.0)
_QUIET_SECONDS = 1.0  # the reserve shrinks by a step per quiet period of this length


class SlabLender:
    """`memory.manager.Lender` for the online pool.

    `window` is online's own; `punch`, if any, takes a slab's memory out of the worker's. `cache_slabs` is how many slabs online
    may keep for the sake of cached prefixes alone. `holdings` tells what offline's slabs hold.
    """

    def __init__(
        self,
        slabs: SlabPool,
        kv: KVManager,
        window: Window,
        punch: Callable[[int], None] | None,
        clock: Clock,
        *,
        reserve: Reserve,
        victims: Victims,
        holdings: Callable[[], Holdings],
        cache_slabs: int,
    ) -> None:
        self._slabs, self._kv, self._window, self._clock = slabs, kv, window, clock
        self._victims, self._holdings, self._cache_slabs = victims, holdings, cache_slabs
        self.reserve = reserve
        self.reclaims = 0  # times online ran out and took slabs
        self.reclaimed_slabs = 0
        self.on_reclaim: Callable[[int, int], None] = lambda pages, slabs: None  # told of pages that were wanted, slabs taken
        self.reclaimed_for: Counter[str] = Counter()  # request id -> slabs taken on its behalf
        self.waited_for: dict[str, float] = {}  # request id -> seconds that took
        self.seconds = StepHistogram(_RECLAIM_SECONDS)  # that reclaims took, online waiting
        self._last_change = clock.now()
        self._handing_back = threading.Lock()  # so that a late punch never hits a slab that is offline's again
        self._punches: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._puncher: threading.Thread | None = None
        if punch is not None:
            self._puncher = threading.Thread(target=self._punch, args=(punch,), name="slab-puncher", daemon=True)
            self._puncher.start()
        self._take(slabs.owned(Tenant.OFFLINE)[: reserve.fixed_share or reserve.headroom])

    def lendable(self) -> int:
        if self.reserve.fixed_share is not None:
            return 0
        return self._slabs.count(Tenant.OFFLINE) * self._kv.pool.pages_per_slab

    def lend(self, num_pages: int, request: Request) -> None:
        """Reclaim slabs for `num_pages` pages, and headroom for the next time (papers: Valve, dynamic reservation)."""
        theirs = self._slabs.owned(Tenant.OFFLINE)
        if self.reserve.fixed_share is not None or not theirs:
            return
        began = self._clock.now()
        self.reserve.reclaimed()
        wanted = -(-num_pages // self._kv.pool.pages_per_slab) + self.reserve.headroom
        taken = self._victims(theirs, min(wanted, len(theirs)), self._holdings())
        self._take(taken)
        self.reclaims += 1
        self.reclaimed_slabs += len(taken)
        self.reclaimed_for[request.id] += len(taken)
        self.on_reclaim(num_pages, len(taken))
        self._last_change = self._clock.now()
        self.seconds.add(self._last_change - began)
        self.waited_for[request.id] = self.waited_for.get(request.id, 0.0) + self._last_change - began

    def rehearse(self) -> None:
        """Take a slab and give it back, while nobody has work: what a reclaim does, to be seen to work before one is needed."""
        if self.reserve.fixed_share is None and (theirs := self._slabs.owned(Tenant.OFFLINE)):
            self._take(theirs[:1])
            self._give(theirs[:1])

    def settle(self) -> None:
        """After a quiet period, want a little less and give back what is beyond that."""
        if self.reserve.fixed_share is not None or self._clock.now() - self._last_change < _QUIET_SECONDS:
            return
        self._last_change = self._clock.now()
        self.reserve.quiet()
        self._give(self._surplus())

    def _surplus(self) -> list[int]:
        """Slabs without a page in use, empty ones first, beyond the headroom and what cached prefixes may occupy."""
        pool = self._kv.pool
        empty: list[int] = []
        cached: list[int] = []
        for slab in self._slabs.owned(Tenant.ONLINE):
            states = {pool.state(page) for page in pool.slab_pages(slab)}
            if PageState.USED in states:
                continue
            (cached if PageState.CACHED in states else empty).append(slab)
        headroom = self.reserve.headroom
        kept = self._cache_slabs + max(0, headroom - len(empty))  # what is cached can make room as well
        return empty[headroom:] + cached[: max(0, len(cached) - kept)]

    def _take(self, slabs: list[int]) -> None:
        self._slabs.transfer(slabs, Tenant.ONLINE)
        for slab in slabs:
            self._window.map(slab)
            self._kv.add_slab(slab)
            if self._puncher is not None:
                self._punches.put(slab)

    def _give(self, slabs: list[int]) -> None:
        for slab in slabs:
            hit = self._kv.remove_slab(slab)
            assert not hit, "a slab with a page in use was given away"
            self._window.unmap(slab)
        with self._handing_back:
            self._slabs.transfer(slabs, Tenant.OFFLINE)

    def close(self) -> None:
        if self._puncher is not None:
            self._punches.put(None)
            self._puncher.join()

    def _punch(self, punch: Callable[[int], None]) -> None:
        while (slab := self._punches.get()) is not None:
            with self._handing_back:
                if self._slabs.owner(slab) is Tenant.ONLINE:
                    _punch_one(punch, slab)


def _punch_one(punch: Callable[[int], None], slab: int) -> None:
    try:
        punch(slab)
    except OSError as error:
        logger.warning("slab %d: its memory could not be taken from the offline worker: %s", slab, error)
