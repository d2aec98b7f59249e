"""HostStore: the bytes of the host tier on a CPU, a second store beside the window, and the copies between the two.

Pages are contiguous in the window (page-major), so one page is one memcpy. It is made in the caller's thread: a copy is short,
and a thread of its own would take the compute threads' cores in the middle of a step. numpy copies without the GIL and
without OpenMP, whose second pool of threads would slow every step down.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch

from engine.clock import Clock
from engine.errors import InvalidConfig
from engine.memory.host import Transfer

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_BATCH = 4  # pages copied between two looks at the door


class HostStore:
    """`memory.host.PageCopier` by memcpy. `window` is its bytes (uint8, 1-D); page i begins at i * page_stride.

    Memory comes with the first touch. Raises InvalidConfig if the range cannot be reserved.
    """

    batch = _BATCH

    def __init__(self, window: torch.Tensor, page_bytes: int, page_stride: int, num_slots: int, clock: Clock) -> None:
        self.page_bytes = page_bytes
        self.num_slots = num_slots
        self._clock = clock
        num_pages = window.numel() // page_stride
        self._window = np.lib.stride_tricks.as_strided(window.numpy(), (num_pages, page_bytes), (page_stride, 1))
        try:
            memory = mmap.mmap(-1, num_slots * page_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except OSError as error:
            size = num_slots * page_bytes / 2**30
            raise InvalidConfig(f"cannot reserve {size:.2f} GiB of host memory: lower --host-kv-memory") from error
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._store = np.frombuffer(memory, np.uint8).reshape(num_slots, page_bytes)

    def start(self, transfer: Transfer) -> float:
        began = self._clock.now()
        for page, slot in transfer.moves:
            if transfer.load:
                self._window[page] = self._store[slot]
            else:
                self._store[slot] = self._window[page]
        return self._clock.now() - began

    def poll(self, handle: float) -> float:
        return handle

    def wait(self, handle: float) -> None:
        pass

    def close(self) -> None:
        """Let go of both; the memory goes with the last view of it."""
        self._window = self._store = np.empty((0, self.page_bytes), np.uint8)
