"""The recorder: bounded, attributed by tokens, honest about time in which the worker stood still."""

from __future__ import annotations

import itertools
import threading

import msgspec
import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool, slab_use
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.timeline import Ring, Span, StepHistogram, Timeline, seconds_by_part
from engine.types import SamplingParams, Submit, Tenant


def make_core(policy: str = "fcfs", slabs: int = 4, clock: ManualClock | None = None) -> tuple[EngineCore, Timeline]:
    clock = clock or ManualClock()
    scheduler = Scheduler(
        KVManager(PagePool(slabs, 8), 16),
        make_policy(policy),
        clock,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=slabs * 128,
    )
    cost = StepCost(fixed=0.01, per_token=0.001)
    core = EngineCore(scheduler, FakeRunner(vocab_size=100, page_size=16, cost=cost, clock=clock))
    timeline = Timeline(clock)
    core.on_step = timeline.step
    return core, timeline


def submit(core: EngineCore, name: str, tenant: Tenant, prompt: int, output: int) -> None:
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0)
    core.submit(Submit(id=name, tenant=tenant, prompt=tuple(range(prompt)), params=params, seed=0))


def run(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def test_a_ring_keeps_the_last_and_numbers_all() -> None:
    ring: Ring[int] = Ring(4)
    assert ring.since() == ([], 0)
    for number in range(10):
        ring.append(number)
    assert ring.since() == ([6, 7, 8, 9], 10)
    assert ring.since(8) == ([8, 9], 10)
    assert ring.since(10) == ([], 10)
    assert ring.since(2) == ([6, 7, 8, 9], 10), "what is gone is left out"
    assert ring.since(11) == ring.since(-1) == ([6, 7, 8, 9], 10), "a number of another ring: everything"


def test_a_reader_never_sees_an_item_out_of_order() -> None:
    ring: Ring[int] = Ring(64)
    done = threading.Event()

    def write() -> None:
        for number in range(200_000):
            ring.append(number)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    cursor, seen = 0, 0
    while not done.is_set() or cursor < ring.count:
        items, cursor = ring.since(cursor)
        assert items == list(range(cursor - len(items), cursor))
        seen += len(items)
    writer.join()
    assert seen > 0


def test_steps_are_spans_by_phase_and_tenant() -> None:
    core, timeline = make_core()
    submit(core, "a", Tenant.ONLINE, 20, 3)
    run(core)
    submit(core, "b", Tenant.OFFLINE, 10, 2)
    run(core)
    spans, _ = timeline.steps.since()
    assert [span.parts for span in spans] == [(20, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 0, 10, 0), (0, 0, 0, 1)]
    assert [span.start for span in spans] == pytest.approx([0.0, 0.03, 0.041, 0.052, 0.072], abs=1e-4)
    assert all(later.start >= earlier.end - 1e-9 for earlier, later in itertools.pairwise(spans))
    assert timeline.seconds() == pytest.approx(
        {"online_prefill": 0.03, "online_decode": 0.022, "offline_prefill": 0.02, "offline_decode": 0.011},
        rel=1e-3,  # attention costs a little as well
    )


def test_a_mixed_step_is_one_span_whose_time_is_divided_by_tokens() -> None:
    core, timeline = make_core()
    submit(core, "a", Tenant.ONLINE, 30, 2)
    submit(core, "b", Tenant.OFFLINE, 10, 2)
    run(core)
    first, *_ = timeline.steps.since()[0]
    assert first.parts == (30, 0, 10, 0)
    assert seconds_by_part(first) == pytest.approx((0.0375, 0, 0.0125, 0), rel=1e-3)
    assert sum(timeline.seconds().values()) == pytest.approx(sum(span.seconds for span in timeline.steps.since()[0]))


def test_a_parked_step_is_cut_and_its_tokens_count_once() -> None:
    core, timeline = make_core("online-first")
    submit(core, "b", Tenant.OFFLINE, 40, 2)
    core.interrupted = lambda: True
    core.step()
    submit(core, "a", Tenant.ONLINE, 5, 1)
    core.interrupted = lambda: False
    run(core)
    spans, _ = timeline.steps.since()
    assert [span.cut for span in spans[:3]] == [True, False, False]
    whole = [span for span in spans if not span.cut]
    assert sum(span.offline_prefill for span in whole) == 40
    assert sum(timeline.step_tokens.counts) == len(whole)
    assert sum(timeline.parked_seconds.counts) == 1
    assert timeline.parked_seconds.total == pytest.approx(spans[2].start - spans[0].end)
    assert timeline.parked_seconds.total == pytest.approx(spans[1].seconds), "it stood while the arrival was served"


def test_tokens_computed_again_are_prefill() -> None:
    """A request that lost its pages computes its output again as well, many tokens at once."""
    core, timeline = make_core("online-first", slabs=1)
    submit(core, "b", Tenant.OFFLINE, 60, 40)
    while core.scheduler.counters[Tenant.OFFLINE].generated_tokens < 20:
        core.step()
    submit(core, "a", Tenant.ONLINE, 60, 5)
    run(core)
    counters = core.scheduler.counters[Tenant.OFFLINE]
    assert counters.preemptions == 1
    assert counters.lost_tokens == 79
    assert sum(sum(span.parts[2:]) for span in timeline.steps.since()[0]) == counters.computed_tokens


@pytest.mark.parametrize(
    "holds, pieces",
    [
        ([], [(1.0, 2.0)]),
        ([(0.0, 1.0)], [(1.0, 2.0)]),
        ([(2.0, 3.0)], [(1.0, 2.0)]),
        ([(1.2, 1.5)], [(1.0, 1.2), (1.5, 2.0)]),
        ([(0.5, 1.1), (1.2, 1.3), (1.9, 2.5)], [(1.1, 1.2), (1.3, 1.9)]),
        ([(0.5, 3.0)], []),
        ([(1.4, None)], [(1.0, 1.4)]),
    ],
)
def test_a_worker_computes_only_while_it_moves(
    holds: list[tuple[float, float | None]], pieces: list[tuple[float, float]]
) -> None:
    timeline = Timeline(ManualClock())
    for start, end in holds:
        timeline.switched(start, start)
        if end is not None:
            assert timeline.released(end) == pytest.approx(end - start)
    timeline.worker_steps([Span(1.0, 1.0, 0, 0, 0, 4, 4)])
    found = timeline.offline_steps.since()[0]
    assert [(span.start, span.end) for span in found] == [(pytest.approx(a), pytest.approx(b)) for a, b in pieces]
    assert sum(not span.cut for span in found) == bool(pieces)
    assert timeline.seconds()["offline_decode"] == pytest.approx(sum(b - a for a, b in pieces))


def test_released_without_a_hold_is_nothing() -> None:
    timeline = Timeline(ManualClock())
    assert timeline.released(5.0) == 0.0
    timeline.switched(6.0, 6.5)
    assert timeline.holds(9.0) == [(6.0, 9.0)]
    assert timeline.released(8.0) == 2.0
    assert timeline.released(9.0) == 0.0
    assert (sum(timeline.hold_seconds.counts), timeline.hold_seconds.total) == (1, 2.0)
    assert timeline.holds(9.0) == [(6.0, 8.0)]


def test_events_have_numbers_and_costs() -> None:
    clock = ManualClock(3.0)
    timeline = Timeline(clock)
    timeline.event("reclaim", "online needed 3 pages", slabs=2)
    events, number = timeline.events()
    assert (events[0].at, events[0].kind, events[0].cost, number) == (3.0, "reclaim", {"slabs": 2}, 1)
    assert timeline.events(number) == ([], 1)


def test_spans_cross_processes() -> None:
    span = Span(1.5, 0.25, 1, 2, 3, 4, 5, True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([span]), type=list[Span]) == [span]


def test_a_histogram_counts_every_value_once() -> None:
    histogram = StepHistogram((1, 10))
    for value in (0.5, 1, 5, 100):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 1, 1], 106.5)


def test_the_use_of_each_slab() -> None:
    pool = PagePool(2, 4)
    online, offline = pool.allocate(2, Tenant.ONLINE), pool.allocate(3, Tenant.OFFLINE)
    pool.release(online[:1], Tenant.ONLINE, keep=online)
    pool.release(offline[:1], Tenant.OFFLINE)
    found = [slab_use(pool, slab) for slab in range(2)]
    assert [tuple(use) for use in found] == [(None, 0.25, 0.25, 0.25), (None, 0.0, 0.25, 0.0)]
    assert [pool.slab_use(slab) for slab in range(2)] == [(1, 1, 1), (0, 1, 0)]
