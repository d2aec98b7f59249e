"""Plain torch: the oracle of every kernel test and the path of devices without kernels of their own.

Owns the meaning of each operation in `api`. Nothing here is clever: where a faster file and this one disagree, this one
is right. Rows are attended one after another; low precision is computed in float32 where a kernel would do so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels.api import BatchMeta


class TorchOps:
    """The operations of `api.Ops` in torch."""

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return weight, bias

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        weight, bias = packed
        return F.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, so it serves hidden states [T, hidden] and heads [T, H, D] alike."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide.to(x.dtype) * weight

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.float()[:, None], sin.float()[:, None]  # [T, 1, D / 2]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a step with its page table as a tensor."""

    start: int
    count: int
    offset: int
    pages: torch.Tensor  # int64, covers start + count tokens

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class TorchPlan:
    rows: tuple[PlannedRow, ...]
    slot_pages: torch.Tensor  # [T] int64: page of each token computed in this step
    slot_offsets: torch.Tensor  # [T] int64: its place in the page


def plan_rows(meta: BatchMeta, page_size: int, device: torch.device) -> TorchPlan:
    """Page tables and write positions of a step as tensors."""
    rows = []
    for start, count, offset, table in zip(meta.starts, meta.counts, meta.offsets, meta.tables, strict=True):
        needed = -(-(start + count) // page_size)
        if len(table) < needed:
            raise ValueError(f"page table has {len(table)} pages, {needed} needed for {start + count} tokens")
        rows.append(PlannedRow(start, count, offset, torch.tensor(table[:needed], dtype=torch.int64, device=device)))
    spans = [torch.arange(row.start, row.end, device=device) for row in rows]
    slot_pages = torch.cat([row.pages[span // page_size] for row, span in zip(rows, spans, strict=True)])
    return TorchPlan(tuple(rows), slot_pages, torch.cat(spans) % page_size)


class TorchAttention:
    """Paged causal attention of `api.Attention`: gather a row's keys and values, then `scaled_dot_product_attention`.

    `kv` is `KVLayout.view` of a window, [P, num_layers, 2, page_size, K, D]. The scale is 1 / sqrt(D).
    """

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv = kv
        self._page_size = kv.shape[3]

    def plan(self, meta: BatchMeta) -> TorchPlan:
        return plan_rows(meta, self._page_size, self._kv.device)

    def run(
        self, handle: TorchPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        keys, values = self._kv[:, layer, 0], self._kv[:, layer, 1]  # [P, page_size, K, D]
        keys[handle.slot_pages, handle.slot_offsets] = k
        values[handle.slot_pages, handle.slot_offsets] = v
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for row in handle.rows:
            mine = slice(row.offset, row.offset + row.count)
            if row.start == 0:  # everything it sees is at hand
                out[mine] = attend(q[mine], k[mine], v[mine], causal_mask(0, row.count, row.count, window, q))
                continue
            first = 0 if window is None else max(0, row.start - window + 1) // self._page_size
            pages, behind = row.pages[first:], first * self._page_size
            seen_k = keys[pages].flatten(0, 1)[: row.end - behind]
            seen_v = values[pages].flatten(0, 1)[: row.end - behind]
            mask = causal_mask(row.start - behind, row.count, seen_k.shape[0], window, q)
            out[mine] = attend(q[mine], seen_k, seen_v, mask)
        return out.flatten(1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of q [n, H, D] over k, v [m, K, D] where `causal_mask` allows it; returns [n, H, D].

    Query head h reads KV head h // (H / K).
    """
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    # KV heads are the batch and the heads of a group share keys by a stride of 0: nothing is repeated in memory.
    query = q.view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    key = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    value = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(n, num_heads, head_dim)


def causal_mask(start: int, n: int, m: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """What queries at positions start .. start + n - 1 see of keys at 0 .. m - 1: [n, m], added to the scores.

    None stands for the plain triangle, which needs no memory. The dtype and device are those of `like`.
    """
    if start == 0 and (window is None or window >= n):
        return None
    distance = torch.arange(start, start + n, device=like.device)[:, None] - torch.arange(m, device=like.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(n, m, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
