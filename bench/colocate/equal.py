"""Whether answers that differ part at near-ties: how far from the model's own choice the two tokens were.

Arms compute the same request in other pieces and beside other rows, and a sum of floats depends on its order. So where two
tokens are almost equally likely, or a draw falls almost on the border between two, rounding decides. What the model's own
choice is says one pass over the whole text before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.engine import NEAR_TIE
from engine.build import BuiltModel
from engine.sched.plan import PlanRow, StepPlan
from engine.types import SamplingParams, Submit, uniform


@dataclass(frozen=True, slots=True)
class Unequal:
    """A request that two arms answered differently."""

    what: str
    gap: float


def said(compared: int, unequal: Sequence[Unequal]) -> str:
    """The sentence below a table."""
    start = f"Outputs: {compared} requests, {len(unequal)} answered differently by some arm"
    if not unequal:
        return f"{start}."
    widest, far = max(one.gap for one in unequal), [one for one in unequal if not one.gap <= NEAR_TIE]
    which = f"{len(far)} of them not at near-ties" if far else "all at near-ties"
    return f"{start}, {which} (gap at most {widest:.1e}): {', '.join(one.what for one in (far or unequal)[:5])}"


def gap(built: BuiltModel, page_size: int, asked: Submit, answers: tuple[Sequence[int], Sequence[int]]) -> float:
    """`gap_between` the tokens at which two answers to a request part; infinite if one only ends before the other.

    Overwrites KV memory, so no request may be running. In a thread that ends: a second pool of compute threads slows the first.
    """
    place = next((at for at, (one, other) in enumerate(zip(*answers, strict=False)) if one != other), None)
    if place is None:
        return math.inf
    tokens, vocabulary = (*asked.prompt, *answers[0][:place]), built.spec.vocab_size
    pages, every = tuple(range(-(-len(tokens) // page_size))), SamplingParams(temperature=0.0, logprobs=vocabulary)
    row = PlanRow(asked.id, asked.tenant, tokens, len(asked.prompt), 0, len(tokens), pages, True, every, 0.0)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lambda: built.runner.collect(built.runner.launch(StepPlan(1, (row,))))).result().rows[0]
    assert result.logprob is not None, result.error
    logprobs = np.empty(vocabulary)
    for token, logprob in result.logprob.top:
        logprobs[token] = logprob
    return gap_between((answers[0][place], answers[1][place]), logprobs, asked.params.temperature, uniform(asked.seed, place))


def gap_between(tokens: Sequence[int], logprobs: npt.NDArray[np.float64], temperature: float, drawn: float) -> float:
    """How far the further of these tokens is from being chosen under log-probabilities [vocab]: greedily, how much smaller its
    own is than the largest; else how far the number drawn, in [0, 1), is from its share of that interval.

    Logits that are off by d move no border of shares by more than d / (2 x temperature), so one bound does for both.
    """
    if temperature == 0.0:
        return float(logprobs.max() - logprobs[list(tokens)].min())
    weights = np.exp((logprobs - logprobs.max()) / temperature)
    ends = weights.cumsum() / weights.sum()
    begins = ends - weights / weights.sum()
    return float(max(max(begins[token] - drawn, drawn - ends[token], 0.0) for token in tokens))
