"""What host copies of KV cost and save: `python -m bench.host_tier [copies|resume|batch]`.

copies  bytes per second of whole pages between window and store: page-major, as they lie, against one piece a layer.
resume  a request that lost its KV, to its next token: copied back against computed again, per length of context.
batch   a job whose running requests need {0.5, 1, 2, 4} times the KV memory there is, by four rules: start what fits to its
        bound, since nobody knows where an output will end (smaller batch); the same where all lengths are known beforehand;
        start what fits now and compute again what gives way (recompute); the host tier.

All on one model in this process, arms interleaved in each round; medians, with the lowest and the highest round.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.engine import machine
from engine.build import BuiltModel, load_model
from engine.clock import MonotonicClock
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.memory.host import HostTier, Move, Transfer
from engine.memory.host_store import HostStore
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.runner import ModelRunner
from engine.sched.latency import StepTime
from engine.sched.plan import StepPlan, StepResult
from engine.sched.policies import make_policy
from engine.sched.predictor import OutputLengths
from engine.sched.rotation import Rotation
from engine.sched.scheduler import Scheduler
from engine.types import Request, SamplingParams, Submit, Tenant, TokenOut

OFFLINE = Tenant.OFFLINE
MIB = 2**20
STEP_TOKENS = 512


class Bench:
    """One loaded model, and cores over as much of its KV memory as an arm may have."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = EngineConfig(
            model=args.model, kv_cache_memory=args.kv_memory, max_num_seqs=args.seqs, max_num_batched_tokens=STEP_TOKENS
        )
        self.built: BuiltModel = load_model(self.config)
        runner = self.built.runner
        assert isinstance(runner, ModelRunner) and self.built.window is not None
        self.layout, self.window = runner.layout, runner.window.tensor
        for slab in range(self.built.num_slabs):
            self.built.window.map(slab)
        self.window.fill_(1)  # memory comes with the first touch: not in what is measured
        self.step_time = StepTime()  # shared by all arms, learned in the first round

    def store(self, num_slots: int) -> HostStore:
        layout = self.layout
        store = HostStore(self.window, layout.page_bytes, layout.page_stride, num_slots, MonotonicClock())
        store.start(Transfer(0, False, tuple(Move(0, slot) for slot in range(num_slots))))  # touched as well
        return store

    def core(self, num_pages: int, store: HostStore | None = None) -> EngineCore:
        slabs = -(-num_pages // self.built.pages_per_slab)
        pool = PagePool(self.built.num_slabs, self.built.pages_per_slab, range(slabs))
        host = None if store is None else HostTier(store.num_slots)
        kv = KVManager(pool, self.config.page_size, prefix_caching=False, host=host)
        scheduler = Scheduler(
            kv, make_policy("online-first"), MonotonicClock(), max_num_seqs=self.args.seqs,
            max_num_batched_tokens=STEP_TOKENS, max_model_len=num_pages * self.config.page_size,
            step_time=self.step_time,
        )  # fmt: skip
        return EngineCore(scheduler, self.built.runner, copier=store)


def submit(core: EngineCore, name: str, prompt: Sequence[int], output: int) -> None:
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    core.submit(Submit(id=name, tenant=OFFLINE, prompt=tuple(prompt), params=params, seed=0))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def shown(values: dict[str, float], digits: int = 1) -> str:
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}-{values['high']:.{digits}f}]"


# -- copies


def copies(bench: Bench) -> list[dict[str, Any]]:
    """GB/s of random pages, in both directions."""
    layout, count = bench.layout, 200
    num_pages = bench.built.num_slabs * bench.built.pages_per_slab
    pages, piece = min(num_pages, 2 * count), layout.page_bytes // layout.num_layers
    store = bench.store(count)
    by_layer = np.ones((layout.num_layers, pages, piece), np.uint8)  # a window whose pages lie in as many pieces as layers
    rows = np.ones((count, layout.num_layers, piece), np.uint8)
    rng = random.Random(0)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        times.setdefault(name, []).append(count * layout.page_bytes / (time.perf_counter() - begin) / 1e9)

    def pieces(moves: Sequence[Move], load: bool) -> None:
        for page, slot in moves:
            if load:
                by_layer[:, page] = rows[slot]
            else:
                rows[slot] = by_layer[:, page]

    for _ in range(bench.args.rounds + 1):
        moves = [Move(page, slot) for slot, page in enumerate(rng.sample(range(pages), count))]
        for load in (False, True):
            way = "to the window" if load else "to the host"
            timed(f"page-major {way}", lambda moves=moves, load=load: store.start(Transfer(0, load, tuple(moves))))
            timed(f"layer-major {way}", lambda moves=moves, load=load: pieces(moves, load))
    store.close()
    results = []
    for name, rates in times.items():
        entry = {"what": name, "page_bytes": layout.page_bytes, "gb_per_s": spread(rates[1:])}
        results.append(entry)
        print(f"{name:28} {shown(entry['gb_per_s'], 2)} GB/s", flush=True)
    return results


