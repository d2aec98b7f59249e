"""The colocation benchmark's arithmetic: scaling of traces, statistics, what it reads out of servers, and its tables."""

from __future__ import annotations

import math

import pytest

from bench.colocate import report
from bench.colocate.arms import AGAIN, ALONE, FIFO, NO_RESERVE, OFFLINE_ALONE, OVERLOAD, SHARING, SLUICE, Run
from bench.colocate.client import Answer, read_stream
from bench.colocate.servers import Probe, Scrape
from bench.colocate.stats import covered, middle, quantile
from bench.colocate.workload import (
    LONGEST_OUTPUT,
    LONGEST_PROMPT,
    Backlog,
    Cost,
    Planned,
    at_rate,
    choose_windows,
    cut_windows,
    fit_rate,
    length_factors,
    overload,
    plan,
    renewed,
    scale_lengths,
)
from bench.colocation import chosen
from bench.traces import PromptMaker, TraceRequest, generate_trace
from engine.colocate.gate import ProbeResult

COST = Cost(first=0.02, prompt_token=0.001, output_token=0.02)


def requests(*arrivals: float) -> list[TraceRequest]:
    return [TraceRequest(at, 100, 10) for at in arrivals]


# -- statistics


def test_covered_time_counts_overlaps_once_and_nothing_outside() -> None:
    assert covered([(1.0, 3.0), (2.0, 4.0), (9.0, 12.0), (2.5, 2.6), (-1.0, 0.5)], 10.0) == pytest.approx(4.5)


def test_quantiles_lie_between_the_values() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == pytest.approx(2.5)
    assert quantile([5.0], 0.99) == 5.0
    assert math.isnan(quantile([], 0.5))


def test_a_middle_leaves_out_what_is_not_known() -> None:
    assert middle([3.0, math.nan, 1.0, 2.0], 1) == "2.0 [1.0-3.0]"
    assert middle([math.nan]) == "-"


# -- workload


def test_lengths_are_scaled_to_the_wanted_medians_and_bounded() -> None:
    trace = [TraceRequest(0.0, 1000, 10), TraceRequest(1.0, 2000, 20), TraceRequest(2.0, 90_000, 900)]
    scaled = scale_lengths(trace, *length_factors(trace, 100, 10))
    assert [(r.prompt_tokens, r.output_tokens) for r in scaled] == [(50, 5), (100, 10), (LONGEST_PROMPT, LONGEST_OUTPUT)]


def test_windows_cut_the_trace_and_start_it_again() -> None:
    windows = cut_windows(requests(0.0, 1.0, 5.0, 9.0), 5.0, 3)
    assert [[round(r.arrival_s, 2) for r in window] for window in windows[:2]] == [[0.0, 1.0], [0.0, 4.0]]
    assert [round(r.arrival_s, 2) for r in windows[2]] == [1.25, 2.25]


def test_busy_time_is_prefills_one_after_the_other_and_decodes_side_by_side() -> None:
    # 0.12 s of prefill each, then 0.2 s of decode: 0.32 s for the first, 0.12 s more for the second.
    assert COST.busy(requests(1.0, 1.0), 10.0) == pytest.approx(0.044)


@pytest.mark.parametrize("busy", [0.2, 0.4, 0.6])
def test_the_rate_is_fitted_to_the_wanted_busy_share(busy: float) -> None:
    trace = scale_lengths(generate_trace(rate=1.0, seconds=2000.0, burstiness=2.5, seed=3), 0.1, 0.1)
    scaled = at_rate(trace, fit_rate(trace, COST, busy, 25.0, 24))
    windows = cut_windows(scaled, 25.0, 24)
    assert sum(COST.busy(window, 25.0) for window in windows) / 24 == pytest.approx(busy, abs=0.02)
    for window in choose_windows(scaled, COST, busy, 25.0, 3):
        assert COST.busy(window, 25.0) == pytest.approx(busy, abs=0.12)


def test_overload_is_the_trace_faster_in_the_middle_third() -> None:
    made = overload(requests(*(0.1 * i for i in range(1000))), 9.0, 10.0)
    parts = [sum(3 * third <= r.arrival_s < 3 * third + 3 for r in made) for third in range(3)]
    assert parts[1] == pytest.approx(300, abs=2)
    assert parts[0] == parts[2] == pytest.approx(30, abs=2)
    assert sorted(r.arrival_s for r in made) == [r.arrival_s for r in made]


