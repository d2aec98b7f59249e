"""The torch operations of a decoder against their formulas, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels.reference import TorchOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ops = TorchOps()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_linear(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    x, weight, b = (torch.randn(shape).to(dtype) for shape in ((tokens, 24), (40, 24), (40,)))
    packed = ops.pack_linear(weight, b if bias else None)

    close(ops.linear(x, packed), x.double() @ weight.double().T + (b.double() if bias else 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (5, 3, 8)], ids=str)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    close(ops.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_returns_norm_and_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, 24), (5, 24), (24,)))
    kept = (x.clone(), residual.clone())

    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])  # a parked pass may still need them
    close(total, x.double() + residual.double())
    close(normed, ops.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_turns_each_pair_by_its_angle(dtype: torch.dtype) -> None:
    angles = torch.tensor([[0.0, 0.0], [math.pi / 2, math.pi], [0.3, 1.1]])
    q, k = torch.randn(3, 4, 4).to(dtype), torch.randn(3, 2, 4).to(dtype)

    for turned, x in zip(ops.rotary(q, k, angles.cos(), angles.sin()), (q, k), strict=True):
        pairs = torch.complex(x[..., :2].double(), x[..., 2:].double())
        expected = pairs * torch.polar(torch.ones(3, 2).double(), angles.double())[:, None]
        close(turned, torch.cat((expected.real, expected.imag), dim=-1))
        assert turned.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_gates_the_first_half(dtype: torch.dtype) -> None:
    x = torch.randn(5, 12).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)

    close(ops.silu_mul(x), gate * torch.sigmoid(gate) * up)
