"""Answers that differ: how far apart the tokens were at which they part, and what is said of them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_checkpoint
from oracle import Oracle

from bench.colocate.equal import Unequal, gap, gap_between, said
from engine.build import build_core, load_model
from engine.config import EngineConfig
from engine.types import SamplingParams, Submit, Tenant

LOGPROBS = np.log(np.array([0.2, 0.5, 0.3]))


@pytest.mark.parametrize(
    ("tokens", "temperature", "drawn", "expected"),
    [
        ((1, 2), 0.0, 0.0, math.log(0.5 / 0.3)),
        ((2, 0), 0.0, 0.0, math.log(0.5 / 0.2)),  # neither is the likeliest
        ((0, 1), 1.0, 0.2 + 1e-7, 1e-7),  # the border between the two
        ((1, 0), 1.0, 0.2 - 1e-7, 1e-7),
        ((0, 2), 1.0, 0.5, 0.3),  # one has a share that ends at 0.2, the other's begins at 0.7
        ((1, 2), 0.5, 0.04 / 0.38, (0.25 + 0.04) / 0.38 - 0.04 / 0.38),  # shares as 0.04, 0.25 and 0.09
    ],
)
def test_the_gap_is_that_of_the_further_token(tokens, temperature, drawn, expected):
    assert gap_between(tokens, LOGPROBS, temperature, drawn) == pytest.approx(expected)


def test_the_least_gap_to_another_answer_is_the_oracles_margin_where_they_part(tmp_path: Path):
    folder = tiny_checkpoint(tmp_path, "llama")
    config = EngineConfig(model=str(folder), threads=1, kv_cache_memory=8 << 20)
    built = load_model(config, progress=False)
    build_core(config, built)  # maps the window
    prompt = [random.Random(3).randrange(256) for _ in range(40)]
    answer = Oracle(folder).greedy(prompt, 6)
    asked = Submit(id="x", tenant=Tenant.OFFLINE, prompt=tuple(prompt), params=SamplingParams(temperature=0.0), seed=0)
    others = [[*answer.tokens[:3], token, 0, 0] for token in range(built.spec.vocab_size) if token != answer.tokens[3]]

    gaps = [gap(built, config.page_size, asked, (answer.tokens, other)) for other in others]

    assert min(gaps) == pytest.approx(answer.margins[3], abs=1e-5)
    assert gap(built, config.page_size, asked, (answer.tokens, answer.tokens[:3])) == math.inf
    built.runner.close()


def test_a_table_says_whether_all_differences_are_near_ties():
    near, far = Unequal("capped chat off-3", 2e-6), Unequal("capped chat off-8", 0.5)
    assert said(195, []) == "Outputs: 195 requests, 0 answered differently by some arm."
    assert said(195, [near]).endswith(
        "1 answered differently by some arm, all at near-ties (gap at most 2.0e-06): capped chat off-3"
    )
    assert said(195, [near, far]).endswith("1 of them not at near-ties (gap at most 5.0e-01): capped chat off-8")
    assert "1 of them not" in said(195, [near, Unequal("nothing comes of not-a-number", math.nan)])
