"""Greedy tokens equal transformers', token for token, however the engine chunks, batches, reuses, preempts and interrupts."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from oracle import Answer, Oracle, assert_same

from engine import Engine, EngineConfig, SamplingParams, Tenant

COUNT = 12
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CHECKPOINTS = {
    "llama": ("llama", {}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-linear": ("mistral", {"sliding_window": None, "rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
}
PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)


def prompts_of(seed: int) -> list[list[int]]:
    """Prompts of odd lengths; some share a beginning, two are the same."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(40)]
    own = [[rng.randrange(256) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 70, 101)]
    return own + [shared + tail for tail in own[:4]] + [shared, shared]


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def case(request, tmp_path_factory) -> tuple[Path, list[list[int]], list[Answer]]:
    architecture, overrides = CHECKPOINTS[request.param]
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), architecture, **overrides)
    oracle, prompts = Oracle(folder), prompts_of(7)
    return folder, prompts, [oracle.greedy(prompt, COUNT) for prompt in prompts]


def engine_for(folder: Path, **options) -> Engine:
    options = {"threads": 1, "kv_cache_memory": 8 << 20} | options
    return Engine(config=EngineConfig(model=str(folder), **options), progress=False)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"max_num_batched_tokens": 1}, id="token-by-token"),
        pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 3}, id="odd-chunks"),
        pytest.param({"max_num_seqs": 1, "enable_prefix_caching": False}, id="one-by-one"),
        pytest.param({"page_size": 4, "max_num_batched_tokens": 32}, id="small-pages"),
    ],
)
def test_same_tokens_however_it_is_batched(case, options):
    folder, prompts, answers = case

    with engine_for(folder, **options) as engine:
        for _ in range(2):  # the second time from the prefix cache
            results = engine.generate(prompts, PARAMS, progress=False)
            for prompt, answer, result in zip(prompts, answers, results, strict=True):
                assert_same(answer, result.choices[0].tokens, f"{len(prompt)} prompt tokens")
        hits = sum(stats.prefix_hits for stats in engine.stats().tenants.values())
        engine._core.scheduler.check()

    assert (hits > 0) == options.get("enable_prefix_caching", True)


def test_same_tokens_when_memory_is_too_small_for_all(case):
    """Offline requests lose their pages to online ones, and are computed again."""
    folder, prompts, answers = case
    page = 3 * 2 * 16 * 2 * 16 * 4  # tiny checkpoints: 3 layers, K and V, 16 tokens, 2 heads of 16, float32

    with engine_for(folder, kv_cache_memory=14 * page, slab_size=page, max_num_batched_tokens=32) as engine:
        offline = [engine.submit(prompt, PARAMS, tenant="offline") for prompt in prompts]
        while not engine.stats().tenants[Tenant.OFFLINE].running:
            time.sleep(0.001)
        online = [engine.submit(prompt, PARAMS) for prompt in prompts]  # together they need all the memory there is
        for generation, answer in zip([*offline, *online], answers * 2, strict=True):
            assert_same(answer, generation.result(60).choices[0].tokens, f"{generation.tenant}")
        engine._core.scheduler.check()
        assert any(generation.num_preemptions for generation in offline)
        assert not any(generation.num_preemptions for generation in online)


def test_same_tokens_when_passes_stop_between_layers(case):
    """Every offline pass is parked at each layer in turn, with rows leaving it meanwhile."""
    folder, prompts, answers = case

    with engine_for(folder, max_num_batched_tokens=16) as engine:
        engine._core._stop = lambda layer: layer == 1 + engine._core.scheduler._step % 2
        generations = [engine.submit(prompt, PARAMS, tenant="offline") for prompt in prompts]
        leaving = [engine.submit(prompt, PARAMS, tenant="offline") for prompt in prompts[:5]]
        for generation in leaving:
            time.sleep(0.005)
            generation.abort()
        for generation, answer in zip(generations, answers, strict=True):
            assert_same(answer, generation.result(60).choices[0].tokens, "parked passes")
        engine._core.scheduler.check()


def test_same_tokens_when_steps_are_launched_ahead(case):
    """Each step of online decodes is launched before the tokens it computes have reached the host; some end unexpectedly."""
    folder, prompts, answers = case

    with engine_for(folder, max_num_batched_tokens=64) as engine:
        core, plans = engine._core, []
        tell = core.on_step
        core.on_step = lambda plan, result: (plans.append(plan), tell(plan, result))
        core.launch_ahead = True
        offline = [engine.submit(prompt, PARAMS, tenant="offline") for prompt in prompts]
        online = [engine.submit(prompt, PARAMS) for prompt in prompts]
        stopped = [
            engine.submit(prompt, replace(PARAMS, stop_token_ids=(answer.tokens[4],)))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for generation, answer in zip([*online, *offline], answers * 2, strict=True):
            assert_same(answer, generation.result(60).choices[0].tokens, f"{generation.tenant}")
        for generation, answer in zip(stopped, answers, strict=True):
            tokens = list(generation.result(60).choices[0].tokens)
            end = answer.tokens.index(answer.tokens[4])
            assert tokens == list(answer.tokens[: len(tokens)]) and end <= len(tokens) <= end + 1
        core.scheduler.check()
        assert any(plan.follows for plan in plans)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_model_on_real_prompts(demo_model):
    """SmolLM2, 64 prompts of real English x 64 tokens, in one engine and in any order of arrival."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    prompts = english_prompts(tokenizer, 64)
    oracle = Oracle(demo_model)
    answers = oracle.greedy_batch(prompts, 64)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)

    with Engine(config=EngineConfig(model=str(demo_model), kv_cache_memory=1 << 30), progress=False) as engine:
        results = engine.generate(prompts, params, progress=False)

    pairs = enumerate(zip(answers, results, strict=True))
    equal = [assert_same(answer, result.choices[0].tokens, f"prompt {i}") for i, (answer, result) in pairs]
    print(f"{sum(equal)} of {len(equal)} equal throughout, the others until a near tie")
    assert sum(equal) >= 60


def english_prompts(tokenizer, count: int) -> list[list[int]]:
    """Pieces of Python's own help texts, 24 to 200 tokens long."""
    from pydoc_data.topics import topics

    rng = random.Random(1)
    texts = [topics[name] for name in sorted(topics) if len(topics[name]) > 2000]
    return [tokenizer.encode(texts[i % len(texts)]).ids[: rng.randrange(24, 200)] for i in range(count)]
