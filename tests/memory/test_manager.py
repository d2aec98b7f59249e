"""KVManager under random lives, with a shadow of what every page really holds."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.host import HostTier
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool, PageState
from engine.types import Request, SamplingParams, Tenant

ONLINE, OFFLINE = Tenant.ONLINE, Tenant.OFFLINE
PAGE = 2


def request(tokens: list[int], tenant: Tenant = ONLINE, salt: str = "", id: str = "r", **params: int) -> Request:
    return Request(
        id=id,
        tenant=tenant,
        tokens=list(tokens),
        num_prompt=len(tokens),
        params=SamplingParams(**params),
        seed=0,
        stop_ids=frozenset(),
        max_len=1000,
        arrival=0.0,
        cache_salt=salt,
    )


def manager(slabs: int = 4, per_slab: int = 2, **options: bool | int | HostTier) -> KVManager:
    return KVManager(PagePool(slabs, per_slab), PAGE, **options)  # type: ignore[arg-type]


def admit(kv: KVManager, request: Request) -> bool:
    """As a scheduler does: with what the cache has of it. Its whole prompt is computed at once."""
    prefix = kv.find_prefix(request)
    if not kv.admit(request, len(request.tokens), prefix):
        return False
    request.num_computed = len(request.tokens)
    kv.commit(request)
    return True


class Lender:
    """Some slabs in reserve, handed out one by one."""

    def __init__(self, kv: KVManager, slabs: set[int]) -> None:
        self.kv = kv
        self.slabs = slabs
        self.asked: list[str] = []

    def lendable(self) -> int:
        return len(self.slabs) * self.kv.pool.pages_per_slab

    def lend(self, num_pages: int, request: Request) -> None:
        assert num_pages > 0
        self.asked.append(request.id)
        target = self.kv.pool.num_free + num_pages
        while self.slabs and self.kv.pool.num_free < target:
            self.kv.add_slab(self.slabs.pop())


class KVLife(RuleBasedStateMachine):
    """The shadow says for each page whose KV of which tokens was written there last; reuse must never find anything else."""

    @initialize(
        slabs=st.integers(1, 6),
        per_slab=st.integers(1, 3),
        protected=st.integers(0, 6),
        caching=st.booleans(),
        lending=st.booleans(),
        data=st.data(),
    )
    def build(self, slabs: int, per_slab: int, protected: int, caching: bool, lending: bool, data: st.DataObject) -> None:
        present = data.draw(st.sets(st.integers(0, slabs - 1)), label="present")
        self.kv = KVManager(PagePool(slabs, per_slab, present), PAGE, prefix_caching=caching, protected=protected)
        self.here = present
        self.lender = Lender(self.kv, set(range(slabs)) - present) if lending else None
        self.kv.lender = self.lender
        self.live: dict[str, Request] = {}
        self.shadow: dict[int, object] = {}
        self.count = 0

    def content(self, request: Request, index: int) -> object:
        return request.tenant, request.cache_salt, tuple(request.tokens[: (index + 1) * PAGE])

    def write(self, request: Request, start: int) -> None:
        """Compute all tokens from `start` on: what a runner would write into the request's pages."""
        for index in range(start // PAGE, len(request.tokens) // PAGE):
            page = request.pages[index]
            assert self.kv.pool.refs(page) == 1, "nobody else may be reading what is written"
            self.shadow[page] = self.content(request, index)
        request.num_computed = len(request.tokens)
        self.kv.commit(request)

    def online_idle(self) -> int:
        pool = self.kv.pool
        pages = range(pool.num_slabs * pool.pages_per_slab)
        return sum(pool.state(page) is PageState.CACHED and pool.tenant(page) is ONLINE for page in pages)

    def lent(self) -> set[int]:
        return set() if self.lender is None else set(self.lender.slabs)

    def settle(self, who: Request, idle: int, lent: set[int], fits: bool, need: int, available: int) -> None:
        """What any allocation must respect."""
        self.here |= lent - self.lent()
        borrows = who.tenant is ONLINE or self.live.keys() <= {who.id}
        assert borrows or self.lent() == lent, "only online borrows, and who is alone here"
        if who.tenant is OFFLINE:
            assert self.online_idle() >= min(idle, self.kv.protected), "a job never flushes protected prefixes"
        could = available + (len(lent) * self.kv.pool.pages_per_slab if borrows else 0)
        assert fits == (need <= could), "it fits exactly if there are as many pages to be had"
        assert fits or self.lent() == lent, "nothing is borrowed in vain"

    @rule(
        tenant=st.sampled_from(list(Tenant)),
        salt=st.sampled_from(["", "s"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    )
    def admit(self, tenant: Tenant, salt: str, tokens: list[int]) -> None:
        self.count += 1
        new = request(tokens, tenant, salt, id=str(self.count))
        prefix = self.kv.find_prefix(new)
        assert len(prefix) * PAGE < len(tokens), "at least one token is left to compute"
        for index, page in enumerate(prefix):
            assert self.shadow[page] == self.content(new, index)
        idle, lent = self.online_idle(), self.lent()
        held = sum(self.kv.pool.state(page) is PageState.CACHED for page in prefix)
        need, available = self.kv.pages_for(len(tokens)) - len(prefix), self.kv.available(tenant) - held
        fits = self.kv.admit(new, len(tokens), prefix)
        if fits:
            assert new.pages[: len(prefix)] == prefix
            idle = max(0, idle - (held if tenant is ONLINE else 0))
            self.live[new.id] = new
            for page in new.pages[len(prefix) :]:
                self.shadow[page] = "garbage"
            self.write(new, len(prefix) * PAGE)
        else:
            assert not new.pages
        self.settle(new, idle, lent, fits, need, available)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        old = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        start, pages = len(old.tokens), list(old.pages)
        idle, lent, available = self.online_idle(), self.lent(), self.kv.available(old.tenant)
        need = self.kv.pages_for(start + len(tokens)) - len(pages)
        fits = self.kv.grow(old, start + len(tokens))
        if fits:
            assert old.pages[: len(pages)] == pages
            old.tokens.extend(tokens)
            self.write(old, start)
        else:
            assert old.pages == pages
        self.settle(old, idle, lent, fits, need, available)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        old = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.kv.release(old)
        assert old.pages == []
        self.kv.release(old)  # a second time is nothing

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def remove_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(self.here)))
        pages = set(self.kv.pool.slab_pages(slab))
        held = {old.id: set(old.pages) for old in self.live.values()}
        hit = self.kv.remove_slab(slab)
        assert {old.id for old in hit} == {id for id, theirs in held.items() if pages & theirs}
        assert all(set(old.pages) == held[old.id] - pages for old in hit)
        self.here.remove(slab)
        for page in pages:
            self.shadow[page] = "taken"
        for old in hit:
            self.kv.release(self.live.pop(old.id))
        if self.lender is not None:
            self.lender.slabs.add(slab)

    @precondition(lambda self: self.lender is None and len(self.here) < self.kv.pool.num_slabs)
    @rule(data=st.data())
    def add_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(set(range(self.kv.pool.num_slabs)) - self.here)))
        self.kv.add_slab(slab)
        self.here.add(slab)

    @invariant()
    def whole(self) -> None:
        self.kv.check()
        pool = self.kv.pool
        assert pool.num_pages == len(self.here) * pool.pages_per_slab
        assert self.kv.capacity == pool.num_pages + len(self.lent()) * pool.pages_per_slab
        for old in self.live.values():
            for index in range(old.num_computed // PAGE):
                assert self.shadow[old.pages[index]] == self.content(old, index), "somebody wrote over it"

    def teardown(self) -> None:
        for old in getattr(self, "live", {}).values():
            self.kv.release(old)
        if hasattr(self, "kv"):
            self.kv.check()
            assert self.kv.pool.num_used() == 0


KVLife.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestKVLife = KVLife.TestCase


@pytest.mark.parametrize("other", [(OFFLINE, ""), (ONLINE, "salt"), (OFFLINE, "salt")])
def test_prefixes_are_found_by_the_same_caller_only(other: tuple[Tenant, str]) -> None:
    kv = manager()
    tokens = [1, 2, 3, 4, 5]
    first = request(tokens)
    assert admit(kv, first)
    kv.release(first)
    assert kv.find_prefix(request(tokens)) == [0, 1]
    assert kv.find_prefix(request(tokens, *other)) == []


def test_the_last_token_is_always_computed() -> None:
    kv = manager()
    first = request([1, 2, 3, 4])
    assert admit(kv, first)
    assert len(kv.find_prefix(request([1, 2, 3, 4]))) == 1
    assert len(kv.find_prefix(request([1, 2, 3, 4, 5]))) == 2
    assert kv.find_prefix(request([1, 2, 3, 4, 5], prompt_logprobs=0)) == [], "its logits are all wanted"


def test_hits_and_queries_are_counted_in_tokens() -> None:
    kv = manager()
    for index in range(2):
        assert admit(kv, request([1, 2, 3, 4, 5], id=str(index)))
    assert kv.prefix_queries == {ONLINE: 10, OFFLINE: 0}
    assert kv.prefix_hits == {ONLINE: 4, OFFLINE: 0}


def test_a_shared_prefix_is_held_once() -> None:
    kv = manager(slabs=2, per_slab=2)
    one, two = request([1, 2, 3], id="one"), request([1, 2, 9], id="two")
    assert admit(kv, one) and admit(kv, two)
    assert one.pages[0] == two.pages[0] and one.pages[1] != two.pages[1]
    assert kv.pool.num_used() == 3
    kv.release(one)
    assert kv.pool.num_used() == 2
    kv.check()


def test_offline_cache_goes_before_online_and_the_tail_before_the_head() -> None:
    kv = manager(slabs=3, per_slab=2)
    online, offline = request([1, 2, 3, 4], ONLINE, id="on"), request([5, 6, 7, 8], OFFLINE, id="off")
    assert admit(kv, online) and admit(kv, offline)
    kv.release(online)
    kv.release(offline)
    assert kv.pool.num_cached == 4
    assert admit(kv, request([9] * 6, ONLINE, id="next"))  # two free pages and one evicted
    assert len(kv.find_prefix(request([5, 6, 7, 8, 0], OFFLINE))) == 1, "the end of offline's prefix went first"
    assert len(kv.find_prefix(request([1, 2, 3, 4, 0], ONLINE))) == 2
    kv.check()


@pytest.mark.parametrize("protected", range(5))
def test_offline_may_flush_what_is_not_protected(protected: int) -> None:
    kv = manager(slabs=2, per_slab=2, protected=protected)
    online = request([1, 2, 3, 4, 5, 6], ONLINE, id="on")
    assert admit(kv, online)
    kv.release(online)
    assert kv.available(OFFLINE) == 1 + max(0, 3 - protected)
    assert kv.available(ONLINE) == 4
    biggest = kv.available(OFFLINE)
    assert not kv.admit(request([7] * (biggest * PAGE + 1), OFFLINE), biggest * PAGE + 1, [])
    assert admit(kv, request([7] * biggest * PAGE, OFFLINE))
    assert len(kv.find_prefix(request([1, 2, 3, 4, 5, 6, 0], ONLINE))) == min(3, protected)


def test_a_prefix_cannot_be_evicted_to_make_room_for_its_own_rest() -> None:
    kv = manager(slabs=1, per_slab=3)
    first = request([1, 2, 3, 4], id="first")
    assert admit(kv, first)
    kv.release(first)
    long = request([1, 2, 3, 4, 5, 6, 7], id="long")
    prefix = kv.find_prefix(long)
    assert len(prefix) == 2 and kv.available(ONLINE) == 3
    assert not kv.admit(long, 7, prefix), "two more pages are needed and one is free"
    assert kv.find_prefix(long) == prefix, "nothing happened"
    assert kv.admit(long, 6, prefix)


def test_a_lost_slab_names_its_holders_and_nobody_else() -> None:
    kv = manager(slabs=3, per_slab=1)
    one, two = request([1, 2], id="one"), request([1, 2, 3], id="two")
    assert admit(kv, one)
    assert admit(kv, two)
    assert two.pages == [0, 1], "the first page is shared"
    alone = request([7, 7], OFFLINE, id="alone")
    assert admit(kv, alone)
    assert kv.remove_slab(1) == [two]
    kv.release(two)
    assert kv.remove_slab(0) == [one]
    kv.release(one)
    assert kv.find_prefix(request([1, 2, 3])) == [], "what was in a lost slab is not found again"
    assert alone.pages == [2]
    kv.check()


def test_a_slab_of_cached_pages_is_lost_without_victims() -> None:
    kv = manager(slabs=1, per_slab=2)
    first = request([1, 2, 3, 4])
    assert admit(kv, first)
    kv.release(first)
    assert kv.remove_slab(0) == []
    assert kv.find_prefix(request([1, 2, 3])) == []
    assert kv.available(ONLINE) == 0
    kv.check()


def test_the_lender_is_asked_for_online_only_and_only_when_short() -> None:
    kv = KVManager(PagePool(4, 1, present=[0]), PAGE)
    lender = kv.lender = Lender(kv, {1, 2})
    assert kv.capacity == 3
    assert admit(kv, request([1, 2], id="fits"))
    assert not admit(kv, request([3, 4], OFFLINE, id="offline"))
    assert lender.asked == []
    assert admit(kv, request([3, 4], id="borrows"))
    assert lender.asked == ["borrows"] and len(lender.slabs) == 1
    assert not admit(kv, request([5] * 6, id="too much"))
    assert lender.asked == ["borrows"], "nobody is robbed for what does not fit all the same"
    assert admit(kv, request([6, 6], id="last"))
    assert lender.asked == ["borrows", "last"]
    kv.check()


def test_a_copy_under_way_counts_for_nothing_if_its_slab_goes_after_its_page_was_freed() -> None:
    kv = manager(prefix_caching=False, host=HostTier(8))
    one = request([1, 2, 3, 4], OFFLINE)
    assert admit(kv, one)
    transfer = kv.next_save(8)
    assert transfer is not None and kv.copies is not None
    kv.release(one)  # its pages are free, and their bytes perhaps gone already
    kv.remove_slab(0)
    kv.copies.landed(transfer)
    assert kv.copies.counters.voided == 2 and kv.copies.find(one, 0) == []
    kv.check()
