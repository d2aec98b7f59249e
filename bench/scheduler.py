"""What scheduling costs, without a model: `python -m bench.scheduler [depth|replay]`.

depth   time of the scheduler per step and resident memory, for jobs of 1,000 to 100,000 offline lines at 256 running; once
        streamed with a bounded number in flight, as a server's batch is, and once with every line queued in the scheduler.
replay  a trace (a public file, or a generated hour) on the manual clock, alone or also with an offline backlog in the gaps.

Times are those of `Scheduler.add`, `schedule` and `update`; the fake runner's own time is not in them.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

import psutil

from bench.traces import PromptMaker, TraceRequest, facts, generate_trace, read_trace
from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.plan import StepPlan, StepResult
from engine.sched.policies import POLICIES, make_policy
from engine.sched.scheduler import Scheduler
from engine.timeline import Timeline
from engine.types import FinishReason, Request, SamplingParams, Submit, Tenant, TokenOut

PAGE_SIZE = 16
PAGES_PER_SLAB = 64
VOCAB_SIZE = 1000
IN_FLIGHT = 2  # times max_num_seqs: what a server's batch keeps in the scheduler
STEP_AIM_MS = 1.0
REPLAY_AIM_S = 60.0


class TimedScheduler(Scheduler):
    """A scheduler that adds up the processor time spent in it. `step_seconds` gets one entry for each step planned."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.step_seconds: list[float] = []
        self.full: list[bool] = []  # whether the step had every place taken
        self.add_seconds = 0.0
        self.update_seconds = 0.0
        self.record_seconds: list[float] = []  # one entry for each step told to the timeline

    def add(self, submit: Submit, arrival: float | None = None) -> Request:
        begin = time.thread_time()
        request = super().add(submit, arrival)
        self.add_seconds += time.thread_time() - begin
        return request

    def schedule(self) -> StepPlan | None:
        begin = time.thread_time()
        plan = super().schedule()
        if plan is not None:
            self.step_seconds.append(time.thread_time() - begin)
            self.full.append(sum(map(self.num_running, Tenant)) >= self.max_num_seqs)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOut]:
        begin = time.thread_time()
        outs = super().update(plan, result)
        spent = time.thread_time() - begin
        self.step_seconds[-1] += spent  # every update follows a plan; a resumed pass counts for the latest one
        self.update_seconds += spent
        return outs


