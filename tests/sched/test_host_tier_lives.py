"""The host tier under fire on the fake runner: whatever gives way, is taken, aborted or copied late, tokens stay the same."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost, expected_tokens
from engine.memory.host import HostTier
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool, PageState
from engine.sched.latency import Load, StepTime
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.types import SamplingParams, Submit, Tenant, TokenOut

PAGE, VOCAB, LAYERS = 4, 50, 3
ONLINE, OFFLINE = Tenant.ONLINE, Tenant.OFFLINE
CHEAPER_TOGETHER = StepCost(5e-3, 1e-4, 0.0)


def experienced(cost: StepCost) -> StepTime:
    """What it says after many steps of that cost."""
    step_time = StepTime()
    for step in range(256):
        tokens = 1 + step % 32
        step_time.observe(Load(tokens, min(tokens, 16), step * 37 % 200), cost.fixed + cost.per_token * tokens)
    return step_time


class Engine:
    """A core on the fake runner, in which every page that is free holds garbage."""

    def __init__(
        self, *, slabs: int, slots: int, policy: str = "online-first", seqs: int = 8, batch: int = 32, caching: bool = True,
        protected: int = 0, cost: StepCost | None = None, page_seconds: float = 1e-5, tpot: float | None = None,
    ) -> None:  # fmt: skip
        clock = ManualClock()
        self.runner = FakeRunner(num_layers=LAYERS, vocab_size=VOCAB, page_size=PAGE, clock=clock, cost=cost)
        self.pool = PagePool(slabs, 3)
        host = HostTier(slots) if slots else None
        self.kv = KVManager(self.pool, PAGE, prefix_caching=caching, protected=protected, host=host)
        self.longest = (slabs - 2) * 3 * PAGE
        self.scheduler = Scheduler(
            self.kv, make_policy(policy, tpot=tpot), clock, max_num_seqs=seqs, max_num_batched_tokens=batch,
            max_model_len=self.longest, step_time=cost and experienced(cost),
        )  # fmt: skip
        self.copier = self.runner.copier(slots, page_seconds) if slots else None
        self.core = EngineCore(self.scheduler, self.runner, copier=self.copier)
        self.submits: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.live: set[str] = set()
        self.peak_running = 0

    def submit(self, tenant: Tenant, prompt: list[int], output: int) -> str:
        name = str(len(self.submits))
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        self.submits[name] = Submit(id=name, tenant=tenant, prompt=tuple(prompt), params=params, seed=0)
        self.outputs[name] = []
        self.live.add(name)
        self.core.submit(self.submits[name])
        return name

    def step(self) -> list[TokenOut]:
        outs = self.core.step()
        for out in outs:
            assert out.error is None
            if out.token is not None:
                self.outputs[out.id].append(out.token)
            if out.finish_reason is not None:
                self.live.remove(out.id)
                submit = self.submits[out.id]
                room = min(submit.params.max_tokens or 0, self.longest - len(submit.prompt))
                assert self.outputs[out.id] == expected_tokens(submit.prompt, room, VOCAB), out.id
        self.spoil()
        self.scheduler.check()
        self.peak_running = max(self.peak_running, self.scheduler.num_running(OFFLINE))
        return outs

    def spoil(self) -> None:
        """What is nobody's any more is gone."""
        pages = range(self.pool.num_slabs * self.pool.pages_per_slab)
        self.runner.poison([page for page in pages if self.pool.state(page) in (PageState.FREE, PageState.ABSENT)])

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"not finished: {self.live}")

    @property
    def counters(self) -> Counter[str]:
        assert self.kv.copies is not None
        counters = self.kv.copies.counters
        return Counter(
            copied=counters.copied, restored=counters.restored, voided=counters.voided, evicted=self.kv.copies.tier.evictions
        )


