"""Fakes for the gate's rungs on a GPU: a device's queue, a worker with channels on a fake driver, and one that spins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from ctypes import c_uint32
from dataclasses import dataclass, field
from typing import Any

from processes import PATIENCE

from engine.colocate.control import LEASE_SECONDS, ControlPage, Word
from engine.colocate.cuda_gate import Agent, DeviceSide, StreamBarrier
from engine.colocate.gate import Freeze
from nvdriver.api import ChannelGate, GateOptions, ScanLimits, make_grant, open_gate
from nvdriver.fake import FakeDriver
from nvdriver.fake_process import FakeContext, FakeProcess

CHANNELS = 8


class FakeStream:
    """A device's queue: kernels, and waits for a word. `run` goes on until it is empty or a wait holds it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], bool]] = []
        self.done = 0
        self.word = c_uint32(0)
        self.capturing: list[Callable[[], bool]] | None = None
        self.obeys = True

    # engine.colocate.cuda_gate.StreamOps
    def make_word(self) -> tuple[Any, int]:
        return self.word, 0x1000

    def wait_zero(self, stream: int, address: int) -> None:
        assert (stream, address) == (7, 0x1000)
        self.add(lambda: not self.obeys or self.word.value == 0)

    # engine.colocate.cuda_gate.Device
    def stream(self) -> int:
        return 7

    def work(self) -> None:
        self.add(self._count)

    def synchronize(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run():
            assert time.monotonic() < deadline, "the queue never ends"
            time.sleep(2e-5)

    # the fake's own
    def add(self, what: Callable[[], bool]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(what)

    def run(self) -> bool:
        while self.queue and self.queue[0]():
            self.queue.pop(0)
        return not self.queue

    def _count(self) -> bool:
        self.done += 1
        return True


class FakeChannels(FakeStream):
    """The same, where a kernel runs on the channels of a fake driver."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def work(self) -> None:
        self.add(self._machine.run_kernel)


@dataclass
class Machine:
    """A worker with a CUDA context and a main process beside it. Watchdogs sleep; tests tick by hand."""

    driver: FakeDriver = field(default_factory=FakeDriver)
    gates: list[ChannelGate] = field(default_factory=list)
    launched: bool = False

    def __post_init__(self) -> None:
        self.worker = FakeProcess(self.driver, 100)
        self.main = FakeProcess(self.driver, 200, neighbours=[self.worker])
        self.context = FakeContext(self.worker, num_channels=CHANNELS)

    def open(self, *args: Any, process: FakeProcess | None = None, **kwargs: Any) -> ChannelGate:
        options = GateOptions(scan=ScanLimits(clients=64, objects=128), watch_s=3600.0, **kwargs.pop("options", {}))
        environ = {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
        host = process or self.worker
        gate = open_gate(*args, host=host, clock=self.driver.clock, environ=environ, options=options, **kwargs)
        self.gates.append(gate)
        return gate

    def guard(self, control: ControlPage) -> ChannelGate:
        """The worker's own gate, which follows main's heartbeat."""
        return self.open(beat=lambda: control[Word.HEARTBEAT], options={"lease_s": 2 * LEASE_SECONDS})

    def granted(self, guard: ChannelGate) -> ChannelGate:
        """Main's gate on what the worker sent."""
        grant, files = make_grant(guard, self.worker)
        return self.open(grant, [file.pass_to(self.main) for file in files], process=self.main)

    def lapse(self, guard: ChannelGate) -> None:
        """The guard sees no heartbeat for longer than its lease, and switches the channels on."""
        guard.check_lease()
        self.driver.clock.sleep(2.5 * LEASE_SECONDS)
        guard.check_lease()

    @property
    def num_off(self) -> int:
        return sum(not c.enabled for c in self.context.compute.channels)

    def run_kernel(self) -> bool:
        """Launch a kernel once, and let a little time pass; true when it is done."""
        channel = self.context.compute.channels[0]
        if not self.launched:
            channel.launch(20)
            self.launched = True
        self.driver.clock.advance_us(5)
        if channel.queue:
            return False
        self.launched = False
        return True


def silence(control: ControlPage, seconds: float = 1.5 * LEASE_SECONDS) -> None:
    """Main gave its last sign of life so long ago."""
    control[Word.HEARTBEAT] = time.monotonic_ns() - round(seconds * 1e9)


class Spinning:
    """A worker that spins for a probe, and its agent: two threads, as in the real one."""

    def __init__(self, control: ControlPage, device: FakeStream, channels: ChannelGate | None) -> None:
        barrier = StreamBarrier(device)
        self._control = control
        self._side = DeviceSide(control, barrier, device)
        self._agent = Agent(control, barrier, channels)
        self._over = False
        self._thread = threading.Thread(target=self._spin)

    def __enter__(self) -> Spinning:
        self._control.beat()
        self._agent.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._control[Word.FROZEN] = Freeze.NO
        self._thread.join()
        self._agent.close()

    def _spin(self) -> None:
        while not self._over:
            self._control.beat()
            look = self._side.spin()
            self._control[Word.PROGRESS_NS] = time.monotonic_ns()
            self._control[Word.PROGRESS] += 1
            while look and self._control[Word.FROZEN]:
                time.sleep(1e-4)


def beating(control: ControlPage) -> Callable[[], None]:
    """Main's heartbeat, as the arbiter's thread keeps it; ends it when called."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            control.beat()

    thread = threading.Thread(target=beat)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end
