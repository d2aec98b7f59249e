"""The host tier of a GPU: pinned memory, and the copies between it and the window on a stream of their own.

`CudaHostStore` copies page by page: pages are contiguous in the window (page-major), so one page is one copy, made by a copy
engine: no multiprocessor is taken from the steps that run meanwhile, and packing pages first would only add a pass over the
memory. `PackedHostStore` does add it, where another process takes slabs of the window at any time: a frozen process's copy
engines go on, and would meet an address that is a hole just then; its kernels stand still. Neither has yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.errors import InvalidConfig
from engine.kernels.api import KVLayout, Packer

_BATCH_BYTES = 32 * 2**20  # of a transfer: one or two milliseconds of PCIe
_PACKED_BYTES = 16 * 2**20  # the same, where it takes room on the device
_BUFFERS = 3  # one is packed, one copied, one unpacked


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
        self._store = _pinned(num_slots, layout.page_bytes, window)

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


@dataclass(slots=True, eq=False)
class _Flight:
    """A transfer of `PackedHostStore`. `pages` are those of the window, on the device."""

    load: bool
    pages: torch.Tensor
    packed: torch.Tensor
    began: Any
    ended: Any
    landed: bool = False


class PackedHostStore:
    """`memory.host.PageCopier` that touches the window by kernels alone, in the stream of the steps.

    They are launched as layers are, inside `launching`, so whatever holds for a layer that is frozen, drained or finds the sink
    in place of its slab holds for them. A save is packed behind the steps launched before it, and copied from there beside the
    next ones. A load is copied beside the steps, and unpacked when `poll` or `wait` finds it complete, before any later step.
    `batch` is 0 while all buffers are in use.
    """

    def __init__(
        self,
        layout: KVLayout,
        window: torch.Tensor,
        num_slots: int,
        packer: Packer,
        launching: Callable[[], AbstractContextManager[None]],
        cuda: Any = torch.cuda,
    ) -> None:
        """As `CudaHostStore`. Raises InvalidConfig if the host memory cannot be had."""
        self.page_bytes = layout.page_bytes
        self.num_slots = num_slots
        self._packer = packer
        self._launching = launching
        self._cuda = cuda
        self._stream = cuda.Stream()
        self._batch = max(1, _PACKED_BYTES // layout.page_bytes)
        self._free = [window.new_empty((self._batch, layout.page_bytes)) for _ in range(_BUFFERS)]
        self._store = _pinned(num_slots, layout.page_bytes, window)

    @property
    def batch(self) -> int:
        return self._batch if self._free else 0

    def start(self, transfer: Moves) -> _Flight:
        packed = self._free.pop()
        pages = torch.tensor([page for page, _ in transfer.moves], dtype=torch.int32, pin_memory=packed.is_cuda)
        flight = _Flight(
            transfer.load, pages.to(packed.device, non_blocking=True), packed,
            *(self._cuda.Event(enable_timing=True) for _ in range(2)),
        )  # fmt: skip
        if not transfer.load:
            with self._launching():
                self._packer.gather(flight.pages, packed)
        self._stream.wait_stream(self._cuda.current_stream())  # for what was packed, or for the last use of the buffer
        with self._cuda.stream(self._stream):
            flight.began.record()
            for index, (_, slot) in enumerate(transfer.moves):
                if transfer.load:
                    packed[index].copy_(self._store[slot], non_blocking=True)
                else:
                    self._store[slot].copy_(packed[index], non_blocking=True)
            flight.ended.record()
        return flight

    def poll(self, handle: _Flight) -> float | None:
        if not handle.ended.query():
            return None
        self._land(handle)
        return float(handle.began.elapsed_time(handle.ended)) / 1e3

    def wait(self, handle: _Flight) -> None:
        """A load is unpacked at once: later its pages may be somebody else's."""
        handle.ended.synchronize()
        self._land(handle)

    def _land(self, flight: _Flight) -> None:
        if flight.landed:
            return
        flight.landed = True
        if flight.load:
            with self._launching():
                self._packer.scatter(flight.pages, flight.packed)
        self._free.append(flight.packed)

    def close(self) -> None:
        """Let go of the memory; it goes with the last view of it."""
        self._stream.synchronize()
        self._free, self._store = [], torch.empty((0, self.page_bytes), dtype=torch.uint8)


def _pinned(num_slots: int, page_bytes: int, window: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty((num_slots, page_bytes), dtype=torch.uint8, pin_memory=window.is_cuda)
    except RuntimeError as error:
        size = num_slots * page_bytes / 2**30
        raise InvalidConfig(f"cannot pin {size:.2f} GiB of host memory: lower --host-kv-memory") from error
