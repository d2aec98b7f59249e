"""Kernels that show progress: a word in pinned host memory, which the processor reads meanwhile; blocks that meet."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(word_ptr, turns):
    """Add 1 to the word, `turns` times."""
    for _ in range(turns):
        tl.atomic_add(word_ptr, 1, sem="relaxed", scope="sys")


@triton.jit
def meet_kernel(word_ptr, turns, blocks):
    """Every block adds 1 and waits for all others, `turns` times: they must all be on the device at once."""
    for turn in range(turns):
        tl.atomic_add(word_ptr, 1, sem="release", scope="gpu")
        while tl.atomic_add(word_ptr, 0, sem="acquire", scope="gpu") < (turn + 1) * blocks:
            pass