# -- resume


def resume(bench: Bench) -> list[dict[str, Any]]:
    """Milliseconds from losing all KV to the next token."""
    rng = random.Random(0)
    results = []
    for length in bench.args.lengths:
        times: dict[str, list[float]] = {"recompute": [], "restore": []}
        prompt = [rng.randrange(1000) for _ in range(length)]
        store = bench.store(length // bench.config.page_size + 8)
        for _ in range(bench.args.rounds + 1):
            tokens = {}
            for arm in times:
                core = bench.core(length // bench.config.page_size + 8, store if arm == "restore" else None)
                seconds, tokens[arm] = interrupted(core, prompt)
                times[arm].append(1e3 * seconds)
            assert tokens["recompute"] == tokens["restore"], "restored KV is not what it was"
        store.close()
        entry = {"context": length, **{arm: spread(values[1:]) for arm, values in times.items()}}
        entry["speedup"] = entry["recompute"]["median"] / entry["restore"]["median"]
        results.append(entry)
        print(
            f"context {length:5}: recompute {shown(entry['recompute'])} ms, restore {shown(entry['restore'])} ms, "
            f"{entry['speedup']:.1f} times faster", flush=True,
        )  # fmt: skip
    return results


def interrupted(core: EngineCore, prompt: Sequence[int]) -> tuple[float, list[int]]:
    """A request that loses everything in the middle: the seconds from there to its next token, and all its tokens."""
    output: list[int] = []
    submit(core, "a", prompt, 12)

    def step() -> list[TokenOut]:
        outs = core.step()
        output.extend(out.token for out in outs if out.token is not None)
        return outs

    while len(output) < 6:
        step()
    (request,) = core.scheduler.kv.holders()
    while request.num_computed // core.scheduler.kv.page_size * core.scheduler.kv.page_size > copied(core, request.id):
        step()
    pool = core.scheduler.kv.pool
    slabs = {page // pool.pages_per_slab for page in request.pages}
    for slab in slabs:
        core.scheduler.lose_slab(slab)
        core.scheduler.kv.add_slab(slab)
    begin, before = time.perf_counter(), len(output)
    while len(output) == before:
        step()
    seconds = time.perf_counter() - begin
    while core.has_work:
        step()
    return seconds, output


def copied(core: EngineCore, request_id: str) -> float:
    """Tokens safe in host memory; without a host tier there is nothing to wait for."""
    copies = core.scheduler.kv.copies
    return math.inf if copies is None else copies.tier.num_safe(request_id) * core.scheduler.kv.page_size


# -- batch


class Eager(Rotation):
    """Starts whoever fits for the next few steps, whatever giving way costs."""

    def turn(self, request: object, others: object) -> float:
        return 8.0


class Bounds(OutputLengths):
    """Nothing is known of a length but that it is at most so many tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def remaining(self, request: Request) -> int:
        return max(1, self._most - request.num_output)


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    host: bool = False
    eager: bool = False
    lengths_known: bool = False


ARMS = (
    Arm("smaller batch"),
    Arm("smaller batch, lengths known", lengths_known=True),
    Arm("recompute", eager=True),
    Arm("host tier", host=True),
)


@dataclass(slots=True)
class Run:
    tokens_per_s: float
    rows: float  # mean rows of a decode step
    in_flight: float  # mean of requests that have begun and not ended
    preemptions: int
    recomputed: int
    restored: int
    outputs: dict[str, list[int]]


def play(bench: Bench, arm: Arm, num_pages: int, job: Sequence[tuple[list[int], int]], store: HostStore) -> Run:
    core = bench.core(num_pages, store if arm.host else None)
    scheduler = core.scheduler
    if arm.eager:
        scheduler.rotation = Eager(scheduler.kv, scheduler.step_time)
    if not arm.lengths_known:
        scheduler._lengths = Bounds(bench.args.bound)
    outputs: dict[str, list[int]] = {}
    for index, (prompt, output) in enumerate(job):
        submit(core, str(index), prompt, output)
    rows: list[int] = []
    flight: list[int] = []
    ended = 0

    def on_step(plan: StepPlan, result: StepResult) -> None:
        rows.append(len(plan.rows))
        flight.append(len(outputs) - ended)

    core.on_step = on_step
    begin = time.perf_counter()
    while core.has_work:
        for out in core.step():
            if out.token is not None:
                outputs.setdefault(out.id, []).append(out.token)
            ended += out.finish_reason is not None
    seconds = time.perf_counter() - begin
    counters = scheduler.counters[OFFLINE]
    stats = core.host_stats()
    return Run(
        counters.generated_tokens / seconds, statistics.mean(rows), statistics.mean(flight), counters.preemptions,
        counters.recomputed_tokens, 0 if stats is None else stats.restored_tokens, outputs,
    )  # fmt: skip


def batch(bench: Bench) -> list[dict[str, Any]]:
    args, page = bench.args, bench.config.page_size
    rng = random.Random(1)
    job = [
        ([rng.randrange(1000) for _ in range(args.prompt)], rng.randrange(args.output // 2, args.output * 3 // 2))
        for _ in range(args.requests)
    ]
    largest = sorted((-(-(len(prompt) + output) // page) for prompt, output in job), reverse=True)
    need = sum(largest[: args.seqs])  # pages of the largest batch at its end
    store = bench.store(2 * need)
    results = []
    for ratio in args.ratios:
        num_pages = max(int(need / ratio), largest[0])
        runs: dict[str, list[Run]] = {arm.name: [] for arm in ARMS}
        play(bench, ARMS[0], num_pages, [(prompt, args.output // 4) for prompt, _ in job[: args.seqs]], store)  # warms up
        for number in range(args.rounds):
            for place in range(len(ARMS)):
                arm = ARMS[(place + number) % len(ARMS)]
                runs[arm.name].append(play(bench, arm, num_pages, job, store))
        tokens = [run.outputs for arm in ARMS for run in runs[arm.name]]
        assert all(outputs == tokens[0] for outputs in tokens), "the arms' tokens differ"
        for arm in ARMS:
            entry: dict[str, Any] = {name: getattr(args, name) for name in ("prompt", "output", "bound", "requests", "seqs")}
            entry |= {"need": ratio, "pages": num_pages, "arm": arm.name}
            for name in ("tokens_per_s", "rows", "in_flight", "preemptions", "recomputed", "restored"):
                entry[name] = spread([getattr(run, name) for run in runs[arm.name]])
            results.append(entry)
            print(
                f"need {ratio:3} x memory  {arm.name:28} {shown(entry['tokens_per_s'])} tokens/s  rows {shown(entry['rows'])}  "
                f"in flight {shown(entry['in_flight'])}  preempted {shown(entry['preemptions'], 0)}  "
                f"recomputed {shown(entry['recomputed'], 0)}  restored {shown(entry['restored'], 0)}", flush=True,
            )  # fmt: skip
    store.close()
    return results


TABLES: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {"copies": copies, "resume": resume, "batch": batch}


def which(row: dict[str, Any]) -> tuple[int, float]:
    """What is measured together in the table of batches; one and the same in the others."""
    return row.get("prompt", 0), row.get("need", 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_tier", description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which to make (default: all)")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kv-memory", type=int, default=400 * MIB)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; something short before the first warms up")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 1024, 2048])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--seqs", type=int, default=16, help="most requests of a step")
    parser.add_argument("--requests", type=int, default=24, help="requests of the job")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=192, help="tokens of an output, on average")
    parser.add_argument("--bound", type=int, help="most tokens of an output, as a request says (default: 3 times the average)")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON; tables already there are kept")
    args = parser.parse_args()
    args.bound = args.bound or 3 * args.output
    bench = Bench(args)
    found: dict[str, Any] = {}
    if args.out is not None and args.out.exists():
        found = json.loads(args.out.read_text())
    for name in args.tables or TABLES:
        print(f"-- {name}", flush=True)
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "args": {key: value for key, value in vars(args).items() if key not in ("out", "tables")},
        }
        earlier = found.get(name, {"rows": []})["rows"] if name == "batch" else []
        fresh = TABLES[name](bench)
        earlier = [row for row in earlier if which(row) not in map(which, fresh)]
        found[name] = {"about": about, "rows": sorted([*earlier, *fresh], key=which)}
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
