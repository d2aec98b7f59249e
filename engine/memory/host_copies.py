"""HostCopies: which pages are copied to host memory and back, and what of that is under way. Integers only.

Made by the KVManager, which tells it what its requests gain and lose. Saves: full pages of offline requests, the youngest's
first, because they give way first. Loads: the pages of requests that were admitted again; none of their rows may run before
all have landed. Loads go before saves (PipeMax: prefetch before offload).

A transfer is asked for, started, and some time later reported as landed. What happened to its pages meanwhile is seen then: a
save from a slab that was taken counts for nothing, and a load for a request that gave way again is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.memory.host import HostTier, Move, Transfer
from engine.types import Request, RequestState, Tenant


@dataclass(slots=True)
class HostCounters:
    """Running totals, in pages."""

    copied: int = 0  # to the host
    restored: int = 0  # back, for requests that went on from there
    voided: int = 0  # copied, but their slab was taken before the copy was certain


@dataclass(frozen=True, slots=True)
class HostStats:
    """A snapshot for metrics. Pages; `page_bytes` converts."""

    slots: int
    used: int
    page_bytes: int
    copied: int
    restored: int
    restored_tokens: int  # that were not computed again
    evicted: int  # copies given up for others


@dataclass(slots=True)
class _Restore:
    """A request's way back: slots[i] goes to pages[first + i]."""

    request: Request
    pages: list[int]
    first: int
    slots: list[int]
    started: int = 0
    landed: int = 0


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """Of a load its restore; of a save the hash and the request of each move."""

    transfer: Transfer
    restore: _Restore | None
    digests: tuple[bytes, ...] = ()
    requests: tuple[Request, ...] = ()


