"""HyGen's table without noise: `python -m bench.tolerances`. Increase wanted, got, and offline tokens/s, on the manual clock.

The scheduler, its policy, the meter and the control are the engine's own; the runner is the fake one, whose steps take what a
linear cost says (by default about that of the demo model on two cores). So this says whether the mechanism keeps a tolerance
over hundreds of requests, at the 99th percentile too; what a real machine adds, `bench.colocation --sharing slo` says.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.colocate.rig import TRACES
from bench.colocate.sharing import METRICS, TOLERANCES
from bench.colocate.stats import quantile
from bench.colocate.workload import Cost, at_rate, fit_rate, scale_lengths
from bench.traces import TraceRequest, generate_trace
from engine.clock import ManualClock
from engine.core import EngineCore
from engine.fake import FakeRunner, StepCost
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.modes import ModeChooser
from engine.sched.policies import OnlineFirst, SharedStep
from engine.sched.scheduler import Scheduler
from engine.sched.slo import OnlineMeter, SloControl
from engine.types import SamplingParams, Submit, Tenant, TokenOut

_STEP_TOKENS, _LAYERS, _BACKLOG = 512, 30, 48


def make_trace(name: str, cost: StepCost, load: float, count: int, seed: int) -> list[TraceRequest]:
    """So many requests of a kind of traffic, at the rate that keeps online busy for this share of the time alone."""
    burstiness, prompt, output = TRACES[name]
    made = generate_trace(
        rate=1.0, seconds=2.0 * count, burstiness=burstiness, prompt_tokens=prompt, output_tokens=output, seed=seed
    )
    made = scale_lengths(made, 1.0, 1.0)
    alone = Cost(cost.fixed + 16 * cost.per_token, cost.per_token, cost.fixed + cost.per_token)
    return at_rate(made, fit_rate(made, alone, load, 36.0, 60))[:count]


class Simulation:
    """Online requests by the clock, alone or beside endless offline work."""

    def __init__(
        self, trace: Sequence[TraceRequest], cost: StepCost, control: SloControl | None, tolerance: float,
        *, exclusive: bool = False, auto: bool = False,
    ) -> None:  # fmt: skip
        """Offline rows ride where there is a control, and with `auto` only while a ModeChooser says so. With `exclusive` and no
        control, offline work has what online leaves idle."""
        self._clock, self._trace = ManualClock(), trace
        self._beside = exclusive or control is not None
        modes = ModeChooser(self._clock.now()) if auto else None
        self._scheduler = Scheduler(
            KVManager(PagePool(1, 4000), 16, prefix_caching=False),
            OnlineFirst() if control is None else SharedStep(increase=tolerance, control=control, modes=modes),
            self._clock, max_num_seqs=256, max_num_batched_tokens=_STEP_TOKENS, max_model_len=2000,
        )  # fmt: skip
        runner = FakeRunner(page_size=16, cost=cost, clock=self._clock, num_layers=_LAYERS)
        self._core = EngineCore(self._scheduler, runner, interrupted=self._due)
        self._core.modes = modes
        if control is not None:
            self._core.meter = OnlineMeter(control, self._scheduler.delays, self._scheduler.step_time, _STEP_TOKENS)
        self._random = random.Random(1)
        self._next = self._made = 0
        self._first: dict[int, float] = {}
        self.took: dict[str, dict[int, float]] = {"ttft": {}, "tpot": {}}  # seconds by request

    def _due(self) -> bool:
        return self._next < len(self._trace) and self._trace[self._next].arrival_s <= self._clock.now()

    def _submit(self, name: str, tenant: Tenant, prompt: int, output: int, at: float | None = None) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        tokens = tuple(self._random.choices(range(99), k=prompt))
        self._core.submit(Submit(id=name, tenant=tenant, prompt=tokens, params=params, seed=0), at)

    def run(self) -> float:
        """To the last online answer. Returns offline tokens per second."""
        while self._next < len(self._trace) or self._scheduler.unfinished(Tenant.ONLINE):
            while self._due():
                request = self._trace[self._next]
                self._submit(str(self._next), Tenant.ONLINE, request.prompt_tokens, request.output_tokens, request.arrival_s)
                self._next += 1
            while self._beside and self._scheduler.unfinished(Tenant.OFFLINE) < _BACKLOG:
                self._made += 1
                prompt, output = round(160 * self._random.uniform(0.5, 1.5)), round(32 * self._random.uniform(0.5, 1.5))
                self._submit(f"off-{self._made}", Tenant.OFFLINE, prompt, output)
            if not self._core.has_work:
                self._clock.advance_to(self._trace[self._next].arrival_s)
                continue
            for out in self._core.step():
                if out.id.isdecimal():
                    self._saw(out, int(out.id))
        return self._scheduler.counters[Tenant.OFFLINE].computed_tokens / self._clock.now()

    def _saw(self, out: TokenOut, number: int) -> None:
        now, request = self._clock.now(), self._trace[number]
        if number not in self._first:
            self._first[number] = now
            self.took["ttft"][number] = now - request.arrival_s
        if out.finish_reason is not None and request.output_tokens > 1:
            self.took["tpot"][number] = (now - self._first[number]) / (request.output_tokens - 1)

    def metric(self, name: str) -> float:
        """Of all requests but the first quarter, in which a control begins."""
        kind, what = name.split("-")
        late = [took for number, took in self.took[what].items() if number >= len(self._trace) // 4]
        return statistics.fmean(late) if kind == "mean" else quantile(late, 0.99)


def table(args: argparse.Namespace, name: str, load: float) -> Iterator[str]:
    """One line after another, as they are known."""
    cost = StepCost(args.step_ms / 1e3, args.token_ms / 1e3, args.context_ms / 1e3)
    trace = make_trace(name, cost, load, args.requests, args.seed)
    alone = Simulation(trace, cost, None, 0.0)
    alone.run()
    yield f"{name}, online load {load:.0%}; increase got (offline tokens/s):"
    yield ""
    yield "| target | alone, ms | " + " | ".join(f"+{tolerance:.0%}" for tolerance in args.tolerances) + " |"
    yield "|---|--:|" + "--:|" * len(args.tolerances)
    for metric in args.metrics:
        cells = []
        for tolerance in args.tolerances:
            shared = Simulation(trace, cost, SloControl(metric, increase=tolerance), tolerance)
            offline = shared.run()
            cells.append(f"{shared.metric(metric) / alone.metric(metric) - 1:+.1%} ({offline:.0f})")
        yield f"| {metric} | {1e3 * alone.metric(metric):.1f} | {' | '.join(cells)} |"
    yield ""


def choice(args: argparse.Namespace, name: str, load: float) -> Iterator[str]:
    """Exclusive, step and auto, with the first of the metrics as target and the first of the tolerances."""
    cost = StepCost(args.step_ms / 1e3, args.token_ms / 1e3, args.context_ms / 1e3)
    trace = make_trace(name, cost, load, args.requests, args.seed)
    metric, tolerance = args.metrics[0], args.tolerances[0]
    yield f"{name}, online load {load:.0%}; {metric} within +{tolerance:.0%}:"
    yield ""
    yield "| sharing | " + " | ".join(f"{one}, ms" for one in METRICS) + " | offline tok/s |"
    yield "|---|" + "--:|" * (len(METRICS) + 1)
    for sharing in ("none", "exclusive", "step", "auto"):
        control = SloControl(metric, increase=tolerance) if sharing in ("step", "auto") else None
        run = Simulation(trace, cost, control, tolerance, exclusive=sharing == "exclusive", auto=sharing == "auto")
        offline = run.run()
        yield f"| {sharing} | {' | '.join(f'{1e3 * run.metric(one):.1f}' for one in METRICS)} | {offline:.0f} |"
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.tolerances", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--traces", nargs="+", choices=tuple(TRACES), default=list(TRACES))
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="share of the time online is busy alone"
    )
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES))
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--modes", action="store_true", help="compare exclusive, step and auto instead")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=17.5, help="of a step, whatever is in it")
    parser.add_argument("--token-ms", type=float, default=0.45, help="of a token that is computed")
    parser.add_argument("--context-ms", type=float, default=2e-4, help="of a token of context that is read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the tables here too")
    args = parser.parse_args(argv)
    lines = [f"    python -m bench.tolerances {shlex.join(argv)}".rstrip(), ""]
    for name in args.traces:
        for load in args.loads:
            for line in (choice if args.modes else table)(args, name, load):
                print(line, flush=True)
                lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
