"""SlabPool: one owner at a time, an epoch per change, and everybody told of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.slabs import SlabPool
from engine.types import Tenant

ONLINE, OFFLINE = Tenant.ONLINE, Tenant.OFFLINE


def test_offline_has_everything_at_first_and_is_told() -> None:
    told: list[tuple[int, Tenant, int]] = []
    pool = SlabPool(3, lambda *change: told.append(change))
    assert told == [(0, OFFLINE, 0), (1, OFFLINE, 0), (2, OFFLINE, 0)]
    assert pool.owned(OFFLINE) == [0, 1, 2] and pool.owned(ONLINE) == []
    assert pool.num_slabs == 3


def test_owned_is_in_the_order_of_taking() -> None:
    pool = SlabPool(4)
    pool.transfer([2, 0], ONLINE)
    pool.transfer([3], ONLINE)
    assert pool.owned(ONLINE) == [2, 0, 3]
    pool.transfer([0], OFFLINE)
    assert pool.owned(OFFLINE) == [1, 0]


@given(moves=st.lists(st.tuples(st.lists(st.integers(0, 7), unique=True), st.sampled_from(list(Tenant))), max_size=30))
def test_any_transfers(moves: list[tuple[list[int], Tenant]]) -> None:
    published: dict[int, tuple[Tenant, int]] = {}
    pool = SlabPool(8, lambda slab, owner, epoch: published.__setitem__(slab, (owner, epoch)))
    changes = [0] * 8
    for wanted, to in moves:
        slabs = [slab for slab in wanted if pool.owner(slab) is not to]
        pool.transfer(slabs, to)
        for slab in slabs:
            changes[slab] += 1
        assert pool.owned(to)[len(pool.owned(to)) - len(slabs) :] == slabs, "the newest come last, in the order taken"
        assert sorted(pool.owned(ONLINE) + pool.owned(OFFLINE)) == list(range(8))
        assert all(pool.count(tenant) == len(pool.owned(tenant)) for tenant in Tenant)
        assert [pool.epoch(slab) for slab in range(8)] == changes
        assert published == {slab: (pool.owner(slab), pool.epoch(slab)) for slab in range(8)}


def test_a_slab_that_went_and_came_back_shows_it() -> None:
    pool = SlabPool(2)
    before = pool.epoch(0)
    pool.transfer([0], ONLINE)
    pool.transfer([0], OFFLINE)
    assert pool.owner(0) is OFFLINE and pool.epoch(0) != before


def test_nobody_takes_what_is_theirs() -> None:
    pool = SlabPool(2)
    with pytest.raises(AssertionError):
        pool.transfer([1], OFFLINE)
    with pytest.raises(AssertionError):
        pool.transfer([0, 0], ONLINE)
