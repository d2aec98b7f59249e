"""ChannelGate against the fake: what freeze and thaw promise, on every branch and after every failure."""

import errno
import random
import threading

import pytest

from nvdriver import abi
from nvdriver.abi import Command
from nvdriver.api import GateOptions, ScanLimits, State
from nvdriver.errors import Busy, CallFailed, DeviceLost, MissingPrivilege, Refused, StaleHandles, Status
from nvdriver.fake import Injection
from nvdriver.fake_process import FakeContext

DISABLE = Command.FIFO_DISABLE_CHANNELS


def num_calls(machine):
    return sum(command == DISABLE for _pid, command in machine.driver.calls)


@pytest.mark.parametrize("branch", sorted(abi.BRANCHES))
def test_no_progress_between_freeze_and_thaw(make_machine, branch):
    machine = make_machine(branch)
    machine.context.launch(60_000_000)
    gate = machine.open()
    assert machine.moved_us() == 5000
    gate.freeze()
    assert gate.is_frozen and machine.moved_us() == 0
    gate.thaw()
    assert not gate.is_frozen and machine.moved_us() == 5000


def test_opening_stops_nothing(machine):
    gate = machine.open()
    assert gate.state is State.THAWED
    assert machine.num_disabled == 0


def test_freeze_stops_inside_a_kernel_and_thaw_resumes_it_where_it_was(make_machine):
    machine = make_machine()
    channel = machine.context.launch(10_000)
    gate = machine.open()
    machine.clock.advance_us(4000)
    gate.freeze()
    assert 0 < channel.progress_us < 10_000 and channel.gp_get == 0
    machine.clock.advance_us(1_000_000)
    gate.thaw()
    machine.clock.advance_us(10_000)
    assert channel.progress_us == 10_000 and channel.gp_get == channel.gp_put == 1


def test_work_queued_while_frozen_is_kept(machine):
    gate = machine.open()
    gate.freeze()
    channel = machine.context.compute.channels[1]
    channel.launch(100)
    machine.clock.advance_us(5000)
    assert (channel.gp_put, channel.gp_get) == (1, 0)
    gate.thaw()
    machine.clock.advance_us(50_000)
    assert (channel.gp_put, channel.gp_get) == (1, 1)


def test_freeze_and_thaw_are_idempotent_and_free_the_second_time(machine):
    gate = machine.open()
    gate.freeze()
    frozen = num_calls(machine)
    gate.freeze()
    assert num_calls(machine) == frozen and gate.is_frozen
    gate.thaw()
    thawed = num_calls(machine)
    gate.thaw()
    assert num_calls(machine) == thawed and machine.num_disabled == 0


def test_copy_engines_run_on_unless_asked(machine):
    gate = machine.open()
    gate.freeze()
    assert all(channel.enabled for group in machine.context.copies for channel in group.channels)
    gate.close()
    everything = machine.open(options=GateOptions(scan=ScanLimits(64, 128), copy_engines=True, watch_s=machine.never))
    everything.freeze()
    assert not any(channel.enabled for group in machine.context.copies for channel in group.channels)


def test_another_tenant_is_never_touched(machine):
    neighbour = FakeContext(machine.controller)
    neighbour.launch(60_000_000)
    gate = machine.open()
    gate.freeze()
    assert all(channel.enabled for channel in neighbour.compute.channels)
    before = neighbour.progress_us
    machine.clock.advance_us(5000)
    assert neighbour.progress_us - before == 5000


def test_more_than_64_channels_go_in_several_calls(make_machine):
    machine = make_machine()
    big = FakeContext(machine.owner, num_channels=150)
    gate = machine.open(options=GateOptions(scan=ScanLimits(64, 512), watch_s=machine.never))
    before = num_calls(machine)
    gate.freeze()
    assert num_calls(machine) - before == 4  # 8 of the first context; 64, 64 and 22 of the big one
    assert not any(channel.enabled for channel in big.compute.channels)
    gate.thaw()
    assert machine.num_disabled == 0


