"""One model for both tenants: `python -m bench.colocation --sharing [ablation|order|response|slo|modes]`.

In one process, so that all arms run on the same loaded model: each window gets a core and a loop of its own, requests go in by
`EngineLoop.put` when the trace says so, and tokens are timed where they leave the loop. Arms take turns, round after round.
Tables are generators: they yield what they know after each window, so that a run that is cut short has said that much.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.colocate.equal import Unequal, gap, said
from bench.colocate.stats import quantile
from bench.colocate.workload import Backlog, Cost, Planned, at_rate, choose_windows, fit_rate, plan, scale_lengths
from bench.engine import machine
from bench.latency_model import look
from bench.traces import PromptMaker, generate_trace
from engine.build import build_core, load_model
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineDead
from engine.loop import EngineLoop
from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow, StepPlan
from engine.sched.policies import Budget, Priority, make_policy
from engine.sched.stopping import LAYER_BUCKETS
from engine.sched.view import View
from engine.types import SamplingParams, Submit, Tenant, TokenOut

WHAT = ("ablation", "order", "response", "slo", "modes")
TOLERANCES = (0.05, 0.1, 0.2, 0.3, 0.5)
METRICS = ("mean-ttft", "p99-ttft", "mean-tpot", "p99-tpot")
ALONE, PRIORITY, BUDGET, LAYERS, COPIES = "online only", "priority", "+ budget", "+ layer preemption", "+ host copies"
TRACES = {"chat": (1.0, 48, 32), "code": (3.0, 128, 6)}  # burstiness of the gaps; median prompt and output tokens


@dataclass(frozen=True)
class Capped(Priority):
    """Priority with a fixed number of offline tokens a step: what one sets by hand for want of a latency target."""

    beside: int  # online rows
    alone: int

    @classmethod
    def of(cls, text: str) -> Capped:
        """From "8", or "8/64" where steps without online rows may hold more."""
        beside, _, alone = text.partition("/")
        return cls(int(beside), int(alone or beside))

    def budget(self, view: View) -> Budget:
        return replace(super().budget(view), offline=self.beside if view.unfinished(Tenant.ONLINE) else self.alone)


@dataclass(slots=True)
class Window:
    """One arm's share of one round, raw. Times in seconds."""

    arm: str
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    offline_tokens: int = 0  # processed, prompts and outputs, those computed again not counted twice
    recomputed: int = 0
    responses: list[int] = field(default_factory=list)
    scale: float = 1.0
    mode: str = ""
    asked: dict[str, Submit] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Traffic:
    """One window on its way through a loop: online by the clock, offline kept at `depth` in flight."""

    def __init__(self, core: EngineCore, requests: Sequence[Planned], backlog: Callable[[], Submit] | None, depth: int) -> None:
        self._core, self._requests, self._next, self._depth = core, requests, backlog, depth
        core.close = lambda: None  # type: ignore[method-assign]  # the model is needed again
        self._sent: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._tokens: dict[str, list[int]] = {}
        self._left = len(requests)
        self._open = True
        self._done = threading.Event()
        self.window = Window("")
        self.loop = EngineLoop(core, self._saw, self._died)

    def _died(self, error: EngineDead) -> None:
        self._done.set()
        raise error

    def run(self, warm: float, seconds: float) -> Window:
        """Offline alone for `warm` seconds, then the window; returns when all online requests are over."""
        for _ in range(self._depth if self._next is not None else 0):
            self._put(self._next())  # type: ignore[misc]
        time.sleep(warm)
        counters = self._core.scheduler.counters[Tenant.OFFLINE]
        before, recomputed = counters.computed_tokens, counters.recomputed_tokens
        began = time.perf_counter()
        for number, request in enumerate(self._requests):
            time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
            name = f"on-{number}"
            self._sent[name] = time.perf_counter()
            self._put(submit(name, Tenant.ONLINE, request.prompt, request.output_tokens))
        time.sleep(max(0.0, began + seconds - time.perf_counter()))
        window = self.window
        window.seconds = time.perf_counter() - began
        window.recomputed = counters.recomputed_tokens - recomputed
        window.offline_tokens = counters.computed_tokens - before - window.recomputed
        self._open = False
        if self._left:
            self._done.wait(60)
        self.loop.close()  # the counters below move no more
        window.responses = list(self._core.stop_rule.responses.counts)
        window.scale = self._core.meter.control.scale if self._core.meter else 1.0
        window.mode = self._core.mode.value
        window.outputs |= {name: tuple(tokens) for name, tokens in self._tokens.items() if name in window.outputs}
        return window

    def _saw(self, outs: list[TokenOut]) -> None:
        now = time.perf_counter()
        for out in outs:
            tokens = self._tokens.setdefault(out.id, [])
            if out.token is not None:
                tokens.append(out.token)
            online = out.id in self._sent
            if online and out.id not in self._first:
                self._first[out.id] = now
                self.window.ttft.append(now - self._sent[out.id])
            if out.finish_reason is None:
                continue
            self.window.outputs[out.id] = ()
            if online:
                if len(tokens) > 1:
                    self.window.tpot.append((now - self._first[out.id]) / (len(tokens) - 1))
                self._left -= 1
                if not self._left:
                    self._done.set()
            elif self._open and self._next is not None:
                self._put(self._next())

    def _put(self, asked: Submit) -> None:
        self.window.asked[asked.id] = asked
        self.loop.put(asked)


