"""Stand-ins for a dry run of the sections on gates and memory: nvdriver's fake machine, and the tests' fake of CUDA's calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvdriver.api import ChannelGate, GateOptions, ScanLimits, open_gate
from nvdriver.fake import FakeDriver
from nvdriver.fake_process import FakeContext, FakeProcess

TESTS = Path(__file__).resolve().parents[2] / "tests"


class DryGpu:
    """A machine whose clock runs when somebody looks at it."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.process = FakeProcess(self.driver, 100)
        self.context = FakeContext(self.process)
        self.clock = self.driver.clock

    def open_gate(self, **options: Any) -> ChannelGate:
        scan = ScanLimits(clients=64, objects=128)
        options = {"scan": scan, "watch_s": 3600.0} | options
        environ = {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
        return open_gate(host=self.process, clock=self.clock, environ=environ, options=GateOptions(**options))


class DrySpinner:
    """`gate.Spinner` on that machine."""

    def __init__(self, gpu: DryGpu) -> None:
        self._gpu = gpu

    def start(self, turns: int) -> None:
        self._gpu.context.launch(turns)

    def count(self) -> int:
        self._gpu.clock.advance_us(100)
        return self._gpu.context.progress_us

    def turns_per_second(self) -> float:
        return 1e6

    def wait(self) -> None:
        while any(channel.queue for channel in self._gpu.context.compute.channels):
            self._gpu.clock.advance_us(100_000)

    @contextmanager
    def spinning(self, seconds: float) -> Iterator[None]:
        self.start(int(1e6 * seconds))
        try:
            yield
        finally:
            self.wait()


def fake_vmm() -> Any:
    """A driver for `CudaWindow`, as the tests have it."""
    sys.path.append(str(TESTS))
    try:
        from fake_vmm import FakeDevice, FakeVmm
    finally:
        sys.path.remove(str(TESTS))
    return FakeVmm(FakeDevice())
