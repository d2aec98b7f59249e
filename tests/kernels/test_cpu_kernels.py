"""The CPU's compiled kernels against the torch reference and naive attention."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import Case, fill_context, make_kv, naive_attention, tolerance

from engine.kernels.api import AttentionShape
from engine.kernels.reference import TorchAttention, TorchOps
from engine.kernels.select import load_backend

cpu = pytest.importorskip("engine.kernels.cpu")
ops, truth = cpu.CpuOps(), TorchOps()

CASES = [
    Case("first token", starts=(0,), counts=(1,)),
    Case("decodes", starts=(1, 15, 16, 47), counts=(1, 1, 1, 1)),
    Case("piece edges", starts=(126, 127, 128, 255, 256), counts=(1, 1, 1, 1, 1)),
    Case("long", starts=(301,), counts=(1,)),
    Case("mixed", starts=(140, 0, 5, 17, 0), counts=(1, 19, 3, 1, 1)),
    Case("chunks only", starts=(0, 33), counts=(17, 20)),
    Case("tile edges", starts=(0, 63, 64), counts=(64, 3, 2)),
    Case("long prompts", starts=(0, 130), counts=(130, 70)),
]
HEADS = [(4, 4, 16), (6, 2, 24), (9, 3, 64)]  # H, K, D


def attend(case: Case, kv: torch.Tensor, heads: tuple[int, int, int], window: int | None, poison: bool = False) -> None:
    random.seed(0)
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    tables = fill_context(case, kv, poison=poison)
    fused = torch.randn(case.num_tokens, num_heads + 2 * num_kv_heads, head_dim)  # strided, as from one projection
    q, k, v = fused.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    expected = naive_attention(case, kv, tables, 1, q, k, v, window)
    reference_kv = kv.clone()
    reference = TorchAttention(reference_kv)
    reference.run(reference.plan(case.meta(tables)), 1, q, k, v, window)
    attention = cpu.CpuAttention(kv)

    actual = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, window)

    torch.testing.assert_close(actual, expected, **tolerance(torch.float32))
    assert torch.equal(kv.nan_to_num(7.0), reference_kv.nan_to_num(7.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 20, 150])
def test_attention_matches_naive_softmax(case: Case, heads: tuple[int, int, int], window: int | None) -> None:
    attend(case, make_kv(case, num_kv_heads=heads[1], head_dim=heads[2], dtype=torch.float32), heads, window)


@pytest.mark.parametrize("page_size", [1, 3, 32])
def test_attention_page_sizes(page_size: int) -> None:
    case = CASES[4]
    attend(case, make_kv(case, num_kv_heads=4, head_dim=16, dtype=torch.float32, page_size=page_size), HEADS[0], None)


def test_attention_reads_nothing_but_its_own_tokens() -> None:
    """Not-a-number in every foreign page and behind the last token changes nothing."""
    case = CASES[4]
    kv = make_kv(case, num_kv_heads=3, head_dim=64, dtype=torch.float32, spare_pages=4)
    attend(case, kv, HEADS[2], None, poison=True)


def test_attention_of_a_row_has_the_same_bits_in_every_batch() -> None:
    case = CASES[2]
    kv = make_kv(case, num_kv_heads=3, head_dim=64, dtype=torch.float32)
    tables = fill_context(case, kv)
    q, k, v = (torch.randn(case.num_tokens, heads, 64) for heads in (9, 3, 3))
    attention = cpu.CpuAttention(kv)
    together = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, None)

    for row in range(case.num_tokens):
        single = Case("row", starts=(case.starts[row],), counts=(1,))
        mine = slice(row, row + 1)
        alone = attention.run(attention.plan(single.meta((tables[row],))), 1, q[mine], k[mine], v[mine], None)
        assert torch.equal(alone, together[mine])


def test_attention_keeps_not_a_number_in_its_row() -> None:
    case = Case("two", starts=(30, 200), counts=(1, 1))
    kv = make_kv(case, num_kv_heads=3, head_dim=64, dtype=torch.float32)
    tables = fill_context(case, kv)
    q, k, v = (torch.randn(2, heads, 64) for heads in (9, 3, 3))
    v[0] = float("nan")
    attention = cpu.CpuAttention(kv)

    out = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, None)

    assert bool(out[0].isnan().all()) and bool(out[1].isfinite().all())


def test_attention_scores_far_apart() -> None:
    """Scores of +-1000: the largest wins and nothing overflows."""
    case = Case("one", starts=(200,), counts=(1,))
    kv = make_kv(case, num_kv_heads=3, head_dim=64, dtype=torch.float32)
    tables = fill_context(case, kv)
    kv *= 100.0
    q, k, v = (torch.randn(1, heads, 64) * 10 for heads in (9, 3, 3))
    expected = naive_attention(case, kv, tables, 1, q, k, v, None)
    attention = cpu.CpuAttention(kv)
    actual = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, None)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("cut", [64, 97, 198])
def test_attention_of_a_prompt_has_the_same_bits_however_it_is_cut(cut: int, window: int | None) -> None:
    whole = Case("whole", starts=(0,), counts=(200,))
    kv = make_kv(whole, num_kv_heads=3, head_dim=64, dtype=torch.float32)
    tables = fill_context(whole, kv)
    q, k, v = (torch.randn(200, heads, 64) for heads in (9, 3, 3))
    attention = cpu.CpuAttention(kv)
    expected = attention.run(attention.plan(whole.meta(tables)), 1, q, k, v, window)
    for part in (slice(0, cut), slice(cut, 200)):
        handle = attention.plan(Case("part", starts=(part.start,), counts=(part.stop - part.start,)).meta(tables))
        actual = attention.run(handle, 1, q[part], k[part], v[part], window)
        assert torch.equal(actual, expected[part])


@pytest.mark.parametrize("registers", [(16, 6, 4), (8, 6, 2), (4, 6, 4)], ids=["AVX512", "AVX2", "other"])
def test_prompt_attention_in_every_shape_of_registers(registers: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor here has, the products for others are right too."""
    monkeypatch.setattr(cpu, "_REGISTERS", {"DEFAULT": registers})
    case = CASES[4]
    attend(case, make_kv(case, num_kv_heads=3, head_dim=64, dtype=torch.float32), HEADS[2], None)


