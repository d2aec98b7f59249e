"""Sampling on the device gives what `sampling.sample` gives, row for row and whatever the batch."""

from __future__ import annotations

import math

import pytest
from sampling_cases import GREEDY, Fixed, Row
from triton_device import DEVICE, REASON

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch

from engine.kernels import sampling
from engine.kernels.triton_sampling import sample
from engine.types import SamplingParams

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1e-30),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10**9),
    SamplingParams(top_k=-1, top_p=0.999),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.7, top_k=50, top_p=0.8, min_p=0.01),
    SamplingParams(repetition_penalty=1.5, temperature=0.7),
    SamplingParams(frequency_penalty=0.8, presence_penalty=-1.5),
    SamplingParams(repetition_penalty=0.5, frequency_penalty=-0.3, top_p=0.9),
    SamplingParams(logit_bias=((3, 5.0), (4, -100.0), (3, 1.5))),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.0, presence_penalty=2.0),
    SamplingParams(logprobs=0),
    GREEDY,
]


def rows(seed: int, vocab: int) -> list[Row]:
    random = torch.Generator().manual_seed(seed)
    out = []
    for params in SETTINGS:
        tokens = tuple(torch.randint(0, vocab, (12,), generator=random).tolist()) * 2
        suppress = (1, 2) if seed % 2 else ()
        out.append(Row(params, tokens, 5, float(torch.rand((), generator=random, dtype=torch.float64)), suppress))
    return out


def same(got: list[sampling.Sample], expected: list[sampling.Sample]) -> None:
    for row, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a.token, a.error) == (b.token, b.error), row
        assert (a.logprob is None) == (b.logprob is None)
        if a.logprob is not None and b.logprob is not None:
            assert a.logprob.rank == b.logprob.rank and a.logprob.token == b.logprob.token
            assert a.logprob.logprob == pytest.approx(b.logprob.logprob, abs=1e-5)
            assert [i for i, _ in a.logprob.top] == [i for i, _ in b.logprob.top]
            assert [v for _, v in a.logprob.top] == pytest.approx([v for _, v in b.logprob.top], abs=1e-5)


@pytest.mark.parametrize(("seed", "vocab", "spread"), [(0, 40, 1.0), (1, 40, 4.0), (3, 1031, 0.5), (2, 5000, 2.0)])
def test_as_the_reference(seed, vocab, spread):
    batch = rows(seed, vocab)[:: 1 if vocab < 5000 else 3]
    logits = torch.randn(len(batch), vocab, generator=torch.Generator().manual_seed(seed)) * spread
    before = logits.clone()

    got = sample(logits.to(DEVICE), batch).collect()

    same(got, sampling.sample(logits, batch).collect())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", [0, 1])
def test_ties_go_to_the_lower_id(seed):
    """Logits of few distinct values: thresholds of top_k and top_p fall on ties again and again."""
    batch = rows(seed, 300)
    logits = torch.randint(0, 4, (len(batch), 300), generator=torch.Generator().manual_seed(seed)).float()

    same(sample(logits.to(DEVICE), batch).collect(), sampling.sample(logits, batch).collect())


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_distribution(number):
    logits = torch.full((2, 700), -math.inf, device=DEVICE)
    logits[:, [300, 600]] = 0.0

    drawn = sample(logits, [Row(SamplingParams(), uniform=number), Row(SamplingParams(top_p=0.9), uniform=number)])

    assert [outcome.token for outcome in drawn.collect()] == [300 if number < 0.5 else 600] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_fail_their_row_only(bad):
    batch = [Row(SamplingParams(top_p=0.9, top_k=5, logprobs=1)), Row()] * 2
    logits = torch.randn(4, 100)
    expected = sampling.sample(logits, batch).collect()
    logits[0, 17] = logits[3, 0] = bad

    got = sample(logits.to(DEVICE), batch).collect()

    same(got[1:3], expected[1:3])
    assert all(got[i].token is None and "not finite" in (got[i].error or "") for i in (0, 3))


def test_all_suppressed_is_an_error():
    outcome = sample(torch.zeros(1, 2, device=DEVICE), [Row(suppress=(0, 1))]).collect()[0]

    assert outcome.token is None and "suppressed" in (outcome.error or "")


def test_a_row_does_not_see_its_batch_mates():
    batch = rows(1, 90)[::3]
    logits = torch.randn(len(batch), 90, device=DEVICE) * 2
    together = sample(logits, batch).collect()

    alone = [sample(logits[i : i + 1], [row]).collect()[0] for i, row in enumerate(batch)]

    assert together == alone


@pytest.mark.parametrize("vocab", [33, 101])
def test_grammars_masks(vocab: int) -> None:
    """Beside rows without one, with suppressed ids that the grammar must have, and with a grammar that failed."""
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    drawn = SamplingParams(temperature=1.5, top_p=0.9, presence_penalty=0.5, logit_bias=((2, 3.0),))
    rows = [
        Row(guide=Fixed((0, 7, 31, 32))),
        Row(drawn, (1, 2), 1, 0.9, guide=Fixed((2, 5, 9))),
        Row(),
        Row(suppress=(4,), guide=Fixed((4, 8))),
        Row(suppress=(4,), guide=Fixed((4,))),
        Row(drawn, guide=Fixed(error="too hard")),
        Row(SamplingParams(allowed_token_ids=(3, 32)), suppress=(3,)),
    ]
    got = sample(logits, rows).collect()
    same(got, sampling.sample(logits.cpu(), rows).collect())
    assert [got[3].token, got[4].token, got[5].error] == [8, 4, "too hard"]
