"""PagePool: which page of KV memory is free, in use, cached or not here at all. Integers only; owns no request and no byte.

Pages are grouped in slabs, the unit that changes hands between tenants. A pool starts with some slabs present and can gain
and lose slabs at any time. Allocation fills the lowest slab that has room, so that whole slabs stay free to be given away.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from engine.types import Tenant


class PageState(IntEnum):
    ABSENT = 0  # its slab is not this pool's
    FREE = 1
    USED = 2  # referenced by at least one request
    CACHED = 3  # referenced by nobody, kept for its contents


_STATES = tuple(PageState)


class PagePool:
    """State, reference count and tenant of each page id in [0, num_slabs * pages_per_slab)."""

    def __init__(self, num_slabs: int, pages_per_slab: int, present: Iterable[int] | None = None) -> None:
        self.num_slabs = num_slabs
        self.pages_per_slab = pages_per_slab
        size = num_slabs * pages_per_slab
        self._state = bytearray(size)
        self._refs = [0] * size
        self._tenant: list[Tenant | None] = [None] * size
        self._free: list[list[int]] = [[] for _ in range(num_slabs)]
        self._open: list[int] = []  # heap of slabs that may have free pages; cleaned lazily
        self._in_open = bytearray(num_slabs)  # whether a slab is in the heap, so that it is there once
        self._counts = [0] * len(PageState)  # pages by state
        self._counts[PageState.ABSENT] = size
        self._used = dict.fromkeys(Tenant, 0)
        self.num_shared = 0  # pages referenced more than once
        for slab in range(num_slabs) if present is None else present:
            self.add_slab(slab)

    @property
    def num_pages(self) -> int:
        """Pages here, whatever their state."""
        return len(self._state) - self._counts[PageState.ABSENT]

    @property
    def num_free(self) -> int:
        return self._counts[PageState.FREE]

    @property
    def num_cached(self) -> int:
        return self._counts[PageState.CACHED]

    def num_used(self, tenant: Tenant | None = None) -> int:
        return self._counts[PageState.USED] if tenant is None else self._used[tenant]

    def state(self, page: int) -> PageState:
        return _STATES[self._state[page]]

    def refs(self, page: int) -> int:
        return self._refs[page]

    def tenant(self, page: int) -> Tenant | None:
        return self._tenant[page]

    def slab_pages(self, slab: int) -> range:
        return range(slab * self.pages_per_slab, (slab + 1) * self.pages_per_slab)

    def slab_use(self, slab: int) -> tuple[int, int, int]:
        """Pages of a slab that online uses, that offline uses, and that are cached. Any thread; a glance, not a promise."""
        first, last = slab * self.pages_per_slab, (slab + 1) * self.pages_per_slab
        used, cached = (self._state.count(state, first, last) for state in (PageState.USED, PageState.CACHED))
        if not used:
            return 0, 0, cached
        if not cached and self._used[Tenant.OFFLINE] == 0:
            return used, 0, 0
        states, tenants = self._state[first:last], self._tenant[first:last]
        online = sum(state == PageState.USED and tenant is Tenant.ONLINE for state, tenant in zip(states, tenants, strict=True))
        return online, used - online, cached

    def allocate(self, count: int, tenant: Tenant) -> list[int]:
        """`count` free pages, each with one reference. The caller has checked num_free."""
        assert count <= self.num_free, (count, self.num_free)
        pages: list[int] = []
        while len(pages) < count:
            stack = self._free[self._open[0]]
            if not stack:
                self._in_open[heapq.heappop(self._open)] = False
                continue
            first = max(0, len(stack) - (count - len(pages)))
            pages += reversed(stack[first:])
            del stack[first:]
        self._use(pages, PageState.FREE, tenant)
        return pages

    def reuse(self, pages: Sequence[int], tenant: Tenant) -> None:
        """Cached pages lose what they hold, and have one reference each."""
        self._use(pages, PageState.CACHED, tenant)

    def _use(self, pages: Sequence[int], before: PageState, tenant: Tenant) -> None:
        self._move(pages, before, PageState.USED)
        for page in pages:
            self._refs[page] = 1
            self._tenant[page] = tenant
        self._used[tenant] += len(pages)

    def share(self, page: int) -> None:
        """One more reference to a used or cached page."""
        if self._state[page] == PageState.CACHED:
            self._move((page,), PageState.CACHED, PageState.USED)
            self._used[self._owner(page)] += 1
        assert self._state[page] == PageState.USED, page
        self._refs[page] += 1
        self.num_shared += self._refs[page] == 2

    def release(self, pages: Iterable[int], tenant: Tenant, keep: Container[int] = ()) -> list[int]:
        """Drop one reference of each of these pages of the tenant. With its last one a page becomes cached if it is in `keep`,
        and free if not. Returns those that are cached now."""
        cached: list[int] = []
        free: list[int] = []
        for page in pages:
            self._refs[page] = refs = self._refs[page] - 1
            assert refs >= 0, page
            if not refs:
                (cached if page in keep else free).append(page)
            elif refs == 1:
                self.num_shared -= 1
        self._used[tenant] -= len(cached) + len(free)
        self._move(cached, PageState.USED, PageState.CACHED)
        self._move(free, PageState.USED, PageState.FREE)
        self._put_back(free)
        return cached

    def add_slab(self, slab: int) -> None:
        """The slab's pages are this pool's now, all free."""
        pages = self.slab_pages(slab)[::-1]
        self._move(pages, PageState.ABSENT, PageState.FREE)
        self._put_back(pages)

    def remove_slab(self, slab: int) -> list[int]:
        """The slab is gone, whatever its pages held. Returns the pages that were used or cached."""
        lost: list[int] = []
        for page in self.slab_pages(slab):
            state = self._state[page]
            assert state != PageState.ABSENT, page
            if state != PageState.FREE:
                lost.append(page)
            if state == PageState.USED:
                self._used[self._owner(page)] -= 1
                self.num_shared -= self._refs[page] > 1
            self._refs[page] = 0
            self._tenant[page] = None
            self._move((page,), _STATES[state], PageState.ABSENT)
        self._free[slab].clear()
        return lost

    def _owner(self, page: int) -> Tenant:
        tenant = self._tenant[page]
        assert tenant is not None, page
        return tenant

    def _move(self, pages: Sequence[int], before: PageState, now: PageState) -> None:
        for page in pages:
            assert self._state[page] == before, (page, before)
            self._state[page] = now
        self._counts[before] -= len(pages)
        self._counts[now] += len(pages)

    def _put_back(self, pages: Iterable[int]) -> None:
        """These became free."""
        for page in pages:
            self._tenant[page] = None
            slab = page // self.pages_per_slab
            if not self._in_open[slab]:
                self._in_open[slab] = True
                heapq.heappush(self._open, slab)
            self._free[slab].append(page)

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is whole. For tests and the idle engine."""
        counts = [0] * len(PageState)
        used = dict.fromkeys(Tenant, 0)
        for page, value in enumerate(self._state):
            state = PageState(value)
            counts[state] += 1
            assert (self._refs[page] > 0) == (state == PageState.USED), (page, state, self._refs[page])
            assert (self._tenant[page] is None) == (state in (PageState.ABSENT, PageState.FREE)), page
            if state == PageState.USED:
                used[self._owner(page)] += 1
        assert counts == self._counts, (counts, self._counts)
        assert used == self._used, (used, self._used)
        assert self.num_shared == sum(refs > 1 for refs in self._refs)
        free = [page for stack in self._free for page in stack]
        assert len(free) == len(set(free)) == counts[PageState.FREE]
        assert all(self._state[page] == PageState.FREE for page in free)
        assert all(slab in self._open for slab, stack in enumerate(self._free) if stack)
        assert sorted(self._open) == [slab for slab, listed in enumerate(self._in_open) if listed]


class SlabUse(NamedTuple):
    """One slab: its owner (None: it is shared), and the shares of its pages in use by each tenant, and cached."""

    owner: Tenant | None
    online: float
    offline: float
    cached: float


def slab_use(pool: PagePool, slab: int, owner: Tenant | None = None) -> SlabUse:
    """How much of a slab of `pool` is in use."""
    return SlabUse(owner, *(pages / pool.pages_per_slab for pages in pool.slab_use(slab)))
