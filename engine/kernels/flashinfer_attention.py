"""Paged attention by FlashInfer (Ye et al., MLSys 2025), where it is installed; ours writes the KV before.

FlashInfer takes K and V as two views with strides of their own (`paged_kv_t` in its page.cuh; both must have the same), so a
layer of the page-major KV is passed as it is: [P, page_size, K, D] twice, nothing copied. Its plan of a step is host work
that ends in a copy from a pinned buffer of the wrapper's, hence the event: a plan waits until the one before has left it.

Checked with a stand-in that computes what FlashInfer documents. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.kernels.api import BatchMeta
from engine.kernels.cuda_attention import CudaAttention
from engine.kernels.cuda_staging import Sections, Staging
from engine.kernels.triton_plan import token_slots

_WORKSPACE = 128 * 2**20  # bytes; what FlashInfer's documentation advises
_HEAD_DIMS = (64, 128, 256)  # those it is compiled for
_TENSOR_CORE_GROUP = 4  # from so many query heads a KV head on, tensor cores decode faster


def unsupported(kv: torch.Tensor) -> str | None:
    """Why FlashInfer cannot attend to this KV (`KVLayout.view`), in words; None if it can."""
    if kv.dtype not in (torch.float16, torch.bfloat16):
        return f"flashinfer computes in float16 and bfloat16, not in {kv.dtype}".replace("torch.", "")
    if kv.shape[-1] not in _HEAD_DIMS:
        return f"flashinfer has no heads of {kv.shape[-1]}, only of {', '.join(map(str, _HEAD_DIMS))}"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed: pip install 'sluice[cuda]'"
    return None


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """A step, planned: where its tokens are written, and FlashInfer's wrapper for each window."""

    slots: torch.Tensor
    wrappers: dict[int | None, Any]


class FlashInferAttention(CudaAttention[FlashInferPlan]):
    """`api.RotaryAttention` by FlashInfer. `library` is the module `flashinfer`.

    A step with a prompt in it takes the prefill wrapper for all rows. Steps of single tokens take the decode wrapper, and for
    CUDA graphs one of a fixed number of rows, whose rows beyond the real ones see one token that is somebody's.
    """

    def __init__(
        self,
        kv: torch.Tensor,
        num_heads: int,
        *,
        max_tokens: int,
        max_rows: int,
        max_pages: int | None = None,
        windows: tuple[int | None, ...] = (None,),
        library: Any = None,
    ) -> None:
        super().__init__(kv, num_heads, max_tokens=max_tokens, max_rows=max_rows, max_pages=max_pages, windows=windows)
        self._library = library or importlib.import_module("flashinfer")
        self._dtype = kv.dtype
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=kv.device)
        self._copied = torch.cuda.Event() if kv.is_cuda else None
        self._set_room(self._max_pages)

    def _set_room(self, max_pages: int) -> None:
        """Buffers for page tables of so many pages in all; what was captured with the old ones is void."""
        self._max_pages = max_pages
        self._staging = Staging(self._max_tokens + max_pages + 64, self._device)
        self._wrappers: dict[tuple[str, int | None, int | None], Any] = {}

    def plan(self, meta: BatchMeta, fixed_rows: int | None = None) -> FlashInferPlan:
        """Plan a step. With `fixed_rows` (every row one token) launches captured from one plan serve the next of that size."""
        rows, tables, needed = self._lay_out(meta)
        singles = all(count == 1 for count in meta.counts)
        if fixed_rows is not None and not (singles and len(meta.counts) <= fixed_rows):
            raise ValueError("a plan of fixed size holds only rows of one token")
        if self._copied is not None:
            self._copied.synchronize()
        spare = 0 if fixed_rows is None else fixed_rows - len(needed)
        if len(tables) + spare > self._max_pages:
            self._set_room(2 * (len(tables) + spare))
            self.generation += 1

        sections = Sections(self._staging.begin(), self._staging.device)
        slots = sections.flat(token_slots(rows, tables, self._page_size, self._max_tokens), self._max_tokens)
        padded = np.concatenate([tables, np.repeat(tables[:1], spare)])
        indices = sections.flat(padded, self._max_pages)
        self._staging.send(sections.used)

        last = (rows.starts + rows.counts - 1) % self._page_size + 1
        lengths = self._host([*last, *[1] * spare])
        pages = self._host(np.cumsum([0, *needed, *[1] * spare]))
        lists: tuple[torch.Tensor, ...] = (pages, indices[: len(padded)], lengths)
        if not singles:
            lists = (self._host(np.cumsum([0, *meta.counts])), *lists)
        wrappers = {}
        for window in self._windows:
            wrapper = wrappers[window] = self._wrapper("decode" if singles else "prefill", window, fixed_rows, indices)
            wrapper.plan(
                *lists,
                self._num_heads,
                self._kv_heads,
                self._head_dim,
                self._page_size,
                window_left=-1 if window is None else window - 1,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
                **({} if singles else {"causal": True}),
            )
        if self._copied is not None:
            self._copied.record()
        return FlashInferPlan(slots, wrappers)

    def _host(self, values: Any) -> torch.Tensor:
        """int32 for FlashInfer's planner, which reads it on the host and copies it without waiting."""
        host = torch.from_numpy(np.asarray(values, np.int32))
        return host.pin_memory() if self._device.type == "cuda" else host

    def _wrapper(self, kind: str, window: int | None, fixed_rows: int | None, indices: torch.Tensor) -> Any:
        """A wrapper keeps one plan, so each window and each captured number of rows has its own."""
        key = (kind, window, fixed_rows)
        if key not in self._wrappers:
            if kind == "prefill":
                made = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            else:
                fixed: dict[str, Any] = {}
                if fixed_rows is not None:
                    fixed = {
                        "use_cuda_graph": True,
                        "paged_kv_indptr_buffer": torch.zeros(fixed_rows + 1, dtype=torch.int32, device=self._device),
                        "paged_kv_indices_buffer": indices,
                        "paged_kv_last_page_len_buffer": torch.ones(fixed_rows, dtype=torch.int32, device=self._device),
                    }
                cores = self._num_heads // self._kv_heads >= _TENSOR_CORE_GROUP
                made = self._library.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=cores, **fixed
                )
            self._wrappers[key] = made
        return self._wrappers[key]

    def _attend(self, handle: FlashInferPlan, layer: int, q: torch.Tensor, window: int | None) -> torch.Tensor:
        kv = self._layers[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        handle.wrappers[window].run(q, (kv[:, 0], kv[:, 1]), out=out)
        return out.flatten(1)
