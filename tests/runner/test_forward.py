"""Plans as tensors: order of tokens, rows left out, and which prompt tokens a chunk predicts."""

from __future__ import annotations

import pytest
import torch
from runner_cases import make_row

from engine import forward
from engine.sched.plan import StepPlan

CPU = torch.device("cpu")


def test_rows_lie_one_after_another() -> None:
    rows = (make_row("a", [5, 6, 7, 8], start=1, count=2), make_row("b", [9, 10, 11], start=2, sample=True))
    batch = forward.build(StepPlan(0, rows), CPU)

    assert batch.token_ids.tolist() == [6, 7, 11]
    assert batch.positions.tolist() == [1, 2, 2]
    assert (batch.meta.starts, batch.meta.counts, batch.meta.offsets) == ((1, 2), (2, 1), (0, 2))
    assert batch.sampled == (1,) and batch.sample_rows.tolist() == [2]


def test_later_growth_of_the_sequence_does_not_matter() -> None:
    tokens = [1, 2, 3]
    row = make_row("a", tokens, start=1, count=2, sample=True)
    tokens.append(4)
    assert forward.build(StepPlan(0, (row,)), CPU).token_ids.tolist() == [2, 3]


@pytest.mark.parametrize("count", [0, 4])
def test_a_row_must_have_its_tokens(count: int) -> None:
    with pytest.raises(ValueError, match="request a"):
        forward.build(StepPlan(0, (make_row("a", [1, 2, 3], start=0, count=count),)), CPU)


def test_without_keeps_order_and_places() -> None:
    rows = tuple(make_row(name, [1, 2, 3], start=0, count=count) for name, count in (("a", 2), ("b", 1), ("c", 3)))
    plan, places = forward.without(StepPlan(7, rows, preemptible=True), frozenset({"b", "x"}))

    assert [row.request_id for row in plan.rows] == ["a", "c"]
    assert places == [0, 1, 3, 4, 5]
    assert plan.step == 7 and plan.preemptible


@pytest.mark.parametrize(
    ("start", "count", "num_prompt", "targets"),
    [(0, 4, 4, [11, 12, 13]), (0, 2, 4, [11, 12]), (2, 2, 4, [13]), (2, 3, 4, [13]), (4, 1, 4, []), (0, 1, 1, [])],
)
def test_prompt_targets_stay_within_the_prompt(start: int, count: int, num_prompt: int, targets: list[int]) -> None:
    row = make_row("a", [10, 11, 12, 13, 14, 15], start=start, count=count, num_prompt=num_prompt)
    assert list(forward.prompt_targets(row)) == targets
