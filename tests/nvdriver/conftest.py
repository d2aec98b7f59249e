"""One fake machine: an owner with a CUDA context, a controller beside it, and gates that are closed afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nvdriver.api import ChannelGate, GateOptions, ScanLimits, State, make_grant, open_gate
from nvdriver.fake import FakeDriver
from nvdriver.fake_process import FakeContext, FakeProcess

SMALL_SCAN = ScanLimits(clients=64, objects=128)


@dataclass
class Machine:
    """`never`: the watchdog thread is alive but asleep, so tests tick by hand (`gate.check_lease()`)."""

    mps_directory: Path
    branch: int = 580
    driver: FakeDriver = field(init=False)
    owner: FakeProcess = field(init=False)
    controller: FakeProcess = field(init=False)
    context: FakeContext = field(init=False)
    gates: list[ChannelGate] = field(default_factory=list)
    never: float = 3600.0

    def __post_init__(self) -> None:
        self.driver = FakeDriver(self.branch)
        self.owner = FakeProcess(self.driver, 100)
        self.controller = FakeProcess(self.driver, 200, neighbours=[self.owner])
        self.context = FakeContext(self.owner)

    @property
    def clock(self) -> Any:
        return self.driver.clock

    def open(
        self, *args: Any, process: FakeProcess | None = None, watch_s: float | None = None, **kwargs: Any
    ) -> ChannelGate:
        kwargs.setdefault("options", GateOptions(scan=SMALL_SCAN, watch_s=watch_s or self.never))
        kwargs.setdefault("environ", {"CUDA_MPS_PIPE_DIRECTORY": str(self.mps_directory)})
        gate = open_gate(*args, host=process or self.owner, clock=self.clock, **kwargs)
        self.gates.append(gate)
        return gate

    def open_passed(self, guard: ChannelGate, **kwargs: Any) -> ChannelGate:
        """The controller's gate on descriptors that the owner passed."""
        grant, files = make_grant(guard, self.owner)
        return self.open(grant, [f.pass_to(self.controller) for f in files], process=self.controller, **kwargs)

    def moved_us(self, microseconds: int = 5000) -> int:
        """How far the context's kernels get in the given time."""
        before = self.context.progress_us
        self.clock.advance_us(microseconds)
        return self.context.progress_us - before

    @property
    def num_disabled(self) -> int:
        return sum(not c.enabled for group in self.driver.gpu.groups for c in group.channels)


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []

    def make(branch: int = 580) -> Machine:
        machines.append(Machine(tmp_path, branch))
        return machines[-1]

    yield make
    for machine in machines:
        machine.driver.injections.clear()
        for gate in machine.gates:
            if not gate._host.is_alive:
                gate._state = State.CLOSED  # a dead process closes nothing; only its thread is left to stop
            gate.close()


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine whose context is busy for a long time."""
    made = make_machine()
    made.context.launch(60_000_000)
    return made
