"""Decoder operations as Triton kernels: RMSNorm (with residual, and per head), rotary pairs, gated activation.

Each kernel reads its input once and writes its output once; arithmetic is float32, results have the model's dtype. Dense
products stay with the vendor's library. The kernels run on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1, which
is how they are tested; they have not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ELEMENTWISE_BLOCK = 1024
_NORM_TILE = 2048  # elements one program normalises when rows are short


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    num_rows,
    heads,
    x_token,
    x_head,
    residual_row,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    """out[r] = x[r] / rms(x[r]) * weight for ROWS rows; row r is head r % heads of token r // heads.

    With ADD, x + residual is rounded to the model's dtype, stored in `sum` and normalised instead.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    wide = rows.to(tl.int64)
    mask = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
    start = (wide // heads) * x_token + (wide % heads) * x_head
    x = tl.load(x_ptr + start[:, None] + cols[None, :], mask=mask, other=0.0)
    at = wide[:, None] * WIDTH + cols[None, :]
    if ADD:
        residual = tl.load(residual_ptr + wide[:, None] * residual_row + cols[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=mask)
    value = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    normed = (value * scale[:, None]).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + at, (normed * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, i] = silu(x[t, i]) * x[t, WIDTH + i] for one block of i."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    gate = tl.load(x_ptr + row * x_row + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * WIDTH + cols, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normed_pair(low, high, weight_ptr, pair, mask, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Both halves [heads, D / 2] of some heads as float32, RMS-normalised over the whole head when NORM."""
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD_DIM + eps)
        wa = tl.load(weight_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        wb = tl.load(weight_ptr + HEAD_DIM // 2 + pair, mask=mask, other=0.0).to(tl.float32)
        a = ((a * scale[:, None]).to(low.dtype).to(tl.float32) * wa[None, :]).to(low.dtype).to(tl.float32)
        b = ((b * scale[:, None]).to(low.dtype).to(tl.float32) * wb[None, :]).to(low.dtype).to(tl.float32)
    return a, b


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    table_row,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate HEADS heads of one token in place; blocks of q's heads come first, then those of k."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    pair = tl.arange(0, HALF)
    inside = pair < HEAD_DIM // 2
    cos = tl.load(cos_ptr + token * table_row + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * table_row + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        at = q_ptr + token * q_token + head[:, None] * q_head + pair[None, :]
        mask = (head < Q_HEADS)[:, None] & inside[None, :]
        rotate_in_place(at, mask, cos, sin, HEAD_DIM)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        at = k_ptr + token * k_token + head[:, None] * k_head + pair[None, :]
        mask = (head < K_HEADS)[:, None] & inside[None, :]
        rotate_in_place(at, mask, cos, sin, HEAD_DIM)


@triton.jit
def rotate_in_place(at, mask, cos, sin, HEAD_DIM: tl.constexpr):
    """Rotate the pairs (at, at + HEAD_DIM / 2) by float32 cos and sin."""
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (low * cos - high * sin).to(at.dtype.element_ty), mask=mask)
    tl.store(at + HEAD_DIM // 2, (high * cos + low * sin).to(at.dtype.element_ty), mask=mask)


def heads_per_program(heads: int, half: int) -> int:
    """How many heads one program rotates: about 1,024 pairs, never more heads than there are (rounded up)."""
    return max(1, min(triton.next_power_of_2(heads), 1024 // half))


def _warps(elements: int) -> int:
    """Warps for a tile of so many elements: 16 a thread, between 1 and 16 warps."""
    return max(1, min(16, elements // 512))


class TritonOps:
    """`api.Ops` by Triton kernels. `rotary` works in place; the inner dimension of every tensor is contiguous."""

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return weight.contiguous(), bias

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        weight, bias = packed
        return torch.nn.functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension of x [T, hidden] or, per head, [T, H, D]; x may be a slice of a wider tensor."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(x, None, weight, eps, out, out)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual) for x, residual [T, hidden], in one pass."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = torch.empty_like(out)
        self._norm(x, residual, weight, eps, out, total)
        return out, total

    @staticmethod
    def _norm(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        total: torch.Tensor,
    ) -> None:
        width = x.shape[-1]
        heads = x.shape[1] if x.dim() == 3 else 1
        num_rows = x.shape[0] * heads
        if num_rows == 0:
            return
        block = triton.next_power_of_2(width)
        rows = max(1, min(triton.next_power_of_2(num_rows), _NORM_TILE // block))
        rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            x if residual is None else residual,
            weight,
            out,
            total,
            num_rows,
            heads,
            x.stride(0),
            x.stride(1) if x.dim() == 3 else 0,
            0 if residual is None else residual.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            ROWS=rows,
            ADD=residual is not None,
            num_warps=_warps(rows * block),
        )

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q [T, H, D] and k [T, K, D] **in place** by cos, sin [T, D / 2]; returns the same tensors."""
        tokens, q_heads, head_dim = q.shape
        half = triton.next_power_of_2(head_dim // 2)
        heads = heads_per_program(q_heads, half)
        if tokens:
            grid = (tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k.shape[1], heads))
            rotary_kernel[grid](
                q,
                k,
                cos,
                sin,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                cos.stride(0),
                Q_HEADS=q_heads,
                K_HEADS=k.shape[1],
                HEAD_DIM=head_dim,
                HALF=half,
                HEADS=heads,
                num_warps=2,
            )
        return q, k

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[:, :F]) * x[:, F:] for x [T, 2F]."""
        tokens, width = x.shape[0], x.shape[1] // 2
        out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
        if tokens:
            grid = (tokens, triton.cdiv(width, _ELEMENTWISE_BLOCK))
            silu_mul_kernel[grid](x, out, x.stride(0), WIDTH=width, BLOCK=_ELEMENTWISE_BLOCK, num_warps=4)
        return out
