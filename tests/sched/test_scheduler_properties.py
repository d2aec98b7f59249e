"""Random lives of many requests on the fake runner: nothing leaks, nothing is scheduled wrong, outputs never depend on it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, expected_tokens
from engine.memory.host import HostTier
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool, PageState
from engine.sched.latency import Load, StepTime
from engine.sched.policies import POLICIES, make_policy
from engine.sched.scheduler import Scheduler
from engine.types import FinishReason, SamplingParams, Submit, Tenant

PAGE = 4
VOCAB = 50


def experienced() -> StepTime:
    """What it says after many steps, each of which took a fixed time and a little for each token."""
    step_time = StepTime()
    for step in range(64):
        tokens = 1 + step % 16
        step_time.observe(Load(tokens, tokens, 16 * tokens), 5e-3 + 1e-4 * tokens)
    return step_time


class Life(RuleBasedStateMachine):
    """Submit, abort, step, stop between layers, take slabs away and give them back, in any order.

    With a host tier copies come and go as well, at once or late. Whatever page is free is garbage.
    """

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slabs=st.integers(3, 8),
        seqs=st.integers(1, 5),
        batch=st.integers(1, 24),
        caching=st.booleans(),
        ahead=st.booleans(),
        prefix_order=st.booleans(),
        protected=st.integers(0, 3),  # what remains when one slab is away and the longest request has its pages
        slots=st.sampled_from([0, 1, 3, 8, 40]),
        warm=st.booleans(),
    )
    def build(
        self, policy: str, slabs: int, seqs: int, batch: int, caching: bool, ahead: bool, prefix_order: bool,
        protected: int, slots: int, warm: bool,
    ) -> None:  # fmt: skip
        clock = ManualClock()
        self.runner = FakeRunner(num_layers=3, vocab_size=VOCAB, page_size=PAGE, clock=clock, asynchronous=ahead)
        self.pool = PagePool(slabs, 3)
        self.longest = (slabs - 2) * 3 * PAGE  # one slab may be away and the request must still fit
        host = HostTier(slots) if slots else None
        kv = KVManager(self.pool, PAGE, prefix_caching=caching, protected=protected, host=host)
        self.scheduler = Scheduler(
            kv, make_policy(policy), clock, max_num_seqs=seqs, max_num_batched_tokens=batch, max_model_len=self.longest,
            max_alone_tokens=2 * batch, prefix_order=prefix_order,
            step_time=experienced() if warm else None,
        )  # fmt: skip
        self.copier = self.runner.copier(slots, 1e-6) if slots else None
        self.stop_at: int | None = None
        self.core = EngineCore(self.scheduler, self.runner, copier=self.copier)
        self.core.sync = self.sync
        self.core._stop = lambda layer: layer == self.stop_at  # type: ignore[method-assign]
        self.submits: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.live: set[str] = set()
        self.away: int | None = None
        self.taken: int | None = None  # a slab whose bytes are gone, and the scheduler does not know yet
        self.syncs = 0

    @rule(
        tenant=st.sampled_from(list(Tenant)),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        output=st.integers(1, 12),
        priority=st.integers(0, 2),
        stops=st.sampled_from([(), tuple(range(0, VOCAB, 6))]),
    )
    def submit(self, tenant: Tenant, prompt: list[int], output: int, priority: int, stops: tuple[int, ...]) -> None:
        prompt = prompt[: self.longest - 1]
        name = str(len(self.submits))
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0, stop_token_ids=stops)
        submit = Submit(id=name, tenant=tenant, prompt=tuple(prompt), params=params, seed=0, priority=priority)
        self.submits[name], self.outputs[name] = submit, []
        self.live.add(name)
        self.core.submit(submit)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        (out,) = self.core.abort(name)
        assert out.finish_reason is FinishReason.ABORT
        self.live.remove(name)

    @rule(stop_at=st.sampled_from([None, None, 1, 2]))
    def step(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.syncs = 0
        self.take(self.core.step())
        self.runner.poison([page for slab in range(self.pool.num_slabs) for page in self.pool.slab_pages(slab)
                            if self.pool.state(page) is PageState.FREE])  # fmt: skip

    @precondition(lambda self: self.copier is not None)
    @rule(hold=st.booleans())
    def slow_copies(self, hold: bool) -> None:
        self.copier.hold = hold

    @precondition(lambda self: self.away is None and self.taken is None)
    @rule(data=st.data())
    def take_slab_meanwhile(self, data: st.DataObject) -> None:
        """The bytes go after the next step's first look at its slabs."""
        self.taken = data.draw(st.integers(0, self.pool.num_slabs - 1))

    def sync(self) -> None:
        self.syncs += 1
        if self.taken is None:
            return
        if self.syncs == 1:
            self.runner.poison(self.pool.slab_pages(self.taken))
        else:
            self.away, self.taken = self.taken, None
            self.scheduler.lose_slab(self.away)

    @precondition(lambda self: self.away is None and self.taken is None)
    @rule(data=st.data())
    def lose_slab(self, data: st.DataObject) -> None:
        self.away = data.draw(st.integers(0, self.pool.num_slabs - 1))
        self.scheduler.lose_slab(self.away)
        self.runner.poison(self.pool.slab_pages(self.away))

    @precondition(lambda self: self.away is not None)
    @rule()
    def return_slab(self) -> None:
        self.scheduler.kv.add_slab(self.away)
        self.away = None

    def take(self, outs: list) -> None:
        for out in outs:
            assert out.error is None
            self.outputs[out.id].append(out.token)
            if out.finish_reason is not None:
                self.live.remove(out.id)
                submit = self.submits[out.id]
                room = min(submit.params.max_tokens, self.longest - len(submit.prompt))
                expected = expected_tokens(submit.prompt, room, VOCAB)
                ends = [place for place, token in enumerate(expected) if token in submit.params.stop_token_ids]
                assert self.outputs[out.id] == expected[: ends[0] + 1 if ends else room]
                assert out.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        """Whatever happened, everybody finishes, in bounded time, and every page comes back."""
        if not hasattr(self, "core"):
            return
        self.taken = None
        if self.copier is not None:
            self.copier.hold = False
        if self.away is not None:
            self.return_slab()
        self.stop_at = None
        for _ in range(4000):
            if not self.core.has_work:
                break
            self.take(self.core.step())
        assert not self.live
        self.scheduler.check()
        assert self.pool.num_used() == 0


Life.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLife = pytest.mark.timeout(240)(Life.TestCase)
