"""When a pass of offline rows makes way: by the time to first token, at the next layer, and never for nothing."""

from __future__ import annotations

import random

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost, expected_tokens
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.latency import Load, StepTime
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.sched.stopping import StopRule, Waiting
from engine.types import SamplingParams, Submit, Tenant

LAYERS, LAYER_SECONDS = 10, 0.1


def known_times() -> StepTime:
    """10 ms a token."""
    model = StepTime()
    rng = random.Random(0)
    for _ in range(200):
        tokens = rng.randrange(1, 64)
        model.observe(Load().plus(rng.randrange(500), tokens), 0.01 * tokens)
    return model


class Pass:
    """A pass of ten layers of 0.1 s each, with requests that come while it runs."""

    def __init__(self, ttft: float | None, step_time: StepTime | None = None) -> None:
        self.clock = ManualClock()
        self.rule = StopRule(step_time or known_times(), self.clock, num_layers=LAYERS, max_tokens=64, ttft=ttft)
        self.door: list[Waiting] = []

    def comes(self, tokens: int) -> None:
        self.door.append(Waiting(tokens, self.clock.now(), self.rule.layer))

    def run(self, arrivals: dict[int, list[int]], first: int = 0) -> int | None:
        """Prompt lengths by the layer in which they come -> the layer before which the pass stopped."""
        self.rule.begin(first)
        for layer in range(first, LAYERS):
            self.rule.layer = layer
            for tokens in arrivals.get(layer, ()):
                self.comes(tokens)
            self.clock.advance(LAYER_SECONDS)
            if layer + 1 < LAYERS and self.door and self.rule.stops(layer + 1, self.door):
                return layer + 1
        return None


@pytest.mark.parametrize("step_time", [known_times(), StepTime()])
def test_without_a_target_an_arrival_stops_the_pass_at_the_next_layer(step_time: StepTime) -> None:
    offline = Pass(None, step_time)
    assert offline.run({3: [8]}) == 4
    assert offline.rule.responses.counts[0] == offline.rule.responses.total == 1


def test_without_a_model_of_step_times_nobody_waits() -> None:
    assert Pass(100.0, StepTime()).run({3: [8]}) == 4


def test_who_has_time_lets_the_pass_finish() -> None:
    """From layer 3: 0.7 s of layers and 0.08 s of prefill."""
    assert Pass(1.0).run({3: [8]}) is None
    assert Pass(0.6).run({3: [8]}) == 4


def test_a_long_prompt_has_less_time() -> None:
    assert Pass(1.0).run({3: [50]}) == 4


def test_prompts_ahead_count() -> None:
    assert Pass(1.0).run({3: [8]}) is None
    assert Pass(1.0).run({3: [8], 5: [50, 30]}) == 6  # the last of three would wait for 0.5 + 0.88 s


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    offline = Pass(3.3)
    assert offline.run({2: [220]}) is None  # 2.2 s, in four steps
    assert Pass(2.5).run({2: [220]}) == 3


def test_a_pass_that_turns_out_slow_stops_after_all() -> None:
    offline = Pass(1.0)
    offline.rule.begin(0)
    offline.rule.layer = 5
    offline.clock.advance(0.5)
    offline.comes(8)
    assert not offline.rule.stops(6, offline.door)
    offline.clock.advance(0.8)  # others took the machine: 0.2 s a layer by now, and four to go
    assert offline.rule.stops(7, offline.door)
    assert offline.rule.responses.total == 1  # from layer 6, where it could still wait


def test_layers_are_counted_from_the_arrival() -> None:
    offline = Pass(None)
    offline.rule.begin(0)
    offline.rule.layer = 2
    offline.comes(8)
    assert offline.rule.stops(5, offline.door)  # a device that was three layers ahead
    assert offline.rule.responses.total == 3


def test_who_came_before_the_pass_began_counts_from_its_first_layer() -> None:
    offline = Pass(None)
    offline.rule.layer = 9
    offline.comes(8)
    offline.clock.advance(1.0)
    assert offline.run({}, first=4) == 5
    assert offline.rule.responses.total == 1


def test_another_reason_to_stop_needs_no_request() -> None:
    offline = Pass(5.0)
    offline.rule.begin(0)
    assert offline.rule.stops(1, ())
    assert offline.rule.responses.total == 0


# -- layers of a parked pass in what shared steps leave over