def submit(name: str, tenant: Tenant, prompt: Sequence[int], output: int) -> Submit:
    """Every third request is sampled with a seed, the others are greedy."""
    seed = hash(tuple(prompt)) % 1000
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.8 if seed % 3 == 0 else 0.0, seed=seed)
    return Submit(id=name, tenant=tenant, prompt=tuple(prompt), params=params, seed=seed)


class Rig:
    """The loaded model, its costs, and traffic fitted to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = EngineConfig(model=args.online_model, kv_cache_memory=args.sharing_kv_memory, host_kv_memory=1 << 30)
        self.built = load_model(self.config)
        self._used = False  # its window is mapped
        self.error = 0.0  # of predicted step times, at the end of the latest window
        self.prompts = PromptMaker(self.built.spec.vocab_size, args.seed)
        self._pairs: dict[str, dict[str, tuple[int, ...]]] = {}
        self.unequal: list[Unequal] = []
        self.step_time = StepTime()  # not the user's: what it knows must not depend on what ran here before
        self.core({})  # maps the window
        say("learning step times")
        options = (self.step_time, self.built, self.config.page_size, 60.0, 200, args.seed)
        learner = threading.Thread(target=look, args=options)  # which ends: a second pool of compute threads slows the first
        learner.start()
        learner.join()
        if not self.step_time.ready:
            raise SystemExit("error: steps take too long here to learn anything of them; is the machine busy?")
        self.cost = self._calibrate()

    def core(self, options: dict[str, Any]) -> EngineCore:
        """A core with these options of the engine; `policy`: a baseline by name, `cap`: priority with so many offline tokens a
        step, `layers`: False stops no pass, `copies`."""
        options = dict(options)
        policy, layers, copies = options.pop("policy", None), options.pop("layers", True), options.pop("copies", False)
        cap = options.pop("cap", None)
        built = self.built if copies else replace(self.built, copier=None)
        if self._used and built.window is not None:
            for slab in range(built.num_slabs):
                built.window.unmap(slab)
        self._used = True
        core = build_core(self.config.with_options(**options), built, step_time=self.step_time)
        if policy is not None:
            core.scheduler.policy = make_policy(policy)
        if cap is not None:
            core.scheduler.policy = Capped.of(cap)
        core.interrupted = (lambda: False) if not layers else core.interrupted
        return core

    def run(
        self, arm: str, options: dict[str, Any], requests: Sequence[Planned], *, warm: float = 1.5, seconds: float = 0.0,
        offline: bool = True, key: str = "",
    ) -> Window:  # fmt: skip
        core = self.core(options)
        made = Backlog(self.built.spec.vocab_size, 160, 32, self.args.seed + 1)
        numbers = iter(range(1 << 30))

        def more() -> Submit:
            prompt, output = made.next()
            return submit(f"off-{next(numbers)}", Tenant.OFFLINE, prompt, output)

        traffic = Traffic(core, requests, more if offline else None, self.args.sharing_depth)
        if options.get("layers", True):
            core.interrupted, core.waiting = traffic.loop.online_at_the_door, traffic.loop.waiting
        try:
            window = traffic.run(warm, seconds)
        finally:
            traffic.loop.close()
        window.arm = arm
        self.error = self.step_time.error
        self._compare(arm, key, window)
        return window

    def _compare(self, arm: str, key: str, window: Window) -> None:
        """Whoever answered a request before must have answered the same."""
        known = self._pairs.setdefault(key, {})
        for name, tokens in window.outputs.items():
            if (before := known.setdefault(name, tokens)) != tokens:
                parted = gap(self.built, self.config.page_size, window.asked[name], (before, tokens))
                self.unequal.append(Unequal(f"{arm} {key} {name}", parted))

    def _calibrate(self) -> Cost:
        """What an online request costs alone, from the model of step times."""
        model = self.step_time
        first, long = model.predict(Load().plus(0, 16)), model.predict(Load().plus(0, 272))
        return Cost(first, max(0.0, (long - first) / 256), model.predict(Load().plus(64, 1)))

    def windows(self, trace: str, load: float, seconds: float, count: int) -> list[list[Planned]]:
        """Windows of a trace that keep online busy for this share of the time."""
        burstiness, prompt, output = TRACES[trace]
        made = generate_trace(
            rate=1.0, seconds=1000.0, burstiness=burstiness, prompt_tokens=prompt, output_tokens=output, seed=self.args.seed
        )
        made = scale_lengths(made, 1.0, 1.0)
        fitted = at_rate(made, fit_rate(made, self.cost, load, seconds, 8 * count))
        return [plan(window, self.prompts) for window in choose_windows(fitted, self.cost, load, seconds, count)]


# -- tables


def pooled(windows: Sequence[Window]) -> dict[str, float]:
    """All rounds of an arm together; milliseconds and tokens per second."""
    ttft = [value for window in windows for value in window.ttft]
    tpot = [value for window in windows for value in window.tpot]
    seconds = sum(window.seconds for window in windows)
    return {
        "requests": len(ttft),
        "mean-ttft": 1e3 * statistics.fmean(ttft) if ttft else math.nan,
        "p99-ttft": 1e3 * quantile(ttft, 0.99),
        "mean-tpot": 1e3 * statistics.fmean(tpot) if tpot else math.nan,
        "p99-tpot": 1e3 * quantile(tpot, 0.99),
        "offline": sum(window.offline_tokens for window in windows) / max(seconds, 1e-9),
        "recomputed": sum(window.recomputed for window in windows),
    }


def rounds(rig: Rig, arms: dict[str, dict[str, Any]], trace: str) -> Iterator[dict[str, list[Window]]]:
    """Every arm on every window, the order turning; what there is after each. Beyond the first, no round begins that would
    pass `--sharing-limit`."""
    args, began = rig.args, time.perf_counter()
    windows: dict[str, list[Window]] = {arm: [] for arm in arms}
    for number, requests in enumerate(rig.windows(trace, args.load, args.sharing_seconds, args.rounds)):
        spent = time.perf_counter() - began
        if args.sharing_limit and number and spent * (number + 1) / number > args.sharing_limit / len(args.traces):
            say(f"{trace}: no time for round {number}")
            return
        names = list(arms)
        shift = number * 2 % len(names)
        for arm in names[shift:] + names[:shift]:
            options = dict(arms[arm])
            offline, key = options.pop("offline", True), f"{trace} {args.load} {number}"
            window = rig.run(arm, options, requests, seconds=args.sharing_seconds, offline=offline, key=key)
            windows[arm].append(window)
            values = pooled([window])
            say(f"{trace} round {number} {arm}: TTFT {values['mean-ttft']:.0f} ms, TPOT {values['mean-tpot']:.1f} ms, "
                f"offline {values['offline']:.0f} tok/s, scale {window.scale:.2f}, {window.mode}")  # fmt: skip
            yield {arm: found for arm, found in windows.items() if found}


def ablation(rig: Rig) -> Iterator[list[str]]:
    """ConServe's table: what each part adds; and priority held to the same tails by a cap set by hand."""
    args = rig.args
    step = {"sharing": "step", "slo_increase": args.tolerance}
    priority = {"layers": False, "offline_max_batched_tokens": 512}
    capped = {f"priority, {cap} a step": priority | {"cap": cap} for cap in args.caps}
    arms: dict[str, dict[str, Any]] = {
        ALONE: {"offline": False},
        PRIORITY: priority | {"policy": "priority"},
        LAYERS: step,
        **capped,
        BUDGET: step | {"layers": False},
        COPIES: step | {"copies": True},
    }
    shown = (ALONE, PRIORITY, *capped, BUDGET, LAYERS, COPIES)
    lines = ["## What each part adds", "", f"Tolerance {args.tolerance:.0%}.", ""]
    for trace in args.traces:
        part: list[str] = []
        for found in rounds(rig, arms, trace):
            values = {arm: pooled(found[arm]) for arm in shown if arm in found}
            part = [_loaded(trace, args), "", *_head("arm", "recomputed")]
            part += [_row(arm, value, "recomputed") for arm, value in values.items()]
            part += ["", *_against(values, capped, args.tolerance), ""]
            yield lines + part
        lines += part


