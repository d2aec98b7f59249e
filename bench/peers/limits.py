"""Not an engine: what the machine can do at all, measured between the others with the same number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.peers.pipe import Driver, Setup, serve

READ_BYTES = 512 * 2**20
GEMM_SIZE = 2048


class Limits(Driver):
    name = f"torch {torch.__version__}"

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._big = torch.ones(READ_BYTES // 4)
        self._matrix = torch.rand(GEMM_SIZE, GEMM_SIZE)

    def measure(self) -> dict[str, float]:
        """Best of several: GB/s of reading memory, fp32 GFLOP/s of a square matrix product."""
        read = _fastest(lambda: self._big.sum(), 8)
        gemm = _fastest(lambda: self._matrix @ self._matrix, 12)
        return {"read_gb_s": READ_BYTES / read / 1e9, "sgemm_gflop_s": 2 * GEMM_SIZE**3 / gemm / 1e9}


def _fastest(work: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


if __name__ == "__main__":
    serve(Limits)
