"""The CPU kernels against their alternatives and against the machine: `python -m bench.kernels_cpu`.

Prints what memory and arithmetic of this machine can do, then for linears, attention (single tokens, prompts), whole steps of a
SmolLM2-135M-shaped model (random weights) and sampling (top_p, grammars) the median and the spread of each alternative.
Alternatives are run in turn (A B A B ...), so that a disturbance hits all of them alike. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import sampling_cpu
from engine.kernels.api import BatchMeta, KVLayout
from engine.kernels.cpu import CpuOps, make_attention
from engine.kernels.reference import TorchAttention, TorchOps
from engine.memory.window import HostWindow
from engine.model import Model
from engine.runner import ModelRunner
from engine.sched.plan import PlanRow, StepPlan
from engine.spec import ModelSpec, RopeSpec
from engine.types import SamplingParams, Tenant
from engine.weights import random_weights

PAGE = 16
CONTEXT = 330
Alternatives = dict[str, Callable[[], object]]


def spec_of(layers: int) -> ModelSpec:
    """SmolLM2-135M with so many layers."""
    return ModelSpec(
        architecture="llama",
        num_layers=layers,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position=8192,
        rms_eps=1e-5,
        rope=RopeSpec(theta=100_000.0),
        tie_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * layers,
        dtype="float32",
        bos_id=None,
        eos_ids=(),
    )


def measure(alternatives: Alternatives, repeats: int) -> dict[str, list[float]]:
    """Seconds of each alternative, run in turn, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(repeats + 1):
        for name, call in alternatives.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(title: str, alternatives: Alternatives, repeats: int, floor_ms: float | None = None) -> None:
    for name, values in measure(alternatives, repeats).items():
        low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
        share = "" if floor_ms is None else f"   {100 * floor_ms / middle:3.0f} % of the machine's limit ({floor_ms:.2f} ms)"
        print(f"{title:<34} {name:<24} {middle:9.3f} ms  [{low:.3f} .. {high:.3f}]{share}")


def machine(repeats: int) -> tuple[float, float]:
    """(bytes per second read by all threads, floating-point operations per second of the best product found)."""
    big, target = torch.ones(64 << 20), torch.empty(64 << 20)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(b, 2048)
    calls: Alternatives = {
        "read": big.sum,
        "copy": lambda: target.copy_(big),
        "sgemm": lambda: a @ b,
        "sgemm packed": lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""),
    }
    best = {name: min(values) for name, values in measure(calls, repeats).items()}
    read, flops = big.nbytes / best["read"], 2 * 2048**3 / min(best["sgemm"], best["sgemm packed"])
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}: read {read / 1e9:.1f} GB/s, ", end="")
    print(f"copy {2 * big.nbytes / best['copy'] / 1e9:.1f} GB/s (read + written), ", end="")
    print(f"product 2048^3: torch {2 * 2048**3 / best['sgemm'] / 1e9:.0f}, ", end="")
    print(f"packed {2 * 2048**3 / best['sgemm packed'] / 1e9:.0f} GFLOP/s")
    return read, flops


def linears(repeats: int, read: float, flops: float) -> None:
    for out, width in ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)):
        weight = torch.randn(out, width)
        packs = {rows: torch.ops.mkldnn._reorder_linear_weight(weight, rows) for rows in (1, 32, 512)}
        for rows in (1, 4, 32, 512):
            if rows * out > 1 << 23:
                continue  # the vocabulary is projected for sampled tokens only
            x = torch.randn(rows, width)
            calls: Alternatives = {"F.linear": lambda x=x, w=weight: F.linear(x, w)}
            for hint, packed in packs.items():
                calls[f"packed for {hint} rows"] = lambda x=x, p=packed: torch.ops.mkldnn._linear_pointwise(
                    x, p, None, "none", [], ""
                )
            floor = max(weight.nbytes / read, 2 * rows * out * width / flops)
            show(f"linear {width} -> {out}, {rows} rows", calls, repeats, 1e3 * floor)


