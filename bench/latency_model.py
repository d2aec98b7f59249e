"""How well step times are predicted: `python -m bench.latency_model [--model NAME] [--seconds N] [--out FILE]`.

Steps of the real model, of decode rows, chunks of prompts and both, at random contexts. Every third one is held out: predicted,
then not learned from. A few equal steps, repeated between the others, tell how much of the error no model could avoid. It ends
after `--seconds` with what it has.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path

from bench.colocate.stats import quantile
from bench.engine import machine
from engine.build import BuiltModel, load_model
from engine.config import EngineConfig, parse_bytes
from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow, StepPlan
from engine.types import SamplingParams, Tenant

_PARAMS = SamplingParams(temperature=0.0)
_TOKENS = tuple(random.Random(0).choices(range(1000), k=2048))
_DECODES, _CHUNKS = (0, 1, 2, 4, 8, 16, 32), (0, 16, 64, 192)  # rows of one token; tokens of one chunk of a prompt
_EQUAL = ((1, 0), (8, 0), (32, 0), (0, 64), (4, 64))  # those that are repeated
_WARM_UP = 10  # steps that nobody looks at
_FIRST = 60  # steps that are all learned from
_TIMED = 2000  # predictions


@dataclass(slots=True)
class Found:
    """Shares of a step's time, but for `predict`, which is in seconds."""

    learned: int = 0
    errors: list[float] = field(default_factory=list)  # of held-out steps
    repeats: list[list[float]] = field(default_factory=lambda: [[] for _ in _EQUAL])  # seconds of equal steps
    predict: float = 0.0

    @property
    def floor(self) -> list[float]:
        """By how much equal steps differ from their median."""
        return [abs(statistics.median(times) - one) / one for times in self.repeats if times for one in times]


def make_step(rng: random.Random, decodes: int, chunk: int, pages: int, page_size: int) -> StepPlan:
    """So many rows of one token at contexts of up to 1,024, and one chunk at up to 512. KV is whatever lies in the pages."""
    shapes = [(rng.randrange(1, 1024), 1) for _ in range(decodes)]
    shapes += [(rng.choice((0, rng.randrange(512))), chunk)] * (chunk > 0)
    rows = []
    for number, (start, count) in enumerate(shapes):
        needed = -(-(start + count) // page_size)
        first = rng.randrange(pages - needed)
        tokens, table = _TOKENS[: start + count], tuple(range(first, first + needed))
        rows.append(PlanRow(str(number), Tenant.OFFLINE, tokens, start + count, start, count, table, True, _PARAMS, 0.0))
    return StepPlan(1, tuple(rows))


def shapes(rng: random.Random) -> Iterator[tuple[int, int]]:
    """Decode rows and chunk of one step after another: all combinations, shuffled, again and again."""
    every = [shape for shape in product(_DECODES, _CHUNKS) if any(shape)]
    while True:
        yield from rng.sample(every, len(every))


def look(model: StepTime, built: BuiltModel, page_size: int, seconds: float, steps: int, seed: int) -> Found:
    """Run steps, most of them for `model` to learn from, until there are `steps` or the time is over."""
    rng, found, runner = random.Random(seed), Found(), built.runner
    pages = built.num_slabs * built.pages_per_slab
    equal = [make_step(rng, *shape, pages, page_size) for shape in _EQUAL]
    turns, began = cycle(range(len(equal))), time.perf_counter()

    def measure(plan: StepPlan) -> float:
        return runner.collect(runner.launch(plan)).seconds

    for number, shape in enumerate(shapes(rng)):
        if number == steps + _WARM_UP or time.perf_counter() - began > seconds:
            break
        plan = make_step(rng, *shape, pages, page_size)
        load, took = Load.of(plan.rows), measure(plan)
        if number < _WARM_UP:
            continue
        if number >= _FIRST and number % 3 == 0:
            found.errors.append(abs(model.predict(load) - took) / took)
            turn = next(turns)
            found.repeats[turn].append(measure(equal[turn]))
        else:
            model.observe(load, took)
    found.learned = model.steps
    load, timed = Load.of(equal[2].rows), time.perf_counter()
    for _ in range(_TIMED):
        model.predict(load.plus(512, 1))
    found.predict = (time.perf_counter() - timed) / _TIMED
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "steps": len(values),
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "p90": quantile(values, 0.9),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency_model", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=480, help="at most")
    parser.add_argument("--seconds", type=float, default=70.0, help="at most, without loading the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON too")
    args = parser.parse_args(argv)
    config = EngineConfig(model=args.model, kv_cache_memory=parse_bytes("256MiB"))
    built = load_model(config)
    if built.window is not None:
        for slab in range(built.num_slabs):
            built.window.map(slab)
    found = look(StepTime(), built, config.page_size, args.seconds, args.steps, args.seed)
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores; {built.path.name}; {found.learned} steps learned from")
    if not found.errors:
        print(f"--seconds {args.seconds:g} was too little for a held-out step; give it more")
        return 1
    held, floor = summary(found.errors), summary(found.floor)
    for name, values in (("held-out steps are mispredicted", held), ("equal steps differ from their median", floor)):
        print(f"{values['steps']} {name} by {values['mean']:.1%} on average, {values['median']:.1%} in the median, "
              f"p90 {values['p90']:.1%}")  # fmt: skip
    print(f"a prediction with one more row takes {1e6 * found.predict:.1f} us")
    if args.out is not None:
        numbers = {"machine": about, "model": built.path.name, "learned_steps": found.learned, "held_out": held,
                   "noise_floor": floor, "predict_us": round(1e6 * found.predict, 2)}  # fmt: skip
        args.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