@pytest.mark.parametrize(
    ("injection", "error"),
    [
        (Injection(status=Status.TIMEOUT, times=2), Busy),
        (Injection(status=Status.BUSY_RETRY, times=2), Busy),
        (Injection(status=Status.INSUFFICIENT_PERMISSIONS), MissingPrivilege),
        (Injection(status=Status.INVALID_CHANNEL), StaleHandles),
        (Injection(status=Status.INVALID_CLIENT), StaleHandles),
        (Injection(status=Status.INVALID_STATE), CallFailed),
        (Injection(error=errno.EIO), CallFailed),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_freeze_leaves_everything_running(machine, injection, error):
    gate = machine.open()
    injection.command, injection.applied = DISABLE, 5
    machine.driver.injections.append(injection)
    with pytest.raises(error):
        gate.freeze()
    assert gate.state is State.THAWED and machine.num_disabled == 0
    gate.freeze()
    assert gate.is_frozen


def test_a_busy_driver_is_asked_twice(machine):
    gate = machine.open()
    machine.driver.injections.append(Injection(status=Status.TIMEOUT_RETRY, command=DISABLE))
    gate.freeze()
    assert gate.is_frozen and machine.moved_us() == 0


def test_a_signal_does_not_break_a_freeze(machine):
    gate = machine.open()
    machine.driver.injections.append(Injection(error=errno.EINTR, command=DISABLE, times=3))
    gate.freeze()
    assert gate.is_frozen and machine.moved_us() == 0


def test_endless_signals_are_an_error_not_a_loop(machine):
    gate = machine.open()
    machine.driver.injections.append(Injection(error=errno.EINTR, command=DISABLE, times=8))
    with pytest.raises(Busy, match="interrupted"):
        gate.freeze()
    assert machine.num_disabled == 0


def test_a_half_done_freeze_whose_repair_fails_is_repaired_by_the_watchdog(machine):
    gate = machine.open()
    machine.driver.injections += [
        Injection(status=Status.INVALID_STATE, command=DISABLE, applied=5),
        Injection(error=errno.EIO, command=DISABLE),
    ]
    with pytest.raises(CallFailed, match="INVALID_STATE"):
        gate.freeze()
    assert gate.state is State.UNSURE and machine.num_disabled == 5
    gate.check_lease()
    assert gate.state is State.THAWED and machine.num_disabled == 0


def test_an_interrupt_in_the_middle_of_a_freeze_is_repaired_by_the_watchdog(machine):
    gate = machine.open()

    def interrupt(_command):
        machine.driver.on_control = None
        raise KeyboardInterrupt

    machine.driver.on_control = interrupt
    with pytest.raises(KeyboardInterrupt):
        gate.freeze()
    assert not gate.is_frozen and machine.num_disabled == 8
    gate.check_lease()
    assert gate.state is State.THAWED and machine.num_disabled == 0


@pytest.mark.parametrize("status", [Status.GPU_IS_LOST, Status.RESET_REQUIRED])
def test_a_lost_device_is_final(machine, status):
    gate = machine.open()
    machine.driver.injections.append(Injection(status=status, command=DISABLE))
    with pytest.raises(DeviceLost):
        gate.freeze()
    assert gate.state is State.LOST
    with pytest.raises(DeviceLost):
        gate.freeze()
    gate.thaw()
    gate.check_lease()
    gate.close()
    assert gate.state is State.CLOSED


def test_a_destroyed_context_is_reported_and_the_rest_still_thaws(machine):
    other = FakeContext(machine.owner)
    gate = machine.open()
    gate.freeze()
    machine.context.destroy()
    gate.thaw()
    assert gate.state is State.THAWED and all(channel.enabled for channel in other.compute.channels)
    with pytest.raises(StaleHandles, match="open a new gate"):
        gate.freeze()
    assert all(channel.enabled for channel in other.compute.channels)


def test_a_channel_the_driver_denies_but_still_lists_is_not_taken_for_gone(machine):
    gate = machine.open()
    gate.freeze()
    machine.driver.injections.append(Injection(status=Status.INVALID_CHANNEL, command=DISABLE, times=3))
    with pytest.raises(StaleHandles):
        gate.thaw()
    assert gate.state is State.UNSURE and machine.num_disabled == 2  # the other six were enabled all the same
    gate.check_lease()
    assert gate.state is State.THAWED and machine.num_disabled == 0


def test_close_thaws_lets_go_and_is_final(machine):
    num_files = len(machine.owner.files)
    gate = machine.open()
    gate.freeze()
    gate.close()
    gate.close()
    assert machine.num_disabled == 0 and len(machine.owner.files) == num_files
    with pytest.raises(Refused, match="closed"):
        gate.freeze()


def test_close_that_cannot_enable_raises_and_leaves_the_watchdog_at_it(machine):
    gate = machine.open()
    gate.freeze()
    machine.driver.injections.append(Injection(error=errno.EIO, command=DISABLE))
    with pytest.raises(CallFailed):
        gate.close()
    assert gate.state is State.UNSURE
    gate.check_lease()
    assert machine.num_disabled == 0


def test_leaving_the_with_block_thaws_even_on_an_error(machine):
    with pytest.raises(ZeroDivisionError), machine.open() as gate:
        gate.freeze()
        raise ZeroDivisionError
    assert machine.num_disabled == 0


def test_a_forked_child_may_neither_freeze_nor_thaw(machine):
    gate = machine.open()
    gate.freeze()
    machine.owner.number = 101  # the same memory and the same open files under another pid
    with pytest.raises(Refused, match="forked"):
        gate.freeze()
    with pytest.raises(Refused, match="forked"):
        gate.thaw()
    gate.close()
    assert machine.num_disabled == 8
    machine.owner.number = 100


def test_time_slice_is_applied_and_restored(machine):
    group = machine.context.compute
    before = group.timeslice_us
    gate = machine.open()
    gate.set_time_slice(50)
    gate.set_time_slice(1)
    assert group.timeslice_us == 1
    gate.close()
    assert group.timeslice_us == before


def test_a_short_time_slice_leaves_the_device_to_others(machine):
    online = FakeContext(machine.controller)
    online.launch(60_000_000)
    gate = machine.open()
    gate.set_time_slice(1)
    before = online.progress_us
    moved = machine.moved_us(100_000)
    assert moved < 100 and online.progress_us - before > 99_000


@pytest.mark.parametrize("microseconds", [0, -1, 1_000_001])
def test_an_absurd_time_slice_is_refused(machine, microseconds):
    with pytest.raises(Refused):
        machine.open().set_time_slice(microseconds)


def test_preempt_is_not_a_hold(machine):
    gate = machine.open()
    machine.clock.advance_us(100)
    channel = machine.context.compute.channels[0]
    assert machine.driver.gpu.is_resident(channel)
    gate.preempt()
    assert not machine.driver.gpu.is_resident(channel)
    assert machine.moved_us() == 5000


def test_many_threads_leave_the_gate_and_the_hardware_agreeing(machine):
    gate = machine.open()
    errors = []

    def hammer(seed):
        choose = random.Random(seed)
        try:
            for _ in range(50):
                choose.choice((gate.freeze, gate.thaw, gate.renew, gate.check_lease))()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert machine.num_disabled == (8 if gate.state is State.FROZEN else 0)
    gate.freeze()
    assert machine.num_disabled == 8
    gate.thaw()
    assert machine.num_disabled == 0
