"""Fail open: whoever dies or falls silent, the channels run again."""

import contextlib
import errno
import random
import threading

import pytest

from nvdriver.abi import Command
from nvdriver.api import GateOptions, ScanLimits, State
from nvdriver.errors import NvDriverError, Refused, Status
from nvdriver.fake import Injection
from nvdriver.fake_gpu import ManualClock
from nvdriver.watchdog import Lease, Watchdog

DISABLE = Command.FIFO_DISABLE_CHANNELS


def test_a_freeze_lapses_when_it_is_not_renewed(machine):
    gate = machine.open()
    gate.freeze()
    machine.clock.sleep(0.9)
    gate.check_lease()
    assert gate.is_frozen and machine.num_disabled == 8
    machine.clock.sleep(0.2)
    assert not gate.is_frozen  # a lapsed lease promises nothing, even before the watchdog acts
    gate.check_lease()
    assert gate.state is State.THAWED and machine.num_disabled == 0


def test_a_renewed_freeze_holds(machine):
    gate = machine.open()
    gate.freeze()
    for _ in range(20):
        machine.clock.sleep(0.5)
        assert gate.renew()
        gate.check_lease()
    assert machine.num_disabled == 8


def test_a_late_renewal_says_so_and_a_new_freeze_is_real(machine):
    gate = machine.open()
    gate.freeze()
    machine.clock.sleep(1.5)
    assert not gate.renew()
    gate.check_lease()
    gate.freeze()
    assert gate.is_frozen and machine.num_disabled == 8


def test_freezing_again_counts_as_a_sign_of_life(machine):
    gate = machine.open()
    for _ in range(5):
        gate.freeze()
        machine.clock.sleep(0.8)
    assert gate.is_frozen


def test_the_heartbeat_of_the_controller_keeps_the_freeze_and_its_silence_ends_it(machine):
    word = [0]
    gate = machine.open(beat=lambda: word[0])
    gate.freeze()
    for _ in range(10):
        machine.clock.sleep(0.8)
        word[0] += 1
        gate.check_lease()
    assert machine.num_disabled == 8
    machine.clock.sleep(1.1)
    gate.check_lease()
    assert machine.num_disabled == 0


def test_an_unreadable_heartbeat_is_silence(machine):
    def beat():
        raise OSError("the page is gone")

    gate = machine.open(beat=beat)
    gate.freeze()
    machine.clock.sleep(1.1)
    gate.check_lease()
    assert machine.num_disabled == 0


def test_the_guard_thaws_what_a_dead_controller_froze(machine):
    word = [0]
    guard = machine.open(beat=lambda: word[0])
    gate = machine.open_passed(guard)
    gate.freeze()
    machine.controller.die()
    assert machine.num_disabled == 8 and guard.state is State.THAWED
    machine.clock.sleep(1.1)
    guard.check_lease()
    assert machine.num_disabled == 0 and machine.moved_us() == 5000


def test_the_guard_enables_once_a_silence_and_again_after_the_next(machine):
    word = [0]
    guard = machine.open(beat=lambda: word[0])
    gate = machine.open_passed(guard)
    for _ in range(2):
        word[0] += 1
        guard.check_lease()
        gate.freeze()
        machine.clock.sleep(1.1)
        before = len(machine.driver.calls)
        for _ in range(5):
            guard.check_lease()
        assert len(machine.driver.calls) == before + 1
        assert machine.num_disabled == 0


def test_the_guard_tries_again_until_the_driver_obeys(machine):
    word = [0]
    guard = machine.open(beat=lambda: word[0])
    machine.open_passed(guard).freeze()
    machine.driver.injections.append(Injection(error=errno.EIO, command=DISABLE, times=2))
    machine.clock.sleep(1.1)
    for _ in range(2):
        with pytest.raises(Exception, match="DISABLE_CHANNELS"):
            guard.check_lease()
    guard.check_lease()
    assert machine.num_disabled == 0