class Shared:
    """A core on a manual clock with a parked pass and online requests that decode."""

    def __init__(self, **targets: float) -> None:
        self.clock = ManualClock()
        runner = FakeRunner(num_layers=LAYERS, page_size=16, cost=StepCost(20e-3, 1e-3, 0.0), clock=self.clock)
        self.scheduler = Scheduler(
            KVManager(PagePool(1, 500), 16), make_policy("shared-step", **targets), self.clock,
            max_num_seqs=16, max_num_batched_tokens=128, max_model_len=2000,
        )  # fmt: skip
        self.core = EngineCore(self.scheduler, runner)
        self.outputs: dict[str, list[int]] = {}
        self.learn()
        self.core.interrupted = lambda: True
        self.submit("parked", Tenant.OFFLINE, 100, 3)
        self.step()
        assert len(self.scheduler.parked) == 1
        self.core.interrupted = lambda: False
        for number in range(3):
            self.submit(f"online {number}", Tenant.ONLINE, 10, 100)
        self.step()  # their prefill

    def submit(self, name: str, tenant: Tenant, prompt: int, output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        self.core.submit(Submit(id=name, tenant=tenant, prompt=(len(name),) * prompt, params=params, seed=0))

    def step(self) -> float:
        began = self.clock.now()
        for out in self.core.step():
            self.outputs.setdefault(out.id, []).append(out.token)
        return self.clock.now() - began

    def learn(self) -> None:
        rng = random.Random(0)
        for number in range(40):
            self.submit(f"learn {number}", Tenant.OFFLINE, rng.randrange(1, 300), rng.randrange(1, 20))
            self.step()
        while self.core.has_work:
            self.step()


@pytest.mark.parametrize("targets", [{"increase": 0.1}, {"increase": 0.5}, {"tpot": 30e-3}, {"tpot": 60e-3}], ids=str)
def test_a_parked_pass_goes_on_in_what_shared_steps_leave_over(targets: dict[str, float]) -> None:
    shared = Shared(**targets)
    alone = 23e-3
    allowed = targets.get("tpot", alone * (1 + targets.get("increase", 0.0)))
    layer = 0.12 / LAYERS
    times = []
    while shared.scheduler.parked:
        times.append(shared.step())
    assert sum(times) / len(times) <= allowed * 1.03
    assert max(times) <= allowed + layer
    assert shared.scheduler.unfinished(Tenant.ONLINE) == 3
    while shared.core.has_work:
        shared.step()
    assert shared.outputs["parked"] == expected_tokens((len("parked"),) * 100, 3, 1000)
    assert shared.outputs["online 0"] == expected_tokens((len("online 0"),) * 10, 100, 1000)


def test_an_arrival_keeps_the_parked_pass_where_it_is() -> None:
    shared = Shared(tpot=60e-3)
    shared.core.interrupted = lambda: True
    shared.step()
    assert len(shared.scheduler.parked) == 1


# -- larger steps while online is idle


def test_steps_without_online_rows_are_as_large_as_makes_them_faster() -> None:
    """A step costs 20 ms and 1 ms a token: 95 % of a thousand tokens per second at 380 tokens."""
    clock = ManualClock()
    runner = FakeRunner(page_size=16, cost=StepCost(20e-3, 1e-3, 0.0), clock=clock)
    scheduler = Scheduler(
        KVManager(PagePool(1, 2000), 16), make_policy("online-first"), clock,
        max_num_seqs=64, max_num_batched_tokens=64, max_model_len=4000, max_alone_tokens=1000,
    )  # fmt: skip
    core = EngineCore(scheduler, runner)
    sizes: list[tuple[bool, int]] = []
    core.on_step = lambda plan, result: sizes.append((plan.preemptible, plan.num_tokens))
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
    for number in range(20):
        core.submit(Submit(id=f"off {number}", tenant=Tenant.OFFLINE, prompt=(1,) * (50 * number + 1), params=params, seed=0))
    while core.has_work:
        core.step()
    core.submit(Submit(id="on", tenant=Tenant.ONLINE, prompt=(1,) * 900, params=params, seed=0))
    for number in range(4):
        core.submit(Submit(id=f"more {number}", tenant=Tenant.OFFLINE, prompt=(2,) * 900, params=params, seed=0))
    while core.has_work:
        core.step()
    assert max(size for alone, size in sizes if not alone) == 64
    assert 340 <= max(size for alone, size in sizes if alone) <= 420
