"""When offline rows ride: what they gain beside online work, less the idle time that they take from themselves."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from engine.sched.modes import Mode, ModeChooser


class Life:
    """Phases of a second, of which online work takes a share; offline work has the rest."""

    def __init__(self) -> None:
        self.chooser = ModeChooser(0.0)
        self.now = self.work = 0.0
        self.changes: list[float] = []

    def goes_on(self, seconds: float, *, work: float, riding: float, longer: float = 0.0, could_ride: bool = True) -> Mode:
        """`work`: the share that online would be busy alone. `riding`: offline seconds beside a second of that, which takes
        `longer` for it, as a share."""
        chooser, end = self.chooser, self.now + seconds
        while self.now < end:
            before = chooser.mode
            chooser.look(self.now, True)
            rides = chooser.mode is Mode.STEP
            busy = min(1.0, work * (1 + longer * rides))
            chooser.ran_online(busy, riding * work * rides, could_ride=could_ride)
            self.work += work
            chooser.settle(self.work)
            chooser.look(self.now + busy, False)
            chooser.ran_alone(1 - busy, 1 - busy)
            self.now += 1
            if chooser.mode is not before:
                self.changes.append(self.now)
        return chooser.mode


def test_light_traffic_is_left_alone_and_heavy_traffic_is_shared() -> None:
    life = Life()
    assert life.goes_on(60, work=0.1, riding=0.05) is Mode.EXCLUSIVE
    assert life.chooser.idle_share == pytest.approx(0.9, abs=0.1)
    assert life.goes_on(60, work=0.9, riding=0.05) is Mode.STEP


@pytest.mark.parametrize(("longer", "mode"), [(0.0, Mode.STEP), (0.1, Mode.STEP), (0.2, Mode.EXCLUSIVE), (0.3, Mode.EXCLUSIVE)])
def test_what_rides_must_be_more_than_the_idle_time_that_it_takes_would_yield(longer: float, mode: Mode) -> None:
    """A fifth of a second rides beside a second of online work; where that is a fifth longer, nothing is gained."""
    assert Life().goes_on(60, work=0.5, riding=0.2, longer=longer) is mode


def test_where_online_is_never_idle_there_is_nothing_to_lose() -> None:
    """Riding is worth less than idle time, but there is hardly any."""
    assert Life().goes_on(60, work=0.95, riding=0.1, longer=0.3) is Mode.STEP


def test_no_backlog_is_no_witness_against_riding() -> None:
    life = Life()
    assert life.goes_on(60, work=0.5, riding=0.0, could_ride=False) is Mode.STEP
    assert life.goes_on(60, work=0.5, riding=0.0) is Mode.EXCLUSIVE


def test_what_riding_is_worth_is_learned_again_but_less_and_less_often() -> None:
    life = Life()
    assert life.goes_on(20, work=0.5, riding=0.0) is Mode.EXCLUSIVE
    life.changes.clear()
    life.goes_on(1200, work=0.5, riding=0.0)
    tries = [back - there for there, back in pairwise(life.changes)][1::2]
    assert tries == sorted(tries)
    assert 100 < tries[-1] < 300
    assert life.goes_on(300, work=0.5, riding=0.2) is Mode.STEP, "once it has changed"


def test_the_mode_does_not_flutter() -> None:
    """Traffic on the border between the modes: few changes, and never two within seconds."""
    life, rng = Life(), random.Random(0)
    for _ in range(600):
        life.goes_on(1, work=rng.uniform(0.1, 0.35), riding=0.05)
    assert len(life.changes) <= 30
    assert all(b - a >= 4.0 for a, b in pairwise(life.changes))


def test_time_in_which_the_engine_slept_is_idle() -> None:
    chooser = ModeChooser(0.0)
    chooser.look(1.0, True)
    chooser.look(100.0, True)
    assert chooser.idle_share > 0.9
