"""Section 2: the device's ceilings as measured here, which all shares are of."""

from __future__ import annotations

import torch

from bench.gpu.common import Bench, copy_ceiling, matmul_ceiling, seconds_of


def run(bench: Bench) -> None:
    bench.row("copy, bytes read and written", copy_ceiling(bench) / 1e9, "GB/s")
    bench.row("bf16 matrix product", matmul_ceiling(bench) / 1e12, "TFLOP/s")
    bench.attempt("host copies", lambda: host_copies(bench))


def host_copies(bench: Bench) -> None:
    """What the host tier and weight loading can have."""
    n = bench.size(1 << 30, 1 << 16)
    host = torch.empty(n, dtype=torch.uint8, pin_memory=not bench.dry)
    there = torch.empty(n, dtype=torch.uint8, device=bench.device)
    bench.row("pinned host to device", n / seconds_of(bench, lambda: there.copy_(host, non_blocking=True)) / 1e9, "GB/s")
    bench.row("device to pinned host", n / seconds_of(bench, lambda: host.copy_(there, non_blocking=True)) / 1e9, "GB/s")
