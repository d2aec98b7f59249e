"""Steps of a real (tiny, random) model: chunking, batching, parking, dropping, and failures of single rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msgspec import structs
from runner_cases import GREEDY, SPEC, generate, kv_of, make_row, make_runner, run, stops_at

from engine.errors import InvalidConfig
from engine.kernels.select import load_backend
from engine.runner import ModelRunner
from engine.sched.plan import PlanRow, StepPlan
from engine.types import SamplingParams
from engine.weights import EMBEDDING, random_weights

PROMPT = [(7 * i) % SPEC.vocab_size for i in range(1, 41)]


@pytest.fixture(scope="module")
def runner():
    runner = make_runner()
    yield runner
    runner.close()


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 39])
@pytest.mark.parametrize("window", [None, 10])
def test_chunk_size_does_not_change_tokens(chunk: int, window: int | None) -> None:
    runner = make_runner(replace(SPEC, windows=(None, window, None, window)))
    expected = generate(runner, PROMPT, 6, range(4))

    assert generate(runner, PROMPT, 6, (9, 5, 30, 2), chunk) == expected
    runner.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32(dtype: torch.dtype) -> None:
    """Logprobs of the prompt agree with float32 within the precision of the dtype."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    row = make_row("r", PROMPT, count=len(PROMPT), pages=range(3), sample=True, params=params)
    weights = random_weights(SPEC, dtype, seed=1)
    wide = {name: weight.float() for name, weight in weights.items()}
    results = []
    for runner in (make_runner(dtype=dtype, weights=weights), make_runner(weights=wide)):
        results.append([entry.logprob for entry in run(runner, row)["r"].prompt_logprobs])
        runner.close()

    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), atol=0.15, rtol=0.05)


def test_batch_mates_do_not_change_tokens(runner: ModelRunner) -> None:
    """A decode, a whole prompt and a chunk in one step, drawn with the same numbers as alone."""
    params = SamplingParams(temperature=0.9, top_p=0.95)
    prompts = [PROMPT[:20], PROMPT[5:38], PROMPT[3:21]]
    alone = [generate(runner, prompt, 1, range(3), params=params, uniform=0.3)[0] for prompt in prompts]

    run(runner, make_row("a", prompts[0], count=19, pages=(0, 1)), make_row("c", prompts[2], count=4, pages=(6, 7)))
    rows = run(
        runner,
        make_row("a", prompts[0], start=19, pages=(0, 1), sample=True, params=params, uniform=0.3),
        make_row("b", prompts[1], count=33, pages=(2, 3, 4), sample=True, params=params, uniform=0.3),
        make_row("c", prompts[2], start=4, count=14, pages=(6, 7), sample=True, params=params, uniform=0.3),
    )

    assert [rows[name].token for name in "abc"] == alone


def mixed_plan(params: SamplingParams = GREEDY) -> StepPlan:
    """A whole prompt, a row that only computes, and a chunk behind context."""
    rows = (
        make_row("a", PROMPT[:18], count=18, pages=(0, 1), sample=True, params=params),
        make_row("b", PROMPT, count=9, pages=(2, 3, 4), params=params),
        make_row("c", PROMPT[4:], start=20, count=16, pages=(5, 6, 7), sample=True, params=params),
    )
    return StepPlan(3, rows, preemptible=True)


def prepare(runner: ModelRunner) -> None:
    """Clear the KV and compute the context that row c of `mixed_plan` has behind it."""
    kv_of(runner).zero_()
    run(runner, make_row("c", PROMPT[4:], count=20, pages=(5, 6, 7)))


@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (1, 2, 3), (1, 3)], ids=str)
def test_parking_changes_nothing(runner: ModelRunner, layers: tuple[int, ...]) -> None:
    """Tokens, log-probabilities and every byte of KV equal those of an uninterrupted pass."""
    plan = mixed_plan(SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=1))
    prepare(runner)
    expected = runner.collect(runner.launch(plan))
    expected_kv = kv_of(runner).clone()

    prepare(runner)
    stops = stops_at(*layers)
    result = runner.collect(runner.launch(plan, next(stops)))
    for layer in layers:
        assert result.rows == () and result.checkpoint is not None and result.checkpoint.layer == layer
        result = runner.collect(runner.resume(result.checkpoint, stop=next(stops)))

    assert result.checkpoint is None and result.rows == expected.rows
    assert torch.equal(kv_of(runner), expected_kv)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("dropped", ["a", "b", "c", "ab", "ac", "bc"])
def test_dropped_rows_leave_and_their_pages_stay_untouched(runner: ModelRunner, layer: int, dropped: str) -> None:
    plan = mixed_plan()
    prepare(runner)
    expected = {row.request_id: row for row in runner.collect(runner.launch(plan)).rows}

    prepare(runner)
    parked = runner.collect(runner.launch(plan, next(stops_at(layer)))).checkpoint
    assert parked is not None
    pages = [page for row in plan.rows if row.request_id in dropped for page in row.pages]
    kv_of(runner)[pages] = float("nan")  # somebody else's now
    result = runner.collect(runner.resume(parked, frozenset(dropped)))

    assert [row.request_id for row in result.rows] == [name for name in "abc" if name not in dropped]
    assert all(row == expected[row.request_id] for row in result.rows)
    assert bool(kv_of(runner)[pages].isnan().all())


