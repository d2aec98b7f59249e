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
from engine.kernels.reference import TorchAttention, TorchOps

_PACKED_ROWS = 32  # rows the packed layout is chosen for; it serves one row and hundreds as well
_PIECE = 128  # context tokens one thread attends to at a time; fixed, so that a row's sums never depend on its batch
_TILE_ROWS = 192  # query tokens x heads of a KV head that are attended together in a prompt
_NO_WINDOW = 1 << 40
# Lanes of a vector, rows and vectors across of the products whose sums fit the processor's registers.
_REGISTERS = {"AVX512": (16, 6, 4), "AVX2": (8, 6, 2), "DEFAULT": (4, 6, 4)}
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
class _Tiles:
    """The rows of several tokens, cut into tiles."""

    cuts: torch.Tensor  # [N, 6] int64, see loops.prompt_tiles
    turn: torch.Tensor  # [1] int64: the next tile to be taken
    tokens: int  # of the largest


@dataclass(frozen=True, slots=True)
class _Row:
    offset: int  # of its first token in the step
    table: int  # place of its page table in the plan's
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class CpuPlan:
    pages: torch.Tensor  # [T] int64: page of each token computed in this step
    slots: torch.Tensor  # [T] int64: its place in the page
    tables: torch.Tensor  # the rows' page tables, one after another
    singles: tuple[_Row, ...]  # rows of one token
    chunks: tuple[_Row, ...]  # rows of several
    pieces: dict[int | None, _Pieces] = field(default_factory=dict)  # by window; made when a layer first asks
    tiles: dict[int | None, _Tiles] = field(default_factory=dict)  # likewise


class CpuAttention:
    """`api.Attention` for float32. Pages are read in place: by pieces of context for single tokens, by tiles for prompts."""

    def __init__(self, kv: torch.Tensor) -> None:
        """`kv` is `KVLayout.view` of a window: [P, num_layers, 2, page_size, K, D] float32."""
        self._kv = kv
        self._page_size, self._num_kv_heads, self._head_dim = kv.shape[3:]
        self._registers = _REGISTERS.get(torch.backends.cpu.get_cpu_capability(), _REGISTERS["DEFAULT"])

    def plan(self, meta: BatchMeta) -> CpuPlan:
        size = self._page_size
        pages: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        singles: list[_Row] = []
        chunks: list[_Row] = []
        for start, count, offset, table in zip(meta.starts, meta.counts, meta.offsets, meta.tables, strict=True):
            needed = -(-(start + count) // size)
            if len(table) < needed:
                raise ValueError(f"page table has {len(table)} pages, {needed} needed for {start + count} tokens")
            pages += [table[position // size] for position in range(start, start + count)]
            slots += [position % size for position in range(start, start + count)]
            (singles if count == 1 else chunks).append(_Row(offset, len(tables), start, count))
            tables += table[:needed]
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
        if handle.chunks:
            self._attend_chunks(handle, layer, q, out, window)
        return out.flatten(1)

    def _place(self, layer: int) -> tuple[int, int, int, int]:
        """Address of the KV, page stride and plane in numbers, layer: how the loops find a token."""
        return self._kv.data_ptr(), self._kv.stride(0), self._kv.stride(2), layer

    def _write(self, handle: CpuPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        width = self._num_kv_heads * self._head_dim
        at = (handle.pages.data_ptr(), handle.slots.data_ptr(), k.shape[0], width)
        values = (*self._place(layer), *at, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))
        _run(loops.write_kv, 2 * k.numel(), *values)

    def _attend_singles(self, handle: CpuPlan, layer: int, q: torch.Tensor, out: torch.Tensor, window: int | None) -> None:
        num_heads = q.shape[1]
        pieces = handle.pieces.get(window)
        if pieces is None:
            pieces = handle.pieces[window] = _cut_pieces(handle.singles, window, num_heads, self._head_dim)
        kernel = loops.decode_pieces(self._num_kv_heads, num_heads // self._num_kv_heads, self._head_dim)
        cuts = (pieces.cuts.data_ptr(), pieces.cuts.shape[0])
        parts = (pieces.sums.data_ptr(), pieces.tops.data_ptr(), pieces.mass.data_ptr())
        threads = min(torch.get_num_threads(), pieces.cuts.shape[0])
        place = (*self._place(layer), self._page_size, handle.tables.data_ptr())
        loops.run_parallel(kernel, threads, *place, *cuts, q.data_ptr(), *parts)
        loops.run(loops.merge_pieces, *cuts, num_heads, self._head_dim, *parts, out.data_ptr())

    def _attend_chunks(self, handle: CpuPlan, layer: int, q: torch.Tensor, out: torch.Tensor, window: int | None) -> None:
        group = q.shape[1] // self._num_kv_heads
        tiles = handle.tiles.get(window)
        if tiles is None:
            tiles = handle.tiles[window] = _cut_tiles(handle.chunks, window, self._num_kv_heads, group)
        kernel = loops.prompt_tiles(self._num_kv_heads, group, self._head_dim, *self._registers)
        count = tiles.cuts.shape[0]
        work = (handle.tables.data_ptr(), tiles.cuts.data_ptr(), count, tiles.turn.zero_().data_ptr())
        place = (*self._place(layer), self._page_size, *work, window or _NO_WINDOW)
        threads = min(torch.get_num_threads(), count)
        loops.run_parallel(kernel, threads, *place, q.data_ptr(), out.data_ptr(), tiles.tokens)


def _int64(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _cut_pieces(rows: Sequence[_Row], window: int | None, num_heads: int, head_dim: int) -> _Pieces:
    cuts = []
    for row in rows:
        end = row.start + 1
        first = 0 if window is None else max(0, end - window)
        cuts += [(row.offset, row.table, at, min(at + _PIECE, end)) for at in range(first, end, _PIECE)]
    n = len(cuts)
    room = (torch.empty(n, width) for width in (num_heads * head_dim, num_heads, num_heads))
    return _Pieces(_int64(cuts), *room)


def _cut_tiles(rows: Sequence[_Row], window: int | None, num_kv_heads: int, group: int) -> _Tiles:
    most = max(1, _TILE_ROWS // group)
    cuts = []
    for row in rows:
        for begin in range(0, row.count, most):
            position, tokens = row.start + begin, min(most, row.count - begin)
            first = 0 if window is None else max(0, position + 1 - window) // loops.TILE_KEYS * loops.TILE_KEYS
            cuts += [(row.offset + begin, tokens, position, row.table, head, first) for head in range(num_kv_heads)]
    cuts.sort(key=lambda cut: cut[1] * (cut[5] - cut[2]))  # the longest first, so that the threads end together
    return _Tiles(_int64(cuts), _int64([0]), max(cut[1] for cut in cuts))


def make_attention(kv: torch.Tensor) -> CpuAttention | TorchAttention:
    """The attention for the dtype of `kv`."""
    return CpuAttention(kv) if kv.dtype is torch.float32 else TorchAttention(kv)