class HostCopies:
    """`chain` gives the hashes of a request's first pages, `num_pages` of them."""

    def __init__(self, tier: HostTier, page_size: int, chain: Callable[[Request, int], Sequence[bytes]]) -> None:
        self.tier = tier
        self.page_size = page_size
        self.counters = HostCounters()
        self.settle: Callable[[], None] = lambda: None  # blocks until every transfer under way is complete
        self._chain = chain
        self._restores: dict[str, _Restore] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._void: set[bytes] = set()  # saves under way whose page was lost
        self._number = 0

    # -- questions

    def restoring(self) -> set[str]:
        """Requests that wait for their pages."""
        return set(self._restores)

    def find(self, request: Request, first: int) -> list[int]:
        """Slots with the pages of the request from index `first` on. At least one token is left to compute."""
        if not _is_copied(request):
            return []
        return self.tier.find(self._chain(request, (len(request.tokens) - 1) // self.page_size), first)

    def num_safe(self, request: Request) -> int:
        """Tokens of the request, from its first, that need not be computed again if it loses its pages."""
        return self.tier.num_safe(request.id) * self.page_size

    def num_to_move(self, holders: Iterable[Request]) -> int:
        """Pages to be loaded and saved, those on their way counted again."""
        loads = sum(len(restore.slots) - restore.started for restore in self._restores.values())
        saves = sum(
            max(0, request.num_computed // self.page_size - self.tier.num_safe(request.id))
            for request in holders
            if _is_copied(request) and request.id not in self._restores
        )
        return loads + min(saves, self.tier.room)

    def stats(self, page_bytes: int) -> HostStats:
        tier, counters = self.tier, self.counters
        tokens = counters.restored * self.page_size
        return HostStats(tier.num_slots, tier.num_used, page_bytes, counters.copied, counters.restored, tokens, tier.evictions)

    # -- what the manager tells

    def restore(self, request: Request, first: int, slots: list[int]) -> None:
        """The request has pages of its own for what these slots hold: load them."""
        self.tier.lease(request.id, slots)
        self._restores[request.id] = _Restore(request, request.pages, first, slots)

    def leave(self, request: Request) -> None:
        """The request is about to lose its pages. Its copies stay."""
        if any(self._concerns(flight, request) for flight in self._under_way.values()):
            self.settle()
        self._restores.pop(request.id, None)

    def lose(self, pages: Iterable[int]) -> None:
        """The bytes of these pages are gone, perhaps before they were copied."""
        gone = set(pages)
        for flight in self._under_way.values():
            if not flight.transfer.load:
                pairs = zip(flight.transfer.moves, flight.digests, strict=True)
                self._void.update(digest for move, digest in pairs if move.page in gone)

    def finish(self, request: Request) -> None:
        """The request is over; others may want its copies, or their slots."""
        self.tier.end_lease(request.id)

    @staticmethod
    def _concerns(flight: _UnderWay, request: Request) -> bool:
        return request in flight.requests or (flight.restore is not None and flight.restore.request is request)

    # -- transfers

    def next_load(self, limit: int) -> Transfer | None:
        """The next pages that a request waits for, at most `limit`."""
        for restore in self._restores.values():
            begin = restore.started
            slots = restore.slots[begin : begin + limit]
            if slots:
                restore.started += len(slots)
                pages = restore.pages[restore.first + begin :]
                return self._start(True, [Move(page, slot) for page, slot in zip(pages, slots, strict=False)], restore)
        return None

    def next_save(self, holders: Iterable[Request], limit: int) -> Transfer | None:
        """Full pages of these requests that have no copy, at most `limit`. None if there are none, or no room for them."""
        moves: list[Move] = []
        digests: list[bytes] = []
        requests: list[Request] = []
        for request in holders:
            full = request.num_computed // self.page_size
            if self.tier.num_safe(request.id) >= full or not _is_copied(request) or request.id in self._restores:
                continue
            chain = self._chain(request, full)
            for index in range(self.tier.secure(request.id, chain), full):
                digest = chain[index]
                if self.tier.has(digest):
                    continue
                slot = self.tier.reserve(digest) if len(moves) < limit else None
                if slot is None:
                    return self._start(False, moves, None, digests, requests)
                moves.append(Move(request.pages[index], slot))
                digests.append(digest)
                requests.append(request)
        return self._start(False, moves, None, digests, requests)

    def _start(
        self,
        load: bool,
        moves: list[Move],
        restore: _Restore | None,
        digests: Sequence[bytes] = (),
        requests: Sequence[Request] = (),
    ) -> Transfer | None:
        if not moves:
            return None
        self._number += 1
        transfer = Transfer(self._number, load, tuple(moves))
        self._under_way[transfer.number] = _UnderWay(transfer, restore, tuple(digests), tuple(requests))
        return transfer

    def landed(self, transfer: Transfer) -> tuple[Request, int] | None:
        """The transfer is complete. Returns a request all of whose pages are there now, and how many were restored."""
        flight = self._under_way.pop(transfer.number)
        if flight.restore is not None:
            return self._loaded(flight.restore, len(transfer.moves))
        for digest in flight.digests:
            if digest in self._void:
                self._void.remove(digest)
                self.tier.cancel(digest)
                self.counters.voided += 1
            else:
                self.tier.filled(digest)
                self.counters.copied += 1
        for request in dict.fromkeys(flight.requests):
            if request.state is not RequestState.FINISHED:
                self.tier.secure(request.id, request.page_hashes)
        return None

    def _loaded(self, restore: _Restore, count: int) -> tuple[Request, int] | None:
        restore.landed += count
        if self._restores.get(restore.request.id) is not restore or restore.landed < len(restore.slots):
            return None
        del self._restores[restore.request.id]
        self.counters.restored += len(restore.slots)
        return restore.request, len(restore.slots)

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is whole. For tests and the idle engine."""
        self.tier.check()
        digests = [digest for flight in self._under_way.values() for digest in flight.digests]
        assert self.tier.filling() == set(digests) and len(set(digests)) == len(digests)
        assert self._void <= set(digests)
        for request_id, restore in self._restores.items():
            assert restore.request.id == request_id and restore.request.pages is restore.pages
            assert restore.landed <= restore.started <= len(restore.slots)


def _is_copied(request: Request) -> bool:
    """Offline work alone gives way; and logprobs of a prompt come from computing it, as in the prefix cache."""
    return request.tenant is Tenant.OFFLINE and request.params.prompt_logprobs is None
