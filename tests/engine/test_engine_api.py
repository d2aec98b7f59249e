"""The public Engine on a tiny real model: scripts, threads and asyncio; what it refuses and why."""

from __future__ import annotations

import asyncio
import math
import threading
from itertools import combinations

import pytest
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig, FinishReason, SamplingParams, Tenant
from engine.errors import ContextTooLong, EngineDead, InvalidConfig, InvalidRequest, Overloaded, ShuttingDown, UnknownModel
from engine.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    config = EngineConfig(model=str(folder), served_model_name=("tiny", "alias"), threads=1, kv_cache_memory=8 << 20)
    with Engine(config=config, progress=False) as engine:
        yield engine
        engine._core.scheduler.check()


def test_generate_keeps_the_order_of_prompts(engine):
    prompts = ["one", [1, 2, 3], "three"]
    together = engine.generate(prompts, GREEDY, progress=False)
    alone = [engine.generate(prompt, GREEDY, progress=False)[0] for prompt in prompts]
    assert [r.choices[0].tokens for r in together] == [r.choices[0].tokens for r in alone]
    assert together[1].prompt_tokens == (1, 2, 3)


def test_params_for_each_prompt(engine):
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5)]
    results = engine.generate(["a", "b"], each, progress=False)
    assert [r.usage.completion_tokens for r in results] == [1, 5]
    with pytest.raises(InvalidRequest, match="one for each"):
        engine.generate(["a", "b", "c"], each, progress=False)


def test_chat_renders_the_template(engine):
    result = engine.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert result.usage.prompt_tokens > 2
    assert result.choices[0].finish_reason is FinishReason.LENGTH


async def test_many_streams_at_once(engine):
    async def one(number: int) -> list[int]:
        return [token async for delta in engine.stream([number + 1, 2, 3], GREEDY) for token in delta.tokens]

    streams = await asyncio.gather(*(one(n) for n in range(12)))
    plain = engine.generate([[n + 1, 2, 3] for n in range(12)], GREEDY, progress=False)
    assert [tuple(tokens) for tokens in streams] == [r.choices[0].tokens for r in plain]


async def test_leaving_a_stream_aborts_it(engine):
    async for _ in engine.stream("abc", SamplingParams(max_tokens=400, ignore_eos=True), request_id="leave"):
        break
    async with asyncio.timeout(60):
        while engine._live:
            await asyncio.sleep(0.01)


def test_abort_by_id_in_any_state(engine):
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    generation = engine.submit("abc", long, request_id="mine")
    assert engine.abort("mine")
    assert generation.result(60).choices[0].finish_reason is FinishReason.ABORT
    assert not engine.abort("mine")
    assert not engine.abort("never was")


def test_threads_share_an_engine(engine):
    results: dict[int, tuple[int, ...]] = {}

    def work(number: int) -> None:
        results[number] = engine.submit([number, number + 1], GREEDY).result(60).choices[0].tokens

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: engine.submit([n, n + 1], GREEDY).result(60).choices[0].tokens for n in range(8)}


def test_same_seed_same_tokens_whatever_else_runs(engine):
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=42, ignore_eos=True)
    alone = engine.submit("seeded", params).result(60).choices[0].tokens
    crowd = [engine.submit([n, 5], SamplingParams(max_tokens=30, ignore_eos=True)) for n in range(10)]
    beside = engine.submit("seeded", params).result(60).choices[0].tokens
    offline = engine.submit("seeded", params, tenant="offline").result(60).choices[0].tokens
    for other in crowd:
        other.abort()
    assert alone == beside == offline


def test_n_choices_differ_and_repeat(engine):
    params = SamplingParams(max_tokens=10, temperature=2.0, n=4, seed=1, ignore_eos=True)
    first, second = (engine.submit("many", params).result(60) for _ in range(2))
    assert [c.tokens for c in first.choices] == [c.tokens for c in second.choices]
    assert len({c.tokens for c in first.choices}) == 4
    assert [c.index for c in first.choices] == [0, 1, 2, 3]


def test_logprobs_of_output_and_prompt(engine):
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    prompt = list(range(10, 60))
    result = engine.submit(prompt, params).result(60)
    entries = result.choices[0].logprobs
    assert [entry.token for entry in entries] == list(result.choices[0].tokens)
    assert all(entry.rank == 1 and entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2 for entry in entries)
    assert result.prompt_logprobs[0] is None
    assert [entry.token for entry in result.prompt_logprobs[1:]] == prompt[1:]
    assert all(entry.logprob <= 0 for entry in result.prompt_logprobs[1:])


def test_stop_token_min_tokens_and_eos(engine):
    greedy = engine.submit("stop", GREEDY).result(60).choices[0].tokens
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop_token_ids=(greedy[2],))
    stopped = engine.submit("stop", params).result(60).choices[0]
    first = greedy.index(greedy[2])
    assert stopped.tokens == greedy[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, greedy[2])
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop_token_ids=(greedy[2],), min_tokens=8)
    later = engine.submit("stop", params).result(60).choices[0]
    assert len(later.tokens) == 8
    assert greedy[2] not in later.tokens


FEATURES = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": -2.0},
    "bias": {"logit_bias": ((3, 100.0), (4, -100.0))},
    "seed": {"seed": -(2**63)},
    "n": {"n": 3},
    "stop": {"stop": ("a", "bc")},
    "stop_ids": {"stop_token_ids": (0, 263)},
    "include": {"include_stop_str_in_output": True, "stop": ("e",)},
    "min_tokens": {"min_tokens": 4},
    "eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 20},
    "prompt_logprobs": {"prompt_logprobs": 0},
}


