"""Shapes of steps, KV filled with context, and naive attention; every attention kernel's tests share them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.kernels.api import BatchMeta

NUM_LAYERS = 3


@dataclass(frozen=True)
class Case:
    name: str
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def num_pages(self, page_size: int) -> int:
        return sum(-(-(start + count) // page_size) for start, count in zip(self.starts, self.counts, strict=True))

    def meta(self, tables: Sequence[Sequence[int]]) -> BatchMeta:
        offsets = tuple(accumulate((0, *self.counts[:-1])))
        return BatchMeta(self.starts, self.counts, offsets, tuple(tables))


def make_kv(
    case: Case, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = 16, spare_pages: int = 1
) -> torch.Tensor:
    """KV as a strided view [P, L, 2, page_size, K, D] whose page stride is wider than a page, as in a window."""
    pages = case.num_pages(page_size) + spare_pages
    plane = page_size * num_kv_heads * head_dim
    stride = NUM_LAYERS * 2 * plane + 128
    memory = torch.zeros(pages * stride, dtype=dtype)
    return memory.as_strided(
        (pages, NUM_LAYERS, 2, page_size, num_kv_heads, head_dim),
        (stride, 2 * plane, plane, num_kv_heads * head_dim, head_dim, 1),
    )


def fill_context(case: Case, kv: torch.Tensor, poison: bool = False) -> tuple[tuple[int, ...], ...]:
    """Give each row pages in random order and random context; with `poison` everything else is not-a-number."""
    kv.fill_(float("nan") if poison else 0.0)
    page_size = kv.shape[3]
    free = list(range(kv.shape[0]))
    random.shuffle(free)
    tables = []
    for start, count in zip(case.starts, case.counts, strict=True):
        table = tuple(free.pop() for _ in range(-(-(start + count) // page_size)))
        for position in range(start):
            slot = kv[table[position // page_size], :, :, position % page_size]
            slot.copy_(torch.randn(slot.shape))
        tables.append(table)
    return tuple(tables)


def naive_attention(
    case: Case,
    kv: torch.Tensor,
    tables: Sequence[Sequence[int]],
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Softmax attention of each token over its own sequence in float32, [T, H * D]. Does not touch `kv`."""
    page_size, group = kv.shape[3], q.shape[1] // k.shape[1]
    outs, offset = [], 0
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        context = [kv[tables[row][p // page_size], layer, :, p % page_size].float() for p in range(start)]
        for i in range(count):
            sequence = context + [torch.stack((k[offset + j], v[offset + j])).float() for j in range(i + 1)]
            seen = torch.stack(sequence[-window:] if window else sequence)  # [m, 2, K, D]
            keys, values = (seen[:, side].repeat_interleave(group, dim=1) for side in (0, 1))
            scores = torch.einsum("hd,mhd->hm", q[offset + i].float(), keys) * q.shape[2] ** -0.5
            outs.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), values))
        offset += count
    return torch.stack(outs).flatten(1)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    relative = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return {"rtol": relative, "atol": relative}
