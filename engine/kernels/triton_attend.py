"""Paged attention as Triton kernels: one for every item of work, one to merge.

The pages are page-major, [page][layer][k/v][token][kv_head][head_dim]; a kernel sees one layer as a strided view. Query heads
that share a KV head are packed with tokens into the rows of a tile (row m is token m // G, head m % G), so keys are read once
per KV head and decoding fills the smallest tensor-core tile. Prefill and decode are the same kernel in two shapes. Softmax is
online, in base 2 (FlashAttention-2, Dao 2023); long rows are cut and merged by their log-sum-exp (Flash-Decoding).

The kernels have not yet run on a GPU: they are checked by interpretation and compiled ahead of time.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
