"""Where the Triton tests run: on a GPU if there is one, else interpreted on the CPU, else nowhere.

Triton decides at import whether it interprets, so TRITON_INTERPRET=1 must be set before the process starts;
kernels/test_triton_interpreted.py does that.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
REASON = "needs a GPU or TRITON_INTERPRET=1 (test_triton_interpreted.py runs it so)"

_ERROR = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| over all elements; NaN if any element of `out` is."""
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def close(out: torch.Tensor, expected: torch.Tensor, *, factor: float = 1.0) -> None:
    """Assert that `out` is `expected` (a float64 result) within the rounding of out's dtype."""
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= factor * _ERROR[out.dtype]