def test_every_pair_of_parameters_works(engine):
    pairs = [(a, b, SamplingParams(**{"max_tokens": 6, **FEATURES[a], **FEATURES[b]})) for a, b in combinations(FEATURES, 2)]
    running = [(a, b, engine.submit("pairs of features", params, tenant="offline")) for a, b, params in pairs]
    for a, b, generation in running:
        result = generation.result(120)
        assert all(choice.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for choice in result.choices), (a, b)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", 2**63),
        ("min_tokens", 9),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", math.inf),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**63),
        ("n", 0),
        ("n", 10**9),
        ("logprobs", 21),
        ("logprobs", False),
        ("prompt_logprobs", -1),
        ("stop", ("",)),
        ("stop_token_ids", (10**6,)),
        ("bad_tokens", ((3, 10**6),)),
        ("logit_bias", ((10**6, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
def test_values_out_of_range_name_their_field(engine, field, value):
    params = SamplingParams(**{"max_tokens": 8, field: value})
    with pytest.raises(InvalidRequest) as caught:
        engine.submit("x", params)
    assert caught.value.param == field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", InvalidRequest),
        ([], InvalidRequest),
        ([264], InvalidRequest),
        ([-1], InvalidRequest),
        ([True], InvalidRequest),
        ([1.0], InvalidRequest),
        ("x" * 600, ContextTooLong),
        ([1] * 512, ContextTooLong),
        ("x" * 10**7, ContextTooLong),
    ],
)
def test_prompts_that_cannot_run(engine, prompt, error):
    with pytest.raises(error) as caught:
        engine.submit(prompt, GREEDY)
    assert caught.value.param == "prompt"


def test_a_text_may_name_tokens_that_the_model_does_not_have(tmp_path):
    folder = tiny_checkpoint(tmp_path, vocab_size=258, eos_token_id=257)
    with Engine(str(folder), threads=1, kv_cache_memory=8 << 20, progress=False) as engine:
        with pytest.raises(InvalidRequest, match="from 0 to 257"):
            engine.submit("x<|im_end|>", GREEDY)
        assert engine.generate("x", GREEDY, progress=False)[0].usage.completion_tokens == 8


def test_the_longest_prompt_runs(engine):
    length = engine.models[0].max_model_len
    result = engine.submit([1] * (length - 1), SamplingParams(max_tokens=100, ignore_eos=True)).result(60)
    assert result.usage.completion_tokens == 1
    assert result.choices[0].finish_reason is FinishReason.LENGTH


def test_models_and_their_names(engine):
    assert engine.resolve(None) == engine.resolve("tiny") == engine.resolve("alias") == engine.models[0]
    with pytest.raises(UnknownModel, match="served: tiny"):
        engine.submit("x", GREEDY, model="other")


def test_bounded_queue_and_drain(folder):
    config = EngineConfig(model=str(folder), threads=1, max_num_seqs=1, max_num_queued_reqs=2, kv_cache_memory=8 << 20)
    with Engine(config=config, progress=False) as engine:
        long = SamplingParams(max_tokens=400, ignore_eos=True)
        running = []
        with pytest.raises(Overloaded) as caught:
            for _ in range(50):
                running.append(engine.submit("x", long))
        assert caught.value.retry_after > 0
        assert not engine.drain(0.01)
        with pytest.raises(ShuttingDown):
            engine.submit("x", GREEDY)
        for generation in running:
            generation.abort()
        assert engine.drain(30)


def test_close_ends_waiting_readers(folder):
    engine = Engine(config=EngineConfig(model=str(folder), threads=1, kv_cache_memory=8 << 20), progress=False)
    generation = engine.submit("x", SamplingParams(max_tokens=400, ignore_eos=True))
    engine.close()
    with pytest.raises(EngineDead):
        generation.result(60)
    with pytest.raises(EngineDead):
        engine.submit("x", GREEDY)
    assert not engine.alive
    engine.close()


def test_stats_add_up(engine):
    before = engine.stats().tenants[Tenant.OFFLINE].counters
    engine.generate(["a", "b"], GREEDY, progress=False)
    after = engine.stats()
    counters = after.tenants[Tenant.OFFLINE].counters
    assert counters.finished - before.finished == 2
    assert counters.generated_tokens - before.generated_tokens == 16
    assert after.kv_pages_free + after.kv_pages_cached + sum(t.kv_pages for t in after.tenants.values()) == after.kv_pages


def test_a_model_smaller_than_a_slab_needs_no_flag(folder):
    with Engine(str(folder), threads=1, max_num_seqs=1, max_model_len=32, progress=False) as engine:
        assert engine.generate("x", GREEDY, progress=False)[0].usage.completion_tokens == 8


@pytest.mark.parametrize("options", [{"max_model_len": 10**6}, {"kv_cache_memory": 10}, {"device": "tpu"}, {"polic": "x"}])
def test_configurations_that_cannot_work(folder, options):
    with pytest.raises(InvalidConfig):
        Engine(str(folder), progress=False, **options)


def test_a_tokenizer_of_the_callers_is_used(folder):
    class Shouting(Tokenizer):
        def encode(self, text, add_special=True, **options):
            return super().encode(text.upper(), add_special, **options)

    with Engine(str(folder), tokenizer=Shouting.load(folder), kv_cache_memory=8 << 20, threads=1, progress=False) as engine:
        assert engine.submit("ab", GREEDY).prompt_tokens == tuple(b"AB")
