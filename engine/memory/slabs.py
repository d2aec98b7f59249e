"""SlabPool: which tenant owns each slab of KV memory, and since which epoch. Integers only.

Every slab has exactly one owner. An epoch is bumped at each change of owner, so whoever looks later, after being frozen for any
length of time, can tell that a slab it sees as its own was somebody else's in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.types import Tenant

Publish = Callable[[int, Tenant, int], None]
"""Told of every change: slab, its owner from now on, its epoch."""


class SlabPool:
    """Owner and epoch of slabs 0 .. num_slabs - 1; offline owns all of them at first."""

    def __init__(self, num_slabs: int, publish: Publish = lambda slab, owner, epoch: None) -> None:
        self._owner = [Tenant.OFFLINE] * num_slabs
        self._epoch = [0] * num_slabs
        self._since = list(range(num_slabs))  # order in which the slabs got their present owner
        self._clock = num_slabs
        self._publish = publish
        for slab in range(num_slabs):
            publish(slab, Tenant.OFFLINE, 0)

    @property
    def num_slabs(self) -> int:
        return len(self._owner)

    def owner(self, slab: int) -> Tenant:
        return self._owner[slab]

    def epoch(self, slab: int) -> int:
        return self._epoch[slab]

    def owned(self, tenant: Tenant) -> list[int]:
        """The tenant's slabs, those it has had longest first."""
        return sorted((slab for slab, owner in enumerate(self._owner) if owner is tenant), key=self._since.__getitem__)

    def count(self, tenant: Tenant) -> int:
        return self._owner.count(tenant)

    def transfer(self, slabs: Iterable[int], to: Tenant) -> None:
        """The slabs are `to`'s from now on."""
        for slab in slabs:
            assert self._owner[slab] is not to, (slab, to)
            self._owner[slab] = to
            self._epoch[slab] += 1
            self._clock += 1
            self._since[slab] = self._clock
            self._publish(slab, to, self._epoch[slab])
