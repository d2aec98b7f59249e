"""Sampling: every parameter does what it says, draws follow the distribution, and rows do not see each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import GREEDY, Fixed, Row

from engine.kernels.sampling import LOGPROB_FLOOR, Sample, draw, nucleus, sample, survivors, token_logprobs
from engine.types import SamplingParams, uniform


def one(logits: list[float] | torch.Tensor, row: Row) -> Sample:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], [row]).collect()[0]


def shares(logits: list[float], draws: int = 2000, **params: Any) -> torch.Tensor:
    """How often each id comes when the uniform numbers run evenly through [0, 1)."""
    settings = SamplingParams(**params)
    tokens = [one(logits, Row(settings, uniform=(i + 0.5) / draws)).token for i in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert one([0.0, 3.0, 1.0, 3.0], Row()).token == 1


def test_logits_are_left_unchanged() -> None:
    logits = torch.randn(2, 9)
    before = logits.clone()
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((3, 5.0),), top_k=3, top_p=0.5, min_p=0.1, logprobs=2
    )
    sample(logits, [Row(params, tokens=(1, 2, 3), suppress=(4,)), Row()])

    assert torch.equal(logits, before)


def test_suppressed_ids_never_come() -> None:
    assert one([0.0, 3.0, 1.0], Row(suppress=(1,))).token == 2
    assert one([0.0, 3.0, 1.0], Row(SamplingParams(logit_bias=((1, 100.0),), temperature=0.0), suppress=(1,))).token == 2


def test_all_suppressed_is_an_error() -> None:
    outcome = one([0.0, 1.0], Row(suppress=(0, 1)))
    assert outcome.token is None and "suppressed" in (outcome.error or "")


def test_logit_bias_adds() -> None:
    assert one([0.0, 3.0, 1.0], Row(SamplingParams(temperature=0.0, logit_bias=((0, 2.9),)))).token == 1
    assert one([0.0, 3.0, 1.0], Row(SamplingParams(temperature=0.0, logit_bias=((0, 3.1),)))).token == 0


def test_repetition_penalty_covers_prompt_and_output_and_both_signs() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert one([1.9, 3.0, 1.0], Row(params, tokens=(1,), num_prompt=1)).token == 0  # in the prompt: 3.0 -> 1.5
    assert one([1.9, 3.0, 1.0], Row(params, tokens=(2, 1), num_prompt=1)).token == 0  # in the output
    assert one([-1.0, -1.5, -9.0], Row(params, tokens=(0,))).token == 1  # negative: -1.0 -> -2.0
    assert one([1.4, 3.0, 1.0], Row(params, tokens=(1, 1, 1))).token == 1  # once, however often it occurred


def test_frequency_and_presence_penalties_cover_the_output_only() -> None:
    frequency = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    presence = SamplingParams(temperature=0.0, presence_penalty=1.0)
    logits = [1.5, 3.0, 0.0]
    assert one(logits, Row(frequency, tokens=(1, 1, 1), num_prompt=3)).token == 1
    assert one(logits, Row(frequency, tokens=(2, 1), num_prompt=1)).token == 1  # 3 - 1
    assert one(logits, Row(frequency, tokens=(2, 1, 1), num_prompt=1)).token == 0  # 3 - 2
    assert one(logits, Row(presence, tokens=(2, 1, 1), num_prompt=1)).token == 1  # 3 - 1, once
    assert one([2.5, 3.0, 0.0], Row(presence, tokens=(2, 1), num_prompt=1)).token == 0


def test_temperature_shapes_the_distribution() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(-1)
        torch.testing.assert_close(shares(logits, temperature=temperature), expected, atol=1e-3, rtol=0)


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    assert one([0.0, 80.0, 79.0], Row(SamplingParams(temperature=1e-30), uniform=0.999)).token == 1


def test_top_k_keeps_k_and_renormalises() -> None:
    logits = [0.0, 3.0, 2.0, 1.0]
    expected = torch.tensor([0.0, *torch.tensor([3.0, 2.0]).softmax(-1).tolist(), 0.0])
    torch.testing.assert_close(shares(logits, top_k=2), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("top_k", [-1, 0, 4, 99])
def test_top_k_of_everything_is_no_filter(top_k: int) -> None:
    ids, _ = survivors(torch.tensor([0.0, -1.0, -2.0, -3.0]), SamplingParams(top_k=top_k))
    assert ids is None


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(weights, 0.39).tolist() == [1]
    assert nucleus(weights, 0.41).tolist() == [1, 3]
    assert nucleus(weights, 0.75).tolist() == [1, 2, 3]
    assert nucleus(weights, 1e-9).tolist() == [1]


def test_top_p_takes_the_lower_of_equals() -> None:
    assert nucleus(torch.ones(10), 0.25).tolist() == [0, 1, 2]


def test_min_p_is_relative_to_the_likeliest() -> None:
    scaled = torch.tensor([0.0, math.log(0.5), math.log(0.19), math.log(0.21)])
    ids, _ = survivors(scaled, SamplingParams(min_p=0.2))
    assert ids is not None and ids.tolist() == [0, 1, 3]


def test_top_p_counts_what_top_k_left() -> None:
    """Among the two kept by top_k the first has 2/3 of the mass, so top_p = 0.6 needs it alone."""
    scaled = torch.tensor([1.0, 0.5, 0.5, 0.4]).log()
    ids, _ = survivors(torch.tensor([1.0, 0.5, 0.3, 0.2]).log(), SamplingParams(top_k=2, top_p=0.6))
    assert ids is not None and ids.tolist() == [0]
    ids, _ = survivors(scaled, SamplingParams(top_k=2))  # the tie of the second place stays
    assert ids is not None and ids.tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 0.999), size=st.sampled_from([5, 255, 256, 257, 3000]))
def test_nucleus_equals_a_full_sort(seed: int, top_p: float, size: int) -> None:
    """However flat the distribution is, looking at the largest first changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(size, generator=generator) * (seed % 7)).exp()
    ordered, order = weights.double().sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    count = int((before < top_p * weights.double().sum()).sum())
    expected = set(order[:count].tolist())

    actual = set(nucleus(weights, top_p).tolist())

    edge = abs(float(before[min(count, size - 1)]) - top_p * float(ordered.sum())) < 1e-6 * float(ordered.sum())
    assert actual == expected or (edge and len(actual ^ expected) <= 1)