def attention(repeats: int, read: float) -> None:
    """One layer's attention of single tokens, pages scattered; the KV of 30 layers lies between a page and the next."""
    for rows in (1, 32):
        pages = -(-(CONTEXT + 1) // PAGE)
        kv = torch.randn(rows * pages, 30, 2, PAGE, 3, 64)
        tables = torch.randperm(rows * pages).view(rows, pages).tolist()
        meta = BatchMeta((CONTEXT,) * rows, (1,) * rows, tuple(range(rows)), tuple(tables))
        q, k, v = (torch.randn(rows, heads, 64) for heads in (9, 3, 3))
        calls: Alternatives = {}
        for name, make in (("gather + sdpa per row", TorchAttention), ("pages in place", make_attention)):
            kernel = make(kv)
            handle = kernel.plan(meta)
            layers = iter(list(range(30)) * (repeats + 1))
            calls[name] = lambda a=kernel, h=handle, i=layers, qkv=(q, k, v): a.run(h, next(i), *qkv, None)
        show(f"attention, {rows} x {CONTEXT} tokens", calls, repeats, 1e3 * rows * (CONTEXT + 1) * 2 * 192 * 4 / read)


def prompts(repeats: int, flops: float) -> None:
    """One layer's attention of a prompt's tokens, pages scattered, against what of each tile of scores must be computed."""
    for start, count in ((0, 512), (1536, 512), (0, 64)):
        pages = -(-(start + count) // PAGE)
        kv = torch.randn(pages, 30, 2, PAGE, 3, 64)
        meta = BatchMeta((start,), (count,), (0,), (torch.randperm(pages).tolist(),))
        q, k, v = (torch.randn(count, heads, 64) for heads in (9, 3, 3))
        calls: Alternatives = {}
        for name, make in (("gather + sdpa", TorchAttention), ("tiles over pages", make_attention)):
            kernel = make(kv)
            handle = kernel.plan(meta)
            calls[name] = lambda a=kernel, h=handle, qkv=(q, k, v): a.run(h, 15, *qkv, None)
        operations = 4 * 576 * count * (start + (count + 1) / 2)
        show(f"attention, {count} tokens behind {start}", calls, repeats, 1e3 * operations / flops)


def make_runner(spec: ModelSpec, weights: dict[str, torch.Tensor], compiled: bool) -> ModelRunner:
    layout = KVLayout.fit(
        num_layers=spec.num_layers, page_size=PAGE, num_kv_heads=3, head_dim=64, dtype=torch.float32, slab_bytes=6 << 20
    )
    slabs = -(-800 // layout.pages_per_slab)
    window = HostWindow(slabs, layout.slab_bytes)
    kv = layout.view(window.tensor, slabs * layout.pages_per_slab)
    ops, kernel = (CpuOps(), make_attention(kv)) if compiled else (TorchOps(), TorchAttention(kv))
    return ModelRunner(Model(spec, dict(weights), ops, kernel, torch.float32), layout, window, torch.device("cpu"))


def make_plan(rows: int, start: int, count: int) -> StepPlan:
    """Rows of one shape, each with pages of its own."""
    pages = -(-(start + count) // PAGE)
    params = SamplingParams(temperature=0.0)
    tokens = list(range(1, start + count + 1))
    tables = [range(row * pages, (row + 1) * pages) for row in range(rows)]
    return StepPlan(
        0,
        tuple(
            PlanRow(str(row), Tenant.ONLINE, tokens, len(tokens), start, count, table, True, params, 0.5)
            for row, table in enumerate(tables)
        ),
    )


def steps(layers: int, repeats: int, read: float, flops: float) -> None:
    spec = spec_of(layers)
    weights = random_weights(spec, torch.float32)
    runners = {"reference": make_runner(spec, weights, False), "cpu": make_runner(spec, weights, True)}
    matrices = layers * 576 * (960 + 576 + 3 * 1536)
    head = 49152 * 576
    token = layers * 2 * 192 * 4  # bytes of KV
    for title, rows, start, count in (
        ("decode, 1 row", 1, CONTEXT, 1),
        ("decode, 32 rows", 32, CONTEXT, 1),
        ("prefill, 512 tokens", 1, 0, 512),
        ("chunk, 512 tokens behind 512", 1, 512, 512),
    ):
        plan = make_plan(rows, start, count)
        attended = rows * count * (start + (count + 1) / 2) * layers * 4 * 576  # operations
        memory = (4 * (matrices + head) + rows * (start + count) * token) / read
        arithmetic = (2 * rows * (count * matrices + head) + attended) / flops
        calls: Alternatives = {name: lambda r=r, p=plan: r.collect(r.launch(p)) for name, r in runners.items()}
        show(f"step of {layers} layers: {title}", calls, repeats, 1e3 * max(memory, arithmetic))
    for runner in runners.values():
        runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads to compute with")
    parser.add_argument("--repeats", type=int, default=10, help="rounds counted for each comparison")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model in whole steps")
    parser.add_argument("--only", choices=("linears", "attention", "steps", "sampling"), help="one part alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        read, flops = machine(args.repeats)
        if args.only in (None, "linears"):
            linears(args.repeats, read, flops)
        if args.only in (None, "attention"):
            attention(args.repeats, read)
            prompts(args.repeats, flops)
        if args.only in (None, "steps"):
            steps(args.layers, args.repeats, read, flops)
        if args.only in (None, "sampling"):
            spec = spec_of(args.layers)
            make = lambda: make_runner(spec, random_weights(spec, torch.float32), True)  # noqa: E731
            sampling_cpu.run(show, make, args.repeats, spec.vocab_size)


if __name__ == "__main__":
    main()