def _against(values: dict[str, dict[str, float]], capped: Sequence[str] | dict[str, Any], tolerance: float) -> list[str]:
    """Offline throughput and tails against priority as it is, and against its best cap whose time per token is in bounds."""
    if not {ALONE, PRIORITY, LAYERS} <= set(values):
        return []
    limit = values[ALONE]["p99-tpot"] * (1 + tolerance)
    within = [arm for arm in capped if arm in values and values[arm]["p99-tpot"] <= limit]
    said = []
    for base in (PRIORITY, *([max(within, key=lambda arm: values[arm]["offline"])] if within else ())):
        ratios = {name: values[LAYERS][name] / max(values[base][name], 1e-9) for name in ("offline", *METRICS)}
        tails = ", ".join(f"{name} x{ratios[name]:.2f}" for name in ("p99-ttft", "p99-tpot"))
        said.append(f"{LAYERS}: offline x{ratios['offline']:.2f} of {base}; {tails}.")
    if set(capped) <= set(values) and not within:
        said.append(f"No cap that was tried keeps p99 TPOT within {limit:.1f} ms.")
    return said


def modes(rig: Rig) -> Iterator[list[str]]:
    """Whether `auto` is as good as the better of the two on each trace."""
    args = rig.args
    arms: dict[str, dict[str, Any]] = {ALONE: {"offline": False}}
    arms |= {name: {"sharing": name, "slo_increase": args.tolerance} for name in ("exclusive", "step", "auto")}
    lines = ["## Choice of mode", "", f"Tolerance {args.tolerance:.0%}.", ""]
    for trace in args.traces:
        part: list[str] = []
        for found in rounds(rig, arms, trace):
            part = [_loaded(trace, args), "", *_head("arm", "requests")]
            part += [_row(arm, pooled(windows), "requests") for arm, windows in found.items()]
            if len(found) == len(arms):
                best = max(pooled(found[name])["offline"] for name in ("exclusive", "step"))
                share = pooled(found["auto"])["offline"] / max(best, 1e-9)
                part += ["", f"auto has {share:.1%} of the better one's offline tokens."]
            part.append("")
            yield lines + part
        lines += part


