"""A tiny random model behind a real runner, and rows for its plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from msgspec import structs

from engine.kernels.api import AttentionShape, KVLayout
from engine.kernels.select import load_backend
from engine.memory.window import HostWindow
from engine.model import Model
from engine.runner import ModelRunner
from engine.sched.plan import PlanRow, RowResult, StepPlan
from engine.spec import ModelSpec, RopeSpec
from engine.types import SamplingParams, Tenant
from engine.weights import random_weights

SPEC = ModelSpec(
    architecture="llama",
    num_layers=4,
    hidden_size=48,
    intermediate_size=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=101,
    max_position=512,
    rms_eps=1e-5,
    rope=RopeSpec(),
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None, None, None),
    dtype="float32",
    bos_id=None,
    eos_ids=(),
)
GREEDY = SamplingParams(temperature=0.0)
PAGES_PER_SLAB = 8


def make_runner(
    spec: ModelSpec = SPEC, *, dtype: torch.dtype = torch.float32, num_slabs: int = 4, weights: dict[str, Any] | None = None
) -> ModelRunner:
    """A runner on the CPU's kernels with `num_slabs` * 8 pages of 16 tokens."""
    backend = load_backend("cpu")
    page = spec.num_layers * 2 * 16 * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    layout = KVLayout(spec.num_layers, 16, spec.num_kv_heads, spec.head_dim, dtype, PAGES_PER_SLAB, -(-page // 4096) * 4096)
    window = HostWindow(num_slabs, layout.slab_bytes)
    shape = AttentionShape(spec.num_heads, 512, 64, spec.windows)
    attention = backend.attention(layout.view(window.tensor, num_slabs * PAGES_PER_SLAB), shape)
    model = Model(spec, weights or random_weights(spec, dtype, seed=1), backend.ops, attention, dtype)
    return ModelRunner(model, layout, window, backend.device)


def kv_of(runner: ModelRunner) -> torch.Tensor:
    return runner.layout.view(runner.window.tensor, runner.window.num_slabs * PAGES_PER_SLAB)


def make_row(
    name: str,
    tokens: Sequence[int],
    *,
    start: int = 0,
    count: int = 1,
    pages: Sequence[int] = (),
    sample: bool = False,
    num_prompt: int | None = None,
    params: SamplingParams = GREEDY,
    uniform: float = 0.5,
) -> PlanRow:
    prompt = len(tokens) if num_prompt is None else num_prompt
    return PlanRow(name, Tenant.OFFLINE, tokens, prompt, start, count, pages, sample, params, uniform)


def run(runner: ModelRunner, *rows: PlanRow) -> dict[str, RowResult]:
    """One step from start to end, results by request."""
    result = runner.collect(runner.launch(StepPlan(0, rows)))
    assert result.checkpoint is None
    return {row.request_id: row for row in result.rows}


def generate(
    runner: ModelRunner, prompt: list[int], num_tokens: int, pages: Sequence[int], chunk: int = 1 << 30, **settings: Any
) -> list[int]:
    """Tokens of one request run alone, its prompt in chunks of at most `chunk` tokens."""
    tokens = list(prompt)
    computed = 0
    while len(tokens) < len(prompt) + num_tokens:
        count = min(chunk, len(tokens) - computed)
        sample = computed + count == len(tokens)
        row = make_row("r", tokens, start=computed, count=count, pages=pages, sample=sample, **settings)
        outcome = run(runner, structs.replace(row, num_prompt=len(prompt)))["r"]
        computed += count
        if sample:
            assert outcome.token is not None
            tokens.append(outcome.token)
    return tokens[len(prompt) :]


def stops_at(*layers: int) -> Iterator[Any]:
    """For each layer in turn a stop condition that parks the pass there; then one that never does."""
    for layer in layers:
        yield lambda index, layer=layer: index == layer
    while True:
        yield lambda index: False
