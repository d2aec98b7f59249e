"""The steady clock: a machine that slows down takes as long by it as before."""

from __future__ import annotations

import pytest

from bench.colocate.steady import SteadyClock
from engine.sched.latency import Load, StepTime
from engine.sched.plan import Checkpoint, PlanRow, StepPlan, StepResult
from engine.types import SamplingParams, Tenant

FIXED, TOKEN = 0.010, 0.001


class Machine:
    """Steps of so many tokens, one after another, on a clock of their own."""

    def __init__(self) -> None:
        self.time, self.step, self.busy = 100.0, 0, False
        model = StepTime()
        for number in range(400):
            plan = self.plan(1 + number % 40)
            model.observe(Load.of(plan.rows), FIXED + TOKEN * plan.num_tokens)
        self.clock = SteadyClock(model, 10, lambda: self.busy, lambda: self.time)

    def plan(self, count: int) -> StepPlan:
        self.step += 1
        row = PlanRow("x", Tenant.ONLINE, tuple(range(count)), count, 0, count, (0,), True, SamplingParams(), 0.0)
        return StepPlan(self.step, (row,))

    def run(self, count: int, slow: float, *, plan: StepPlan | None = None, first: int = 0, last: int = 10) -> StepPlan:
        plan = plan or self.plan(count)
        took = slow * (FIXED + TOKEN * plan.num_tokens) * (last - first) / 10
        self.time += took
        self.clock.ran(plan, StepResult((), took, None if last == 10 else Checkpoint(plan, last, None)))
        return plan


def test_a_slow_spell_does_not_show() -> None:
    machine = Machine()
    for slow in (1.0, 1.0, 1.4, 2.0, 0.7):
        before, moment = machine.clock.now(), machine.time
        machine.run(20, slow)
        took = machine.clock.at(machine.time) - machine.clock.at(moment)
        assert took == pytest.approx(0.030, rel=0.03)
        assert machine.clock.now() - before == pytest.approx(took)


def test_what_lies_between_steps_counts_as_it_is() -> None:
    machine = Machine()
    machine.run(20, 2.0)
    before = machine.clock.now()
    machine.time += 5.0
    assert machine.clock.now() - before == pytest.approx(5.0)
    machine.run(20, 2.0)
    assert machine.clock.now() - before == pytest.approx(5.030, abs=0.001)


def test_a_stopped_pass_counts_by_its_layers() -> None:
    machine = Machine()
    plan = machine.run(30, 1.5, last=4)
    half = machine.clock.now()
    assert half == pytest.approx(0.016, rel=0.05)
    machine.run(1, 1.5)
    between = machine.clock.now()
    machine.run(30, 3.0, plan=plan, first=4)
    assert machine.clock.now() - between == pytest.approx(0.024, rel=0.05)


def test_a_moment_within_a_step_and_one_before_all_of_them() -> None:
    machine = Machine()
    machine.run(20, 2.0)
    assert machine.clock.at(100.03) == pytest.approx(0.015, rel=0.03)
    assert machine.clock.at(99.0) == -1.0
    machine.busy = True
    reading = machine.clock.now()
    for _ in range(60):
        machine.run(20, 2.0)
    reading = machine.clock.now()
    machine.time += 0.04
    assert machine.clock.now() - reading == pytest.approx(0.02, rel=0.05), "at the pace of the steps before"
