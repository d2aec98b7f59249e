"""The engine benchmark without engines: processes that take turns, the work, the arithmetic and the report."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import tiny_checkpoint

from bench.contender import ROOT, Contender, ContenderError
from bench.engine import LONGEST, SHORTEST, SINGLE_TOKENS, Floors, Match, Work, common_prefix, make_work, parser, report
from bench.peers.pipe import Setup, Single, chunks
from engine.spec import load_spec
from engine.tokenizer import Tokenizer

HARNESS = """
from bench.contender import Contender
from bench.peers.pipe import Setup
with Contender("orphan", "tests.bench.scripted_driver", Setup("", 1)) as contender:
    print(contender._tree()[0].pid, flush=True)
    input()
"""
WORK = Work(singles=[[5, 6]], batch=[[1, 2], [3, 4, 5]], count=4)


def scripted(label: str = "scripted", **options: Any) -> Contender:
    return Contender(label, "tests.bench.scripted_driver", Setup("", 1, options))


@pytest.fixture
def contender() -> Iterator[Contender]:
    with scripted() as contender:
        yield contender


def stands_still(contender: Contender) -> bool:
    """Signals take their time to arrive."""
    process = contender._tree()[0]
    for _ in range(500):
        if process.status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.01)
    return False


def test_a_contender_answers_its_turn_and_stands_still_after_it(contender: Contender) -> None:
    assert contender.name == "scripted"
    assert stands_still(contender)
    for _ in range(2):
        turn = contender.turn("batch", prompts=[[1, 2], [7]], count=2, size=None)
        assert turn.result == [[3, 4], [8, 9]]
        assert turn.seconds >= 0
        assert stands_still(contender)
    assert contender.memory_mb() > 1


def test_a_contender_that_cannot_load_says_why() -> None:
    with pytest.raises(ContenderError, match="no such model"), scripted(broken=True):
        pass


def test_an_error_and_a_death_are_told_with_what_was_printed() -> None:
    with scripted() as contender:
        with pytest.raises(ContenderError, match="no attribute"):
            contender.turn("nonsense")
        with pytest.raises(ContenderError, match=r"exit status 3(.|\n)*engines print what they like"):
            contender.turn("die")


def test_leaving_ends_the_process() -> None:
    with scripted() as contender:
        process = contender._tree()[0]
    assert not process.is_running()


def test_a_contender_does_not_outlive_a_harness_that_is_killed() -> None:
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert harness.stdin and harness.stdout
    with harness:
        process = psutil.Process(int(harness.stdout.readline()))
        harness.kill()
    process.wait(30)  # raises TimeoutExpired if it lives on


def test_single_counts_first_and_last() -> None:
    single = Single()
    single.add()
    assert single.first == 0.0
    single.add(1)
    single.add(2, 3)
    assert single.tokens == [1, 2, 3]
    assert 0 < single.first <= single.last


def test_chunks_put_prompts_of_like_length_together() -> None:
    groups = chunks([[0] * n for n in (9, 1, 8, 2, 5)], 2)
    assert groups == [[1, 3], [4, 2], [0]]


def test_prompts_are_reproducible_and_tokenize_to_themselves(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint(tmp_path))
    work = make_work(tokenizer, prompts=6, singles=2, count=8)
    assert work == make_work(tokenizer, prompts=6, singles=2, count=8)
    assert [len(prompt) for prompt in work.singles] == [SINGLE_TOKENS] * 2
    assert all(SHORTEST <= len(prompt) <= LONGEST for prompt in work.batch)
    for prompt in (*work.singles, *work.batch):
        assert tokenizer.encode(tokenizer.decode(prompt), add_special=False) == prompt
    assert len({tuple(prompt[:16]) for prompt in (*work.singles, *work.batch)}) == 8


def test_floors_count_every_weight_once_a_step_and_each_product_twice(tmp_path: Path) -> None:
    spec = load_spec(
        tiny_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=264, head_dim=8)
    )
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # q and o, k and v, the three of the MLP
    floors = Floors.of(spec, Work(singles=[], batch=[[0] * 10], count=1))
    assert floors.step_bytes == 4 * (2 * layer + 32 * 264)
    attention = 2 * 4 * 4 * 8 * sum(range(1, 11))  # layers, (product + add) for scores and values, heads, head_dim, pairs
    assert floors.batch_flop == 10 * 2 * 2 * layer + attention + 2 * 32 * 264


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert common_prefix([], [1]) == 0


@pytest.mark.parametrize(("gap", "near_ties"), [(5e-5, 3), (0.1, 0)])
def test_a_match_finds_the_best_batch_size_and_judges_differences(tmp_path: Path, gap: float, near_ties: int) -> None:
    args = parser().parse_args(["--rounds", "2", "--patience", "0"])
    args.batch_size = {}
    with contextlib.ExitStack() as stack:
        contenders = [
            stack.enter_context(scripted("sluice", differ_at=2)),
            stack.enter_context(scripted("transformers", gap=gap, seconds_by_size={"1": 2.0, "2": 0.0})),
        ]
        limits = stack.enter_context(scripted("limits"))
        match = Match(contenders, limits, WORK, args)
        match.prepare()
        match.play()
        equality = match.equality("sluice")
    score = match.scores["transformers"]
    assert score.size == 2
    assert set(score.tried) == {1, 2}
    assert len(score.batch) == len(score.ttft) == 2
    assert equality is not None
    assert (equality.identical, equality.prompts, equality.mean_prefix) == (0, 3, 2.0)
    assert (equality.differences, equality.near_ties) == (3, near_ties)
    floors = Floors.of(load_spec(tiny_checkpoint(tmp_path)), WORK)
    text = "\n".join(report(match, WORK, floors, {"sluice": equality, "transformers": None}))
    assert "0/3 outputs identical" in text
    assert f"{near_ties} of 3 differences are near-ties" in text
    assert "static batches of 2 (tried 1: " in text
