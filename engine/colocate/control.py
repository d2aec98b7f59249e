"""ControlPage: the shared memory between the main process, its offline worker and the guardian.

64-bit words, each with exactly one writer, so nobody ever waits for a lock that a frozen process might hold. The layout:
fixed words (`Word`), one word per slab (owner and epoch), then two buffers for the worker's report, of which a word names the
complete one. A worker frozen in the middle of writing leaves the other buffer whole.
"""

from __future__ import annotations

import mmap
import os
import time
from enum import IntEnum
from typing import Any

import msgspec

from engine.errors import InvalidConfig
from engine.types import Tenant

LEASE_SECONDS = 1.0
"""A main process that is silent for longer no longer owns the frozen state of its worker."""

_MAGIC = 0x534C55494345_0001
_REPORT_BYTES = 256 * 1024
_WORD = 8


class Word(IntEnum):
    """Writer beside each."""

    MAGIC = 0  # main, once
    NUM_SLABS = 1  # main, once
    HEARTBEAT = 2  # main: monotonic ns of its last sign of life
    FROZEN = 3  # main: not 0 while the worker is meant to stand still; on a GPU it also says by what (`gate.Freeze`)
    GENERATION = 4  # main: bumped after every change of a slab's owner
    PROGRESS = 5  # worker: layers computed, or spins while probed
    PROGRESS_NS = 6  # worker: monotonic ns of the last progress
    REPORT = 7  # worker: number of its last complete report (32 bits; odd ones are in the second buffer), length (32 bits)
    RESCUES = 8  # guardian: times it thawed the worker because main gave no sign of life
    HELD = 9  # worker: 1 while its GPU channels are surely off
    LET_GO = 10  # worker: every slab it had lost by this GENERATION has left its GPU window; 0 if it has mapped none yet


class ControlPage:
    """One shared page set. Made by the main process, mapped by the others from its descriptor."""

    def __init__(self, num_slabs: int, fd: int | None = None) -> None:
        self.num_slabs = num_slabs
        first = (len(Word) + num_slabs) * _WORD
        self._report_at = -(-first // 64) * 64
        size = self._report_at + 2 * _REPORT_BYTES
        self.fd = _make_file(size) if fd is None else fd
        self._map = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        self._words = memoryview(self._map).cast("Q")
        if fd is None:
            self._words[Word.NUM_SLABS] = num_slabs
            self._words[Word.MAGIC] = _MAGIC
        assert self._words[Word.MAGIC] == _MAGIC and self._words[Word.NUM_SLABS] == num_slabs

    def __getitem__(self, word: Word) -> int:
        return int(self._words[word])

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    def beat(self) -> None:
        """Main's sign of life."""
        self._words[Word.HEARTBEAT] = time.monotonic_ns()

    def main_is_alive(self) -> bool:
        """Whether main gave a sign of life within the lease."""
        return time.monotonic_ns() - self[Word.HEARTBEAT] < LEASE_SECONDS * 1e9

    # -- slabs: written by main, read by the worker

    def publish_slab(self, slab: int, owner: Tenant, epoch: int) -> None:
        self._words[len(Word) + slab] = epoch << 1 | (owner is Tenant.OFFLINE)
        self._words[Word.GENERATION] += 1

    def slab(self, slab: int) -> tuple[Tenant, int]:
        value = self._words[len(Word) + slab]
        return (Tenant.OFFLINE if value & 1 else Tenant.ONLINE), value >> 1

    # -- the worker's report: written by the worker, read by main

    def write_report(self, report: Any) -> bool:
        """Publish the report; False if it is too large to fit (the old one then stays)."""
        data = msgspec.msgpack.encode(report)
        if len(data) > _REPORT_BYTES:
            return False
        number = ((self._words[Word.REPORT] >> 32) + 1) & 0xFFFF_FFFF
        at = self._report_at + (number & 1) * _REPORT_BYTES
        self._map[at : at + len(data)] = data
        self._words[Word.REPORT] = number << 32 | len(data)
        return True

    def read_report(self, kind: type[Any]) -> Any:
        """The last complete report, decoded as `kind`; None if there is none yet."""
        while value := self._words[Word.REPORT]:
            at = self._report_at + (value >> 32 & 1) * _REPORT_BYTES
            data = self._map[at : at + (value & 0xFFFF_FFFF)]
            # A newer report means that the one after it may have been written over this one meanwhile.
            if self._words[Word.REPORT] == value:
                return msgspec.msgpack.decode(data, type=kind)
        return None

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)


def _make_file(size: int) -> int:
    try:
        fd = os.memfd_create("sluice-control", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
    except OSError as error:
        raise InvalidConfig(f"no shared memory for the control page: {error.strerror}") from error
    return fd