def make_core(clock: ManualClock, args: argparse.Namespace, max_model_len: int) -> tuple[EngineCore, TimedScheduler]:
    """A core on a fake runner, with KV memory for max_num_seqs requests of `args.kv_tokens` tokens each, on average."""
    slabs = max(1, args.max_num_seqs * args.kv_tokens // (PAGE_SIZE * PAGES_PER_SLAB))
    kv = KVManager(PagePool(slabs, PAGES_PER_SLAB), PAGE_SIZE, prefix_caching=args.prefix_caching)
    scheduler = TimedScheduler(
        kv,
        make_policy(args.policy),
        clock,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=min(max_model_len, slabs * PAGES_PER_SLAB * PAGE_SIZE),
        prefix_order=args.offline_order == "prefix",
    )
    cost = StepCost(fixed=args.step_ms / 1e3, per_token=1.0 / args.tokens_per_second)
    runner = FakeRunner(vocab_size=VOCAB_SIZE, page_size=PAGE_SIZE, cost=cost, clock=clock)
    core, timeline = EngineCore(scheduler, runner), Timeline(clock)

    def record(plan: StepPlan, result: StepResult) -> None:
        begin = time.thread_time()
        timeline.step(plan, result)
        scheduler.record_seconds.append(time.thread_time() - begin)

    core.on_step = record
    return core, scheduler


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds per step."""

    steps: int
    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> StepTimes:
        ordered = sorted(seconds) or [0.0]
        p50, p99, top = (1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0))
        return cls(len(seconds), 1e3 * sum(seconds) / max(1, len(seconds)), p50, p99, top)


# -- depth


@dataclass(frozen=True, slots=True)
class DepthResult:
    how: str
    lines: int
    all_steps: StepTimes
    full_steps: StepTimes  # those with max_num_seqs running
    update_share: float  # of the time of all steps: `update`; the rest is `schedule`
    add_us: float  # one Scheduler.add
    record_us: float  # telling the timeline of a step; the median, not in the times above
    finished: int
    base_mb: float  # resident before the first line
    peak_mb: float  # most at any of the moments looked at, all lines and their tokens included
    seconds: float  # the whole run, fake runner included


def offline_lines(lines: int, args: argparse.Namespace) -> Iterator[Submit]:
    """A seeded job: prompts of half to one and a half times `args.prompt`, outputs likewise."""
    rng, prompts = random.Random(args.seed), PromptMaker(VOCAB_SIZE, args.seed)
    for index in range(lines):
        length, output = (rng.randint(max(1, n // 2), max(1, n + n // 2)) for n in (args.prompt, args.output))
        yield Submit(
            id=f"line-{index}",
            tenant=Tenant.OFFLINE,
            prompt=prompts.prompt(TraceRequest(0.0, length, output)),
            params=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
            seed=index,
        )


def run_depth(how: str, lines: int, args: argparse.Namespace) -> DepthResult:
    """Run a job of `lines` lines to its end, in this process; `how` is "streamed", or all lines are queued at once."""
    process, started = psutil.Process(), time.perf_counter()
    clock = ManualClock()
    args.kv_tokens = 2 * (args.prompt + args.output)
    core, scheduler = make_core(clock, args, max_model_len=1 << 20)
    source = offline_lines(lines, args)
    gc.collect()
    base = peak = process.memory_info().rss
    window = IN_FLIGHT * args.max_num_seqs if how == "streamed" else lines
    for submit in islice(source, window):
        core.submit(submit)
    finished = 0
    for step in count():
        if not core.has_work:
            break
        ended = sum(out.finish_reason is FinishReason.LENGTH for out in core.step())
        finished += ended
        for submit in islice(source, ended):
            core.submit(submit)
        if step % 64 == 0:
            peak = max(peak, process.memory_info().rss)
    full = [seconds for seconds, was_full in zip(scheduler.step_seconds, scheduler.full, strict=True) if was_full]
    return DepthResult(
        how=how,
        lines=lines,
        all_steps=StepTimes.of(scheduler.step_seconds),
        full_steps=StepTimes.of(full),
        update_share=scheduler.update_seconds / sum(scheduler.step_seconds),
        add_us=1e6 * scheduler.add_seconds / lines,
        record_us=1e6 * statistics.median(scheduler.record_seconds),
        finished=finished,
        base_mb=base / 1e6,
        peak_mb=peak / 1e6,
        seconds=time.perf_counter() - started,
    )


def depth(args: argparse.Namespace) -> list[DepthResult]:
    """Decoding alone, then every size streamed and queued; each in a process of its own so that memory is its own."""
    print(
        f"Scheduler time per step, {args.max_num_seqs} running, {args.max_num_batched_tokens} tokens a step, prompts about "
        f"{args.prompt}, outputs about {args.output} tokens, policy {args.policy}. Aim: p50 under {STEP_AIM_MS:g} ms."
    )
    print(f"{'':>12} {'lines':>8} {'steps':>7} {'p50 ms':>8} {'mean ms':>8} {'p99 ms':>8} {'max ms':>8} {'update':>7} "
          f"{'add us':>7} {'record us':>9} {'memory MB':>15} {'run s':>7}")  # fmt: skip
    decoding = argparse.Namespace(**vars(args) | {"output": 256})
    cases = [("decode only", args.max_num_seqs, decoding)]
    cases += [(how, lines, args) for lines in args.lines for how in ("streamed", "queued")]
    results: list[DepthResult] = []
    for how, lines, options in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(run_depth, how, lines, options).result()
        results.append(result)
        times = result.full_steps if result.full_steps.steps else result.all_steps
        print(
            f"{how:>12} {lines:>8,} {times.steps:>7,} {times.p50:>8.3f} {times.mean:>8.3f} {times.p99:>8.3f} {times.max:>8.3f} "
            f"{result.update_share:>7.0%} {result.add_us:>7.1f} "
            f"{result.record_us:>9.1f} {result.base_mb:>7.1f}->{result.peak_mb:<6.1f} "
            f"{result.seconds:>7.1f}",
            flush=True,
        )
        assert result.finished == lines, result
    print("Steps counted: those with every place taken (all of them if there were none). Times are processor time.")
    return results


# -- replay


@dataclass(slots=True)
class ReplayResult:
    """One replay; simulated seconds unless said otherwise."""

    trace: str
    backlog: bool
    span_s: float  # simulated time from the first arrival to the last output
    wall_s: float  # real time the replay took
    steps: StepTimes
    ttft_p50: float = 0.0
    ttft_p99: float = 0.0
    tpot_p50: float = 0.0
    tpot_p99: float = 0.0
    finished: int = 0
    offline_tokens: int = 0  # generated by the backlog
    preemptions: int = 0  # of online requests
    shares: dict[str, float] = field(default_factory=dict)  # of the real time: where it went


class _Online:
    """The trace's requests on their way through the core, and what they felt."""

    def __init__(self, trace: list[TraceRequest], max_len: int, clock: ManualClock, seed: int) -> None:
        self._trace = trace
        self._max_len = max_len
        self._clock = clock
        self._prompts = PromptMaker(VOCAB_SIZE, seed)
        self._next = 0
        self._first: dict[str, float] = {}
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.finished = 0

    @property
    def next_arrival(self) -> float | None:
        return self._trace[self._next].arrival_s if self._next < len(self._trace) else None

    @property
    def done(self) -> bool:
        return self.finished == len(self._trace)

    def due(self) -> Iterator[Submit]:
        """The requests that have arrived by now."""
        while (arrival := self.next_arrival) is not None and arrival <= self._clock.now():
            index, request = self._next, self._trace[self._next]
            self._next += 1
            yield Submit(
                id=str(index),
                tenant=Tenant.ONLINE,
                prompt=self._prompts.prompt(request)[: self._max_len - request.output_tokens],
                params=SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True),
                seed=index,
            )

    def saw(self, out: TokenOut) -> None:
        now, request = self._clock.now(), self._trace[int(out.id)]
        if out.id not in self._first:
            self._first[out.id] = now
            self.ttft.append(now - request.arrival_s)
        if out.finish_reason is not None:
            self.finished += 1
            if request.output_tokens > 1:
                self.tpot.append((now - self._first[out.id]) / (request.output_tokens - 1))


