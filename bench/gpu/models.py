"""Section 4a: whole models with random weights. A decode step against the time to read the weights and KV once, a prefill step
against the matrix product ceiling. Steps go through the engine's own runner, from plan to tokens on the host.
"""

from __future__ import annotations

import statistics
import time

import torch

from bench.gpu.common import Bench, copy_ceiling, matmul_ceiling
from bench.gpu.shapes import SHAPES, engine_config, folder_of
from engine.build import load_model
from engine.runner import ModelRunner
from engine.sched.plan import PlanRow, StepPlan
from engine.spec import ModelSpec
from engine.types import SamplingParams, Tenant
from engine.weights import EMBEDDING, expected_shapes

DECODE_AIM, PREFILL_AIM = 0.8, 0.65
PAGE = 16


def run(bench: Bench, only: str = "") -> None:
    for name in [only] if only else SHAPES:
        bench.attempt(name, lambda name=name: measure(bench, name))


def measure(bench: Bench, name: str) -> None:
    with folder_of(name, bench) as path:
        started = time.monotonic()
        built = load_model(engine_config(path, bench), progress=False)
        bench.row(f"{name}: load, compile, record graphs", time.monotonic() - started, "s")
    runner, spec = built.runner, built.spec
    assert isinstance(runner, ModelRunner)
    context = bench.size(1024, 40)
    for rows in (1, 8, 64) if not bench.dry else (1, 2):
        decode(bench, name, runner, spec, rows, context)
    for tokens in (2048, 8192) if not bench.dry else (20,):
        prefill(bench, name, runner, spec, tokens)
    runner.close()


def step_time(runner: ModelRunner, rows: list[tuple[int, int]], repeats: int) -> float:
    """Median seconds from plan to tokens on the host, of a step with these (start, count), all rows greedy."""
    plan_rows, page = [], 0
    for index, (start, count) in enumerate(rows):
        pages = -(-(start + count) // PAGE)
        table, page = tuple(range(page, page + pages)), page + pages
        tokens = tuple(i % 100 for i in range(start + count))
        params = SamplingParams(temperature=0.0)
        plan_rows.append(PlanRow(str(index), Tenant.ONLINE, tokens, 1, start, count, table, True, params, 0.5))
    plan, times = StepPlan(0, tuple(plan_rows)), []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        result = runner.collect(runner.launch(plan))
        times.append(time.perf_counter() - started)
        assert all(row.error is None for row in result.rows), result.rows[0].error
    return statistics.median(times[3:])


def read_weights(spec: ModelSpec) -> int:
    """Parameters that a decode step reads: all but the rows of an embedding that is not tied to the output."""
    shapes = expected_shapes(spec)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    return total if spec.tie_embeddings else total - torch.Size(shapes[EMBEDDING]).numel()


def decode(bench: Bench, name: str, runner: ModelRunner, spec: ModelSpec, rows: int, context: int) -> None:
    kv = rows * context * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    floor = 2 * (read_weights(spec) + kv) / copy_ceiling(bench)
    aim = DECODE_AIM if rows in (1, 8) else None
    repeats = bench.size(40, 1)
    seconds = step_time(runner, [(context, 1)] * rows, repeats)
    bench.row(f"{name}: decode step, {rows} x {context}", 1e3 * seconds, "ms", share=floor / seconds, aim=aim)
    graphs, runner._graphs = runner._graphs, None  # the same step without them: what the graphs are worth
    if graphs is not None:
        seconds = step_time(runner, [(context, 1)] * rows, max(5, repeats // 4))
        bench.row(f"{name}: decode step, {rows} x {context}, eager", 1e3 * seconds, "ms", share=floor / seconds)
    runner._graphs = graphs


def prefill(bench: Bench, name: str, runner: ModelRunner, spec: ModelSpec, tokens: int) -> None:
    shapes = expected_shapes(spec)
    layers = sum(torch.Size(shape).numel() for key, shape in shapes.items() if ".layers." in key)
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * tokens
    floor = (2 * layers * tokens + attention) / matmul_ceiling(bench)
    seconds = step_time(runner, [(0, tokens)], bench.size(5, 1))
    bench.row(f"{name}: prefill step of {tokens}", 1e3 * seconds, "ms", share=floor / seconds, aim=PREFILL_AIM)
