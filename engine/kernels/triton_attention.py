"""Paged attention by Triton on the host's side: a step planned once, its kernels launched once a layer.

`plan` fills one int32 buffer (write slots, work lists, page tables) and copies it once. `run` only launches. Lists carry their
own length, so launches of fixed size can be captured in a CUDA graph and replayed after a later plan. The kernels are in
`triton_attend` and `triton_write`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from engine.kernels.api import BatchMeta
from engine.kernels.cuda_attention import CudaAttention
from engine.kernels.cuda_staging import Sections, Staging
from engine.kernels.triton_attend import attend_kernel, merge_kernel
from engine.kernels.triton_config import Launch, Tuning, tuning
from engine.kernels.triton_plan import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Split,
    Work,
    plan_work,
    token_slots,
)

_MERGE_TILE = 16  # partial results that one program merges at a time


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


class TritonAttention(CudaAttention[TritonPlan]):
    """`api.RotaryAttention` by Triton kernels. `tuned` replaces the launch shapes that suit the device."""

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
        super().__init__(kv, num_heads, max_tokens=max_tokens, max_rows=max_rows, max_pages=max_pages, windows=windows)
        self._group = num_heads // self._kv_heads
        self._block_d = max(16, triton.next_power_of_2(self._head_dim))
        tuned = (tuned or tuning(kv.device, self._block_d, kv.dtype)).holding(self._group)
        self._prefill = self._kind(tuned.prefill, tuned.multiprocessors)
        self._decode = self._kind(tuned.decode, tuned.multiprocessors)
        self._staging = Staging(self._words(), kv.device)

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
        rows, tables, _ = self._lay_out(meta)
        if len(tables) > self._max_pages:
            self._max_pages = 2 * len(tables)
            self._staging = Staging(self._words(), self._device)
            self.generation += 1

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

    def _attend(self, handle: TritonPlan, layer: int, q: torch.Tensor, window: int | None) -> torch.Tensor:
        out = torch.empty((q.shape[0], self._num_heads * self._head_dim), dtype=q.dtype, device=q.device)
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
