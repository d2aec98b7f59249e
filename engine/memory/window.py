"""Windows: one reserved range of KV bytes per worker, whose slabs are backed by memory or not.

A window owns addresses, not decisions: which slab belongs to whom is the pool's business. `HostWindow` is a memory file
mapped shared, so that another process holding the same descriptor can take a slab's memory away from a frozen owner: the
owner then reads zeros there and never faults.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Protocol

import torch

from engine.errors import InvalidConfig

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Window(Protocol):
    """Reserved KV bytes: `num_slabs` pieces of `slab_bytes`, mapped and unmapped one by one."""

    @property
    def num_slabs(self) -> int: ...

    @property
    def slab_bytes(self) -> int: ...

    @property
    def tensor(self) -> torch.Tensor:
        """uint8, 1-D, over the whole range without a copy; valid until `close`."""
        ...

    def map(self, slab: int) -> None:
        """Give the slab memory. Its content is unspecified."""
        ...

    def unmap(self, slab: int) -> None:
        """Take the slab's memory away. Reads from its range are still safe."""
        ...

    def close(self) -> None: ...


class HostWindow:
    """A window in host memory: memfd_create(2) and a shared mapping; memory comes with the first touch of a page.

    With `fd`, a descriptor received from the process that made the window, the same bytes are mapped here too (the descriptor
    is duplicated and stays the caller's). Raises InvalidConfig if the range cannot be reserved.
    """

    def __init__(self, num_slabs: int, slab_bytes: int, fd: int | None = None) -> None:
        if num_slabs < 1 or slab_bytes < 1 or slab_bytes % mmap.PAGESIZE:
            raise ValueError(f"{num_slabs} slabs of {slab_bytes} bytes: need >= 1 slab of whole {mmap.PAGESIZE}-byte pages")
        self.num_slabs = num_slabs
        self.slab_bytes = slab_bytes
        self._mapped = bytearray(num_slabs)
        self._fd = _make_file(num_slabs * slab_bytes) if fd is None else _same_file(fd, num_slabs * slab_bytes)
        try:
            memory = mmap.mmap(self._fd, num_slabs * slab_bytes, mmap.MAP_SHARED | _MAP_NORESERVE)
        except OSError as error:
            os.close(self._fd)
            raise _no_room(num_slabs * slab_bytes, error) from error
        self._tensor: torch.Tensor | None = torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def tensor(self) -> torch.Tensor:
        assert self._tensor is not None, "the window is closed"
        return self._tensor

    def fileno(self) -> int:
        """The memory file, to be passed to another process over a unix socket."""
        return self._fd

    def is_mapped(self, slab: int) -> bool:
        return bool(self._mapped[slab])

    def map(self, slab: int) -> None:
        assert 0 <= slab < self.num_slabs and not self._mapped[slab], f"slab {slab} cannot be mapped"
        self._mapped[slab] = True

    def unmap(self, slab: int) -> None:
        assert 0 <= slab < self.num_slabs and self._mapped[slab], f"slab {slab} cannot be unmapped"
        self.punch(slab)
        self._mapped[slab] = False

    def punch(self, slab: int) -> None:
        """Give the slab's memory back to the system, whoever mapped it: every process reads zeros there afterwards.

        Raises OSError; the slab's bytes are then unspecified.
        """
        _punch_hole(self._fd, slab * self.slab_bytes, self.slab_bytes)

    def close(self) -> None:
        """Drop the descriptor and the mapping; the mapping itself goes with the last tensor that views it."""
        if self._tensor is None:
            return
        # NOTE: never mmap.close(): torch keeps no buffer export, so that would unmap the bytes under a living view.
        self._tensor = None
        os.close(self._fd)


class TensorWindow:
    """A window that is one tensor on any device: all of its memory is there from the start, mapping is bookkeeping.

    For a device that serves one model. Raises InvalidConfig if the device has no room.
    """

    def __init__(self, num_slabs: int, slab_bytes: int, device: torch.device) -> None:
        self.num_slabs = num_slabs
        self.slab_bytes = slab_bytes
        self._mapped = bytearray(num_slabs)
        try:
            self._tensor: torch.Tensor | None = torch.zeros(num_slabs * slab_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            size = num_slabs * slab_bytes / 2**30
            raise InvalidConfig(
                f"no room for {size:.2f} GiB of KV on {device}: lower --gpu-memory-utilization or --kv-cache-memory"
            ) from error

    @property
    def tensor(self) -> torch.Tensor:
        assert self._tensor is not None, "the window is closed"
        return self._tensor

    def is_mapped(self, slab: int) -> bool:
        return bool(self._mapped[slab])

    def map(self, slab: int) -> None:
        assert 0 <= slab < self.num_slabs and not self._mapped[slab], f"slab {slab} cannot be mapped"
        self._mapped[slab] = True

    def unmap(self, slab: int) -> None:
        assert 0 <= slab < self.num_slabs and self._mapped[slab], f"slab {slab} cannot be unmapped"
        self._mapped[slab] = False

    def close(self) -> None:
        """Let go of the memory; it is free when the last view is."""
        self._tensor = None


def _make_file(size: int) -> int:
    try:
        fd = os.memfd_create("sluice-kv", os.MFD_CLOEXEC)
    except OSError as error:
        raise InvalidConfig(f"no memory file for the KV window: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise _no_room(size, error) from error
    return fd


def _same_file(fd: int, size: int) -> int:
    actual = os.fstat(fd).st_size
    if actual != size:
        raise ValueError(f"the memory file has {actual} bytes, the window {size}")
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def _no_room(size: int, error: OSError) -> InvalidConfig:
    remedy = "ask for less KV memory"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        remedy += " or raise the address-space limit (ulimit -v) and vm.overcommit_memory"
    return InvalidConfig(f"cannot reserve {size / 2**30:.2f} GiB of host memory for KV: {error.strerror}; {remedy}")


def _punch_hole(fd: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    while libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, f"cannot take {size} bytes at {offset} out of the KV window: {os.strerror(code)}")
