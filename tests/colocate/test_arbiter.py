"""The arbiter against every short history and many long ones: one preemption per online request, nobody forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.colocate.arbiter import Arbiter, CoolDown, State

COOL = 10.0


class Device:
    """A device shared by the rules: does what the arbiter says, and judges what comes of it."""

    def __init__(self, cool_down: CoolDown | None = None, now: float = 100.0) -> None:
        self.start = self.now = now
        self.cool_down = cool_down or CoolDown(0.5, fixed=COOL)
        self.arbiter = Arbiter(self.cool_down, now)
        self.worker_runs = True
        self.freezing = False
        self.offline_busy = True
        self.present: set[str] = set()
        self.blamed: set[str] = set()  # unfinished requests whose arrival froze a busy worker
        self.freezes = 0
        self.false_alarms = 0
        self.charged = 0

    # -- what can happen

    def arrive(self, name: str) -> None:
        alone, new = not self.present, name not in self.present
        was = self.arbiter.state
        freeze = self.arbiter.arrive(name, self.now, offline_busy=self.offline_busy)
        assert freeze == (was is State.OFFLINE), "frozen exactly by who comes to a running worker"
        assert not freeze or (alone and new), "an idle device has no unfinished requests"
        self.present.add(name)
        if freeze:
            assert not self.freezing, "one freeze at a time"
            self.freezing = True
            if self.offline_busy:
                self.blamed.add(name)
                self.freezes += 1

    def froze(self) -> None:
        """The gate has closed. Also called when nobody asked: the arbiter must not be confused."""
        if self.freezing:
            self.freezing, self.worker_runs = False, False
        self.arbiter.froze(self.now)

    def finish(self, name: str) -> None:
        caused = self.arbiter.finish(name, self.now)
        assert caused == (name in self.blamed), "charged to who caused it, once"
        self.charged += caused
        self.blamed.discard(name)
        self.present.discard(name)

    def withdraw(self, name: str) -> None:
        """It was no online request: whoever it had stopped goes on at once, unless somebody else is here by now."""
        thaw = self.arbiter.withdraw(name, self.now)
        if name in self.blamed:
            self.blamed.discard(name)
            self.freezes -= 1
            self.false_alarms += 1
        self.present.discard(name)
        if thaw:
            assert not self.present
            self.worker_runs, self.freezing = True, False

    def poll(self) -> None:
        deadline = self.arbiter.deadline()
        thaw = self.arbiter.poll(self.now)
        assert thaw == (deadline is not None and self.now >= deadline)
        if thaw:
            assert not self.worker_runs and not self.present
            self.worker_runs = True

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def toggle_offline(self) -> None:
        self.offline_busy = not self.offline_busy

    # -- what must hold

    def check(self) -> None:
        arbiter = self.arbiter
        state = arbiter.state
        assert arbiter.frozen == (state is not State.OFFLINE)
        assert self.freezing == (state is State.PREEMPTING)
        assert self.worker_runs == (state in (State.OFFLINE, State.PREEMPTING))
        assert not self.present or state in (State.PREEMPTING, State.ONLINE), "both tenants run"
        assert state is not State.ONLINE or self.present, "frozen for nobody"
        assert arbiter.unfinished == len(self.present)
        assert (arbiter.deadline() is None) == (state is not State.COOLING), "cooling always ends"
        assert arbiter.preemptions == self.freezes == self.charged + len(self.blamed)
        assert arbiter.false_alarms == self.false_alarms
        spent = arbiter.seconds(self.now)
        assert set(spent) == set(State) and min(spent.values()) >= 0
        assert abs(sum(spent.values()) - (self.now - self.start)) < 1e-6

    def drain(self) -> None:
        """However it got here: when everybody is done, the worker runs again after the cool-down and not before."""
        self.froze()
        for name in sorted(self.present):
            self.finish(name)
        self.check()
        if (deadline := self.arbiter.deadline()) is not None:
            assert deadline <= self.now + self.cool_down.seconds
            self.now = max(self.now, deadline)
            self.poll()
        assert self.arbiter.state is State.OFFLINE and self.worker_runs, "lost wake-up"
        self.check()


EVENTS: dict[str, Callable[[Device], None]] = {
    "arrive a": lambda device: device.arrive("a"),
    "arrive b": lambda device: device.arrive("b"),
    "finish a": lambda device: device.finish("a"),
    "finish b": lambda device: device.finish("b"),
    "froze": Device.froze,
    "poll": Device.poll,
    "long": lambda device: device.wait(COOL),
    "short": lambda device: device.wait(COOL / 3),
    "toggle": Device.toggle_offline,
    "withdraw a": lambda device: device.withdraw("a"),
}


@pytest.mark.parametrize(
    ("events", "length"),
    [(list(EVENTS), 5), (["arrive a", "arrive b", "finish a", "froze", "poll", "long"], 6)],
    ids=["all", "most"],
)
def test_every_short_history(events: list[str], length: int) -> None:
    for history in itertools.product(events, repeat=length):
        device = Device()
        try:
            for event in history:
                EVENTS[event](device)
            device.check()
            device.drain()
        except AssertionError as error:
            raise AssertionError(f"after {history}: {error}") from error


class LongHistory(RuleBasedStateMachine):
    """Many requests, any cool-down, adapting or fixed."""

    @initialize(
        cost=st.floats(0, 0.1),
        fixed=st.none() | st.floats(0, 2.0),
        longest=st.floats(0.01, 5.0),
        now=st.floats(0, 1e6),
    )
    def build(self, cost: float, fixed: float | None, longest: float, now: float) -> None:
        self.cost, self.fixed = cost, fixed
        self.device = Device(CoolDown(cost, fixed=fixed, longest=longest), now)

    names = st.sampled_from("abcdefgh")

    @rule(name=names)
    def arrive(self, name: str) -> None:
        was = self.device.arbiter.state
        before = self.device.arbiter.preemptions
        self.device.arrive(name)
        if was is State.COOLING and name not in self.device.blamed:
            assert self.device.arbiter.preemptions == before, "the cool-down is there to save preemptions"
            assert self.device.arbiter.state is State.ONLINE

    @rule(name=names)
    def finish(self, name: str) -> None:
        self.device.finish(name)

    @rule(name=names)
    def withdraw(self, name: str) -> None:
        self.device.withdraw(name)

    @rule()
    def finish_all(self) -> None:
        for name in sorted(self.device.present):
            self.device.finish(name)

    @precondition(lambda self: self.device.freezing)
    @rule()
    def froze(self) -> None:
        self.device.froze()

    @rule(seconds=st.floats(0, 3.0))
    def wait(self, seconds: float) -> None:
        self.device.wait(seconds)

    @precondition(lambda self: self.device.arbiter.deadline() is not None)
    @rule()
    def wait_for_deadline(self) -> None:
        deadline = self.device.arbiter.deadline()
        assert deadline is not None
        self.device.now = max(self.device.now, deadline)
        self.device.poll()
        assert self.device.arbiter.state is State.OFFLINE

    @rule()
    def poll(self) -> None:
        self.device.poll()

    @rule(cost=st.floats(0, 0.2))
    def measure_cost_again(self, cost: float) -> None:
        self.cost = cost
        self.device.cool_down.set_cost(cost)

    @rule()
    def toggle(self) -> None:
        self.device.toggle_offline()

    @invariant()
    def holds(self) -> None:
        self.device.check()
        seconds = self.device.cool_down.seconds
        assert seconds == self.fixed if self.fixed is not None else seconds >= self.cost

    def teardown(self) -> None:
        if hasattr(self, "device"):
            self.device.drain()


LongHistory.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestLongHistory = LongHistory.TestCase


def test_a_withdrawn_arrival_leaves_no_trace() -> None:
    """Whatever the device was doing, it does again; neither the cool-down nor its statistics move."""
    device = Device()
    device.arrive("a")
    device.froze()
    device.withdraw("a")
    assert device.arbiter.state is State.OFFLINE
    assert device.worker_runs

    device.arrive("b")
    device.froze()
    device.finish("b")
    deadline = device.arbiter.deadline()
    device.wait(COOL / 2)
    device.arrive("a")
    device.withdraw("a")
    assert device.arbiter.state is State.COOLING
    assert device.arbiter.deadline() == deadline


def test_a_burst_costs_one_preemption_however_long() -> None:
    device = Device()
    for number in range(1000):
        device.arrive(str(number))
        device.froze()
        device.wait(0.3)
        device.finish(str(number))
        device.wait(COOL * 0.99)
        device.poll()
    assert device.arbiter.preemptions == 1
    device.drain()


def test_an_idle_worker_is_frozen_for_free() -> None:
    device = Device()
    device.toggle_offline()
    device.arrive("a")
    device.toggle_offline()  # work arrives for a worker that stands still already
    device.froze()
    device.arrive("b")
    device.finish("a")
    device.finish("b")
    assert device.arbiter.preemptions == 0
    device.drain()


def test_seconds_are_booked_where_they_were_spent() -> None:
    device = Device()
    for seconds, event in [(1, "arrive a"), (2, "froze"), (4, "finish a"), (8, "arrive a"), (16, "finish a"), (32, "poll")]:
        device.wait(seconds)
        EVENTS[event](device)
    device.wait(64)
    assert device.arbiter.seconds(device.now) == {
        State.OFFLINE: 1 + 64,
        State.PREEMPTING: 2,
        State.ONLINE: 4 + 16,
        State.COOLING: 8 + 32,
    }


# -- the cool-down

WEIGHT = 20.0
COST = 1e-3


def learned(gaps: list[float], **options: float) -> float:
    cool_down = CoolDown(COST, weight=WEIGHT, **options)
    for gap in gaps:
        cool_down.observe(gap)
    return cool_down.seconds


@pytest.mark.parametrize(
    ("gaps", "low", "high"),
    [
        ([0.005] * 30, 0.005, 0.01),  # all short: wait for each of them
        ([10.0] * 30, COST, COST),  # all long: waiting saves nothing
        ([0.005, 2.0] * 20, 0.005, 0.01),  # both: wait for the short ones only
        ([0.005] * 30 + [0.015], 0.015, 0.016),
        ([0.5] * 30, COST, COST),  # each wait would cost more than the preemption that it saves
        ([10.0] * 64 + [0.005] * 64, 0.005, 0.01),  # what was long ago does not count
        ([0.005] * 64 + [10.0] * 64, COST, COST),
        ([0.0] * 30, COST, COST),
    ],
)
def test_cool_down_follows_the_gaps(gaps: list[float], low: float, high: float) -> None:
    assert low <= learned(gaps) <= high


def test_cool_down_never_exceeds_the_longest_it_may() -> None:
    assert learned([0.019] * 30, longest=0.01) == COST
    assert learned([0.019] * 30, longest=0.02) > 0.019


@settings(max_examples=300, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 3.0), min_size=1, max_size=64),
    cost=st.floats(1e-4, 0.05),
    weight=st.floats(0, 100),
    longest=st.floats(0.01, 2.0),
)
def test_cool_down_is_near_the_best_there_is(gaps: list[float], cost: float, weight: float, longest: float) -> None:
    cool_down = CoolDown(cost, weight=weight, longest=longest)
    for gap in gaps:
        cool_down.observe(gap)
    floor = max(cost, 1e-3)

    def loss(wait: float) -> float:
        return sum(gap if gap <= wait else wait + weight * cost for gap in gaps)

    # The loss only grows between two gaps, so the best time is a gap or the floor; ours is a twentieth beyond a gap.
    best = min(loss(wait) for wait in [floor, *(gap for gap in gaps if floor < gap * 1.05 <= longest)])
    assert loss(cool_down.seconds) <= best * 1.05 + 1e-9
    assert floor <= cool_down.seconds <= max(floor, longest)


def test_a_fixed_cool_down_stays() -> None:
    cool_down = CoolDown(0.01, fixed=0.25)
    for gap in [0.001, 5.0] * 50:
        cool_down.observe(gap)
        cool_down.set_cost(gap)
        assert cool_down.seconds == 0.25


def test_a_better_known_cost_raises_the_floor() -> None:
    cool_down = CoolDown(0.0)
    cool_down.set_cost(0.02)
    assert cool_down.seconds >= 0.02
    cool_down.observe(10.0)
    assert cool_down.seconds == 0.02
