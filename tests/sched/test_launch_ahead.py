"""Steps launched before the one before them was collected: only where the next step is certain, and nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, expected_tokens
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.plan import StepPlan
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.types import SamplingParams, Submit, Tenant, TokenOut

VOCAB = 50


class Watched(FakeRunner):
    """Remembers the plans it was given; the next launch fails if it is told so."""

    def __init__(self, **options: Any) -> None:
        super().__init__(num_layers=2, vocab_size=VOCAB, page_size=4, asynchronous=True, **options)
        self.plans: list[StepPlan] = []
        self.refuse_ahead = False

    def launch(self, plan: StepPlan, stop: Any = None, after: Any = None) -> Any:
        if plan.follows and self.refuse_ahead:
            raise RuntimeError("no launch ahead today")
        assert not plan.follows or all(len(row.tokens) == row.start for row in plan.rows), "the host knows these tokens"
        self.plans.append(plan)
        return super().launch(plan, stop, after)


def make_core(*, slabs: int = 8, seqs: int = 8, policy: str = "online-first", **options: Any) -> tuple[EngineCore, Watched]:
    clock = ManualClock()
    runner = Watched(clock=clock)
    kv = KVManager(PagePool(slabs, 4), 4, prefix_caching=True, protected=0)
    scheduler = Scheduler(kv, make_policy(policy), clock, max_num_seqs=seqs, max_num_batched_tokens=32, max_model_len=64)
    return EngineCore(scheduler, runner, **options), runner


def submit(core: EngineCore, name: str, prompt: Sequence[int], tenant: Tenant = Tenant.ONLINE, **params: Any) -> None:
    settings = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, "temperature": 0.0, **params})
    core.submit(Submit(id=name, tenant=tenant, prompt=tuple(prompt), params=settings, seed=0))


def finish(core: EngineCore) -> dict[str, list[int]]:
    """Run everything to its end: tokens by request."""
    outputs: dict[str, list[int]] = {}
    while core.has_work:
        note(core.step(), outputs)
    core.scheduler.check()
    assert core.scheduler.kv.pool.num_used() == 0
    return outputs


def note(outs: list[TokenOut], outputs: dict[str, list[int]]) -> None:
    for out in outs:
        assert out.error is None
        outputs.setdefault(out.id, []).append(out.token)


def test_decodes_run_ahead_and_say_the_same() -> None:
    core, runner = make_core()
    prompts = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8], "c": [9]}
    for name, prompt in prompts.items():
        submit(core, name, prompt, max_tokens=5 + len(prompt))

    outputs = finish(core)

    assert outputs == {name: expected_tokens(prompt, 5 + len(prompt), VOCAB) for name, prompt in prompts.items()}
    ahead = [plan for plan in runner.plans if plan.follows]
    assert len(ahead) == len(runner.plans) - 1, "all but the prompts"
    # Who reaches its length is left out: "c" is row 2 of its last step, and the others stay where they were.
    assert {plan.follows for plan in ahead} == {(0, 1, 2), (0, 1), (1,), (0,)}


def test_a_stop_that_is_seen_late_costs_one_token_and_no_more() -> None:
    core, runner = make_core()
    expected = expected_tokens([1, 2, 3], 8, VOCAB)
    end = expected.index(expected[3])
    submit(core, "a", [1, 2, 3], stop_token_ids=(expected[3],))
    submit(core, "b", [7, 7])

    outputs = finish(core)

    assert outputs == {"a": expected[: end + 1], "b": expected_tokens([7, 7], 8, VOCAB)}
    assert sum(row.request_id == "a" for plan in runner.plans for row in plan.rows) == end + 2


def test_nothing_is_in_flight_when_all_have_ended() -> None:
    core, runner = make_core()
    expected = expected_tokens([1, 2, 3], 8, VOCAB)
    submit(core, "a", [1, 2, 3], stop_token_ids=(expected[3],))
    finish(core)
    assert not runner._pending

    submit(core, "b", [5])
    core.step()
    assert runner._pending
    core.abort("b")
    assert not runner._pending and not core.has_work


def test_a_pause_ends_with_what_was_launched_ahead() -> None:
    core, runner = make_core()
    submit(core, "a", [1, 2, 3])
    outputs: dict[str, list[int]] = {}
    note(core.step(), outputs)
    assert runner._pending
    core.scheduler.paused = frozenset({Tenant.ONLINE})

    note(core.step(), outputs)

    assert not runner._pending and not core.has_work
    assert outputs == {"a": expected_tokens([1, 2, 3], 8, VOCAB)[:2]}
    core.scheduler.paused = frozenset()
    outputs["a"] += finish(core)["a"]
    assert outputs == {"a": expected_tokens([1, 2, 3], 8, VOCAB)}


def test_paused_online_work_keeps_offline_work_waiting() -> None:
    """It would lose its turn otherwise."""
    core, runner = make_core()
    submit(core, "on", [1, 2])
    submit(core, "off", [3, 4], Tenant.OFFLINE)
    core.scheduler.paused = frozenset({Tenant.ONLINE})
    assert core.has_work and core.step() == [] and core.stalled and not runner.plans
    core.scheduler.paused = frozenset({Tenant.OFFLINE})
    outputs: dict[str, list[int]] = {}
    while core.has_work:
        note(core.step(), outputs)
    assert outputs == {"on": expected_tokens([1, 2], 8, VOCAB)}
    core.scheduler.paused = frozenset()
    assert finish(core) == {"off": expected_tokens([3, 4], 8, VOCAB)}


def test_nothing_is_launched_ahead_of_an_arrival() -> None:
    at_the_door = False
    core, runner = make_core(interrupted=lambda: at_the_door)
    submit(core, "a", [1, 2, 3])
    core.step()
    assert len(runner._pending) == 1
    at_the_door = True
    core.step()
    assert not runner._pending

    at_the_door = False
    submit(core, "b", [4, 5])
    core.step()
    assert runner.plans[-1].follows and {row.request_id for row in runner.plans[-1].rows} == {"a", "b"}
    finish(core)


def test_who_waits_and_could_run_is_not_kept_waiting() -> None:
    core, runner = make_core()
    submit(core, "a", [1, 2, 3])
    core.step()  # the step after it is in flight
    submit(core, "b", [4, 5])
    core.step()
    assert not runner._pending, "the next step must take b in"
    core.step()
    assert [row.request_id for row in [plan for plan in runner.plans if not plan.follows][-1].rows] == ["a", "b"]
    finish(core)


def test_where_all_seats_are_taken_waiting_stops_nothing() -> None:
    core, runner = make_core(seqs=1)
    prompts = {"a": [1, 2, 3], "b": [4, 5]}
    for name, prompt in prompts.items():
        submit(core, name, prompt)

    assert finish(core) == {name: expected_tokens(prompt, 8, VOCAB) for name, prompt in prompts.items()}
    assert sum(bool(plan.follows) for plan in runner.plans) == 2 * 7


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_what_needs_the_last_token_on_the_host_waits_for_it(penalty: str) -> None:
    core, runner = make_core()
    submit(core, "a", [1, 2, 3], **{penalty: 1.1})
    finish(core)
    assert not any(plan.follows for plan in runner.plans)


def test_a_bad_word_of_several_tokens_waits_for_them_and_does_not_come() -> None:
    usual = expected_tokens([1, 2, 3], 8, VOCAB)
    outputs = []
    for launch_ahead in (True, False):
        core, runner = make_core(launch_ahead=launch_ahead)
        submit(core, "a", [1, 2, 3], bad_tokens=((usual[3], usual[4]),))
        outputs.append(finish(core)["a"])
        assert not any(plan.follows for plan in runner.plans)
    assert outputs[0] == outputs[1] and outputs[0][:4] == usual[:4] and outputs[0][4] != usual[4]


def test_offline_steps_are_not_launched_ahead() -> None:
    core, runner = make_core()
    submit(core, "a", [1, 2, 3], Tenant.OFFLINE)
    finish(core)
    assert not any(plan.follows for plan in runner.plans)


@pytest.mark.parametrize("policy", ["online-first", "shared-step", "fcfs"])
def test_offline_work_is_not_kept_from_its_turn(policy: str) -> None:
    core, runner = make_core(policy=policy)
    submit(core, "a", [1, 2, 3])
    submit(core, "off", [4, 5], Tenant.OFFLINE)

    assert finish(core) == {"a": expected_tokens([1, 2, 3], 8, VOCAB), "off": expected_tokens([4, 5], 8, VOCAB)}
    assert any(plan.follows for plan in runner.plans) == (policy == "online-first")


def test_without_room_for_another_page_the_scheduler_chooses_who_gives_way() -> None:
    core, runner = make_core(slabs=2)  # 8 pages of 4 tokens
    for name in "abc":
        submit(core, name, [ord(name) % 7] * 4, max_tokens=12)

    outputs = finish(core)

    assert outputs == {name: expected_tokens([ord(name) % 7] * 4, 12, VOCAB) for name in "abc"}
    assert any(plan.follows for plan in runner.plans)


def test_a_launch_ahead_that_fails_is_made_again_in_its_turn() -> None:
    core, runner = make_core()
    runner.refuse_ahead = True
    submit(core, "a", [1, 2, 3])
    assert finish(core) == {"a": expected_tokens([1, 2, 3], 8, VOCAB)}


def test_a_failed_step_takes_the_one_launched_after_it_along() -> None:
    core, runner = make_core()
    submit(core, "a", [1, 2, 3])
    core.step()
    collect, failing = runner.collect, True

    def collect_once(step: Any) -> Any:
        nonlocal failing
        result = collect(step)
        if failing:
            failing = False
            raise RuntimeError("device lost")
        return result

    runner.collect = collect_once  # type: ignore[method-assign]
    (out,) = core.step()
    assert out.error is not None and not runner._pending and not core.has_work
    submit(core, "b", [5, 6])
    assert finish(core) == {"b": expected_tokens([5, 6], 8, VOCAB)}
