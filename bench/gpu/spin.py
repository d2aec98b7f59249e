"""A kernel that shows progress: it adds to a word in pinned host memory, which the processor reads meanwhile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(word_ptr, turns):
    """Add 1 to the word, `turns` times."""
    for _ in range(turns):
        tl.atomic_add(word_ptr, 1, sem="relaxed", scope="sys")
