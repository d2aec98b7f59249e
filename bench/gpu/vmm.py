"""Section 6: what memory that changes hands costs: creating, mapping and unmapping slabs of several sizes."""

from __future__ import annotations

import statistics
import time

import torch

from bench.gpu.common import Bench, Skip

SIZES = tuple(mib * 2**20 for mib in (2, 32, 64, 128))
SLABS = 16


def run(bench: Bench) -> None:
    from engine.memory.cuda_vmm import CudaVmm, VmmError

    if not bench.dry:
        torch.zeros(1, device=bench.device)
    try:
        driver = CudaVmm()
    except VmmError as error:
        raise Skip(str(error)) from error
    bench.row("granularity", driver.granularity() / 2**20, "MiB")
    for size in SIZES:
        bench.attempt(f"slabs of {size >> 20} MiB", lambda size=size: measure(bench, driver, size))
    bench.attempt("10 GiB", lambda: reclaim(bench, driver, 10 * 2**30))


def measure(bench: Bench, driver, size: int) -> None:
    from engine.memory.cuda_vmm import CudaWindow

    if size % driver.granularity():
        raise Skip("not a multiple of the granularity")
    started = time.perf_counter()
    window = CudaWindow(SLABS, size, driver)
    bench.row(f"{size >> 20} MiB: create and reserve, a slab", (time.perf_counter() - started) / SLABS * 1e6, "us")
    times: dict[str, list[float]] = {"map": [], "unmap": []}
    for _ in range(3):
        for name in times:
            for slab in range(SLABS):
                started = time.perf_counter()
                getattr(window, name)(slab)
                times[name].append(time.perf_counter() - started)
    for name, samples in times.items():
        bench.row(f"{size >> 20} MiB: {name}, the sink's mapping replaced, p50", statistics.median(samples) * 1e6, "us")
    window.map(0)
    view = window.tensor[:size]
    view.fill_(7)
    window.map(1)
    works = int(view.sum(dtype=torch.int64)) == 7 * size
    bench.row(f"{size >> 20} MiB: written and read back", None, "", note="right" if works else "WRONG")
    del view
    torch.cuda.synchronize()
    window.close()


def reclaim(bench: Bench, driver, size: int) -> None:
    """Taking so much from one window and giving it to nobody yet: the victim's part of a reclaim."""
    from engine.memory.cuda_vmm import CudaWindow

    slab = 64 * 2**20
    window = CudaWindow(size // slab, slab, driver)
    for index in range(window.num_slabs):
        window.map(index)
    started = time.perf_counter()
    for index in range(window.num_slabs):
        window.unmap(index)
    bench.row(f"unmap {size >> 30} GiB in slabs of 64 MiB", (time.perf_counter() - started) * 1e3, "ms")
    window.close()