def test_who_gave_way_goes_on_from_its_last_copied_page() -> None:
    engine = Engine(slabs=8, slots=40, caching=False)
    engine.submit(OFFLINE, list(range(18)), 30)
    for _ in range(10):
        engine.step()
    engine.submit(ONLINE, [1] * 68, 4)  # needs 18 of the 24 pages
    engine.run()

    offline = engine.scheduler.counters[OFFLINE]
    assert offline.preemptions == 1
    assert engine.counters["restored"] >= 6
    assert 0 < offline.recomputed_tokens < PAGE


@pytest.mark.parametrize("policy", ["online-first", "fcfs"])
def test_without_a_latency_target_nothing_is_copied_while_an_online_request_is_unfinished(policy: str) -> None:
    engine = Engine(slabs=16, slots=40, policy=policy, cost=CHEAPER_TOGETHER)
    engine.submit(ONLINE, [1] * 8, 60)
    engine.submit(OFFLINE, [2] * 16, 80)
    while engine.scheduler.unfinished(ONLINE):
        assert engine.counters["copied"] == 0
        engine.step()
    engine.run()
    assert engine.outputs["1"]


TARGET, PAGE_SECONDS = 10e-3, 2e-4


def beside(slots: int) -> Engine:
    """An online request that outlives the offline ones beside it, and one that takes a lot of their memory."""
    engine = Engine(
        slabs=16, slots=slots, policy="shared-step", caching=False, cost=CHEAPER_TOGETHER, tpot=TARGET,
        page_seconds=PAGE_SECONDS,
    )  # fmt: skip
    engine.submit(ONLINE, [1] * 4, 160)
    for index in range(2):
        engine.submit(OFFLINE, [index] * 20, 30)
    for _ in range(20):
        engine.step()
    engine.submit(ONLINE, [3] * 120, 4)  # 31 of 48 pages
    return engine


def test_within_a_latency_target_copies_are_made_beside_online_rows_and_steps_stay_within_it() -> None:
    engine = beside(slots=80)
    clock, ended = engine.scheduler.clock, 0.0
    assert engine.counters["copied"] > 0
    gaps = []
    while "0" in engine.live:
        if any(out.id == "0" for out in engine.step()):
            gaps.append(clock.now() - ended)
            ended = clock.now()
    assert max(gaps[1:]) <= TARGET * 1.01
    assert engine.scheduler.delays.total > 0  # told to those who waited


def test_who_gave_way_beside_online_rows_comes_back_from_its_copies_beside_them() -> None:
    recomputed = {}
    for slots in (0, 80):
        engine = beside(slots)
        while engine.scheduler.unfinished(OFFLINE):
            assert "0" in engine.live, "online load is steady"
            engine.step()
        offline = engine.scheduler.counters[OFFLINE]
        assert offline.preemptions > 0
        recomputed[slots] = offline.recomputed_tokens
    assert engine.counters["restored"] > 0
    assert recomputed[80] < PAGE * offline.preemptions <= recomputed[0]


def test_a_page_that_takes_longer_than_one_step_has_to_spare_is_copied_after_some_steps() -> None:
    engine = Engine(slabs=40, slots=40, policy="shared-step", cost=CHEAPER_TOGETHER, tpot=TARGET, page_seconds=1.2e-3)
    engine.submit(ONLINE, [1] * 4, 160)
    engine.submit(OFFLINE, [2] * 20, 120)
    copied = []
    for _ in range(100):
        engine.step()
        copied.append(engine.counters["copied"])
    grown = [later - earlier for earlier, later in pairwise(copied)]
    assert copied[-1] >= 20
    assert max(grown) == 1


def test_a_taken_slab_costs_its_requests_nothing_but_the_copies_back() -> None:
    engine = Engine(slabs=6, slots=40)
    engine.submit(OFFLINE, list(range(20)), 16)
    for _ in range(4):
        engine.step()
    (running,) = engine.kv.holders()
    assert running.num_computed - engine.kv.num_copied(running) < PAGE
    (hit,) = engine.scheduler.lose_slab(0)
    engine.spoil()
    assert hit is running
    engine.kv.add_slab(0)
    engine.run()
    assert engine.counters["restored"] >= 5
    assert engine.scheduler.counters[OFFLINE].recomputed_tokens < PAGE


