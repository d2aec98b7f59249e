"""Memory that moves while a worker is frozen: only when its channels are surely off, whoever switched them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from fake_cuda import CHANNELS, FakeStream, Machine, beating, silence
from fake_vmm import GRAIN, FakeDevice, FakeVmm
from processes import eventually

from engine.colocate import cuda_gate
from engine.colocate.control import LEASE_SECONDS, ControlPage, Word
from engine.colocate.cuda_gate import Agent, AgentGate, DeviceSide, GrantedGate, StreamBarrier
from engine.colocate.cuda_slabs import OfflineWindow, OnlineWindow
from engine.colocate.gate import Freeze
from engine.memory.cuda_vmm import CudaWindow
from engine.types import Tenant
from nvdriver.abi import Command
from nvdriver.api import ChannelGate
from nvdriver.errors import Status
from nvdriver.fake import Injection

SLABS = 5  # as in conftest.py


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.driver.injections.clear()
    for gate in made.gates:
        gate.close()


class Colocated:
    """A worker frozen by a rung while its kernel touches all of its window, and main that takes slabs from it.

    Kernels of the worker touch memory after every driver call of its process, unless its channels are off.
    """

    def __init__(self, machine: Machine, control: ControlPage, channels: ChannelGate | None) -> None:
        self.control, self.machine = control, machine
        self.epochs = [0] * SLABS
        for slab in range(SLABS):
            control.publish_slab(slab, Tenant.OFFLINE, 0)
        device = FakeDevice()
        self.driver = FakeVmm(device)
        self.window = CudaWindow(SLABS, GRAIN, self.driver)
        self.running = False
        self.slabs = OfflineWindow(self.window, control, self.drain)
        self.driver.kernel = self.kernel
        for slab in range(SLABS):
            self.slabs.map(slab)
        self.settled = 0
        self.agent = Agent(control, StreamBarrier(FakeStream()), channels, self.slabs, self.settle)
        self.running = True
        self.main = FakeVmm(device)
        self.main_window = CudaWindow(SLABS, GRAIN, self.main, [self.main.import_fd(self._fd(slab)) for slab in range(SLABS)])
        self.online = OnlineWindow(self.main_window, control, lambda: None, self.never, patience=30.0)

    def _fd(self, slab: int) -> int:
        return self.driver.export_fd(self.window._slabs[slab])

    def kernel(self) -> None:
        if self.running and not self.machine.num_off:
            for slab in range(SLABS):
                self.driver.write(self.window.address(slab), 666)

    def drain(self) -> None:
        self.running = False

    def settle(self) -> None:
        self.settled += 1

    def never(self) -> None:
        raise AssertionError("the worker is not stuck")

    def take(self, slab: int) -> None:
        self.epochs[slab] += 1
        self.control.publish_slab(slab, Tenant.ONLINE, self.epochs[slab])


def test_freeze_remap_map_thaw(machine: Machine, control: ControlPage) -> None:
    """The whole way: a kernel cut in the middle goes on in the sink, online has its slab within the freeze."""
    both = Colocated(machine, control, machine.guard(control))
    agent, gate = both.agent, AgentGate(control)
    both.kernel()
    end = beating(control)
    agent.start()
    gate.freeze()
    gate.wait_stopped(30.0)
    both.take(3)
    both.online.map(3)
    both.main.write(both.main_window.address(3), 1)
    assert machine.num_off == CHANNELS, "all of it while the worker stood still"
    gate.thaw()
    eventually(lambda: machine.num_off == 0, "thaw")
    both.kernel()
    assert both.main.read(both.main_window.address(3)) == 1
    assert both.driver.read(both.window.address(3)) == 666
    agent.close()
    end()


def test_the_agent_touches_no_mapping_while_the_channels_may_run(machine: Machine, control: ControlPage) -> None:
    both = Colocated(machine, control, machine.guard(control))
    control.beat()
    for frozen in (Freeze.NO, Freeze.LAYER, Freeze.STREAM, Freeze.BY_MAIN):
        control[Word.FROZEN] = frozen
        both.agent.look()
    both.take(0)
    for _ in range(3):
        both.agent.look()
    assert both.settled == 1, "the engine's thread is asked once"
    assert both.slabs.is_behind
    both.slabs.drain_and_let_go()
    assert not both.slabs.is_behind and not both.window.is_mapped(0)


def test_the_agent_moves_no_memory_while_a_layer_is_launched(
    machine: Machine, control: ControlPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launching thread asks the driver about addresses, whether or not the channels are on."""
    monkeypatch.setattr(cuda_gate, "_LAUNCH_SECONDS", 30.0)
    both = Colocated(machine, control, machine.guard(control))
    control.beat()
    AgentGate(control).freeze()
    both.agent.look()
    both.take(0)
    with both.agent._launching:
        looking = threading.Thread(target=both.agent.look)
        looking.start()
        assert both.slabs.is_behind and both.window.is_mapped(0)
    looking.join()
    assert not both.slabs.is_behind and not both.window.is_mapped(0)


