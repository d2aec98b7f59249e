"""Paged attention by Triton against naive attention: shapes, tiles, cuts, windows, and replays of captured launches."""

from __future__ import annotations

import pytest
from attention_cases import Case, fill_context, make_kv, naive_attention, tolerance
from triton_device import DEVICE, REASON, randn

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch

from engine.kernels.api import QKNorm
from engine.kernels.reference import TorchOps
from engine.kernels.triton_attention import TritonAttention
from engine.kernels.triton_config import Launch, Tuning

# Small tiles, cut early, so that short rows meet every branch.
SMALL = Tuning(Launch(16, 32, 4, 2, 1, min_keys=32), Launch(16, 32, 4, 2, 1, min_keys=32), multiprocessors=4)
MIXED = Case("mixed", (0, 37, 63, 5, 100), (19, 1, 1, 40, 6))


def attention(kv, num_heads, **options):
    options = {"max_tokens": 128, "max_rows": 8, "tuned": SMALL} | options
    return TritonAttention(kv.to(DEVICE), num_heads, **options)


def draw(case, num_heads, kv, dtype):
    kv_heads, head_dim = kv.shape[4:]
    sizes = (num_heads, kv_heads, kv_heads)
    packed = randn(case.num_tokens, sum(sizes) * head_dim, dtype=dtype).view(case.num_tokens, sum(sizes), head_dim)
    return packed.split(sizes, dim=1)


def check(case, *, num_heads, kv_heads, head_dim, dtype=torch.float32, window=None, page_size=16, layer=1, **options):
    kv = make_kv(case, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, page_size=page_size)
    tables = fill_context(case, kv, poison=True)
    q, k, v = draw(case, num_heads, kv, dtype)
    expected = naive_attention(case, kv, tables, layer, q.cpu(), k.cpu(), v.cpu(), window)
    kv = kv.to(DEVICE)
    before = kv.clone()
    triton_attention = attention(kv, num_heads, windows=(window,), **options)

    out = triton_attention.run(triton_attention.plan(case.meta(tables)), layer, q, k, v, window)

    torch.testing.assert_close(out.float().cpu(), expected, **tolerance(dtype))
    offset = 0
    for start, count, table in zip(case.starts, case.counts, tables, strict=True):
        for i in range(count):
            page, place = table[(start + i) // page_size], (start + i) % page_size
            before[page, layer, 0, place], before[page, layer, 1, place] = k[offset + i], v[offset + i]
        offset += count
    torch.testing.assert_close(kv, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 21])
def test_mixed_step(dtype, window):
    check(MIXED, num_heads=4, kv_heads=2, head_dim=32, dtype=dtype, window=window)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(1, 1), (3, 3), (3, 1), (7, 1), (8, 1), (10, 2), (20, 1)])
def test_every_ratio_of_heads(num_heads, kv_heads):
    case = Case("heads", (50, 33, 0), (1, 9, 3))

    check(case, num_heads=num_heads, kv_heads=kv_heads, head_dim=16)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_sizes(head_dim):
    check(Case("sizes", (40, 3), (1, 20)), num_heads=2, kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize("window", [1, 16, 17, 64, 1000])
def test_windows(window):
    check(Case("windows", (0, 90, 77), (50, 1, 30)), num_heads=2, kv_heads=1, head_dim=16, window=window)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (15, 1), (16, 1), (31, 33), (32, 32), (0, 17), (127, 2), (64, 64)])
def test_edges_of_pages_and_tiles(start, count):
    check(Case("edges", (start,), (count,)), num_heads=2, kv_heads=1, head_dim=16)


