"""What the model asks of a device: operations (`Ops`) and paged attention (`Attention`), as small protocols.

`reference` (plain torch) is the truth and fills both on the CPU; CUDA files fill them beside it. Attention is planned once a
step on the host and run once a layer on the device. Shapes use: T tokens in the step, R rows, H query heads, K KV heads,
D head size, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

_PAGE_ALIGN = 256  # bytes; keeps every page aligned for vector access and bulk copies


def pages_per_slab(page_bytes: int, slab_bytes: int) -> int:
    """Most pages that divide a slab evenly at an aligned stride. 0 if not even one fits."""
    for pages in range(slab_bytes // page_bytes, 0, -1):
        if slab_bytes % pages == 0 and (slab_bytes // pages) % _PAGE_ALIGN == 0:
            return pages
    return 0


def fit_slab(page_bytes: Sequence[int], *, granularity: int, slab_bytes: int) -> int:
    """A slab size for models with these page sizes that share one pool: the least waste for the worst off of them.

    Sizes from `slab_bytes` (or the largest page) to four times that are tried in multiples of `granularity` bytes; a larger one
    must waste at least a hundredth less.
    """
    smallest = -(-max(slab_bytes, *page_bytes) // granularity) * granularity
    best, least = smallest, 2.0
    for size in range(smallest, 4 * smallest + 1, granularity):
        waste = max(1.0 - pages_per_slab(page, size) * page / size for page in page_bytes)
        if waste < least - 0.01:
            best, least = size, waste
    return best


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The page-major KV of one window: [page][layer][k/v][token][kv_head][head_dim], page stride fixed.

    A page holds `page_size` tokens of all layers and never crosses a slab; `page_stride` (bytes) is page_bytes rounded up so
    that a whole number of pages fills a slab exactly.
    """

    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pages_per_slab: int
    page_stride: int

    @property
    def page_bytes(self) -> int:
        """Bytes of a page that hold KV; the rest of page_stride is padding."""
        return self.num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def slab_bytes(self) -> int:
        return self.pages_per_slab * self.page_stride

    @classmethod
    def fit(
        cls,
        *,
        num_layers: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        slab_bytes: int,
    ) -> KVLayout:
        """The layout with as many pages as a slab of exactly `slab_bytes` holds. `fit_slab` finds a good slab size."""
        page = num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize
        pages = pages_per_slab(page, slab_bytes)
        assert pages > 0, f"a page of {page} bytes does not fit a slab of {slab_bytes}"
        return cls(num_layers, page_size, num_kv_heads, head_dim, dtype, pages, slab_bytes // pages)

    def view(self, window: torch.Tensor, num_pages: int) -> torch.Tensor:
        """The window's bytes (uint8, 1-D) as [P, num_layers, 2, page_size, K, D] without a copy."""
        shape = (num_pages, self.num_layers, 2, self.page_size, self.num_kv_heads, self.head_dim)
        item = self.dtype.itemsize
        token = self.num_kv_heads * self.head_dim
        plane = self.page_size * token
        stride = (self.page_stride // item, 2 * plane, plane, token, self.head_dim, 1)
        return window.view(self.dtype).as_strided(shape, stride)


@dataclass(frozen=True, slots=True)
class BatchMeta:
    """Host-side shape of one step, as plain integers: what `Attention.plan` needs.

    Row r computes tokens starts[r] .. starts[r] + counts[r] - 1 of its sequence; they lie at offsets[r] .. of the flat
    token dimension. `tables[r]` is its page table.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    offsets: tuple[int, ...]
    tables: tuple[Any, ...]  # Sequence[int] per row


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's own memory in bytes: `granule` divides every allocation, `slab_bytes` is a good size for slabs."""

    total: int
    used: int
    granule: int
    slab_bytes: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What an attention must hold besides the KV: the model's query heads and windows, and the largest step."""

    num_heads: int
    max_tokens: int
    max_rows: int
    windows: tuple[int | None, ...] = (None,)  # sliding windows that `run` will be called with


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Per-head RMSNorm of q and k before rotation: weights [D]."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class Attention(Protocol):
    """Paged causal attention over page-major KV."""

    def plan(self, meta: BatchMeta) -> Any:
        """Host work of a step: copies tables to the device, splits the work. The handle is good until the next plan."""
        ...

    def run(
        self, handle: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Write k, v ([T, K, D], rotated already) into the pages of `layer`, then attend.

        q is [T, H, D]; returns [T, H * D]. With `window` w a token sees itself and the w - 1 tokens before it.
        """
        ...


@runtime_checkable
class RotaryAttention(Attention, Protocol):
    """An attention that also normalises and rotates, in the pass that writes the KV."""

    def run_rotary(
        self,
        handle: Any,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        window: int | None,
        norm: QKNorm | None = None,
    ) -> torch.Tensor:
        """`run` on q, k that are neither normalised nor rotated yet; cos, sin are [T, D / 2]. May change q in place."""
        ...


class Pace(Protocol):
    """Of one pass that may be parked: keeps the host from launching far ahead of the device."""

    def layer_launched(self) -> None:
        """Wait until the device is close behind."""
        ...


class Packer(Protocol):
    """Kernels between scattered pages of a window and a buffer. `pages` is int32 [n] on the device, `packed` uint8
    [>= n, page_bytes]."""

    def gather(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        """packed[i] = page pages[i]."""
        ...

    def scatter(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        """Page pages[i] = packed[i]. A page must not be named twice."""
        ...


class Graphs(Protocol):
    """Captured launches of whole layers, for steps whose rows have one token each."""

    def prepare(self) -> None:
        """Capture what there is to capture, while nobody waits. Writes KV of page 0."""
        ...

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, meta: BatchMeta, stop: Callable[[int], bool] | None
    ) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        """A pass from the start: (layers done, hidden, residual), or None if this step must run layer by layer.

        `stop` is asked before some of the layers; if it never says True all layers are done. The tensors, [T, hidden], are good
        until the next call.
        """
        ...


class Ops(Protocol):
    """Everything of a decoder that is not attention. All take and return [T, ...] tensors of the model's dtype."""

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Prepare a weight [out, in] once, in whatever layout the device likes best."""
        ...

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        ...

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q [T, H, D] and k [T, K, D] by cos, sin [T, D / 2] (half-split pairs: i with i + D / 2)."""
        ...

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[:, :F]) * x[:, F:] for x [T, 2F]."""
        ...