def slo(rig: Rig) -> Iterator[list[str]]:
    """HyGen's table: increase wanted, increase got, and what offline has of it."""
    args = rig.args
    lines = ["## Tolerance and what it yields", ""]
    for trace in args.traces:
        arms: dict[str, dict[str, Any]] = {ALONE: {"offline": False}}
        for metric in args.metrics:
            for tolerance in args.tolerances:
                arms[f"{metric} {tolerance:.0%}"] = {"sharing": "step", "slo_increase": tolerance, "slo_metric": metric}
        part: list[str] = []
        for found in rounds(rig, arms, trace):
            part = [_loaded(trace, args), "", "| target | got | offline tok/s | scale at the end | requests |",
                    "|---|--:|--:|--:|--:|"]  # fmt: skip
            alone = pooled(found.get(ALONE, []))
            for arm in [arm for arm in found if arm != ALONE]:
                metric, values = arm.split()[0], pooled(found[arm])
                scale = statistics.fmean(window.scale for window in found[arm])
                got = values[metric] / alone[metric] - 1
                part.append(f"| {arm} | {got:+.1%} | {values['offline']:.0f} | {scale:.2f} | {values['requests']:.0f} |")
            part.append("")
            yield lines + part
        lines += part


def order(rig: Rig) -> Iterator[list[str]]:
    """A job whose prompts begin alike in groups, lines shuffled, with less KV memory than the beginnings need."""
    rng = random.Random(rig.args.seed)
    vocabulary = rig.built.spec.vocab_size
    heads = [rng.choices(range(vocabulary), k=192) for _ in range(rig.args.groups)]
    prompts = [head + rng.choices(range(vocabulary), k=24) for head in heads for _ in range(rig.args.members)]
    rng.shuffle(prompts)
    lines = ["## Offline order", "", f"{len(prompts)} lines of {len(prompts[0])} tokens in {len(heads)} groups that share 192, "
             f"{rig.args.sharing_window} in flight, KV memory for {rig.args.order_tokens:,} tokens.", "",
             "| order | prompt tokens computed | seconds | lines/s |", "|---|--:|--:|--:|"]  # fmt: skip
    spent: dict[str, list[tuple[int, float]]] = {"fcfs": [], "prefix": []}
    for number in range(rig.args.rounds):
        for name in sorted(spent, reverse=bool(number % 2)):
            spent[name].append(_job(rig, name, prompts, number))
            say(f"order {name}: {spent[name][-1]}")
            rows = []
            for done, runs in spent.items():
                computed, seconds = (statistics.median(values) for values in zip(*runs, strict=True)) if runs else (0, math.inf)
                rows.append(f"| {done} | {computed:,.0f} | {seconds:.1f} | {len(prompts) / seconds:.1f} |")
            yield [*lines, *rows, ""]


