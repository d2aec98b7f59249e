"""How well step times are predicted: `python -m bench.latency_model [--steps N] [--model NAME]`.

Random steps of the real model, of decode rows, chunks of prompts and both, at random contexts. The first part is learned from,
the rest is held out; equal steps repeated tell how much of the error no model could avoid.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from bench.engine import machine
from engine.build import BuiltModel, load_model
from engine.config import EngineConfig
from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow, StepPlan
from engine.types import SamplingParams, Tenant

_PARAMS = SamplingParams(temperature=0.0)


def random_step(rng: random.Random, built: BuiltModel, page_size: int) -> StepPlan:
    """Up to 32 decode rows, up to 2 chunks of up to 256 tokens, contexts of up to 1,024. KV is whatever lies in the pages."""
    rows = []
    shapes = [(rng.randrange(1, 1024), 1) for _ in range(rng.choice([0, 1, 2, 4, 8, 16, 32]))]
    shapes += [(rng.choice([0, rng.randrange(512)]), rng.randrange(2, 256)) for _ in range(rng.choice([0, 1, 1, 2]))]
    pages = built.num_slabs * built.pages_per_slab
    for number, (start, count) in enumerate(shapes or [(64, 1)]):
        needed = -(-(start + count) // page_size)
        first = rng.randrange(pages - needed)
        tokens = tuple(rng.randrange(1000) for _ in range(start + count))
        table = tuple(range(first, first + needed))
        rows.append(PlanRow(str(number), Tenant.OFFLINE, tokens, start + count, start, count, table, True, _PARAMS, 0.0))
    return StepPlan(1, tuple(rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency_model", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=500, help="the last third is held out")
    parser.add_argument("--repeats", type=int, default=12, help="of each of eight steps, for the noise floor")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    config = EngineConfig(model=args.model, kv_cache_memory=1 << 30)
    built, rng, model = load_model(config), random.Random(args.seed), StepTime()
    if built.window is not None:
        for slab in range(built.num_slabs):
            built.window.map(slab)
    runner = built.runner

    def measure(plan: StepPlan) -> float:
        return runner.collect(runner.launch(plan)).seconds

    errors: list[float] = []
    for number in range(args.steps):
        plan = random_step(rng, built, config.page_size)
        load, seconds = Load.of(plan.rows), measure(plan)
        if number >= args.steps * 2 // 3:
            errors.append(abs(model.predict(load) - seconds) / seconds)
        else:
            model.observe(load, seconds)
    floor: list[float] = []
    for _ in range(8):
        plan = random_step(rng, built, config.page_size)
        times = [measure(plan) for _ in range(args.repeats)]
        middle = statistics.median(times)
        floor += [abs(middle - seconds) / seconds for seconds in times]
    began = time.perf_counter()
    for _ in range(2000):
        model.predict(Load.of(plan.rows))
    spent = (time.perf_counter() - began) / 2000
    ordered = sorted(errors)
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores; {built.path.name}")
    print(
        f"{len(errors)} held-out steps: mean error {statistics.fmean(errors):.1%}, median {statistics.median(errors):.1%}, p90 "
        f"{ordered[int(0.9 * len(ordered))]:.1%}; equal steps differ from their median by {statistics.fmean(floor):.1%} on "
        f"average, {statistics.median(floor):.1%} in the median; a prediction, {len(plan.rows)} rows added up, takes "
        f"{1e6 * spent:.1f} us"
    )


if __name__ == "__main__":
    main()
