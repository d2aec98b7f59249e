"""CUDA graphs for steps in which every row computes one token: a step's launches recorded once, replayed from then on.

A step is recorded for a padded number of rows, in groups of layers, so that a pass may still be parked between two groups; a
step that may not be parked replays them back to back. Recorded are the embedding and the layers. What differs between
steps lies in buffers of fixed address: token ids and positions here, page tables and work lists in the attention, whose
plan of a fixed number of rows has launches of fixed size. Rows beyond the real ones write no KV and their results are not read.

A capture that fails (memory, a library that synchronises) is logged once and serving goes on without graphs. `capture` is the
only part that needs a GPU, and has not yet run on one; the rest is tested with a stand-in that runs the launches again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.kernels.api import BatchMeta

_log = logging.getLogger(__name__)

_GROUP = 8  # layers; of an 8B model about a millisecond of decoding
_MAX_ROWS = 128  # beyond that the device is slower than the host can launch

Work = Callable[[], tuple[torch.Tensor, torch.Tensor]]
Capture = Callable[[Work], tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]]
"""Record what `work` launches; returns how to launch it again, and the tensors that then hold its results."""


class LayeredModel(Protocol):
    """What is recorded of a model; `engine.model.Model` is one."""

    device: torch.device

    @property
    def num_layers(self) -> int: ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def layer(
        self,
        index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attn_handle: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class FixedAttention(Protocol):
    """An attention with launches of fixed size; `TritonAttention` is one."""

    generation: int  # goes up when buffers move: what was recorded before is void

    def plan(self, meta: BatchMeta, fixed_rows: int | None = None) -> Any: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Some layers, recorded: launches them again and leaves (hidden, residual) in the same tensors."""

    end: int  # the layer after the last
    replay: Callable[[], None]
    hidden: torch.Tensor
    residual: torch.Tensor


def padded_sizes(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that are recorded: 1, 2, 4, 8, then every 8th up to 64 and every 16th beyond."""
    most = min(max_rows, _MAX_ROWS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, _MAX_ROWS + 1, 16)]
    return (*(size for size in sizes if size < most), most)


class DecodeGraphs:
    """`api.Graphs` for one model and its attention; steps have at most `max_rows` rows."""

    def __init__(
        self,
        model: LayeredModel,
        attention: FixedAttention,
        max_rows: int,
        *,
        capture: Capture | None = None,
        group: int = _GROUP,
    ) -> None:
        self.sizes = padded_sizes(max_rows)
        self._model = model
        self._attention = attention
        self._capture = capture or _CudaCapture()
        self._group = group
        self._token_ids = torch.zeros(self.sizes[-1], dtype=torch.int64, device=model.device)
        self._positions = torch.zeros_like(self._token_ids)
        self._recorded: dict[int, list[Segment]] = {}
        self._generation = attention.generation
        self._works = True

    def prepare(self) -> None:
        """Record every size, the largest first so that the smaller ones fit in its memory."""
        for size in reversed(self.sizes):
            zeros = torch.zeros(size, dtype=torch.int64, device=self._model.device)
            meta = BatchMeta((0,) * size, (1,) * size, tuple(range(size)), ((0,),) * size)
            if self.run(zeros, zeros, meta, None) is None:
                return

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, meta: BatchMeta, stop: Callable[[int], bool] | None
    ) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        rows = len(meta.counts)
        if not self._works or rows > self.sizes[-1] or token_ids.shape[0] != rows:
            return None
        size = next(size for size in self.sizes if size >= rows)
        self._token_ids[:rows] = token_ids
        self._positions[:rows] = positions
        handle = self._attention.plan(meta, fixed_rows=size)
        if self._attention.generation != self._generation:
            self._recorded.clear()
            self._generation = self._attention.generation
        if size not in self._recorded and not self._record(size, handle):
            return None
        segments = self._recorded[size]
        for index, segment in enumerate(segments):
            if index and stop is not None and stop(segments[index - 1].end):
                break
            segment.replay()
            last = segment
        return last.end, last.hidden[:rows], last.residual[:rows]

    def _record(self, size: int, handle: Any) -> bool:
        try:
            for segment_of in (self._run_once, self._capture):  # the first compiles, and makes libraries allocate
                self._recorded[size] = self._segments(size, handle, segment_of)
        except Exception as error:
            self._works = False
            self._recorded.clear()
            _log.warning("no CUDA graphs, decoding will be slower (%s: %s)", type(error).__name__, error)
            return False
        return True

    @staticmethod
    def _run_once(work: Work) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
        return (lambda: None), work()

    def _segments(self, size: int, handle: Any, capture: Capture) -> list[Segment]:
        segments: list[Segment] = []
        for first in range(0, self._model.num_layers, self._group):
            end = min(first + self._group, self._model.num_layers)
            replay, (hidden, residual) = capture(self._work(size, handle, first, end, segments[-1] if segments else None))
            segments.append(Segment(end, replay, hidden, residual))
        return segments

    def _work(self, size: int, handle: Any, first: int, end: int, before: Segment | None) -> Work:
        model = self._model

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            rotation = model.rotation(self._positions[:size])
            hidden = model.embed(self._token_ids[:size]) if before is None else before.hidden
            residual = None if before is None else before.residual
            for index in range(first, end):
                hidden, residual = model.layer(index, hidden, residual, rotation, handle)
            assert residual is not None
            return hidden, residual

        return work


class _CudaCapture:
    """Records with CUDA graphs that share one memory pool: they never run at the same time, and results are kept."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results