def test_a_freeze_that_failed_moves_no_memory(machine: Machine, control: ControlPage) -> None:
    both = Colocated(machine, control, machine.guard(control))
    control.beat()
    machine.driver.injections.append(Injection(status=Status.NOT_SUPPORTED, command=Command.FIFO_DISABLE_CHANNELS, times=-1))
    AgentGate(control).freeze()
    both.take(0)
    both.agent.look()
    assert both.slabs.is_behind and both.window.is_mapped(0)
    machine.driver.injections.clear()


def test_channels_that_came_on_by_themselves_are_off_again_before_memory_moves(machine: Machine, control: ControlPage) -> None:
    channels = machine.guard(control)
    both = Colocated(machine, control, channels)
    control.beat()
    AgentGate(control).freeze()
    both.agent.look()
    machine.lapse(channels)
    assert machine.num_off == 0 and control[Word.HELD] == 1
    both.take(0)
    both.agent._let_go(both.slabs)
    assert both.window.is_mapped(0), "HELD alone does not prove it"
    control.beat()
    both.agent.look()
    assert machine.num_off == CHANNELS and not both.window.is_mapped(0)


def test_mains_word_counts_until_it_falls_silent(machine: Machine, control: ControlPage) -> None:
    channels = machine.guard(control)
    both = Colocated(machine, control, channels)
    gate = GrantedGate(control, machine.granted(channels))
    control.beat()
    gate.freeze()
    both.take(0)
    both.agent.look()
    assert not both.window.is_mapped(0)

    silence(control)
    both.agent.look()
    machine.lapse(channels)
    assert machine.num_off == 0
    control.beat()  # main wakes, and takes a slab before it has looked at its gate
    both.take(1)
    both.agent.look()
    assert both.window.is_mapped(1)
    gate.freeze()
    both.agent.look()
    assert machine.num_off == CHANNELS and not both.window.is_mapped(1)
    gate.thaw()
    both.kernel()


def test_main_thaws_when_the_remap_is_done(machine: Machine, control: ControlPage) -> None:
    channels = machine.guard(control)
    both = Colocated(machine, control, channels)
    gate = GrantedGate(control, machine.granted(channels))
    control.beat()
    gate.freeze()
    both.take(2)
    thaw = threading.Thread(target=gate.thaw)
    fake_unmap = both.driver.unmap

    def slow_unmap(address: int, size: int) -> None:
        fake_unmap(address, size)
        thaw.start()
        eventually(lambda: control[Word.FROZEN] == Freeze.BY_MAIN, "main wants to thaw")
        time.sleep(0.01)
        both.kernel()  # a hole: it faults unless the channels are still off
        assert machine.num_off == CHANNELS

    both.driver.unmap = slow_unmap  # type: ignore[method-assign]
    both.agent.look()
    thaw.join()
    both.kernel()
    assert machine.num_off == 0 and not both.window.is_mapped(2)


def test_the_watchdog_waits_for_a_remap_too(machine: Machine, control: ControlPage) -> None:
    channels = machine.guard(control)
    both = Colocated(machine, control, channels)
    control.beat()
    AgentGate(control).freeze()
    both.agent.look()
    channels.check_lease()  # sees the heartbeat, the last for now
    machine.driver.clock.sleep(1.5 * LEASE_SECONDS)
    both.take(2)
    fake_unmap = both.driver.unmap

    def slow_unmap(address: int, size: int) -> None:
        fake_unmap(address, size)
        machine.driver.clock.sleep(LEASE_SECONDS)  # the lease lapses in the middle
        channels.check_lease()
        both.kernel()

    both.driver.unmap = slow_unmap  # type: ignore[method-assign]
    both.agent.look()
    assert machine.num_off == CHANNELS and not both.window.is_mapped(2)
    channels.check_lease()
    assert machine.num_off == 0
    both.kernel()


def test_main_does_not_wait_for_ever_for_a_remap(machine: Machine, control: ControlPage) -> None:
    channels = machine.guard(control)
    both = Colocated(machine, control, channels)
    gate = GrantedGate(control, machine.granted(channels))
    gate.freeze()
    both.take(2)  # and no agent looks
    gate.thaw()
    assert machine.num_off == 0


def test_a_worker_standing_between_layers_lets_go_by_itself(machine: Machine, control: ControlPage) -> None:
    """The stream and layer rungs: what was launched runs out first, though the barrier is closed."""
    both = Colocated(machine, control, None)
    stream = FakeStream()
    barrier = StreamBarrier(stream)
    side = DeviceSide(control, barrier, stream)
    side.slabs = OfflineWindow(both.window, control, side.drain)
    side.boundary()
    stream.work()
    barrier.set(True)
    side.stand()
    assert stream.done == 0, "nothing to let go of, so nothing runs"
    both.take(1)
    side.stand()
    assert stream.done == 1 and not side.slabs.is_behind
    assert stream.word.value == 1
