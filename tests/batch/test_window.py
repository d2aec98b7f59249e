"""How many lines a job keeps in flight, and that prompts which begin alike meet in so many."""

from __future__ import annotations

import random

import pytest

from engine.batch import window
from engine.clock import ManualClock
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.fake import FakeRunner
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.policies import make_policy
from engine.sched.scheduler import Scheduler
from engine.types import SamplingParams, Submit, Tenant


@pytest.mark.parametrize(
    ("running", "order", "lines"),
    [(1, "prefix", 8), (64, "prefix", 512), (1024, "prefix", 2048), (4096, "prefix", 8192), (64, "fcfs", 128)],
)
def test_enough_and_not_without_bound(running: int, order: str, lines: int) -> None:
    assert window(EngineConfig(max_num_seqs=running, offline_order=order)) == lines


def computed(in_flight: int, running: int) -> int:
    """Prompt tokens computed by a job of 24 groups of 8 shuffled lines that share 8 pages, with room for few of them."""
    rng, page, shared = random.Random(3), 4, 32
    heads = [[group] * shared for group in range(24)]
    prompts = [[*head, 100 + member] for head in heads for member in range(8)]
    rng.shuffle(prompts)
    scheduler = Scheduler(
        KVManager(PagePool(6, 8), page), make_policy("online-first"), ManualClock(),
        max_num_seqs=running, max_num_batched_tokens=64, max_model_len=64, prefix_order=True,
    )  # fmt: skip
    core = EngineCore(scheduler, FakeRunner(vocab_size=256, page_size=page))
    waiting = list(enumerate(prompts))
    while waiting or core.has_work:
        while waiting and scheduler.unfinished(Tenant.OFFLINE) < in_flight:
            number, prompt = waiting.pop()
            params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            core.submit(Submit(id=str(number), tenant=Tenant.OFFLINE, prompt=tuple(prompt), params=params, seed=0))
        core.step()
    return scheduler.counters[Tenant.OFFLINE].computed_tokens


def test_lines_that_begin_alike_meet() -> None:
    running = 4
    ample = window(EngineConfig(max_num_seqs=running))
    assert computed(ample, running) < 0.8 * computed(2 * running, running)