def test_the_owner_dying_while_frozen_frees_its_memory_once_the_controller_lets_go(machine):
    machine.context.space.create(1 << 30)
    gate = machine.open_passed(machine.open())
    gate.freeze()
    machine.owner.die()
    assert machine.driver.gpu.memory_used == 1 << 30  # the passed descriptor keeps the client alive
    gate.check_lease()
    assert gate.state is State.CLOSED and machine.driver.gpu.memory_used == 0


def test_a_thread_thaws_without_anyone_asking(machine):
    gate = machine.open(watch_s=0.001)
    gate.freeze()
    machine.clock.sleep(1.1)
    with gate._changed:
        assert gate._changed.wait_for(lambda: gate.state is State.THAWED, timeout=30)
    assert machine.num_disabled == 0


def test_the_thread_survives_a_failing_tick():
    ticks, third = [], threading.Event()

    def tick():
        ticks.append(None)
        if len(ticks) == 3:
            third.set()
        raise RuntimeError("not yet")

    watchdog = Watchdog(tick, 0.001)
    assert third.wait(30) and watchdog.is_alive()
    watchdog.stop()
    assert not watchdog.is_alive()


def test_no_freeze_without_a_living_watchdog(machine):
    gate = machine.open()
    gate._watchdog.stop()
    with pytest.raises(Refused, match="watchdog"):
        gate.freeze()
    assert machine.num_disabled == 0


def test_a_stuck_remap_is_freed_by_enabling_the_channels(machine):
    """If remapping needed a frozen channel it would hang, holding off the thaw: the watchdog breaks the knot."""
    options = GateOptions(scan=ScanLimits(64, 128), lease_s=60, remap_limit_s=2, watch_s=machine.never)
    gate = machine.open(options=options)
    space = machine.context.space
    space.map(0, space.create(64))
    gate.freeze()
    space.may_proceed.clear()
    machine.driver.on_control = lambda command: space.may_proceed.set() if not machine.num_disabled else None
    inside = threading.Event()

    def remap():
        with gate.remapping():
            inside.set()
            space.unmap(0)

    thread = threading.Thread(target=remap)
    thread.start()
    inside.wait()
    machine.clock.sleep(1.9)
    gate.check_lease()
    assert machine.num_disabled == 8
    machine.clock.sleep(0.2)
    gate.check_lease()
    thread.join()
    assert machine.num_disabled == 0 and gate.state is State.THAWED


def test_a_lease_without_a_heartbeat_lapses_only_past_its_length():
    clock = ManualClock()
    lease = Lease(1.0, clock)
    clock.sleep(1.0)
    assert not lease.has_lapsed()
    clock.sleep(0.001)
    assert lease.has_lapsed()
    lease.renew()
    assert not lease.has_lapsed()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happened_silence_ends_with_every_channel_running(machine, seed):
    """Random histories with failing calls. Never frozen in name only, and never frozen for good."""
    choose = random.Random(seed)
    word = [0]
    gate = machine.open(beat=(lambda: word[0]) if seed % 2 else None)

    def fail():
        applied, times = choose.randrange(9), choose.randrange(1, 4)
        status = choose.choice([Status.TIMEOUT, Status.INVALID_STATE, Status.INVALID_CHANNEL])
        machine.driver.injections.append(Injection(status=status, command=DISABLE, applied=applied, times=times))

    def tick():
        word[0] += 1

    acts = [gate.freeze, gate.thaw, gate.renew, gate.check_lease, lambda: machine.clock.sleep(0.4), fail, tick]
    for _ in range(60):
        with contextlib.suppress(NvDriverError):
            choose.choice(acts)()
        if gate.is_frozen:
            assert machine.num_disabled == 8
        if gate.state is State.THAWED:
            assert machine.num_disabled == 0
    machine.driver.injections.clear()
    machine.clock.sleep(1.1)
    gate.check_lease()
    assert machine.num_disabled == 0 and machine.moved_us() == 5000
