"""The order of jobs, and what is predicted of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.jobs_plan import PRIOR_LINES, Load, Rate, plan, tokens_per_line


def order(*loads: Load, rate: float | None = 10.0) -> list[str]:
    return [place.id for place in plan(loads, rate, 1000.0)]


def test_least_slack_first() -> None:
    short = Load("short", 0, 1100.0, 100.0)  # 10 s of work, 90 s of slack
    long = Load("long", 0, 1200.0, 1500.0)  # 150 s of work, 50 s of slack, though its deadline is later
    assert order(short, long) == ["long", "short"]
    assert order(short, long, rate=None) == ["short", "long"], "nothing is known: the earlier deadline"


def test_a_lost_cause_does_not_sink_the_others() -> None:
    lost = Load("lost", 0, 1010.0, 1000.0)
    fine = Load("fine", 0, 1200.0, 1000.0)
    assert order(lost, fine) == ["fine", "lost"]


def test_priority_is_above_slack() -> None:
    assert order(Load("calm", -1, 9000.0, 10.0), Load("tight", 0, 1002.0, 10.0)) == ["calm", "tight"]
    assert order(Load("lost", -1, 1001.0, 1000.0), Load("fine", 0, 2000.0, 10.0)) == ["lost", "fine"]


def test_an_eta_counts_what_goes_before() -> None:
    first, second = plan([Load("b", 0, 1100.0, 300.0), Load("a", 0, 1060.0, 500.0)], 10.0, 1000.0)
    assert (first.id, first.eta_s, first.slack_s) == ("a", 50.0, 10.0)
    assert (second.id, second.eta_s, second.slack_s) == ("b", 80.0, 20.0)


def test_a_job_that_will_miss_is_known_while_it_waits() -> None:
    """Alone it would make it: the one before it takes the time."""
    places = plan([Load("a", 0, 1050.0, 450.0), Load("b", 0, 1070.0, 300.0)], 10.0, 1000.0)
    assert [(place.id, place.slack_s) for place in places] == [("a", 5.0), ("b", -5.0)]


def test_a_held_job_holds_up_nobody() -> None:
    places = plan([Load("held", -5, 1100.0, 500.0, held=True), Load("runs", 0, 1100.0, 100.0)], 10.0, 1000.0)
    assert [place.id for place in places] == ["runs", "held"]
    assert [place.eta_s for place in places] == [10.0, 50.0]


@given(st.lists(st.tuples(st.integers(-1, 1), st.floats(0, 100), st.floats(0, 1000), st.booleans()), max_size=8))
def test_every_job_has_one_place_and_work_is_conserved(jobs: list[tuple[int, float, float, bool]]) -> None:
    loads = [Load(str(i), priority, 1000 + due, left, held) for i, (priority, due, left, held) in enumerate(jobs)]
    places = plan(loads, 10.0, 1000.0)
    assert sorted(place.id for place in places) == sorted(load.id for load in loads)
    running = [place.eta_s for place in places if not place.held]
    assert running == sorted(running)  # type: ignore[type-var]
    if running:
        assert running[-1] == pytest.approx(sum(load.tokens_left for load in loads if not load.held) / 10.0)


def test_tokens_per_line_goes_from_the_estimate_to_what_was_measured() -> None:
    assert tokens_per_line(0, 0, 100.0) == 100.0
    assert tokens_per_line(PRIOR_LINES, PRIOR_LINES * 20, 100.0) == 60.0
    assert tokens_per_line(100_000, 2_000_000, 100.0) == pytest.approx(20.0, rel=0.01)


@given(st.floats(0.1, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_a_constant_flow_has_its_rate_however_it_is_cut(flow: float, spans: list[float]) -> None:
    rate = Rate()
    assert rate.value is None
    for seconds in spans:
        rate.observe(flow * seconds, seconds)
    assert rate.value == pytest.approx(flow)


def test_a_rate_follows_a_change() -> None:
    rate = Rate(half_life=30.0)
    for _ in range(100):
        rate.observe(100.0, 1.0)
    for _ in range(30):
        rate.observe(0.0, 1.0)
    assert rate.value == pytest.approx(50.0, rel=0.15)
