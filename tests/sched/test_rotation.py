"""When host copies pay, as numbers."""

from __future__ import annotations

import math

import pytest

from engine.sched.rotation import CopyTime, DecodeTime, batch_gain, copying_pays, turn_steps


def decode(fixed: float, per_row: float, sizes: tuple[int, ...]) -> DecodeTime:
    """What it says after steps of these sizes, each of which took `fixed` seconds and `per_row` for each row."""
    time = DecodeTime()
    for step in range(400):
        rows = sizes[step % len(sizes)]
        time.observe(rows, fixed + per_row * rows)
    return time


def test_a_row_more_is_tried_until_batches_of_different_sizes_were_seen() -> None:
    time = decode(1.0, 1.0, (4,))
    assert time.per_row == 0.0
    assert batch_gain(4, time.of(4), time.of(5)) == pytest.approx(0.25)


def test_what_a_row_costs_is_learned_from_batches_of_different_sizes() -> None:
    time = decode(2.0, 0.5, (3, 4, 5))
    assert time.per_row == pytest.approx(0.5)
    assert time.of(6) == pytest.approx(5.0)
    assert batch_gain(5, time.of(5), time.of(6)) == pytest.approx(6 * 4.5 / (5 * 5.0) - 1)


@pytest.mark.parametrize("fixed", [0.0, -0.3])  # a step cannot grow by more than its share, whatever noise says
def test_where_a_row_costs_what_it_brings_no_turn_ever_pays(fixed: float) -> None:
    time = decode(fixed, 1.0, (3, 4))
    gain = batch_gain(4, time.of(4), time.of(5))
    assert gain < 0.01
    assert turn_steps(1e-3, 1e-3, time.of(5), gain) == math.inf


def test_a_turn_is_longer_the_more_it_costs_and_the_less_it_gains() -> None:
    assert turn_steps(0.0, 1.0, 0.01, 0.1) == pytest.approx(2 * 1.0 / (0.1 * 0.01))
    assert turn_steps(0.0, 1.0, 0.01, 0.05) > turn_steps(0.0, 1.0, 0.01, 0.1) > turn_steps(0.0, 0.5, 0.01, 0.1)


def test_a_turn_leaves_time_for_the_copies_of_the_next() -> None:
    assert turn_steps(5.0, 0.0, 0.01, 0.5) == pytest.approx(500)


def test_nobody_else_runs_so_any_turn_pays() -> None:
    assert batch_gain(0, 0.0, 1.0) == math.inf
    assert turn_steps(0.0, 1.0, 0.01, math.inf) < math.inf


def test_pages_are_computed_again_where_that_is_faster() -> None:
    copy_time = CopyTime()
    assert copying_pays(10, copy_time, 0.0), "unmeasured: tried"
    copy_time.observe(10, 1.0, 1.0)
    assert copying_pays(10, copy_time, 1.5)
    assert not copying_pays(10, copy_time, 0.5)