def _job(rig: Rig, name: str, prompts: Sequence[Sequence[int]], number: int) -> tuple[int, float]:
    """Prompt tokens computed and seconds of a job in this order."""
    core = rig.core({"offline_order": name, "max_num_seqs": 16})
    slabs = max(1, rig.args.order_tokens // (rig.built.pages_per_slab * rig.config.page_size))
    for slab in range(slabs, rig.built.num_slabs):
        core.scheduler.lose_slab(slab)
    waiting, began = list(enumerate(prompts)), time.perf_counter()
    asked: dict[str, Submit] = {}
    outputs: dict[str, list[int]] = {}
    while waiting or core.has_work:
        while waiting and core.scheduler.unfinished(Tenant.OFFLINE) < rig.args.sharing_window:
            line, prompt = waiting.pop(0)
            asked[str(line)] = submit(str(line), Tenant.OFFLINE, prompt, 4)
            core.submit(asked[str(line)])
        for out in core.step():
            outputs.setdefault(out.id, []).append(out.token or 0)
    seconds = time.perf_counter() - began
    answers = {line: tuple(tokens) for line, tokens in outputs.items()}
    rig._compare(name, "order", Window(name, asked=asked, outputs=answers))
    counters = core.scheduler.counters[Tenant.OFFLINE]
    return counters.computed_tokens - counters.generated_tokens + len(prompts), seconds


def response(rig: Rig) -> Iterator[list[str]]:
    """Layers from an arrival to the stop, and what looking costs when nobody comes."""
    rng = random.Random(rig.args.seed)
    short = [Planned(0.4 * n + rng.uniform(0, 0.2), tuple(rng.choices(range(1000), k=16)), 2) for n in range(rig.args.arrivals)]
    window = rig.run("response", {}, short, seconds=0.4 * rig.args.arrivals, key="response")
    bounds = [*map(str, LAYER_BUCKETS), "more"]
    counts = {bound: count for bound, count in zip(bounds, window.responses, strict=True) if count}
    ratios, looks = _polling(rig)
    yield [
        "## Stopping an offline pass", "",
        f"{sum(counts.values())} passes stopped, by layers from the arrival to the stop: "
        + ", ".join(f"{bound}: {count}" for bound, count in counts.items())
        + f" (of {rig.built.runner.num_layers}). TTFT p50 {1e3 * quantile(window.ttft, 0.5):.1f} ms, "
        f"p99 {1e3 * quantile(window.ttft, 0.99):.1f} ms.",
        f"Looking between layers when nobody comes: {statistics.median(ratios) - 1:+.2%} of a step of 64 tokens "
        f"(median of {len(ratios)} pairs, quartiles {quantile(ratios, 0.25) - 1:+.2%} to {quantile(ratios, 0.75) - 1:+.2%}); "
        f"{looks * 1e6:.2f} us a look.", "",
    ]  # fmt: skip


def _polling(rig: Rig) -> tuple[list[float], float]:
    """Times of equal steps with and without looking, in pairs; and the seconds of one look."""
    core = rig.core({})
    loop = EngineLoop(core, lambda outs: None, lambda error: None)
    core.close = lambda: None  # type: ignore[method-assign]
    core.interrupted, core.waiting = loop.online_at_the_door, loop.waiting
    tokens = tuple(range(64))
    row = PlanRow("x", Tenant.OFFLINE, tokens, 64, 0, 64, (0, 1, 2, 3), True, SamplingParams(temperature=0.0), 0.0)
    runner, ratios = rig.built.runner, []
    for number in range(rig.args.pairs):
        took = {}
        for looking in (True, False) if number % 2 else (False, True):
            began = time.perf_counter()
            runner.collect(runner.launch(StepPlan(1, (row,), preemptible=True), core._stop if looking else None))
            took[looking] = time.perf_counter() - began
        ratios.append(took[True] / took[False])
    began = time.perf_counter()
    for _ in range(10_000):
        core._stop(1)
    look = (time.perf_counter() - began) / 10_000
    loop.close()
    return ratios, look


def _loaded(trace: str, args: argparse.Namespace) -> str:
    return f"{trace}, online load {args.load:.0%}:"


def _head(first: str, last: str) -> list[str]:
    return [f"| {first} | TTFT mean ms | p99 | TPOT mean ms | p99 | offline tok/s | {last} |", "|---|--:|--:|--:|--:|--:|--:|"]


def _row(name: str, values: dict[str, float], last: str) -> str:
    cells = [f"{values[metric]:.1f}" for metric in METRICS]
    return f"| {name} | {' | '.join(cells)} | {values['offline']:.0f} | {values[last]:.0f} |"


# -- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from engine.config import parse_bytes

    group = parser.add_argument_group("one model for both tenants")
    group.add_argument("--sharing", choices=WHAT, help="measure this instead: one model, shared steps")
    group.add_argument("--traces", nargs="+", choices=tuple(TRACES), default=list(TRACES))
    group.add_argument("--load", type=float, default=0.5, help="share of the time that online is busy alone")
    group.add_argument("--tolerance", type=float, default=0.2, help="by which online may get slower")
    group.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES), help="for the table of tolerances")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    group.add_argument("--sharing-seconds", type=float, default=12.0, help="of each window")
    group.add_argument("--sharing-limit", type=float, help="seconds after which no round begins but the first of each trace")
    group.add_argument("--caps", nargs="+", default=["2", "4", "8", "4/64"],
        help="ablation: offline tokens a step, or beside online rows / without them, that priority is held to")  # fmt: skip
    group.add_argument("--sharing-depth", type=int, default=48, help="offline requests in flight")
    group.add_argument("--sharing-kv-memory", type=parse_bytes, default=parse_bytes("512MiB"))
    group.add_argument("--groups", type=int, default=32, help="order: beginnings that lines share")
    group.add_argument("--members", type=int, default=6, help="order: lines for each of them")
    group.add_argument("--order-tokens", type=int, default=4096, help="order: tokens of KV memory")
    group.add_argument("--sharing-window", type=int, default=96, help="order: lines in flight")
    group.add_argument("--arrivals", type=int, default=60, help="response: online requests")
    group.add_argument("--pairs", type=int, default=200, help="response: pairs of steps")