def test_more_is_started_than_fits_at_its_end_where_a_turn_pays() -> None:
    """Requests that double in length: at their ends half of them fill the memory."""

    def run(slots: int, cost: StepCost) -> Engine:
        engine = Engine(slabs=24, slots=slots, seqs=32, batch=64, cost=cost)  # 72 pages
        for index in range(12):
            engine.submit(OFFLINE, [index] * 40, 80)  # 10 pages, 30 in the end
        engine.run()
        return engine

    alone, together = run(0, CHEAPER_TOGETHER), run(400, CHEAPER_TOGETHER)
    assert alone.scheduler.counters[OFFLINE].preemptions == 0
    assert together.peak_running > alone.peak_running
    assert together.scheduler.counters[OFFLINE].preemptions > 0
    assert together.scheduler.counters[OFFLINE].recomputed_tokens < 12 * PAGE


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("policy", ["online-first", "shared-step", "fcfs"])
def test_same_tokens_through_all_of_it(policy: str, caching: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(12):
        seen += one_life(seed, policy, caching)
    assert all(seen[name] for name in ("copied", "restored", "voided", "evicted")), seen


def one_life(seed: int, policy: str, caching: bool) -> Counter[str]:
    """A few hundred steps of bursts, aborts, parked passes, robberies announced and not, and copies that come late."""
    rng = random.Random(seed)
    slabs = rng.randint(4, 8)
    engine = Engine(
        slabs=slabs, slots=rng.choice([1, 4, 12, 200]), policy=policy, seqs=rng.randint(2, 8), batch=rng.randint(4, 40),
        caching=caching, protected=rng.randint(0, 3), cost=rng.choice([None, CHEAPER_TOGETHER]),
    )  # fmt: skip
    assert engine.copier is not None
    away: int | None = None
    taken: int | None = None
    stop_at: int | None = None
    engine.core._stop = lambda layer: layer == stop_at  # type: ignore[method-assign]
    looks = 0

    def sync() -> None:
        """A slab's bytes go after the first look of a step, and the second look shows it."""
        nonlocal away, taken, looks
        looks += 1
        if taken is not None and looks == 1:
            engine.runner.poison(engine.pool.slab_pages(taken))
        elif taken is not None:
            away, taken = taken, None
            engine.scheduler.lose_slab(away)

    engine.core.sync = sync
    for _ in range(250):
        if len(engine.live) < 8 and rng.random() < 0.3:
            prompt = [rng.randrange(2)] * rng.randint(1, 12) + [rng.randrange(9) for _ in range(rng.randint(0, 12))]
            engine.submit(OFFLINE, prompt[: engine.longest - 1], rng.randint(1, 30))
        if rng.random() < 0.06:
            engine.submit(ONLINE, [rng.randrange(9)] * rng.randint(1, engine.longest - 1), rng.randint(1, 4))
        if engine.live and rng.random() < 0.03:
            name = rng.choice(sorted(engine.live))
            engine.core.abort(name)
            engine.live.remove(name)
        if away is None and taken is None and rng.random() < 0.1:
            taken = rng.randrange(slabs)
        elif away is not None and rng.random() < 0.3:
            engine.kv.add_slab(away)
            away = None
        engine.copier.hold = rng.random() < 0.3
        stop_at = rng.choice([None, None, None, 1, 2])
        looks = 0
        engine.step()
    engine.copier.hold, stop_at, looks = False, None, 1
    sync()
    if away is not None:
        engine.kv.add_slab(away)
    engine.run()
    assert engine.pool.num_used() == 0
    return engine.counters
