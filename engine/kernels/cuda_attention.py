"""What the paged attentions of a GPU share: a step laid out as arrays, and the KV written to its pages before attending."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from engine.kernels.api import BatchMeta, QKNorm
from engine.kernels.triton_plan import Ints, Rows, TableMirror
from engine.kernels.triton_write import write_kv


class Plan(Protocol):
    """Of one step."""

    @property
    def slots(self) -> torch.Tensor:
        """Where its tokens are written, see `write_kv`."""
        ...


P = TypeVar("P", bound=Plan)


class CudaAttention(Generic[P]):
    """`api.RotaryAttention` but for `plan` and the attending itself, which are the subclass's.

    kv: `KVLayout.view` of a window, [P, num_layers, 2, page_size, K, D]. max_tokens and max_rows bound a step; page tables may
    together hold `max_pages` pages, and when they hold more the buffer is replaced and `generation` goes up: graphs captured
    before must be captured again. `windows` are the sliding windows that `run` will be called with.
    """

    def __init__(
        self,
        kv: torch.Tensor,
        num_heads: int,
        *,
        max_tokens: int,
        max_rows: int,
        max_pages: int | None,
        windows: tuple[int | None, ...],
    ) -> None:
        _, num_layers, _, self._page_size, self._kv_heads, self._head_dim = kv.shape
        self._layers = [kv[:, layer] for layer in range(num_layers)]
        self._num_heads = num_heads
        self._windows = tuple(dict.fromkeys(windows))
        self._max_tokens = max_tokens
        self._max_rows = max_rows
        self._max_pages = max(1, max_pages or kv.shape[0])
        self._device = kv.device
        self._mirror = TableMirror()
        self.generation = 0

    def _lay_out(self, meta: BatchMeta) -> tuple[Rows, Ints, list[int]]:
        """The rows of a step, their page tables one after another, and the pages of each. ValueError for one too large."""
        starts, counts, offsets = (np.array(part, np.int64) for part in (meta.starts, meta.counts, meta.offsets))
        num_tokens = int((offsets + counts).max(initial=0))
        if num_tokens > self._max_tokens or len(counts) > self._max_rows:
            raise ValueError(f"step of {num_tokens} tokens in {len(counts)} rows exceeds the buffers")
        needed = -(-(starts + counts) // self._page_size)
        tables = self._mirror.flatten(meta.tables, needed.tolist())
        return Rows(starts, counts, offsets, np.cumsum(needed) - needed), tables, needed.tolist()

    def run(
        self, handle: P, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Write k, v ([T, K, D], rotated already) into the pages of `layer`, then attend with q [T, H, D]."""
        write_kv(self._layers[layer], handle.slots, q, k, v)
        return self._attend(handle, layer, q, window)

    def run_rotary(
        self,
        handle: P,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        window: int | None,
        norm: QKNorm | None = None,
    ) -> torch.Tensor:
        """`run` on q, k not rotated yet: norm, rotation and write are one pass. q is changed in place, k is not."""
        write_kv(self._layers[layer], handle.slots, q, k, v, rotation, norm)
        return self._attend(handle, layer, q, window)

    def _attend(self, handle: P, layer: int, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """[T, H * D] for q [T, H, D], the step's own KV being in its pages."""
        raise NotImplementedError
