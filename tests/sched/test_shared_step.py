"""Step times are learned, and offline rows ride in online steps only as far as the target allows."""

from __future__ import annotations

import random
import statistics

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost, expected_tokens
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.latency import Load, StepTime
from engine.sched.plan import StepPlan, StepResult
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.types import SamplingParams, Submit, Tenant

COST = StepCost(fixed=20e-3, per_token=1e-3, per_context=2e-6)


class Bench:
    """A core on a manual clock whose steps are recorded."""

    def __init__(self, policy: str, **targets: float) -> None:
        self.clock = ManualClock()
        self.runner = FakeRunner(page_size=16, cost=COST, clock=self.clock)
        kv = KVManager(PagePool(1, 4000), 16)
        self.scheduler = Scheduler(
            kv, make_policy(policy, **targets), self.clock, max_num_seqs=64, max_num_batched_tokens=256, max_model_len=2000
        )
        self.core = EngineCore(self.scheduler, self.runner)
        self.core.on_step = lambda plan, result: self.steps.append((plan, result))
        self.steps: list[tuple[StepPlan, StepResult]] = []
        self.outputs: dict[str, list[int]] = {}

    def submit(self, name: str, tenant: Tenant, prompt: int, output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        self.core.submit(Submit(id=name, tenant=tenant, prompt=(1,) * prompt, params=params, seed=0))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for out in self.core.step():
                self.outputs.setdefault(out.id, []).append(out.token)

    def learn(self) -> None:
        """Steps of all kinds, so that the model of step times is ready."""
        rng = random.Random(0)
        for number in range(40):
            self.submit(f"learn {number}", Tenant.OFFLINE, rng.randrange(1, 300), rng.randrange(1, 20))
            self.run(3)
        while self.core.has_work:
            self.run(1)
        self.steps.clear()


def mixed(steps: list[tuple[StepPlan, StepResult]]) -> list[tuple[int, float]]:
    """Offline tokens and seconds of the steps with online rows."""
    found = []
    for plan, result in steps:
        tenants = {row.tenant for row in plan.rows}
        if Tenant.ONLINE in tenants:
            found.append((sum(row.count for row in plan.rows if row.tenant is Tenant.OFFLINE), result.seconds))
    return found


def beside_online(policy: str, **targets: float) -> Bench:
    """40 steps with 4 online requests that decode, and plenty of offline work."""
    bench = Bench(policy, **targets)
    bench.learn()
    for number in range(4):
        bench.submit(f"on {number}", Tenant.ONLINE, 50, 60)
    for number in range(30):
        bench.submit(f"off {number}", Tenant.OFFLINE, 200, 100)
    bench.run(60)
    return bench


@pytest.mark.parametrize("target", [30e-3, 45e-3, 80e-3])
def test_steps_stay_within_the_target_and_use_it(target: float) -> None:
    steps = mixed(beside_online("shared-step", tpot=target).steps)[5:]
    assert max(seconds for _, seconds in steps) <= target * 1.05
    assert statistics.median(seconds for _, seconds in steps) >= target * 0.85
    assert all(tokens > 0 for tokens, _ in steps)


@pytest.mark.parametrize("increase", [0.1, 0.5])
def test_steps_get_longer_by_no_more_than_the_tolerance(increase: float) -> None:
    alone = statistics.median(seconds for _, seconds in mixed(beside_online("online-first").steps)[5:])
    shared = statistics.median(seconds for _, seconds in mixed(beside_online("shared-step", increase=increase).steps)[5:])
    assert alone < shared <= alone * (1 + increase) * 1.05


def test_online_first_lets_nobody_ride_along() -> None:
    assert all(tokens == 0 for tokens, _ in mixed(beside_online("online-first").steps))


def test_nobody_rides_before_step_times_are_known() -> None:
    bench = Bench("shared-step", tpot=1.0)
    bench.submit("on", Tenant.ONLINE, 10, 20)
    bench.submit("off", Tenant.OFFLINE, 10, 20)
    bench.run(10)
    assert all(tokens == 0 for tokens, _ in mixed(bench.steps))


def test_outputs_are_the_same_under_every_policy() -> None:
    for policy in ("online-first", "shared-step", "fcfs"):
        bench = beside_online(policy)
        while bench.core.has_work:
            bench.run(1)
        assert bench.outputs["on 0"] == expected_tokens([1] * 50, 60, 1000)
        assert bench.outputs["off 29"] == expected_tokens([1] * 200, 100, 1000)


def test_held_out_steps_are_predicted_within_a_few_percent() -> None:
    """With 5 % of noise and a disturbed step now and then; the error counts what it could not have known."""
    rng = random.Random(1)
    model = StepTime()

    def draw() -> tuple[Load, float]:
        load = Load()
        for _ in range(rng.randrange(1, 32)):
            load = load.plus(rng.randrange(1000), 1)
        if rng.random() < 0.4:
            load = load.plus(rng.randrange(500), rng.randrange(2, 256))
        true = 8e-3 + 2e-3 * load.few / 16 + 2e-4 * load.tokens + 3e-7 * load.decode_context + 1e-8 * load.chunk_attention
        return load, true

    for _ in range(800):
        load, true = draw()
        model.observe(load, true * rng.uniform(0.95, 1.05) * (10 if rng.random() < 0.02 else 1))
    errors = [abs(model.predict(load) - true) / true for load, true in (draw() for _ in range(200))]
    assert statistics.mean(errors) < 0.05
    assert 0.01 < model.error < 0.3


def test_what_rows_add_to_a_large_step_is_without_what_every_step_costs() -> None:
    model, rng = StepTime(), random.Random(0)
    for _ in range(400):
        load = Load()
        for _ in range(rng.randrange(1, 60)):
            load = load.plus(rng.randrange(1000), 1)
        model.observe(load, 8e-3 + 2e-3 * load.few / 16 + 2e-4 * load.tokens + 3e-7 * load.decode_context)
    assert model.added(Load().plus(499, 1)) == pytest.approx(2e-4 + 3e-7 * 500, rel=0.05)
    large = Load(tokens=40, few=16, decode_context=20_000)
    assert model.added(large.plus(499, 1)) - model.added(large) == pytest.approx(model.added(Load().plus(499, 1)))
    assert model.added(Load()) == 0


def test_what_was_learned_outlives_the_process(tmp_path) -> None:
    model = StepTime()
    for tokens in range(1, 60):
        model.observe(Load().plus(0, tokens), 0.01 + tokens * 1e-3)
    model.save(tmp_path / "deep" / "model.json")
    again = StepTime.load(tmp_path / "deep" / "model.json")
    assert again.ready
    assert again.predict(Load().plus(0, 30)) == pytest.approx(model.predict(Load().plus(0, 30)))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weights": [1], "spread": [[1]], "typical": 0, "steps": 99}', "\0"])
def test_a_file_that_does_not_fit_is_ignored(tmp_path, text: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    assert not StepTime.load(path).ready
    assert not StepTime.load(tmp_path / "none.json").ready