@pytest.mark.parametrize("page_size", [8, 32])
def test_page_sizes(page_size):
    check(MIXED, num_heads=4, kv_heads=2, head_dim=16, page_size=page_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_real_tiles(dtype):
    case = Case("tiles", (300, 20, 0), (1, 70, 40))  # of float16 32 tokens by 64 keys

    check(case, num_heads=4, kv_heads=1, head_dim=64, dtype=dtype, tuned=None)
    check(case, num_heads=4, kv_heads=1, head_dim=64, dtype=dtype, tuned=None, window=40)


def test_a_row_cut_into_many_pieces():
    deep = Tuning(SMALL.prefill, SMALL.decode, multiprocessors=64)

    check(Case("cut", (700, 600), (1, 20)), num_heads=2, kv_heads=1, head_dim=16, tuned=deep)


def test_rows_apart_in_the_token_dimension():
    case = Case("apart", (20, 40), (3, 2))
    kv = make_kv(case, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    tables = fill_context(case, kv)
    q, k, v = draw(case, 2, kv, torch.float32)
    expected = naive_attention(case, kv, tables, 0, q.cpu(), k.cpu(), v.cpu(), None)
    scattered = [torch.full((10, *x.shape[1:]), float("nan"), device=DEVICE) for x in (q, k, v)]
    places = [6, 7, 8, 1, 2]
    for to, x in zip(scattered, (q, k, v), strict=True):
        to[places] = x
    meta = case.meta(tables)
    paged = attention(kv, 2)

    out = paged.run(paged.plan(type(meta)(meta.starts, meta.counts, (6, 1), meta.tables)), 0, *scattered, None)

    torch.testing.assert_close(out[places].cpu(), expected, **tolerance(torch.float32))


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_write_in_one_pass(head_dim, normed):
    case, ops = Case("rotary", (20, 3), (1, 9)), TorchOps()
    kv = make_kv(case, num_kv_heads=3, head_dim=head_dim, dtype=torch.float32)
    tables = fill_context(case, kv)
    q, k, v = draw(case, 6, kv, torch.float32)
    angle = torch.rand(case.num_tokens, head_dim // 2, device=DEVICE) * 6
    norm = QKNorm(randn(head_dim), randn(head_dim), 1e-6) if normed else None
    normed_q = ops.rms_norm(q, norm.q_weight, norm.eps) if norm else q
    normed_k = ops.rms_norm(k, norm.k_weight, norm.eps) if norm else k
    turned_q, turned_k = ops.rotary(normed_q, normed_k, angle.cos(), angle.sin())
    expected = naive_attention(case, kv, tables, 2, turned_q.cpu(), turned_k.cpu(), v.cpu(), None)
    paged = attention(kv, 6)

    out = paged.run_rotary(paged.plan(case.meta(tables)), 2, q, k, v, (angle.cos(), angle.sin()), None, norm)

    torch.testing.assert_close(out.cpu(), expected, **tolerance(torch.float32))


def test_launches_of_fixed_size_serve_a_later_plan():
    """What a CUDA graph does: launches recorded for one plan run again after another plan filled the same buffers."""
    first, second = Case("first", (40,), (1,)), Case("second", (30, 120, 64), (2, 1, 1))
    kv = make_kv(second, num_kv_heads=1, head_dim=16, dtype=torch.float32, spare_pages=4)
    tables = fill_context(second, kv)
    padded = 6
    q, k, v = (torch.zeros(padded, heads, 16, device=DEVICE) for heads in (2, 1, 1))
    drawn = draw(second, 2, kv, torch.float32)
    expected = naive_attention(second, kv, tables, 1, *(x.cpu() for x in drawn), None)
    paged = attention(kv, 2)
    captured = paged.plan(first.meta([range(3)]), fixed_rows=4)

    paged.plan(second.meta(tables), fixed_rows=4)
    for to, x in zip((q, k, v), drawn, strict=True):
        to[: second.num_tokens] = x
    out = paged.run(captured, 1, q, k, v, None)

    torch.testing.assert_close(out[: second.num_tokens].cpu(), expected, **tolerance(torch.float32))
    with pytest.raises(ValueError, match="fixed size"):
        paged.plan(Case("long", (0,), (17,)).meta([range(9)]), fixed_rows=4)


def test_larger_tables_replace_the_buffers():
    case = Case("grow", (90,), (1,))
    kv = make_kv(case, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    tables = fill_context(case, kv)
    q, k, v = draw(case, 2, kv, torch.float32)
    expected = naive_attention(case, kv, tables, 0, q.cpu(), k.cpu(), v.cpu(), None)
    paged = attention(kv, 2, max_pages=3)

    out = paged.run(paged.plan(case.meta(tables)), 0, q, k, v, None)

    assert paged.generation == 1
    torch.testing.assert_close(out.cpu(), expected, **tolerance(torch.float32))
    with pytest.raises(ValueError, match="exceeds the buffers"):
        paged.plan(Case("wide", (0,), (129,)).meta([range(9)]))
