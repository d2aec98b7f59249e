"""Each Triton operation against its definition in float32 torch (interpreted on the CPU, or on a GPU where there is one)."""

from __future__ import annotations

import pytest
from triton_device import DEVICE, REASON, close, randn

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch

from engine.kernels.triton_ops import TritonOps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ops = TritonOps()


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    value = x.double()
    return value / (value.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 96), (3, 2560), (17, 128)])
def test_rms_norm(dtype, tokens, width):
    x, weight = randn(tokens, width, dtype=dtype), randn(width, dtype=dtype)

    close(ops.rms_norm(x, weight, 1e-6), rms(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_in_a_slice(dtype):
    heads, width = 3, 80
    qkv = randn(7, 5 * width, dtype=dtype)
    x, weight = qkv[:, width : (1 + heads) * width].view(7, heads, width), randn(width, dtype=dtype)

    out = ops.rms_norm(x, weight, 1e-5)

    assert out.shape == x.shape and out.is_contiguous()
    close(out, rms(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype):
    x, residual, weight = randn(6, 200, dtype=dtype), randn(6, 200, dtype=dtype), randn(200, dtype=dtype)

    out, total = ops.add_rms_norm(x, residual, weight, 1e-6)

    close(total, x.double() + residual.double())  # not exact: the interpreter truncates to bfloat16
    close(out, rms(x + residual, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (7, 1, 128), (5, 5, 80), (3, 3, 96)])
def test_rotary_of_slices_in_place(dtype, heads, kv_heads, head_dim):
    tokens = 5
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    before = qkv.clone()
    q = qkv[:, : heads * head_dim].view(tokens, heads, head_dim)
    k = qkv[:, heads * head_dim : (heads + kv_heads) * head_dim].view(tokens, kv_heads, head_dim)
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
    expected_q, expected_k = rotate(q, angle.cos(), angle.sin()), rotate(k, angle.cos(), angle.sin())

    got_q, got_k = ops.rotary(q, k, angle.cos(), angle.sin())

    close(got_q, expected_q)
    close(got_k, expected_k)
    assert got_q.data_ptr() == qkv.data_ptr()
    rest = (heads + kv_heads) * head_dim
    assert torch.equal(qkv[:, rest:], before[:, rest:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1024), (4, 1500), (3, 48)])
def test_silu_mul(dtype, tokens, width):
    x = randn(tokens, 2 * width, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)

    close(ops.silu_mul(x), torch.nn.functional.silu(gate) * up)


def test_linear_and_nothing():
    x, weight, bias = randn(3, 16), randn(8, 16), randn(8)

    close(ops.linear(x, ops.pack_linear(weight, bias)), x.double() @ weight.double().T + bias.double())
    empty = randn(0, 64)
    assert ops.rms_norm(empty, randn(64), 1e-6).shape == (0, 64)
    assert ops.silu_mul(empty).shape == (0, 32)