def test_a_plan_has_the_tokens_of_the_trace() -> None:
    (planned,) = plan([TraceRequest(1.5, 33, 7)], PromptMaker(500))
    assert (planned.arrival_s, len(planned.prompt), planned.output_tokens) == (1.5, 33, 7)


def test_a_renewed_request_shares_no_prefix_with_any_of_its_earlier_selves() -> None:
    planned = Planned(1.0, (5, 7, 7), 4)
    again = renewed(renewed(planned))
    assert (again.arrival_s, again.prompt[1:], again.output_tokens) == (1.0, (7, 7), 4)
    assert len({planned.prompt[0], renewed(planned).prompt[0], again.prompt[0]}) == 3


def test_the_backlog_never_repeats_itself_and_keeps_its_means() -> None:
    backlog = Backlog(500, 100, 40, seed=1)
    work = [backlog.next() for _ in range(300)]
    assert len({prompt for prompt, _ in work}) == 300
    assert sum(len(prompt) for prompt, _ in work) / 300 == pytest.approx(100, rel=0.1)
    assert sum(wanted for _, wanted in work) / 300 == pytest.approx(40, rel=0.1)


def test_an_arm_whose_server_is_not_wanted_gets_its_own() -> None:
    assert [arm.server for arm in chosen(SHARING, {ALONE, OFFLINE_ALONE})] == [ALONE, OFFLINE_ALONE]
    assert [arm.server for arm in chosen(SHARING, {SLUICE, OFFLINE_ALONE})] == [SLUICE, SLUICE]


# -- what servers say


def test_events_have_the_time_of_the_piece_that_completed_them() -> None:
    answer = Answer(0.0, 0.5, 3, 3)
    first = b'data: {"choices": [{"text": "a"}], "usage": null}\n\ndata: {"choi'
    second = b'ces": [{"text": "b"}]}\n\n: still here\n\n'
    third = b'data: {"choices": [{"text": ""}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
    read_stream([(1.0, first), (2.0, second), (4.0, third), (4.5, b"data: [DONE]\n\n")], answer)
    assert answer.times == [1.0, 2.0, 4.0]
    assert (answer.ttft, answer.tpot, answer.usage) == (0.5, 1.5, {"completion_tokens": 3})


def test_an_error_event_is_an_error() -> None:
    answer = Answer(0.0, 0.0, 3, 3)
    read_stream([(1.0, b'data: {"error": {"message": "no"}}\n\n')], answer)
    assert answer.error == "no"


def test_the_probe_is_read_as_the_engine_writes_it() -> None:
    log = f"... info engine.colocate: {ProbeResult('process', True, (1e-4,) * 20, (2e-3,) * 20)}\n"
    assert Probe.find(log) == Probe("process", 0.1, 0.1, 2.0, 2.0, 20)
    assert Probe.find("nothing") is None


METRICS = """# TYPE sluice_reclaims counter
sluice_reclaims_total {reclaims}
# TYPE sluice_generation_tokens counter
sluice_generation_tokens_total{{tenant="offline",model_name="b"}} {out}
sluice_generation_tokens_total{{tenant="online",model_name="a"}} 7
# TYPE sluice_computed_tokens counter
sluice_computed_tokens_total{{tenant="offline"}} {computed}
# TYPE sluice_recomputed_tokens counter
sluice_recomputed_tokens_total{{tenant="offline"}} {again}
# TYPE sluice_request_preemptions histogram
sluice_request_preemptions_bucket{{le="0"}} {none}
sluice_request_preemptions_bucket{{le="1"}} {one}
sluice_request_preemptions_bucket{{le="+Inf"}} {one}
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 3
"""


def scrape(reclaims: int = 0, out: int = 0, computed: int = 0, again: int = 0, none: int = 0, one: int = 0) -> Scrape:
    return Scrape.parse(METRICS.format(reclaims=reclaims, out=out, computed=computed, again=again, none=none, one=one))


def test_metrics_are_found_by_name_and_labels() -> None:
    seen = scrape(reclaims=2, out=5)
    assert seen.value("sluice_generation_tokens_total", tenant="offline") == 5.0
    assert seen.value("sluice_generation_tokens_total") == 12.0
    assert seen.value("sluice_nothing") is None
    assert seen.value("process_cpu_seconds_total") is None


