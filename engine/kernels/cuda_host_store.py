"""CudaHostStore: the bytes of the host tier of a GPU, pinned memory, and the copies between the two on a stream of their own.

Pages are contiguous in the window (page-major), so one page is one copy, made by a copy engine: no multiprocessor is taken from
the steps that run meanwhile, and packing pages first would only add a pass over the memory. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.errors import InvalidConfig
from engine.kernels.api import KVLayout

_BATCH_BYTES = 32 * 2**20  # of a transfer: one or two milliseconds of PCIe


class Moves(Protocol):
    """What a transfer says; `memory.host.Transfer` is one. Moves are pairs of a page of the window and a slot of the store."""

    @property
    def load(self) -> bool: ...

    @property
    def moves(self) -> Sequence[tuple[int, int]]: ...


class CudaHostStore:
    """`memory.host.PageCopier` by asynchronous copies. `window` is the bytes of all pages on the device (uint8, 1-D).

    A transfer starts behind everything launched before it, and nobody but it touches its pages and slots until `poll` says that
    it is complete; so it needs no other order. `cuda` is torch.cuda, for its streams and events. Raises InvalidConfig if the
    host memory cannot be had.
    """

    def __init__(self, layout: KVLayout, window: torch.Tensor, num_slots: int, cuda: Any = torch.cuda) -> None:
        self.page_bytes = layout.page_bytes
        self.num_slots = num_slots
        self.batch = max(1, _BATCH_BYTES // layout.page_bytes)
        self._cuda = cuda
        self._stream = cuda.Stream()
        pages = window.view(-1, layout.page_stride)
        self._pages = pages[:, : layout.page_bytes]
        try:
            self._store = torch.empty((num_slots, layout.page_bytes), dtype=torch.uint8, pin_memory=window.is_cuda)
        except RuntimeError as error:
            size = num_slots * layout.page_bytes / 2**30
            raise InvalidConfig(f"cannot pin {size:.2f} GiB of host memory: lower --host-kv-memory") from error

    def start(self, transfer: Moves) -> tuple[Any, Any]:
        began, ended = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(self._stream):
            began.record()
            for page, slot in transfer.moves:
                there, here = self._pages[page], self._store[slot]
                if transfer.load:
                    there.copy_(here, non_blocking=True)
                else:
                    here.copy_(there, non_blocking=True)
            ended.record()
        return began, ended

    def poll(self, handle: tuple[Any, Any]) -> float | None:
        began, ended = handle
        return began.elapsed_time(ended) / 1e3 if ended.query() else None

    def wait(self, handle: tuple[Any, Any]) -> None:
        handle[1].synchronize()

    def close(self) -> None:
        """Let go of both; the memory goes with the last view of it."""
        self._stream.synchronize()
        self._pages = self._store = torch.empty((0, self.page_bytes), dtype=torch.uint8)
