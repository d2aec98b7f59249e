"""Several passes parked between layers: who goes on first, what they may hold, who leaves them; outputs never depend on it."""

from __future__ import annotations

import random

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, expected_tokens
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.parked import ParkedPasses
from engine.sched.plan import StepPlan, StepResult
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.types import SamplingParams, Submit, Tenant

PAGE, VOCAB = 4, 50


class Desk:
    """A core whose passes stop before layer `stop_at`, and what its steps were."""

    def __init__(self, policy: str = "online-first", *, batch: int = 16, limit: int = 64, pages: int = 60) -> None:
        clock = ManualClock()
        self.runner = FakeRunner(num_layers=4, vocab_size=VOCAB, page_size=PAGE, clock=clock)
        self.pool = PagePool(pages // 3, 3)
        self.scheduler = Scheduler(
            KVManager(self.pool, PAGE), make_policy(policy), clock,
            max_num_seqs=16, max_num_batched_tokens=batch, max_model_len=60, max_parked_tokens=limit,
        )  # fmt: skip
        self.core = EngineCore(self.scheduler, self.runner)
        self.stop_at: int | None = None
        self.core._stop = lambda layer: layer == self.stop_at  # type: ignore[method-assign]
        self.plans: list[StepPlan] = []
        self.core.on_step = self._saw
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, list[int]] = {}

    def _saw(self, plan: StepPlan, result: StepResult) -> None:
        self.plans.append(plan)

    def submit(self, name: str, tenant: Tenant, length: int = 6, output: int = 4, priority: int = 0) -> None:
        prompt = tuple(random.Random(name).choices(range(VOCAB), k=length))
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        self.prompts[name], self.outputs[name] = prompt, []
        self.core.submit(Submit(id=name, tenant=tenant, prompt=prompt, params=params, seed=0, priority=priority))

    def step(self, stop_at: int | None = None) -> set[str]:
        """Run one step; returns who was in it."""
        self.stop_at = stop_at
        for out in self.core.step():
            self.outputs[out.id].append(out.token)
        self.scheduler.check()
        return {row.request_id for row in self.plans[-1].rows}

    def finish(self) -> None:
        while self.core.has_work:
            self.step()
        for name, prompt in self.prompts.items():
            assert self.outputs[name] == expected_tokens(prompt, len(self.outputs[name]), VOCAB), name
            assert len(self.outputs[name]) == 4
        assert self.pool.num_used() == 0


def two_parked(**options: int) -> Desk:
    """A pass of ordinary work is parked, then one of urgent work beside it."""
    desk = Desk(**options)
    desk.submit("ordinary", Tenant.OFFLINE, priority=1)
    assert desk.step(stop_at=1) == {"ordinary"}
    desk.submit("urgent", Tenant.OFFLINE, priority=0)
    assert desk.step(stop_at=2) == {"urgent"}
    return desk


def test_work_of_a_higher_priority_does_not_wait_behind_a_parked_pass() -> None:
    desk = two_parked()
    assert len(desk.scheduler.parked) == 2
    assert desk.step() == {"urgent"}  # which was parked later, and goes on first
    assert len(desk.scheduler.parked) == 1
    desk.finish()


def test_work_of_the_same_priority_waits_until_the_parked_pass_is_done() -> None:
    desk = Desk()
    desk.submit("first", Tenant.OFFLINE)
    desk.step(stop_at=1)
    desk.submit("second", Tenant.OFFLINE)
    assert desk.step() == {"first"}
    desk.finish()


def test_parked_passes_hold_no_more_tokens_than_allowed() -> None:
    desk = Desk(batch=16, limit=20)
    desk.submit("ordinary", Tenant.OFFLINE, length=14, priority=1)
    desk.step(stop_at=1)
    desk.submit("urgent", Tenant.OFFLINE, length=12, priority=0)
    assert desk.step(stop_at=2) == {"urgent"}
    assert [plan.num_tokens for plan in desk.plans] == [14, 6]
    desk.submit("most urgent", Tenant.OFFLINE, length=5, priority=-1)
    assert desk.step() == {"urgent"}  # there is no room to park a third
    desk.finish()


def test_online_steps_come_first_and_are_never_parked() -> None:
    desk = two_parked()
    desk.submit("online", Tenant.ONLINE)
    while desk.scheduler.unfinished(Tenant.ONLINE):
        assert desk.step(stop_at=1) == {"online"}
        assert len(desk.scheduler.parked) == 2
    assert not any(plan.preemptible for plan in desk.plans if any(row.tenant is Tenant.ONLINE for row in plan.rows))
    desk.finish()


def test_who_is_aborted_leaves_its_pass() -> None:
    desk = two_parked()
    desk.core.abort("urgent")
    del desk.prompts["urgent"]
    assert len(desk.scheduler.parked) == 1
    assert desk.step() == {"ordinary"}
    desk.finish()


def test_who_loses_pages_leaves_its_pass_and_is_computed_again() -> None:
    desk = two_parked()
    pages = next(request.pages for request in desk.scheduler.kv.holders() if request.id == "urgent")
    slab = pages[0] // 3
    lost = desk.scheduler.lose_slab(slab)
    desk.runner.poison(desk.pool.slab_pages(slab))
    assert "urgent" in {request.id for request in lost}
    assert len(desk.scheduler.parked) < 2
    desk.scheduler.kv.add_slab(slab)
    desk.finish()


@pytest.mark.parametrize("policy", ["online-first", "shared-step"])
@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_the_same_with_passes_stopped_everywhere(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    desk = Desk(policy, limit=rng.choice([16, 40, 200]), pages=rng.choice([24, 60]))
    most = 0
    for number in range(30):
        tenant = rng.choice([Tenant.ONLINE, Tenant.OFFLINE, Tenant.OFFLINE])
        desk.submit(f"{seed}.{number}", tenant, rng.randrange(1, 30), priority=rng.randrange(4))
        for _ in range(rng.randrange(4)):
            desk.step(stop_at=rng.choice([None, 1, 2, 3]))
            most = max(most, len(desk.scheduler.parked))
    desk.finish()
    assert most >= 1


def test_an_empty_desk_has_nothing_parked() -> None:
    parked = ParkedPasses(100)
    assert parked.take() is None and parked.next is None and parked.room == 100 and not parked.outranked_by(None)
