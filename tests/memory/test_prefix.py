"""PrefixCache and its hashes: what equals what, and nothing else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.prefix import PrefixCache, chain_on, chain_root
from engine.types import Tenant

ONLINE, OFFLINE = Tenant.ONLINE, Tenant.OFFLINE
PAGE = 3

texts = st.text(max_size=4)
tokens = st.lists(st.integers(0, 3), min_size=0, max_size=20)
callers = st.tuples(st.sampled_from(list(Tenant)), texts)


def chain_of(root: bytes, tokens: list[int]) -> list[bytes]:
    return chain_on(root, tokens[: len(tokens) // PAGE * PAGE], PAGE)


@given(one=tokens, two=tokens, who=callers)
def test_hashes_agree_exactly_as_far_as_the_tokens(one: list[int], two: list[int], who: tuple[Tenant, str]) -> None:
    first, second = chain_of(chain_root(*who), one), chain_of(chain_root(*who), two)
    for page in range(min(len(first), len(second))):
        end = (page + 1) * PAGE
        assert (first[page] == second[page]) == (one[:end] == two[:end])


@given(tokens=st.lists(st.integers(0, 3), min_size=PAGE, max_size=20), one=callers, two=callers)
def test_callers_with_other_salts_or_tenants_have_no_hash_in_common(
    tokens: list[int], one: tuple[Tenant, str], two: tuple[Tenant, str]
) -> None:
    common = set(chain_of(chain_root(*one), tokens)) & set(chain_of(chain_root(*two), tokens))
    assert bool(common) == (one == two)


def test_salts_that_no_encoding_likes_are_salts() -> None:
    roots = {
        chain_root(tenant, salt) for tenant in Tenant for salt in ("", "\0", "a\0", "\ud800", "\u00e9", "e\u0301", "x" * 10_000)
    }
    assert len(roots) == 14


@given(tokens=tokens, cut=st.integers(0, 7))
def test_a_chain_may_be_extended_bit_by_bit(tokens: list[int], cut: int) -> None:
    root, full = chain_root(ONLINE, ""), len(tokens) // PAGE * PAGE
    begun = chain_on(root, tokens[: min(cut * PAGE, full)], PAGE)
    rest = chain_on(begun[-1] if begun else root, tokens[len(begun) * PAGE : full], PAGE)
    assert begun + rest == chain_of(root, tokens)


def test_a_chain_is_of_full_pages_only() -> None:
    with pytest.raises(AssertionError):
        chain_on(chain_root(ONLINE, ""), [1, 2, 3, 4], PAGE)


def test_match_ends_at_the_first_gap() -> None:
    cache = PrefixCache()
    chain = chain_of(chain_root(ONLINE, ""), list(range(4 * PAGE)))
    for page in (0, 1, 3):
        cache.publish([chain[page]], [10 + page])
    assert cache.match(chain) == [10, 11]
    assert cache.match(chain[1:]) == [11]
    cache.forget(10, None)
    assert cache.match(chain) == []


def test_the_first_page_to_hold_something_is_the_one_found() -> None:
    cache = PrefixCache()
    cache.publish([b"x"], [1])
    cache.publish([b"x"], [2])
    cache.publish([b"y"], [1])
    assert cache.match([b"x"]) == [1] and cache.match([b"y"]) == []
    assert 1 in cache and 2 not in cache
    cache.forget(2, None)
    assert cache.match([b"x"]) == [1]


def test_the_oldest_are_those_idle_longest_of_their_tenant() -> None:
    cache = PrefixCache()
    for page in (3, 1, 2, 4):
        cache.publish([bytes([page])], [page])
    cache.idle([3, 1, 2], ONLINE)
    cache.idle([4], ONLINE)
    cache.publish([b"\x09"], [9])
    cache.idle([9], OFFLINE)
    cache.busy(3, ONLINE)
    cache.idle([3], ONLINE)
    assert [cache.num_idle(tenant) for tenant in Tenant] == [4, 1]
    assert cache.take_oldest(ONLINE, 1) == [1] and 1 not in cache
    cache.forget(2, ONLINE)
    assert cache.take_oldest(ONLINE, 3) == [4, 3] and cache.match([b"\x03"]) == []
    assert cache.take_oldest(OFFLINE, 2) == [9]
    cache.check()
