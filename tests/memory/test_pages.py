"""PagePool: random lives against a model of one dictionary, and the order in which pages and slabs are used."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.pages import PagePool, PageState
from engine.types import Tenant

ONLINE, OFFLINE = Tenant.ONLINE, Tenant.OFFLINE


class PoolLife(RuleBasedStateMachine):
    """Allocate, share, release, reuse, and slabs that come and go whatever they hold."""

    @initialize(num_slabs=st.integers(1, 5), per_slab=st.integers(1, 4), data=st.data())
    def build(self, num_slabs: int, per_slab: int, data: st.DataObject) -> None:
        present = data.draw(st.none() | st.sets(st.integers(0, num_slabs - 1)))
        self.pool = PagePool(num_slabs, per_slab, present)
        self.here = set(range(num_slabs)) if present is None else set(present)
        self.used: dict[int, tuple[int, Tenant]] = {}  # page -> references, tenant
        self.cached: dict[int, Tenant] = {}

    @property
    def free(self) -> set[int]:
        pages = {page for slab in self.here for page in self.pool.slab_pages(slab)}
        return pages - self.used.keys() - self.cached.keys()

    @rule(tenant=st.sampled_from(list(Tenant)), data=st.data())
    def allocate(self, tenant: Tenant, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        free = self.free
        pages = self.pool.allocate(count, tenant)
        assert len(pages) == len(set(pages)) == count
        assert set(pages) <= free
        # Low slabs fill up first: no slab is touched while a lower one has room left.
        touched = {page // self.pool.pages_per_slab for page in pages}
        left = {page // self.pool.pages_per_slab for page in free - set(pages)}
        assert not touched or not left or max(touched) <= min(left)
        self.used |= dict.fromkeys(pages, (1, tenant))

    @precondition(lambda self: self.used or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted([*self.used, *self.cached])))
        self.pool.share(page)
        refs, tenant = self.used[page] if page in self.used else (0, self.cached.pop(page))
        self.used[page] = (refs + 1, tenant)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        tenant = self.used[data.draw(st.sampled_from(sorted(self.used)))][1]
        theirs = sorted(page for page, (_, owner) in self.used.items() if owner is tenant)
        pages = data.draw(st.lists(st.sampled_from(theirs), unique=True))
        keep = data.draw(st.sets(st.sampled_from(theirs)))
        cached = [page for page in pages if page in keep and self.used[page][0] == 1]
        assert self.pool.release(pages, tenant, keep) == cached
        for page in pages:
            refs, _ = self.used.pop(page)
            if refs > 1:
                self.used[page] = (refs - 1, tenant)
            elif page in keep:
                self.cached[page] = tenant

    @precondition(lambda self: self.cached)
    @rule(tenant=st.sampled_from(list(Tenant)), data=st.data())
    def reuse(self, tenant: Tenant, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.cached)), unique=True))
        self.pool.reuse(pages, tenant)
        for page in pages:
            del self.cached[page]
            self.used[page] = (1, tenant)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def remove_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(self.here)))
        pages = self.pool.slab_pages(slab)
        assert set(self.pool.remove_slab(slab)) == {page for page in pages if page in self.used or page in self.cached}
        self.here.remove(slab)
        for page in pages:
            self.used.pop(page, None)
            self.cached.pop(page, None)

    @precondition(lambda self: len(self.here) < self.pool.num_slabs)
    @rule(data=st.data())
    def add_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(set(range(self.pool.num_slabs)) - self.here)))
        self.pool.add_slab(slab)
        self.here.add(slab)

    @invariant()
    def agrees(self) -> None:
        pool = self.pool
        pool.check()
        free = self.free
        assert pool.num_free == len(free) and pool.num_cached == len(self.cached) and pool.num_used() == len(self.used)
        assert pool.num_pages == len(self.here) * pool.pages_per_slab
        for tenant in Tenant:
            assert pool.num_used(tenant) == sum(owner is tenant for _, owner in self.used.values())
        assert pool.num_shared == sum(refs > 1 for refs, _ in self.used.values())
        for page in range(pool.num_slabs * pool.pages_per_slab):
            refs, tenant = self.used.get(page, (0, self.cached.get(page)))
            assert (pool.refs(page), pool.tenant(page)) == (refs, tenant)


PoolLife.TestCase.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)
TestPoolLife = PoolLife.TestCase


def test_pages_of_a_slab_go_in_order() -> None:
    pool = PagePool(2, 3)
    assert pool.allocate(4, ONLINE) == [0, 1, 2, 3]


def test_more_than_there_is_is_the_callers_mistake() -> None:
    pool = PagePool(2, 2, present=[1])
    with pytest.raises(AssertionError):
        pool.allocate(3, ONLINE)
    assert pool.allocate(2, ONLINE) == [2, 3]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda pool: pool.release([2], OFFLINE),  # free
        lambda pool: pool.share(2),
        lambda pool: pool.reuse([0], OFFLINE),  # used
        lambda pool: pool.add_slab(0),  # here already
        lambda pool: pool.remove_slab(1),  # not here
        lambda pool: pool.release([4], OFFLINE, keep=[4]),
    ],
)
def test_mistakes_are_noticed(mistake: object) -> None:
    pool = PagePool(2, 4, present=[0])
    pool.allocate(1, OFFLINE)
    with pytest.raises(AssertionError):
        mistake(pool)  # type: ignore[operator]


def test_slabs_that_come_and_go_for_ever_leave_nothing_behind() -> None:
    pool = PagePool(8, 2)
    pool.allocate(1, ONLINE)  # slab 0 always has room, so nothing ever looks at the others
    for _ in range(1000):
        for slab in range(1, 8):
            pool.remove_slab(slab)
            pool.add_slab(slab)
    assert len(pool._open) <= 8
    pool.check()


def test_an_emptied_slab_holds_nothing() -> None:
    pool = PagePool(1, 2)
    first, second = pool.allocate(2, ONLINE)
    pool.share(first)
    pool.release([second], ONLINE, keep=[second])
    assert pool.remove_slab(0) == [first, second]
    assert (pool.num_shared, pool.num_used(), pool.num_cached, pool.num_pages) == (0, 0, 0, 0)
    assert pool.state(first) is PageState.ABSENT
