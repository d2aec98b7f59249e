"""Paged attention as Triton kernels: one for every item of work, one to merge, one that rotates and writes KV.

The pages are page-major, [page][layer][k/v][token][kv_head][head_dim]; a kernel sees one layer as a strided view. Query heads
that share a KV head are packed with tokens into the rows of a tile (row m is token m // G, head m % G), so keys are read once
per KV head and decoding fills the smallest tensor-core tile. Prefill and decode are the same kernel in two shapes. Softmax is
online, in base 2 (FlashAttention-2, Dao 2023); long rows are cut and merged by their log-sum-exp (Flash-Decoding).

`plan` is host work: it fills one int32 buffer (write slots, work lists, page tables) and copies it once. `run` only launches.
Lists carry their own length, so launches of fixed size can be captured in a CUDA graph and replayed after a later plan.
The kernels have not yet run on a GPU: they are checked by interpretation and compiled ahead of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.api import BatchMeta, QKNorm
from engine.kernels.triton_config import Launch, Tuning, tuning
from engine.kernels.triton_ops import heads_per_program, normed_pair
from engine.kernels.triton_plan import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Ints,
    Rows,
    Split,
    TableMirror,
    Work,
    plan_work,
    token_slots,
)

_MERGE_TILE = 16  # partial results that one program merges at a time


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """a @ b + acc in float32. WIDE first widens the factors, for the interpreter cannot multiply bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def attend_tiles(
    acc,
    top,
    total,
    q,
    keys_ptr,
    values_ptr,
    table_ptr,
    position,
    begin,
    end,
    kv_end,
    scale,
    page_stride,
    window,
    TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Fold the keys [begin, end) into (acc, top, total). MASKED where some row may not see some key of a tile."""
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    whole: tl.constexpr = HEAD_DIM == BLOCK_D
    zero = tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32)
    # Pages are read a tile ahead: were they read where they are used, the compiler would spend its pipeline stages on them
    # and keep fewer keys and values in flight.
    page = tl.load(table_ptr + (begin + keys) // PAGE_SIZE, mask=begin + keys < kv_end, other=0)
    for start in range(begin, end, BLOCK_N):
        key = start + keys
        # Page ids times the stride of a page overflow 32 bits.
        at = (page.to(tl.int64) * page_stride + (key % PAGE_SIZE) * TOKEN)[:, None] + dims[None, :]
        page = tl.load(table_ptr + (key + BLOCK_N) // PAGE_SIZE, mask=key + BLOCK_N < kv_end, other=0)
        if MASKED:
            # Values past the end may be anything, not-a-number too: they are not read, for 0 * NaN is NaN.
            inside = (key < kv_end)[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(keys_ptr + at, mask=inside, other=0.0)
            v = tl.load(values_ptr + at, mask=inside, other=0.0)
        elif whole:
            k = tl.load(keys_ptr + at)
            v = tl.load(values_ptr + at)
        else:
            k = tl.load(keys_ptr + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values_ptr + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        score = product(q, tl.trans(k), zero, PRECISION, WIDE) * scale
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key < kv_end)[None, :]
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = product(weight.to(v.dtype), v, acc * shrink[:, None], PRECISION, WIDE)
        top = highest
    return acc, top, total


@triton.jit
def attend_kernel(
    q_ptr,
    kv_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    items_ptr,
    tables_ptr,
    scale,
    q_token,
    q_head,
    page_stride,
    value_offset,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One item of work for one KV head. UNIFORM: mask every tile (short loops, decode) instead of the boundary tiles only.

    `items` is [1 + I, 8] (see triton_plan), its first word the number of items. An item with a partial slot leaves
    softmax-weighted values and their log2-sum-exp2 there; one without writes `out` [T, H, D].
    """
    index = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    if index >= tl.load(items_ptr):
        return
    item = items_ptr + (index + 1) * 8
    token = tl.load(item)
    num_tokens = tl.load(item + 1)
    first = tl.load(item + 2)
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    table_ptr = tables_ptr + tl.load(item + 5)
    slot = tl.load(item + 6)

    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    place = row // GROUP
    position = first + place
    head = kv_head * GROUP + row % GROUP
    rows_inside = place < num_tokens
    inside = rows_inside[:, None] & (dims < HEAD_DIM)[None, :]
    q_row = (token + place).to(tl.int64) * q_token + head * q_head
    q = tl.load(q_ptr + q_row[:, None] + dims[None, :], mask=inside, other=0.0)

    keys_ptr = kv_ptr + kv_head * HEAD_DIM
    values_ptr = keys_ptr + value_offset
    token_stride: tl.constexpr = KV_HEADS * HEAD_DIM
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)  # finite, so that a row that sees nothing yet stays a number
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # fmt: off
    if UNIFORM:
        acc, top, total = attend_tiles(
            acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, begin, end, end, scale, page_stride, window,
            token_stride, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, WINDOWED, True, PRECISION, WIDE,
        )
    else:
        plain = begin
        if WINDOWED:
            # The last token's window begins here; tiles before it are masked.
            edge = tl.maximum(first + num_tokens - window - begin, 0)
            plain = tl.minimum(begin + tl.cdiv(edge, BLOCK_N) * BLOCK_N, begin + tl.cdiv(end - begin, BLOCK_N) * BLOCK_N)
            acc, top, total = attend_tiles(
                acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, begin, plain, end, scale, page_stride,
                window, token_stride, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, WINDOWED, True, PRECISION, WIDE,
            )
        # Keys up to the first token's own are seen by all rows.
        diagonal = begin + (tl.minimum(first + 1, end) - begin) // BLOCK_N * BLOCK_N
        diagonal = tl.maximum(diagonal, plain)
        acc, top, total = attend_tiles(
            acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, plain, diagonal, end, scale, page_stride,
            window, token_stride, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, WINDOWED, False, PRECISION, WIDE,
        )
        acc, top, total = attend_tiles(
            acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, diagonal, end, end, scale, page_stride,
            window, token_stride, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, WINDOWED, True, PRECISION, WIDE,
        )
    # fmt: on
    blind = total == 0.0  # sees no key of this item
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    if slot < 0:
        out_row = ((token + place).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
        tl.store(out_ptr + out_row[:, None] + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = (slot * KV_HEADS + kv_head).to(tl.int64) * BLOCK_M + row
        tl.store(partial_ptr + part[:, None] * BLOCK_D + dims[None, :], acc, mask=rows_inside[:, None])
        tl.store(lse_ptr + part, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=rows_inside)


@triton.jit
def merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    merges_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """out of one token and head from its partial results. `merges` is [1 + M, 4], its first word the number of merges."""
    index = tl.program_id(0) // (KV_HEADS * GROUP)
    head = tl.program_id(0) % (KV_HEADS * GROUP)
    if index >= tl.load(merges_ptr):
        return
    merge = merges_ptr + (index + 1) * 4
    token = tl.load(merge).to(tl.int64)
    row = tl.load(merge + 1) * GROUP + head % GROUP
    first = tl.load(merge + 2)
    count = tl.load(merge + 3)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    top = -1.0e30
    for start in range(0, count, TILE):
        piece = start + tl.arange(0, TILE)
        part = ((first + piece) * KV_HEADS + head // GROUP).to(tl.int64) * BLOCK_M + row
        lse = tl.load(lse_ptr + part, mask=piece < count, other=float("-inf"))
        value = tl.load(
            partial_ptr + part[:, None] * BLOCK_D + dims[None, :],
            mask=(piece < count)[:, None] & inside[None, :],
            other=0.0,
        )
        highest = tl.maximum(top, tl.max(lse, axis=0))
        weight = tl.exp2(lse - highest)
        shrink = tl.exp2(top - highest)
        acc = acc * shrink + tl.sum(value * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        top = highest
    out = out_ptr + (token * (KV_HEADS * GROUP) + head) * HEAD_DIM + dims
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    kv_ptr,
    slots_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    page_stride,
    value_offset,
    eps,
    Q_BLOCKS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Of one token: rotate a block of q's heads in place (the first Q_BLOCKS blocks), or rotate k and write k, v to pages.

    NORM applies a per-head RMSNorm to q and k first (Qwen3). Tokens with slot -1 write nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, HALF)
    half: tl.constexpr = HEAD_DIM // 2
    inside = pair < half
    if ROTATE:
        cos = tl.load(cos_ptr + token * table_row + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * table_row + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    if block < Q_BLOCKS:
        q_heads = block * HEADS + tl.arange(0, HEADS)
        q_mask = (q_heads < Q_HEADS)[:, None] & inside[None, :]
        q_at = q_ptr + token * q_token + q_heads[:, None] * q_head + pair[None, :]
        q_low = tl.load(q_at, mask=q_mask, other=0.0)
        q_high = tl.load(q_at + half, mask=q_mask, other=0.0)
        qa, qb = normed_pair(q_low, q_high, q_weight_ptr, pair, inside, eps, HEAD_DIM, NORM)
        if ROTATE:
            tl.store(q_at, (qa * cos - qb * sin).to(q_low.dtype), mask=q_mask)
            tl.store(q_at + half, (qb * cos + qa * sin).to(q_low.dtype), mask=q_mask)
        return
    heads = (block - Q_BLOCKS) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots_ptr + token)
    written = tl.where(slot < 0, 0, KV_HEADS)
    mask = (heads < written)[:, None] & inside[None, :]
    k_at = k_ptr + token * k_token + heads[:, None] * k_head + pair[None, :]
    v_at = v_ptr + token * v_token + heads[:, None] * v_head + pair[None, :]
    k_low = tl.load(k_at, mask=mask, other=0.0)
    k_high = tl.load(k_at + half, mask=mask, other=0.0)
    v_low = tl.load(v_at, mask=mask, other=0.0)
    v_high = tl.load(v_at + half, mask=mask, other=0.0)
    if ROTATE:
        ka, kb = normed_pair(k_low, k_high, k_weight_ptr, pair, inside, eps, HEAD_DIM, NORM)
        k_low = (ka * cos - kb * sin).to(v_low.dtype)
        k_high = (kb * cos + ka * sin).to(v_low.dtype)
    page = (slot // PAGE_SIZE).to(tl.int64) * page_stride + (slot % PAGE_SIZE) * (KV_HEADS * HEAD_DIM)
    to = kv_ptr + page + heads[:, None] * HEAD_DIM + pair[None, :]
    tl.store(to, k_low, mask=mask)
    tl.store(to + half, k_high, mask=mask)
    tl.store(to + value_offset, v_low, mask=mask)
    tl.store(to + value_offset + half, v_high, mask=mask)


@dataclass(frozen=True, slots=True)
class Launched:
    """One kind of launch for one window: lists on the device and how many programs read them."""

    items: torch.Tensor
    merges: torch.Tensor
    num_items: int
    num_merges: int


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step's lists on the device. `windows[w]` is (prefill, decode) for window w."""

    slots: torch.Tensor
    tables: torch.Tensor
    windows: dict[int | None, tuple[Launched, Launched]]


class Staging:
    """An int32 buffer on the device, filled through two pinned ones in turn so that a plan never waits for the last one."""

    def __init__(self, words: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words = words
        self.device = torch.zeros(words, dtype=torch.int32, device=device)
        self._host = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._copied: list[Any] = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._turn = 0

    def begin(self) -> Ints:
        """The host buffer to fill, free of copies still under way."""
        self._turn ^= 1
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._host[self._turn].numpy()

    def send(self, words: int) -> None:
        """Copy the first `words` to the device, in order with the current stream."""
        self.device[:words].copy_(self._host[self._turn][:words], non_blocking=True)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].record()


class Sections:
    """Hands out consecutive parts of a buffer: filled on the host, seen on the device."""

    def __init__(self, host: Ints, device: torch.Tensor) -> None:
        self._host = host
        self._device = device
        self.used = 0

    def flat(self, values: Ints, capacity: int) -> torch.Tensor:
        self._host[self.used : self.used + len(values)] = values
        return self._take(capacity)

    def counted(self, rows: Ints, capacity: int) -> torch.Tensor:
        """[1 + capacity, F] with the number of rows in the first word."""
        width = rows.shape[1]
        self._host[self.used] = len(rows)
        self._host[self.used + width : self.used + width * (1 + len(rows))] = rows.reshape(-1)
        return self._take(width * (1 + capacity))

    def _take(self, words: int) -> torch.Tensor:
        part = self._device[self.used : self.used + words]
        self.used += -(-words // 32) * 32  # 128 bytes
        return part


class TritonAttention:
    """`api.Attention` by Triton kernels.

    kv: `KVLayout.view` of a window, [P, num_layers, 2, page_size, K, D]. max_tokens and max_rows bound a step; page tables may
    together hold `max_pages` pages, and when they hold more the buffer is replaced and `generation` goes up: graphs captured
    before must be captured again. `windows` are the sliding windows that `run` will be called with.
    """

    def __init__(
        self,
        kv: torch.Tensor,
        num_heads: int,
        *,
        max_tokens: int,
        max_rows: int,
        max_pages: int | None = None,
        windows: tuple[int | None, ...] = (None,),
        tuned: Tuning | None = None,
    ) -> None:
        _, num_layers, _, self._page_size, self._kv_heads, self._head_dim = kv.shape
        self._layers = [kv[:, layer] for layer in range(num_layers)]
        self._group = num_heads // self._kv_heads
        self._block_d = max(16, triton.next_power_of_2(self._head_dim))
        self._windows = tuple(dict.fromkeys(windows))
        self._max_tokens = max_tokens
        self._max_rows = max_rows
        self._device = kv.device
        tuned = (tuned or tuning(kv.device, self._block_d, kv.dtype)).holding(self._group)
        self._prefill = self._kind(tuned.prefill, tuned.multiprocessors)
        self._decode = self._kind(tuned.decode, tuned.multiprocessors)
        self._mirror = TableMirror()
        self._max_pages = max(1, max_pages or kv.shape[0])
        self._staging = Staging(self._words(), kv.device)
        self.generation = 0

    def _kind(self, launch: Launch, multiprocessors: int) -> Kind:
        lanes = max(1, multiprocessors * launch.resident // self._kv_heads)
        split = Split(launch.block_m // self._group, launch.block_n, launch.min_keys, lanes)
        partials = split.max_partials * self._kv_heads * launch.block_m
        return Kind(
            launch,
            split,
            torch.empty((partials, self._block_d), dtype=torch.float32, device=self._device),
            torch.empty(partials, dtype=torch.float32, device=self._device),
        )

    def _capacity(self, kind: Kind) -> tuple[int, int]:
        """Items and merges that one window's lists of this kind can hold."""
        units = self._max_rows + self._max_tokens // kind.split.unit_tokens
        return units + kind.split.max_partials, kind.split.max_partials // 2 * kind.split.unit_tokens

    def _words(self) -> int:
        words = self._max_tokens + self._max_pages + 64
        for kind in (self._prefill, self._decode):
            items, merges = self._capacity(kind)
            words += len(self._windows) * (ITEM_FIELDS * (1 + items) + MERGE_FIELDS * (1 + merges) + 64)
        return words

    def plan(self, meta: BatchMeta, fixed_rows: int | None = None) -> TritonPlan:
        """Fill the device's lists for a step.

        With `fixed_rows` (a graph's padded number of rows, each of few tokens) every launch has the size that so many rows
        could need, so the launches captured from one such plan also serve the next one of the same `fixed_rows`.
        """
        num_tokens = max((o + c for o, c in zip(meta.offsets, meta.counts, strict=True)), default=0)
        if num_tokens > self._max_tokens or len(meta.counts) > self._max_rows:
            raise ValueError(f"step of {num_tokens} tokens in {len(meta.counts)} rows exceeds the buffers")
        needed = [-(-(s + c) // self._page_size) for s, c in zip(meta.starts, meta.counts, strict=True)]
        tables = self._mirror.flatten(meta.tables, needed)
        if len(tables) > self._max_pages:
            self._max_pages = 2 * len(tables)
            self._staging = Staging(self._words(), self._device)
            self.generation += 1
        ends = np.cumsum(np.array(needed, np.int64))
        starts, counts, offsets = (np.array(part, np.int64) for part in (meta.starts, meta.counts, meta.offsets))
        rows = Rows(starts, counts, offsets, ends - needed)

        short = rows.counts <= self._decode.split.unit_tokens
        if fixed_rows is not None and not (short.all() and len(short) <= fixed_rows):
            raise ValueError("a plan of fixed size holds only rows of few tokens")
        sections = Sections(self._staging.begin(), self._staging.device)
        slots = token_slots(rows, tables, self._page_size, self._max_tokens)
        slots_there = sections.flat(slots, self._max_tokens)
        windows = {
            window: (
                self._place(sections, self._prefill, plan_work(rows[~short], self._prefill.split, window), None),
                self._place(sections, self._decode, plan_work(rows[short], self._decode.split, window), fixed_rows),
            )
            for window in self._windows
        }
        tables_there = sections.flat(tables, self._max_pages)
        self._staging.send(sections.used)
        return TritonPlan(slots_there, tables_there, windows)

    def _place(self, sections: Sections, kind: Kind, work: Work, fixed_rows: int | None) -> Launched:
        max_items, max_merges = self._capacity(kind)
        num_items, num_merges = len(work.items), len(work.merges)
        if fixed_rows is not None:
            num_items, num_merges = fixed_rows + kind.split.max_partials, max_merges
        return Launched(
            sections.counted(work.items, max_items), sections.counted(work.merges, max_merges), num_items, num_merges
        )

    def run(
        self, handle: TritonPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Write k, v ([T, K, D], rotated already) into the pages of `layer`, then attend with q [T, H, D]."""
        self._write(handle, layer, q, k, v, None, None)
        return self._attend(handle, layer, q, window)

    def run_rotary(
        self,
        handle: TritonPlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        window: int | None,
        norm: QKNorm | None = None,
    ) -> torch.Tensor:
        """`run` on q, k not rotated yet: norm, rotation and write are one pass. q is changed in place, k is not."""
        self._write(handle, layer, q, k, v, rotation, norm)
        return self._attend(handle, layer, q, window)

    def _write(
        self,
        handle: TritonPlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        norm: QKNorm | None,
    ) -> None:
        kv = self._layers[layer]
        half = triton.next_power_of_2(self._head_dim // 2)
        heads = heads_per_program(self._kv_heads, half)
        q_blocks = triton.cdiv(q.shape[1], heads) if rotation else 0
        cos, sin = rotation or (q, q)
        write_kernel[(q.shape[0], q_blocks + triton.cdiv(self._kv_heads, heads))](
            q,
            k,
            v,
            cos,
            sin,
            norm.q_weight if norm else q,
            norm.k_weight if norm else q,
            kv,
            handle.slots,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cos.stride(0),
            kv.stride(0),
            kv.stride(1),
            norm.eps if norm else 0.0,
            Q_BLOCKS=q_blocks,
            Q_HEADS=q.shape[1],
            KV_HEADS=self._kv_heads,
            HEAD_DIM=self._head_dim,
            HALF=half,
            HEADS=heads,
            PAGE_SIZE=self._page_size,
            ROTATE=rotation is not None,
            NORM=norm is not None,
            num_warps=2,
        )

    def _attend(self, handle: TritonPlan, layer: int, q: torch.Tensor, window: int | None) -> torch.Tensor:
        num_heads = self._kv_heads * self._group
        out = torch.empty((q.shape[0], num_heads * self._head_dim), dtype=q.dtype, device=q.device)
        prefill, decode = handle.windows[window]
        self._launch(self._prefill, prefill, handle, layer, q, window, out)
        self._launch(self._decode, decode, handle, layer, q, window, out)
        return out

    def _launch(
        self,
        kind: Kind,
        lists: Launched,
        handle: TritonPlan,
        layer: int,
        q: torch.Tensor,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        if not lists.num_items:
            return
        kv = self._layers[layer]
        launch = kind.launch
        shape = {
            "KV_HEADS": self._kv_heads,
            "GROUP": self._group,
            "HEAD_DIM": self._head_dim,
            "BLOCK_D": self._block_d,
            "BLOCK_M": launch.block_m,
        }
        attend_kernel[(lists.num_items * self._kv_heads,)](
            q,
            kv,
            out,
            kind.partials,
            kind.lse,
            lists.items,
            handle.tables,
            self._head_dim**-0.5 * math.log2(math.e),
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            kv.stride(1),
            window or 0,
            **shape,
            PAGE_SIZE=self._page_size,
            BLOCK_N=launch.block_n,
            WINDOWED=window is not None,
            UNIFORM=kind is self._decode,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            WIDE=q.dtype == torch.bfloat16 and q.device.type == "cpu",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if lists.num_merges:
            merge_kernel[(lists.num_merges * self._kv_heads * self._group,)](
                kind.partials, kind.lse, out, lists.merges, **shape, TILE=_MERGE_TILE, num_warps=4
            )


@dataclass(frozen=True, slots=True)
class Kind:
    """One shape of the attention kernel with the partial results its cut units leave."""

    launch: Launch
    split: Split
    partials: torch.Tensor  # [slots * K * block_m, block_d] float32
    lse: torch.Tensor  # [slots * K * block_m] float32, base 2
