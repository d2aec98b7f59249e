"""KVManager: the page tables of all requests, as all-or-nothing transactions over the pool and the prefix cache.

The only writer of `Request.pages` and `Request.page_hashes`. Losing pages is a normal event: `remove_slab` names the requests
that lost KV, and preemption, abort and finish all end in `release`. No torch: the bytes live in a window elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.memory.host import HostTier, Transfer
from engine.memory.host_copies import HostCopies
from engine.memory.pages import PagePool, PageState
from engine.memory.prefix import PrefixCache, chain_on, chain_root
from engine.types import Request, Tenant


class Lender(Protocol):
    """Slabs that can still be had from somebody else."""

    def lendable(self) -> int:
        """Pages that `lend` could add at most."""
        ...

    def lend(self, num_pages: int, request: Request) -> None:
        """Add slabs to the manager, with at least `num_pages` free pages if there are that many to be had."""
        ...


class KVManager:
    """Page tables over `pool`. Where `lender` is set, a shortage of pages is a question to it before it is a refusal.

    `protected` is the number of cached online pages that offline work may never evict; whatever exceeds it, and all of
    offline's own cache, is up for eviction by anybody. With a `host` tier, `copies` are kept of offline's full pages.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        *,
        prefix_caching: bool = True,
        protected: int = 0,
        host: HostTier | None = None,
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.protected = protected
        self.lender: Lender | None = None
        self.copies = None if host is None else HostCopies(host, page_size, self._chain)
        self._cache = PrefixCache()
        self._holders: dict[str, Request] = {}
        self._committed: dict[str, int] = {}  # full pages of a request offered to the prefix cache already
        self.prefix_queries = dict.fromkeys(Tenant, 0)  # tokens looked up
        self.prefix_hits = dict.fromkeys(Tenant, 0)  # tokens found

    # -- questions

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def evictable(self, tenant: Tenant) -> int:
        """Cached pages that an allocation for this tenant may evict."""
        online = self._cache.num_idle(Tenant.ONLINE)
        if tenant is Tenant.OFFLINE:
            online = max(0, online - self.protected)
        return self._cache.num_idle(Tenant.OFFLINE) + online

    def available(self, tenant: Tenant) -> int:
        """Pages that can be allocated for this tenant without taking any from a request."""
        return self.pool.num_free + self.evictable(tenant)

    @property
    def capacity(self) -> int:
        """Pages there are, with those that could still be had."""
        return self.pool.num_pages + (self.lender.lendable() if self.lender is not None else 0)

    def find_prefix(self, request: Request) -> list[int]:
        """Pages that hold the beginning of the request's tokens already. At least one token is left to compute."""
        if not self.prefix_caching or request.params.prompt_logprobs is not None:
            return []
        return self._cache.match(self._chain(request, (len(request.tokens) - 1) // self.page_size))

    def find_copies(self, request: Request, prefix: list[int]) -> list[int]:
        """Host slots that hold what comes after the prefix."""
        return [] if self.copies is None else self.copies.find(request, len(prefix))

    def num_copied(self, request: Request) -> int:
        """First tokens of the request that host copies bring back if it loses its pages."""
        return 0 if self.copies is None else self.copies.num_safe(request)

    # -- transactions

    def admit(self, request: Request, num_tokens: int, prefix: list[int], slots: list[int] | None = None) -> bool:
        """Give a request without pages its cached prefix and new pages, for `num_tokens` tokens in all; or do nothing.

        The first of the new pages wait for the host copies in `slots`, if any.
        """
        assert not request.pages, request.id
        need = self.pages_for(num_tokens) - len(prefix)
        idle = sum(self.pool.state(page) is PageState.CACHED for page in prefix)
        # The prefix's own idle pages cannot be evicted to make room for the rest.
        if not self._ensure(need + idle, request):
            return False
        for page in prefix:
            self._cache.busy(page, request.tenant)
            self.pool.share(page)
        request.pages = prefix + self._take(need, request.tenant)
        self._holders[request.id] = request
        self._committed[request.id] = len(prefix)
        if slots:
            assert self.copies is not None
            self.copies.restore(request, len(prefix), slots)
        if self.prefix_caching:
            self.prefix_queries[request.tenant] += len(request.tokens)
            self.prefix_hits[request.tenant] += len(prefix) * self.page_size
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make the page table cover `num_tokens` tokens; or do nothing."""
        need = self.pages_for(num_tokens) - len(request.pages)
        if need <= 0:
            return True
        if not self._ensure(need, request):
            return False
        request.pages.extend(self._take(need, request.tenant))
        return True

    def commit(self, request: Request) -> None:
        """The KV of request.num_computed tokens is in its pages: offer the pages that became full to the cache."""
        full = request.num_computed // self.page_size
        done = self._committed[request.id]
        if not self.prefix_caching or full <= done:
            return
        self._cache.publish(self._chain(request, full)[done:], request.pages[done:full])
        self._committed[request.id] = full

    def release(self, request: Request) -> None:
        """Take all pages from the request. Pages the cache knows stay cached, the end of the sequence first to go."""
        if self._holders.pop(request.id, None) is None:
            return
        if self.copies is not None:
            self.copies.leave(request)
        del self._committed[request.id]
        pages, request.pages = request.pages, []
        self._cache.idle(self.pool.release(reversed(pages), request.tenant, keep=self._cache), request.tenant)

    def forget(self, request: Request) -> None:
        """The request is over: its pages go, and its claim on their copies."""
        self.release(request)
        if self.copies is not None:
            self.copies.finish(request)

    def next_save(self, limit: int) -> Transfer | None:
        """Full pages to copy to the host, at most `limit`."""
        return None if self.copies is None else self.copies.next_save(reversed(self._holders.values()), limit)

    # -- slabs

    def add_slab(self, slab: int) -> None:
        self.pool.add_slab(slab)

    def remove_slab(self, slab: int) -> list[Request]:
        """The slab is gone. Returns the requests that lost pages; they still hold the rest until released."""
        tenants = {page: self.pool.tenant(page) for page in self.pool.slab_pages(slab)}
        lost = set(self.pool.remove_slab(slab))
        if self.copies is not None:
            self.copies.lose(tenants)  # free pages too: their copies may be under way since before they were free
        for page in lost:
            self._cache.forget(page, tenants[page])
        if not lost:
            return []
        hit = [request for request in self._holders.values() if not lost.isdisjoint(request.pages)]
        for request in hit:
            request.pages = [page for page in request.pages if page not in lost]
        return hit

    def holders(self) -> Iterable[Request]:
        return self._holders.values()

    # -- inside

    def _chain(self, request: Request, num_pages: int) -> list[bytes]:
        """Hashes of the request's first pages. Without prefix caching they are like nobody else's."""
        chain, page = request.page_hashes, self.page_size
        if len(chain) < num_pages:
            salt = request.cache_salt if self.prefix_caching else f"{request.cache_salt}\0{request.id}"
            before = chain[-1] if chain else chain_root(request.tenant, salt)
            chain += chain_on(before, request.tokens[len(chain) * page : num_pages * page], page)
        return chain[:num_pages]

    def _ensure(self, num_pages: int, request: Request) -> bool:
        """Whether that many pages are available to the request's tenant, after asking the lender if need be."""
        short = num_pages - self.available(request.tenant)
        if short <= 0:
            return True
        # Offline work of this model waits for its turn; but who is alone here waits for nobody who could make room.
        entitled = request.tenant is Tenant.ONLINE or self._holders.keys() <= {request.id}
        if self.lender is None or not entitled or short > self.lender.lendable():
            return False  # nobody is robbed for what would not be enough
        self.lender.lend(short, request)
        return num_pages <= self.available(request.tenant)

    def _take(self, count: int, tenant: Tenant) -> list[int]:
        """Free pages, then offline's cached ones, then online's own oldest prefixes. The caller checked available()."""
        pages = self.pool.allocate(min(count, self.pool.num_free), tenant)
        for owner in (Tenant.OFFLINE, Tenant.ONLINE):
            if len(pages) < count:
                evicted = self._cache.take_oldest(owner, count - len(pages))
                self.pool.reuse(evicted, tenant)
                pages += evicted
        return pages

    def check(self) -> None:
        """Raise AssertionError unless page tables, pool and cache agree. For tests and the idle engine."""
        self.pool.check()
        self._cache.check()
        if self.copies is not None:
            self.copies.check()
        refs: dict[int, int] = {}
        for request in self._holders.values():
            assert len(set(request.pages)) == len(request.pages), request.id
            for page in request.pages:
                refs[page] = refs.get(page, 0) + 1
        for page in range(self.pool.num_slabs * self.pool.pages_per_slab):
            if self.pool.state(page) is not PageState.ABSENT:
                assert self.pool.refs(page) == refs.get(page, 0), page
        idle = sum(self._cache.num_idle(tenant) for tenant in Tenant)
        assert idle == self.pool.num_cached, (idle, self.pool.num_cached)