def replay_once(name: str, trace: list[TraceRequest], backlog: bool, args: argparse.Namespace) -> ReplayResult:
    """The trace from its first arrival to its last output, with or without an endless offline job in the gaps."""
    clock, started = ManualClock(), time.perf_counter()
    longest = max(request.prompt_tokens + request.output_tokens for request in trace)
    core, scheduler = make_core(clock, args, longest + 1)
    online = _Online(trace, scheduler.max_model_len, clock, args.seed)
    core.interrupted = lambda: (arrival := online.next_arrival) is not None and arrival <= clock.now()
    source = offline_lines(sys.maxsize, args) if backlog else iter(())
    spent = {"add": 0.0, "step": 0.0}
    while not online.done:
        mark = time.perf_counter()
        for submit in online.due():
            core.submit(submit)
        missing = IN_FLIGHT * args.max_num_seqs - scheduler.unfinished(Tenant.OFFLINE)
        for submit in islice(source, missing):
            core.submit(submit)
        if not core.has_work:
            assert online.next_arrival is not None
            clock.advance_to(online.next_arrival)
            continue
        spent["add"] += time.perf_counter() - mark
        mark = time.perf_counter()
        outs = core.step()
        spent["step"] += time.perf_counter() - mark
        for out in outs:
            if out.id.isdecimal():
                online.saw(out)
    wall = time.perf_counter() - started
    scheduling = sum(scheduler.step_seconds)
    ttft, tpot = sorted(online.ttft), sorted(online.tpot) or [0.0]
    return ReplayResult(
        trace=name,
        backlog=backlog,
        span_s=clock.now(),
        wall_s=wall,
        steps=StepTimes.of(scheduler.step_seconds),
        ttft_p50=ttft[len(ttft) // 2],
        ttft_p99=ttft[int(0.99 * (len(ttft) - 1))],
        tpot_p50=tpot[len(tpot) // 2],
        tpot_p99=tpot[int(0.99 * (len(tpot) - 1))],
        finished=online.finished,
        offline_tokens=scheduler.counters[Tenant.OFFLINE].generated_tokens,
        preemptions=scheduler.counters[Tenant.ONLINE].preemptions,
        shares={
            "scheduler": scheduling / wall,
            "fake runner": (spent["step"] - scheduling) / wall,
            "making and adding requests": spent["add"] / wall,
        },
    )


def replay(args: argparse.Namespace) -> list[ReplayResult]:
    """The trace alone, then perhaps with the backlog."""
    if args.trace is None:
        name = f"generated, seed {args.seed}, burstiness {args.burstiness:g}"
        trace = generate_trace(rate=args.rate, seconds=3600.0, burstiness=args.burstiness, seed=args.seed)
    else:
        name, trace = args.trace.name, read_trace(args.trace, args.limit)
    print(f"Trace {name}: {facts(trace)}")
    print(
        f"Fake runner: {args.step_ms:g} ms + tokens / {args.tokens_per_second:,.0f} per second. Aim: an hour in under "
        f"{REPLAY_AIM_S:g} s of real time; online TTFT not worse with a backlog."
    )
    print(f"{'':>14} {'span s':>8} {'real s':>7} {'steps':>8} {'p50 ms':>7} {'p99 ms':>7} {'TTFT p50':>9} {'p99 s':>7} "
          f"{'TPOT p50':>9} {'p99 ms':>7} {'offline tok/s':>14}")  # fmt: skip
    results: list[ReplayResult] = []
    for backlog in (False, True) if args.backlog else (False,):
        result = replay_once(name, trace, backlog, args)
        results.append(result)
        times, how = result.steps, "with backlog" if backlog else "online alone"
        print(
            f"{how:>14} {result.span_s:>8.0f} {result.wall_s:>7.1f} {times.steps:>8,} "
            f"{times.p50:>7.3f} {times.p99:>7.3f} {result.ttft_p50:>9.3f} {result.ttft_p99:>7.2f} "
            f"{1e3 * result.tpot_p50:>9.1f} {1e3 * result.tpot_p99:>7.1f} {result.offline_tokens / result.span_s:>14,.0f}",
            flush=True,
        )
        print(" " * 15 + "real time: " + ", ".join(f"{what} {share:.0%}" for what, share in result.shares.items()))
        assert result.finished == len(trace)
    return results


# -- command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="?", choices=("all", "depth", "replay"), default="all")
    parser.add_argument("--lines", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes of the offline job")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of an offline prompt, about")
    parser.add_argument("--output", type=int, default=32, help="tokens of an offline output, about")
    parser.add_argument("--trace", type=Path, help="Azure, BurstGPT, Mooncake or Vidur file (default: a generated hour)")
    parser.add_argument("--limit", type=int, help="rows of the trace to use")
    parser.add_argument("--rate", type=float, default=2.5, help="requests a second of a generated trace")
    parser.add_argument("--burstiness", type=float, default=3.0, help="coefficient of variation of its gaps; 1 is Poisson")
    parser.add_argument("--backlog", action="store_true", help="replay once more with an offline backlog (minutes)")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument(
        "--kv-tokens", type=int, default=4096, help="replay: KV memory in tokens for each place among the running"
    )
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--offline-order", choices=("prefix", "fcfs"), default="prefix")
    parser.add_argument("--policy", choices=POLICIES, default="online-first")
    parser.add_argument("--step-ms", type=float, default=5.0, help="fixed cost of a fake step")
    parser.add_argument("--tokens-per-second", type=float, default=20_000.0, help="speed of the fake runner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    results: dict[str, list[dict[str, object]]] = {}
    if args.what in ("all", "depth"):
        results["depth"] = [asdict(result) for result in depth(argparse.Namespace(**vars(args)))]
    if args.what in ("all", "replay"):
        results["replay"] = [asdict(result) for result in replay(args)]
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
