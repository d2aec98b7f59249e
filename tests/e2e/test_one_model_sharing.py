"""One model for both tenants: the tokens are the same however its tenants share steps, in whatever order offline work goes."""

from __future__ import annotations

import random
import time

import pytest
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig, SamplingParams

PATIENCE = 60
COUNT = 10
PAGE = 3 * 2 * 16 * 2 * 16 * 4  # bytes


def params_of(number: int) -> SamplingParams:
    """Greedy and seeded in turn."""
    drawn = number % 2 == 1
    return SamplingParams(max_tokens=COUNT, temperature=0.9 if drawn else 0.0, seed=number if drawn else None, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Groups of prompts that begin alike, mixed."""
    rng = random.Random(3)
    heads = [[rng.randrange(256) for _ in range(36)] for _ in range(4)]
    made = [rng.choice(heads) + [rng.randrange(256) for _ in range(rng.randrange(1, 12))] for _ in range(40)]
    rng.shuffle(made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def engine_for(folder, **options) -> Engine:
    options = {"threads": 1, "kv_cache_memory": 4 << 20, "max_num_batched_tokens": 32} | options
    return Engine(config=EngineConfig(model=str(folder), **options), progress=False)


@pytest.fixture(scope="module")
def answers(folder) -> list[tuple[int, ...]]:
    with engine_for(folder, max_num_seqs=1, enable_prefix_caching=False, offline_order="fcfs") as engine:
        each = [params_of(number) for number in range(40)]
        return [done.choices[0].tokens for done in engine.generate(prompts(), each, progress=False)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="exclusive"),
        pytest.param({"offline_order": "fcfs"}, id="fcfs"),
        pytest.param({"sharing": "step", "slo_increase": 0.5}, id="step"),
        pytest.param({"sharing": "step", "tpot_slo_ms": 50.0, "slo_metric": "p99-tpot"}, id="step-tpot"),
        pytest.param({"sharing": "step", "ttft_slo_ms": 5.0, "slo_metric": "mean-ttft"}, id="step-ttft"),
        pytest.param({"sharing": "auto", "offline_max_batched_tokens": 200}, id="auto"),
        pytest.param({"sharing": "step", "max_num_seqs": 3, "max_num_batched_tokens": 8}, id="narrow"),
        pytest.param({"ttft_slo_ms": 10_000.0}, id="who-can-wait"),
    ],
)
def test_same_tokens_however_steps_are_shared(folder, answers, options):
    rng, made = random.Random(1), prompts()
    with engine_for(folder, **options) as engine:
        running = []
        for _ in range(2):
            for number, prompt in enumerate(made):
                tenant = "online" if number % 3 == 0 else "offline"
                priority = rng.randrange(3) if tenant == "offline" else 0
                running.append((number, engine.submit(prompt, params_of(number), tenant=tenant, priority=priority)))
                time.sleep(rng.choice([0.0, 0.0, 0.002]))
        for number, generation in running:
            assert generation.result(PATIENCE).choices[0].tokens == answers[number], number
        engine._core.scheduler.check()
        assert len(engine._core.scheduler.parked) == 0


def test_a_job_computes_shared_beginnings_once(folder):
    """With memory for few of them, in the order of arrival they are computed again and again."""
    computed = {}
    for order in ("fcfs", "prefix"):
        memory = {"kv_cache_memory": 9 * PAGE, "slab_size": PAGE, "max_model_len": 64}
        with engine_for(folder, offline_order=order, max_num_seqs=2, **memory) as engine:
            engine.generate(prompts(), [params_of(number) for number in range(40)], progress=False)
            computed[order] = engine.stats().tenants["offline"].counters.computed_tokens
    assert computed["prefix"] < computed["fcfs"]
