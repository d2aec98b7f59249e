"""Reserves: the rule itself, its bounds, and what it is for: few reclaims for a demand that comes and goes."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.memory.reserve import Fixed, Miad, Reserve, Static, make_reserve

NAMES = next(field.metadata["choices"] for field in fields(EngineConfig) if field.name == "reserve")


def test_miad_doubles_and_creeps_back() -> None:
    reserve = Miad(floor=1, cap=10)
    seen = []
    for reclaim in [True] * 5 + [False] * 12:
        (reserve.reclaimed if reclaim else reserve.quiet)()
        seen.append(reserve.headroom)
    assert seen == [2, 4, 8, 10, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1]


def test_miad_grows_from_nothing() -> None:
    reserve = Miad(floor=0, cap=4)
    assert reserve.headroom == 0
    reserve.reclaimed()
    assert reserve.headroom == 2


@given(
    floor=st.integers(0, 20),
    cap=st.integers(0, 40),
    factor=st.integers(2, 4),
    step=st.integers(1, 5),
    events=st.lists(st.booleans(), max_size=60),
)
def test_miad_stays_within_its_bounds(floor: int, cap: int, factor: int, step: int, events: list[bool]) -> None:
    reserve = Miad(floor, cap, factor, step)
    top = max(floor, cap)
    for reclaim in events:
        before = reserve.headroom
        (reserve.reclaimed if reclaim else reserve.quiet)()
        assert floor <= reserve.headroom <= top
        if reclaim:
            assert reserve.headroom == top or reserve.headroom >= before * factor
        else:
            assert before - step <= reserve.headroom <= before


@pytest.mark.parametrize("reserve", [Fixed(3), Static(3)])
def test_the_baselines_learn_nothing(reserve: Reserve) -> None:
    before = reserve.headroom, reserve.fixed_share
    for _ in range(5):
        reserve.reclaimed()
        reserve.quiet()
        assert (reserve.headroom, reserve.fixed_share) == before


@pytest.mark.parametrize("num_slabs", [1, 2, 3, 31, 32, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_every_reserve_by_name_fits_its_pool(name: str, num_slabs: int) -> None:
    reserve = make_reserve(name, num_slabs)
    for _ in range(20):
        reserve.reclaimed()
    assert 0 <= reserve.headroom <= num_slabs
    assert (reserve.fixed_share is None) == (name != "static")
    if reserve.fixed_share is not None:
        assert 1 <= reserve.fixed_share <= num_slabs, "online can always do something"
    if name == "none":
        assert reserve.headroom == 0
    if name == "miad":
        assert reserve.headroom == max(1, num_slabs // 2)
        for _ in range(num_slabs):
            reserve.quiet()
        assert reserve.headroom == max(1, num_slabs // 32)


def test_no_such_reserve() -> None:
    with pytest.raises(AssertionError):
        make_reserve("hope", 4)


QUIET = 20  # ticks of a demand without a reclaim that make a quiet period


def replay(reserve: Reserve, demand: list[int], num_slabs: int) -> tuple[list[int], int]:
    """Follow a demand for slabs tick by tick: the ticks at which a reclaim was needed, and slab-ticks held in vain."""
    held, reclaims, idle, changed = reserve.headroom, list[int](), 0, 0
    for tick, need in enumerate(demand):
        if need > held:
            reserve.reclaimed()
            held = min(num_slabs, need + reserve.headroom)
            reclaims.append(tick)
            changed = tick
        elif tick - changed >= QUIET:
            reserve.quiet()
            held = min(held, need + reserve.headroom)
            changed = tick
        idle += held - need
    return reclaims, idle


def bursts(seed: int, ticks: int, num_slabs: int) -> list[int]:
    """A demand that wanders, jumps and falls."""
    dice = random.Random(seed)
    need, demand = 0, []
    for _ in range(ticks):
        need += dice.choice([-3, -2, -1, 0, 0, 1, 2, 3]) + (dice.random() < 0.02) * dice.randint(5, 15)
        need = max(0, min(num_slabs * 2 // 3, need))
        if dice.random() < 0.02:
            need = 0
        demand.append(need)
    return demand


@pytest.mark.parametrize("seed", range(5))
def test_miad_bounds_the_rate_of_reclaims(seed: int) -> None:
    demand = bursts(seed, 5000, 64)
    (none, _), (fixed, _), (miad, idle) = (replay(make_reserve(name, 64), demand, 64) for name in ("none", "fixed", "miad"))
    # In the long run the headroom can grow no more often than it shrinks, and it shrinks once per quiet period; the
    # first doublings up to the cap come on top.
    assert len(miad) <= 5000 / QUIET + 6
    assert len(miad) * 10 < len(none)
    assert len(miad) * 2 < len(fixed)
    assert idle < 5000 * 32, "and it does not sit on the memory"


@pytest.mark.parametrize("rise", [1, 2, 5])
def test_a_steady_rise_is_followed_in_growing_strides(rise: int) -> None:
    demand = list(range(0, 512, rise))
    reclaims, _ = replay(Miad(floor=1, cap=256), demand, 1024)
    assert len(reclaims) <= 2 * (512).bit_length()
    assert len(replay(Fixed(0), demand, 1024)[0]) == len(demand) - 1


def test_a_quiet_online_tenant_gives_everything_back() -> None:
    reserve = make_reserve("miad", 64)
    replay(reserve, bursts(1, 500, 64), 64)
    replay(reserve, [0] * 64 * QUIET, 64)
    assert reserve.headroom == 2