@pytest.mark.parametrize("size", [1, 5, 256, 257, 1000])
def test_draws_follow_the_distribution(size: int) -> None:
    """Hashed uniforms, as requests get them: a chi-squared statistic within five sigma."""
    scaled = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    draws = 20_000
    counts = torch.bincount(torch.tensor([draw(scaled, uniform(7, i)) for i in range(draws)]), minlength=size)
    expected = scaled.double().softmax(-1) * draws
    likely = expected >= 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = max(1, int(likely.sum()) - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("number", [0.0, 0.25, 1.0 - 2**-53])
def test_draw_never_takes_what_has_no_probability(number: float) -> None:
    scaled = torch.full((700,), -math.inf)
    scaled[[300, 600]] = 0.0
    assert draw(scaled, number) == (300 if number < 0.5 else 600)


def test_draw_is_the_inverse_of_the_running_sum_in_order_of_id() -> None:
    scaled = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert [draw(scaled, number) for number in (0.05, 0.15, 0.45, 0.95)] == [0, 1, 2, 3]


ROWS = [
    Row(),
    Row(SamplingParams(), uniform=0.31),
    Row(SamplingParams(temperature=0.7, top_k=20, logprobs=3), uniform=0.83),
    Row(SamplingParams(temperature=1.4, top_p=0.8), uniform=0.11),
    Row(SamplingParams(min_p=0.05, presence_penalty=1.0, frequency_penalty=0.3), tokens=tuple(range(40)), uniform=0.5),
    Row(SamplingParams(repetition_penalty=1.3, logit_bias=((3, 2.0),), logprobs=0), tokens=(5, 9), suppress=(7, 8)),
    Row(SamplingParams(temperature=0.0, logprobs=5)),
]


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(len(ROWS))), size=st.integers(1, len(ROWS)), vocab=st.sampled_from([50, 1031]))
def test_a_row_does_not_see_its_batch_mates(order: list[int], size: int, vocab: int) -> None:
    logits = torch.randn(len(ROWS), vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    alone = [sample(logits[i : i + 1], [ROWS[i]]).collect()[0] for i in range(len(ROWS))]
    chosen = order[:size]

    together = sample(logits[chosen], [ROWS[i] for i in chosen]).collect()

    assert together == [alone[i] for i in chosen]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9, logprobs=2)], ids=["greedy", "drawn"])
def test_unusable_logits_fail_their_row_only(bad: float, params: SamplingParams) -> None:
    logits = torch.randn(3, 100)
    logits[1, 17] = bad
    expected = sample(logits[[0, 2]], [Row(params)] * 2).collect()

    first, broken, last = sample(logits, [Row(params)] * 3).collect()

    assert [first, last] == expected
    assert broken.token is None and broken.logprob is None and "not finite" in (broken.error or "")


def test_nothing_above_minus_infinity_is_an_error() -> None:
    assert "not finite" in (one([-math.inf] * 4, Row()).error or "")


