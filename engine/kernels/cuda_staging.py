"""A step's integers on their way to the device: one buffer, one copy, no waiting.

Also serves where tests interpret the kernels on a CPU, without pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.triton_plan import Ints


class Staging:
    """An int32 buffer on the device, filled through two pinned ones in turn so that a plan never waits for the last one."""

    def __init__(self, words: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words = words
        self.device = torch.zeros(words, dtype=torch.int32, device=device)
        self._host = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._copied: list[Any] = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._turn = 0

    def begin(self) -> Ints:
        """The host buffer to fill, free of copies still under way."""
        self._turn ^= 1
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._host[self._turn].numpy()

    def send(self, words: int) -> None:
        """Copy the first `words` to the device, in order with the current stream."""
        self.device[:words].copy_(self._host[self._turn][:words], non_blocking=True)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].record()


class Sections:
    """Hands out consecutive parts of a buffer: filled on the host, seen on the device."""

    def __init__(self, host: Ints, device: torch.Tensor) -> None:
        self._host = host
        self._device = device
        self.used = 0

    def flat(self, values: Ints, capacity: int) -> torch.Tensor:
        self._host[self.used : self.used + len(values)] = values
        return self._take(capacity)

    def counted(self, rows: Ints, capacity: int) -> torch.Tensor:
        """[1 + capacity, F] with the number of rows in the first word."""
        width = rows.shape[1]
        self._host[self.used] = len(rows)
        self._host[self.used + width : self.used + width * (1 + len(rows))] = rows.reshape(-1)
        return self._take(width * (1 + capacity))

    def _take(self, words: int) -> torch.Tensor:
        part = self._device[self.used : self.used + words]
        self.used += -(-words // 32) * 32  # 128 bytes
        return part
