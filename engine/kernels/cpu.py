"""The CPU's own kernels for float32: prepacked oneDNN linears, compiled loops for what surrounds them and for single tokens.

Owns the choice, per call, between a compiled loop (`cpu_loops`), torch and the reference; other dtypes always take the
reference. Linears are packed once into oneDNN's blocked layout, which streams from memory at full speed at one row and
computes faster than a plain matrix at hundreds; nothing else of the weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels import cpu_loops as loops
from engine.kernels.api import BatchMeta
from engine.kernels.reference import TorchAttention, TorchOps, attend, causal_mask

_PACKED_ROWS = 32  # rows the packed layout is chosen for; it serves one row and hundreds as well
_PIECE = 128  # context tokens one thread attends to at a time; fixed, so that a row's sums never depend on its batch
_SERIAL = 1 << 14  # numbers below which waking a second thread costs more than it saves


class CpuOps(TorchOps):
    """`api.Ops` for float32 on the CPU; other dtypes as in the reference."""

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        if weight.dtype is not torch.float32:
            return super().pack_linear(weight, bias)
        return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS), bias

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        if x.dtype is not torch.float32:
            return super().linear(x, packed)
        weight, bias = packed
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype is not torch.float32:
            return super().rms_norm(x, weight, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype is not torch.float32:
            return super().add_rms_norm(x, residual, weight, eps)
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        kernel = loops.add_rms_norm(x.shape[1], eps)
        addresses = (tensor.data_ptr() for tensor in (x, residual, weight, out, total))
        _run(kernel, x.numel(), x.shape[0], *addresses)
        return out, total

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q.dtype is not torch.float32:
            return super().rotary(q, k, cos, sin)
        cos, sin = cos.contiguous().float(), sin.contiguous().float()
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float32:
            return super().silu_mul(x)
        x = x.contiguous()
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        _run(loops.silu_mul, x.numel(), x.shape[0], out.shape[1], x.data_ptr(), out.data_ptr())
        return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = _rows(x)
    tokens, num_heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    kernel = loops.rotary(num_heads, head_dim)
    _run(kernel, x.numel(), tokens, x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] such that each token's heads lie together; a slice of a fused projection does already."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _run(kernel: Any, size: int, *values: int) -> None:
    threads = torch.get_num_threads()
    if size < _SERIAL or threads == 1:
        loops.run(kernel, *values)
    else:
        loops.run_parallel(kernel, threads, *values)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The contexts of all single tokens, cut into pieces, and room for what each leaves."""

    cuts: torch.Tensor  # [N, 4] int64, see loops.decode_pieces
    sums: torch.Tensor  # [N, H * D]
    tops: torch.Tensor  # [N, H]
    mass: torch.Tensor  # [N, H]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row of several tokens."""

    start: int
    count: int
    offset: int
    pages: torch.Tensor  # int64


@dataclass(frozen=True, slots=True)
class CpuPlan:
    pages: torch.Tensor  # [T] int64: page of each token computed in this step
    slots: torch.Tensor  # [T] int64: its place in the page
    tables: torch.Tensor  # page tables of the single tokens, one after another
    singles: tuple[tuple[int, int, int], ...]  # token, place of its table, position
    chunks: tuple[_Chunk, ...]
    pieces: dict[int | None, _Pieces] = field(default_factory=dict)  # by window; made when a layer first asks
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)  # by chunk offset and window


