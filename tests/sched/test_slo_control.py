"""The step budget follows what online requests feel: it converges, backs off at once, and knows what they would feel alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.alone import Alone
from engine.sched.latency import Load, StepTime
from engine.sched.plan import StepPlan
from engine.sched.policies import OnlineFirst, SharedStep
from engine.sched.scheduler import Scheduler
from engine.sched.slo import Delays, OnlineMeter, SloControl
from engine.types import SamplingParams, Submit, Tenant, TokenOut

METRICS = ("mean-ttft", "p99-ttft", "mean-tpot", "p99-tpot")


def run_plant(control: SloControl, effect: float, noise: float, requests: int, seed: int = 0) -> list[float]:
    """Requests of 10 ms that get longer by `effect` for each unit of scale. Returns the scales."""
    rng, scales = random.Random(seed), []
    for _ in range(requests):
        alone = 0.01 * rng.uniform(1 - noise, 1 + noise)
        control.observe(alone * (1 + effect * control.scale), alone)
        scales.append(control.scale)
    return scales


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("effect", [0.005, 0.02, 0.1, 0.5])
def test_it_converges_to_just_within_the_tolerance(metric: str, effect: float) -> None:
    scales = run_plant(SloControl(metric, increase=0.05), effect, 0.1, 3000)
    late = [effect * scale for scale in scales[1500:]]
    assert max(late) <= 0.05 * 1.01
    assert min(late) >= 0.05 * 0.7


@pytest.mark.parametrize("metric", METRICS)
def test_it_converges_to_a_target_in_seconds(metric: str) -> None:
    scales = run_plant(SloControl(metric, seconds=0.015), 0.1, 0.05, 3000)
    assert 0.012 <= 0.01 * (1 + 0.1 * scales[-1]) <= 0.015


def test_it_backs_off_at_once() -> None:
    control = SloControl("mean-tpot", increase=0.05)
    run_plant(control, 0.01, 0.0, 500)
    before = control.scale
    run_plant(control, 0.2, 0.0, 3)
    assert control.scale <= before / 2
    run_plant(control, 0.2, 0.0, 9)
    assert control.scale <= 0.35


def test_it_settles_without_swinging() -> None:
    scales = run_plant(SloControl("mean-tpot", increase=0.05), 0.02, 0.1, 4000)[2000:]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(scales, scales[1:], scales[2:], strict=False))
    assert max(scales) / min(scales) < 1.5
    assert turns < 20


def test_a_target_that_cannot_be_met_leaves_next_to_nothing() -> None:
    control = SloControl("mean-tpot", seconds=0.005)
    run_plant(control, 0.1, 0.0, 200)
    assert control.scale < 0.05


def test_requests_that_met_no_offline_work_do_not_raise_the_budget() -> None:
    control = SloControl("mean-tpot", increase=0.05)
    for _ in range(200):
        control.observe(0.01, 0.01, delayed=False)
    assert control.scale == 0.5
    run_plant(control, 0.5, 0.0, 50)
    low = control.scale
    for _ in range(200):
        control.observe(0.01, 0.01, delayed=False)
    assert low < control.scale <= 0.5, "but one that lets nobody ride would never be questioned"


def test_a_percentile_is_that_of_all_remembered_requests_not_of_those_since_the_last_change() -> None:
    """One request in fifty is long, and only these get slower: the p99 is theirs, and the control holds it."""
    control, rng = SloControl("p99-tpot", increase=0.1), random.Random(2)
    late = []
    for number in range(3000):
        alone = 0.1 if rng.random() < 0.02 else 0.01
        real = alone * (1 + 0.2 * control.scale) if alone > 0.05 else alone
        control.observe(real, alone)
        late += [real / alone - 1] if alone > 0.05 and number > 1000 else []
    assert 0.05 < sum(late) / len(late) <= 0.1


def test_the_scale_that_was_found_is_kept_for_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "scales.json"
    found = SloControl("mean-tpot", increase=0.05)
    run_plant(found, 0.2, 0.0, 200)
    found.save(path)
    SloControl("mean-ttft", seconds=0.2).save(path)
    again = SloControl("mean-tpot", increase=0.05)
    again.load(path)
    assert again.scale == found.scale < 0.5
    for stranger in (SloControl("mean-tpot", increase=0.1), SloControl("mean-tpot", seconds=0.05)):
        stranger.load(path)
        assert stranger.scale == 0.5, "another target"
    for text in ("", "[]", '{"version": 1}', '{"version": 1, "scales": {"mean-tpot +0.05": "?"}}'):
        path.write_text(text)
        again.load(path)
        assert again.scale == 0.5
    again.save(path)
    again.load(path)
    assert again.scale == 0.5


@pytest.mark.parametrize("metric", ["mean-ttft", "mean-tpot"])
def test_what_requests_would_have_felt_alone_is_what_they_feel_alone(metric: str) -> None:
    """Requests that queue and overlap, so that most of what they pay for offline rows is not in their own steps."""
    lived, shared = (Live(metric, 0.5, beside=beside) for beside in (False, True))
    alone, estimates = lived.run(), []
    observe = shared.control.observe
    shared.control.observe = lambda real, felt, delayed=True: (  # type: ignore[method-assign]
        estimates.append((real, felt)), observe(real, felt, delayed))[1]  # fmt: skip
    real = shared.run()
    late = estimates[250 - (len(shared.took) - len(estimates)) :]
    assert sum(felt for _, felt in late) / len(late) == pytest.approx(alone, rel=0.03)
    assert sum(took for took, _ in late) / len(late) == pytest.approx(real, rel=0.03)
    assert real > 1.15 * alone


def test_whoever_ends_before_its_first_token_keeps_nobody_waiting() -> None:
    step_time = StepTime()
    for number in range(100):
        step_time.observe(Load().plus(0, 1 + number % 7), 0.01)
    alone = Alone(step_time, 64)
    for number in range(3):
        alone.arrived(str(number), 0.0, 10)
    assert list(alone.catch_up(10.0)) == [], "nothing is known of what they computed"
    alone.ended("0")
    for name in ("1", "2", "2"):
        alone.token(name, 0)
    alone.ended("1")
    found = [(felt.id, felt.what) for felt in alone.catch_up(10.0)]
    assert found == [("1", "ttft"), ("2", "ttft")]
    assert list(alone.catch_up(10.0)) == [], "who knows whether request 2 has a third token"
    alone.token("2", 0)
    alone.ended("2")
    assert [(felt.id, felt.what) for felt in alone.catch_up(10.0)] == [("2", "tpot")]


def test_delays_can_be_read_at_any_moment_of_the_latest_step() -> None:
    delays = Delays()
    delays.ran(0.0, 10.0, 0.5)
    assert [delays.at(moment) for moment in (0.0, 4.0, 10.0, 12.0)] == [0.0, 2.0, 5.0, 5.0]
    delays.ran(12.0, 14.0, 1.0)
    assert [delays.at(moment) for moment in (13.0, 14.0)] == [6.0, 7.0]


def test_a_request_is_told_what_of_its_time_was_offline_work() -> None:
    """It comes in the middle of an offline step of 12 ms that does not stop, then decodes alone in steps of 2 ms."""
    clock = ManualClock()
    runner = FakeRunner(page_size=16, cost=StepCost(2e-3, 1e-3, 0.0), clock=clock)
    scheduler = Scheduler(
        KVManager(PagePool(1, 100), 16), OnlineFirst(), clock, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=200
    )
    core = EngineCore(scheduler, runner)
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)
    core.submit(Submit(id="job", tenant=Tenant.OFFLINE, prompt=tuple(range(10)), params=params, seed=0))
    core.step()
    step = clock.now()
    core.submit(Submit(id="person", tenant=Tenant.ONLINE, prompt=(1, 2, 3), params=params, seed=0), arrival=step / 4)
    outs = []
    while scheduler.unfinished(Tenant.ONLINE):
        outs += core.step()
    assert [out.id for out in outs] == ["person"] * 3
    assert outs[0].delayed == pytest.approx(step * 3 / 4), "from its arrival on, and not before"
    assert outs[-1].delayed == outs[0].delayed, "its own steps are its own"


class Live:
    """A core with online requests that come all the time, with or without plenty of offline work."""

    def __init__(self, metric: str, tolerance: float, *, beside: bool) -> None:
        self.clock, self.metric, self.beside = ManualClock(), metric, beside
        runner = FakeRunner(page_size=16, cost=StepCost(20e-3, 1e-3, 0.0), clock=self.clock)
        self.control = control = SloControl(metric, increase=tolerance)
        self.scheduler = Scheduler(
            KVManager(PagePool(1, 4000), 16), SharedStep(increase=tolerance, control=control), self.clock,
            max_num_seqs=64, max_num_batched_tokens=128, max_model_len=2000,
        )  # fmt: skip
        self.core = EngineCore(self.scheduler, runner, interrupted=self.due)
        self.core.meter = OnlineMeter(control, self.scheduler.delays, self.scheduler.step_time, 128)
        self.rng = random.Random(1)
        draw = self.rng.randrange
        self.arrivals = [(n * 0.25 + self.rng.uniform(0, 0.1), draw(4, 40), draw(5, 20)) for n in range(500)]
        self.next = self.offline = 0
        self.first: dict[str, float] = {}
        self.took: list[float] = []

    def due(self) -> bool:
        return self.next < len(self.arrivals) and self.arrivals[self.next][0] <= self.clock.now()

    def submit(self, name: str, tenant: Tenant, prompt: int, output: int, at: float | None = None) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        tokens = tuple(self.rng.choices(range(99), k=prompt))
        self.core.submit(Submit(id=name, tenant=tenant, prompt=tokens, params=params, seed=0), at)

    def run(self) -> float:
        """The metric over the later requests, in seconds."""
        while self.next < len(self.arrivals) or self.scheduler.unfinished(Tenant.ONLINE):
            while self.due():
                at, prompt, output = self.arrivals[self.next]
                self.submit(str(self.next), Tenant.ONLINE, prompt, output, at)
                self.next += 1
            while self.beside and self.scheduler.unfinished(Tenant.OFFLINE) < 20:
                self.offline += 1
                self.submit(f"off {self.offline}", Tenant.OFFLINE, 100, 30)
            if not self.core.has_work:
                self.clock.advance_to(self.arrivals[self.next][0])
                continue
            for out in self.core.step():
                if out.id.isdecimal():
                    self.saw(out)
        late = sorted(self.took[250:])
        return sum(late) / len(late) if self.metric.startswith("mean") else late[-1 - len(late) // 100]

    def saw(self, out: TokenOut) -> None:
        at, _, output = self.arrivals[int(out.id)]
        now = self.clock.now()
        if out.id not in self.first:
            self.first[out.id] = now
            if self.metric.endswith("ttft"):
                self.took.append(now - at)
        if out.finish_reason is not None and self.metric.endswith("tpot"):
            self.took.append((now - self.first[out.id]) / (output - 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tolerance", [0.1, 0.3])
def test_a_live_core_keeps_the_tolerance_and_uses_it(metric: str, tolerance: float) -> None:
    alone, shared = (Live(metric, tolerance, beside=beside).run() for beside in (False, True))
    assert shared / alone - 1 <= tolerance * 1.1
    assert shared / alone - 1 >= tolerance * 0.3 or metric.startswith("p99"), "a tail is that of few requests"


def test_requests_are_compared_after_a_failed_step_as_before_it() -> None:
    live = Live("mean-tpot", 0.3, beside=True)
    launch, observe, runner, seen = live.core.runner.launch, live.control.observe, live.core.runner, []

    def launch_but_once(plan: StepPlan, *more: Any) -> Any:
        if live.next > 50 and any(row.tenant is Tenant.ONLINE for row in plan.rows):
            runner.launch = launch  # type: ignore[method-assign]
            raise RuntimeError("no such step today")
        return launch(plan, *more)

    runner.launch = launch_but_once  # type: ignore[method-assign]
    live.control.observe = lambda *felt: (seen.append(felt), observe(*felt))[1]  # type: ignore[method-assign]
    live.run()
    assert len(seen) > 400
