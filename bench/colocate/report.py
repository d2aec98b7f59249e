"""The tables: every number from the runs of one invocation, ratios within a round, medians over rounds with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.colocate.arms import (
    AGAIN,
    ALONE,
    FIFO,
    MEMORY_ARMS,
    NO_COOL_DOWN,
    NO_GATE,
    NO_RESERVE,
    OFFLINE_ALONE,
    OS_ONLY,
    OVERLOAD,
    SLUICE,
    VICTIM_ARMS,
    Run,
)
from bench.colocate.servers import Probe
from bench.colocate.stats import middle, quantile, ratio

TTFT_AIM, TPOT_AIM, HARVEST_AIM, VICTIMS_AIM, FREEZE_AIM_MS = 1.05, 1.02, 0.90, 0.229, 1.0
Runs = Sequence[Run]


class Results:
    """All runs, by arm and round."""

    def __init__(self, runs: Runs, probes: Mapping[str, Probe | None]) -> None:
        self.runs = runs
        self._runs = {(run.arm, run.round): run for run in runs}
        self.probes = probes

    def of(self, arm: str) -> list[Run]:
        return [run for (name, _), run in sorted(self._runs.items(), key=lambda item: item[0][1]) if name == arm]

    def has(self, *arms: str) -> bool:
        return all(any(name == arm for name, _ in self._runs) for arm in arms)

    def pairs(self, arm: str, base: str) -> list[tuple[Run, Run]]:
        """The runs of both arms that replayed the same window."""
        return [(run, self._runs[base, run.round]) for run in self.of(arm) if (base, run.round) in self._runs]


def ttfts(run: Run) -> list[float]:
    return [answer.ttft for answer in run.good]


def tpots(run: Run) -> list[float]:
    return [answer.tpot for answer in run.good if answer.output_tokens > 1]


def paired(run: Run, base: Run, value: Callable[[Run], list[float]]) -> float:
    """Median over requests of the request's value over its own value in the base run."""
    if run.answers and len(run.good) == len(run.answers) == len(base.good):
        return statistics.median(ratio(a, b) for a, b in zip(value(run), value(base), strict=True))
    return math.nan


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown that also reads well as it is."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


# -- the tables


def interference(results: Results) -> list[str]:
    """What offline work does to online requests."""
    rows = []
    for arm in (ALONE, AGAIN, NO_GATE, OS_ONLY, NO_COOL_DOWN, SLUICE):
        if not results.has(arm):
            continue
        pairs = results.pairs(arm, ALONE)
        cells = [arm]
        for value in (ttfts, tpots):
            for share in (0.5, 0.99):
                ratios = [ratio(quantile(value(run), share), quantile(value(base), share)) for run, base in pairs]
                cells.append("1" if arm == ALONE else middle(ratios))
            cells.append("1" if arm == ALONE else middle([paired(run, base, value) for run, base in pairs], 3))
        runs = results.of(arm)
        cells.append(f"{1e3 * quantile([t for run in runs for t in ttfts(run)], 0.5):.0f}")
        cells.append(f"{1e3 * quantile([t for run in runs for t in tpots(run)], 0.5):.1f}")
        cells.append(number(statistics.median(run.offline_tokens()[1] / run.seconds for run in runs)))
        rows.append(cells)
    head = ["arm", "TTFT p50", "TTFT p99", "TTFT same request", "TPOT p50", "TPOT p99", "TPOT same request"]
    lines = ["## Interference: ratio to online alone", "", *table([*head, "TTFT ms", "TPOT ms", "offline tok/s"], rows), ""]
    counts = [len(run.good) for run in results.of(ALONE)]
    lines.append(
        f"Ratios are taken within a round, medians [lowest-highest] over {len(counts)} rounds of {', '.join(map(str, counts))} "
        f"requests; p99 of so few is nearly their maximum. '{AGAIN}' repeats the baseline: what it is off 1 is noise."
    )
    return [*lines, *_verdicts(results)]


def _verdicts(results: Results) -> list[str]:
    if not results.has(SLUICE, ALONE):
        return []
    lines = []
    for name, value, aim in (("TTFT", ttfts, TTFT_AIM), ("TPOT", tpots, TPOT_AIM)):
        for share in (0.5, 0.99):
            ratios = [ratio(quantile(value(r), share), quantile(value(b), share)) for r, b in results.pairs(SLUICE, ALONE)]
            middle_ratio = statistics.median(ratios)
            met = "met" if middle_ratio <= aim else "MISSED"
            lines.append(f"- {name} p{100 * share:.0f}: {middle_ratio:.3f}, wanted at most {aim}: {met}")
    return ["", *lines]


