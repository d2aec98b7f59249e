"""ControlPage: the shared memory between the main process, its offline worker and the guardian.

64-bit words, each with exactly one writer, so nobody ever waits for a lock that a frozen process might hold. The layout:
fixed words (`Word`), one word per slab (owner and epoch), then two buffers for the worker's report, of which a word names the
complete one. A worker frozen in the middle of writing leaves the other buffer whole.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from typing import Any

import msgspec

from engine.errors import InvalidConfig
from engine.types import Tenant

_MAGIC = 0x534C55494345_0001
_REPORT_BYTES = 256 * 1024
_WORD = 8


class Word(IntEnum):
    """Writer beside each."""

    MAGIC = 0  # main, once
    NUM_SLABS = 1  # main, once
    HEARTBEAT = 2  # main: monotonic ns of its last sign of life
    FROZEN = 3  # main: 1 while the worker is meant to stand still
    GENERATION = 4  # main: bumped after every change of a slab's owner
    PROGRESS = 5  # worker: layers computed, or spins while probed
    PROGRESS_NS = 6  # worker: monotonic ns of the last progress
    REPORT = 7  # worker: which report buffer is complete, plus two times its length
    RESCUES = 8  # guardian: times it thawed the worker because main gave no sign of life


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
        side = 1 - (self._words[Word.REPORT] & 1)
        at = self._report_at + side * _REPORT_BYTES
        self._map[at : at + len(data)] = data
        self._words[Word.REPORT] = len(data) << 1 | side
        return True

    def read_report(self, kind: type[Any]) -> Any:
        """The last complete report, decoded as `kind`; None if there is none yet."""
        value = self._words[Word.REPORT]
        if value >> 1 == 0:
            return None
        at = self._report_at + (value & 1) * _REPORT_BYTES
        return msgspec.msgpack.decode(self._map[at : at + (value >> 1)], type=kind)

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