def quick(args: argparse.Namespace) -> None:
    """The least of everything: does it work?"""
    args.sharing_seconds, args.rounds, args.traces = 2.0, 1, args.traces[:1]
    args.metrics, args.tolerances = ["mean-tpot"], [0.2]
    args.caps, args.groups, args.members, args.arrivals, args.pairs = ["8"], 4, 3, 3, 3


def main(args: argparse.Namespace) -> int:
    """Measure one table, print it, and keep it in `args.out`, as it comes."""
    if args.quick:
        quick(args)
    rig = Rig(args)
    table = {"ablation": ablation, "order": order, "response": response, "slo": slo, "modes": modes}[args.sharing]
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join([args.sharing, *(args.traces if len(args.traces) == 1 else ())])
    text = ""
    try:
        for lines in table(rig):
            text = "\n".join(_about(rig) + lines + _compared(rig))
            (folder / f"{name}.md").write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        say("interrupted: what follows is what was measured until then")
    print(text)
    return 0


def _about(rig: Rig) -> list[str]:
    about, cost = machine(), rig.cost
    return [f"{about['cpu']}, {about['cores']} cores; {rig.built.path.name}; step times mispredicted by "
            f"{rig.error:.1%}; an online request takes {1e3 * cost.first:.0f} ms, {1e3 * cost.prompt_token:.2f} ms per "
            f"prompt token, {1e3 * cost.output_token:.0f} ms per token.", "",
            f"    python -m bench.colocation {shlex.join(sys.argv[1:])}", ""]  # fmt: skip


def _compared(rig: Rig) -> list[str]:
    return [said(sum(map(len, rig._pairs.values())), rig.unequal), ""]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
