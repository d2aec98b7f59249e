"""One model for both tenants: `python -m bench.colocation --sharing [ablation|order|response|slo|modes]`.

All arms run in one process on the same loaded model (`rig`) and take turns, round after round. Tables are
generators: they yield what they know after each window, so that a run that is cut short has said that much.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.colocate.equal import said
from bench.colocate.rig import TRACES, Rig, Window, say, submit
from bench.colocate.servers import Clock
from bench.colocate.stats import quantile
from bench.colocate.workload import Planned
from bench.engine import machine
from engine.loop import EngineLoop
from engine.sched.plan import PlanRow, StepPlan
from engine.sched.stopping import LAYER_BUCKETS
from engine.types import SamplingParams, Submit, Tenant

WHAT = ("ablation", "order", "response", "slo", "modes")
TOLERANCES = (0.05, 0.1, 0.2, 0.3, 0.5)
METRICS = ("mean-ttft", "p99-ttft", "mean-tpot", "p99-tpot")
ALONE = "online only"
PRIORITY, BUDGET, LAYERS, COPIES = "priority", "+ budget", "+ layer preemption", "+ host copies"
NOBODY_RIDES = "layer preemption, nobody rides"


# -- tables


def pooled(windows: Sequence[Window]) -> dict[str, float]:
    """All rounds of an arm together; milliseconds and tokens per second, by the steady clock; `wall-`: by the usual one."""
    seconds = sum(window.seconds for window in windows)
    values: dict[str, float] = {}
    for what in ("ttft", "tpot", "wall_ttft", "wall_tpot"):
        took = [value for window in windows for value in getattr(window, what).values()]
        name = what.removeprefix("wall_")
        clock = what.removesuffix(name).replace("_", "-")
        values[f"{clock}mean-{name}"] = 1e3 * statistics.fmean(took) if took else math.nan
        values[f"{clock}p99-{name}"] = 1e3 * quantile(took, 0.99)
    return {
        **values,
        "requests": sum(len(window.ttft) for window in windows),
        "offline": sum(window.offline_tokens for window in windows) / max(seconds, 1e-9),
        "pace": seconds / max(sum(window.wall_seconds for window in windows), 1e-9),
        **{name: sum(getattr(window, name) for window in windows) for name in ("recomputed", "copied", "restored")},
    }


def rounds(rig: Rig, arms: dict[str, dict[str, Any]], trace: str, load: float) -> Iterator[dict[str, list[Window]]]:
    """Every arm on every window, the order turning; what there is after each. Beyond the first, no round begins that would
    pass `--sharing-limit`."""
    args, began = rig.args, time.perf_counter()
    windows: dict[str, list[Window]] = {arm: [] for arm in arms}
    span = args.sharing_lead + args.sharing_seconds
    for number, requests in enumerate(rig.windows(trace, load, span, args.rounds)):
        spent = time.perf_counter() - began
        if args.sharing_limit and number and spent * (number + 1) / number > args.sharing_limit / len(_cases(args)):
            say(f"{trace} {load:.0%}: no time for round {number}")
            return
        names = list(arms)
        shift = number * 2 % len(names)
        for arm in names[shift:] + names[:shift]:
            options = dict(arms[arm])
            offline, key = options.pop("offline", True), f"{trace} {load} {number}"
            for _ in range(1 + args.retries):  # until nobody else uses the machine; what was measured plays no part in that
                before = Clock.read()
                window = rig.run(
                    arm, options, requests, lead=args.sharing_lead, seconds=args.sharing_seconds, offline=offline, key=key
                )
                cores = Clock.read().since(before)
                if cores["others"] + cores["stolen"] < args.quiet:
                    break
                say(f"{arm}: others used {cores['others']:.2f} cores, {cores['stolen']:.2f} were stolen")
            windows[arm].append(window)
            values = pooled([window])
            say(f"{trace} {load:.0%} round {number} {arm}: TTFT {values['mean-ttft']:.0f} ms, "
                f"TPOT {values['mean-tpot']:.1f} ms, offline {values['offline']:.0f} tok/s, scale {window.scale:.2f}, "
                f"{window.mode}; pace {values['pace']:.2f}, others {cores['others'] + cores['stolen']:.2f} cores")  # fmt: skip
            yield {arm: found for arm, found in windows.items() if found}


def _cases(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Each trace at each load."""
    return [(trace, load) for trace in args.traces for load in args.loads]


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
        NOBODY_RIDES: {"sharing": "exclusive"},
    }
    arms = {name: options for name, options in arms.items() if not args.arms or name in args.arms}
    shown = (ALONE, PRIORITY, *capped, BUDGET, LAYERS, COPIES, NOBODY_RIDES)
    lines = ["## What each part adds", "", f"Tolerance {args.tolerance:.0%}.", ""]
    for trace, load in _cases(args):
        part: list[str] = []
        for found in rounds(rig, arms, trace, load):
            values = {arm: pooled(found[arm]) for arm in shown if arm in found}
            part = [f"{trace}, online load {load:.0%}:", "", *_head("arm", "recomputed", "copied", "restored")]
            part += [_row(arm, value, "recomputed", "copied", "restored") for arm, value in values.items()]
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
    for trace, load in _cases(args):
        part: list[str] = []
        for found in rounds(rig, arms, trace, load):
            part = [f"{trace}, online load {load:.0%}:", "", *_head("arm", "requests")]
            part += [_row(arm, pooled(windows), "requests") for arm, windows in found.items()]
            if len(found) == len(arms):
                part += ["", _of_the_better(found)]
            part.append("")
            yield lines + part
        lines += part


