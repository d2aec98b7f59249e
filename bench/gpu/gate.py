"""Section 5: does switching channels off stop the GPU, how fast on each rung, and the open questions of nvdriver/README.md with
their answers. Progress is a word in pinned host memory that a spinning kernel increments; success codes prove nothing.

E1: another client names the channels. E2: a passed descriptor. E5: remapping while frozen, compute then copies too. E6: latency
of disable, preempt and time slice, idle, busy and beside VMM calls. E7: a long hold. E8: CUDA graphs and cooperative kernels in
flight. Then the rung `stream`: a barrier in the queue and in graphs. A dry run has nvdriver's fake machine.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bench.gpu.common import Bench, Skip, seconds_of
from bench.gpu.dry import DryGpu, DrySpinner, fake_vmm
from engine.memory.cuda_vmm import CudaVmm, CudaWindow
from nvdriver.api import ChannelGate, GateOptions, make_grant, open_gate, probe, receive_grant, send_grant
from nvdriver.device import MonotonicClock
from nvdriver.errors import NvDriverError

FREEZE_AIM = 1e-3  # seconds, p99
CYCLES = 200
REMAP_LIMIT = 1.0  # seconds; a remap that takes longer waits for the frozen channels
_dry: DryGpu | None = None
PARTS: dict[str, Callable[[Bench, ChannelGate], None]] = {}


def part(name: str) -> Callable[[Callable[[Bench, ChannelGate], None]], Callable[[Bench, ChannelGate], None]]:
    def enter(function: Callable[[Bench, ChannelGate], None]) -> Callable[[Bench, ChannelGate], None]:
        PARTS[name] = function
        return function

    return enter


def run(bench: Bench) -> None:
    global _dry
    if bench.dry:
        _dry = DryGpu()
    else:
        torch.zeros(1, device=bench.device)
        Spinner.warm_up()  # CUDA makes some channels late: let them all be there before the scan
    bench.attempt("rung channel", lambda: channels(bench))
    bench.attempt("E5 with copies off too", lambda: copies_too(bench))
    bench.attempt("death while frozen", lambda: death_while_frozen(bench))
    for label, graph in (("", False), (", in a graph", True)):
        bench.attempt(f"rung stream{label}", lambda graph=graph: stream_rung(bench, graph))


def channels(bench: Bench) -> None:
    with open_it() as gate:
        bench.row("channels found", float(sum(len(f.channels.channels) for f in gate.switch.found)), "", note=gate.route.value)
        for name, function in PARTS.items():
            bench.attempt(name, lambda function=function: function(bench, gate))


def open_it(**options: Any) -> ChannelGate:
    options = {"lease_s": 30.0, "remap_limit_s": REMAP_LIMIT} | options
    try:
        return _dry.open_gate(**options) if _dry is not None else open_gate(options=GateOptions(**options))
    except NvDriverError as error:
        raise Skip(f"no channel gate here: {type(error).__name__}: {error}") from error


def make_spinner() -> Spinner | DrySpinner:
    return DrySpinner(_dry) if _dry is not None else Spinner()


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

    def wait(self) -> None:
        self._stream.synchronize()

    def turns_per_second(self) -> float:
        self.start(50_000)
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
    spinner = make_spinner()
    with spinner.spinning(3.0):
        report = probe(gate, spinner.count, MonotonicClock() if _dry is None else _dry.clock)
    bench.row("probe", report.freeze_s * 1e6, "us", note=report.explain())
    if not report.works:
        raise Skip(report.explain())


@part("E6 latency")
def latency(bench: Bench, gate: ChannelGate) -> None:
    """DISABLE_CHANNELS idle, busy and beside VMM calls; then what else takes a context off the hardware."""
    spinner, count = make_spinner(), bench.size(CYCLES, 3)
    for label, seconds in (("idle", 0.0), ("busy", 4.0), ("busy, beside VMM calls", 4.0)):
        if seconds:
            spinner.start(int(spinner.turns_per_second() * bench.size(1, 0) * seconds) or 1000)
        with mapping(bench) if "VMM" in label else nullcontext():
            freezes, thaws = cycles(gate, count)
        for name, samples in (("freeze", freezes), ("thaw", thaws)):
            show(bench, f"E6 {name}, {label}", samples)
    for name, call in (("preempt", gate.preempt), ("time slice", lambda: gate.set_time_slice(1000))):
        times = []
        for _ in range(count // 4 or 1):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        show(bench, f"E6 {name}, busy", times)
    spinner.wait()


@contextmanager
def mapping(bench: Bench) -> Iterator[None]:
    """Another thread maps and unmaps meanwhile, as a window does."""
    window, over = make_window(bench, 2), threading.Event()

    def churn() -> None:
        while not over.is_set():
            window.map(0)
            window.unmap(0)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        window.close()


def make_window(bench: Bench, slabs: int) -> CudaWindow:
    driver = fake_vmm() if bench.dry else CudaVmm()
    return CudaWindow(slabs, -(-64 * 2**20 // driver.granularity()) * driver.granularity(), driver)


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
    if bench.dry:
        raise Skip("needs CUDA graphs")
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


@part("E8 a cooperative kernel")
def cooperative(bench: Bench, gate: ChannelGate) -> None:
    """All blocks must be resident at once for a cooperative launch; a freeze takes all of them off and brings them back."""
    if bench.dry:
        raise Skip("needs CUDA")
    from bench.gpu.spin import meet_kernel

    blocks = torch.cuda.get_device_properties(bench.device).multi_processor_count
    word = torch.zeros(1, dtype=torch.int32, device=bench.device)
    for turns in (10, 50_000):  # the first compiles
        word.zero_()
        meet_kernel[(blocks,)](word, turns, blocks, launch_cooperative_grid=True)
    for _ in range(20):
        gate.freeze()
        time.sleep(0.001)
        gate.thaw()
    torch.cuda.synchronize()
    right = int(word) == 50_000 * blocks
    bench.row(
        "E8 cooperative kernel", 20.0, "freezes", note="it ended with the right count" if right else f"WRONG: {int(word)}"
    )


@part("E5 remapping while frozen")
def remap(bench: Bench, gate: ChannelGate) -> None:
    remap_frozen(bench, gate, "E5 unmap and map the sink, while frozen,")


def remap_frozen(bench: Bench, gate: ChannelGate, name: str) -> None:
    """Unmap a slab and map the sink while a kernel stands still in mid-flight; both must complete, and it must go on."""
    window = make_window(bench, 4)
    for slab in range(4):
        window.map(slab)
    spinner, times = make_spinner(), []
    with spinner.spinning(3.0):
        for _ in range(bench.size(20, 2)):
            gate.freeze()
            before = spinner.count()
            started = time.perf_counter()
            with gate.remapping():
                window.unmap(1)
            times.append(time.perf_counter() - started)
            still = spinner.count() == before
            gate.thaw()
            window.map(1)
            if times[-1] > REMAP_LIMIT:
                bench.row(name, times[-1], "s", note="NO: it waited for the frozen channels until the watchdog enabled them")
                return
            if not still:
                bench.row(name, None, "", note="WRONG: the kernel ran during the remap")
                return
    show(bench, name, times)
    window.close()


def copies_too(bench: Bench) -> None:
    """E5 once more with the copy channels off as well: may a gate hold those?"""
    with open_it(copy_engines=True) as gate:
        bench.row("channels found, copies too", float(sum(len(f.channels.channels) for f in gate.switch.found)), "")
        remap_frozen(bench, gate, "E5 the same with copy channels off,")


@part("E7 a hold of 10 s")
def hold(bench: Bench, gate: ChannelGate) -> None:
    spinner = make_spinner()
    with spinner.spinning(1.0):
        gate.freeze()
        before = spinner.count()
        time.sleep(bench.size(10, 0))
        moved = spinner.count() - before
        gate.thaw()
    torch.ones(1, device=bench.device).item()
    bench.row(
        "E7 hold",
        float(bench.size(10, 0)),
        "s",
        note="the context lives" if not moved else f"WRONG: the kernel did {moved} turns",
    )


@part("E2 a passed descriptor")
def passed_descriptor(bench: Bench, gate: ChannelGate) -> None:
    """Another process freezes us with what we sent it, in the form of one line: ok or why not, then latencies."""
    if bench.dry:
        raise Skip("needs a driver that two processes share")
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
    spinner = make_spinner()
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


def death_while_frozen(bench: Bench) -> None:
    """A worker is frozen from here, as the engine does it, and killed: its memory must come back once we let go of it."""
    if bench.dry:
        raise Skip("needs a driver that two processes share; tests/cuda_pair kills workers on a stand-in")
    free_before = torch.cuda.mem_get_info()[0]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-m", "bench.gpu.gate_victim", str(theirs.fileno())]
        victim = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        ours.settimeout(40.0)
        try:
            gate = open_gate(*receive_grant(ours), options=GateOptions(lease_s=30.0))
            gate.freeze()
        finally:
            victim.kill()
            victim.wait()
    held = (free_before - torch.cuda.mem_get_info()[0]) / 2**30
    started = time.perf_counter()
    gate.close()
    while torch.cuda.mem_get_info()[0] < free_before - 2**28 and time.perf_counter() - started < 10.0:
        time.sleep(0.001)
    seconds = time.perf_counter() - started
    verdict = "WRONG: it did not come back" if seconds >= 10.0 else f"{held:.1f} GiB were held while our descriptor was open"
    bench.row("killed while frozen: memory is back after", 1e3 * seconds, "ms", note=verdict)


def stream_rung(bench: Bench, graph: bool) -> None:
    """Kernels with a barrier before each, queued far ahead: how long until none runs, and until one runs again."""
    if bench.dry:
        raise Skip("needs streams; tests/cuda_pair runs the rung on a stand-in")
    from bench.gpu.spin import count_kernel
    from engine.colocate.cuda_gate import CudaStreams, StreamBarrier

    barrier, spinner, layers = StreamBarrier(CudaStreams()), Spinner(), 32
    turns = max(1, int(spinner.turns_per_second() * 200e-6))
    word, stream = spinner._word, torch.cuda.Stream()

    def work() -> None:
        for _ in range(layers):
            barrier.put(torch.cuda.current_stream().cuda_stream)
            count_kernel[(1,)](word, turns)

    with torch.cuda.stream(stream):
        again: Callable[[], None] = work
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                work()
            again = captured.replay
        freezes, thaws = [], []
        for _ in range(40):
            again()
            again()
            time.sleep(0.001)
            called = time.perf_counter()
            barrier.set(True)
            freezes.append(max(0.0, last_progress(spinner) - called))
            seen, called = spinner.count(), time.perf_counter()
            barrier.set(False)
            while spinner.count() == seen and time.perf_counter() - called < 1.0:
                pass
            thaws.append(time.perf_counter() - called)
            stream.synchronize()
        if graph:
            bare = torch.cuda.CUDAGraph()
            with torch.cuda.graph(bare, stream=stream):
                for _ in range(layers):
                    count_kernel[(1,)](word, 1)
            barred = torch.cuda.CUDAGraph()
            with torch.cuda.graph(barred, stream=stream):
                for _ in range(layers):
                    barrier.put(torch.cuda.current_stream().cuda_stream)
                    count_kernel[(1,)](word, 1)
            cost = (seconds_of(bench, barred.replay) - seconds_of(bench, bare.replay)) / layers
            bench.row("stream: an open barrier in a graph", 1e6 * cost, "us a layer")
    label = ", in a graph" if graph else ""
    show(bench, f"stream: freeze, kernels of 0.2 ms{label}", freezes)
    show(bench, f"stream: thaw{label}", thaws)


def last_progress(spinner: Spinner, still: float = 0.003) -> float:
    """When the counter moved last: it is watched until it stood still for so long, a second at most."""
    seen, moved = spinner.count(), time.perf_counter()
    end = moved + 1.0
    while time.perf_counter() - moved < still and time.perf_counter() < end:
        if (now := spinner.count()) != seen:
            seen, moved = now, time.perf_counter()
    return moved