def harvest(results: Results) -> list[str]:
    """How much of the idle time became offline tokens."""
    lines = ["## Harvest: offline tokens out of online's idle time", ""]
    shares, rows = [], []
    for run, base in results.pairs(SLUICE, ALONE):
        full = next((r for r, other in results.pairs(OFFLINE_ALONE, SLUICE) if other is run), None)
        if full is None:
            continue
        idle = 1.0 - base.busy_share
        ratios = [ratio(part, whole * idle) for part, whole in zip(run.offline_tokens(), full.offline_tokens(), strict=True)]
        shares.append(ratios[1])
        rates = [run.offline_tokens()[1] / run.seconds, full.offline_tokens()[1] / full.seconds]
        cells = [str(run.round), f"{base.busy_share:.2f}", *(number(rate) for rate in rates[::-1])]
        rows.append([*cells, f"{ratios[1]:.3f}", f"{ratios[0]:.3f}"])
    head = ["round", "online alone busy", "offline alone tok/s", "Sluice tok/s", "harvest", "harvest, output tokens only"]
    lines += [*table(head, rows), ""]
    if shares:
        met = "met" if statistics.median(shares) >= HARVEST_AIM else "MISSED"
        lines.append(f"- harvest {middle(shares, 3)}, wanted at least {HARVEST_AIM}: {met}")
    return lines


def bounds(results: Results) -> list[str]:
    """Preemptions per online request, and how fast the gate is."""
    rows = []
    worst, slowest = -1, math.nan
    arms = [arm for arm in (NO_COOL_DOWN, SLUICE, *MEMORY_ARMS, *VICTIM_ARMS[:2], OVERLOAD) if results.has(arm)]
    for arm in arms:
        runs, probe = results.of(arm), results.probes.get(arm)
        costs = [answer.cost for run in runs for answer in run.good if answer.cost is not None]
        caused = [cost["preemptions"] for cost in costs]
        waits = [1e-3 * cost["waited_us"] for cost in costs if cost["preemptions"]]
        worst = max([worst, *caused, *map(counted_preemptions, runs)])
        if arm == SLUICE:
            slowest = quantile(waits, 0.99)
        cells = [arm, str(len(costs)), str(sum(caused)), str(max(caused, default=0))]
        cells += [f"{quantile(waits, 0.5):.3f} / {quantile(waits, 0.99):.3f}" if waits else "-"]
        cells += [number(sum(run.grew("sluice_preemptions_total", drained=True, reason="false_alarm") or 0.0 for run in runs))]
        cells += [f"{probe.freeze_p50:.3f} / {probe.freeze_p99:.3f}"] if probe else ["-"]
        cells += [f"{probe.thaw_p50:.3f} / {probe.thaw_p99:.3f}"] if probe else ["-"]
        rows.append(cells)
    head = ["arm", "online requests", "preemptions", "most by one request", "freeze p50 / p99 ms", "false alarms"]
    lines = ["## Bounds: preemptions and the gate", ""]
    lines += [*table([*head, "probe: freeze p50 / p99 ms", "probe: thaw p50 / p99 ms"], rows), ""]
    lines += ["Freezes while serving: from the decision to the worker standing still, as online answers tell it."]
    met = "not measured" if worst < 0 else "met" if worst <= 1 else "MISSED"
    lines.append(f"- preemptions per online request: max {worst if worst >= 0 else '-'}, wanted at most 1: {met}")
    if math.isfinite(slowest):
        verdict = "met" if slowest < FREEZE_AIM_MS else "MISSED"
        lines.append(f"- freeze p99 with Sluice: {slowest:.3f} ms, wanted under {FREEZE_AIM_MS:g}: {verdict}")
    return lines


def counted_preemptions(run: Run) -> int:
    """Most preemptions that one online request caused, by the server's own histogram; -1 if it has none, 99 if beyond it."""
    before, after = (scrape.buckets("sluice_request_preemptions") for scrape in (run.before, run.drained))
    if not after:
        return -1
    grew = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    most = next((bound for bound, count in sorted(grew.items()) if count >= grew[math.inf]), 0.0)
    return 99 if math.isinf(most) else int(most)


def _per_minute(runs: Runs, name: str, **labels: str) -> list[float]:
    grown = [(run.grew(name, drained=False, **labels), run.seconds) for run in runs]
    return [60 * value / seconds for value, seconds in grown if value is not None]


def _waiting(run: Run) -> float:
    """Online requests waiting, mean over the samples of the window."""
    seen = [scrape.value("sluice_num_requests_waiting", tenant="online") for at, scrape in run.samples if at < run.seconds]
    known = [value for value in seen if value is not None]
    return statistics.fmean(known) if known else math.nan