def _of_the_better(found: dict[str, list[Window]]) -> str:
    """What `auto` has of the offline tokens of the other mode that has more, in all and by round."""
    better = max(("exclusive", "step"), key=lambda name: pooled(found[name])["offline"])
    share = pooled(found["auto"])["offline"] / max(pooled(found[better])["offline"], 1e-9)
    pairs = zip(found["auto"], found[better], strict=False)
    by_round = ", ".join(f"{pooled([one])['offline'] / max(pooled([other])['offline'], 1e-9):.0%}" for one, other in pairs)
    return f"auto has {share:.1%} of the offline tokens of {better}, the better one (by round {by_round})."


def slo(rig: Rig) -> Iterator[list[str]]:
    """HyGen's table: increase wanted, increase got, and what offline has of it. Online only has several turns a round: what
    they differ by is noise."""
    args = rig.args
    lines = ["## Tolerance and what it yields", ""]
    for trace, load in _cases(args):
        targets = [(metric, tolerance) for metric in args.metrics for tolerance in args.tolerances]
        between = -(-len(targets) // max(2, len(args.metrics)))
        arms: dict[str, dict[str, Any]] = {}
        for number, (metric, tolerance) in enumerate(targets):
            if number % between == 0:
                arms[f"{ALONE} {number}"] = {"offline": False}
            arms[f"{metric} {tolerance:.0%}"] = {"sharing": "step", "slo_increase": tolerance, "slo_metric": metric}
        part: list[str] = []
        for found in rounds(rig, arms, trace, load):
            head = ("target", "increase", "by the wall clock", "its control believes", "median of requests", "offline tok/s",
                    "scale at the end", "requests")  # fmt: skip
            part = [f"{trace}, online load {load:.0%}:", "", f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
            turns = [windows for arm, windows in found.items() if arm.startswith(ALONE)]
            alone = [window for windows in turns for window in windows]
            part += [_increases(arm, windows, alone) for arm, windows in found.items() if not arm.startswith(ALONE)]
            part += ["", _noise(turns, args.metrics), ""]
            yield lines + part
        lines += part


def _increases(arm: str, windows: Sequence[Window], alone: Sequence[Window]) -> str:
    """An arm's row: its own metric, and how much slower the same request was in the median."""
    metric = arm.split()[0]
    values, base = pooled(windows), pooled(alone)
    believed = statistics.fmean(window.believed for window in windows)
    scale = statistics.fmean(window.scale for window in windows)
    return (
        f"| {arm} | {values[metric] / base[metric] - 1:+.1%} | {values[f'wall-{metric}'] / base[f'wall-{metric}'] - 1:+.1%} | "
        f"{believed:+.1%} | {_median(metric, windows, alone):+.1%} | "
        f"{values['offline']:.0f} | {scale:.2f} | {values['requests']:.0f} |"
    )


def _median(metric: str, windows: Sequence[Window], alone: Sequence[Window]) -> float:
    """The median over requests of what each took beside offline work, above what it took alone."""
    what = metric.split("-")[1]
    ratios: list[float] = []
    for window in windows:
        took = getattr(window, what)
        others = [getattr(other, what) for other in alone if other.key == window.key]
        for name in took:
            if before := [other[name] for other in others if name in other]:
                ratios.append(took[name] / statistics.fmean(before) - 1)
    return statistics.median(ratios) if ratios else math.nan


def _noise(turns: Sequence[Sequence[Window]], metrics: Sequence[str]) -> str:
    values = [pooled(windows) for windows in turns]
    told = []
    for metric in metrics:
        took = ", ".join(f"{value[metric]:.1f} ({value['wall-' + metric]:.1f})" for value in values)
        told.append(f"{metric} {took}")
    return f"Online only, ms in each of its turns (by the wall clock): {'; '.join(told)}."


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
        + f" (of {rig.built.runner.num_layers}). TTFT p50 {1e3 * quantile([*window.ttft.values()], 0.5):.1f} ms, "
        f"p99 {1e3 * quantile([*window.ttft.values()], 0.99):.1f} ms.",
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


def _head(first: str, *last: str) -> list[str]:
    names = [first, "TTFT mean ms", "p99", "TPOT mean ms", "p99", "offline tok/s", *last]
    return [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]


def _row(name: str, values: dict[str, float], *last: str) -> str:
    cells = [name, *(f"{values[metric]:.1f}" for metric in METRICS), *(f"{values[key]:.0f}" for key in ("offline", *last))]
    return f"| {' | '.join(cells)} |"


# -- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from engine.config import parse_bytes

    group = parser.add_argument_group("one model for both tenants")
    group.add_argument("--sharing", choices=WHAT, help="measure this instead: one model, shared steps")
    group.add_argument("--traces", nargs="+", choices=tuple(TRACES), default=list(TRACES))
    group.add_argument("--loads", type=float, nargs="+", default=[0.5], help="shares of the time that online is busy alone")
    group.add_argument("--tolerance", type=float, default=0.2, help="by which online may get slower")
    group.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES), help="for the table of tolerances")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    group.add_argument("--sharing-seconds", type=float, default=12.0, help="of each window")
    group.add_argument("--sharing-lead", type=float, default=0.0, help="seconds of traffic before each window, not counted")
    group.add_argument("--sharing-limit", type=float, help="seconds after which no round begins but the first of each trace")
    group.add_argument("--caps", nargs="*", default=["2", "4", "8", "4/64"],
        help="ablation: offline tokens a step, or beside online rows / without them, that priority is held to")  # fmt: skip
    group.add_argument("--sharing-depth", type=int, default=48, help="offline requests in flight")
    group.add_argument("--sharing-lengths", type=int, nargs=2, default=[160, 32], metavar=("PROMPT", "OUTPUT"),
        help="tokens of an offline request, on average")  # fmt: skip
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
    name = _name(args)
    text = ""
    try:
        for lines in table(rig):
            text = "\n".join(_about(rig) + lines + _compared(rig))
            (folder / f"{name}.md").write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        say("interrupted: what follows is what was measured until then")
    print(text)
    return 0


def _name(args: argparse.Namespace) -> str:
    """Of the file: the table, and the trace, the metric and the load where it is about one of them only."""
    parts = [args.sharing, *(args.traces if len(args.traces) == 1 else ())]
    if args.sharing == "slo":
        parts += args.metrics if len(args.metrics) == 1 else ()
    if args.sharing in ("slo", "modes") and len(args.loads) == 1:
        parts.append(f"{100 * args.loads[0]:.0f}")
    return "-".join(parts)


def _about(rig: Rig) -> list[str]:
    about, cost = machine(), rig.cost
    return [f"{about['cpu']}, {about['cores']} cores; {rig.built.path.name}; step times mispredicted by "
            f"{rig.error:.1%}; an online request takes {1e3 * cost.first:.0f} ms, {1e3 * cost.prompt_token:.2f} ms per "
            f"prompt token, {1e3 * cost.output_token:.0f} ms per token. Times are of a steady clock, see bench/README.md.", "",
            f"    python -m bench.colocation {shlex.join(sys.argv[1:])}", ""]  # fmt: skip


def _compared(rig: Rig) -> list[str]:
    return [said(sum(map(len, rig._pairs.values())), rig.unequal), ""]