@pytest.mark.parametrize("pages", [(0,), (0, 99), (-1, 0)], ids=str)
def test_page_tables_are_checked_before_memory_is_touched(pages: tuple[int, ...]) -> None:
    case = Case("bad", starts=(16,), counts=(1,))
    kv = make_kv(case, num_kv_heads=4, head_dim=16, dtype=torch.float32)
    with pytest.raises((ValueError, IndexError), match="page table"):
        cpu.CpuAttention(kv).plan(case.meta((pages,)))


@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(tokens: int, bias: bool) -> None:
    x, weight, b = torch.randn(tokens, 48), torch.randn(72, 48), torch.randn(72) if bias else None
    torch.testing.assert_close(
        ops.linear(x, ops.pack_linear(weight, b)), truth.linear(x, truth.pack_linear(weight, b)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("tokens", [1, 3, 40, 301])
def test_loops_match_the_reference(tokens: int) -> None:
    fused = torch.randn(tokens, 8, 24)
    q, k = fused[:, :6], fused[:, 6:]
    cos, sin = torch.randn(tokens, 12), torch.randn(tokens, 12)
    for actual, expected in zip(ops.rotary(q, k, cos, sin), truth.rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(actual, expected)

    x, residual, weight = torch.randn(tokens, 90), torch.randn(tokens, 90), torch.randn(90)
    pairs = zip(ops.add_rms_norm(x, residual, weight, 1e-5), truth.add_rms_norm(x, residual, weight, 1e-5), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), truth.rms_norm(x, weight, 1e-5))

    torch.testing.assert_close(ops.silu_mul(x * 5), truth.silu_mul(x * 5))


def test_silu_at_the_ends() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, -1e-8, 0.0, 88.0, 1e4])
    x = torch.cat((gate, torch.full((7,), 2.0)))[None]
    torch.testing.assert_close(ops.silu_mul(x), truth.silu_mul(x), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_the_reference(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)
    assert torch.equal(ops.add_rms_norm(x, residual, weight, 1e-5)[0], truth.add_rms_norm(x, residual, weight, 1e-5)[0])
    assert torch.equal(ops.silu_mul(x), truth.silu_mul(x))
    kv = make_kv(CASES[0], num_kv_heads=2, head_dim=8, dtype=dtype)
    assert isinstance(load_backend("cpu").attention(kv, AttentionShape(2, 64, 8)), TorchAttention)
