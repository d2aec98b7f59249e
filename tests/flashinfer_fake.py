"""What FlashInfer documents of its paged wrappers, computed row by row in torch: argument by argument, no more than we use."""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.reference import attend, causal_mask


class _Wrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD" and workspace.dtype is torch.uint8 and not workspace.any()
        self.plans = 0

    def _keep(
        self, starts: list[int], indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, page: int, window: int
    ) -> None:
        assert indptr.dtype is indices.dtype is last.dtype is torch.int32
        assert indptr.device.type == last.device.type == "cpu", "the planner reads them on the host"
        assert len(indptr) == len(starts) == len(last) + 1 and int(indptr[-1]) == len(indices)
        assert all(0 < n <= page for n in last.tolist())
        self.plans += 1
        self._rows, self._page, self._window = starts, page, window
        self._indptr, self._indices, self._last = indptr.tolist(), indices, last.tolist()

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], *, out: torch.Tensor) -> None:
        keys, values = kv
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
        assert q.shape[0] == self._rows[-1] == out.shape[0]
        for row, (first, end) in enumerate(zip(self._rows, self._rows[1:], strict=False)):
            pages = self._indices[self._indptr[row] : self._indptr[row + 1]].long()
            length = (len(pages) - 1) * self._page + self._last[row]
            k, v = (side[pages].flatten(0, 1)[:length].float() for side in (keys, values))
            window = None if self._window < 0 else self._window + 1
            mine = q[first:end].float()
            mask = causal_mask(length - (end - first), end - first, length, window, mine)
            out[first:end] = attend(mine, k, v, mask).to(out.dtype)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *,
        causal: bool = False, window_left: int = -1, q_data_type: Any = None, kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert causal and q_data_type is kv_data_type is torch.float16 and num_qo_heads % num_kv_heads == 0
        lists = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._keep(qo_indptr.tolist(), *lists, page_size, window_left)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, workspace: torch.Tensor, kv_layout: str = "NHD", *, use_cuda_graph: bool = False, use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None, paged_kv_indices_buffer: Any = None, paged_kv_last_page_len_buffer: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(workspace, kv_layout)
        self._fixed = len(paged_kv_last_page_len_buffer) if use_cuda_graph else None
        self._room = paged_kv_indices_buffer

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, window_left: int = -1, q_data_type: Any = None, kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        assert self._fixed in (None, len(last_page_len)), "the number of rows is fixed with graphs"
        assert self._room is None or len(indices) <= len(self._room)
        self._keep(list(range(len(last_page_len) + 1)), indptr, indices, last_page_len, page_size, window_left)
