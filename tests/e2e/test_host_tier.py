"""Greedy and seeded tokens with host copies of offline KV, on real kernels: whatever gives way comes back the same."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig, SamplingParams, Tenant
from engine.errors import InvalidConfig
from engine.memory.pages import PageState

PAGE = 3 * 2 * 16 * 2 * 16 * 4  # bytes: 3 layers, K and V, 16 tokens, 2 heads of 16, float32
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=40, temperature=0.9, seed=5, ignore_eos=True)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def cases(folder) -> list[tuple[list[int], SamplingParams, tuple[int, ...]]]:
    """Prompts, how they are sampled, and what an engine with room for all of them answers."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (5, 16, 33, 47, 64, 80, 90, 100)]
    params = [GREEDY, SEEDED] * 4
    with Engine(config=EngineConfig(model=str(folder), threads=1, kv_cache_memory=8 << 20), progress=False) as engine:
        results = [engine.submit(prompt, param).result(PATIENCE) for prompt, param in zip(prompts, params, strict=True)]
    return [(p, s, result.choices[0].tokens) for p, s, result in zip(prompts, params, results, strict=True)]


def engine_for(folder: Path, **options) -> Engine:
    """24 pages for all; what is free holds no numbers.

    It learns nothing of its steps, or it would see that tokens of so small a model are computed faster than copied.
    """
    options = {"kv_cache_memory": 24 * PAGE, "host_kv_memory": 400 * PAGE} | options
    config = EngineConfig(model=str(folder), threads=1, slab_size=PAGE, max_num_batched_tokens=64, **options)
    engine = Engine(config=config, progress=False)
    core, pool = engine._core, engine._core.scheduler.kv.pool
    window = core.runner.window.tensor.view(torch.float32).view(pool.num_slabs, -1)

    def spoil() -> None:
        free = [page for page in range(pool.num_slabs) if pool.state(page) in (PageState.FREE, PageState.ABSENT)]
        window[free] = float("nan")

    core.sync = spoil
    if config.sharing != "step":
        core.scheduler.step_time.steps = 0
        core.scheduler.learn = lambda plan, seconds: None  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="room-for-all-copies"),
        pytest.param({"host_kv_memory": 5 * PAGE}, id="room-for-few"),
        pytest.param({"enable_prefix_caching": False}, id="no-prefix-cache"),
        pytest.param({"sharing": "step"}, id="shared-step"),
    ],
)
def test_same_tokens_when_offline_work_gives_way_again_and_again(folder, cases, options):
    with engine_for(folder, **options) as engine:
        offline = [engine.submit(prompt, params, tenant="offline") for prompt, params, _ in cases]
        for _ in range(3):
            wait_for_offline_work(engine)
            online = [engine.submit(prompt, params) for prompt, params, _ in cases]  # they need all the memory there is
            for generation, (_, _, tokens) in zip(online, cases, strict=True):
                assert generation.result(PATIENCE).choices[0].tokens == tokens
        for generation, (_, _, tokens) in zip(offline, cases, strict=True):
            assert generation.result(PATIENCE).choices[0].tokens == tokens
        engine._core.scheduler.check()
        stats = engine.stats().tenants[Tenant.OFFLINE]
        assert stats.host is not None and stats.host.copied > 0
        assert any(generation.num_preemptions for generation in offline)
        if options.get("enable_prefix_caching") is False:  # where nothing is found in the window
            assert stats.host.restored > 0


def wait_for_offline_work(engine: Engine) -> None:
    """Until some offline request has run a little further, or all are over."""
    deadline = time.monotonic() + PATIENCE
    before = engine.stats().tenants[Tenant.OFFLINE].counters.generated_tokens
    while time.monotonic() < deadline:
        offline = engine.stats().tenants[Tenant.OFFLINE]
        if offline.counters.generated_tokens > before + 8 or not (offline.running + offline.waiting):
            return
        time.sleep(0.001)
    raise AssertionError("no progress")


def test_same_tokens_when_slabs_are_taken_and_passes_stop_between_layers(folder, cases):
    """Slabs go at the second look of a step, after copies were made of what was no longer there."""
    rng = random.Random(1)
    with engine_for(folder) as engine:
        core = engine._core
        scheduler, spoil = core.scheduler, core.sync
        window = core.runner.window.tensor.view(torch.float32).view(scheduler.kv.pool.num_slabs, -1)
        away: list[int] = []
        taken: list[int] = []

        def sync() -> None:
            if taken:
                scheduler.lose_slab(taken[0])
                away.append(taken.pop())
            elif away and rng.random() < 0.2:
                scheduler.kv.add_slab(away.pop())
            elif not away and rng.random() < 0.05:
                taken.append(rng.randrange(scheduler.kv.pool.num_slabs))
                window[taken[0]] = float("nan")
            spoil()

        core.sync = sync
        core._stop = lambda layer: layer == 1 + scheduler._step % 5
        offline = [engine.submit(prompt, params, tenant="offline") for prompt, params, _ in cases]
        leaving = [engine.submit(prompt, params, tenant="offline") for prompt, params, _ in cases[:4]]
        for generation in leaving:
            wait_for_offline_work(engine)
            generation.abort()
        for generation, (_, _, tokens) in zip(offline, cases, strict=True):
            assert generation.result(PATIENCE).choices[0].tokens == tokens
        stats = engine.stats().tenants[Tenant.OFFLINE]
        assert stats.host is not None and stats.host.restored > 0
        scheduler.check()


def test_a_store_smaller_than_a_page_is_refused(folder):
    with pytest.raises(InvalidConfig, match="--host-kv-memory"):
        Engine(config=EngineConfig(model=str(folder), threads=1, kv_cache_memory=8 << 20, host_kv_memory=100), progress=False)
