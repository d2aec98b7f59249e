"""What comes before attention: q and k normalised and rotated, k and v written to their pages, in one pass.

Not yet run on a GPU: checked by interpretation and compiled ahead of time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.api import QKNorm
from engine.kernels.triton_ops import heads_per_program, normed_pair


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


def write_kv(
    kv: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    norm: QKNorm | None = None,
) -> None:
    """Write k, v [T, K, D] to the slots [T] (page * page_size + place, -1 for nowhere) of one layer, [P, 2, page_size, K, D].

    With `rotation` q [T, H, D] is rotated in place first, and k on its way; with `norm` both are normalised before.
    """
    _, _, page_size, kv_heads, head_dim = kv.shape
    half = triton.next_power_of_2(head_dim // 2)
    heads = heads_per_program(kv_heads, half)
    q_blocks = triton.cdiv(q.shape[1], heads) if rotation else 0
    cos, sin = rotation or (q, q)
    write_kernel[(q.shape[0], q_blocks + triton.cdiv(kv_heads, heads))](
        q,
        k,
        v,
        cos,
        sin,
        norm.q_weight if norm else q,
        norm.k_weight if norm else q,
        kv,
        slots,
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
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HEADS=heads,
        PAGE_SIZE=page_size,
        ROTATE=rotation is not None,
        NORM=norm is not None,
        num_warps=2,
    )
