"""Section 3: each kernel, right and how close to the ceiling, beside torch and (where installed) FlashInfer.

Shapes are Llama-3.1-8B's: 32 query heads over 8 KV heads of 128, pages of 16 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu.common import Bench, Skip, check, copy_ceiling, graphed, matmul_ceiling, relative_error, seconds_of
from engine.kernels.api import BatchMeta
from engine.kernels.reference import TorchAttention, TorchOps

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 32, 8, 128, 16, 2
DECODE_AIM = 0.8


def run(bench: Bench) -> None:
    for part in (correct, decode, prefill, elementwise, sampling):
        bench.attempt(part.__name__, lambda part=part: part(bench))


def make_attention(kv: torch.Tensor, tokens: int, rows: int):
    from engine.kernels.triton_attention import TritonAttention

    return TritonAttention(kv, HEADS, max_tokens=tokens, max_rows=rows)


def make_kv(bench: Bench, pages: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(pages, LAYERS, 2, PAGE, KV_HEADS, DIM, device=bench.device, dtype=torch.float32).to(dtype)


def draw(bench: Bench, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(tokens, heads, DIM, device=bench.device).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def batch(bench: Bench, starts: list[int], counts: list[int]) -> tuple[BatchMeta, int]:
    """Rows with scattered pages of their own, and how many pages that is."""
    needed = [-(-(s + c) // PAGE) for s, c in zip(starts, counts, strict=True)]
    pages = iter(torch.randperm(sum(needed)).tolist())
    tables = tuple(tuple(next(pages) for _ in range(n)) for n in needed)
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    return BatchMeta(tuple(starts), tuple(counts), tuple(offsets), tables), sum(needed)


def correct(bench: Bench) -> None:
    """A mixed step against float64 attention, and the other operations against float64 torch."""
    starts, counts = ([0, 5000, 700, 33], [300, 1, 200, 1]) if not bench.dry else ([0, 37], [18, 1])
    meta, pages = batch(bench, starts, counts)
    dtypes = (torch.float32,) if bench.dry else (torch.bfloat16, torch.float16)
    for dtype in dtypes:
        kv = make_kv(bench, pages, dtype)
        q, k, v = draw(bench, sum(counts), dtype)
        truth = TorchAttention(kv.double())
        expected = truth.run(truth.plan(meta), 1, q.double(), k.double(), v.double(), None)
        attention = make_attention(kv, sum(counts), len(counts))
        out = attention.run(attention.plan(meta), 1, q, k, v, None)
        check(f"attention {dtype}", relative_error(out, expected), 1e-2, bench)
    from engine.kernels.triton_ops import TritonOps

    ops, reference, dtype = TritonOps(), TorchOps(), dtypes[0]
    x, residual = (torch.randn(7, 512, device=bench.device).to(dtype) for _ in range(2))
    weight = torch.randn(512, device=bench.device).to(dtype)
    expected, _ = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    check("add_rms_norm", relative_error(ops.add_rms_norm(x, residual, weight, 1e-5)[0], expected), 1e-2, bench)
    check("silu_mul", relative_error(ops.silu_mul(x), reference.silu_mul(x.double())), 1e-2, bench)


def decode(bench: Bench) -> None:
    for rows, context in ((1, 16384), (8, 4096), (64, 4096), (128, 1024)) if not bench.dry else ((2, 40),):
        meta, pages = batch(bench, [context] * rows, [1] * rows)
        kv, (q, k, v) = make_kv(bench, pages, torch.float32 if bench.dry else torch.bfloat16), draw(bench, rows)
        if bench.dry:
            q, k, v = q.float(), k.float(), v.float()
        attention = make_attention(kv, rows, rows)
        handle = attention.plan(meta, fixed_rows=rows)

        def both_layers(a=attention, h=handle, q=q, k=k, v=v) -> None:  # more than the cache holds
            for layer in range(LAYERS):
                a.run(h, layer, q, k, v, None)

        moved = LAYERS * rows * context * 2 * KV_HEADS * DIM * kv.element_size()
        seconds = seconds_of(bench, graphed(bench, both_layers))
        name = f"decode attention, {rows} x {context}"
        share = moved / seconds / copy_ceiling(bench)
        bench.row(name, moved / seconds / 1e9, "GB/s", share=share, aim=DECODE_AIM if rows >= 8 else None)
        bench.attempt(f"{name}, torch sdpa", lambda n=name, r=rows, c=context: decode_sdpa(bench, n, r, c))
        bench.attempt(f"{name}, flashinfer", lambda n=name, m=meta, kv=kv, q=q: decode_flashinfer(bench, n, m, kv, q))
        del kv, attention


def decode_sdpa(bench: Bench, name: str, rows: int, context: int) -> None:
    """On contiguous keys and values of equal length: what paging may cost at most."""
    q = torch.randn(rows, HEADS, 1, DIM, device=bench.device, dtype=torch.bfloat16)
    sides = [torch.randn(2, rows, KV_HEADS, context, DIM, device=bench.device, dtype=torch.bfloat16) for _ in range(LAYERS)]

    def both() -> None:
        for k, v in sides:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    moved = sum(side.numel() for side in sides) * 2
    seconds = seconds_of(bench, graphed(bench, both))
    bench.row(f"{name}, torch sdpa", moved / seconds / 1e9, "GB/s", share=moved / seconds / copy_ceiling(bench))


def decode_flashinfer(bench: Bench, name: str, meta: BatchMeta, kv: torch.Tensor, q: torch.Tensor) -> None:
    flashinfer = need_flashinfer()
    needed = [-(-(s + c) // PAGE) for s, c in zip(meta.starts, meta.counts, strict=True)]
    whole = [page for table in meta.tables for page in table]
    bounds = torch.tensor([0, *needed], dtype=torch.int32).cumsum(0).int()
    last = torch.tensor([(s + c - 1) % PAGE + 1 for s, c in zip(meta.starts, meta.counts, strict=True)], dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=bench.device), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        bounds, torch.tensor(whole, dtype=torch.int32), last, HEADS, KV_HEADS, DIM, PAGE,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    layers = [kv[:, layer].contiguous() for layer in range(LAYERS)]  # its own layout, so that it is not slowed down by ours
    moved = LAYERS * sum(meta.starts) * 2 * KV_HEADS * DIM * 2
    seconds = seconds_of(bench, lambda: [wrapper.run(q, layer) for layer in layers])
    bench.row(f"{name}, flashinfer", moved / seconds / 1e9, "GB/s", share=moved / seconds / copy_ceiling(bench))


def need_flashinfer():
    try:
        import flashinfer
    except ImportError:
        raise Skip("flashinfer is not installed") from None
    return flashinfer


def prefill(bench: Bench) -> None:
    for context, count in ((0, 2048), (0, 8192), (8192, 2048)) if not bench.dry else ((0, 24),):
        meta, pages = batch(bench, [context], [count])
        dtype = torch.float32 if bench.dry else torch.bfloat16
        kv, (q, k, v) = make_kv(bench, pages, dtype), draw(bench, count, dtype)
        attention = make_attention(kv, count, 1)
        handle = attention.plan(meta)
        work = 4 * HEADS * DIM * (context * count + count * (count + 1) // 2)
        seconds = seconds_of(bench, lambda a=attention, h=handle, q=q, k=k, v=v: a.run(h, 0, q, k, v, None))
        name = f"prefill attention, {count} after {context}"
        bench.row(name, work / seconds / 1e12, "TFLOP/s", share=work / seconds / matmul_ceiling(bench))
        if context == 0:
            q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
            seconds = seconds_of(
                bench, lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
            bench.row(f"{name}, torch sdpa", work / seconds / 1e12, "TFLOP/s", share=work / seconds / matmul_ceiling(bench))


def elementwise(bench: Bench) -> None:
    from engine.kernels.triton_ops import TritonOps

    ops, reference = TritonOps(), TorchOps()
    tokens, hidden, wide = (8192, 4096, 14336) if not bench.dry else (3, 64, 96)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    x, residual = (torch.randn(tokens, hidden, device=bench.device).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=bench.device).to(dtype)
    gate_up = torch.randn(tokens, 2 * wide, device=bench.device).to(dtype)
    q, k = (torch.randn(tokens, heads, DIM, device=bench.device).to(dtype) for heads in (HEADS, KV_HEADS))
    angles = torch.randn(tokens, DIM // 2, device=bench.device)
    cos, sin = angles.cos(), angles.sin()
    item = x.element_size()
    works = {
        "add_rms_norm": (lambda o: o.add_rms_norm(x, residual, weight, 1e-5), 4 * x.numel() * item),
        "silu_mul": (lambda o: o.silu_mul(gate_up), 3 * tokens * wide * item),
        "rotary": (lambda o: o.rotary(q, k, cos, sin), 2 * (q.numel() + k.numel()) * item),
    }
    for name, (work, moved) in works.items():
        for label, o in (("", ops), (", torch", reference)):
            seconds = seconds_of(bench, lambda work=work, o=o: work(o))
            bench.row(name + label, moved / seconds / 1e9, "GB/s", share=moved / seconds / copy_ceiling(bench))


def sampling(bench: Bench) -> None:
    """Time to choose, not a share of anything: rows of a 128k vocabulary."""
    from engine.kernels.triton_sampling import sample
    from engine.sched.plan import PlanRow
    from engine.types import SamplingParams, Tenant

    vocab, rows = bench.size(128_256, 300), bench.size(64, 2)
    logits = torch.randn(rows, vocab, device=bench.device) * 3
    for name, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("top_p and top_k", SamplingParams(temperature=0.8, top_p=0.9, top_k=50)),
    ):
        chosen = [PlanRow("r", Tenant.ONLINE, (0,), 1, 0, 1, (0,), True, params, (i + 0.5) / rows) for i in range(rows)]
        bench.row(f"sampling, {rows} rows, {name}", 1e6 * seconds_of(bench, lambda c=chosen: sample(logits, c)), "us")
