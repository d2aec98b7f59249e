"""Paged attention in torch against a softmax written out token by token."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import Case, fill_context, make_kv, naive_attention, tolerance

from engine.kernels.reference import TorchAttention

CASES = [
    Case("fresh", starts=(0,), counts=(7,)),
    Case("one token", starts=(0,), counts=(1,)),
    Case("page edge", starts=(0,), counts=(16,)),
    Case("across pages", starts=(0,), counts=(37,)),
    Case("chunk", starts=(16,), counts=(16,)),
    Case("odd chunk", starts=(13,), counts=(22,)),
    Case("decode", starts=(33,), counts=(1,)),
    Case("decode first of page", starts=(32,), counts=(1,)),
    Case("decodes", starts=(1, 15, 16, 47), counts=(1, 1, 1, 1)),
    Case("mixed", starts=(40, 0, 5, 17), counts=(1, 19, 3, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_matches_naive_softmax(case: Case, heads: tuple[int, int], window: int | None) -> None:
    kv = make_kv(case, num_kv_heads=heads[1], head_dim=16, dtype=torch.float32)
    check(case, kv, heads, 16, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 9])
def test_low_precision(dtype: torch.dtype, window: int | None) -> None:
    case = CASES[-1]
    kv = make_kv(case, num_kv_heads=2, head_dim=64, dtype=dtype)
    check(case, kv, (4, 2), 64, window)


@pytest.mark.parametrize("page_size", [1, 3, 16, 32])
def test_page_sizes(page_size: int) -> None:
    case = CASES[-1]
    kv = make_kv(case, num_kv_heads=3, head_dim=8, dtype=torch.float32, page_size=page_size)
    check(case, kv, (3, 3), 8, None)


def test_only_its_own_slots_are_written() -> None:
    """Other pages, other layers and the rest of its own last page keep their bytes."""
    case = CASES[-1]
    kv = make_kv(case, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    tables = fill_context(case, kv)
    before = kv.clone()
    q, k, v = (torch.randn(case.num_tokens, heads, 8) for heads in (4, 2, 2))
    attention = TorchAttention(kv)

    attention.run(attention.plan(case.meta(tables)), 1, q, k, v, None)

    written = torch.zeros(kv.shape[:4], dtype=torch.bool)
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        for position in range(start, start + count):
            written[tables[row][position // 16], 1, :, position % 16] = True
    changed = (kv != before).any(-1).any(-1)
    assert torch.equal(changed, written)


def test_short_page_table_is_an_error() -> None:
    case = Case("short", starts=(0,), counts=(17,))
    kv = make_kv(case, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="2 needed"):
        TorchAttention(kv).plan(case.meta(((0,),)))


def test_pages_outside_the_table_do_not_matter() -> None:
    """Not-a-number in every foreign page and behind the last token changes nothing."""
    case = CASES[-1]
    kv = make_kv(case, num_kv_heads=2, head_dim=8, dtype=torch.float32, spare_pages=4)
    check(case, kv, (4, 2), 8, None, poison=True)


def check(
    case: Case, kv: torch.Tensor, heads: tuple[int, int], head_dim: int, window: int | None, poison: bool = False
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    dtype = kv.dtype
    tables = fill_context(case, kv, poison=poison)
    q = torch.randn(case.num_tokens, heads[0], head_dim).to(dtype)
    k, v = (torch.randn(case.num_tokens, heads[1], head_dim).to(dtype) for _ in range(2))
    expected = naive_attention(case, kv, tables, 1, q, k, v, window)
    attention = TorchAttention(kv)

    actual = attention.run(attention.plan(case.meta(tables)), 1, q, k, v, window)

    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, **tolerance(dtype))
