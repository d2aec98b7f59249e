"""Taking memory away from a running kernel: disable, remap, enable, in that order."""

import threading

import pytest

from nvdriver.errors import Refused

SLAB = 64 << 20


@pytest.fixture
def slab(machine):
    """A slab mapped at address 0 and a kernel that keeps touching it."""
    space = machine.context.space
    memory = space.create(SLAB)
    space.map(0, memory)
    space.set_access(0)
    machine.context.compute.channels[0].queue.clear()
    machine.context.launch(60_000_000, touches=[0, SLAB - 1])
    return memory


def remap_to_sink(machine):
    space = machine.context.space
    sink = space.create(SLAB)
    space.unmap(0)
    machine.clock.advance_us(5000)  # the window in which nothing is mapped
    space.map(0, sink)
    machine.clock.advance_us(5000)  # mapped, but without access
    space.set_access(0)
    return sink


def test_disable_remap_enable_faults_nothing_and_spares_the_slab(machine, slab):
    gate = machine.open()
    gate.freeze()
    with gate.remapping():
        sink = remap_to_sink(machine)
    slab.writers.clear()  # it belongs to the online tenant now
    gate.thaw()
    assert machine.moved_us() == 5000
    assert machine.driver.gpu.faults == []
    assert slab.writers == set() and sink.writers == {"compute of 100"}


def test_remapping_under_running_channels_faults_the_context(machine, slab):
    """The fake does fault, so the test above can fail."""
    machine.open()
    remap_to_sink(machine)
    assert machine.driver.gpu.faults == ["compute of 100"]
    assert machine.moved_us() == 0


def test_enabling_before_access_is_set_faults_the_context(machine, slab):
    gate = machine.open()
    space = machine.context.space
    gate.freeze()
    space.unmap(0)
    space.map(0, space.create(SLAB))
    gate.thaw()
    machine.clock.advance_us(1)
    assert machine.driver.gpu.faults == ["compute of 100"]


def test_remapping_is_refused_while_the_channels_may_run(machine):
    gate = machine.open()
    with pytest.raises(Refused, match="freeze first"), gate.remapping():
        pass
    gate.freeze()
    machine.clock.sleep(1.1)  # the lease has lapsed: the watchdog may thaw at any moment
    with pytest.raises(Refused, match="freeze first"), gate.remapping():
        pass


@pytest.mark.parametrize("end", ["thaw", "close"])
def test_a_thaw_waits_for_the_remap(machine, slab, end):
    gate = machine.open()
    gate.freeze()
    with gate.remapping():
        thread = threading.Thread(target=getattr(gate, end))
        thread.start()
        remap_to_sink(machine)
        assert machine.num_disabled == 8
    thread.join()
    assert machine.num_disabled == 0 and machine.moved_us() == 5000
    assert machine.driver.gpu.faults == []


def test_a_lapsed_lease_waits_for_the_remap_too(machine, slab):
    gate = machine.open()
    gate.freeze()
    with gate.remapping():
        machine.clock.sleep(1.5)
        gate.check_lease()
        remap_to_sink(machine)
        assert machine.num_disabled == 8
    gate.check_lease()
    assert machine.num_disabled == 0 and machine.moved_us() == 5000
    assert machine.driver.gpu.faults == []


def test_an_error_in_a_remap_does_not_hold_off_the_thaw_for_ever(machine):
    gate = machine.open()
    gate.freeze()
    with pytest.raises(ZeroDivisionError), gate.remapping():
        raise ZeroDivisionError
    gate.thaw()
    assert machine.num_disabled == 0


def test_one_sink_serves_many_addresses_and_memory_goes_with_the_last_reference(machine):
    space, gpu = machine.context.space, machine.driver.gpu
    sink = space.create(SLAB)
    for address in (0, SLAB, 2 * SLAB):
        space.map(address, sink)
    with pytest.raises(ValueError, match="mapped already"):
        space.map(SLAB // 2, sink)
    space.release(sink)
    for address in (0, SLAB, 2 * SLAB):
        assert gpu.memory_used == SLAB
        space.unmap(address)
    assert gpu.memory_used == 0