class CpuAttention:
    """`api.Attention` for float32: single tokens read their pages in place, chunks go to `scaled_dot_product_attention`."""

    def __init__(self, kv: torch.Tensor) -> None:
        """`kv` is `KVLayout.view` of a window: [P, num_layers, 2, page_size, K, D] float32."""
        self._kv = kv
        self._page_size, self._num_kv_heads, self._head_dim = kv.shape[3:]

    def plan(self, meta: BatchMeta) -> CpuPlan:
        size = self._page_size
        pages: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        singles, chunks = [], []
        for start, count, offset, table in zip(meta.starts, meta.counts, meta.offsets, meta.tables, strict=True):
            needed = -(-(start + count) // size)
            if len(table) < needed:
                raise ValueError(f"page table has {len(table)} pages, {needed} needed for {start + count} tokens")
            pages += [table[position // size] for position in range(start, start + count)]
            slots += [position % size for position in range(start, start + count)]
            if count == 1:
                singles.append((offset, len(tables), start))
                tables += table[:needed]
            else:
                chunks.append(_Chunk(start, count, offset, _int64(table[:needed])))
        named = pages + tables  # the loops check no index
        if named and not 0 <= min(named) <= max(named) < self._kv.shape[0]:
            raise IndexError(f"page table names a page outside 0..{self._kv.shape[0] - 1}")
        return CpuPlan(_int64(pages), _int64(slots), _int64(tables), tuple(singles), tuple(chunks))

    def run(
        self, handle: CpuPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        self._write(handle, layer, _rows(k), _rows(v))
        q = q.contiguous()
        out = torch.empty_like(q)
        if handle.singles:
            self._attend_singles(handle, layer, q, out, window)
        for chunk in handle.chunks:
            mine = slice(chunk.offset, chunk.offset + chunk.count)
            out[mine] = self._attend_chunk(handle, chunk, layer, q[mine], k[mine], v[mine], window)
        return out.flatten(1)

    def _place(self, layer: int) -> tuple[int, int, int, int]:
        """Address of the KV, page stride and plane in numbers, layer: how the loops find a token."""
        return self._kv.data_ptr(), self._kv.stride(0), self._kv.stride(2), layer

    def _write(self, handle: CpuPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        width = self._num_kv_heads * self._head_dim
        at = (handle.pages.data_ptr(), handle.slots.data_ptr(), k.shape[0], width)
        loops.run(loops.write_kv, *self._place(layer), *at, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))

    def _attend_singles(self, handle: CpuPlan, layer: int, q: torch.Tensor, out: torch.Tensor, window: int | None) -> None:
        num_heads = q.shape[1]
        pieces = handle.pieces.get(window)
        if pieces is None:
            pieces = handle.pieces[window] = _cut(handle.singles, window, num_heads, self._head_dim)
        kernel = loops.decode_pieces(self._num_kv_heads, num_heads // self._num_kv_heads, self._head_dim)
        cuts = (pieces.cuts.data_ptr(), pieces.cuts.shape[0])
        parts = (pieces.sums.data_ptr(), pieces.tops.data_ptr(), pieces.mass.data_ptr())
        threads = min(torch.get_num_threads(), pieces.cuts.shape[0])
        place = (*self._place(layer), self._page_size, handle.tables.data_ptr())
        loops.run_parallel(kernel, threads, *place, *cuts, q.data_ptr(), *parts)
        loops.run(loops.merge_pieces, *cuts, num_heads, self._head_dim, *parts, out.data_ptr())

    def _attend_chunk(
        self,
        handle: CpuPlan,
        chunk: _Chunk,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        behind = 0
        if chunk.start > 0:
            first = 0 if window is None else max(0, chunk.start - window + 1) // self._page_size
            behind = first * self._page_size
            end = chunk.start + chunk.count - behind
            seen = self._kv[:, layer].index_select(0, chunk.pages[first:])  # [pages, 2, page_size, K, D]
            k, v = (seen[:, side].flatten(0, 1)[:end] for side in (0, 1))
        key = (chunk.offset, window)
        if key not in handle.masks:
            handle.masks[key] = causal_mask(chunk.start - behind, chunk.count, k.shape[0], window, q)
        return attend(q, k, v, handle.masks[key])


def _int64(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _cut(singles: tuple[tuple[int, int, int], ...], window: int | None, num_heads: int, head_dim: int) -> _Pieces:
    cuts = []
    for token, table, position in singles:
        first = 0 if window is None else max(0, position + 1 - window)
        cuts += [(token, table, at, min(at + _PIECE, position + 1)) for at in range(first, position + 1, _PIECE)]
    n = len(cuts)
    room = (torch.empty(n, width) for width in (num_heads * head_dim, num_heads, num_heads))
    return _Pieces(_int64(cuts), *room)


def make_attention(kv: torch.Tensor) -> CpuAttention | TorchAttention:
    """The attention for the dtype of `kv`."""
    return CpuAttention(kv) if kv.dtype is torch.float32 else TorchAttention(kv)
