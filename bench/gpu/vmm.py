"""Section 6: what memory that changes hands costs: the driver's calls one by one and as the window makes them, by slab size,
and a reclaim of 1 and 10 GiB while the victim is frozen in mid-kernel.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench.gpu.common import Bench, Skip
from bench.gpu.dry import fake_vmm
from engine.memory.cuda_vmm import CudaVmm, CudaWindow, VmmDriver, VmmError

SIZES = tuple(mib * 2**20 for mib in (2, 32, 64, 128))
SLABS = 16


def run(bench: Bench) -> None:
    if not bench.dry:
        torch.zeros(1, device=bench.device)
    try:
        driver: VmmDriver = fake_vmm() if bench.dry else CudaVmm()
    except VmmError as error:
        raise Skip(str(error)) from error
    bench.row("granularity", driver.granularity() / 2**20, "MiB")
    for size in SIZES:
        bench.attempt(f"calls, {size >> 20} MiB", lambda size=size: calls(bench, driver, size))
        bench.attempt(f"slabs of {size >> 20} MiB", lambda size=size: measure(bench, driver, size))
    for gib in (1, 10):
        bench.attempt(f"reclaim of {gib} GiB", lambda gib=gib: reclaim(bench, driver, gib << 30))


def calls(bench: Bench, driver: VmmDriver, size: int) -> None:
    """The driver's calls one by one, medians."""
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], int | None]) -> int:
        started = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result or 0

    base = timed("reserve", lambda: driver.reserve(SLABS * size))
    for index in range(SLABS):
        at = base + index * size
        handle = timed("create", lambda: driver.create(size))
        timed("map", lambda at=at, handle=handle: driver.map(at, size, handle))
        timed("set access", lambda at=at: driver.set_access(at, size))
        timed("unmap", lambda at=at: driver.unmap(at, size))
        timed("release", lambda handle=handle: driver.release(handle))
    driver.free(base, SLABS * size)
    for name, samples in times.items():
        bench.row(f"{size >> 20} MiB: {name}", statistics.median(samples) * 1e6, "us")


def measure(bench: Bench, driver: VmmDriver, size: int) -> None:
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
    if bench.dry:
        window.close()
        return
    window.map(0)
    view = window.tensor[:size]
    view.fill_(7)
    window.map(1)
    works = int(view.sum(dtype=torch.int64)) == 7 * size
    bench.row(f"{size >> 20} MiB: written and read back", None, "", note="right" if works else "WRONG")
    del view
    torch.cuda.synchronize()
    window.close()


def reclaim(bench: Bench, driver: VmmDriver, size: int) -> None:
    """From the freeze to the moment when all slabs are mapped in the window that takes them; the victim stands in mid-kernel.

    Both windows are this process's: what counts is the number of calls, which is the same.
    """
    from bench.gpu import gate as gates

    slab = bench.size(64 * 2**20, driver.granularity())
    count = max(1, bench.size(size, 4 * slab) // slab)
    victim = CudaWindow(count, slab, driver)
    taker = CudaWindow(count, slab, driver, [driver.import_fd(fd) for fd in exported(victim, driver)])
    for index in range(count):
        victim.map(index)
    if bench.dry:
        gates._dry = gates.DryGpu()
    spinner = gates.make_spinner()
    spinner.start(1000)
    spinner.wait()
    with gates.open_it(lease_s=30.0, remap_limit_s=10.0) as gate, spinner.spinning(2.0):
        started = time.perf_counter()
        gate.freeze()
        frozen, before = time.perf_counter(), spinner.count()
        with gate.remapping():
            for index in range(count):
                victim.unmap(index)
        let_go = time.perf_counter()
        for index in range(count):
            taker.map(index)
        mapped, still = time.perf_counter(), spinner.count() == before
        gate.thaw()
    verdict = "the victim stood still" if still else "WRONG: the victim ran meanwhile"
    bench.row(f"reclaim of {size >> 30} GiB, {count} slabs of 64 MiB", 1e3 * (mapped - started), "ms", note=verdict)
    for name, seconds in (("freeze", frozen - started), ("victim lets go", let_go - frozen), ("map", mapped - let_go)):
        bench.row(f"reclaim of {size >> 30} GiB: {name}", 1e3 * seconds, "ms")
    taker.close()
    victim.close()


def exported(window: CudaWindow, driver: VmmDriver) -> Iterator[int]:
    """A descriptor of each slab, open while it is used."""
    for handle in window._slabs:
        fd = driver.export_fd(handle)
        try:
            yield fd
        finally:
            os.close(fd)
