"""Victims: tables, what must hold for any choice, and least lost work against the best choice there is."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.victims import VICTIMS, Holdings, fifo, least_lost_work, lifo


def lost_work(taken: Iterable[int], holdings: Holdings) -> int:
    """Tokens to compute again once these slabs are gone."""
    gone = set(taken)
    rests = [
        (request, min(rest for slab in gone if (rest := holdings.holders.get(slab, {}).get(request)) is not None))
        for request in {request for slab in gone for request in holdings.holders.get(slab, ())}
    ]
    return sum(max(0, holdings.computed.get(request, 0) - rest) for request, rest in rests)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[int], int, Holdings]:
    slabs = draw(st.permutations(range(draw(st.integers(0, 7)))))
    requests = st.integers(0, 5)
    shares = st.dictionaries(requests, st.integers(0, 60), max_size=4)
    holders = draw(st.dictionaries(st.sampled_from(slabs), shares)) if slabs else {}
    computed = draw(st.dictionaries(requests, st.integers(0, 100)))
    return list(slabs), draw(st.integers(0, 8)), Holdings(holders, computed)


TABLE = [
    # holders, computed, count, taken in this order
    pytest.param({}, {}, 2, [3, 2], id="empty ones, the highest first"),
    pytest.param({3: {1: 0}, 2: {1: 0}, 1: {1: 0}}, {1: 10}, 2, [0, 3], id="empty before held"),
    pytest.param(
        {0: {1: 0}, 1: {2: 0}, 2: {3: 0}, 3: {4: 0}}, {1: 5, 2: 2, 3: 9, 4: 2}, 2, [3, 1], id="the cheapest"
    ),
    pytest.param(
        {0: {1: 0}, 1: {1: 0}, 2: {2: 0}, 3: {1: 0, 3: 0}}, {1: 10, 2: 11, 3: 50}, 2, [1, 0], id="one request rather than two"
    ),
    pytest.param(
        {0: {1: 0}, 1: {1: 64}, 2: {1: 128}, 3: {2: 0}}, {1: 150, 2: 30}, 4, [2, 3, 1, 0], id="the end before the beginning"
    ),
    pytest.param(
        {0: {1: 0}, 1: {1: 64}, 2: {2: 0}, 3: {2: 32}}, {1: 65, 2: 200}, 4, [1, 0, 3, 2], id="behind a lost slab all is free"
    ),
    pytest.param(
        {0: {1: 0, 2: 0}, 1: {1: 0}, 2: {2: 0}, 3: {3: 0}}, {1: 3, 2: 3, 3: 7}, 3, [2, 1, 0], id="shared, once both are lost"
    ),
    pytest.param(
        {0: {1: 0}, 1: {2: 0}, 2: {3: 0}, 3: {4: 0}}, {1: 0, 2: 1, 3: 1, 4: 1}, 1, [0], id="safe in host memory"
    ),
    pytest.param({0: {1: 0}, 1: {9: 0}, 2: {2: 0}, 3: {2: 0}}, {1: 1, 2: 1}, 1, [1], id="a holder of unknown cost is free"),
    pytest.param(
        {0: {1: 32}, 1: {2: 0}, 2: {2: 0}, 3: {2: 0}, 7: {1: 0}}, {1: 90, 2: 5}, 1, [0], id="lost with a slab taken before"
    ),
]


@pytest.mark.parametrize(("holders", "computed", "count", "taken"), TABLE)
def test_table(holders: dict[int, dict[int, int]], computed: dict[int, int], count: int, taken: list[int]) -> None:
    assert least_lost_work([0, 1, 2, 3], count, Holdings(holders, computed)) == taken


def test_baselines_go_by_age_alone() -> None:
    slabs = [4, 2, 9, 7]
    assert [fifo(slabs, count, Holdings()) for count in (0, 2, 9)] == [[], [4, 2], slabs]
    assert [lifo(slabs, count, Holdings()) for count in (0, 2, 9)] == [[], [7, 9], slabs[::-1]]


@pytest.mark.parametrize("name", VICTIMS)
@given(scene=scenes())
def test_any_rule_takes_what_is_wanted_from_what_there_is(name: str, scene: tuple[list[int], int, Holdings]) -> None:
    slabs, count, holdings = scene
    before = list(slabs)
    taken = VICTIMS[name](slabs, count, holdings)
    assert len(taken) == len(set(taken)) == min(count, len(slabs))
    assert set(taken) <= set(slabs)
    assert slabs == before
    assert taken == VICTIMS[name](slabs, count, holdings), "no dice"


@given(scene=scenes())
def test_each_slab_taken_is_the_cheapest_at_that_point(scene: tuple[list[int], int, Holdings]) -> None:
    slabs, count, holdings = scene
    taken = least_lost_work(slabs, count, holdings)
    for index, slab in enumerate(taken):
        so_far = taken[:index]
        spent = lost_work(so_far, holdings)
        margins = {other: lost_work([*so_far, other], holdings) - spent for other in slabs if other not in so_far}
        assert margins[slab] == min(margins.values())
    costs = [lost_work(taken[:index], holdings) for index in range(len(taken) + 1)]
    free = sum(lost_work([slab], holdings) == 0 for slab in slabs)
    assert all(cost == 0 for cost in costs[: min(free, count) + 1]), "what costs nothing goes first"


@given(scene=scenes(), cut=st.integers(0, 7))
def test_a_choice_in_two_parts_is_the_choice_in_one(scene: tuple[list[int], int, Holdings], cut: int) -> None:
    """While the worker is frozen its report stays as it was; what was taken since is known all the same."""
    slabs, count, holdings = scene
    first = least_lost_work(slabs, min(cut, count), holdings)
    rest = least_lost_work([slab for slab in slabs if slab not in first], count - len(first), holdings)
    assert first + rest == least_lost_work(slabs, count, holdings)


def best(slabs: list[int], count: int, holdings: Holdings) -> int:
    return min(lost_work(taken, holdings) for taken in combinations(slabs, min(count, len(slabs))))


@given(scene=scenes())
def test_one_slab_is_chosen_perfectly(scene: tuple[list[int], int, Holdings]) -> None:
    slabs, _, holdings = scene
    assert lost_work(least_lost_work(slabs, 1, holdings), holdings) == best(slabs, 1, holdings)


def test_greedy_is_not_perfect_and_this_is_how() -> None:
    """Two slabs wanted. The cheap one first, then the dear pair costs both; the pair alone would have done."""
    holdings = Holdings({0: {1: 0}, 1: {2: 0}, 2: {2: 0}}, {1: 5, 2: 6})
    assert lost_work(least_lost_work([0, 1, 2], 2, holdings), holdings) == 11
    assert best([0, 1, 2], 2, holdings) == 6


def typical(dice: random.Random, num_slabs: int) -> Holdings:
    """Requests of all sizes, each in a few neighbouring slabs, as a first-fit allocator leaves them."""
    holders: dict[int, dict[int, int]] = {}
    computed = {}
    for request in range(num_slabs):
        first, size = dice.randrange(num_slabs), dice.choice([1, 1, 1, 2, 3])
        computed[request] = dice.randint(1, 100) * size
        for index, slab in enumerate(range(first, min(num_slabs, first + size))):
            holders.setdefault(slab, {})[request] = index * computed[request] // size
    return Holdings(holders, computed)


def test_it_is_near_the_best_and_far_from_the_baselines_on_average() -> None:
    totals = dict.fromkeys([*VICTIMS, "best"], 0)
    for seed in range(60):
        dice = random.Random(seed)
        holdings, slabs = typical(dice, 10), dice.sample(range(10), 10)
        for name, rule in VICTIMS.items():
            totals[name] += lost_work(rule(slabs, 4, holdings), holdings)
        totals["best"] += best(slabs, 4, holdings)
    assert totals["least-lost-work"] <= 1.1 * totals["best"]
    # Valve, section on selective eviction: 22.9 to 40.1 % less lost throughput than FIFO.
    assert totals["least-lost-work"] < (1 - 0.229) * totals["fifo"]
    assert totals["least-lost-work"] < (1 - 0.229) * totals["lifo"]
