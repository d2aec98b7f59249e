"""The fake is strict where a real driver is, on every branch; and it can lie, so that the probe has work to do."""

import ctypes
import itertools

import pytest

from nvdriver import abi, fake
from nvdriver.abi import Command
from nvdriver.api import probe
from nvdriver.errors import Status
from nvdriver.fake import FakeDriver, Validation
from nvdriver.fake_process import FakeContext, FakeProcess

ADMIN, NICE = fake.CAP_SYS_ADMIN, fake.CAP_SYS_NICE
GROUP, SUBDEVICE, DEVICE = abi.OBJECT_HANDLE_BASE + 0x13, abi.OBJECT_HANDLE_BASE + 3, abi.OBJECT_HANDLE_BASE + 2


def raw_control(process, client, target, command, params):
    """A control call that goes round our own allow-list."""
    call = abi.ControlCall(
        client=client,
        object=target,
        command=command,
        params=ctypes.addressof(params),
        params_size=ctypes.sizeof(params),
    )
    process.files[0].ioctl(abi.REQUEST_CONTROL, call)
    return call.status


@pytest.mark.parametrize("branch", sorted(abi.BRANCHES))
@pytest.mark.parametrize(
    ("command", "target", "size", "needed"),
    [
        (Command.GROUP_PREEMPT, GROUP, 8, frozenset()),
        (Command.GROUP_SET_TIMESLICE, GROUP, 8, frozenset()),
        (fake.GROUP_INTERLEAVE, GROUP, 4, frozenset({NICE})),
        (fake.STOP_RUNLIST, DEVICE, 4, frozenset({ADMIN})),
        (fake.DISABLE_USER_CHANNELS, SUBDEVICE, 1, None),  # kernel callers only
    ],
)
def test_privileges(branch, command, target, size, needed):
    for capabilities in (frozenset(), frozenset({NICE}), frozenset({ADMIN}), frozenset({ADMIN, NICE})):
        process = FakeProcess(FakeDriver(branch), 1, capabilities=capabilities)
        context = FakeContext(process)
        status = raw_control(process, context.client, target, command, (ctypes.c_uint8 * size)())
        allowed = needed is not None and needed <= capabilities
        assert status == (Status.OK if allowed else Status.INSUFFICIENT_PERMISSIONS)


@pytest.mark.parametrize(("branch", "size"), [(550, 2), (570, 2), (575, 3), (580, 3), (590, 3), (595, 3)])
def test_the_one_structure_that_grew_between_branches(branch, size):
    """A real driver would take this command from an ordinary user; only our allow-list keeps it from being sent."""
    process = FakeProcess(FakeDriver(branch), 1)
    context = FakeContext(process)
    for tried in (1, 2, 3, 4):
        params = (ctypes.c_uint8 * tried)(1)
        status = raw_control(process, context.client, GROUP, fake.GROUP_SCHEDULE, params)
        assert (status == Status.OK) == (tried == size)


@pytest.mark.parametrize("request_number", [0, abi.REQUEST_CONTROL + 16, abi.REQUEST_CONTROL & 0xFFFF, 0xC0304630])
def test_an_unknown_request_is_einval(machine, request_number):
    with pytest.raises(OSError, match="Invalid argument"):
        machine.owner.files[0].ioctl(request_number, abi.ControlCall())


@pytest.mark.parametrize(
    ("validation", "same_user", "status"),
    [
        (Validation.STRICT, True, Status.INVALID_CLIENT),
        (Validation.SAME_USER, True, Status.OK),
        (Validation.SAME_USER, False, Status.INVALID_CLIENT),
        (Validation.OFF, False, Status.OK),
    ],
)
def test_who_may_name_another_files_client(machine, validation, same_user, status):
    machine.driver.validation = validation
    other = FakeProcess(machine.driver, 300, user=1000 if same_user else 1001)
    other.open_control()
    assert raw_control(other, machine.context.client, GROUP, Command.GROUP_PREEMPT, abi.PreemptParams(wait=1)) == status


@pytest.mark.parametrize(("checks", "status"), [(True, Status.INVALID_CHANNEL), (False, Status.OK)])
def test_naming_foreign_channels_from_ones_own_subdevice_is_up_to_the_firmware(machine, checks, status):
    """An open question of real firmware; the fake models both answers, and we rely on neither."""
    machine.driver.gsp_checks_entries = checks
    own = FakeContext(machine.controller)
    params = abi.DisableChannelsParams(disable=1, num_channels=1)
    params.clients[0], params.channels[0] = machine.context.client, GROUP + 1
    found = raw_control(machine.controller, own.client, SUBDEVICE, Command.FIFO_DISABLE_CHANNELS, params)
    assert found == status and machine.num_disabled == (status == Status.OK)


def test_disabling_only_the_scheduling_lets_the_running_kernel_finish(make_machine):
    """Why that switch must stay 0."""
    machine = make_machine()
    channel = machine.context.launch(10_000)
    machine.context.launch(10_000)
    machine.clock.advance_us(100)
    params = abi.DisableChannelsParams(disable=1, num_channels=1, only_disable_scheduling=1)
    params.clients[0], params.channels[0] = machine.context.client, GROUP + 1
    raw_control(machine.owner, machine.context.client, SUBDEVICE, Command.FIFO_DISABLE_CHANNELS, params)
    machine.clock.advance_us(100_000)
    assert channel.progress_us == 10_000 and channel.gp_get == 1


def test_the_gpu_runs_on_until_the_call_has_taken_effect(make_machine):
    machine = make_machine()
    machine.driver._latency_us = itertools.repeat(600)
    machine.context.launch(60_000_000)
    gate = machine.open()
    before = machine.context.progress_us
    gate.freeze()
    assert machine.context.progress_us - before == 600
    assert machine.moved_us() == 0


def test_two_tenants_share_by_time_slices(machine):
    other = FakeContext(machine.controller)
    other.launch(60_000_000)
    moved = machine.moved_us(409_600)
    assert moved == other.progress_us == 204_800


def test_the_probe_believes_progress(machine):
    report = probe(machine.open(), lambda: machine.context.progress_us, machine.clock)
    assert report.works and report.freeze_s == pytest.approx(300e-6)
    assert "300 us" in report.explain() and machine.num_disabled == 0


def test_the_probe_finds_a_driver_that_only_says_ok(machine):
    machine.driver.is_honest = False
    report = probe(machine.open(), lambda: machine.context.progress_us, machine.clock)
    assert not report.works and not report.stood_still and "software gate" in report.explain()


def test_the_probe_does_not_take_an_idle_gpu_for_a_stopped_one(make_machine):
    machine = make_machine()
    report = probe(machine.open(), lambda: machine.context.progress_us, machine.clock)
    assert not report.works and "does not move" in report.explain()


def test_the_probe_notices_a_kernel_that_never_comes_back(machine):
    gate = machine.open()
    machine.driver.on_control = lambda _command: machine.context.compute.channels[0].queue.clear()
    report = probe(gate, lambda: machine.context.progress_us, machine.clock)
    assert not report.ran_after and "did not resume" in report.explain()