# -- tables


def run(arm: str, number: int = 0, slow: float = 1.0, end: Scrape | None = None, preemptions: int = 0) -> Run:
    """Four requests, each busy for a second of the ten; TTFT and TPOT `slow` times 0.2 and 0.1 s."""
    made = Run(arm, number, 10.0, before=scrape(), after=end or scrape(), drained=end or scrape())
    for index in range(4):
        times = [2.0 * index + slow * (0.2 + 0.1 * token) for token in range(9)]
        cost = {"waited_us": 300 * preemptions, "preemptions": preemptions, "slabs_reclaimed": 0}
        made.answers.append(Answer(2.0 * index, 2.0 * index, 50, 9, times, times[-1], {"colocation": cost}))
    made.samples = [(float(at), end or scrape()) for at in range(11)]
    return made


def text(lines: list[str]) -> str:
    return "\n".join(lines)


def test_interference_is_a_ratio_to_the_same_round() -> None:
    runs = [run(ALONE, 0), run(ALONE, 1, slow=2.0), run(SLUICE, 0, slow=1.04), run(SLUICE, 1, slow=2.08), run(AGAIN, 0)]
    said = text(report.interference(report.Results(runs, {})))
    assert "- TTFT p99: 1.040, wanted at most 1.05: met" in said
    assert "- TPOT p50: 1.040, wanted at most 1.02: MISSED" in said


def test_failed_requests_are_not_measured_but_told() -> None:
    broken = run(SLUICE)
    broken.answers[0].error = "status 500"
    results = report.Results([run(ALONE), broken], {})
    assert "failed: 1" in text(report.quality(results))
    assert math.isnan(report.paired(broken, results.of(ALONE)[0], report.ttfts))


def test_harvest_is_the_share_of_what_idle_time_could_have_made() -> None:
    # Online alone is busy for 4 of 10 seconds, so six tenths of 1000 tokens were there to be had.
    full, shared = scrape(out=500, computed=1000), scrape(out=285, computed=600, again=30)
    runs = [run(ALONE), run(OFFLINE_ALONE, end=full), run(SLUICE, end=shared)]
    said = text(report.harvest(report.Results(runs, {})))
    assert "- harvest 0.950, wanted at least 0.9: met" in said


def test_offline_tokens_come_from_the_client_where_the_server_does_not_count_them() -> None:
    made = run(SLUICE, end=Scrape())
    made.offline_done = [(-1.0, 10, 5), (3.0, 10, 5), (9.9, 20, 6), (10.5, 1, 1)]
    assert made.offline_tokens() == (11.0, 41.0)


@pytest.mark.parametrize(("most", "verdict"), [(1, "met"), (2, "MISSED")])
def test_bounds_take_the_worst_request(most: int, verdict: str) -> None:
    runs = [run(SLUICE, preemptions=1, end=scrape(none=0, one=4)), run(FIFO, preemptions=most)]
    said = text(report.bounds(report.Results(runs, {SLUICE: Probe("process", 0.1, 0.2, 0.3, 0.4, 20)})))
    assert f"max {most}, wanted at most 1: {verdict}" in said
    assert "freeze p99 with Sluice: 0.300 ms, wanted under 1: met" in said


def test_the_servers_own_histogram_counts_too() -> None:
    assert report.counted_preemptions(run(SLUICE, end=scrape(none=3, one=4))) == 1
    assert report.counted_preemptions(run(SLUICE, end=Scrape())) == -1


def test_victims_are_compared_by_what_was_computed_again() -> None:
    fifo, least = scrape(reclaims=5, computed=1000, again=200), scrape(reclaims=5, computed=1000, again=100)
    results = report.Results([run(FIFO, end=fifo), run(NO_RESERVE, end=least)], {})
    assert "loss 50.0% smaller than FIFO's" in text(report.victims(results))
    assert "| no reserve | 30.0" in text(report.memory(results))


def test_overload_tells_before_during_and_after() -> None:
    made = run(OVERLOAD)
    made.samples = [(float(at), scrape(computed=100 * min(at, 3) + 100 * max(0, at - 7))) for at in range(11)]
    rows = [line for line in report.overloaded(report.Results([made], {})) if line.startswith("| 0")]
    assert [row.split("|")[4].strip() for row in rows] == ["100", "0", "100"]
