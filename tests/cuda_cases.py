"""A runner on the Triton kernels: on a GPU, or interpreted on the CPU, with graphs that merely run their launches again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from runner_cases import PAGES_PER_SLAB
from runner_cases import SPEC as FOUR_LAYERS
from triton_device import DEVICE

from engine.kernels import cuda, triton_sampling
from engine.kernels.api import AttentionShape, KVLayout
from engine.kernels.cuda_graphs import DecodeGraphs
from engine.kernels.triton_ops import TritonOps
from engine.memory.window import TensorWindow
from engine.model import Model
from engine.runner import ModelRunner
from engine.spec import ModelSpec
from engine.weights import random_weights

SPEC = replace(FOUR_LAYERS, num_layers=2, windows=(None, None))  # interpreting is slow
TOKENS, ROWS = 32, 3


def run_again(work: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Callable[[], None], Any]:
    """Stands in for a CUDA graph: replaying runs the same launches on the same tensors and fills the same results."""
    results = work()

    def replay() -> None:
        for kept, new in zip(results, work(), strict=True):
            kept.copy_(new)

    return replay, results


def make_cuda_runner(
    spec: ModelSpec = SPEC, *, num_slabs: int = 2, graphs: bool = False, capture: Any = None, group: int = 1
) -> ModelRunner:
    """As `runner_cases.make_runner`, with the kernels of a GPU and the same weights."""
    device = torch.device(DEVICE)
    page = spec.num_layers * 2 * 16 * spec.num_kv_heads * spec.head_dim * 4
    layout = KVLayout(
        spec.num_layers, 16, spec.num_kv_heads, spec.head_dim, torch.float32, PAGES_PER_SLAB, -(-page // 4096) * 4096
    )
    window = TensorWindow(num_slabs, layout.slab_bytes, device)
    attention = cuda.make_attention(
        layout.view(window.tensor, num_slabs * PAGES_PER_SLAB), AttentionShape(spec.num_heads, TOKENS, ROWS, spec.windows)
    )
    weights = random_weights(spec, torch.float32, seed=1)
    model = Model(spec, weights, TritonOps(), attention, torch.float32, device=device)
    captured = None
    if graphs:
        capture = capture or (run_again if device.type == "cpu" else None)
        captured = DecodeGraphs(model, attention, ROWS, capture=capture, group=group)
    pace = cuda.Pace if device.type == "cuda" else None
    return ModelRunner(model, layout, window, device, sampler=triton_sampling.sample, pace=pace, graphs=captured)
