"""PrefixCache: finds pages that already hold the KV of a prompt's beginning, and says which cached page to evict first.

A full page is known by the chained hash of all tokens up to its end. The chain starts from the tenant and the request's salt,
so tenants, and callers with different salts, never see each other's prefixes. Owns the index and the eviction order; page
states stay with PagePool.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from engine.types import Tenant


def chain_root(tenant: Tenant, salt: str) -> bytes:
    """The hash that a chain starts from."""
    return blake2b(f"{tenant.value}\0{salt}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain_on(digest: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """The hashes of these full pages of tokens, in a chain that goes on from `digest`."""
    data = array("i", tokens)
    assert len(data) % page_size == 0
    packed, size = data.tobytes(), page_size * data.itemsize
    chain: list[bytes] = []
    for at in range(0, len(packed), size):
        digest = blake2b(digest + packed[at : at + size], digest_size=16).digest()
        chain.append(digest)
    return chain


class PrefixCache:
    """Index from page hash to page, and one least-recently-used order of unreferenced pages per tenant."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: dict[Tenant, OrderedDict[int, None]] = {tenant: OrderedDict() for tenant in Tenant}

    def match(self, chain: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix of the chain."""
        pages: list[int] = []
        for digest in chain:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, chain: Sequence[bytes], pages: Sequence[int]) -> None:
        """Each page holds what its hash says. The first page to say so is the one that is found."""
        for digest, page in zip(chain, pages, strict=True):
            if digest not in self._page_of and page not in self._hash_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest

    def __contains__(self, page: object) -> bool:
        return page in self._hash_of

    def forget(self, page: int, tenant: Tenant | None) -> None:
        """The page's contents are gone."""
        if (digest := self._hash_of.pop(page, None)) is not None:
            del self._page_of[digest]
        if tenant is not None:
            self._idle[tenant].pop(page, None)

    def idle(self, pages: Iterable[int], tenant: Tenant) -> None:
        """Nobody references these pages any more; they are evicted in this order, after those that went idle before."""
        order = self._idle[tenant]
        for page in pages:
            order[page] = None

    def busy(self, page: int, tenant: Tenant) -> None:
        self._idle[tenant].pop(page, None)

    def num_idle(self, tenant: Tenant) -> int:
        return len(self._idle[tenant])

    def take_oldest(self, tenant: Tenant, limit: int) -> list[int]:
        """The pages idle longest, at most `limit`, which are forgotten."""
        order = self._idle[tenant]
        pages = [order.popitem(last=False)[0] for _ in range(min(limit, len(order)))]
        for page in pages:
            del self._page_of[self._hash_of.pop(page)]
        return pages

    def check(self) -> None:
        assert len(self._page_of) == len(self._hash_of)
        assert all(self._page_of[digest] == page for page, digest in self._hash_of.items())
        assert all(page in self._hash_of for order in self._idle.values() for page in order)