def test_dropping_every_row_finishes_at_once(runner: ModelRunner) -> None:
    parked = runner.collect(runner.launch(mixed_plan(), next(stops_at(2)))).checkpoint
    assert parked is not None
    result = runner.collect(runner.resume(parked, frozenset("abc")))
    assert result.rows == () and result.checkpoint is None


def test_rows_dropped_before_a_second_stop_stay_dropped(runner: ModelRunner) -> None:
    prepare(runner)
    parked = runner.collect(runner.launch(mixed_plan(), next(stops_at(1)))).checkpoint
    assert parked is not None
    again = runner.collect(runner.resume(parked, frozenset("b"), next(stops_at(3)))).checkpoint
    assert again is not None and [row.request_id for row in again.plan.rows] == ["a", "c"]
    assert [row.request_id for row in runner.collect(runner.resume(again)).rows] == ["a", "c"]


def test_stop_is_asked_before_every_layer_but_the_first(runner: ModelRunner) -> None:
    asked: list[int] = []

    def stop(layer: int) -> bool:
        asked.append(layer)
        return layer == 2

    checkpoint = runner.collect(runner.launch(mixed_plan(), stop)).checkpoint
    assert asked == [1, 2] and checkpoint is not None

    asked.clear()  # a resumed pass makes at least one layer of progress, whatever stop says
    runner.collect(runner.resume(checkpoint, stop=stop))
    assert asked == [3]


def test_a_plan_with_online_rows_is_never_parked(runner: ModelRunner) -> None:
    plan = replace(mixed_plan(), preemptible=False)
    assert runner.collect(runner.launch(plan, lambda layer: True)).checkpoint is None


def test_unusable_logits_fail_their_row_only(runner: ModelRunner) -> None:
    """One token's embedding is not a number: who reads it gets an error, the others their tokens."""
    weights = random_weights(replace(SPEC, tie_embeddings=False), torch.float32, seed=1)
    weights[EMBEDDING][100] = float("nan")
    broken = make_runner(replace(SPEC, tie_embeddings=False), weights=weights)
    good = make_row("good", PROMPT[:30], count=30, pages=(0, 1), sample=True)
    bad = make_row("bad", [3, 100, 5], count=3, pages=(2,), sample=True, params=SamplingParams(prompt_logprobs=1))
    decode = make_row("decode", [1, 2], start=1, pages=(3,), sample=True)
    expected = run(broken, good, decode)

    rows = run(broken, bad, good, decode)

    assert rows["bad"].token is None and "not finite" in (rows["bad"].error or "")
    assert rows["good"] == expected["good"] and rows["decode"] == expected["decode"]
    broken.close()


def test_rows_that_do_not_sample_yield_nothing(runner: ModelRunner) -> None:
    row = run(runner, make_row("a", PROMPT, count=9, pages=(0,)))["a"]
    assert (row.token, row.error, row.logprob, row.prompt_logprobs) == (None, None, None, ())


@pytest.mark.parametrize("chunk", [5, 16, 40])
def test_prompt_logprobs_add_up_over_chunks(runner: ModelRunner, chunk: int) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)

    def entries(chunk: int) -> list:
        found = []
        for start in range(0, len(PROMPT), chunk):
            count = min(chunk, len(PROMPT) - start)
            found += run(runner, make_row("a", PROMPT, start=start, count=count, pages=range(3), params=params))[
                "a"
            ].prompt_logprobs
        return found

    whole, pieces = entries(len(PROMPT)), entries(chunk)
    assert [entry.token for entry in pieces] == PROMPT[1:]
    for a, b in zip(whole, pieces, strict=True):
        assert a.token == b.token and a.rank == b.rank
        assert [token for token, _ in a.top] == [token for token, _ in b.top]
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_prompt_logprobs_of_a_long_prompt_are_computed_in_pieces(runner: ModelRunner) -> None:
    """More positions than are projected at once: each entry is the log-softmax at its own place."""
    prompt = [(i * i + 3 * i) % SPEC.vocab_size for i in range(300)]
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, logprobs=0)
    entries = run(runner, make_row("a", prompt, count=300, pages=range(19), params=params))["a"].prompt_logprobs
    assert [entry.token for entry in entries] == prompt[1:]
    for place in (1, 255, 256, 257, 299):
        row = make_row("a", prompt[:place], count=place, pages=range(19), sample=True)
        biased = structs.replace(row, params=replace(params, prompt_logprobs=None, logit_bias=((prompt[place], 100.0),)))
        outcome = run(runner, biased)["a"]
        assert outcome.token == prompt[place] and outcome.logprob is not None
        assert outcome.logprob.logprob == pytest.approx(entries[place - 1].logprob, abs=1e-4)


def test_results_keep_the_order_of_the_plan(runner: ModelRunner) -> None:
    plan = mixed_plan()
    reverse = replace(plan, rows=plan.rows[::-1])
    assert [row.request_id for row in runner.collect(runner.launch(reverse)).rows] == ["c", "b", "a"]


def test_a_kernel_error_surfaces(runner: ModelRunner) -> None:
    row: PlanRow = make_row("a", [1, SPEC.vocab_size + 5], count=2, pages=(0,), sample=True)
    with pytest.raises(IndexError):
        runner.launch(StepPlan(0, (row,)))


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=no_gpu), "tpu"])
def test_devices_that_cannot_serve_are_refused_in_words(device: str) -> None:
    with pytest.raises(InvalidConfig, match=device):
        load_backend(device)


def test_auto_finds_a_device() -> None:
    assert load_backend("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
