"""Whole pages to and from a packed buffer, for a host tier that may not copy from the window itself (`cuda_host_store`): one
launch for any number of scattered pages.

A page is bytes here; its layers, heads and type do not matter. The kernel moves 16 bytes a thread and access; it has not yet
run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.api import KVLayout

_WORDS = 4096  # 4-byte words that one program moves


@triton.jit
def copy_pages_kernel(
    window_ptr,
    pages_ptr,
    packed_ptr,
    page_stride,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    """One block of one page: window -> packed (GATHER), or packed -> window. Sizes and strides in 4-byte words."""
    index = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(pages_ptr + index).to(tl.int64)
    inside = word < WORDS
    in_window = window_ptr + page * page_stride + word
    in_packed = packed_ptr + index * WORDS + word
    if GATHER:
        tl.store(in_packed, tl.load(in_window, mask=inside), mask=inside)
    else:
        tl.store(in_window, tl.load(in_packed, mask=inside), mask=inside)


class PagePacker:
    """`kernels.api.Packer` for one window, whose bytes (uint8, 1-D) `window` is."""

    def __init__(self, layout: KVLayout, window: torch.Tensor) -> None:
        if layout.page_bytes % 4 or layout.page_stride % 4:
            raise ValueError(f"pages of {layout.page_bytes} bytes are not whole 4-byte words")
        self._window = window.view(torch.int32)
        self._words = layout.page_bytes // 4
        self._stride = layout.page_stride // 4
        self.page_bytes = layout.page_bytes

    def gather(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        self._copy(pages, packed, gather=True)

    def scatter(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        self._copy(pages, packed, gather=False)

    def _copy(self, pages: torch.Tensor, packed: torch.Tensor, *, gather: bool) -> None:
        count = pages.shape[0]
        if packed.shape[0] < count or packed.shape[1] != self.page_bytes or not packed.is_contiguous():
            raise ValueError(f"need a contiguous buffer of {count} x {self.page_bytes} bytes, got {tuple(packed.shape)}")
        if count:
            copy_pages_kernel[(triton.cdiv(self._words, _WORDS), count)](
                self._window,
                pages,
                packed.view(torch.int32),
                self._stride,
                WORDS=self._words,
                BLOCK=_WORDS,
                GATHER=gather,
                num_warps=4,
            )
