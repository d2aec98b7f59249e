"""FlashInfer behind our protocol: what it is told of a step, with a stand-in that computes what it documents."""

from __future__ import annotations

import flashinfer_fake
import pytest
from attention_cases import Case, fill_context, make_kv, naive_attention, tolerance
from triton_device import DEVICE, REASON, randn

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch

from engine.kernels.flashinfer_attention import FlashInferAttention, unsupported

HALF = torch.float16
MIXED = Case("mixed", (0, 37, 63, 5, 100), (19, 1, 1, 40, 6))
SINGLES = Case("singles", (0, 15, 16, 100), (1, 1, 1, 1))


def make(kv, windows=(None,), **options):
    return FlashInferAttention(
        kv, 4, **({"max_tokens": 128, "max_rows": 8} | options), windows=windows, library=flashinfer_fake
    )


def draw(tokens):
    return randn(tokens, 8 * 64, dtype=HALF).view(tokens, 8, 64).split((4, 2, 2), dim=1)


@pytest.mark.parametrize("case", [MIXED, SINGLES], ids=lambda case: case.name)
@pytest.mark.parametrize("window", [None, 21])
def test_same_as_naive_attention(case, window):
    kv = make_kv(case, num_kv_heads=2, head_dim=64, dtype=HALF)
    tables = fill_context(case, kv, poison=True)
    q, k, v = draw(case.num_tokens)
    expected = naive_attention(case, kv, tables, 1, q.cpu(), k.cpu(), v.cpu(), window)
    attention = make(kv.to(DEVICE), (window,))

    out = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, window)

    torch.testing.assert_close(out.float().cpu(), expected, **tolerance(HALF))


def test_a_plan_of_fixed_size_serves_fewer_rows():
    kv = make_kv(SINGLES, num_kv_heads=2, head_dim=64, dtype=HALF)
    tables = fill_context(SINGLES, kv)
    q, k, v = draw(SINGLES.num_tokens)
    expected = naive_attention(SINGLES, kv, tables, 1, q.cpu(), k.cpu(), v.cpu(), None)
    kv = kv.to(DEVICE)
    before = kv.clone()
    attention = make(kv)
    captured = attention.plan(SINGLES.meta(tables), fixed_rows=8)

    handle = attention.plan(SINGLES.meta(tables), fixed_rows=8)
    padded = [torch.cat([x, torch.full_like(x, 7.0)]) for x in (q, k, v)]
    out = attention.run(handle, 1, *padded, None)

    assert handle.wrappers[None] is captured.wrappers[None], "what was captured is planned anew, not replaced"
    torch.testing.assert_close(out[:4].float().cpu(), expected, **tolerance(HALF))
    written = (kv != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(written) == {table[start // 16] for start, table in zip(SINGLES.starts, tables, strict=True)}


def test_tables_beyond_the_buffer_make_captured_launches_void():
    kv = make_kv(SINGLES, num_kv_heads=2, head_dim=64, dtype=HALF)
    tables = fill_context(SINGLES, kv)
    attention = make(kv.to(DEVICE), max_pages=4)
    first = attention.plan(Case("one", (3,), (1,)).meta(tables[:1]), fixed_rows=4).wrappers[None]
    assert attention.generation == 0
    again = attention.plan(SINGLES.meta(tables), fixed_rows=4).wrappers[None]
    assert attention.generation == 1 and again is not first


def test_what_flashinfer_cannot_serve_is_said_in_words():
    def kv(head_dim, dtype):
        return make_kv(SINGLES, num_kv_heads=2, head_dim=head_dim, dtype=dtype)

    assert "float32" in unsupported(kv(64, torch.float32))
    assert "heads of 80" in unsupported(kv(80, HALF))
    assert "pip install" in (unsupported(kv(64, HALF)) or "pip install")  # installed or not