def memory(results: Results) -> list[str]:
    """What the rule for online's reserve does, where KV memory is short."""
    rows = []
    for arm in MEMORY_ARMS:
        runs = results.of(arm)
        if runs:
            rows.append(
                [
                    arm,
                    middle(_per_minute(runs, "sluice_reclaims_total"), 1),
                    middle([1e3 * quantile(ttfts(run), 0.5) for run in runs], 0),
                    middle([1e3 * quantile(ttfts(run), 0.99) for run in runs], 0),
                    middle([_waiting(run) for run in runs]),
                    middle(_per_minute(runs, "sluice_recomputed_tokens_total", tenant="offline"), 0),
                    middle([run.offline_tokens()[1] / run.seconds for run in runs], 0),
                ]
            )
    head = ["reserve", "reclaims/min", "TTFT p50 ms", "TTFT p99 ms", "online waiting, mean", "offline tokens lost/min"]
    return ["## Memory: how much online keeps", "", *table([*head, "offline tok/s"], rows)]


def victims(results: Results) -> list[str]:
    """Whose memory is taken."""
    rows, lost = [], {}
    for arm in VICTIM_ARMS:
        runs = results.of(arm)
        if not runs:
            continue
        again = [run.grew("sluice_recomputed_tokens_total", tenant="offline") or 0.0 for run in runs]
        computed = [run.grew("sluice_computed_tokens_total", tenant="offline") or math.nan for run in runs]
        lost[arm] = statistics.fmean(ratio(a, c) for a, c in zip(again, computed, strict=True))
        rows.append(
            [
                "least lost work" if arm == NO_RESERVE else arm,
                middle(_per_minute(runs, "sluice_reclaims_total"), 1),
                middle(_per_minute(runs, "sluice_recomputed_tokens_total", tenant="offline"), 0),
                middle([100 * ratio(a, c) for a, c in zip(again, computed, strict=True)], 1),
                middle([run.offline_tokens()[1] / run.seconds for run in runs], 0),
            ]
        )
    head = ["victims (no reserve)", "reclaims/min", "offline tokens lost/min", "throughput lost to it, %", "offline tok/s"]
    lines = ["## Victims: whose memory is taken", "", *table(head, rows), ""]
    if results.has(FIFO, NO_RESERVE) and lost[FIFO] > 0:
        less = 1 - lost[NO_RESERVE] / lost[FIFO]
        met = "met" if less >= VICTIMS_AIM else "MISSED"
        lines.append(f"- loss {less:.1%} smaller than FIFO's, wanted at least {VICTIMS_AIM:.1%}: {met}")
    return lines


def overloaded(results: Results) -> list[str]:
    """Offline work before, during and after a burst of online work far beyond capacity."""
    rows = []
    for run in results.of(OVERLOAD):
        for name, begin, end in _phases(run):
            cells = [str(run.round), name, f"{begin:.0f}-{end:.0f}", number(_offline_rate(run, begin, end))]
            rows.append([*cells, middle([1e3 * answer.ttft for answer in run.good if begin <= answer.arrival < end], 0)])
    failed = sum(answer.error is not None for run in results.of(OVERLOAD) for answer in run.answers)
    lines = ["## Overload: online far beyond capacity for a third of the window", ""]
    lines += table(["round", "phase", "seconds", "offline tok/s", "TTFT ms of online arrivals"], rows)
    return [*lines, "", f"The phase lasts until the last request of the burst is answered. Online requests failed: {failed}."]


def _phases(run: Run) -> list[tuple[str, float, float]]:
    """Before the burst; from its first arrival to the answer of its last request; after that."""
    begin, end = run.seconds / 3, 2 * run.seconds / 3
    answered = max((answer.end for answer in run.answers if begin <= answer.arrival < end), default=end)
    return [("before", 0.0, begin), ("overload", begin, answered), ("after", answered, max(run.samples[-1][0], answered))]


def _offline_rate(run: Run, begin: float, end: float) -> float:
    """Offline tokens a second between the samples nearest to both ends."""
    first, last = (min(run.samples, key=lambda sample: abs(sample[0] - at)) for at in (begin, end))
    before, after = (scrape.value("sluice_computed_tokens_total", tenant="offline") or 0.0 for _, scrape in (first, last))
    return ratio(after - before, last[0] - first[0])


def quality(results: Results) -> list[str]:
    """Whether to believe the numbers: failures, and what else the processors did."""
    runs = results.runs
    failed = [answer.error for run in runs for answer in run.answers if answer.error]
    others, stolen = (middle([run.cores.get(key, math.nan) for run in runs]) for key in ("others", "stolen"))
    lines = [
        f"Online requests: {sum(len(run.answers) for run in runs)}, failed: {len(failed)}; "
        f"offline errors: {sum(run.offline_errors for run in runs)}.",
        f"Cores used by others during the windows (the idle servers among them): {others}; stolen: {stolen}.",
    ]
    lines += [f"First failure: {failed[0]}"] if failed else []
    said = next((run.offline_last_error for run in runs if run.offline_errors), "")
    return lines + ([f"Last offline error: {said}"] if said else [])