def test_some_minus_infinity_is_fine() -> None:
    assert one([-math.inf, 0.0, -math.inf], Row(SamplingParams(), uniform=0.99)).token == 1


def test_logprobs_are_of_the_raw_logits() -> None:
    """Penalties and temperature choose the token; what is reported is the model's own opinion."""
    logits = [1.0, 3.0, 2.0, -math.inf]
    params = SamplingParams(temperature=0.0, logit_bias=((0, 50.0),), logprobs=4)
    outcome = one(logits, Row(params))

    expected = torch.tensor(logits).log_softmax(-1).tolist()
    assert outcome.token == 0 and outcome.logprob is not None
    assert outcome.logprob.token == 0 and outcome.logprob.rank == 3
    assert outcome.logprob.logprob == pytest.approx(expected[0])
    assert [token for token, _ in outcome.logprob.top] == [1, 2, 0, 3]
    assert [value for _, value in outcome.logprob.top] == pytest.approx([expected[1], expected[2], expected[0], LOGPROB_FLOOR])


def test_logprobs_zero_reports_the_chosen_token_only() -> None:
    outcome = one([1.0, 3.0], Row(SamplingParams(temperature=0.0, logprobs=0)))
    assert outcome.logprob is not None and outcome.logprob.top == () and outcome.logprob.rank == 1


def test_logprobs_of_many_positions() -> None:
    logits = torch.randn(5, 33)
    tokens = [3, 0, 32, 7, 7]
    entries = token_logprobs(logits, tokens, 2)
    expected = logits.log_softmax(-1)

    for i, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(expected[i, token]))
        assert entry.rank == expected[i].argsort(descending=True).tolist().index(token) + 1
        assert [t for t, _ in entry.top] == expected[i].argsort(descending=True)[:2].tolist()


def test_a_grammar_leaves_only_what_it_allows() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    guide = Fixed((3, 17, 33))
    assert one(logits, Row(guide=guide)).token == max(guide.ids, key=lambda i: float(logits[i]))
    drawn = {one(logits, Row(SamplingParams(temperature=2.0), uniform=i / 50, guide=guide)).token for i in range(50)}
    assert drawn == set(guide.ids)


def test_a_grammar_with_every_other_parameter() -> None:
    params = SamplingParams(
        temperature=1.5,
        top_k=5,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias=((1, 100.0),),
        logprobs=1,
    )
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    found = one(logits, Row(params, tokens=(2, 3), guide=Fixed((2, 3))))
    assert found.token in (2, 3)
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(logits.log_softmax(-1)[found.token]), abs=1e-5)  # of the raw logits


def test_suppressed_ids_come_where_the_grammar_leaves_nothing_else() -> None:
    assert one([9.0, 1.0, 2.0], Row(suppress=(0,), guide=Fixed((0, 1)))).token == 1
    assert one([9.0, 1.0, 2.0], Row(suppress=(0,), guide=Fixed((0,)))).token == 0


def test_a_grammar_that_fails_or_allows_nothing_ends_its_row_alone() -> None:
    rows = [Row(guide=Fixed(error="too hard")), Row(), Row(guide=Fixed())]
    found = sample(torch.tensor([[1.0, 2.0]] * 3), rows).collect()
    assert found[0].error == "too hard"
    assert found[1].token == 1
    assert found[2].error is not None and found[2].token is None


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.01, 0.5, 2.0, 8.0]), st.floats(0.01, 1.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_nucleus_is_what_sorting_all_finds(seed: int, spread: float, top_p: float, coarse: bool) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * spread
    if coarse:
        logits = logits.round()  # many equals
    weights = (logits - logits.max()).exp()
    order = weights.sort(descending=True, stable=True)
    sums = order.values.double().cumsum(0)
    count = 1 + int((sums[:-1] < top_p * float(sums[-1])).sum())
    got = nucleus(weights, top_p)
    if abs(float(sums[count - 1]) / float(sums[-1]) - top_p) > 1e-12:  # else rounding decides
        assert torch.equal(got, order.indices[:count].sort().values)
    assert float(weights[got].double().sum()) >= top_p * float(sums[-1]) * (1 - 1e-12)


def test_a_list_of_ids_leaves_only_those() -> None:
    params = SamplingParams(temperature=0.0, allowed_token_ids=(2, 5, 39))
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    best = max((2, 5, 39), key=lambda i: float(logits[i]))
    assert one(logits, Row(params)).token == best
    assert one(logits, Row(params, suppress=(best,))).token != best
    assert one(logits, Row(params, guide=Fixed((5, 7)))).token == 5
    assert one(logits, Row(params, guide=Fixed((7,)))).error is not None
