"""Rules that colocation rests on, each shown alone: what may happen late, twice or at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from colocation_cases import PATIENCE, eventually

from engine import SamplingParams, Tenant
from engine.clock import ManualClock
from engine.colocate.lending import SlabLender
from engine.generation import Generation
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.memory.reserve import Fixed
from engine.memory.slabs import SlabPool
from engine.memory.victims import Holdings, fifo
from engine.memory.window import HostWindow
from engine.sched.plan import RowResult, StepResult
from engine.sched.policies import OnlineFirst
from engine.sched.scheduler import Scheduler
from engine.types import FinishReason, Request, Submit, TokenLogprob, TokenOut

SLABS, SLAB_BYTES = 6, 4096


class SlowWindow(HostWindow):
    """Takes memory away only when the test lets it: a machine so busy that the puncher gets no time."""

    def __init__(self) -> None:
        super().__init__(SLABS, SLAB_BYTES)
        self.go_on = threading.Event()
        self.punched = 0

    def punch(self, slab: int) -> None:
        assert self.go_on.wait(PATIENCE)
        super().punch(slab)
        self.punched += 1


class Lending:
    def __init__(self, headroom: int) -> None:
        self.clock = ManualClock()
        self.slabs = SlabPool(SLABS)
        self.window, self.victim = HostWindow(SLABS, SLAB_BYTES), SlowWindow()
        self.kv = KVManager(PagePool(SLABS, 2, ()), 4)
        self.lender = SlabLender(
            self.slabs, self.kv, self.window, self.victim.punch, self.clock,
            reserve=Fixed(headroom), victims=fifo, holdings=Holdings, cache_slabs=0,
        )  # fmt: skip
        self.kv.lender = self.lender

    def close(self) -> None:
        self.victim.go_on.set()
        self.lender.close()
        self.window.close()
        self.victim.close()


@pytest.fixture
def lending() -> Iterator[Lending]:
    made = Lending(headroom=0)
    yield made
    made.close()


def request(name: str, length: int, tenant: Tenant = Tenant.ONLINE) -> Request:
    params = SamplingParams()
    return Request(
        id=name, tenant=tenant, tokens=list(range(length)), num_prompt=length, params=params, seed=0, stop_ids=frozenset(),
        max_len=100, arrival=0.0,
    )  # fmt: skip


def test_a_slab_that_was_handed_back_keeps_what_its_owner_writes(lending: Lending) -> None:
    """Three slabs are taken and handed back before the puncher has got through one of them."""
    taker = request("a", 20)
    assert lending.kv.admit(taker, 20, [])
    assert lending.slabs.count(Tenant.ONLINE) == 3
    lending.kv.release(taker)
    lending.clock.advance(2.0)
    giver = threading.Thread(target=lending.lender.settle)
    giver.start()
    giver.join(0.2)  # it must wait for the punch that has begun
    if giver.is_alive():
        lending.victim.go_on.set()
        giver.join(PATIENCE)
    assert lending.slabs.count(Tenant.ONLINE) == 0
    lending.victim.tensor[:] = 7  # the worker's, again

    lending.victim.go_on.set()
    lending.lender.close()

    assert bool((lending.victim.tensor == 7).all())


def test_headroom_is_kept_in_slabs_of_cached_prefixes_too() -> None:
    lending = Lending(headroom=2)
    try:
        lending.victim.go_on.set()
        taker = request("a", 40)
        assert lending.kv.admit(taker, 40, [])
        taker.num_computed = 40
        lending.kv.commit(taker)
        lending.kv.release(taker)
        assert lending.kv.pool.num_cached == 10
        lending.clock.advance(2.0)
        lending.lender.settle()
        assert lending.slabs.count(Tenant.ONLINE) == 2
    finally:
        lending.close()


def test_offline_work_of_the_online_model_borrows_only_when_alone(lending: Lending) -> None:
    lending.victim.go_on.set()
    first, second = request("a", 8, Tenant.OFFLINE), request("b", 8, Tenant.OFFLINE)
    assert lending.kv.admit(first, 8, [])
    assert not lending.kv.admit(second, 8, [])
    assert lending.kv.grow(first, 16)
    lending.kv.release(first)
    assert lending.kv.admit(second, 8, [])


def test_prompt_logprobs_of_a_request_that_lost_its_pages_in_mid_prompt() -> None:
    kv = KVManager(PagePool(8, 1), 4)
    scheduler = Scheduler(kv, OnlineFirst(), ManualClock(), max_num_seqs=4, max_num_batched_tokens=4, max_model_len=32)
    scheduler.add(
        Submit(id="a", tenant=Tenant.OFFLINE, prompt=tuple(range(10)), params=SamplingParams(prompt_logprobs=0), seed=0)
    )
    outs: list[TokenOut] = []
    for step in range(8):
        plan = scheduler.schedule()
        assert plan is not None
        row = plan.rows[0]
        targets = row.tokens[row.start + 1 : min(row.end, row.num_prompt - 1) + 1]
        entries = tuple(TokenLogprob(token, -1.0, 1) for token in targets)
        result = RowResult(row.request_id, 5 if row.sample else None, None, entries)
        outs += scheduler.update(plan, StepResult((result,), 0.0))
        if step == 1:
            slab = row.pages[0]
            assert scheduler.lose_slab(slab)
            kv.add_slab(slab)
        if outs:
            break
    logprobs = outs[0].prompt_logprobs
    assert logprobs is not None
    assert [entry and entry.token for entry in logprobs] == [None, *range(1, 10)]


class SlowText:
    """A detokenizer that is interrupted in the middle of a token."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def push(self, token: int) -> str:
        self.entered.set()
        assert self.go_on.wait(PATIENCE)
        return "x"

    def flush(self) -> str:
        return ""


def test_an_abort_while_a_token_becomes_text_is_the_end() -> None:
    """The token comes from the worker's reader, the abort's answer from whoever aborts."""
    text = SlowText()
    generation = Generation(
        request_id="a", model="m", tenant=Tenant.OFFLINE, prompt_tokens=(1,), params=SamplingParams(),
        make_detokenizer=lambda: text, abort=lambda index: None,
    )  # fmt: skip
    token = threading.Thread(target=generation.push, args=(0, TokenOut(id="a.0", token=7)))
    abort = threading.Thread(target=generation.push, args=(0, TokenOut(id="a.0", finish_reason=FinishReason.ABORT)))
    token.start()
    assert text.entered.wait(PATIENCE)
    abort.start()
    eventually(lambda: abort.is_alive() or generation.finished, "the abort")
    text.go_on.set()
    token.join()
    abort.join()

    (choice,) = generation.result(PATIENCE).choices
    assert choice.finish_reason is FinishReason.ABORT
    assert choice.tokens in ((), (7,))
    assert choice.text == "x" * len(choice.tokens)
