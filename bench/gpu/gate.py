"""Section 5: does switching channels off stop the GPU, how fast, and the open questions of nvdriver/README.md, each with its
answer. Progress is a word in pinned host memory that a spinning kernel increments; success codes prove nothing.

E1: another client names the channels. E2: a passed descriptor. E5: remapping while frozen. E6: latency. E7: a long hold.
E8: CUDA graphs in flight.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bench.gpu.common import Bench, Skip
from nvdriver.api import ChannelGate, GateOptions, make_grant, open_gate, probe, send_grant
from nvdriver.device import MonotonicClock
from nvdriver.errors import NvDriverError

FREEZE_AIM = 1e-3  # seconds, p99
CYCLES = 200
PARTS: dict[str, Callable[[Bench, ChannelGate], None]] = {}


def part(name: str) -> Callable[[Callable[[Bench, ChannelGate], None]], Callable[[Bench, ChannelGate], None]]:
    def enter(function: Callable[[Bench, ChannelGate], None]) -> Callable[[Bench, ChannelGate], None]:
        PARTS[name] = function
        return function

    return enter


def run(bench: Bench) -> None:
    """In a dry run there are no channels; that this is said in words is all that is checked."""
    if not bench.dry:
        torch.zeros(1, device=bench.device)
        Spinner.warm_up()  # CUDA makes some channels late: let them all be there before the scan
    try:
        gate = open_gate(options=GateOptions(lease_s=30.0))
    except NvDriverError as error:
        raise Skip(f"no channel gate here: {type(error).__name__}: {error}") from error
    with gate:
        bench.row("channels found", float(sum(len(f.channels.channels) for f in gate.switch.found)), "", note=gate.route.value)
        for name, function in PARTS.items():
            bench.attempt(name, lambda function=function: function(bench, gate))


class Spinner:
    """A kernel of one program that counts in pinned memory for a while, on a stream of its own."""

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._stream = torch.cuda.Stream()

    def start(self, turns: int) -> None:
        from bench.gpu.spin import count_kernel

        with torch.cuda.stream(self._stream):
            count_kernel[(1,)](self._word, turns)

    def count(self) -> int:
        return int(self._word[0])

    def turns_per_second(self) -> float:
        self.start(20_000)
        self._stream.synchronize()
        started = time.perf_counter()
        self.start(100_000)
        self._stream.synchronize()
        return 100_000 / (time.perf_counter() - started)

    @staticmethod
    def warm_up() -> None:
        Spinner().turns_per_second()
        torch.cuda.synchronize()

    @contextmanager
    def spinning(self, seconds: float) -> Iterator[None]:
        """Counts for about so long; waits for the end."""
        self.start(int(self.turns_per_second() * seconds))
        try:
            yield
        finally:
            self._stream.synchronize()


@part("probe")
def check_probe(bench: Bench, gate: ChannelGate) -> None:
    spinner = Spinner()
    with spinner.spinning(3.0):
        report = probe(gate, spinner.count, MonotonicClock())
    bench.row("probe", report.freeze_s * 1e6, "us", note=report.explain())
    if not report.works:
        raise Skip(report.explain())


@part("E6 latency")
def latency(bench: Bench, gate: ChannelGate) -> None:
    spinner = Spinner()
    for label, seconds in (("idle", 0.0), ("busy", 4.0)):
        if seconds:
            spinner.start(int(spinner.turns_per_second() * seconds))
        freezes, thaws = cycles(gate, CYCLES)
        for name, samples in (("freeze", freezes), ("thaw", thaws)):
            show(bench, f"E6 {name}, {label}", samples)
    torch.cuda.synchronize()


def cycles(gate: ChannelGate, count: int) -> tuple[list[float], list[float]]:
    freezes, thaws = [], []
    for _ in range(count):
        started = time.perf_counter()
        gate.freeze()
        frozen = time.perf_counter()
        gate.thaw()
        freezes.append(frozen - started)
        thaws.append(time.perf_counter() - frozen)
        time.sleep(0.002)
    return freezes, thaws


def show(bench: Bench, name: str, samples: list[float]) -> None:
    ordered = sorted(samples)
    p50, p99 = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    bench.row(f"{name} p50", p50 * 1e6, "us")
    verdict = "" if "freeze" not in name else "within the aim of 1 ms" if p99 < FREEZE_AIM else "MISSES the aim of 1 ms"
    bench.row(f"{name} p99", p99 * 1e6, "us", note=f"{verdict} (max {ordered[-1] * 1e6:.0f} us)".strip())


@part("E8 graphs")
def graphs(bench: Bench, gate: ChannelGate) -> None:
    """Freeze and thaw in the midst of graph replays of matrix products: the result must not change."""
    a = torch.randn(4096, 4096, device=bench.device, dtype=torch.bfloat16) / 64
    x = torch.randn_like(a)
    out = torch.empty_like(a)

    def work() -> None:
        y = x
        for _ in range(20):
            y = a @ y
        out.copy_(y)

    work()
    torch.cuda.synchronize()
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(100):
        out.zero_()
        graph.replay()
        gate.freeze()
        time.sleep(0.001)
        gate.thaw()
        torch.cuda.synchronize()
        if not torch.equal(out, expected):
            bench.row("E8 graphs", None, "", note="WRONG: a result changed across a freeze")
            return
    bench.row("E8 graphs", 100.0, "freezes", note="results unchanged")


@part("E5 remapping while frozen")
def remap(bench: Bench, gate: ChannelGate) -> None:
    """Unmap a slab and map the sink while a kernel stands still in mid-flight; both must complete, and it must go on."""
    from engine.memory.cuda_vmm import CudaVmm, CudaWindow

    driver = CudaVmm()
    size = -(-64 * 2**20 // driver.granularity()) * driver.granularity()
    window = CudaWindow(4, size, driver)
    for slab in range(4):
        window.map(slab)
    spinner, times = Spinner(), []
    with spinner.spinning(3.0):
        for _ in range(20):
            gate.freeze()
            before = spinner.count()
            started = time.perf_counter()
            with gate.remapping():
                window.unmap(1)
            times.append(time.perf_counter() - started)
            still = spinner.count() == before
            gate.thaw()
            window.map(1)
            if not still:
                bench.row("E5", None, "", note="WRONG: the kernel ran during the remap")
                return
    show(bench, "E5 unmap and map the sink, while frozen,", times)
    torch.cuda.synchronize()
    window.close()


@part("E7 a hold of 10 s")
def hold(bench: Bench, gate: ChannelGate) -> None:
    spinner = Spinner()
    with spinner.spinning(1.0):
        gate.freeze()
        before = spinner.count()
        time.sleep(10)
        moved = spinner.count() - before
        gate.thaw()
    torch.ones(1, device=bench.device).item()
    bench.row("E7 hold", 10.0, "s", note="the context lives" if not moved else f"WRONG: the kernel did {moved} turns")


@part("E2 a passed descriptor")
def passed_descriptor(bench: Bench, gate: ChannelGate) -> None:
    """Another process freezes us with what we sent it, in the form of one line: ok or why not, then latencies."""
    for files, label in ((True, "E2 freeze from a passed descriptor"), (False, "E1 freeze through another open file")):
        answer = ask_child(gate, files)
        if answer[0] == "ok":
            show(bench, label, [float(value) for value in answer[1:]])
        else:
            bench.row(label, None, "", note=" ".join(answer))


def ask_child(gate: ChannelGate, files: bool) -> list[str]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "bench.gpu.gate_child", str(theirs.fileno()), "files" if files else "grant"]
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
    theirs.close()
    spinner = Spinner()
    killer = threading.Timer(20, child.kill)
    killer.start()
    try:
        with ours, spinner.spinning(2.0):
            grant, descriptors = make_grant(gate)
            send_grant(ours, grant, descriptors)
            out, _ = child.communicate()
    finally:
        killer.cancel()
        gate.switch.enable()  # whatever the child left behind
    return out.split() or ["no", "answer"]
