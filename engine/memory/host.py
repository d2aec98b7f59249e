"""HostTier: which slot of host memory holds a copy of which full page. Integers and hashes only; owns no request and no byte.

KV is append-only, so a full page never changes and is copied once (ConServe, incremental checkpointing). A copy is known by
the page's chained hash, like the page itself in the prefix cache: requests that share a beginning share its copies, and what a
finished request leaves behind is found again until its slot is needed. Requests hold *leases* on the copies of their own
beginning; copies without one go first, longest unused first, and leased ones never.

Also the border to the bytes: `Transfer`, and `PageCopier` who carries it out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Move(NamedTuple):
    """One page of the window and one slot of the host store."""

    page: int
    slot: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Whole pages that move together. A `load` goes from the store into the window, else it is a save, the other way."""

    number: int
    load: bool
    moves: tuple[Move, ...]


class PageCopier(Protocol):
    """Moves whole pages between a window and a store of host memory. One caller; several transfers may be under way.

    `start` is called after everything that writes a page to be saved has been launched, and before anything that reads a page
    to be loaded or overwrites a saved one is: until `poll` says so, nobody writes the pages and slots named.
    """

    @property
    def page_bytes(self) -> int:
        """Bytes that one move carries."""
        ...

    @property
    def num_slots(self) -> int:
        """Pages that the store holds."""
        ...

    @property
    def batch(self) -> int:
        """Most moves of one transfer: as many as make it efficient, and few enough that its end is near."""
        ...

    def start(self, transfer: Transfer) -> Any:
        """Begin, and return a handle. May copy at once."""
        ...

    def poll(self, handle: Any) -> float | None:
        """The seconds it took, or None while it is under way. Raises what went wrong."""
        ...

    def wait(self, handle: Any) -> None:
        """Block until it is complete."""
        ...

    def close(self) -> None:
        """Let go of the store. Nothing is under way."""
        ...


class HostTier:
    """Slots 0 .. num_slots - 1. A slot is free, being filled, or holds the page with a certain hash."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.evictions = 0  # copies given up for others
        self._free = list(reversed(range(num_slots)))
        self._slot_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._filling: dict[bytes, int] = {}
        self._leases: dict[str, set[int]] = {}  # request id -> slots that stay for it
        self._safe: dict[str, int] = {}  # request id -> its first pages that are all among them
        self._refs: dict[int, int] = {}  # leases per slot that holds a page, where there are any
        self._idle: OrderedDict[int, None] = OrderedDict()  # slots that hold a page nobody leases, longest unused first

    # -- questions

    @property
    def num_used(self) -> int:
        """Slots that hold a page or are being filled."""
        return self.num_slots - len(self._free)

    @property
    def room(self) -> int:
        """Pages that could still be copied, at the cost of copies that nobody leases."""
        return len(self._free) + len(self._idle)

    def find(self, chain: Sequence[bytes], first: int) -> list[int]:
        """Slots of the pages from index `first` of the chain on, up to the first that has no copy."""
        slots: list[int] = []
        for index in range(first, len(chain)):
            slot = self._slot_of.get(chain[index])
            if slot is None:
                break
            slots.append(slot)
        return slots

    def num_safe(self, request_id: str) -> int:
        """First pages of the request whose copies stay for it."""
        return self._safe.get(request_id, 0)

    def has(self, digest: bytes) -> bool:
        """Whether the page has a copy, or will have one shortly."""
        return digest in self._slot_of or digest in self._filling

    def filling(self) -> set[bytes]:
        """Pages on their way to a slot."""
        return set(self._filling)

    # -- copies come

    def reserve(self, digest: bytes) -> int | None:
        """A slot to be filled with this page; None if all are leased or being filled."""
        assert digest not in self._slot_of and digest not in self._filling
        if not self._free:
            if not self._idle:
                return None
            self._evict()
        slot = self._filling[digest] = self._free.pop()
        return slot

    def filled(self, digest: bytes) -> None:
        """The slot reserved for this page holds it now."""
        slot = self._filling.pop(digest)
        self._slot_of[digest], self._hash_of[slot] = slot, digest
        self._idle[slot] = None

    def cancel(self, digest: bytes) -> None:
        """The slot reserved for this page did not get it."""
        self._free.append(self._filling.pop(digest))

    def _evict(self) -> None:
        slot, _ = self._idle.popitem(last=False)
        del self._slot_of[self._hash_of.pop(slot)]
        self._free.append(slot)
        self.evictions += 1

    # -- leases

    def lease(self, request_id: str, slots: Iterable[int]) -> None:
        """These slots stay as they are while the request is unfinished."""
        leased = self._leases.setdefault(request_id, set())
        for slot in slots:
            if slot not in leased:
                leased.add(slot)
                self._refs[slot] = self._refs.get(slot, 0) + 1
                self._idle.pop(slot, None)

    def secure(self, request_id: str, chain: Sequence[bytes]) -> int:
        """Lease the copies there are of the request's first pages. Returns how many pages are safe so."""
        slots = self.find(chain, self.num_safe(request_id))
        self.lease(request_id, slots)
        safe = self._safe[request_id] = self.num_safe(request_id) + len(slots)
        return safe

    def end_lease(self, request_id: str) -> None:
        """The request is over."""
        self._safe.pop(request_id, None)
        for slot in self._leases.pop(request_id, ()):
            self._refs[slot] -= 1
            if not self._refs[slot]:
                del self._refs[slot]
                self._idle[slot] = None

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is whole. For tests and the idle engine."""
        held = [*self._free, *self._filling.values(), *self._slot_of.values()]
        assert sorted(held) == list(range(self.num_slots)), held
        assert {slot: digest for digest, slot in self._slot_of.items()} == self._hash_of
        refs: dict[int, int] = {}
        for slots in self._leases.values():
            for slot in slots:
                refs[slot] = refs.get(slot, 0) + 1
        assert refs == self._refs
        assert all(safe <= len(self._leases[request_id]) for request_id, safe in self._safe.items() if safe)
        assert self._idle.keys() == self._hash_of.keys() - refs.keys()
