"""A whole tiny decoder on the Triton kernels against the same decoder on torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from triton_device import DEVICE, REASON, relative_error

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch
from runner_cases import SPEC

from engine.kernels.api import BatchMeta
from engine.kernels.reference import TorchAttention, TorchOps
from engine.kernels.triton_attention import TritonAttention
from engine.kernels.triton_ops import TritonOps
from engine.model import Model
from engine.weights import random_weights

STEPS = [
    BatchMeta((0, 0), (21, 5), (0, 21), ((3, 1), (6,))),
    BatchMeta((21, 5), (1, 20), (0, 1), ((3, 1), (6, 0))),
    BatchMeta((22, 25), (1, 1), (0, 1), ((3, 1), (6, 0))),
]


def logits(spec, weights, ops, attention, device):
    """Of every token of STEPS, on the CPU."""
    model = Model(spec, dict(weights), ops, attention, torch.float32, device=device)
    outputs = []
    for step, meta in enumerate(STEPS):
        spans = [torch.arange(start, start + count) for start, count in zip(meta.starts, meta.counts, strict=True)]
        positions = torch.cat(spans).to(device)
        hidden, residual = model.embed((positions * 7 + step) % spec.vocab_size), None
        handle, rotation = model.plan(meta), model.rotation(positions)
        for layer in range(spec.num_layers):
            hidden, residual = model.layer(layer, hidden, residual, rotation, handle)
        outputs.append(model.logits(hidden, residual, torch.arange(len(positions), device=device)).cpu())
    return torch.cat(outputs)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_torch(qk_norm):
    windows = (None, 9, None, 9)
    spec = replace(SPEC, architecture="qwen3" if qk_norm else "mistral", qk_norm=qk_norm, windows=windows)
    weights = random_weights(spec, torch.float32, seed=2)
    shape = (8, spec.num_layers, 2, 16, spec.num_kv_heads, spec.head_dim)
    expected = logits(spec, weights, TorchOps(), TorchAttention(torch.zeros(shape)), torch.device("cpu"))
    device = torch.device(DEVICE)
    paged = TritonAttention(torch.zeros(shape, device=device), spec.num_heads, max_tokens=64, max_rows=4, windows=spec.windows)

    actual = logits(spec, weights, TritonOps(), paged, device)

    assert relative_error(actual, expected) < 1e-5
